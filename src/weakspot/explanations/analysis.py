"""The contract of an analysis: a function of a model and pairs that returns scores per image and maps.

Analyses and the functions that draw them are found by entry point, so that a package can add one of either, and so
that this room never imports `weakspot.report`. To register an analysis, add an entry point in the group
`weakspot.analyses` of `pyproject.toml` (ours or your package's). Nothing in this file has to change.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from weakspot._checks import check_classes, unknown_choice
from weakspot._memory import remembered
from weakspot._plug_ins import entry_points
from weakspot.classifier import Classifier, predict
from weakspot.logits import runner_up
from weakspot.pairs import Pairs

if TYPE_CHECKING:
    import pandas as pd

P = TypeVar("P", bound=Pairs)
GROUP = "weakspot.analyses"
RENDERERS = "weakspot.renderers"
# The order of scores and maps. All other analyses follow, sorted by name.
ORDER = (
    "weak_spots",
    "cam",
    "ssim",
    "overlap",
    "promotion",
    "restoration",
    "locality",
    "propagation",
    "units",
    "certificate",
)
FIRST = "overlap"  # `explain` runs this one first: the verdict rests on it
ON_REQUEST = ("certificate",)  # takes minutes an image: it runs only if it is named
QUICK = ("cam", "ssim", "overlap")  # enough for classes, place and verdict


@dataclass(frozen=True)
class Picture:
    """How a map is drawn.

    Attributes:
        title: the heading. "{label}" and "{target}" are replaced by the names of the pair's classes.
        kind: "magnitude" (from zero up), "signed" (around zero) or "category" (integers from 0).
        scale: maps with the same scale name share their color limits, image by image.
        fixed: limits (low, high) for every image, if the quantity has natural ones.
        categories: the meaning of each number of a category map.
        meaning: one sentence for the reader.
    """

    title: str
    kind: str = "magnitude"
    scale: str | None = None
    fixed: tuple[float, float] | None = None
    categories: Sequence[str] = ()
    meaning: str = ""


@dataclass(frozen=True, eq=False)
class Series:
    """Maps of one quantity along the layers of a network, for a layer browser.

    Attributes:
        title: the heading.
        steps: names of the layers, first to last.
        maps: (N, h, w) for each layer, not negative; sizes may differ.
        tops: (N,) for each layer, the value drawn in the brightest color.
        curves: curve name to (N, layers), numbers plotted over the layers.
        meaning: one sentence for the reader.
    """

    title: str
    steps: Sequence[str]
    maps: Sequence[Tensor]
    tops: Sequence[Tensor]
    curves: Mapping[str, Tensor] = field(default_factory=dict)
    meaning: str = ""

    def __repr__(self) -> str:
        return f"Series({self.title!r}, {len(self.steps)} layers, curves: {', '.join(self.curves) or 'none'})"


@dataclass(frozen=True, eq=False)
class Analysis:
    """The result of one analysis.

    Attributes:
        scores: one row per pair. A column X may be followed by X_null (its mean with other images' maps), X_p and X_q
            (the two-sided p value against them, and p corrected over the pairs), and by X_shift_null and X_shift_p
            (the same from shifts within the image).
        maps: map name to (N, 1, H, W).
        meanings: score name to one sentence for the reader.
        pictures: map name to how it is drawn. Other maps are drawn as magnitudes.
        series: name to maps along the layers.
    """

    scores: pd.DataFrame
    maps: Mapping[str, Tensor]
    meanings: Mapping[str, str] = field(default_factory=dict)
    pictures: Mapping[str, Picture] = field(default_factory=dict)
    series: Mapping[str, Series] = field(default_factory=dict)

    def __repr__(self) -> str:
        tests = ("_null", "_p", "_q")
        scores = [str(name) for name in self.scores if not str(name).endswith(tests)]
        lines = [
            f"Analysis of {len(self.scores)} pairs",
            f"  scores: {', '.join(scores) or 'none'}",
            f"  maps: {shapes(self.maps)}",
        ]
        return "\n".join(lines + ([f"  series: {', '.join(self.series)}"] if self.series else []))


AnalysisFunction = Callable[
    ..., Analysis
]  # (model, pairs, *, seed) -> Analysis, plus what `accepted_options` adds


def shapes(tensors: Mapping[str, Tensor]) -> str:
    """The names of tensors, grouped by shape, for a `repr`.

    >>> shapes({"roi": torch.zeros(2, 1, 8, 8), "roa": torch.zeros(2, 1, 8, 8)})
    'roi, roa (2, 1, 8, 8)'
    """
    names: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(tuple(tensor.shape), []).append(name)
    return "; ".join(f"{', '.join(group)} {shape}" for shape, group in names.items()) or "none"


def available_analyses() -> list[str]:
    """Names that `explain(analyses=...)` takes, in the order they run: see `ORDER`."""
    names = {entry.name for entry in entry_points(group=GROUP)}
    first = [name for name in ORDER if name in names]
    return first + sorted(names.difference(first))


def usual_analyses() -> list[str]:
    """Names of the analyses that run unless others are named: all but those of `ON_REQUEST`."""
    return [name for name in available_analyses() if name not in ON_REQUEST]


def find_analyses(names: Sequence[str] | None) -> dict[str, AnalysisFunction]:
    """Name to function; the usual analyses if `names` is None.

    Raises:
        ValueError: if a name is not registered in the entry-point group "weakspot.analyses".
    """
    available = available_analyses()
    if isinstance(names, str):
        raise ValueError(f"analyses must be a list of names, got {names!r} (did you mean [{names!r}]?)")
    for name in names or ():
        if name not in available:
            raise ValueError(unknown_choice("analysis", name, available))
    # In the order in which they run, whatever the order of the names.
    chosen = usual_analyses() if names is None else [name for name in available if name in names]
    return {entry.name: entry.load() for name in chosen for entry in entry_points(group=GROUP, name=name)}


def find_renderer(name: str) -> Callable[..., object]:
    """The function of the entry-point group "weakspot.renderers" that shows a result; `weakspot.report` has them.

    Raises:
        RuntimeError: if no installed package registers one.
    """
    for entry in entry_points(group=RENDERERS, name=name):
        renderer: Callable[..., object] = entry.load()
        return renderer
    raise RuntimeError(f"no installed package draws {name!r} (install weakspot again: pip install weakspot)")


def accepted_options(function: AnalysisFunction, options: Mapping[str, object]) -> dict[str, object]:
    """The options that the function has as parameters; a function without them is called without them."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    return {name: value for name, value in options.items() if name in parameters}


def competing_classes(classifier: Classifier, pairs: Pairs) -> Tensor:
    """(N,) the class that each label competes with: the target, or the runner-up if the target is the label.

    The target of an untargeted attack that failed is the label itself; the class it came closest to is explained.
    """
    same = pairs.targets == pairs.labels
    if not bool(same.any()):
        return pairs.targets
    logits = predict(classifier, pairs.adversarial)
    return torch.where(same, runner_up(logits, pairs.labels)[1], pairs.targets)


def prepare_pairs(classifier: Classifier, pairs: P) -> P:
    """The pairs on the classifier's device: images float32 without gradients, classes validated and int64.

    Raises:
        ValueError: if a label or target is not a class of the model.
    """
    pairs = pairs.to(classifier.mean.device)
    classes = remembered(classifier, "classes", lambda: predict(classifier, pairs.clean[:1].float()).shape[1])
    for name in ("labels", "targets"):
        check_classes(getattr(pairs, name), len(pairs), classes, name=name)
    return replace(
        pairs,
        clean=pairs.clean.detach().float(),
        adversarial=pairs.adversarial.detach().float(),
        # Copies: gradients cannot be taken with classes that were made under inference mode.
        labels=pairs.labels.to(torch.long, copy=True),
        targets=pairs.targets.to(torch.long, copy=True),
    )


def check_pairs(pairs: Pairs, model: nn.Module) -> None:
    """Raises ValueError unless `pairs` are Pairs, at least one, and `model` is a module."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module that returns logits, got {type(model).__name__}")
    if not isinstance(pairs, Pairs):
        raise ValueError(
            f"pairs must be Pairs, got {type(pairs).__name__} (attacks return them, and "
            "Pairs.of(model, clean, adversarial) makes them)"
        )
    if not len(pairs):
        raise ValueError("pairs must hold at least one pair, got none")


def batches_of(pairs: Pairs | Iterable[Pairs]) -> Iterable[Pairs]:
    """One batch of pairs, or several, as batches.

    Raises:
        ValueError: if `pairs` is neither.
    """
    if isinstance(pairs, Pairs):
        return [pairs]
    if not isinstance(pairs, Iterable):
        raise ValueError(f"pairs must be Pairs or an iterable of them, got {type(pairs).__name__}")
    return pairs


def check_analysis(name: str, analysis: Analysis, count: int) -> Analysis:
    """The result of an analysis, if it is one.

    Raises:
        ValueError: if it is not, or has another number of rows than pairs.
    """
    if not isinstance(analysis, Analysis) or len(analysis.scores) != count:
        got = f"{len(analysis.scores)} rows" if isinstance(analysis, Analysis) else type(analysis).__name__
        raise ValueError(
            f"analysis {name!r} must return an Analysis with one row for each of {count} pairs, got {got}"
        )
    return analysis


def with_unique_names(results: Mapping[str, Analysis], base: pd.DataFrame) -> dict[str, Analysis]:
    """The analyses; a score or map whose name is already taken gets its analysis's name as a prefix."""
    scores, maps = set(base.columns), {"difference"}
    unique = {}
    for prefix, analysis in results.items():
        columns = {column: f"{prefix}_{column}" for column in analysis.scores if column in scores}
        taken = {name: f"{prefix}_{name}" for name in analysis.maps if name in maps}
        unique[prefix] = replace(
            analysis,
            scores=analysis.scores.rename(columns=columns),
            meanings={columns.get(name, name): text for name, text in analysis.meanings.items()},
            maps={taken.get(name, name): tensor for name, tensor in analysis.maps.items()},
            pictures={taken.get(name, name): picture for name, picture in analysis.pictures.items()},
        )
        scores |= set(unique[prefix].scores.columns)
        maps |= set(unique[prefix].maps)
    return unique
