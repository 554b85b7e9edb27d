"""What explains a pair: the report's panels on it, what it changes in each layer beside a random edit, single units."""

import itertools
import math
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from weakspot._checks import collected_warnings
from weakspot.attribution.hooks import reading, replacing, spatial_layers
from weakspot.attribution.layout import unit_axis
from weakspot.classifier import evaluating
from weakspot.explanations import explain, random_edits
from weakspot.explanations.analysis import accepted_options, available_analyses, find_analyses
from weakspot.explanations.feature_propagation import Propagation, propagations
from weakspot.explorer.bench import Bench, Exhibit
from weakspot.explorer.messages import Message, Request, RequestError, finite, floats
from weakspot.pairs import AttackResult
from weakspot.report.page_sections import panel
from weakspot.statistics.number_format import number, percent

REFERENCES = (19, 60)  # other images of the bench that a pair is compared with: at least and at most
UNITS = 24  # units that are listed, those that change most
OTHERS = 5  # units that a unit is compared with
CONCEPTS = "scores.csv"  # as `weakspot dissect` writes it
COLUMNS = ("layer", "unit", "concept", "iou")


# ---------------------------------------------------------------- panels


def explain_pair(bench: Bench, request: Request) -> Message:
    """The panel of one analysis of the last attack on an image."""
    exhibit = bench.attacked(request)
    pair = exhibit.attacked()
    name = request.choice("analysis", available_analyses())
    compares = accepted_options(find_analyses([name])[name], {"reference": None})
    with collected_warnings() as cautions:
        explanation = explain(
            bench.classifier,
            pair,
            analyses=[name],
            seed=request.whole("seed", 0, 2**53, 0),
            names=[exhibit.name],
            reference=_references(bench, exhibit) if compares else None,
        )
    drawn = panel(explanation)
    row = explanation.scores.iloc[0]
    scores = [
        {"name": name.replace("_", " "), "value": number(float(row[name])), "meaning": meaning}
        for name, meaning in explanation.meanings.items()
        if name in row and isinstance(row[name], float | int | np.number)
    ]
    return {
        "html": drawn.html,
        "data": dict(drawn.data),
        "sentences": [*drawn.sentences, *(f"Caution: {text}." for text in cautions)],
        "scores": scores,
    }


def _references(bench: Bench, exhibit: Exhibit) -> Tensor | None:
    """The other images that were on the bench from the start; None if they are too few for a test."""
    others = [
        one.pixels
        for one in bench.exhibits
        if one is not exhibit and not one.uploaded and one.pixels.shape == exhibit.pixels.shape
    ]
    if exhibit.uploaded or bench.origin.samples or len(others) < REFERENCES[0]:
        return None
    return torch.cat(others[: REFERENCES[1]])


# ---------------------------------------------------------------- layers and units


@dataclass(eq=False)
class Layers:
    """The layers of one pair.

    Attributes:
        images: (2, C, H, W) the clean and the adversarial image.
        attack: what the perturbation changes.
        random: what a random edit of its size changes.
        maps: layer to (2, C, h, w) activations of the clean and the adversarial image, for layers that were opened.
    """

    images: Tensor
    attack: Propagation
    random: Propagation
    maps: dict[str, Tensor] = field(default_factory=dict)


# Weak, so that the activations of a pair are freed once another attack has replaced it.
_known: weakref.WeakKeyDictionary[AttackResult, Layers] = weakref.WeakKeyDictionary()


def layers_of(bench: Bench, exhibit: Exhibit) -> Layers:
    """The layers of the pair of an image, computed once."""
    pair = exhibit.attacked()
    if pair in _known:
        return _known[pair]
    with evaluating(bench.classifier) as classifier:
        others = [pair.adversarial, random_edits(pair, 0)]
        attack, random = propagations(classifier, pair.clean, others)
    _known[pair] = Layers(torch.cat([pair.clean[:1], pair.adversarial[:1]]), attack, random)
    return _known[pair]


def list_layers(bench: Bench, request: Request) -> Message:
    """Every layer, with how far the perturbation and a random edit of its size reach in it."""
    exhibit = bench.attacked(request)
    layers = layers_of(bench, exhibit)
    measured = {"spread": layers.attack.spread, "spread_random": layers.random.spread}
    listed = [
        {
            "name": name,
            "height": int(layers.attack.maximum[name].shape[1]),
            "width": int(layers.attack.maximum[name].shape[2]),
            **{measure: finite(float(values[name][0])) for measure, values in measured.items()},
        }
        for name in layers.attack.layers
    ]
    last = layers.attack.layers[-1]
    own, random = (float(one.spread[last][0]) for one in (layers.attack, layers.random))
    return {
        "layers": listed,
        "sentence": f"In the last layer, {last}, the perturbation changes {percent(own)} of the sites by over a tenth "
        f"of the layer's peak; a random edit of its size changes {percent(random)}. Reaching far is no sign "
        "of success: attacks that fail reach almost as far.",
    }


def show_layer(bench: Bench, request: Request) -> Message:
    """What the perturbation and a random edit change in one layer, and the units that change most."""
    exhibit = bench.attacked(request)
    layers = layers_of(bench, exhibit)
    name = request.choice("layer", layers.attack.layers)
    maps = _maps(bench, layers, name)
    change = (maps[1] - maps[0]).abs().flatten(1).mean(1)
    order = change.argsort(descending=True, stable=True)[:UNITS].tolist()
    return {
        "layer": name,
        "change": floats(layers.attack.maximum[name][0]),
        "random": floats(layers.random.maximum[name][0]),
        "count": len(change),
        "units": [
            {"unit": unit, "change": finite(float(change[unit])), "concept": bench.concepts.get((name, unit))}
            for unit in order
        ],
    }


def _maps(bench: Bench, layers: Layers, name: str) -> Tensor:
    """(2, C, h, w) activations of a layer."""
    if name not in layers.maps:
        seen: list[Tensor] = []
        with evaluating(bench.classifier) as classifier, torch.no_grad():
            place = spatial_layers(classifier, layers.images[:1], [name])
            # Cloned at once, because a later layer may overwrite its input in place.
            with reading(classifier, place, lambda _, maps: seen.append(maps.float().clone())):
                classifier(classifier.filled(layers.images))
        # The first two: a network that was exported for more images got repetitions of the last one.
        layers.maps = {name: seen[0][:2]}  # of one layer at a time, because activations are large
    return layers.maps[name]


def show_unit(bench: Bench, request: Request) -> Message:
    """One unit: its maps, and the decisions without it and without other units."""
    exhibit = bench.attacked(request)
    layers = layers_of(bench, exhibit)
    name = request.choice("layer", layers.attack.layers)
    maps = _maps(bench, layers, name)
    count = maps.shape[1]
    unit = request.whole("unit", 0, count - 1)
    images = layers.images
    generator = torch.Generator().manual_seed(request.whole("seed", 0, 2**53, 0))
    drawn = [one for one in torch.randperm(count, generator=generator).tolist() if one != unit][:OTHERS]
    whole = bench.logits(images)
    without = _without(bench, name, unit, images)
    others = [_without(bench, name, one, images) for one in drawn]
    return {
        "unit": unit,
        "concept": bench.concepts.get((name, unit)),
        "clean": floats(maps[0, unit]),
        "adversarial": floats(maps[1, unit]),
        "with": _both(bench, exhibit, whole),
        "without": _both(bench, exhibit, without),
        "others": [
            {"unit": one, **_both(bench, exhibit, logits)} for one, logits in zip(drawn, others, strict=True)
        ],
        "sentence": _sentence(bench, exhibit, unit, whole[1], without[1], [one[1] for one in others]),
    }


def _without(bench: Bench, layer: str, unit: int, images: Tensor) -> Tensor:
    """(2, K) logits of one pass in which a unit is zero wherever the layer's output is used.

    A module may be called several times in a pass; only the call that is this layer is changed.
    """
    with evaluating(bench.classifier) as classifier, torch.no_grad():
        place = spatial_layers(classifier, images[:1], [layer])[layer]
        if place.module is None:
            raise RequestError(f"{layer} is no module, so that its units cannot be set to zero")
        calls = itertools.count(1)

        def change(activation: Tensor) -> Tensor:
            if next(calls) != place.turn:
                return activation
            return activation.index_fill(
                unit_axis(activation, images), torch.tensor([unit]).to(activation.device), 0
            )

        with replacing(place.module, change):
            logits: Tensor = classifier(classifier.filled(images))[: len(images)]
        return logits


def _both(bench: Bench, exhibit: Exhibit, logits: Tensor) -> Message:
    return {
        name: {"predicted": bench.guesses(one, 1)[0], "margin": finite(bench.margin(exhibit, one))}
        for name, one in zip(("clean", "adversarial"), logits, strict=True)
    }


def _sentence(
    bench: Bench, exhibit: Exhibit, unit: int, whole: Tensor, without: Tensor, others: list[Tensor]
) -> str:
    """What the adversarial image's margin does without the unit, and without others."""
    before, after = bench.margin(exhibit, whole), bench.margin(exhibit, without)
    name = bench.classifier.class_name(int(without.argmax()))
    text = (
        f"Without unit {unit}, the adversarial margin goes from {number(before)} to {number(after)} ({name})."
    )
    if not others:
        return text
    margins = sorted(bench.margin(exhibit, one) for one in others)
    if len(margins) == 1:
        return f"{text} Without another unit, drawn at random, it goes to {number(margins[0])}."
    low, high = number(margins[0]), number(margins[-1])
    return f"{text} Without one of {len(margins)} other units, drawn at random, it goes to between {low} and {high}."


def read_concepts(folder: Path) -> dict[tuple[str, int], str]:
    """The concept that `weakspot dissect` found for a unit, with its intersection over union, by layer and unit.

    Args:
        folder: that `weakspot dissect` wrote.

    Raises:
        FileNotFoundError: if it holds no such file.
        ValueError: if the file is not that of a dissection.
    """
    import pandas as pd

    path = folder / CONCEPTS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} must be a folder that weakspot dissect wrote, got none with {CONCEPTS}"
        )
    try:
        table = pd.read_csv(path)
    except (ValueError, UnicodeDecodeError):
        raise ValueError(f"{path} must be the table of a dissection, got a file that is no table") from None
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise ValueError(f"{path} must be the table of a dissection, got one without {', '.join(missing)}")
    rows = zip(*(table[name] for name in COLUMNS), strict=True)
    return {
        (str(layer), int(unit)): f"{concept} (IoU {iou:.2g})"
        for layer, unit, concept, iou in rows
        if isinstance(concept, str) and not math.isnan(iou)
    }
