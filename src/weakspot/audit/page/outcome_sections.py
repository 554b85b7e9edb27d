"""Sections on what was measured: robust accuracy, distributions, classes, images.

Images of a run's report: small pictures of what was attacked, what came of it, and where it mattered.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from weakspot.audit.page.charts import confusion_chart, histogram_chart, robust_chart
from weakspot.audit.page.sentences import (
    class_sentences,
    heading,
    margin_sentences,
    robust_sentences,
)
from weakspot.report.explanation_page import text
from weakspot.report.rendering import table
from weakspot.report.sections import Cell, Section, Table, Thumbnail, count, figure, fraction, word

GRID = 20  # classes of a grid of confusions at most
CONFUSIONS = 13  # such grids at most
TITLES = {
    "margin_clean": "margin before the attack",
    "margin_adversarial": "margin after the attack",
    "confidence_clean": "confidence in the label before the attack",
    "confidence_adversarial": "confidence in the label after the attack",
    "linf": "largest change of a channel (linf)",
    "l2": "L2 norm of the change",
    "pixels": "pixels changed",
    "ssim_windowed": "mean SSIM over sliding windows (ssim_windowed)",
}


def robust_section(cells: pd.DataFrame, clean: float, *, eight_bit: bool = True) -> Section:
    """Robust accuracy of every attack in every region.

    Args:
        cells: columns attack, budget, region, region_fraction, images, robust_accuracy, low, high, troubled.
        clean: accuracy with nothing changed, or NaN.
        eight_bit: whether images were counted as 8-bit files hold them.
    """
    listed = [
        [
            word(row["attack"]), word(row["budget"]), word(row["region"]), fraction(row["region_fraction"]),
            count(row["images"]), fraction(row["robust_accuracy"]),
            Cell("" if math.isnan(row["low"]) else f"{row['low']:.1%} to {row['high']:.1%}", row["low"]),
            count(row["troubled"]),
        ]
        for row in cells.to_dict("records")
    ]  # fmt: skip
    headings = ("attack", "budget", "region", "area", "images", "robust accuracy", "95% interval", "trouble")
    known = bool(cells["robust_accuracy"].notna().any())
    stored = "as an 8-bit picture file holds it" if eight_bit else "before it is rounded to 8 bits"
    return Section(
        "robust",
        "Robust accuracy by attack and region",
        robust_sentences(cells),
        charts=[robust_chart(cells, clean)] if known else (),
        tables=[Table("robust", headings, listed)],
        notes=[
            (
                f"Robust accuracy is the share of images still read as their label after the attack, each {stored}; "
                "images that are read wrongly without any attack count as not robust. Under an attack that looks for "
                "the smallest change, only images whose change is within the budget beside it are lost. The area is "
                "the region's mean share of the image: a larger region is a stronger attack, whatever it covers."
            )
        ],
    )


def distribution_section(summaries: pd.DataFrame, bins: pd.DataFrame) -> Section:
    """How every score is distributed.

    Args:
        summaries: columns score, attack, region, images, missing, mean, median.
        bins: columns score, attack, region, outcome, low, high, count.
    """
    charts = []
    for score, mine in bins.groupby("score", sort=False):
        known = summaries[(summaries["score"] == score) & (summaries["images"] > 0)].to_dict("records")
        headings = {
            (
                row["attack"],
                row["region"],
            ): f"{heading(row)}: median {figure(row['median']).text}, {row['images']:,} images"
            for row in known
        }
        drawn = mine[[(row.attack, row.region) in headings for row in mine.itertuples()]]
        if len(drawn):
            charts.append(histogram_chart(title(str(score)), drawn, headings))
    listed = [
        [
            word(title(row["score"])), word(row["attack"]), word(row["region"]), count(row["images"]),
            count(row["missing"]), figure(row["mean"]), figure(row["median"]),
        ]
        for row in summaries.to_dict("records")
    ]  # fmt: skip
    columns = ("score", "attack", "region", "images", "not known", "mean", "median")
    return Section(
        "distributions",
        "Distributions",
        margin_sentences(summaries),
        charts=charts,
        choose="Score",
        tables=[Table("distributions", columns, listed)],
        notes=["Where few images lie far out, the outermost bars hold all that lies beyond them."],
    )


def class_section(
    classes: pd.DataFrame, cells: pd.DataFrame, landings: pd.DataFrame, confusions: pd.DataFrame
) -> Section:
    """Every class, and where its images land.

    Args:
        classes: columns label, name, images, clean.
        cells: columns label, attack, region, images, robust, low, high.
        landings: columns label, adversarial_class, fooled, of.
        confusions: columns attack, region, label, adversarial_class, fooled, by name; empty for many classes.
    """
    columns = list(dict.fromkeys(zip(cells["attack"], cells["region"], strict=True)))
    found = {(row["label"], row["attack"], row["region"]): row for row in cells.to_dict("records")}
    lands = {row["label"]: row for row in landings.to_dict("records")}
    listed = []
    for row in classes.to_dict("records"):
        cell_of = [found.get((row["label"], *column)) for column in columns]
        landing = lands.get(row["label"])
        listed.append(
            [
                word(row["name"]),
                count(row["images"]),
                fraction(row["clean"]),
                *(fraction(one["robust"], one["low"], one["high"]) if one else fraction(math.nan) for one in cell_of),
                Cell(
                    landing["adversarial_class"],
                    landing["adversarial_class"].casefold(),
                    f"{landing['fooled']:,} of {landing['of']:,} fooled",
                )
                if landing
                else word(None),
            ]
        )  # fmt: skip
    headings = ["label", "images", "clean accuracy"]
    headings += [heading({"attack": attack, "region": region}) for attack, region in columns]
    charts = []
    names = set(confusions["label"]) | set(confusions["adversarial_class"])
    if 1 < len(names) <= GRID:
        together = confusions.groupby(["label", "adversarial_class"])[["fooled"]].sum().reset_index()
        charts.append(confusion_chart("all attacks in all regions", together))
        for attack, region in columns if len(columns) > 1 else ():
            there = confusions[(confusions["attack"] == attack) & (confusions["region"] == region)]
            if len(there) and len(charts) < CONFUSIONS:
                charts.append(confusion_chart(heading({"attack": attack, "region": region}), there))
    return Section(
        "classes",
        "Classes",
        class_sentences(classes, cells, landings),
        charts=charts,
        choose="Where fooled images land, under",
        tables=[Table("classes", [*headings, "lands most often in"], listed)],
        notes=[
            (
                "Shares under attack are robust accuracy with the exact 95% interval (Clopper and Pearson); with few "
                "images of a class they are wide. Where images land is counted over all attacks and regions, of images "
                "that were read rightly before."
            )
        ],
    )


def image_section(
    easiest: Sequence[Thumbnail], hardest: Sequence[Thumbnail], told: Sequence[str], missing: str
) -> Section:
    """The images at both ends.

    Args:
        easiest: that were fooled most easily.
        hardest: that held longest.
        told: how many held, and by what they were ranked.
        missing: why there are no pictures; empty where there are.
    """
    sentences = list(told)
    if not easiest and not hardest:
        sentences = ["No image that was read rightly before has an attack whose end is known."]
    elif missing:
        sentences.append(missing)
    galleries = [
        (name, images)
        for name, images in (("Fooled most easily", easiest), ("Held longest", hardest))
        if images
    ]
    mapped = any(name == "importance" for image in easiest for name, _ in image.pictures)
    note = "Importance is evidence for the label in the clean image (brighter is more), over the photograph in gray."
    return Section("images", "Images", sentences, galleries=galleries, notes=[note] if mapped else [])


def title(score: str) -> str:
    """A score's name for people."""
    return TITLES.get(score, score.replace("_", " "))


WIDE = 128  # pixels of the longer side, at most
FAITHFUL = 64  # up to here pictures are kept to the bit
SHARE = 0.6  # of the color over the photograph


def picture(levels: NDArray[np.uint8]) -> str:
    """A picture (C, H, W) of 8 bits as a data URL, smaller where it is large."""
    pixels = _pixels(levels)
    return _encoded(_small(Image.fromarray(pixels)), exact=max(pixels.shape[:2]) <= FAITHFUL)


def overlaid(levels: NDArray[np.uint8], importance: NDArray[np.float32]) -> str:
    """A map (h, w) in color, from zero to its largest value, over the picture in gray."""
    pixels = _pixels(levels)
    gray = np.asarray(Image.fromarray(pixels).convert("L").convert("RGB"), dtype=np.float32)
    values = np.nan_to_num(importance, nan=0, posinf=0, neginf=0).clip(min=0)
    places = np.rint(values * (255 / (float(values.max(initial=0)) or 1))).astype(np.uint8)
    colors = Image.fromarray(table("magnitude")[places])
    colors = colors.resize((pixels.shape[1], pixels.shape[0]), Image.Resampling.NEAREST)
    mixed = (1 - SHARE) * gray + SHARE * np.asarray(colors, dtype=np.float32)
    drawn = Image.fromarray(np.rint(mixed).astype(np.uint8))
    return _encoded(_small(drawn), exact=max(pixels.shape[:2]) <= FAITHFUL)


def pixelated(levels: NDArray[np.uint8]) -> bool:
    """Whether it is so small that it is drawn larger than it is."""
    return bool(max(levels.shape[1:]) <= FAITHFUL)


def _pixels(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if len(levels) == 3:
        return np.ascontiguousarray(levels.transpose(1, 2, 0))
    return np.repeat(np.rint(levels.mean(0))[..., None], 3, axis=2).astype(np.uint8)


def _small(drawn: Image.Image) -> Image.Image:
    if max(drawn.size) > WIDE:
        drawn.thumbnail((WIDE, WIDE), Image.Resampling.LANCZOS)
    return drawn


def _encoded(drawn: Image.Image, *, exact: bool) -> str:
    buffer = io.BytesIO()
    if exact:
        drawn.save(buffer, "PNG", optimize=True)
        return "data:image/png;base64," + text(buffer.getvalue())
    drawn.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + text(buffer.getvalue())
