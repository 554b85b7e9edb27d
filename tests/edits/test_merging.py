"""Convolutions that do their padding and their activation themselves, against the layers one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from weakspot import Classifier, LocalEdits
from weakspot.classifier import evaluating
from weakspot.edits import Edits, activations, engine, prepare, work_saved
from weakspot.edits.activations import bounds
from weakspot.edits.recording import Recording, Slot, Step, record
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
    monkeypatch.setattr(activations, "FUSED", None)
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


def _merged(model: nn.Module, image: Tensor) -> Sequence[Step]:
    return activations.merged(record(Classifier(model), image)).steps


@pytest.mark.skipif(activations.FUSED is None, reason="this torch has no oneDNN")
@pytest.mark.parametrize(("dtype", "used"), [(torch.float32, True), (torch.float64, False)], ids=str)
def test_onednn_does_what_it_can(dtype: torch.dtype, used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, own = [], activations.FUSED
    assert own is not None

    def watched(*given: Any) -> Tensor:
        calls.append(given[7])
        found: Tensor = own(*given)
        return found

    monkeypatch.setattr(activations, "FUSED", watched)
    model = Padded((1, 2, 0, 3), "relu6", kernel_size=3, groups=6).eval().to(dtype)
    assert difference(model, torch.rand(1, 3, 9, 9, dtype=dtype)) < 1e-5
    assert set(calls) == ({"hardtanh"} if used else set())


def test_of_activations_in_a_row_the_first_is_merged() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Hardtanh(0, 0.1), nn.Flatten(), nn.Linear(4 * 36, 3)
    ).eval()
    names = [step.name for step in _merged(model, torch.rand(1, 3, 8, 8))]
    assert "relu" not in names
    assert "hardtanh" in names
    assert difference(model, torch.rand(1, 3, 8, 8)) < 1e-5


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
    image = torch.rand(1, 3, 8, 8)
    recording = record(Classifier(Answer().eval()), image)
    made = next(step.outputs[0] for step in recording.steps if step.name == "convolution")
    relu = replace(
        recording.steps[-1], name="relu", call=torch.ops.aten.relu.default, arguments=(Slot(made),), keywords={},
        inputs=(made,), outputs=(10_000,),
    )  # fmt: skip
    kept = [step for step in recording.steps if made not in step.inputs]
    told = activations.merged(Recording([*kept, relu], made, recording.count))
    assert any(made in step.outputs for step in told.steps)


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


def test_limits_in_the_wrong_order() -> None:
    """torch makes everything the upper limit; oneDNN refuses."""

    class Crossed(Padded):
        def forward(self, images: Tensor) -> Tensor:
            maps = self.second(self.first(images))
            logits: Tensor = self.end((maps.clamp(0.3, -0.3) + self.first(images).mean()).flatten(2).amax(2))
            return logits

    assert difference(Crossed((0, 0, 0, 0), "none", kernel_size=3).eval(), torch.rand(1, 3, 9, 9)) < 1e-5


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "hardswish", "gelu"])
def test_an_edit_that_breaks_the_network_is_not_hidden(activation: str) -> None:
    """oneDNN's ReLU makes 0 of NaN; where NaN cannot be ruled out the network's own runs."""

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


def test_work_is_that_of_the_unmerged_network() -> None:
    """Zeros at the edge of a kernel are no work; activations that convolutions do hide none of it."""
    model = Padded((0, 1, 0, 1), "relu6", kernel_size=3, stride=2, groups=6).eval()
    plain = Padded((0, 1, 0, 1), "gelu", kernel_size=3, stride=2, groups=6).eval()  # gelu is not merged
    image = torch.rand(1, 3, 40, 40)
    recordings = [record(Classifier(one), image) for one in (model, plain)]
    saved = [work_saved(activations.merged(recording), image) for recording in recordings]
    assert saved[0] == saved[1] == work_saved(recordings[0], image)
    assert saved[0] > 50


@given(
    seed=st.integers(0, 10_000),
    layers=st.lists(
        st.sampled_from(
            ["conv", "wide", "norm", "relu", "relu6", "silu", "pool", "pad", "double", "minus", "tanh"]
        ),
        min_size=1,
        max_size=8,
    ),
)
@settings(max_examples=60, deadline=None)
def test_no_value_is_larger_than_its_bound(seed: int, layers: list[str]) -> None:
    torch.manual_seed(seed)
    kinds: dict[str, Callable[[], nn.Module]] = {
        "conv": lambda: nn.Conv2d(4, 4, 3, padding=1), "wide": lambda: nn.Conv2d(4, 4, 5, padding=2, bias=False),
        "norm": lambda: nn.BatchNorm2d(4), "relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU,
        "pool": lambda: nn.AvgPool2d(3, 1, 1), "pad": lambda: nn.ConstantPad2d(1, 7.0), "tanh": nn.Tanh,
        "double": lambda: Lambda(lambda maps: maps + maps), "minus": lambda: Lambda(lambda maps: 0.5 - maps),
    }  # fmt: skip
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *[kinds[layer]() for layer in layers], nn.Flatten()).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) * 4 - (0 if tensor.ndim == 0 else 2))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.abs_().add_(0.01)  # type: ignore[union-attr]
    images = torch.rand(2, 3, 8, 8).round()
    recording = record(Classifier(model), images[:1])
    known = bounds(recording.steps)
    values: dict[int, Any] = {0: images}
    for step in recording.steps:
        result = step.run(values, 2, recording.count)
        for slot, value in zip(step.outputs, result if step.several else [result], strict=True):
            values[slot] = value
            if slot == step.outputs[0]:
                assert float(value.abs().max()) <= known[slot] * (1 + 1e-5)
    assert known[recording.logits] < float("inf")


class Lambda(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, maps: Tensor) -> Tensor:
        return self.call(maps)


@pytest.mark.parametrize("weight", [1e30, float("nan")])
def test_what_may_overflow_or_is_none_has_no_bound(weight: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten()).eval()
    with torch.no_grad():
        model[2].weight.fill_(weight)  # type: ignore[operator]
        model[0].weight.fill_(1e10)  # type: ignore[operator]
    recording = record(Classifier(model), torch.rand(1, 3, 8, 8))
    assert bounds(recording.steps)[recording.logits] == float("inf")
