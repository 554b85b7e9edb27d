"""Masking: a network with some of a layer's units silenced (after Xu et al. 2019, arXiv 1904.02057)."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weakspot.attribution.layout import unit_axis
from weakspot.attribution.replacing import replacing
from weakspot.checks import closest
from weakspot.classifier import Classifier, as_classifier, evaluating


def mask_units(model: nn.Module, layer: str, units: Sequence[int] | Tensor) -> Classifier:
    """The model with these units of a layer at zero; the model itself stays as it is.

    Attacks on the result see the masked network, gradients included.

    Args:
        model: any classifier; its weights are shared, not copied.
        layer: a module, as `model.named_modules()` has it, whose output is a map, tokens, or a row of features; of
            tokens units are the channels, the class token's too.
        units: their numbers.

    Raises:
        ValueError: when there is no such layer or unit, naming it; of a network that does not take images of the
            classifier's input size, when it is first used.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    >>> masked = mask_units(model.eval(), "1", [0, 1, 2, 3])
    >>> bool((masked(torch.rand(1, 3, 8, 8)) == model[4].bias).all())
    True
    """
    wanted = unit_numbers(units)
    classifier = as_classifier(model)
    modules = dict(classifier.network.named_modules())
    spellings = (str(layer), str(layer).removeprefix("network."), f"network.{layer}")
    name = next((spelling for spelling in spellings if spelling and spelling in modules), None)
    if name is None:
        near = closest(str(layer), filter(None, modules))
        raise ValueError(f"layer is {layer!r}, which {classifier.name} has not; {near}")
    mean, std = (values.flatten().tolist() for values in (classifier.mean, classifier.std))
    masked = Classifier(
        _Masked(classifier.network, name, wanted),
        mean=mean,
        std=std,
        input_size=classifier.input_size,
        class_names=classifier.class_names,
        name=f"{classifier.name} without {len(wanted)} units of {layer}",
    )
    masked.channels = classifier.channels
    masked.training = classifier.training
    _try(masked)
    return masked


class CannotMaskError(ValueError):
    """The layer cannot be masked, or has no such unit."""


def _try(masked: Classifier) -> None:
    """One pass, so that what cannot be masked is told now. Images of a size that the network refuses say nothing."""
    image = torch.zeros(1, masked.channels, *masked.input_size, device=masked.mean.device)
    with evaluating(masked), torch.no_grad():
        try:
            masked(masked.filled(image))
        except CannotMaskError:
            raise
        except Exception:  # noqa: BLE001 - whatever a network raises of an image that is not its own
            return


def unit_numbers(units: Sequence[int] | Tensor) -> list[int]:
    """Units as whole numbers, ascending, each once.

    Raises:
        ValueError: when one of them is no number of a unit.
    """
    accepted = "accepted are whole numbers from 0, such as [3, 17]"
    if isinstance(units, str | bytes) or not isinstance(units, Iterable):
        raise ValueError(f"units is {units!r}; {accepted}")
    numbers = set()
    for unit in units.tolist() if isinstance(units, Tensor) else units:
        try:
            number = operator.index(unit)
        except TypeError:
            raise ValueError(f"units has {unit!r}; {accepted}") from None
        if number < 0 or isinstance(unit, bool):
            raise ValueError(f"units has {unit!r}; {accepted}")
        numbers.add(number)
    return sorted(numbers)


class _Masked(nn.Module):
    """A network that runs with some units of one of its modules at zero."""

    def __init__(self, network: nn.Module, layer: str, units: Sequence[int]) -> None:
        super().__init__()
        self.network, self.layer, self.units = network, layer, list(units)
        self.fixed_batch = getattr(network, "fixed_batch", None)
        self.training = network.training

    def forward(self, images: Tensor) -> Any:
        # Looked up in each pass: a copy of this network must silence its own module.
        module = self.network.get_submodule(self.layer)
        silenced: list[bool] = []

        def silence(activation: Tensor) -> Tensor:
            silenced.append(True)
            return self._silenced(activation, images)

        with replacing(module, silence):
            output = self.network(images)
        if not silenced:
            raise CannotMaskError(
                f"layer {self.layer!r} did not run, or returned no tensor: nothing would be masked; name a layer that "
                "every image goes through (parts of TorchScript and of exported networks cannot be watched)"
            )
        return output

    def extra_repr(self) -> str:
        return f"units {self.units} of {self.layer} at zero"

    def _silenced(self, activation: Tensor, images: Tensor) -> Tensor:
        axis = unit_axis(activation, images)
        count = activation.shape[axis]
        if self.units and self.units[-1] >= count:
            raise CannotMaskError(f"units has {self.units[-1]}; {self.layer!r} has units 0 to {count - 1}")
        keep = torch.ones(count, dtype=activation.dtype, device=activation.device)
        keep[self.units] = 0
        return activation * keep.view([count if place == axis else 1 for place in range(activation.ndim)])
