"""Summary of an audit: robust accuracy of every attack in every region, and the weakest region in words."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from weakspot.runs.contrasts import region_contrasts, told
from weakspot.runs.plan import bounded_attacks
from weakspot.runs.run import Run
from weakspot.runs.scores import score_findings
from weakspot.statistics import mean_interval, mean_test, share_interval

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class CellSummary:
    """One attack in one region.

    Attributes:
        attack: its label.
        budget: of the attack, or None.
        region: as the plan has it.
        region_share: of the image, on the mean over the images that are known; NaN where there are none.
        images: of which it is known how the attack ended.
        robust_accuracy: share of these that are still read as their label.
        low: lower end of its 95% interval over images; NaN of a single image.
        high: upper end.
        troubled: images on which something went wrong.
    """

    attack: str
    budget: str | None
    region: str
    region_share: float
    images: int
    robust_accuracy: float
    low: float
    high: float
    troubled: int


@dataclass(frozen=True)
class Summary:
    """An audit in short.

    Attributes:
        cells: every attack in every region.
        images: that could be read.
        clean_accuracy: share of them that the model reads as their label, with nothing changed.
        labels: where the labels come from, in words.
        weakest: the weakest region in one sentence.
        regions: each region beside its control of equal area in a sentence, where the plan has controls.
    """

    cells: tuple[CellSummary, ...]
    images: int
    clean_accuracy: float
    labels: str
    weakest: str
    regions: tuple[str, ...] = ()

    def as_mapping(self) -> dict[str, Any]:
        """Plain values; what is unknown is None."""
        return {
            **asdict(self),
            "regions": list(self.regions),
            "clean_accuracy": _plain(self.clean_accuracy),
            "cells": [{key: _plain(value) for key, value in asdict(cell).items()} for cell in self.cells],
        }


def summarize(run: Run) -> Summary:
    """The summary of a run, complete or not; only the columns it needs are read."""
    found = run.sql(
        "select attack, region, index, success, correct, region_share, trouble is not null as troubled from records"
    ).df()
    cells = []
    for attack, region in run.plan.reported_cells:
        mine = found[(found["attack"] == attack.label) & (found["region"] == region)].sort_values("index")
        known = mine.loc[mine["success"].notna(), "success"].to_numpy(dtype=float)
        robust, low, high = share_interval(known == 0)
        cells.append(
            CellSummary(
                attack.label,
                attack.budget,
                region,
                float(mine.loc[mine["success"].notna(), "region_share"].mean()),
                len(known),
                robust,
                low,
                high,
                int(mine["troubled"].sum()),
            )
        )
    bounded = bounded_attacks(run.plan)
    clean = found.drop_duplicates("index")["correct"].dropna().to_numpy(dtype=float)
    return Summary(
        tuple(cells),
        int(found["index"].nunique()),
        float(clean.mean()) if len(clean) else np.nan,
        _labels(run.about.get("labels", {})),
        weakest([cell for cell in cells if cell.attack in bounded] or cells, found),
        tuple(told(region_contrasts(run))),
    )


def cell_table(run: Run, summary: Summary) -> pd.DataFrame:
    """A row for each attack and region: what a gate can be asked about.

    Returns:
        Columns attack, budget ("" where the attack looks for the smallest change), region, region_share, images,
        robust_accuracy, robust_low, robust_high, clean_accuracy, troubled, skipped, and of every score its mean,
        NAME_low and NAME_high.
    """
    import pandas as pd

    table = pd.DataFrame([asdict(cell) for cell in summary.cells])
    table["budget"] = table["budget"].fillna("")
    table = table.rename(columns={"low": "robust_low", "high": "robust_high"})
    table = table.assign(clean_accuracy=summary.clean_accuracy, skipped=len(run.skipped))
    for score, rows in score_findings(run).groupby("score", sort=False):
        own = rows.set_index(["attack", "region"])[["mean", "low", "high"]]
        own.columns = pd.Index([re.sub(r"\W", "_", f"{score}{suffix}") for suffix in ("", "_low", "_high")])
        table = table.join(own.drop(columns=own.columns.intersection(table.columns)), on=["attack", "region"])
    return table


def weakest(cells: list[CellSummary], found: pd.DataFrame) -> str:
    """One sentence on the region where most fall, and whether the next is as weak on the same images.

    Args:
        cells: of the run.
        found: columns attack, region, index, success.
    """
    known = [cell for cell in cells if cell.images]
    if not known:
        return "Nothing could be measured."
    confined = [cell for cell in known if cell.region != "none" and not cell.region.startswith("matched:")]
    if not confined:
        cell = min(known, key=lambda one: one.robust_accuracy)
        return f"{cell.attack}, free to change any pixel, leaves {_figure(cell)} still read as their class."
    cell = min(confined, key=lambda one: one.robust_accuracy)
    if cell.robust_accuracy == 1:
        where = ", ".join(dict.fromkeys(one.region for one in confined))
        attacks = ", ".join(dict.fromkeys(one.attack for one in confined))
        return f"No image fell to {attacks} confined to a region ({where})."
    said = (
        f"{cell.attack} does most in {cell.region} ({cell.region_share:.0%} of the image): confined to it, it "
        f"leaves {_figure(cell)} still read as their class"
    )
    rivals = [one for one in confined if one.attack == cell.attack and one.region != cell.region]
    if rivals:
        rival = min(rivals, key=lambda one: one.robust_accuracy)
        said += f"; in {rival.region} ({rival.region_share:.0%}) it leaves {_range(rival)}"
        said += f", {_apart(cell, rival, found)}"
    whole = [one for one in known if one.region == "none" and one.attack == cell.attack]
    if whole:
        said += f"; free to change any pixel it leaves {whole[0].robust_accuracy:.0%}"
    return said + "."


def _apart(cell: CellSummary, rival: CellSummary, found: pd.DataFrame) -> str:
    """How many more hold in the rival than in the cell, of the same images."""
    fell = []
    for one in (cell, rival):
        mine = found[(found["attack"] == one.attack) & (found["region"] == one.region)]
        fell.append(mine.set_index("index")["success"].astype("Float64"))
    differences = (fell[0] - fell[1]).dropna().to_numpy(float)
    mean, low, high = mean_interval(differences)
    if not low > 0 or mean_test(differences) > 0.05:
        return "a difference that chance can explain"
    return f"{100 * mean:.0f} points more [{100 * low:.0f}, {100 * high:.0f}]"


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
