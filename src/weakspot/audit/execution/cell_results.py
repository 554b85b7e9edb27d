"""What one attack in one region leaves of a group of images: its rows of the records, and its maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from weakspot.audit.execution.batches import Errors, Parts
from weakspot.audit.execution.opened_images import OpenedImages
from weakspot.audit.plan.attack_plan import AttackPlan
from weakspot.audit.store.maps import GroupMaps, curve_name
from weakspot.audit.store.records import COLUMNS, DERIVED
from weakspot.classifier import Classifier
from weakspot.explanations.analysis import Series
from weakspot.explanations.explanation import Explanation
from weakspot.logits import margin
from weakspot.pairs import AttackResult

if TYPE_CHECKING:
    import pandas as pd

# Suffixes of what depends on the other images of a batch.
COMPARED = ("_null", "_null_low", "_null_high", "_p", "_q")


@dataclass(frozen=True, eq=False)
class CleanImages:
    """The images (N) of a group before any attack.

    Attributes:
        opened: names, labels and digests.
        images: (N, C, H, W) on the model's device.
        labels: (N,) classes that are attacked.
        logits: (N, K); NaN for images on which the model failed.
    """

    opened: OpenedImages
    images: Tensor
    labels: Tensor
    logits: Tensor

    @property
    def finite(self) -> Tensor:
        """Bool (N,): images that the model classified."""
        return self.logits.isfinite().all(1)


@dataclass(frozen=True, eq=False)
class CellResult:
    """The outcome of one attack in one region.

    Attributes:
        attack: the attack.
        region_text: of the region.
        region: bool (N, 1, H, W).
        rows: (n,) images that were attacked.
        result: for these n, or None if n is 0.
        logits: (n, K) of the attacked images, or None.
        explained: numbers (m,) among the n, and the explanation of their pairs.
        errors: image -> why something failed.
        seconds: of the attack and of the analyses, per image.
    """

    attack: AttackPlan
    region_text: str
    region: Tensor
    rows: Tensor
    result: AttackResult | None
    logits: Tensor | None
    explained: Parts[Explanation]
    errors: Errors
    seconds: tuple[float, float]


def cell_rows(clean: CleanImages, classifier: Classifier, cell: CellResult) -> pd.DataFrame:
    """One row per image; unknown values are missing."""
    import pandas as pd

    entries, finite = clean.opened.entries, clean.finite
    values: dict[str, ArrayLike | None] = {
        # Every column is there, without a value where nothing is known.
        **dict.fromkeys(COLUMNS),
        "index": [entry.index for entry in entries],
        "image": [entry.name for entry in entries],
        "content": list(clean.opened.contents),
        "attack": cell.attack.label,
        "budget": cell.attack.budget,
        "region": cell.region_text,
        "region_fraction": cell.region.flatten(1).double().mean(1).cpu().numpy(),
        "label_from": [entry.label_from for entry in entries],
        "error": np.array([cell.errors.get(row) for row in range(len(entries))], dtype=object),
        "remark": np.array([remark or None for remark in clean.opened.remarks], dtype=object),
        "attack_seconds": cell.seconds[0],
        "analysis_seconds": cell.seconds[1],
    }
    # A given label is known even if the model failed; a predicted one is not.
    predicted = clean.logits.argmax(1)
    labeled = torch.tensor([entry.label >= 0 for entry in entries], device=finite.device) | finite
    columns = _Columns(values, len(entries), classifier)
    columns.set_classes("label", clean.labels, labeled)
    columns.set_classes("predicted", predicted, finite)
    columns.set_where("correct", predicted == clean.labels, finite)
    columns.set_where("confidence_clean", _confidence(clean.logits, clean.labels), finite)
    columns.set_where("margin_clean", margin(clean.logits, clean.labels), finite)
    if cell.result is not None and cell.logits is not None:
        # Labels are known for the images that were not attacked as well, and are set above.
        table = cell.result.table.drop(columns="label")
        for name in table.columns.intersection(list(COLUMNS)):
            columns.set(name, cell.rows, table[name].to_numpy())
        # The attacked image may make the network return NaN even though the attack succeeded earlier.
        fine, labels = cell.logits.isfinite().all(1), clean.labels[cell.rows]
        rows = cell.rows[fine]
        columns.set_classes("adversarial_class", cell.logits.argmax(1), fine, cell.rows)
        confidence = _confidence(cell.logits, labels)[fine]
        columns.set("confidence_adversarial", rows, confidence.double().cpu().numpy())
        columns.set("margin_adversarial", rows, margin(cell.logits, labels)[fine].double().cpu().numpy())
    base = pd.DataFrame(values, columns=list(COLUMNS), index=range(len(entries))).astype(COLUMNS)
    scores = _scores(cell.rows, cell.explained, len(entries))
    # A score may not replace a column of the records.
    taken = {name: f"{name}_score" for name in scores if name in base or name in DERIVED}
    return pd.concat([base, scores.rename(columns=taken)], axis=1)


@dataclass
class _Columns:
    """Columns of a frame with `count` rows that are set for some of them."""

    values: dict[str, ArrayLike | None]
    count: int
    classifier: Classifier

    def set(self, name: str, rows: Tensor, values: ArrayLike) -> None:
        # Object columns hold missing values of any type; `astype(COLUMNS)` gives them their own type.
        column = np.full(self.count, None, dtype=object)
        column[rows.cpu().numpy()] = values
        self.values[name] = column

    def set_where(self, name: str, values: Tensor, known: Tensor) -> None:
        rows = known.nonzero()[:, 0]
        chosen = values[rows]
        self.set(name, rows, (chosen.double() if chosen.is_floating_point() else chosen).cpu().numpy())

    def set_classes(self, name: str, classes: Tensor, known: Tensor, rows: Tensor | None = None) -> None:
        """Class numbers and, in `<name>_name`, class names; of all rows in order unless `rows` are given."""
        chosen = classes[known]
        where = known.nonzero()[:, 0] if rows is None else rows[known]
        names = [self.classifier.class_name(int(number)) for number in chosen]
        self.set(name, where, chosen.cpu().numpy())
        self.set(f"{name}_name", where, np.array(names, dtype=object))


def _confidence(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.double().softmax(1).gather(1, classes[:, None])[:, 0]


def _scores(rows: Tensor, explained: Parts[Explanation], count: int) -> pd.DataFrame:
    """The scores of the analyses, in types that allow missing values."""
    import pandas as pd

    parts = []
    for places, explanation in explained:
        scores = [_own_scores(analysis.scores) for analysis in explanation.analyses.values()]
        frame = pd.concat([table.reset_index(drop=True) for table in scores], axis=1)
        parts.append(frame.set_index(rows[places].cpu().numpy()))
    if not parts:
        return pd.DataFrame(index=range(count))
    table = pd.concat(parts)
    return table.reindex(range(count)).astype({name: _nullable_type(table[name]) for name in table})


def _own_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """Scores without null, p and q of those whose p is corrected over the batch: they depend on the other images."""
    # A score has a q only if its p was corrected over the batch.
    corrected = [name.removesuffix("_q") for name in map(str, scores) if name.endswith("_q")]
    return scores.drop(columns=[f"{name}{end}" for name in corrected for end in COMPARED], errors="ignore")


def _nullable_type(column: pd.Series) -> str:
    kind = column.dtype.kind if isinstance(column.dtype, np.dtype) else "O"
    return {"b": "boolean", "i": "Int64", "u": "Int64", "f": "float64"}.get(kind, "str")


def add_maps(maps: GroupMaps, places: Sequence[int], result: CellResult) -> None:
    """Add the attacked images and the maps of their explanations.

    Args:
        maps: of the group.
        places: in the group, of the n attacked images.
        result: of the cell.
    """
    if result.result is None:
        return
    about: dict[str, str | Sequence[str]] = {"title": "Adversarial image", "kind": "picture"}
    maps.add("adversarial", places, result.result.adversarial.cpu().numpy(), about)
    for numbers, explanation in result.explained:
        own = [places[number] for number in numbers.tolist()]
        for name, values in explanation.maps.items():
            picture = explanation.pictures[name]
            about = {"title": picture.title, "kind": picture.kind}
            if picture.categories:
                about["categories"] = list(picture.categories)
            # Maps come as (m, 1, h, w) and are stored without the axis of their only channel.
            maps.add(name, own, values[:, 0].numpy(), about)
        for name, series in explanation.series.items():
            for size, (steps, layers) in _by_size(series).items():
                about = {"title": series.title, "steps": steps}
                maps.add(f"{name}/{size}", own, torch.stack(layers, 1).cpu().numpy(), about)
            for curve, numbers_of_layers in series.curves.items():
                about = {"title": series.title, "steps": list(series.steps), "curve": curve}
                maps.add(curve_name(name, curve), own, numbers_of_layers.cpu().numpy(), about)


def _by_size(series: Series) -> dict[str, tuple[list[str], list[Tensor]]]:
    """Layers and maps (n, h, w) of a series by their size: a few arrays instead of dozens."""
    sizes: dict[str, tuple[list[str], list[Tensor]]] = {}
    for step, maps in zip(series.steps, series.maps, strict=True):
        steps, layers = sizes.setdefault("x".join(map(str, maps.shape[1:])), ([], []))
        steps.append(step)
        layers.append(maps)
    return sizes
