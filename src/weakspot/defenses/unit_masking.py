"""Unit masking: a network with some units of a layer set to zero (after Xu et al. 2019, arXiv 1904.02057).

`masking` measures whether this helps. The attack is made again on the masked network, because attacks made for the
unmasked network are weak evidence.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from weakspot._checks import check_classes, check_fraction, check_seed, unknown_choice
from weakspot._progress import Progress
from weakspot._random import numpy_generator
from weakspot.attacks import pgd
from weakspot.attribution.hooks import replacing
from weakspot.attribution.layers import layer_key
from weakspot.attribution.layout import unit_axis
from weakspot.classifier import Classifier, as_classifier, check_images, default_batch, evaluating, predict
from weakspot.images import distinct
from weakspot.pairs import Pairs
from weakspot.statistics import mcnemar, proportion_interval
from weakspot.statistics.number_format import counted, p_value, percent, with_interval

if TYPE_CHECKING:
    import pandas as pd


def mask_units(model: nn.Module, layer: str, units: Sequence[int] | Tensor) -> Classifier:
    """The model with these units of a layer set to zero. The model itself is not changed.

    Attacks on the result see the masked network, gradients included.

    Args:
        model: any classifier. Its weights are shared, not copied.
        layer: a name in `model.named_modules()`. The layer's output is a map, tokens or a row of features; units of
            tokens are the channels, also those of the class token.
        units: their numbers, from 0.

    Raises:
        ValueError: if there is no such layer or unit. If the network does not take images of the classifier's input
            size, this is raised at the first call.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    >>> masked = mask_units(model.eval(), "1", [0, 1, 2, 3])
    >>> bool((masked(torch.rand(1, 3, 8, 8)) == model[4].bias).all())
    True
    """
    wanted = unit_numbers(units)
    classifier = as_classifier(model)
    modules = dict(classifier.network.named_modules())
    name = layer_key(layer, modules)
    if name is None:
        raise ValueError(unknown_choice("layer", layer, filter(None, modules)))
    mean, std = (values.flatten().tolist() for values in (classifier.mean, classifier.std))
    masked = Classifier(
        _Masked(classifier.network, name, wanted),
        mean=mean,
        std=std,
        input_size=classifier.input_size,
        class_names=classifier.class_names,
        name=f"{classifier.name} without {counted(len(wanted), 'unit')} of {layer}",
    )
    masked.channels = classifier.channels
    masked.training = classifier.training
    _try_once(masked)
    return masked


class CannotMaskError(ValueError):
    """The layer cannot be masked, or has no such unit."""


def _try_once(masked: Classifier) -> None:
    """Run the network once, so that a layer which cannot be masked is reported now.

    Other errors are ignored: the network may not take images of this size.
    """
    image = torch.zeros(1, masked.channels, *masked.input_size, device=masked.mean.device)
    with evaluating(masked), torch.no_grad():
        try:
            masked(masked.filled(image))
        except CannotMaskError:
            raise
        except Exception:  # noqa: BLE001 - a network may raise anything
            return


def unit_numbers(units: Sequence[int] | Tensor) -> list[int]:
    """The unit numbers in ascending order, each once.

    Raises:
        ValueError: if one of them is not an integer of at least 0.
    """
    expected = "units must be integers of at least 0, such as [3, 17], got"
    listed = units.tolist() if isinstance(units, Tensor | np.ndarray) else units
    if isinstance(listed, str | bytes) or not isinstance(listed, Iterable):
        raise ValueError(f"{expected} {units!r}")
    numbers = set()
    for unit in listed:
        try:
            number = operator.index(unit)
        except TypeError:
            raise ValueError(f"{expected} {unit!r}") from None
        if number < 0 or isinstance(unit, bool):
            raise ValueError(f"{expected} {unit!r}")
        numbers.add(number)
    return sorted(numbers)


class _Masked(nn.Module):
    """A network with some units of one of its modules set to zero."""

    def __init__(self, network: nn.Module, layer: str, units: Sequence[int]) -> None:
        super().__init__()
        self.network, self.layer, self.units = network, layer, list(units)
        self.fixed_batch = getattr(network, "fixed_batch", None)
        self.training = network.training

    def forward(self, images: Tensor) -> Any:
        # Looked up in each pass, so that a copy of this network masks its own module.
        module = self.network.get_submodule(self.layer)
        has_run: list[bool] = []

        def mask(activation: Tensor) -> Tensor:
            has_run.append(True)
            return self._masked(activation, images)

        with replacing(module, mask):
            output = self.network(images)
        if not has_run:
            raise CannotMaskError(
                f"layer must be one that every image goes through and that returns a tensor, got {self.layer!r}, of "
                "which nothing would be masked (parts of TorchScript and of exported networks cannot be masked)"
            )
        return output

    def extra_repr(self) -> str:
        return f"units {self.units} of {self.layer} at zero"

    def _masked(self, activation: Tensor, images: Tensor) -> Tensor:
        axis = unit_axis(activation, images)
        count = activation.shape[axis]
        if self.units and self.units[-1] >= count:
            raise CannotMaskError(
                f"units must be between 0 and {count - 1}, the units of {self.layer!r}, got {self.units[-1]}"
            )
        # A product instead of an assignment: gradients pass, and the network's own tensor is not changed.
        factors = torch.ones(count, dtype=activation.dtype, device=activation.device)
        factors[self.units] = 0
        return activation * factors.view([count if place == axis else 1 for place in range(activation.ndim)])


DRAWS = 3  # sets of random units
LEVEL = 0.05  # of McNemar's test
UNMASKED, THESE, ACTIVE = "none", "these units", "most active units"
MEASURES = ("clean", "transfer", "attacked_again")
Attack = Callable[[nn.Module, Tensor, Tensor], Pairs]


def masking(
    model: nn.Module,
    layer: str,
    units: Sequence[int] | Tensor,
    images: Tensor,
    labels: Tensor,
    *,
    attack: Attack = pgd,
    seed: int = 0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Accuracy of the network with units masked: clean, under transferred attacks, and attacked again.

    The controls are three sets of as many random units, and as many of the most active units. A control that equals
    these units or another control is left out.

    Args:
        model: any classifier.
        layer: see `mask_units`.
        units: that are masked. If they were chosen by their sensitivity, choose them on *other* images.
        images: (N, C, H, W). Copies of an image, which are no independent evidence, are left out.
        labels: (N,); of copies, that of the first counts.
        attack: `attacks.pgd` or any function of model, images and labels that returns pairs.
        seed: of the random units.
        progress: called with the fraction done.

    Returns:
        One row per network (masked: "none", "these units", "random units 1" to "3", "most active units"), with
        units, images; clean, transfer (attacks made for the unmasked network) and attacked_again, each with _low and
        _high, exact 95% intervals; gain (attacked_again of "these units" minus that of this row, on the same images)
        and p (of the gain, by McNemar's exact test).

    Raises:
        ValueError: if an argument does not fit.
    """
    import pandas as pd

    check_seed(seed)
    if not callable(attack):
        raise ValueError(
            f"attack must be a function of model, images and labels such as attacks.pgd, got {attack!r}"
        )
    with evaluating(model) as classifier:
        images = check_images(images, classifier)
        check_classes(labels, len(images), predict(classifier, images[:1]).shape[1])
        first = distinct(images)
        images, labels = images[first], labels.to(images.device, torch.long)[first]
    wanted = unit_numbers(units)
    activity, count = _activity(model, layer, images), len(wanted)
    if not 0 < count <= len(activity):
        raise ValueError(f"units must be 1 to {len(activity)} units, as many as {layer!r} has, got {count}")
    # The attack on the unmasked network gives both the row "none" and the transferred images of all rows.
    groups: dict[str, Sequence[int]] = {UNMASKED: (), THESE: wanted, **_controls(wanted, activity, seed)}
    transferred = _attacked(attack, model, images, labels)
    outcomes: dict[str, dict[str, NDArray[np.bool_]]] = {}
    for number, (name, chosen) in enumerate(groups.items(), start=1):
        masked = mask_units(model, layer, chosen) if len(chosen) else model
        again = _attacked(attack, masked, images, labels) if len(chosen) else transferred
        with evaluating(masked) as classifier:
            outcomes[name] = {
                measure: (predict(classifier, shown).argmax(1) == labels).cpu().numpy()
                for measure, shown in zip(MEASURES, (images, transferred, again), strict=True)
            }
        if progress is not None:
            progress(number / len(groups))
    return pd.DataFrame([_row(name, len(chosen), outcomes) for name, chosen in groups.items()])


def _controls(wanted: Sequence[int], activity: Tensor, seed: int) -> dict[str, Sequence[int]]:
    """As many random and most active units, without sets that equal `wanted` or another control."""
    rng = numpy_generator(seed)
    sets = {
        f"random units {number}": rng.choice(len(activity), len(wanted), replace=False).tolist()
        for number in range(1, DRAWS + 1)
    } | {ACTIVE: activity.topk(len(wanted)).indices.tolist()}
    seen = [set(wanted)]
    controls = {}
    for name, chosen in sets.items():
        if set(chosen) not in seen:
            controls[name] = chosen
            seen.append(set(chosen))
    return controls


def _attacked(attack: Attack, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The attacked images (N, C, H, W), if the user's function returns them."""
    pairs = attack(model, images, labels)
    if not isinstance(pairs, Pairs) or pairs.adversarial.shape != images.shape:
        raise ValueError(f"attack must return Pairs of the {counted(len(images))}, got {pairs!r}")
    return pairs.adversarial.to(images)


def _row(name: str, count: int, outcomes: dict[str, dict[str, NDArray[np.bool_]]]) -> dict[str, object]:
    own, these = outcomes[name], outcomes[THESE]["attacked_again"]
    row: dict[str, object] = {"masked": name, "units": count, "images": len(these)}
    for measure, right in own.items():
        interval = proportion_interval(right)
        row |= dict(zip((measure, f"{measure}_low", f"{measure}_high"), interval, strict=True))
    other = own["attacked_again"]
    return row | {"gain": float(these.mean() - other.mean()), "p": mcnemar(these, other)}


def masking_sentence(table: pd.DataFrame, level: float = LEVEL) -> str:
    """A sentence: does masking these units help against a new attack, and more than the controls do?

    Args:
        table: from `masking`.
        level: of McNemar's test. A gain over the controls must reach it against each of them.
    """
    check_fraction(level, name="level")
    rows = {row["masked"]: row for row in table.to_dict("records")}
    unmasked, these = rows.pop(UNMASKED), rows.pop(THESE)
    count = int(these["units"])
    units = counted(count, "unit")
    images = counted(int(these["images"]))
    figures = (
        f"under a new attack, the masked network classifies {_ranged(these)} of {images} correctly and the unmasked "
        f"one {_ranged(unmasked)} ({p_value(unmasked['p'])})"
    )
    with_mask, without = percent(these["clean"]), percent(unmasked["clean"])
    cost = f"Without attack, accuracy is {with_mask} with the mask and {without} without it."
    # The order of the cases matters: a gain that chance explains comes before its sign.
    if unmasked["p"] > level or unmasked["gain"] == 0:
        # Where all attacks succeed, or none does, another budget could tell the two networks apart.
        same = these["attacked_again"] == unmasked["attacked_again"] and unmasked["clean"] > 0
        budget = {0: "smaller", 1: "larger"}.get(unmasked["attacked_again"]) if same else None
        hint = f" A {budget} budget could tell more." if budget else ""
        return f"Masking {units} is not shown to change robustness: {figures}. {cost}{hint}"
    if unmasked["gain"] < 0:
        return f"Masking {units} makes the network weaker: {figures}. {cost}"
    if not rows:
        return f"Masking {units} helps, but there are no other units to compare with: {figures}. {cost}"
    # Helping is not enough: the controls show how much masking any units of this number helps.
    behind = [str(name) for name, row in rows.items() if row["gain"] <= 0 or row["p"] > level]
    if behind:
        return (
            f"Masking {units} helps, but is not shown to help more than masking as many other units "
            f"({', '.join(behind)}): {figures}. {cost}"
        )
    largest = p_value(max(row["p"] for row in rows.values()), "")
    return (
        f"Masking {units} helps, and more than masking as many other units ({', '.join(map(str, rows))}; p at most "
        f"{largest.removeprefix('< ')}): {figures}. {cost}"
    )


def _ranged(row: dict[Hashable, Any]) -> str:
    fraction, low, high = (row[f"attacked_again{suffix}"] for suffix in ("", "_low", "_high"))
    return with_interval(fraction, low, high)


def _activity(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """(U,) mean activation of the layer's units in these images."""
    classifier = mask_units(model, layer, [])  # gives access to the layer by its name
    sums: list[Tensor] = []
    inner = classifier.network
    module = inner.get_submodule("network").get_submodule(str(inner.layer))

    def note(activation: Tensor, count: int) -> Tensor:
        axis = unit_axis(activation, images)
        # The last batch may be filled up with repetitions, which do not count.
        by_unit = activation[:count].movedim(axis, 1).reshape(count, activation.shape[axis], -1)
        sums.append(by_unit.mean(2).sum(0))
        return activation

    with evaluating(classifier), torch.no_grad():
        for part in images.split(classifier.fixed_batch or default_batch(images)):
            with replacing(module, partial(note, count=len(part))):
                classifier(classifier.filled(part))
    return torch.stack(sums).sum(0) / len(images)
