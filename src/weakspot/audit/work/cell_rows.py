"""Tables: what a row of the records says, in every shard under the same names and types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from weakspot.audit.plan.attack_plan import AttackPlan
from weakspot.audit.work.shard_images import Opened
from weakspot.classifier import Classifier
from weakspot.logits import margin
from weakspot.pairs import AttackResult

if TYPE_CHECKING:
    import pandas as pd

    from weakspot.explanations import Explanation


BATCH = ("_null", "_null_low", "_null_high", "_p", "_q")  # after a score's name
TIMES = ("attack_seconds", "analysis_seconds")
DERIVED = ("fooled", "robust")  # columns that are made of the records when they are read
COLUMNS = {
    "index": "int64",
    "image": "str",
    "content": "str",
    "attack": "str",
    "budget": "str",
    "region": "str",
    "region_fraction": "float64",
    "label": "Int64",
    "label_name": "str",
    "label_from": "str",
    "predicted": "Int64",
    "predicted_name": "str",
    "correct": "boolean",
    "success": "boolean",
    "success_8bit": "boolean",
    "adversarial_class": "Int64",
    "adversarial_class_name": "str",
    "confidence_clean": "float64",
    "confidence_adversarial": "float64",
    "margin_clean": "float64",
    "margin_adversarial": "float64",
    "linf": "float64",
    "l2": "float64",
    "l1": "float64",
    "pixels": "Int64",
    "ssim_windowed": "float64",
    "ssim_windowed_min": "float64",
    "ssim_budget_spent": "float64",
    "ssim_local_budget_spent": "float64",
    "n_forward": "Int64",
    "n_backward": "Int64",
    "trouble": "str",
    "remark": "str",
    "attack_seconds": "float64",
    "analysis_seconds": "float64",
}


def cell_rows(
    opened: Opened,
    classifier: Classifier,
    attack: AttackPlan,
    region_text: str,
    *,
    labels: Tensor,
    clean: Tensor,
    region: Tensor,
    rows: Tensor,
    result: AttackResult | None,
    adversarial: Tensor | None,
    explained: Sequence[tuple[Tensor, Explanation]],
    troubles: Mapping[int, str],
    seconds: tuple[float, float],
) -> pd.DataFrame:
    """One row for each image (N) under one attack in one region; what could not be found out is missing.

    Args:
        opened: the images.
        classifier: whose class names count.
        attack: which attack.
        region_text: where.
        labels: (N,) classes.
        clean: (N, K) logits.
        region: bool (N, 1, H, W).
        rows: (n,) which images were attacked.
        result: of these n, or None where n is 0.
        adversarial: (n, K) logits of the attacked images, or None.
        explained: numbers (m,) among the n, and what was found of those.
        troubles: image number to what went wrong.
        seconds: of the attack and of the analyses, for each image.
    """
    import pandas as pd

    count = len(opened.entries)
    sound = clean.isfinite().all(1)
    known: dict[str, Any] = {
        "index": [entry.index for entry in opened.entries],
        "image": [entry.name for entry in opened.entries],
        "content": list(opened.contents),
        "attack": attack.label,
        "budget": attack.budget,
        "region": region_text,
        "region_fraction": region.flatten(1).double().mean(1).cpu().numpy(),
        "label_from": [entry.label_from for entry in opened.entries],
        "trouble": [troubles.get(row) for row in range(count)],
        "remark": [remark or None for remark in opened.remarks],
        "attack_seconds": seconds[0],
        "analysis_seconds": seconds[1],
    }
    frame = pd.DataFrame(known, index=range(count))
    predicted = clean.argmax(1)
    given = torch.tensor([entry.label >= 0 for entry in opened.entries], device=sound.device) | sound
    put = _Columns(frame)
    put.classes("label", labels, given, classifier)
    put.classes("predicted", predicted, sound, classifier)
    put.values("correct", predicted == labels, sound)
    put.values("confidence_clean", _chance(clean, labels), sound)
    put.values("margin_clean", margin(clean, labels), sound)
    if result is not None and adversarial is not None:
        table = result.table
        for name in (
            "success",
            "success_8bit",
            "n_forward",
            "n_backward",
            "linf",
            "l2",
            "l1",
            "pixels",
            "ssim_windowed",
            "ssim_windowed_min",
            "ssim_budget_spent",
            "ssim_local_budget_spent",
        ):
            if name in table:
                put.at(name, rows, table[name].to_numpy())
        fine = adversarial.isfinite().all(1)
        mine = labels[rows]
        adversarial_class = adversarial.argmax(1)
        put.at("adversarial_class", rows[fine], adversarial_class[fine].cpu().numpy())
        names = [classifier.class_name(int(number)) for number in adversarial_class[fine]]
        put.at("adversarial_class_name", rows[fine], np.array(names, dtype=object))
        put.at("confidence_adversarial", rows[fine], _chance(adversarial, mine)[fine].double().cpu().numpy())
        put.at("margin_adversarial", rows[fine], margin(adversarial, mine)[fine].double().cpu().numpy())
    base = frame.reindex(columns=list(COLUMNS)).astype(COLUMNS)
    scores = _scores(rows, explained, count)
    taken = {column: f"{column}_score" for column in scores if column in base or column in DERIVED}
    return pd.concat([base, scores.rename(columns=taken)], axis=1)


def no_rows() -> pd.DataFrame:
    """The table of a shard of which nothing could be read."""
    import pandas as pd

    return pd.DataFrame(columns=list(COLUMNS)).astype(COLUMNS)


class _Columns:
    """Columns of a frame, filled row by row."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.frame = frame

    def at(self, name: str, rows: Tensor, values: Any) -> None:
        column = np.full(len(self.frame), None, dtype=object)
        column[rows.cpu().numpy()] = values
        self.frame[name] = column

    def values(self, name: str, values: Tensor, sound: Tensor) -> None:
        rows = sound.nonzero()[:, 0]
        kept = values[rows]
        self.at(name, rows, (kept.double() if kept.is_floating_point() else kept).cpu().numpy())

    def classes(self, name: str, classes: Tensor, sound: Tensor, classifier: Classifier) -> None:
        self.values(name, classes, sound)
        rows = sound.nonzero()[:, 0]
        names = [classifier.class_name(int(number)) for number in classes[rows]]
        self.at(f"{name}_name", rows, np.array(names, dtype=object))


def _chance(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.double().softmax(1).gather(1, classes[:, None])[:, 0]


def _scores(rows: Tensor, explained: Sequence[tuple[Tensor, Explanation]], count: int) -> pd.DataFrame:
    """The scores of the analyses, in types that can be missing."""
    import pandas as pd

    parts = []
    for mine, explanation in explained:
        scores = [_own(analysis.scores) for analysis in explanation.analyses.values()]
        found = pd.concat([frame.reset_index(drop=True) for frame in scores], axis=1)
        parts.append(found.set_index(rows[mine].cpu().numpy()))
    if not parts:
        return pd.DataFrame(index=range(count))
    whole = pd.concat(parts)
    kinds = {name: _kind(whole[name]) for name in whole}
    return whole.reindex(range(count)).astype(kinds)


def _own(scores: pd.DataFrame) -> pd.DataFrame:
    """Without what depends on the other images of the batch: null, p and q of scores whose p is corrected over it."""
    batch = [name.removesuffix("_q") for name in map(str, scores) if name.endswith("_q")]
    return scores.drop(columns=[f"{name}{end}" for name in batch for end in BATCH], errors="ignore")


def _kind(column: pd.Series[Any]) -> str:
    """Of a column of scores as an analysis made it."""
    kind = column.dtype.kind if isinstance(column.dtype, np.dtype) else "O"
    return {"b": "boolean", "i": "Int64", "u": "Int64", "f": "float64"}.get(kind, "str")
