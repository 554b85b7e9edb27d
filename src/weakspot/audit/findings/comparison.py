"""Comparison of two runs on the images that both contain: which scores moved, by how much, and how certain that is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from weakspot.audit.findings.outcomes import in_region, quoted_name, score_names
from weakspot.audit.findings.scores import ATTACK_SCORES
from weakspot.audit.plan.attack_plan import AttackPlan
from weakspot.audit.plan.plan import Plan
from weakspot.audit.store.run import Run
from weakspot.audit.store.run_info import resume_command
from weakspot.statistics import false_discovery, mean_intervals, mean_test, paired_proportion_interval
from weakspot.statistics.number_format import counted, percent, points

COLUMNS = (
    "score", "attack", "region", "images", "before", "after", "difference", "low", "high", "p", "q",
)  # fmt: skip
ROBUST, CLEAN = "robust_accuracy", "clean_accuracy"
MAX_Q = 0.05
LEAST_IMAGES = 6  # in McNemar's test, with p = 2 / 2**6 = .03 if all change alike


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Attributes:
        table: one row per score, attack and region that both runs have: images; the means before and after; the mean
            difference after - before over the same images with its 95% interval low, high (NaN if there is none); p
            (McNemar's exact test for yes/no scores); q, corrected over all rows (Benjamini and Hochberg).
            "clean_accuracy" has neither attack nor region.
        images: images that both runs contain.
        only: what only one of the runs contains, in words.
        remarks: other differences between the runs, in words.
    """

    table: pd.DataFrame
    images: int
    only: tuple[str, ...]
    remarks: tuple[str, ...]

    def __repr__(self) -> str:
        scores = f"{self.table['score'].nunique()} scores, {len(self.moved)} of {len(self.table)} rows moved"
        return f"Comparison({counted(self.images)}, {scores})\n  {self.sentence()}"

    @property
    def moved(self) -> pd.DataFrame:
        """The rows with q below 0.05 and an interval without zero, smallest q first."""
        table = self.table
        moved = table[(table["q"] < MAX_Q) & ((table["low"] > 0) | (table["high"] < 0))]
        return moved.sort_values(["q", "p"], kind="stable")

    def sentence(self) -> str:
        """The verdict on robust accuracy."""
        robust = self.table[self.table["score"] == ROBUST]
        if robust.empty and self.table["attack"].ne("").any():
            return "No attack that both runs contain has a robust accuracy: see the other scores."
        if robust.empty:
            return "The runs have no attack and region in common: robust accuracy cannot be compared."
        if not robust["images"].any():
            return "No image has a known attack outcome in both runs: robust accuracy cannot be compared."
        moved = self.moved[self.moved["score"] == ROBUST]
        if moved.empty:
            tested = robust[robust["images"] > 0]
            cells = "the attack and region" if len(tested) == 1 else f"any of {len(tested)} attacks x regions"
            return (
                f"No change of robust accuracy beyond chance was found for {cells}, on "
                f"{self._tested_images(tested['images'])}."
            )
        changes = [
            f"{row['attack']} {in_region(row['region'])} from {percent(row['before'])} to {percent(row['after'])} "
            f"({points(row['difference'], row['low'], row['high'])})"
            for row in moved.to_dict("records")
        ]
        return f"Robust accuracy has moved: {'; '.join(changes)}."

    def _tested_images(self, counts: pd.Series) -> str:
        """The images with known outcomes in both runs, from their number in each row, and whether they are too few."""
        least, most = int(counts.min()), int(counts.max())
        few = (
            f" (of {counted(most)}, even a change of all would be within chance)"
            if most < LEAST_IMAGES
            else ""
        )
        if least == self.images:
            return f"{counted(self.images)} that both runs contain{few}"
        known = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        return f"{known} of {counted(self.images)} that both runs contain, where both outcomes are known{few}"

    def as_mapping(self) -> dict[str, object]:
        """Values for JSON; an unknown number is None."""
        # As objects, because a column of floats would turn None into NaN again.
        plain = self.table.astype(object).where(self.table.notna(), None)
        return {
            "verdict": self.sentence(),
            "images": self.images,
            "scores": plain.to_dict("records"),
            "only": list(self.only),
            "remarks": list(self.remarks),
        }


class Shared(NamedTuple):
    """What two runs have in common: attacks as pairs (before, after), regions and scores."""

    attacks: list[tuple[AttackPlan, AttackPlan]]
    regions: list[str]
    scores: list[str]


def compare(before: Run, after: Run) -> Comparison:
    """Compare two runs image by image, usually of two models or versions.

    Images are the same if their stored content is the same, whatever their names and folders. Attacks are the same if
    name, budget and settings are, whether a default is written out or not; regions if their text is.

    Raises:
        ValueError: if the runs have no image in common, a run has no finished shard yet, or `eight_bit` differs.
    """
    for run in (before, after):
        if not run.has_records:
            raise ValueError(
                f"{run.name} has no finished shard yet; continue it with {resume_command(run.name)}"
            )
    if before.eight_bit != after.eight_bit:
        raise ValueError(
            f"eight_bit must be the same for both runs, got {before.eight_bit} for {before.name} and {after.eight_bit} "
            f"for {after.name}"
        )
    images = _matched_images(before, after)
    if images.empty:
        raise ValueError(f"{before.name} and {after.name} have no image in common: no content is in both")
    shared = shared_parts(before, after)
    rows, incomparable = [_differences(images, [CLEAN], "", "")], []
    for own, other in shared.attacks:
        comparable = same_limit(before.plan, own, after.plan, other)
        if not comparable:
            incomparable.append(own.label)
        scores = [ROBUST, *shared.scores] if comparable else shared.scores
        for region in shared.regions if scores else ():
            cells = _cell(before, own.label, region, scores), _cell(after, other.label, region, scores)
            rows.append(_differences(_matched(*cells), scores, own.label, region))
    table = pd.concat(rows, ignore_index=True)
    table["q"] = false_discovery(table["p"].to_numpy(float))
    remarks = _remarks(before, after)
    if incomparable:
        remarks.append(
            f"robust accuracy is not compared for {', '.join(incomparable)}: minimal-norm attacks need one stated "
            "budget, the same in both runs"
        )
    relabeled = int((images["label"] != images["label_after"]).sum())
    if relabeled and not (_has_predicted_labels(before) and _has_predicted_labels(after)):
        remarks.append(f"labels differ on {relabeled} of these images")
    only = [
        *_only_in(before, after.plan, [own for own, _ in shared.attacks], shared.regions),
        *_only_in(after, before.plan, [other for _, other in shared.attacks], shared.regions),
    ]
    return Comparison(table[list(COLUMNS)], len(images), tuple(only), tuple(remarks))


def _differences(pairs: pd.DataFrame, scores: Sequence[str], attack: str, region: str) -> pd.DataFrame:
    """One row per score, from the columns NAME and NAME_after of `pairs`."""
    sides = [pairs[[f"{name}{suffix}" for name in scores]].to_numpy(float) for suffix in ("", "_after")]
    # A mean difference needs the same images on both sides.
    known = np.isfinite(sides[0]) & np.isfinite(sides[1])
    before, after = (np.where(known, side, np.nan) for side in sides)
    changes = after - before
    intervals = mean_intervals(changes)
    counts = known.sum(0)
    means = [np.where(counts, np.nansum(side, 0) / np.maximum(counts, 1), np.nan) for side in (before, after)]
    for place in range(len(scores)):
        moved = changes[known[:, place], place]
        if len(moved) and all(np.isin(side[known[:, place], place], (0, 1)).all() for side in sides):
            # Yes/no scores: unlike the bootstrap, this interval exists even if every image changed alike.
            intervals[place] = paired_proportion_interval(moved == 1, moved == -1)
    return pd.DataFrame(
        {
            "score": list(scores), "attack": attack, "region": region, "images": counts, "before": means[0],
            "after": means[1], "difference": intervals[:, 0], "low": intervals[:, 1], "high": intervals[:, 2],
            "p": [mean_test(changes[:, place]) for place in range(len(scores))],
        }
    )  # fmt: skip


def _matched_images(before: Run, after: Run) -> pd.DataFrame:
    """One row per image in both runs: whether it is correctly classified (clean accuracy), and its labels."""
    # An image has a row for every attack and region, all with the same label and clean prediction.
    query = (
        "select content, any_value(index) as index, any_value(image) as image, any_value(correct) as correct, "
        "any_value(label) as label from outcomes group by content, index order by index"
    )
    images = _matched(before.sql(query).df(), after.sql(query).df())
    return images.rename(columns={"correct": CLEAN, "correct_after": f"{CLEAN}_after"})


def _cell(run: Run, attack: str, region: str, scores: Sequence[str]) -> pd.DataFrame:
    names = "".join(f", {quoted_name(name)}" for name in scores if name != ROBUST)
    query = (
        f"select index, content, robust::int as {ROBUST}{names} from outcomes "  # noqa: S608 - names are quoted
        "where attack = $attack and region = $region order by index"
    )
    frame: pd.DataFrame = run.sql(query, attack=attack, region=region).df()
    return frame


def _matched(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Join by content; images that are listed under several labels are matched in order."""
    before, after = (frame.assign(copy=frame.groupby("content").cumcount()) for frame in (before, after))
    return before.merge(after, on=["content", "copy"], suffixes=("", "_after"), validate="one_to_one")


def shared_parts(before: Run, after: Run) -> Shared:
    """What both runs contain, whatever the names of attacks."""
    # Reported regions only: regions of other images are controls within their own run.
    regions = [region for region in before.plan.reported_regions if region in after.plan.reported_regions]
    scores = score_names(after, ATTACK_SCORES)
    return Shared(
        matched_attacks(before.plan, after.plan),
        regions,
        [name for name in score_names(before, ATTACK_SCORES) if name in scores],
    )


def matched_attacks(before: Plan, after: Plan) -> list[tuple[AttackPlan, AttackPlan]]:
    """The same attacks of both plans, each of them once; those that are written alike come first."""
    left = list(after.attacks)
    found: dict[str, tuple[AttackPlan, AttackPlan]] = {}
    for key in (_as_written, lambda attack: attack.identity):
        for attack in before.attacks:
            other = next((other for other in left if key(other) == key(attack)), None)
            if attack.label not in found and other is not None:
                found[attack.label] = attack, other
                left.remove(other)
    return [found[attack.label] for attack in before.attacks if attack.label in found]


def _as_written(attack: AttackPlan) -> object:
    return attack.name, attack.budget, attack.settings


def same_limit(plan: Plan, attack: AttackPlan, other_plan: Plan, other: AttackPlan) -> bool:
    """Whether robust accuracy under an attack is counted at the same budget in both runs."""
    if not attack.is_minimal:
        return True
    first, second = plan.limit_of(attack), other_plan.limit_of(other)
    return first is not None and second is not None and first[1:] == second[1:]  # kind and size, not the text


def _only_in(run: Run, other: Plan, attacks: Sequence[AttackPlan], regions: Sequence[str]) -> list[str]:
    """What only this run contains."""
    labels = {attack.label: attack for attack in other.attacks}
    parts = [
        f"attack {attack.label}{_different(attack, labels.get(attack.label))}"
        for attack in run.plan.attacks
        if attack not in attacks
    ]
    parts += [f"region {region}" for region in run.plan.reported_regions if region not in regions]
    return [f"{part} only in {run.name}" for part in parts]


def _different(attack: AttackPlan, other: AttackPlan | None) -> str:
    """What tells an attack from another one of the same label."""
    if other is None:
        return ""
    own, others = dict(sorted(attack.identity[2])), dict(other.identity[2])
    parts = [] if attack.name == other.name else [f"that is {attack.name}"]
    if attack.budget != other.budget:
        parts.append(f"at {attack.budget}" if attack.budget else "without a budget")
    different = [
        key for key in {**own, **others} if (key in own, own.get(key)) != (key in others, others.get(key))
    ]
    if different:
        settings = [f"{key}={own[key]}" if key in own else f"the default {key}" for key in different]
        parts.append(f"with {' and '.join(settings)}")
    return "".join(f" {part}" for part in parts)


def _has_predicted_labels(run: Run) -> bool:
    return set(run.info.labels) == {"prediction"}


def _facts(run: Run) -> dict[str, object]:
    """What should be the same in two runs that are compared."""
    info = run.info
    return {
        "seed": run.plan.seed,
        "fraction": run.plan.fraction,
        "input size": info.model.input_size if info.model else (),
        "source of labels": ", ".join(sorted(info.labels)),
        "weakspot": info.versions.get("weakspot"),
        "torch": info.versions.get("torch"),
    }


def _remarks(before: Run, after: Run) -> list[str]:
    """Differences between the runs other than the scores."""
    remarks = []
    first, second = before.info.model, after.info.model
    if first is not None and second is not None and first.fingerprint == second.fingerprint:
        changed = first.input_size == second.input_size and not first.probe.agrees(second.probe)
        remarks.append(
            "both runs use the same weights"
            + (", but the model computes something else with them" if changed else "")
        )
    after_facts = _facts(after)
    for name, value in _facts(before).items():
        if value != after_facts[name]:
            remarks.append(f"{name} differs: {value} before, {after_facts[name]} after")
    runs = (before, after)
    remarks += [f"{run.name}: {run.shortfall}" for run in runs if run.shortfall]
    remarks += [f"{run.name}: {sentence}" for run in runs for sentence in run.remarks]
    if _has_predicted_labels(before) and _has_predicted_labels(after):
        remarks.append(
            "labels are each model's own predictions: robust accuracy says whether the answer stays, not whether it is "
            "correct"
        )
    return remarks
