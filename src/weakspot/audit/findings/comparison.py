"""Comparison of two runs on the images that both have: which scores moved, by how much, with what confidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from weakspot.audit.findings.locations import score_names
from weakspot.audit.plan.attack_plan import AttackPlan
from weakspot.audit.plan.limits import limit_of
from weakspot.audit.plan.plan import Plan, is_minimal
from weakspot.audit.store.records import has_records
from weakspot.audit.store.run import Run
from weakspot.models.probe import read_probe
from weakspot.statistics import false_discovery, mean_intervals, mean_test, paired_proportion_interval

if TYPE_CHECKING:
    import pandas as pd


COLUMNS = (
    "score", "attack", "region", "images", "before", "after", "difference", "low", "high", "p", "q",
)  # fmt: skip
ROBUST, CLEAN = "robust_accuracy", "clean_accuracy"
CLEAR = 0.05  # of q


@dataclass(frozen=True)
class Comparison:
    """Two runs beside each other.

    Attributes:
        table: a row for each score, attack and region that both have: images, the mean before and after, the mean
            difference after - before of the same images with its 95% interval (low, high; NaN where there is none),
            p (of yes and no McNemar's exact test), q corrected over all rows (Benjamini and Hochberg).
            "clean_accuracy" has no attack and no region.
        images: that both have.
        only: what only one of the runs has, in words.
        remarks: what else makes them unlike, in words.
    """

    table: pd.DataFrame
    images: int
    only: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def moved(self) -> pd.DataFrame:
        """The rows whose q is below 0.05 and whose interval leaves zero out, the surest first."""
        table = self.table
        clear = table[(table["q"] < CLEAR) & ((table["low"] > 0) | (table["high"] < 0))]
        return clear.sort_values(["q", "p"], kind="stable")

    def sentence(self) -> str:
        """The verdict on robust accuracy."""
        robust = self.table[self.table["score"] == ROBUST]
        if robust.empty:
            if self.table["attack"].ne("").any():
                return "No attack that was run in both has a robust accuracy: see the other scores."
            return "No attack and region was run in both: there is nothing to compare."
        if not robust["images"].any():
            return "Of no image is it known in both runs how an attack ended: there is nothing to compare."
        clear = self.moved[self.moved["score"] == ROBUST]
        if clear.empty:
            return (
                f"Robust accuracy has not moved beyond chance in any of {len(robust)} attacks x regions, on "
                f"{self.images} images that both have."
            )
        parts = [_in_words(row) for row in clear.itertuples(index=False)]
        return f"Robust accuracy has moved: {'; '.join(parts)}."

    def as_mapping(self) -> dict[str, Any]:
        """Plain values; what is unknown is None."""
        plain = self.table.astype(object).where(self.table.notna(), None)
        return {
            "verdict": self.sentence(),
            "images": self.images,
            "scores": plain.to_dict("records"),
            "only": list(self.only),
            "remarks": list(self.remarks),
        }


def _in_words(row: Any) -> str:
    return (
        f"{row.attack} in {row.region} {row.before:.0%} to {row.after:.0%} ({100 * row.difference:+.0f} points, "
        f"95% from {100 * row.low:+.0f} to {100 * row.high:+.0f})"
    )


def compare(before: Run, after: Run) -> Comparison:
    """Compare two runs, image by image.

    Images are the same where their stored content is, wherever they lie and whatever they are called; attacks are the
    same where name, budget and settings are, regions where their text is.

    Args:
        before: a run.
        after: another one, of another model or version as a rule.

    Raises:
        ValueError: when they share no image, no records are there, or `eight_bit` of the two runs differs.
    """
    import pandas as pd

    for run in (before, after):
        if not has_records(run.folder, complete=run.complete):
            raise ValueError(f"{run.name} has no records yet")
    if before.eight_bit != after.eight_bit:
        raise ValueError(
            f"eight_bit must be the same for both runs, got {before.eight_bit} for {before.name} and {after.eight_bit} "
            f"for {after.name}"
        )
    plans = (before.plan, after.plan)
    shared_attacks = _shared(plans[0].attacks, plans[1].attacks)
    # Regions of other images are controls within a run: another run has others.
    mine, theirs = (plan.reported_regions for plan in plans)
    regions = [region for region in mine if region in theirs]
    names = [name for name in score_names(before) if name in score_names(after)]
    pair = _whole(before, after)
    rows, common = [_moves(pair, [CLEAN], "", "").iloc[: 1 if len(pair) else 0]], len(pair)
    relabeled = int((pair["label"] != pair["label_after"]).sum())
    for own, other in shared_attacks:
        for region in regions:
            pair = _pair(_cell(before, own.label, region, names), _cell(after, other.label, region, names))
            scores = [ROBUST, *names] if _comparable(plans, own, other) else names
            if scores:
                rows.append(_moves(pair, scores, own.label, region))
    if not common:
        raise ValueError(f"{before.name} and {after.name} share no image: none has the same content in both")
    table = pd.concat(rows, ignore_index=True)
    known = table["p"].notna()
    table["q"] = np.nan
    table.loc[known, "q"] = false_discovery(table.loc[known, "p"].to_numpy(float))
    only = [*_only(before, plans[0].attacks, [one for one, _ in shared_attacks], mine, regions),
            *_only(after, plans[1].attacks, [one for _, one in shared_attacks], theirs, regions)]  # fmt: skip
    remarks = _remarks(before, after)
    apart = [own.label for own, other in shared_attacks if not _comparable(plans, own, other)]
    if apart:
        remarks.append(
            f"robust accuracy is not compared for {', '.join(apart)}: minimal-norm attacks need one stated budget, the "
            "same in both runs"
        )
    if relabeled and not all(_predicted(run) for run in (before, after)):
        remarks.append(f"labels differ on {relabeled} of these images")
    return Comparison(table[list(COLUMNS)], common, tuple(only), tuple(remarks))


def _moves(pair: pd.DataFrame, names: Sequence[str], attack: str, region: str) -> pd.DataFrame:
    """A row for each score of the pair's columns NAME and NAME_after."""
    import pandas as pd

    sides = [pair[[f"{name}{suffix}" for name in names]].to_numpy(float) for suffix in ("", "_after")]
    known = np.isfinite(sides[0]) & np.isfinite(sides[1])
    before, after = (np.where(known, side, np.nan) for side in sides)
    found = mean_intervals(after - before)
    counts = known.sum(0)
    means = [np.where(counts, np.nansum(side, 0) / np.maximum(counts, 1), np.nan) for side in (before, after)]
    p = [mean_test((after - before)[:, place]) for place in range(len(names))]
    for place in range(len(names)):
        moved = (after - before)[known[:, place], place]
        if (
            len(moved) and np.isin(moved, (-1, 0, 1)).all()
        ):  # proportions, also where every image changed alike
            found[place] = paired_proportion_interval(moved == 1, moved == -1)
    return pd.DataFrame(
        {
            "score": list(names), "attack": attack, "region": region, "images": counts, "before": means[0],
            "after": means[1], "difference": found[:, 0], "low": found[:, 1], "high": found[:, 2], "p": p,
        }
    )  # fmt: skip


def _whole(before: Run, after: Run) -> pd.DataFrame:
    """Every image that both have, once, with whether it is read rightly, as of clean accuracy, and its label."""
    query = (
        "select content, any_value(index) as index, any_value(image) as image, any_value(correct) as correct, "
        "any_value(label) as label from records group by content, index order by index"
    )
    pair = _pair(*(run.sql(query).df() for run in (before, after)))
    return pair.rename(columns={"correct": CLEAN, "correct_after": f"{CLEAN}_after"})


def _cell(run: Run, attack: str, region: str, names: Sequence[str]) -> pd.DataFrame:
    chosen = "".join(', "' + name.replace('"', '""') + '"' for name in names)
    query = (
        f"select index, content, image, label, robust::int as {ROBUST}{chosen} from outcomes "  # noqa: S608
        "where attack = $attack and region = $region order by index"
    )
    found: pd.DataFrame = run.sql(query, attack=attack, region=region).df()
    return found


def _pair(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Side by side by content; the same content several times is paired in order."""
    for frame in (before, after):
        frame["copy"] = frame.groupby("content").cumcount()
    return before.merge(after, on=["content", "copy"], suffixes=("", "_after"), validate="one_to_one")


def _shared(before: Sequence[AttackPlan], after: Sequence[AttackPlan]) -> list[tuple[AttackPlan, AttackPlan]]:
    same = {_identity(attack): attack for attack in after}
    return [(attack, same[_identity(attack)]) for attack in before if _identity(attack) in same]


def _identity(attack: AttackPlan) -> tuple[Any, ...]:
    return attack.name, attack.budget, attack.settings


def _comparable(plans: Sequence[Plan], before: AttackPlan, after: AttackPlan) -> bool:
    """Whether robust accuracy under an attack is counted at the same budget in both runs."""
    if not is_minimal(before):
        return True
    first, second = (limit_of(plan, attack) for plan, attack in zip(plans, (before, after), strict=True))
    return first is not None and second is not None and first[1:] == second[1:]


def _only(
    run: Run,
    attacks: Sequence[AttackPlan],
    shared: Sequence[AttackPlan],
    regions: Sequence[str],
    common: Sequence[str],
) -> list[str]:
    """What a run alone has."""
    said = [f"attack {attack.label}" for attack in attacks if attack not in shared]
    said += [f"region {region}" for region in regions if region not in common]
    return [f"{what} only in {run.name}" for what in said]


def _predicted(run: Run) -> bool:
    """Whether its labels are the model's own predictions."""
    return set(run.about.get("labels", {})) == {"prediction"}


def _remarks(before: Run, after: Run) -> list[str]:
    """What makes two runs unlike besides what is compared."""
    said = []
    models: list[Mapping[str, Any]] = [run.about.get("model", {}) for run in (before, after)]
    if models[0].get("fingerprint") == models[1].get("fingerprint"):
        probes = [read_probe(model["probe"]) for model in models if "probe" in model]
        same_size = models[0].get("input_size") == models[1].get("input_size")
        other = len(probes) == 2 and same_size and not probes[0].agrees(probes[1])
        said.append(
            "both runs are of the same weights" + (", which are used in different ways" if other else "")
        )
    facts: dict[str, list[Any]] = {
        "seed": [run.plan.seed for run in (before, after)],
        "fraction": [run.plan.fraction for run in (before, after)],
        "input size": [tuple(model.get("input_size", ())) for model in models],
        "labels": [", ".join(sorted(run.about.get("labels", {}))) for run in (before, after)],
        "weakspot": [run.about.get("versions", {}).get("weakspot") for run in (before, after)],
        "torch": [run.about.get("versions", {}).get("torch") for run in (before, after)],
    }
    for name, values in facts.items():
        if values[0] != values[1]:
            said.append(f"{name} differs: {values[0]} before, {values[1]} after")
    said += [f"{run.name}: {run.shortfall}" for run in (before, after) if run.shortfall]
    said += [f"{run.name}: {sentence}" for run in (before, after) for sentence in run.remarks]
    if all(_predicted(run) for run in (before, after)):
        said.append("labels are each model's own predictions: what is robust is the answer, right or wrong")
    return said
