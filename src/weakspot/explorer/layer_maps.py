"""Layers and units of one pair: what the perturbation changes in each layer, beside a random edit, and single units."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weakspot.attribution.hooks import reading, replacing, spatial_layers
from weakspot.attribution.layers import unit_axis
from weakspot.classifier import evaluating
from weakspot.explanations import random_edits
from weakspot.explanations.feature_propagation import Propagation, propagations
from weakspot.explorer.bench import Bench, Exhibit
from weakspot.explorer.messages import Message, Request, RequestError, finite, floats
from weakspot.pairs import AttackResult
from weakspot.statistics.number_format import number, percent

UNITS = 24  # units that are listed, those that change most
OTHERS = 5  # units that a unit is compared with


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


def pair_of(exhibit: Exhibit) -> AttackResult:
    """The pair of the last attack.

    Raises:
        RequestError: if there is none.
    """
    if exhibit.pair is None:
        raise RequestError("there is no perturbation yet (attack the image first)")
    return exhibit.pair


def layers_of(bench: Bench, exhibit: Exhibit) -> Layers:
    """The layers of the pair of an image, computed once."""
    pair = pair_of(exhibit)
    if pair in _known:
        return _known[pair]
    with evaluating(bench.classifier) as classifier:
        others = [pair.adversarial, random_edits(pair, 0)]
        attack, random = propagations(classifier, pair.clean, others)
    _known[pair] = Layers(torch.cat([pair.clean[:1], pair.adversarial[:1]]), attack, random)
    return _known[pair]


def list_layers(bench: Bench, request: Request) -> Message:
    """Every layer, with how far the perturbation and a random edit of its size reach in it."""
    exhibit = bench.exhibit(request.whole("image", 0, 10**6, 0))
    layers = layers_of(bench, exhibit)
    measured = {
        "spread": layers.attack.spread,
        "spread_random": layers.random.spread,
        "reach": layers.attack.reach,
        "reach_random": layers.random.reach,
    }
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
    exhibit = bench.exhibit(request.whole("image", 0, 10**6, 0))
    layers = layers_of(bench, exhibit)
    name = request.choice("layer", layers.attack.layers)
    maps = _maps(bench, layers, name)
    change = (maps[1] - maps[0]).abs().flatten(1).mean(1)
    order = change.argsort(descending=True, stable=True)[:UNITS].tolist()
    return {
        "layer": name,
        "change": floats(layers.attack.maximum[name][0]),
        "random": floats(layers.random.maximum[name][0]),
        "peak": finite(float(layers.attack.peak[name][0])),
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
    exhibit = bench.exhibit(request.whole("image", 0, 10**6, 0))
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
