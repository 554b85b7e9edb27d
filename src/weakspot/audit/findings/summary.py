"""Summary of an audit: robust accuracy of every attack in every region, in numbers and in words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from weakspot.audit.findings.contrasts import region_contrasts, told
from weakspot.audit.findings.locations import score_findings
from weakspot.audit.plan.limits import counted_budget, judged_attacks
from weakspot.audit.store.run import Run
from weakspot.statistics import proportion_interval

if TYPE_CHECKING:
    import pandas as pd


ROBUST = ("robust_accuracy", "robust_low", "robust_high")


@dataclass(frozen=True)
class CellSummary:
    """One attack in one region.

    Attributes:
        attack: its label.
        budget: at which robust accuracy is counted: of the attack, or of a minimal-norm attack the stated one; None
            where there is none.
        region: as the plan has it.
        region_fraction: of the image, on the mean over the images that are known; NaN where there are none.
        images: of which it is known how the attack ended.
        robust_accuracy: share of these that the attack did not fool within the budget; NaN of a minimal-norm attack
            without one (see `weakspot.audit.findings.robustness`).
        low: lower end of its 95% interval over images; NaN of a single image, and where there is no robust accuracy.
        high: upper end.
        troubled: images on which something went wrong.
    """

    attack: str
    budget: str | None
    region: str
    region_fraction: float
    images: int
    robust_accuracy: float
    low: float
    high: float
    troubled: int

    @property
    def name(self) -> str:
        """The attack with its budget: "fmn at linf:4/255"."""
        return (
            f"{self.attack} at {self.budget}"
            if self.budget and self.budget not in self.attack
            else self.attack
        )


@dataclass(frozen=True)
class Summary:
    """An audit in short.

    Attributes:
        cells: every attack in every region.
        images: that could be read.
        clean_accuracy: share of them that the model reads as their label, with nothing changed.
        labels: where the labels come from, in words.
        weakest: what the strongest attack leaves in each region, in one sentence.
        regions: each region beside its control of equal area in a sentence, where the plan has controls.
        remarks: what is to be known of the model and of earlier sessions, such as images that were changed.
    """

    cells: tuple[CellSummary, ...]
    images: int
    clean_accuracy: float
    labels: str
    weakest: str
    regions: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def as_mapping(self) -> dict[str, Any]:
        """Plain values; what is unknown is None."""
        return {
            **asdict(self),
            "regions": list(self.regions),
            "remarks": list(self.remarks),
            "clean_accuracy": _plain(self.clean_accuracy),
            "cells": [{key: _plain(value) for key, value in asdict(cell).items()} for cell in self.cells],
        }


def summarize(run: Run) -> Summary:
    """The summary of a run, complete or not; only the columns it needs are read."""
    found = run.sql(
        "select attack, region, index, fooled, robust, correct, region_fraction, trouble is not null as troubled "
        "from outcomes"
    ).df()
    cells = []
    for attack, region in run.plan.reported_cells:
        mine = found[(found["attack"] == attack.label) & (found["region"] == region)].sort_values("index")
        known = mine[mine["fooled"].notna()]
        held = known["robust"].dropna().to_numpy(dtype=bool)
        robust, low, high = proportion_interval(held) if len(held) else (np.nan,) * 3
        cells.append(
            CellSummary(
                attack.label,
                counted_budget(run.plan, attack),
                region,
                float(known["region_fraction"].mean()),
                len(known),
                robust,
                low,
                high,
                int(mine["troubled"].sum()),
            )
        )
    clean = found.drop_duplicates("index")["correct"].dropna().to_numpy(dtype=float)
    return Summary(
        tuple(cells),
        int(found["index"].nunique()),
        float(clean.mean()) if len(clean) else np.nan,
        _labels(run.about.get("labels", {})),
        weakest(cells),
        tuple(told(region_contrasts(run))),
        run.remarks,
    )


def cell_table(run: Run, summary: Summary) -> pd.DataFrame:
    """A row for each attack and region: what a gate can be asked about.

    Returns:
        Columns attack, budget ("" where there is none), judged (whether the attack has a robust accuracy), region,
        region_fraction, images, robust_accuracy, robust_low, robust_high, clean_accuracy, troubled, skipped, and of
        every
        score its mean, NAME_low and NAME_high.
    """
    import pandas as pd

    table = pd.DataFrame([asdict(cell) for cell in summary.cells])
    table["budget"] = table["budget"].fillna("")
    table["judged"] = table["attack"].isin(judged_attacks(run.plan))
    table = table.rename(columns={"low": "robust_low", "high": "robust_high"})
    table = table.assign(clean_accuracy=summary.clean_accuracy, skipped=len(run.skipped))
    for score, rows in score_findings(run).groupby("score", sort=False):
        own = rows.set_index(["attack", "region"])[["mean", "low", "high"]]
        own.columns = pd.Index([re.sub(r"\W", "_", f"{score}{suffix}") for suffix in ("", "_low", "_high")])
        table = table.join(own.drop(columns=own.columns.intersection(table.columns)), on=["attack", "region"])
    return table


def weakest(cells: Sequence[CellSummary]) -> str:
    """One sentence on what the strongest attack leaves in each region; no region is ranked by it.

    Regions differ in area, and a larger one is a stronger attack: only controls of equal area say which is weak.

    Args:
        cells: of the run.
    """
    known = [cell for cell in cells if cell.images]
    judged = [cell for cell in known if not np.isnan(cell.robust_accuracy)]
    if not known:
        return "Nothing could be measured."
    if not judged:
        from weakspot.audit.page.sentences import no_robust_accuracy

        return no_robust_accuracy(list(dict.fromkeys(cell.attack for cell in known)))
    confined = [cell for cell in judged if cell.region != "none" and not cell.region.startswith("matched:")]
    if not confined:
        cell = min(judged, key=lambda one: one.robust_accuracy)
        return f"{cell.name}, free to change any pixel, leaves {_figure(cell)} still read as their class."
    least = min(confined, key=lambda one: one.robust_accuracy)
    if least.robust_accuracy == 1:
        where = ", ".join(dict.fromkeys(one.region for one in confined))
        attacks = ", ".join(dict.fromkeys(one.name for one in confined))
        return f"No image fell to {attacks} confined to a region ({where})."
    first, *others = [cell for cell in confined if cell.attack == least.attack]
    said = f"{least.name}, confined to {_place(first)}, leaves {_figure(first)} still read as their class"
    said += "".join(f"; confined to {_place(other)} {_range(other)}" for other in others)
    whole = [one for one in judged if one.region == "none" and one.attack == least.attack]
    return said + (f"; free to change any pixel {_range(whole[0])}." if whole else ".")


def _place(cell: CellSummary) -> str:
    return f"{cell.region} ({cell.region_fraction:.0%} of the image)"


def _figure(cell: CellSummary) -> str:
    return f"{_range(cell)} of {cell.images} image{'s' if cell.images > 1 else ''}"


def _range(cell: CellSummary) -> str:
    if np.isnan(cell.low):
        return f"{cell.robust_accuracy:.0%}"
    return f"{cell.robust_accuracy:.0%} [{cell.low:.0%}, {cell.high:.0%}]"


def _labels(counts: dict[str, int]) -> str:
    words = {
        "prediction": "the model's own predictions",
        "folder": "folder names",
        "csv": "a CSV file",
        "array": "the array's own",
    }
    if len(counts) == 1:
        return words[next(iter(counts))]
    return ", ".join(f"{words[key]} ({count} images)" for key, count in counts.items())


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and np.isnan(value) else value


def undefined_names(row: Mapping[str, Any]) -> Sequence[str]:
    """The columns that a row of `cell_table` cannot have: robust accuracy, of an attack that has none."""
    return () if row["judged"] else ROBUST
