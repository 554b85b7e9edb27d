"""Convolutions that do their padding and their activation themselves, against the layers one after the other."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from weakspot import Classifier
from weakspot.classifier import evaluating
from weakspot.edits import Edits, engine, merging, prepare
from weakspot.edits.recording import Step, record

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda maps: maps,
    "relu": F.relu,
    "relu in place": lambda maps: F.relu(maps, inplace=True),
    "relu6": F.relu6,
    "clamp": lambda maps: maps.clamp(-0.1, 0.2),
    "clamp above": lambda maps: maps.clamp(max=0.2),
    "hardtanh": F.hardtanh,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}


class Padded(nn.Module):
    """A convolution whose maps are padded before it, an activation behind it, and a linear layer."""

    def __init__(self, widths: tuple[int, int, int, int], activation: str, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.widths, self.activation = widths, ACTIVATIONS[activation]
        self.first = nn.Conv2d(3, 6, 1)
        self.second = nn.Conv2d(6, 12, **options)  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.3)
        self.end = nn.Linear(12, 4)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.activation(self.second(F.pad(self.first(images), self.widths)))
        logits: Tensor = self.end(maps.flatten(2).amax(2))
        return logits


def difference(model: nn.Module, image: Tensor, size: int = 1) -> float:
    """Of the logits by windows and by the network, over their range, at every place."""
    down, along = image.shape[2] - size + 1, image.shape[3] - size + 1
    places = torch.arange(down * along)
    tops, lefts = places // along, places % along
    patches = torch.rand(len(places), image.shape[1], size, size, generator=torch.Generator().manual_seed(1))
    patches = patches.to(image.dtype)
    edited = image.expand(len(places), -1, -1, -1).clone()
    for number, (top, left) in enumerate(zip(tops.tolist(), lefts.tolist(), strict=True)):
        edited[number, :, top : top + size, left : left + size] = patches[number]
    with evaluating(model) as classifier, torch.no_grad():
        prepared = prepare(classifier, image)
        assert prepared.recording is not None, prepared.reason
        edits = Edits(classifier, image, prepared, windows=True)
        found = edits.logits(torch.zeros_like(tops), tops, lefts, patches)
        expected = classifier(edited)
    return float((found - expected).abs().max() / (expected.max() - expected.min()))


@given(
    widths=st.tuples(*[st.integers(0, 3)] * 4),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 3),
    padding=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 6]),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    size=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_any_padding_and_activation(
    widths: tuple[int, int, int, int],
    kernel: tuple[int, int],
    stride: int,
    padding: tuple[int, int],
    dilation: int,
    groups: int,
    activation: str,
    size: int,
) -> None:
    model = Padded(
        widths,
        activation,
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    ).eval()
    image = torch.rand(1, 3, 9, 11, generator=torch.Generator().manual_seed(0))
    assert difference(model, image, size) < 1e-5


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_whatever_the_number_type(activation: str, dtype: torch.dtype) -> None:
    model = Padded((1, 2, 0, 3), activation, kernel_size=3, groups=6).eval().to(dtype)
    assert difference(model, torch.rand(1, 3, 9, 9, dtype=dtype)) < 1e-5


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_without_onednn(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "FUSED", None)
    model = Padded((1, 2, 0, 3), activation, kernel_size=3, groups=6).eval()
    assert difference(model, torch.rand(1, 3, 9, 9)) < 1e-5


def test_what_is_merged() -> None:
    """One step for padding, convolution and activation; what others read too stays a step of its own."""
    alone = Padded((0, 1, 0, 1), "relu6", kernel_size=3, stride=2, groups=6).eval()
    image = torch.rand(1, 3, 8, 8)
    names = [step.name for step in _merged(alone, image)]
    assert names.count("convolution") == 2
    assert not {"constant_pad_nd", "hardtanh"} & set(names)

    class Twice(Padded):
        def forward(self, images: Tensor) -> Tensor:
            maps = F.pad(self.first(images), self.widths)
            found = self.second(maps)
            return self.end((F.relu(found) + found).mean((2, 3)) + maps.mean())  # type: ignore[no-any-return]

    names = [step.name for step in _merged(Twice((1, 1, 1, 1), "none", kernel_size=3).eval(), image)]
    assert {"constant_pad_nd", "relu"} <= set(names)


def _merged(model: nn.Module, image: Tensor) -> list[Step]:
    recording = record(Classifier(model), image)
    return merging.merged(recording.steps, recording.logits)


def test_of_activations_in_a_row_the_first_is_merged() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Hardtanh(0, 0.1), nn.Flatten(), nn.Linear(4 * 36, 3)
    ).eval()
    names = [step.name for step in _merged(model, torch.rand(1, 3, 8, 8))]
    assert "relu" not in names
    assert "hardtanh" in names
    assert difference(model, torch.rand(1, 3, 8, 8)) < 1e-5


def test_logits_may_be_an_activation_of_a_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 8), nn.ReLU(), nn.Flatten(1)).eval()
    assert difference(model, torch.rand(1, 3, 8, 8)) < 1e-5


@pytest.mark.parametrize("limit", [1, 20_000, 2**40])
def test_how_many_whole_maps_at_once_changes_no_result(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = [3, 16, 16, 16]
    layers = [
        layer for given, made in pairwise(widths) for layer in (nn.Conv2d(given, made, 5, 1, 2), nn.ReLU())
    ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()
    monkeypatch.setattr(engine, "LARGEST", limit)
    assert difference(model, torch.rand(1, 3, 12, 12)) < 1e-5
