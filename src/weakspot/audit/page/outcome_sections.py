"""Sections on outcomes: robust accuracy, classes, images at both ends, and the sizes of change that fool.

Each sentence states what the numbers support, with its interval and no more.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict

import pandas as pd

from weakspot.audit.findings.distributions import Classes, Extremes
from weakspot.audit.findings.outcomes import CellSummary, in_region
from weakspot.audit.findings.summary import NOTHING_TO_LOSE, no_robust_accuracy, robust_accuracy_sentence
from weakspot.audit.page.charts import budget_chart, confusion_chart, robust_chart
from weakspot.audit.page.elements import (
    Cell,
    Chart,
    Column,
    Row,
    Section,
    Table,
    Thumbnail,
    counts,
    heading,
    numbers,
    p_values,
    percent_cell,
    percents,
    table_of,
    text_cell,
    texts,
)
from weakspot.statistics.number_format import counted, percent, size_of_change, with_interval

LISTED = 6  # regions named in one sentence
MAX_CLASSES = 20  # of a grid of confusions
MAX_GRIDS = 13


def robust_section(cells: Sequence[CellSummary], clean: float, *, eight_bit: bool = True) -> Section:
    """Robust accuracy of every attack in every region. Regions are not ranked, because they differ in area.

    Args:
        cells: from `cell_summaries`.
        clean: clean accuracy, or NaN.
        eight_bit: whether images were counted as stored with 8 bits.
    """
    known = [cell for cell in cells if cell.images]
    judged = [cell for cell in known if not math.isnan(cell.robust_accuracy)]
    sentences = [NOTHING_TO_LOSE] if clean == 0 else []
    for attack in dict.fromkeys(cell.attack for cell in judged if clean != 0):
        rows = [cell for cell in judged if cell.attack == attack]
        more = "; the table lists the other regions" if len(rows) > LISTED else ""
        sentences.append(robust_accuracy_sentence(rows[:LISTED], clean) + f"{more}.")
    sentences += no_robust_accuracy([cell for cell in known if math.isnan(cell.robust_accuracy)])
    frame = pd.DataFrame([asdict(cell) for cell in cells])
    columns: dict[str, Column] = {
        "attack": texts("attack"), "budget": texts("budget"), "region": texts("region"),
        "area": percents("region_fraction"), "images": counts("images"),
        "robust accuracy [95%]": percents("robust_accuracy", "low", "high"), "errors": counts("errors"),
    }  # fmt: skip
    stored = "as stored in an 8-bit image file" if eight_bit else "before it is rounded to 8 bits"
    note = (
        f"Robust accuracy is the fraction of images that are classified as their label after the attack, each "
        f"{stored}; images that are misclassified without an attack count as not robust. For minimal-norm attacks, an "
        "image counts as lost only if its change is within the budget in the table. The area is the region's mean "
        "fraction of the image: a larger region is a stronger attack, whatever it covers."
    )
    return Section(
        "robust",
        "Robust accuracy by attack and region",
        sentences or ["No attack has a known outcome."],
        charts=[robust_chart(frame, clean)] if judged else (),
        tables=[table_of("robust", frame, columns)],
        notes=[note],
    )


def class_section(by_class: Classes) -> Section:
    """Robust accuracy of every class, and the classes that fooled images end in."""
    cells = by_class.cells
    pairs = list(dict.fromkeys(zip(cells["attack"], cells["region"], strict=True)))
    robust = {
        (row["label"], row["attack"], row["region"]): percent_cell(row["robust"], row["low"], row["high"])
        for row in cells.to_dict("records")
    }
    ends = {
        row["label"]: Cell(
            row["adversarial_class"],
            row["adversarial_class"].casefold(),
            f"{row['fooled']:,} of {row['of']:,} fooled",
        )
        for row in by_class.adversarial.to_dict("records")
    }

    def accuracy(attack: str, region: str) -> Column:
        return lambda row: robust.get((row["label"], attack, region), percent_cell(math.nan))

    columns: dict[str, Column] = {
        "label": texts("name"), "images": counts("images"), "clean accuracy": percents("clean"),
        **{heading(attack, region): accuracy(attack, region) for attack, region in pairs},
        "most often fooled into": lambda row: ends.get(row["label"], text_cell(None)),
    }  # fmt: skip
    charts = _confusion_charts(by_class.confusions, pairs)
    note = (
        "Percentages under attack are robust accuracy with the exact 95% interval (Clopper and Pearson); with few "
        "images of a class they are wide. The classes of fooled images are counted over all attacks and regions, for "
        "images that are correctly classified without an attack."
    )
    return Section(
        "classes",
        "Classes",
        class_sentences(by_class),
        charts=charts,
        choose="Classes of fooled images, under",
        tables=[table_of("classes", by_class.classes, columns)],
        notes=[note, *(["An empty square in the grid stands for no image."] if charts else [])],
    )


def _confusion_charts(confusions: pd.DataFrame, cells: Sequence[tuple[str, str]]) -> list[Chart]:
    names = set(confusions["label"]) | set(confusions["adversarial_class"])
    if not 1 < len(names) <= MAX_CLASSES:
        return []
    # One grid over everything first, then one per cell.
    total = confusions.groupby(["label", "adversarial_class"])[["fooled"]].sum().reset_index()
    charts = [confusion_chart("all attacks in all regions", total)]
    for attack, region in cells if len(cells) > 1 else ():
        rows = confusions[(confusions["attack"] == attack) & (confusions["region"] == region)]
        if len(rows) and len(charts) < MAX_GRIDS:
            charts.append(confusion_chart(heading(attack, region), rows))
    return charts


def class_sentences(by_class: Classes) -> list[str]:
    """The weakest and the strongest class under the strongest attack, and where fooled images end."""
    classes, cells = by_class.classes, by_class.cells
    names = dict(zip(classes["label"], classes["name"], strict=True))
    known = cells[cells["images"] > 0]
    if known.empty:
        return ["No image has both a label and an attack with a robust accuracy."]
    ends = _adversarial_class_sentence(by_class.adversarial, names)
    if len(classes) == 1:
        only = f"The run has a single class, {classes['name'].iloc[0]}, with {counted(int(classes['images'].iloc[0]))}."
        return [only, ends]
    key = [known["attack"], known["region"]]
    # Weighted by images: a small class must not decide which attack is the strongest.
    robust = (known["robust"] * known["images"]).groupby(key).sum() / known["images"].groupby(key).sum()
    attack, region = robust.index[int(robust.to_numpy().argmin())]
    rows = known[(known["attack"] == attack) & (known["region"] == region)]
    # Ranked by the ends of the intervals: with two images, both fooled, a class is not surely the weakest.
    weak: Row = rows.sort_values(["high", "robust"], kind="stable").iloc[0].to_dict()
    strong: Row = rows.sort_values(["low", "robust"], ascending=False, kind="stable").iloc[0].to_dict()
    cell = f"{attack} {in_region(str(region))}"
    if len(rows) > 1 and rows["robust"].min() == rows["robust"].max():
        same = percent(weak["robust"])
        return [f"Under {cell}, {same} of the images of every class remain correctly classified.", ends]
    if weak["label"] == strong["label"] or weak["robust"] == strong["robust"]:
        even = f"{_class_accuracy(weak)} {names[weak['label']]} {_remain(weak)} correctly classified"
        return [f"Under {cell}, no class stands out: {even}.", ends]
    doubt = (
        f"With {len(rows)} classes compared, part of that difference may be chance."
        if intervals_are_apart(weak, strong)
        else "The intervals overlap, so the difference may be chance."
    )
    sentence = (
        f"Under {cell}, {_class_accuracy(weak)} {names[weak['label']]} {_remain(weak)} correctly classified, and "
        f"{_class_accuracy(strong)} {names[strong['label']]}. {doubt}"
    )
    return [sentence, ends]


def intervals_are_apart(row: Row, other: Row) -> bool:
    """Whether two rows with the ends low and high do not overlap; False if an end is unknown."""
    return bool(row["high"] < other["low"] or other["high"] < row["low"])


def _class_accuracy(row: Row) -> str:
    accuracy = with_interval(row["robust"], row["low"], row["high"])
    return f"{accuracy} of {counted(int(row['images']))} of"


def _remain(row: Row) -> str:
    return "remains" if int(row["images"]) == 1 else "remain"


def _adversarial_class_sentence(adversarial: pd.DataFrame, names: Mapping[Hashable, str]) -> str:
    if adversarial.empty:
        return "No correctly classified image was fooled, so there are no adversarial classes to report."
    ranked = adversarial.sort_values("fooled", ascending=False, kind="stable")
    row = ranked.iloc[0]
    if len(ranked) > 1 and row["fooled"] == 1:
        return "No confusion of two classes occurred more than once."
    # The table has each label's most frequent class: another class of this label may be as frequent.
    tied = int((ranked["fooled"] == row["fooled"]).sum()) > 1 or row["of"] - row["fooled"] >= row["fooled"]
    return (
        f"{'One of the most frequent confusions' if tied else 'The most frequent confusion'} is "
        f"{names.get(row['label'], 'a class')} classified as {row['adversarial_class']}: in {row['fooled']:,} of "
        f"{counted(int(row['of']), 'attack')} that fooled an image of that class "
        f"({percent(row['fooled'] / row['of'])})."
    )


def image_section(ends: Extremes, easiest: Sequence[Thumbnail], hardest: Sequence[Thumbnail]) -> Section:
    """The images at both ends, as thumbnails in the same order."""
    sentences = image_sentences(ends)
    shown = [*easiest, *hardest]
    if shown and not any(image.pictures for image in shown):
        sentences.append("The run stored no maps, so that only names are shown; --maps stores pictures.")
    first = "Fooled most easily" if ends.fooled else "Closest to being fooled"
    last = "Withstood longest" if ends.fooled < ends.images else "Fooled last"
    mapped = any(name == "importance" for image in shown for name, _ in image.pictures)
    note = "Importance is evidence for the label in the clean image (brighter is more), over the photograph in gray."
    return Section(
        "images",
        "Images",
        sentences,
        galleries=[(name, images) for name, images in ((first, easiest), (last, hardest)) if images],
        notes=[note] if mapped else [],
    )


def image_sentences(ends: Extremes) -> list[str]:
    """How many images withstood every attack, and how the images are ranked."""
    if not ends.images:
        return ["No correctly classified image has an attack with a known outcome."]
    withstood = ends.images - ends.fooled
    which = "every attack" + (" whose outcome is known" if ends.unknown else "")
    which += f", not counting {', '.join(ends.left_out)}" if ends.left_out else ""
    outcome = (
        f"Of {counted(ends.images)} correctly classified without an attack, {ends.fooled:,} "
        f"{'was' if ends.fooled == 1 else 'were'} fooled at least once and {withstood:,} withstood {which}."
    )
    ranking = (
        "Images are ranked by the size of the smallest change (L2 norm) that fooled them in any region"
        if ends.by_size
        else "Images are ranked by the smallest margin that any attack in any region left, before rounding to 8 bits"
    )
    never = "; images that were never fooled rank as the hardest" if ends.fooled and withstood else ""
    return [outcome, f"{ranking}{never}."]


def budget_section(
    curves: pd.DataFrame, contrasts: pd.DataFrame, compared: Sequence[str] = (), *, planned: bool = False
) -> Section:
    """Which sizes of change fool how many images in which region, and whether its controls are fooled as well.

    Args:
        curves: from `budget_curves`.
        contrasts: from `region_contrasts`.
        compared: `contrast_sentences` of the contrasts.
        planned: whether the plan has attacks that give curves.
    """
    key, name = "sizes", "Size of change needed, by region"
    if curves.empty and contrasts.empty:
        needed = (
            "The run has no sizes to compare: several budgets (--budget linf:1/255,linf:4/255) or a minimal-norm "
            "attack give curves, and --controls adds controls of equal area."
        )
        unknown = "No correctly classified image has an attack with a known outcome."
        return Section(key, name, [unknown if planned else needed])
    groups = list(curves.groupby(["attack", "norm"], sort=False))
    sentences = [_half_sentence(str(attack), str(norm), rows) for (attack, norm), rows in groups]
    sentences += compared
    if contrasts.empty:
        sentences.append(
            "The run has no controls, so a region may be fooled more often only because of its area or its position; "
            "--controls adds them."
        )
    charts = [budget_chart(f"{attack}, {norm}", rows) for (attack, norm), rows in groups]
    note = (
        "The controls are the regions of other images of the run, chosen to be within a tenth of the region's area and "
        "used unchanged, and the region shifted within the image. A region is called weak, or stronger, if q is at "
        "most .05, the interval excludes zero and the difference is at least 5 points (a factor of 1.1 for sizes) "
        "against both kinds, on at least 40 images. p tests whether the outcomes of region and controls are "
        "exchangeable within each image; q is p corrected for the number of comparisons (Benjamini and Hochberg). For "
        "the measure fooled, a larger value means a weaker region. For the measure smallest size, a smaller value "
        "does, and the difference is log2 of the controls' size over the region's."
    )
    return Section(
        key,
        name,
        sentences,
        charts=charts,
        choose="Attack and norm" if len(charts) > 1 else "",
        tables=[*([] if contrasts.empty else [_contrast_table(contrasts)]), _curve_table(curves)],
        notes=[] if contrasts.empty else [note],
    )


def _half_sentence(attack: str, norm: str, curves: pd.DataFrame) -> str:
    """The size at which half of the correctly classified images are fooled, by region."""
    halves = {
        str(region): float(curve[curve["fooled"] >= 0.5]["size"].min())
        for region, curve in curves.groupby("region", sort=False)
    }
    if all(math.isnan(size) for size in halves.values()):
        largest = size_of_change(float(curves["size"].max()), norm)
        return (
            f"Up to {largest}, the largest size ({norm}) in the run, {attack} fools less than half of the correctly "
            "classified images in every region."
        )
    sizes = [
        f"{in_region(region)}, {'none of the tested sizes' if math.isnan(size) else size_of_change(size, norm)}"
        for region, size in halves.items()
    ]
    return f"Size ({norm}) at which {attack} has fooled half of the correctly classified images: {'; '.join(sizes)}."


def _contrast_table(contrasts: pd.DataFrame) -> Table:
    columns: dict[str, Column] = {
        "attack": texts("attack"), "region": texts("region"),
        "control": lambda row: text_cell(
            f"{row['control']} ({row['draws']})" if row["draws"] > 1 else row["control"]
        ),
        "area": percents("region_fraction"), "control's area": percents("control_fraction"), "images": counts("images"),
        "measure": lambda row: text_cell(f"{row['measure']} {row['norm']}".strip()),
        "in the region": numbers("region_value"), "in the controls": numbers("control_value"),
        "difference [95%]": numbers("difference", "low", "high"), "p": p_values("p"), "q": p_values("q"),
    }  # fmt: skip
    return table_of("contrasts", contrasts, columns)


def _curve_table(curves: pd.DataFrame) -> Table:
    """The end of every curve, and its sizes at quarters of the images."""
    rows = []
    for _, curve in curves.groupby(["attack", "norm", "region"], sort=False):
        ordered = curve.sort_values("size")
        end = ordered.iloc[-1].to_dict()
        end |= {f"{part:.0%}": ordered[ordered["fooled"] >= part]["size"].min() for part in (0.25, 0.5, 0.75)}
        rows.append(end)
    columns: dict[str, Column] = {
        "attack": texts("attack"), "norm": texts("norm"), "region": texts("region"),
        "control": lambda row: text_cell("yes" if row["control"] else "no"), "images": counts("images"),
        "size that fools 25%": numbers("25%"), "50%": numbers("50%"), "75%": numbers("75%"),
        "largest size": numbers("size"), "fooled at that size": percents("fooled", "low", "high"),
    }  # fmt: skip
    return table_of("sizes", pd.DataFrame(rows), columns)
