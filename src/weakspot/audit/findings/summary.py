"""The summary of an audit, in numbers and in sentences, and the table that gates check."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from weakspot.audit.findings.contrasts import WEAK, contrast_sentences, region_contrasts
from weakspot.audit.findings.outcomes import WHOLE_IMAGE, CellSummary, cell_summaries, in_region
from weakspot.audit.findings.scores import score_findings
from weakspot.audit.store.run import Run
from weakspot.datasets.labels import FORMATS
from weakspot.statistics import proportion_interval
from weakspot.statistics.number_format import counted, percent, with_interval

MAX_REGIONS = 4  # weak regions that are named first
ROBUST = ("robust_accuracy", "robust_low", "robust_high")
NOTHING_TO_LOSE = (
    "No image is classified as its label without an attack, so that attacks have nothing to show (check the labels, "
    "and the input size and normalization of the model)."
)
LABEL_SOURCES = {
    "prediction": "the model's own predictions",
    "folder": "folder names",
    "array": "the array's own labels",
    **{form.name: form.title for form in FORMATS.values()},
}


@dataclass(frozen=True)
class Summary:
    """An audit in short.

    Attributes:
        cells: robust accuracy of every attack in every region.
        images: how many images could be read, copies not counted.
        copies: how many more could be read.
        known: for how many of these the model has a clean prediction.
        clean_accuracy: fraction of them that the model classifies as their label without an attack.
        labels: where the labels come from, in words.
        weakest: one sentence: how many images withstand the strongest attack, by region.
        regions: one sentence per attack and region that has controls of equal area.
        remarks: what readers must know about the model and earlier sessions, for example that images have changed.
    """

    cells: tuple[CellSummary, ...]
    images: int
    copies: int
    known: int
    clean_accuracy: float
    labels: str
    weakest: str
    regions: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def __repr__(self) -> str:
        head = f"Summary({counted(self.images)}, clean accuracy {percent(self.clean_accuracy)}"
        lines = [f"  {cell.name} {in_region(cell.region)}: {_accuracy(cell)}" for cell in self.cells[:8]]
        more = [f"  ... {len(self.cells) - 8} more cells"] if len(self.cells) > 8 else []
        return "\n".join([head, *lines, *more]) + ")"

    def weak_regions(self) -> tuple[str, ...]:
        """The sentences on the first weak regions or, if none is, the first sentence on a region."""
        weak = tuple(sentence for sentence in self.regions if sentence.endswith(f"{WEAK}."))
        return weak[:MAX_REGIONS] or self.regions[:1]

    def as_mapping(self) -> dict[str, object]:
        """Values for JSON; an unknown number is None."""
        plain = {key: _json_value(value) for key, value in asdict(self).items()}
        return plain | {
            "cells": [{key: _json_value(value) for key, value in asdict(cell).items()} for cell in self.cells]
        }


def _json_value(value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    return None if isinstance(value, float) and math.isnan(value) else value


def summarize(run: Run) -> Summary:
    """Summarize a run, complete or not; reads only the columns that it needs."""
    cells = cell_summaries(run)
    images, known, clean = run.sql(
        "select count(*), count(correct), avg(correct::int) from "
        "(select any_value(correct) as correct from outcomes group by index)"
    ).fetchall()[0]
    copies = run.copies
    said = f"{counted(copies)} {'is a copy' if copies == 1 else 'are copies'} of another"
    counts = run.info.labels
    # A run over several folders or arrays can have several sources of labels.
    sources = [f"{LABEL_SOURCES[key]} ({counted(count)})" for key, count in counts.items()]
    return Summary(
        cells=tuple(cells),
        images=images,
        known=known,
        clean_accuracy=np.nan if clean is None else float(clean),
        labels=LABEL_SOURCES[next(iter(counts))] if len(counts) == 1 else ", ".join(sources),
        weakest=strongest_attack_sentence(cells, np.nan if clean is None else float(clean)),
        regions=tuple(contrast_sentences(region_contrasts(run))),
        copies=copies,
        remarks=(*run.remarks, *([f"{said}; all findings count each image once."] if copies else [])),
    )


def cell_table(run: Run, summary: Summary) -> pd.DataFrame:
    """One row per attack and region: the rows that a gate checks.

    Returns:
        Columns attack, budget ("" if there is none), judged (whether the attack may have a robust accuracy), known
        (see `CellSummary`), region, region_fraction, images, robust_accuracy, robust_low, robust_high, clean_accuracy,
        errors, skipped; for every score its mean NAME with NAME_low and NAME_high.
    """
    table = pd.DataFrame([asdict(cell) for cell in summary.cells])
    table["budget"] = table["budget"].fillna("")
    without = [one.label for one in run.plan.attacks if run.plan.has_robust_accuracy(one) is False]
    table["judged"] = ~table["attack"].isin(without)
    table = table.rename(columns={"low": "robust_low", "high": "robust_high"})
    table = table.assign(clean_accuracy=summary.clean_accuracy, skipped=len(run.skipped))
    for score, rows in score_findings(run).groupby("score", sort=False):
        means = rows.set_index(["attack", "region"])[["mean", "low", "high"]]
        # Gate conditions can only name Python identifiers.
        means.columns = pd.Index([re.sub(r"\W", "_", f"{score}{end}") for end in ("", "_low", "_high")])
        # A score never replaces a column that is there already.
        table = table.join(
            means.drop(columns=means.columns.intersection(table.columns)), on=["attack", "region"]
        )
    return table


def undefined_names(row: Mapping[str, object]) -> Sequence[str]:
    """The columns that a row of `cell_table` cannot have: robust accuracy, if its attack has none."""
    return () if row["judged"] else ROBUST


def unknown_cases(run: Run, table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The extreme tables that `cell_table` could be if images without a result all counted as errors, or none did.

    Without these cases, a model that fails on most images would be judged by the few others.

    Returns:
        (description of the case, table) pairs.
    """
    total, clean = run.sql(
        "select count(distinct index), count(distinct index) filter (correct is not null) from outcomes"
    ).fetchall()[0]
    cases = []
    for robust, case in (
        (0, "if all images without a result counted as errors"),
        (1, "if none of the images without a result counted as errors"),
    ):
        frame = table.copy()
        for place, (images, accuracy) in enumerate(
            zip(table["images"], table["robust_accuracy"], strict=True)
        ):
            if 0 < images < total and math.isfinite(accuracy):
                # The accuracy counts the known images; the unknown ones are added as all lost or all robust.
                count = round(images * accuracy) + robust * (total - images)
                frame.loc[frame.index[place], list(ROBUST)] = proportion_interval(np.arange(total) < count)
        if 0 < clean < total:
            correct = (clean * frame["clean_accuracy"]).round() + robust * (total - clean)
            frame["clean_accuracy"] = correct / total
        cases.append((case, frame))
    return cases


def strongest_attack_sentence(cells: Sequence[CellSummary], clean: float) -> str:
    """One sentence on how many images withstand the strongest attack in each region, without ranking the regions.

    Regions differ in area, and an attack on a larger region is stronger: only controls of equal area show whether a
    region is weak.

    Args:
        cells: from `cell_summaries`.
        clean: clean accuracy, or NaN.
    """
    known = [cell for cell in cells if cell.images]
    judged = [cell for cell in known if not np.isnan(cell.robust_accuracy)]
    if not known:
        return "No attack has a known outcome, so nothing could be measured."
    if clean == 0:
        return NOTHING_TO_LOSE
    if not judged:
        return " ".join(no_robust_accuracy(known))
    confined = [cell for cell in judged if cell.region != WHOLE_IMAGE and not cell.is_control]
    whole = [cell for cell in judged if cell.region == WHOLE_IMAGE]
    # Controls say something beside their region only, unless the plan has nothing else.
    named = [*confined, *whole] or judged
    strongest = min(confined or named, key=lambda cell: cell.robust_accuracy)
    if confined and strongest.robust_accuracy == 1:
        regions = ", ".join(dict.fromkeys(cell.region for cell in confined))
        attacks = ", ".join(dict.fromkeys(cell.name for cell in confined))
        # All of them are at 100%, so the one with the fewest images has the widest interval.
        fewest = min(confined, key=lambda cell: cell.images)
        none = "The image was not" if fewest.images == 1 else f"None of {counted(fewest.images)} was"
        sentence = (
            f"{none} fooled by {attacks} confined to a region ({regions}): robust accuracy is "
            f"{_accuracy(fewest)}"
        )
        for cell in sorted(whole, key=lambda cell: cell.robust_accuracy)[:1]:
            sentence += f"; under {cell.name} on the whole image, {_accuracy(cell)}"
        return f"{sentence}."
    listed = [cell for cell in named if cell.attack == strongest.attack]
    return robust_accuracy_sentence(listed, clean) + "."


def robust_accuracy_sentence(cells: Sequence[CellSummary], clean: float) -> str:
    """How many images remain correctly classified under one attack, by region; without the full stop."""
    first, *others = cells
    verb = "remain" if first.images > 1 else "remains"
    unattacked = "" if np.isnan(clean) else f" ({percent(clean)} without an attack)"
    sentence = (
        f"Under {first.name} {_place(first)}, {_accuracy(first)} of {counted(first.images)} {verb} correctly "
        f"classified{unattacked}"
    )
    # Outcomes of some images may be unknown in some regions.
    of = ["" if cell.images == first.images else f" of {counted(cell.images)}" for cell in others]
    rest = (f"{_place(cell)}, {_accuracy(cell)}{count}" for cell, count in zip(others, of, strict=True))
    return "; ".join([sentence, *rest])


def no_robust_accuracy(cells: Sequence[CellSummary]) -> list[str]:
    """Sentences on why the attacks of these cells have no robust accuracy."""
    minimal = list(dict.fromkeys(cell.attack for cell in cells if cell.known))
    missing = list(dict.fromkeys(cell.attack for cell in cells if not cell.known))
    sentences = []
    if minimal:
        kind = (
            "is a minimal-norm attack and has" if len(minimal) == 1 else "are minimal-norm attacks and have"
        )
        sentences.append(
            f"{', '.join(minimal)} {kind} no robust accuracy without one stated budget (such as --budget linf:4/255)."
        )
    if missing:
        sentences.append(
            f"The robust accuracy under {', '.join(missing)} is unknown: without the package of the attack, weakspot "
            "cannot tell whether success was limited by a budget (install the package and read the run again)."
        )
    return sentences


def _place(cell: CellSummary) -> str:
    area = "" if cell.region == WHOLE_IMAGE else f" ({percent(cell.region_fraction)} of the image)"
    return in_region(cell.region) + area


def _accuracy(cell: CellSummary) -> str:
    return with_interval(cell.robust_accuracy, cell.low, cell.high)
