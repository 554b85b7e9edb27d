"""Recorded steps rewritten to make fewer passes over memory, against the layers one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from weakspot import Classifier, LocalEdits
from weakspot.classifier import evaluating
from weakspot.edits import Edits, engine, prepare, work_saved
from weakspot.edits.recording import record
from weakspot.edits.steps import Step, in_place, with_padding_in_convolutions
from weakspot.edits.windows import Map, Windows
from weakspot.edits.windows import whole as made_whole

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
    dtype=st.sampled_from([torch.float32, torch.float64]),
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
    dtype: torch.dtype,
) -> None:
    model = Padded(
        widths,
        activation,
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
    model = model.eval().to(dtype)
    image = torch.rand(1, 3, 9, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert difference(model, image, size) < 1e-5


def test_padding_that_only_a_convolution_reads_is_done_by_it() -> None:
    alone = Padded((0, 1, 0, 1), "relu6", kernel_size=3, stride=2, groups=6).eval()
    image = torch.rand(1, 3, 8, 8)
    names = [step.name for step in prepared_steps(alone, image)]
    assert names.count("convolution") == 2
    assert "constant_pad_nd" not in names

    class Twice(Padded):
        def forward(self, images: Tensor) -> Tensor:
            maps = F.pad(self.first(images), self.widths)
            found = self.second(maps)
            return self.end((F.relu(found) + found).mean((2, 3)) + maps.mean())  # type: ignore[no-any-return]

    names = [step.name for step in prepared_steps(Twice((1, 1, 1, 1), "none", kernel_size=3).eval(), image)]
    assert "constant_pad_nd" in names


def prepared_steps(model: nn.Module, image: Tensor) -> Sequence[Step]:
    return with_padding_in_convolutions(record(Classifier(model), image)).steps


def test_an_activation_overwrites_only_what_nothing_else_reads() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, images: Tensor) -> Tensor:
            alone, shared = self.first(images), self.second(images)
            logits: Tensor = (F.relu(alone) + F.relu(shared) + shared).mean((2, 3))
            return logits

    model, image = Branching().eval(), torch.rand(1, 3, 9, 9)
    overloads = [getattr(step.call, "__name__", "") for step in in_place(prepared_steps(model, image))]
    assert (overloads.count("relu_.default"), overloads.count("relu.default")) == (1, 1)
    assert difference(model, image) < 1e-5


def test_a_convolution_that_is_the_answer_keeps_its_slot() -> None:
    """Its activation goes nowhere: the logits are what the convolution made."""

    class Answer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv2d(3, 5, 8)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.last(images)
            F.relu(logits)
            return logits.flatten(1)

    assert difference(Answer().eval(), torch.rand(1, 3, 8, 8)) < 1e-5


@pytest.mark.parametrize(
    "pad",
    [
        lambda maps: F.pad(maps, (1, 2, 0, 1), value=0.5),
        lambda maps: F.pad(maps, (-1, 2, 1, -2)),
        lambda maps: F.pad(maps, (1, 1, 1, 1, 0, 1))[:, :6],
        lambda maps: F.pad(maps, (2, 1, 1, 2), mode="reflect"),
    ],
    ids=["of a number", "cut", "of channels", "reflected"],
)
def test_padding_that_is_not_of_zeros_around_maps(pad: Callable[[Tensor], Tensor]) -> None:
    class Other(Padded):
        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.end(F.relu(self.second(pad(self.first(images)))).flatten(2).amax(2))
            return logits

    model = Other((0, 0, 0, 0), "none", kernel_size=3, groups=6).eval()
    assert difference(model, torch.rand(1, 3, 9, 9)) < 1e-5


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "hardswish", "gelu"])
def test_an_edit_that_breaks_the_network_is_not_hidden(activation: str) -> None:
    """Some fused kernels return 0 for the ReLU of NaN."""

    class Band(Padded):
        def forward(self, images: Tensor) -> Tensor:
            odd = torch.sqrt((images - 0.37).abs() - 0.0004)  # of pixels near .37 only
            maps = self.activation(self.second(self.first(odd)))
            logits: Tensor = self.end(maps.mean((2, 3)))
            return logits

    model = Band((0, 0, 0, 0), activation, kernel_size=3).eval()
    edits = LocalEdits(model, torch.full((3, 12, 12), 0.9))
    places = torch.arange(8)
    with pytest.raises(ValueError, match=r"NaN|finite"):
        edits.logits(places, places, torch.full((8, 3, 2, 2), 0.37))
    assert edits.reason == ""


def test_a_pointwise_convolution_over_another_axis_than_channels() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.mixed, self.end = (
                nn.Conv2d(3, 6, 3, padding=1),
                nn.Conv2d(11, 11, 1),
                nn.Linear(6, 4),
            )

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.end(self.mixed(self.first(images).permute(0, 2, 3, 1)).mean((1, 2)))
            return logits

    assert difference(Rows().eval(), torch.rand(1, 3, 11, 9)) < 1e-5


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_whose_weight_comes_from_the_image(kernel: int) -> None:
    class Template(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weights = nn.Conv2d(3, 6, 3), nn.Linear(6, 24 * kernel**2)
            self.template = nn.Parameter(torch.rand(1, 6, 5, 5))

        def forward(self, images: Tensor) -> Tensor:
            weight = self.weights(self.first(images).mean((2, 3))).view(-1, 6, kernel, kernel)
            return F.conv2d(self.template, weight).view(len(images), 4, -1).mean(2)

    assert difference(Template().eval(), torch.rand(1, 3, 11, 9)) < 1e-5


@pytest.mark.parametrize("limit", [1, 20_000, 2**40])
def test_how_many_whole_maps_at_once(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as fit, four at least; the logits are the same."""
    widths = [3, 16, 16, 16]
    layers = [
        layer for given, made in pairwise(widths) for layer in (nn.Conv2d(given, made, 5, 1, 2), nn.ReLU())
    ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()
    monkeypatch.setattr(engine, "LARGEST", limit)
    batches = []

    def whole(windows: Windows, clean: Map, owners: Tensor) -> Tensor:
        batches.append(len(owners))
        return made_whole(windows, clean, owners)

    monkeypatch.setattr(engine, "whole", whole)
    assert difference(model, torch.rand(1, 3, 12, 12)) < 1e-5
    of_one = 16 * 12 * 12 * 4  # bytes of the largest map
    assert max(batches) <= max(4, limit // of_one)
    assert (max(batches) > 4) == (limit > 4 * of_one)


def test_zeros_at_the_edge_of_a_grown_kernel_are_not_counted_as_work() -> None:
    model = Padded((0, 1, 0, 1), "relu6", kernel_size=3, stride=2, groups=6).eval()
    image = torch.rand(1, 3, 40, 40)
    recording = record(Classifier(model), image)
    saved = work_saved(with_padding_in_convolutions(recording), image)
    assert saved == work_saved(recording, image)
    assert saved > 50
