"""Masking: a network with some of a layer's units silenced (after Xu et al. 2019, arXiv 1904.02057)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from weakspot.attribution.layout import unit_axis
from weakspot.attribution.replacing import replacing
from weakspot.checks import closest
from weakspot.classifier import Classifier, as_classifier, evaluating


def mask_units(model: nn.Module, layer: str, units: Sequence[int]) -> Classifier:
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
    wanted = _numbers(units)
    classifier = as_classifier(model)
    modules = dict(classifier.network.named_modules())
    name = layer if layer in modules else str(layer).removeprefix("network.")
    if not name or name not in modules:
        raise ValueError(
            f"layer is {layer!r}, which {classifier.name} has not; {closest(str(layer), filter(None, modules))}"
        )
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
    # Images of another size than the network's own say nothing of its units.
    with suppress(RuntimeError), evaluating(masked), torch.no_grad():
        masked(masked.filled(torch.zeros(1, masked.channels, *masked.input_size, device=masked.mean.device)))
    return masked


def _numbers(units: Sequence[int]) -> list[int]:
    numbers = [int(unit) for unit in units]
    if any(unit < 0 for unit in numbers):
        raise ValueError(f"units has {min(numbers)}; accepted are numbers from 0")
    return sorted(set(numbers))


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
        with replacing(module, lambda tensor: self._silenced(tensor, images)):
            return self.network(images)

    def _silenced(self, activation: Tensor, images: Tensor) -> Tensor:
        axis = unit_axis(activation, images)
        count = activation.shape[axis]
        if self.units and self.units[-1] >= count:
            raise ValueError(f"units has {self.units[-1]}; {self.layer!r} has units 0 to {count - 1}")
        keep = torch.ones(count, dtype=activation.dtype, device=activation.device)
        keep[self.units] = 0
        return activation * keep.view([count if place == axis else 1 for place in range(activation.ndim)])
