"""Rounding followed backward: never less than what errors of the assumed size can do, and not much more."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.proofs.architectures import ARCHITECTURES, plain
from tests.proofs.test_bounds import bounds_of, random_boxes
from weakspot import certify_pixels
from weakspot.proofs.affine_forms import Form
from weakspot.proofs.affine_steps import BoundStep, ClampStep, LinearStep, MaxStep, NotSupportedError
from weakspot.proofs.backward_errors import _before_linear, _before_maximum, moved_by_rounding
from weakspot.proofs.margin_bounds import MarginBounds, Margins, _form_of
from weakspot.proofs.propagation import Propagation
from weakspot.proofs.rounding_errors import gamma


def propagation_of(name: str) -> tuple[MarginBounds, Propagation, Tensor]:
    network, images = ARCHITECTURES[name]()[:2]
    image = images[:1]
    bounds = bounds_of(network, image, 0, as_run=True)
    return bounds, bounds._propagation, image


def derivatives_of(bounds: MarginBounds) -> Tensor:
    """Derivatives of the margins with respect to the last slot."""
    classes = bounds._propagation.clean[bounds.network.logits].center[0].numel()
    eye = torch.eye(classes, dtype=torch.float64)
    return eye if bounds.network.last is not None else eye[0] - eye[1:]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_linear_step_is_transposed(name: str) -> None:
    _, propagation, _ = propagation_of(name)
    generator = torch.Generator().manual_seed(0)
    recorded = propagation._recorded
    for step in propagation.steps:
        if isinstance(step, LinearStep):
            slots = step.linear.inputs
            values = [
                torch.randn(propagation.clean[slot].center.shape, generator=generator, dtype=torch.float64)
                for slot in slots
            ]
            forward = step.linear.run(dict(zip(slots, values, strict=True)), 1, recorded)
            forward = forward[0] if step.linear.several else forward
            after = torch.randn(1, 2, *forward.shape[1:], generator=generator, dtype=torch.float64)
            before = _before_linear(step, (after, torch.zeros_like(after)), propagation.clean, recorded)
            expected = (after[0] * forward).flatten(1).sum(1)
            found = sum(
                (part[0][0] * value).flatten(1).sum(1) for part, value in zip(before, values, strict=True)
            )
            torch.testing.assert_close(found, expected)


def run_with_errors(propagation: Propagation, image: Tensor, errors: dict[int, Tensor]) -> dict[int, Tensor]:
    """All values of the network in float64, with errors added to the results of its steps, by slot."""
    values = {0: image}
    for step in propagation.steps:
        source = step.value
        given = [values[slot] for slot in source.inputs]
        if isinstance(step, LinearStep):
            result = source.run(dict(zip(source.inputs, given, strict=True)), 1, propagation._recorded)
            result = result[0] if source.several else result
        elif isinstance(step, ClampStep):
            result = given[0].clamp(step.low, step.high)
        else:
            result = given[0].unflatten(1, (-1, step.count)).amax(2)
        slot = source.outputs[0]
        values[slot] = result + errors[slot] if slot in errors else result
    return values


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_errors_at_every_step_move_margins_no_further(name: str, wide: bool) -> None:
    bounds, propagation, image = propagation_of(name)
    derivatives = derivatives_of(bounds)
    rows, columns, low, high = random_boxes(image, 12, seed=3)
    high = high if wide else low
    forms = propagation.run(_form_of(rows, columns, low, high), deep=False, keep=True)
    wholes = propagation.on_whole_maps(forms)
    margins = (bounds.network.logits, derivatives.expand(12, -1, -1))

    def rounding(step: BoundStep) -> Tensor | float:
        return propagation.own_rounding(step, wholes)

    moved = moved_by_rounding(propagation.steps, wholes, rounding, margins, propagation._recorded)
    assert moved.shape == (12, len(derivatives))
    shares = []
    for box in range(12):
        errors = {}
        for step in propagation.steps:
            size = rounding(step)
            if isinstance(size, Tensor):
                slot = step.value.outputs[0]
                errors[slot] = size[box : box + 1].expand(1, *propagation.clean[slot].center.shape[1:])
        for color in (low[box], high[box], (low[box] + high[box]) / 2):
            edited = image.double()
            edited[0, :, rows[box], columns[box]] = color
            for margin, derivative in enumerate(derivatives):

                def value_of(values: dict[int, Tensor], derivative: Tensor = derivative) -> Tensor:
                    return (values[bounds.network.logits].flatten() * derivative).sum()

                zeros = {slot: torch.zeros_like(size).requires_grad_() for slot, size in errors.items()}
                plain_value = value_of(run_with_errors(propagation, edited, zeros))
                slopes = torch.autograd.grad(plain_value, list(zeros.values()), allow_unused=True)
                worst = {
                    slot: 0.99 * size * (torch.zeros_like(size) if slope is None else slope.sign())
                    for (slot, size), slope in zip(errors.items(), slopes, strict=True)
                }
                change = float((value_of(run_with_errors(propagation, edited, worst)) - plain_value).detach())
                assert abs(change) <= float(moved[box, margin])
                shares.append(change / float(moved[box, margin]))
    if not wide:
        assert sum(shares) / len(shares) > 0.5  # not many times more than the worst errors do


def with_margin(margin: float) -> tuple[nn.Module, Tensor, int]:
    """A network whose image has this margin to one class, and far more to the others."""
    network = plain().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    image = torch.rand(1, 3, 12, 12, generator=generator)
    exact = bounds_of(network, image, 0, as_run=False).clean.lower[0]
    last = network[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.bias[2:] -= 30
        last.bias[1] += float(exact[0]) - margin
    return network, image, 0


def test_margins_that_forward_rounding_would_take_are_proven() -> None:
    network, image, label = with_margin(1.0)
    bounds = bounds_of(network, image, label, as_run=True)
    lost = float((bounds.clean.upper - bounds.clean.lower)[0, 0]) / 2
    for share, proven in ((0.75, True), (0.001, False)):
        network, image, label = with_margin(share * lost)
        bounds = bounds_of(network, image, label, as_run=True)
        assert bool(bounds.clean.bound > 0) == proven
        color = image[:, :, 3, 4].double()
        at_color = bounds.bounds(torch.tensor([3]), torch.tensor([4]), color, color)
        assert bool(at_color.bound > 0) == proven


def test_margins_of_a_network_without_a_last_matrix() -> None:
    bounds, propagation, _ = propagation_of("groups, pads, hardtanh, no linear layer")
    assert bounds.network.last is None
    wholes = propagation.on_whole_maps(propagation.clean)
    moved = moved_by_rounding(
        propagation.steps,
        wholes,
        lambda step: propagation.own_rounding(step, wholes),
        (bounds.network.logits, derivatives_of(bounds)[None]),
        propagation._recorded,
    )
    every = torch.ones_like(moved, dtype=torch.bool)
    found = bounds._moved_by_rounding(propagation.clean, torch.tensor([False]), every)
    torch.testing.assert_close(found, moved, rtol=1e-6, atol=0)
    some = every.clone()
    some[0, 1] = False
    found = bounds._moved_by_rounding(propagation.clean, torch.tensor([False]), some)
    assert (found[0] == torch.inf).tolist() == [False, True, False]


def test_each_box_has_its_own_margins_followed() -> None:
    bounds, propagation, image = propagation_of("convolutions and linear layers, normalized")
    forms = propagation.run(_form_of(*random_boxes(image, 3, seed=0)), deep=False, keep=True)
    follow = torch.tensor([[True, False, True, False], [False] * 3 + [True], [True] * 4])
    fine = torch.zeros(3, dtype=torch.bool)
    moved = bounds._moved_by_rounding(forms, fine, torch.ones_like(follow))
    found = bounds._moved_by_rounding(forms, fine, follow)
    torch.testing.assert_close(found, moved.masked_fill(~follow, torch.inf), rtol=1e-9, atol=0)


def test_where_float32_may_overflow_rounding_is_not_followed() -> None:
    network, image, label = with_margin(0.01)
    bounds = bounds_of(network, image, label, as_run=True)
    every = torch.ones(1, 4, dtype=torch.bool)
    for overflows in (False, True):
        moved = bounds._moved_by_rounding(bounds._propagation.clean, torch.tensor([overflows]), every)
        assert bool((moved == torch.inf).all()) == overflows


@pytest.mark.parametrize("deep", [False, True])
def test_bounds_of_a_box_do_not_depend_on_the_other_boxes(deep: bool) -> None:
    # Two classes are near: rounding decides one or the other, or both.
    network, image, label = with_margin(1.0)
    clean = bounds_of(network, image, label, as_run=True).clean
    lost, last = (clean.upper - clean.lower)[0] / 2, list(network.children())[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.bias[1] += 1 - 1.2 * float(lost[0])
        last.bias[2] += float(clean.lower[0, 1]) - 1.5 * float(lost[1])
    bounds = bounds_of(network, image, label, as_run=True)
    rows, columns = (torch.arange(60) // 12, torch.arange(60) % 12)
    own_colors = image[0, :, rows, columns].T.double()
    low, high = ((own_colors + 20 * sign * lost.max()).clamp(0, 1) for sign in (-1, 1))
    together = bounds.bounds(rows, columns, low, high, deep=deep)
    alone = [
        bounds.bounds(rows[one], columns[one], low[one], high[one], deep=deep)
        for one in torch.arange(60).split(1)
    ]
    assert 0 < int((together.bound > 0).sum()) < 60
    torch.testing.assert_close(together.lower, torch.cat([one.lower for one in alone]), rtol=0, atol=1e-9)
    torch.testing.assert_close(together.upper, torch.cat([one.upper for one in alone]), rtol=0, atol=1e-9)


def test_what_costs_too_much_or_cannot_help_is_not_followed() -> None:
    network, image, label = with_margin(0.01)
    bounds = bounds_of(network, image, label, as_run=True)
    below = -torch.ones(3, 4, dtype=torch.float64)
    margins = Margins(below, -below)
    exact = torch.full((3, 4), 2 * bounds._lost, dtype=torch.float64)
    exact[1] = bounds._lost / 101  # as if rounding took far more than the margin
    exact[2, 0] = -bounds._lost  # no proof even in real numbers
    follow = bounds._to_follow(margins, Margins(exact, exact))
    assert follow.tolist() == [[True] * 4, [False] * 4, [False] * 4]
    assert not bool(bounds._to_follow(margins, Margins(exact, exact), work=4 * bounds._values - 1).any())
    margins.lower[0, 1:] = 1.0  # one margin costs less than four
    follow = bounds._to_follow(margins, Margins(exact, exact), work=bounds._values)
    assert follow[0].tolist() == [True, False, False, False]


def test_bounds_in_the_wrong_order_prove_nothing() -> None:
    network, image, label = with_margin(1.0)
    bounds = bounds_of(network, image, label, as_run=True)
    form = bounds._propagation.clean[bounds.network.logits]
    broken = replace(form, radius=form.radius - 1)
    margins = bounds._margins({bounds.network.logits: broken})
    assert bool((margins.lower == -torch.inf).all())
    assert bool((margins.upper == torch.inf).all())


def test_the_bound_of_rounding_that_is_stated_is_that_of_the_nearest_class() -> None:
    network, image, label = with_margin(1e-5)
    clean = bounds_of(network, image, label, as_run=True).clean
    own_bound = float((clean.upper - clean.lower)[0, 0]) / 2
    assert float((clean.upper - clean.lower).amax()) > 2.2 * own_bound
    (reason,) = certify_pixels(network, image, torch.tensor([label]), colors=1e-6).unknown_because()
    assert reason.endswith(f"in float32: {own_bound:.3g}")


def test_long_sums_have_no_bounds_as_run() -> None:
    """A worst case of float32 rounding exists only for fewer than 2^24 products."""
    with pytest.raises(ValueError, match="terms must be below"):
        gamma(2**24, torch.float32)
    with pytest.raises(ValueError, match="terms must be below"):
        gamma(torch.tensor([2.0, 2.0**24]), torch.float32)

    class Mean(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            mean = images.mean((2, 3))
            return torch.cat([mean * 0.5 + 0.25, images[:, :, 0, 0], mean * 0.5], 1)

    image = torch.zeros(1, 1, 2100, 2100)
    bounds_of(Mean().eval(), image, 0, as_run=False)
    with pytest.raises(NotSupportedError, match="products is not supported"):
        bounds_of(Mean().eval(), image, 0, as_run=True)


def test_derivatives_of_a_maximum() -> None:
    lower = torch.tensor([[0.0, 0.5, -1.0, 2.0, 0.0, 0.9]]).double()
    form = Form(lower + 0.5, lower.new_zeros(1, 0, 6), torch.full_like(lower, 0.5), ())
    step = MaxStep(None, 3)  # type: ignore[arg-type]
    after = (torch.tensor([[[4.0, -2.0]]]).double(), torch.tensor([[[0.5, 0.0]]]).double())
    center, radius = _before_maximum(step, after, form)
    # The first two of the first three may be the largest; of the others the first is, for certain.
    assert (center - radius).flatten().tolist() == [-0.5, -0.5, 0, -2, 0, 0]
    assert (center + radius).flatten().tolist() == [4.5, 4.5, 0, -2, 0, 0]


def test_derivatives_pass_through_copies() -> None:
    class Copying(nn.Module):
        def __init__(self, copies: bool) -> None:
            super().__init__()
            self.body, self.copies = plain().eval(), copies

        def forward(self, images: Tensor) -> Tensor:
            maps = self.body[:4](images)
            logits: Tensor = self.body[4:](maps.detach().clone().contiguous() if self.copies else maps)
            return logits

    image = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    moved = []
    for copies in (False, True):
        torch.manual_seed(0)
        bounds = bounds_of(Copying(copies).eval(), image, 0, as_run=True)
        propagation = bounds._propagation
        wholes = propagation.on_whole_maps(propagation.clean)

        def rounding(
            step: BoundStep, wholes: dict[int, Form] = wholes, at: Propagation = propagation
        ) -> Tensor | float:
            return at.own_rounding(step, wholes)

        margins = (bounds.network.logits, derivatives_of(bounds)[None])
        moved.append(moved_by_rounding(propagation.steps, wholes, rounding, margins, propagation._recorded))
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-6, atol=0)


def gamma32(count: Tensor) -> Tensor:
    return count * 2.0**-24 / (1 - count * 2.0**-24)


def test_rounding_counts_products_of_values_other_than_zero() -> None:
    network, images = ARCHITECTURES["convolutions and linear layers, normalized"]()[:2]
    image = images[:1].clone()
    image[:, :, 4:] = 0.5
    propagation = bounds_of(network, image, 0, as_run=True)._propagation
    fewer = 0
    for step in propagation.steps:
        if not isinstance(step, LinearStep) or step.value.name not in {"convolution", "mm"}:
            continue
        form = propagation.clean[step.value.inputs[0]]
        factors = step.value.arguments[1]
        if step.value.name == "mm":
            given, factors = form.center.flatten(1)[:, :, None], factors.T
        else:
            _, _, _, stride, padding, dilation, *_ = step.value.arguments
            given = F.unfold(form.center, factors.shape[2:], dilation, padding, stride)  # (1, values, sites)
        factors = factors.flatten(1).abs()
        constant = torch.zeros(1) if step.constant is None else step.constant
        sums = factors @ given[0].abs() + constant.flatten()[:, None]
        count = (given[0] != 0).sum(0).double() + 1  # with the constant
        errors = propagation.own_rounding(step, propagation.clean)
        assert isinstance(errors, Tensor)
        errors = errors.view_as(sums)
        assert bool((errors >= gamma32(count) * sums).all())
        fewer += int((errors < 0.9 * gamma32(torch.tensor(float(len(given[0])))) * sums).sum())
    assert fewer  # there are sums with zeros


def test_values_that_move_are_never_counted_as_zero() -> None:
    zero = torch.zeros(1, 3, dtype=torch.float64)
    form = Form(zero, zero[:, None], zero, ((-1, 1),))
    assert not bool(form.nonzero.any())
    assert bool(replace(form, radius=zero + 1e-300).nonzero.all())
    assert bool(replace(form, generators=form.generators - 1e-300).nonzero.all())
    assert bool(replace(form, center=zero - 1e-300).nonzero.all())


def test_in_inference_mode() -> None:
    network, image, label = with_margin(0.01)
    with torch.no_grad():
        expected = certify_pixels(network, image, torch.tensor([label]), colors=2 / 255)
    with torch.inference_mode():
        found = certify_pixels(network, image, torch.tensor([label]), colors=2 / 255)
    assert bool((found.status == expected.status).all())
