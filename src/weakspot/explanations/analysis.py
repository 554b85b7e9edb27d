"""Analyses: functions from a model and pairs to scores per image and maps, found by entry point."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from weakspot._checks import check_classes, unknown_choice
from weakspot.classifier import Classifier, predict, runner_up
from weakspot.pairs import Pairs

if TYPE_CHECKING:
    import pandas as pd

P = TypeVar("P", bound=Pairs)
GROUP = "weakspot.analyses"
OWN = ("cam", "ssim", "overlap", "promotion", "restoration", "locality", "propagation", "units")


@dataclass(frozen=True)
class Picture:
    """How one map is drawn.

    Attributes:
        title: its heading; "{label}" and "{target}" become the names of the pair's classes.
        kind: "magnitude" (from zero up), "signed" (around zero) or "category" (whole numbers from 0).
        scale: maps of one scale share their color limits, image by image.
        fixed: limits (low, high) that hold for every image, where the quantity has natural ones.
        categories: of a category map, what each number stands for.
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
    """Maps of one quantity along the layers of a network, to be leafed through.

    Attributes:
        title: its heading.
        steps: names of the layers, first to last.
        maps: (N, h, w) of each, from 0 up; sizes may differ.
        tops: (N,) of each, the value that is drawn as the brightest color.
        curves: name of a curve to (N, layers), numbers that are drawn over the layers.
        meaning: one sentence for the reader.
    """

    title: str
    steps: Sequence[str]
    maps: Sequence[Tensor]
    tops: Sequence[Tensor]
    curves: Mapping[str, Tensor] = field(default_factory=dict)
    meaning: str = ""


@dataclass(frozen=True, eq=False)
class Analysis:
    """What an analysis returns.

    Attributes:
        scores: one row per pair. A column X may bring X_null, its mean with other images' maps, X_p and X_q, its
            two-sided p value against them and the same corrected over the pairs, and X_shift_null and X_shift_p,
            likewise from shifts within the image.
        maps: name to (N, 1, H, W).
        meanings: score name to one sentence for the reader.
        pictures: map name to how it is drawn; others are drawn as magnitudes.
        series: name to maps along the layers.
    """

    scores: pd.DataFrame
    maps: Mapping[str, Tensor]
    meanings: Mapping[str, str] = field(default_factory=dict)
    pictures: Mapping[str, Picture] = field(default_factory=dict)
    series: Mapping[str, Series] = field(default_factory=dict)


AnalysisFunction = Callable[..., Analysis]  # (model, pairs, *, seed) -> Analysis, and what `declared` adds


def available_analyses() -> list[str]:
    """Names that `explain(analyses=...)` takes, in the order they are run: our own, then others by name."""
    names = {entry.name for entry in entry_points(group=GROUP)}
    own = [name for name in OWN if name in names]
    return own + sorted(names.difference(own))


def find_analyses(names: Sequence[str] | None) -> dict[str, AnalysisFunction]:
    """Name to function, all of them where no names are given.

    Raises:
        ValueError: when a name is not registered in the entry-point group "weakspot.analyses".
    """
    known = available_analyses()
    for name in names or ():
        if name not in known:
            raise ValueError(unknown_choice("analysis", name, known))
    wanted = known if names is None else [name for name in known if name in names]
    return {entry.name: entry.load() for name in wanted for entry in entry_points(group=GROUP, name=name)}


def declared(function: AnalysisFunction, options: Mapping[str, object]) -> dict[str, object]:
    """Those of the options that the function names as a parameter; an older analysis is called without them."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    return {name: value for name, value in options.items() if name in parameters}


def rivals(classifier: Classifier, pairs: Pairs) -> Tensor:
    """(N,) the class each label loses to: the target, or where that is the label itself the runner-up.

    An untargeted attack that failed has its own label as target; what it came closest to is then explained.
    """
    same = pairs.targets == pairs.labels
    if not bool(same.any()):
        return pairs.targets
    logits = predict(classifier, pairs.adversarial)
    return torch.where(same, runner_up(logits, pairs.labels)[1], pairs.targets)


def settled(classifier: Classifier, pairs: P) -> P:
    """The pairs on the classifier's device: images float32 without gradients, classes checked and int64.

    Raises:
        ValueError: when a label or target is no class of the model.
    """
    pairs = pairs.to(classifier.mean.device)
    classes = predict(classifier, pairs.clean[:1].float()).shape[1]
    for name in ("labels", "targets"):
        check_classes(getattr(pairs, name), len(pairs), classes, name=name)
    return replace(
        pairs,
        clean=pairs.clean.detach().float(),
        adversarial=pairs.adversarial.detach().float(),
        labels=pairs.labels.long(),
        targets=pairs.targets.long(),
    )


def check_pairs(pairs: Pairs, model: nn.Module) -> None:
    """Raises ValueError unless `pairs` are Pairs and `model` is a module."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is a {type(model).__name__}; accepted is a torch.nn.Module that returns logits"
        )
    if not isinstance(pairs, Pairs):
        raise ValueError(
            f"pairs is a {type(pairs).__name__}; accepted are Pairs, as attacks return and "
            "Pairs.of(model, clean, adversarial) makes"
        )
