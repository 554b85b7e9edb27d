"""Networks that run otherwise than their formula says: none of their pixels may be called proven wrongly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weakspot import certify_pixels
from weakspot.classifier import evaluating
from weakspot.proofs.affine_steps import NotSupportedError
from weakspot.proofs.margin_bounds import MarginBounds
from weakspot.proofs.network_steps import bound_network
from weakspot.proofs.pixel_proofs import check_trial


class Function(nn.Module):
    """A function as a network."""

    def __init__(self, function: Callable[[Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleDict(parts)

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def test_logits_rounded_to_bfloat16_have_no_bounds() -> None:
    weight = torch.zeros(3, 64)
    weight[1] = -0.058
    layer = linear(weight, torch.tensor([1.0, 1.06, -30.0]))
    images, label = torch.zeros(1, 1, 8, 8), torch.tensor([1])
    for types in ([torch.bfloat16], [torch.bfloat16, torch.float32], [torch.float16, torch.float64]):

        def rounded(images: Tensor, types: list[torch.dtype] = types) -> Tensor:
            logits: Tensor = layer(images.flatten(1))
            for kind in types:
                logits = logits.to(kind)
            return logits

        network = Function(rounded, layer=layer).eval()
        certificate = certify_pixels(network, images, label)
        assert not bool((certificate.status == 1).any())
        assert any("_to_copy" in reason for reason in certificate.unknown_because()) or bool(
            (certificate.status == -1).all()
        )


def bounds_as_run(network: nn.Module, images: Tensor, label: int) -> MarginBounds:
    with evaluating(network) as classifier, torch.no_grad():
        return MarginBounds(bound_network(classifier, images), images, label, as_run=True)


def test_logits_in_double_that_become_float32_are_rounded() -> None:
    # As float32, 1 + 2^-30 is 1: class 0 wins the tie by its index.
    def network(images: Tensor) -> Tensor:
        return F.pad(images.flatten(1).double(), (0, 1), value=1 + 2.0**-30).float()

    bounds = bounds_as_run(Function(network).eval(), torch.ones(1, 1, 1, 1), 1)
    assert float(bounds.clean.bound) <= 0


def overflowing() -> tuple[nn.Module, Tensor]:
    conv = nn.Conv2d(3, 1, 1)
    layer = linear(torch.tensor([[1e-36], [2e-36]]).expand(2, 16))
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([-1.02e38, 1.02e38, 1.02e38]).view(1, 3, 1, 1))
        conv.bias = nn.Parameter(torch.tensor([1.4e38]))
    network = Function(lambda x: layer(conv(x).relu().flatten(1)), conv=conv, layer=layer).eval()
    return network, torch.full((1, 3, 4, 4), 0.5)


def test_where_float32_may_overflow_nothing_is_proven() -> None:
    network, images = overflowing()
    certificate = certify_pixels(network, images, torch.tensor([1]))
    assert not (certificate.status == 1).any()
    # A corner of the colors was tried.
    assert [*certificate.unknown_because()] == ["the network returned NaN or infinity for a changed image"]
    assert float(bounds_as_run(network, images, 1).clean.bound) == -torch.inf


def test_logits_that_are_not_finite_fail_the_trial() -> None:
    def large(images: Tensor) -> Tensor:
        return (images.flatten(1) * 2.0**70 * 2.0**70) / 2.0**70

    network, images = Function(large).eval(), torch.zeros(1, 1, 2, 2)
    with evaluating(network) as classifier, torch.no_grad():
        bounds = MarginBounds(bound_network(classifier, images), images, 1, as_run=False)
        with pytest.raises(NotSupportedError, match="finite"):
            check_trial(bounds, classifier, images + 0.5, 1)


def scaled_many_times() -> tuple[nn.Module, Tensor, Tensor]:
    """Forty factors in float64 that float32 rounds up, and each product is rounded up too."""
    number = np.float32
    start = number(0.5 * (1 + 2048 * 2.0**-23))
    value, factors = start, []
    for _ in range(40):
        mantissa, _exponent = np.frexp(value)
        odd = round((2 * float(mantissa) - 1) * 2**23)
        above = 1 + -(-(2**22 + 1) // odd) * 2.0**-23
        factors.append(above - 0.49 * 2.0**-23)
        value = number(value * number(factors[-1]))
    true = float(start) * float(np.prod(np.array(factors)))
    limit = float(number(true * (1 + 60 * 2.0**-24)))

    def network(images: Tensor) -> Tensor:
        for factor in factors:
            images = images * factor
        return F.pad(images.flatten(1), (0, 1), value=limit)

    images = torch.full((1, 1, 2, 2), float(start) - 12 * 2.0**-24)
    edited = images.clone()
    edited[0, 0, 0, 0] = float(start)
    return Function(network).eval(), images, edited


def test_python_numbers_are_rounded_to_float32_before_they_multiply() -> None:
    network, images, edited = scaled_many_times()
    assert int(network(images).argmax(1)) == 4
    assert int(network(edited.expand(64, -1, -1, -1))[0].argmax()) != 4
    certificate = certify_pixels(network, images, torch.tensor([4]), colors=13 * 2.0**-24)
    assert int(certificate.status[0, 0, 0]) != 1


@pytest.mark.parametrize("how", ["clamp", "hardtanh", "pad"])
def test_limits_and_pads_are_rounded_to_float32(how: str) -> None:
    # In float32 .1 is above .1, so the clamped value ties with the padded one, and wins by its index.
    def network(images: Tensor) -> Tensor:
        flat = images.flatten(1)
        if how == "pad":
            return F.pad(F.pad(flat * 0, (0, 1), value=0.1), (0, 1), value=0.10000000149011612)
        flat = flat.clamp(max=0.1) if how == "clamp" else F.hardtanh(flat, -0.1, 0.1)
        return F.pad(flat, (0, 1), value=0.10000000149011612)

    images = torch.full((1, 1, 2, 2), 0.5)
    label = torch.tensor([5 if how == "pad" else 4])
    certificate = certify_pixels(Function(network).eval(), images, label, colors=0.2)
    assert not bool((certificate.status == 1).any())


class Cancelling(nn.Module):
    """A tent of height 1 at one gray level, after 1e7 is added and taken away: folded, it is rounded otherwise."""

    def __init__(self, scale: float, level: int) -> None:
        super().__init__()
        self.tent, self.mix, self.norm = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1)
        self.last = nn.Linear(16, 3)
        with torch.no_grad():
            self.tent.weight.fill_(255.0)
            self.tent.bias = nn.Parameter(torch.tensor([1.0 - level, -1.0 * level, -1.0 - level]))
            self.mix.weight.copy_(torch.tensor([1.0, -2.0, 1.0]).view(1, 3, 1, 1) * 1e7)
            self.mix.bias = nn.Parameter(torch.zeros(1))
            self.norm.weight.fill_(scale)
            self.norm.bias.fill_(0.6)
            self.last.weight.zero_()
            self.last.weight[1] = 1.0
            self.last.bias.copy_(torch.tensor([0.4, 0.0, -1.0]))

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.norm(self.mix(F.relu(self.tent(images)))))
        logits: Tensor = self.last((maps - 3 * F.relu(maps - 1)).flatten(1))
        return logits


def test_enumerated_pixels_are_those_of_the_network_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    images, wrong = torch.zeros(1, 1, 4, 4), 0
    for trial in range(24):
        level = 100 + trial
        network = Cancelling(float(0.5 + torch.rand(1, generator=generator)), level).eval()
        every = torch.zeros(256, 1, 4, 4)
        every[:, 0, 1, 1] = torch.arange(256).float() / 255
        with torch.no_grad():
            tent = network.mix(F.relu(network.tent(every[level : level + 1].expand(64, -1, -1, -1))))
            network.norm.load_state_dict({"running_mean": tent[0, :, 1, 1]}, strict=False)
            classes = torch.cat([network(part).argmax(1) for part in every.split(64)])
        region = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
        region[0, 0, 1, 1] = True
        certificate = certify_pixels(network, images, torch.tensor([0]), region=region, colors="8bit")
        assert int(certificate.status[0, 1, 1]) == (1 if bool((classes == 0).all()) else -1)
        wrong += int((classes != 0).any())
    assert wrong  # the test has cases where the decision changes


def test_indices_of_max_pooling_have_no_bounds() -> None:
    layer = linear(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))

    def network(images: Tensor) -> Tensor:
        logits: Tensor = layer(F.max_pool2d(images, 2, return_indices=True)[1].float().flatten(1))
        return logits

    images = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    certificate = certify_pixels(Function(network, layer=layer).eval(), images, torch.tensor([0]))
    assert not bool((certificate.status == 1).any())


def test_padded_max_pooling_of_values_below_any_usual_number() -> None:
    def network(images: Tensor) -> Tensor:
        return F.max_pool2d(images * -1e30 - 1.1e30, 3, 1, 1).flatten(1)

    images = torch.tensor([[[[0.0, 0.0, 0.0, 0.1]]]])
    expected = network(images)[0, 0] - network(images)[0, 3]
    with evaluating(Function(network).eval()) as classifier, torch.no_grad():
        bounds = MarginBounds(bound_network(classifier, images), images, 0, as_run=False)
    assert float(expected) == 0
    assert float(bounds.clean.lower[0, 2]) <= 0 <= float(bounds.clean.upper[0, 2])
