"""Bounds of margins: never violated, exact where the network is linear, and tight at single colors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.networks import LinearNetwork, Made, Wrapped, doubled
from tests.proofs.architectures import ARCHITECTURES
from weakspot import certify_pixels
from weakspot.classifier import evaluating
from weakspot.proofs import propagation
from weakspot.proofs.affine_forms import Form, clamped, largest, point, written_out
from weakspot.proofs.affine_steps import NotSupportedError
from weakspot.proofs.margin_bounds import MarginBounds, Margins
from weakspot.proofs.network_steps import bound_network
from weakspot.proofs.pixel_proofs import check_trial

PROBES = 240


def bounds_of(network: nn.Module, image: Tensor, label: int, *, as_run: bool) -> MarginBounds:
    with evaluating(network) as classifier, torch.no_grad():
        bounds = MarginBounds(bound_network(classifier, image), image, label, as_run=as_run)
        check_trial(bounds, classifier, image, label)
    return bounds


def random_boxes(image: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, columns, and boxes of colors of all widths, some of them a single color, on float32 numbers."""
    channels, height, width = image.shape[1:]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(height, (count,), generator=generator)
    columns = torch.randint(width, (count,), generator=generator)
    ends = torch.rand(2, count, channels, generator=generator)
    widths = torch.rand(count, 1, generator=generator) ** 3 * (
        torch.rand(count, 1, generator=generator) > 0.1
    )
    low = ends[0] * (1 - widths)
    high = torch.maximum(low, (low + widths * (0.5 + ends[1] / 2)).clamp(max=1))
    return rows, columns, low.double(), high.double()


def margins_of(
    network: nn.Module, image: Tensor, label: int, rows: Tensor, columns: Tensor, colors: Tensor
) -> Tensor:
    """(M, K - 1) margins of the network itself in its own precision, in batches."""
    edited = image.repeat(len(rows), 1, 1, 1)
    edited[torch.arange(len(rows)), :, rows, columns] = colors.to(image)
    with torch.no_grad():
        outputs = [network(batch) for batch in edited.split(64)]
    logits = torch.cat([one[0] if isinstance(one, tuple) else one for one in outputs]).double()
    others = [k for k in range(logits.shape[1]) if k != label]
    return logits[:, label : label + 1] - logits[:, others]


def probes(low: Tensor, high: Tensor, seed: int) -> Tensor:
    """(4, M, C) colors in boxes: two at random, both ends; rounded to float32 inside the box."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.rand(4, *low.shape, generator=generator).double()
    at[2], at[3] = at[2].round(), 1 - at[2].round()
    colors = (low + at * (high - low)).float()
    return torch.minimum(torch.maximum(colors, low.float()), high.float())


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("as_run", [False, True])
@pytest.mark.parametrize("make", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_no_color_of_a_box_leaves_its_bounds(make: Callable[[], Made], as_run: bool, deep: bool) -> None:
    made = make()
    network, images = made if as_run else doubled(made)
    image = images[:1]
    bounds = bounds_of(network, image.float(), 1, as_run=as_run)
    rows, columns, low, high = random_boxes(image, PROBES, 3)
    parts = torch.arange(PROBES).split(40)
    results = [bounds.bounds(rows[p], columns[p], low[p], high[p], deep=deep) for p in parts]
    lower, upper = (torch.cat([getattr(one, end) for one in results]) for end in ("lower", "upper"))
    # In float64 the network itself is off by less than this.
    slack = 0.0 if as_run else 1e-13
    image = image.float().to(image)
    for colors in probes(low, high, 4):
        margins = margins_of(network, image, 1, rows, columns, colors)
        assert bool((margins >= lower - slack).all())
        assert bool((margins <= upper + slack).all())


@pytest.mark.parametrize("make", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_bounds_at_one_color_are_the_margin_and_rounding(make: Callable[[], Made]) -> None:
    network, images = doubled(make())
    image = images[:1].float()
    rows, columns, low, _ = random_boxes(image, 20, 5)
    exact = bounds_of(network, image, 0, as_run=False).bounds(rows, columns, low, low)
    margins = margins_of(network, image.double(), 0, rows, columns, low)
    assert float((exact.upper - exact.lower).max()) < 1e-9
    torch.testing.assert_close((exact.upper + exact.lower) / 2, margins, rtol=0, atol=1e-9)
    as_run = bounds_of(network, image, 0, as_run=True).bounds(rows, columns, low, low)
    width = as_run.upper - as_run.lower
    assert bool((as_run.lower < exact.lower).all())
    assert 1e-8 < float(width.max()) < 0.02  # rounding of float32, and no more


@pytest.mark.parametrize("make", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_windows_and_fresh_generators_change_no_bound(
    make: Callable[[], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, images = make()
    boxes = random_boxes(images[:1], 40, 9)
    sparse = bounds_of(network, images[:1], 1, as_run=False).bounds(*boxes, deep=True)
    monkeypatch.setattr(propagation, "ROOM", 0.0)
    monkeypatch.setattr(propagation, "takes_fresh", lambda _: False)
    dense = bounds_of(network, images[:1], 1, as_run=False).bounds(*boxes, deep=True)
    torch.testing.assert_close(sparse.lower, dense.lower, rtol=0, atol=1e-9)
    torch.testing.assert_close(sparse.upper, dense.upper, rtol=0, atol=1e-9)


def test_bounds_of_a_linear_network_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, 4, generator=generator)
    linear = nn.Linear(60, 2, bias=False)
    network = nn.Sequential(nn.Flatten(), linear).eval()
    with torch.no_grad():
        linear.weight.copy_(torch.stack([weight.flatten(), -weight.flatten()]))
    image = torch.rand(1, 3, 5, 4, generator=generator)
    rows, columns, low, high = random_boxes(image, 50, 1)
    for deep in (False, True):
        margins = bounds_of(network, image, 0, as_run=False).bounds(rows, columns, low, high, deep=deep)
        own = image.double()[0, :, rows, columns].T
        factors = 2 * weight.double()[:, rows, columns].T
        fixed = 2 * (weight.double() * image[0].double()).sum() - (factors * own).sum(1)
        expected = fixed + (factors * torch.where(factors > 0, low, high)).sum(1)
        torch.testing.assert_close(margins.lower[:, 0], expected, rtol=0, atol=1e-11)
        assert bool((margins.lower[:, 0] <= expected).all())


@pytest.mark.parametrize("make", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_generators_prove_what_intervals_prove(make: Callable[[], Made]) -> None:
    network, images = make()
    label = int(margins_label(network, images[:1]))
    bounds = bounds_of(network, images[:1], label, as_run=True)
    rows, columns, low, high = random_boxes(images[:1], PROBES, 7)
    shared, deep = (bounds.bounds(rows, columns, low, high, deep=deep).lower for deep in (False, True))
    intervals = by_intervals(bounds, rows, columns, low, high)
    assert int((shared > 0).sum()) >= int((intervals > 0).sum())
    assert int((deep > 0).sum()) >= int((shared > 0).sum())
    wide = (high - low).amax(1) > 0.2
    assert float((shared - intervals)[wide].mean()) > 0
    assert float((deep - shared)[wide].mean()) >= -1e-12


def margins_label(network: nn.Module, image: Tensor) -> Tensor:
    with torch.no_grad():
        output = network(image)
    logits: Tensor = output[0] if isinstance(output, tuple) else output
    return logits.argmax(1)


def by_intervals(bounds: MarginBounds, rows: Tensor, columns: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Lower bounds by intervals: the same steps with the color in the radius instead of generators."""
    count, channels = low.shape
    shape = (count, 1, 1, channels)
    center, reach = ((low + high) / 2).view(shape), ((high - low) / 2 * (1 + 2**-50)).view(shape)
    form = Form(center, center.new_zeros(count, 0, *shape[1:]), reach, (), rows, columns)
    margins: Margins = bounds._margins(bounds._propagation.run(form, deep=False))
    return margins.lower


def form_of(center: Tensor, generators: Tensor, radius: Tensor) -> Form:
    return Form(center, generators, radius, ((-1, generators.shape[1]),))


@pytest.mark.parametrize("step", [None, 5])
@pytest.mark.parametrize("limits", [(0.0, torch.inf), (0.0, 6.0), (-0.5, 0.5), (-torch.inf, 0.2)])
def test_clamped_forms_hold_every_value(limits: tuple[float, float], step: int | None) -> None:
    generator = torch.Generator().manual_seed(2)
    form = form_of(
        3 * torch.randn(50, 4, generator=generator).double(),
        torch.randn(50, 3, 4, generator=generator).double(),
        torch.rand(50, 4, generator=generator).double(),
    )
    result = written_out(clamped(form, *limits, step))
    for seed in range(30):
        generator.manual_seed(seed)
        signs = 2 * torch.rand(50, 3, 1, generator=generator).double() - 1
        offset = (2 * torch.rand(50, 4, generator=generator).double() - 1) * form.radius
        values = (form.center + (form.generators * signs).sum(1) + offset).clamp(*limits)
        affine = result.center + (result.generators[:, :3] * signs).sum(1)
        fresh = result.generators[:, 3:].abs().sum(1)
        assert bool(((values - affine).abs() <= result.radius + fresh + 1e-12).all())


def test_the_largest_of_forms_holds_every_value() -> None:
    generator = torch.Generator().manual_seed(3)
    form = form_of(
        torch.randn(40, 6, generator=generator).double(),
        torch.randn(40, 2, 6, generator=generator).double(),
        0.2 * torch.rand(40, 6, generator=generator).double(),
    )
    result = largest(form, 3, 1)
    for seed in range(30):
        generator.manual_seed(seed)
        signs = 2 * torch.rand(40, 2, 1, generator=generator).double() - 1
        offset = (2 * torch.rand(40, 6, generator=generator).double() - 1) * form.radius
        values = (form.center + (form.generators * signs).sum(1) + offset).unflatten(1, (2, 3)).amax(2)
        affine = result.center + (result.generators * signs).sum(1)
        assert bool(((values - affine).abs() <= result.radius + 1e-12).all())
    exact = largest(point(torch.tensor([[1.0, 3.0, 2.0]]).double()), 3, 1)
    assert float(exact.center) == 3.0
    assert float(exact.radius) == 0.0


UNSUPPORTED: dict[str, Callable[[], nn.Module]] = {
    "gelu": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(64, 2)),
    "softmax": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Softmax(1), nn.Linear(4, 2)),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(1, 2, 3), nn.Flatten(), nn.Linear(128, 2)),
    "ceil_mode": lambda: nn.Sequential(nn.MaxPool2d(4, ceil_mode=True), nn.Flatten(), nn.Linear(4, 2)),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_layers_are_named(name: str) -> None:
    network = UNSUPPORTED[name]().eval()
    with pytest.raises(NotSupportedError, match=name if name != "transposed" else "convolution"):
        bounds_of(network, torch.rand(1, 1, 6, 6), 0, as_run=True)


def test_a_network_that_mixes_images_is_not_bounded() -> None:
    class Mixing(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :2] - images.flatten(1)[:, :2].mean(0, keepdim=True)

    with pytest.raises(NotSupportedError):
        bounds_of(Mixing().eval(), torch.rand(1, 1, 3, 3), 0, as_run=False)


@pytest.mark.parametrize("axis", [1, 2, -1, -2])
def test_an_axis_after_that_of_images_may_be_added(axis: int) -> None:
    """On (N, K), axis 2 is the last of the result, not again that of images."""
    head = nn.Linear(9, 2)
    network = Wrapped(head, before=lambda images: images.flatten(1).unsqueeze(axis).flatten(1)).eval()
    image = torch.rand(1, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    label = int(network(image).argmax())
    certificate = certify_pixels(network, image, torch.tensor([label]), colors=1e-4)
    assert not certificate.unknown_because()
    plain = bounds_of(nn.Sequential(nn.Flatten(), head).eval(), image, label, as_run=False)
    boxes = random_boxes(image, 5, 0)
    torch.testing.assert_close(
        bounds_of(network, image, label, as_run=False).bounds(*boxes).bound, plain.bounds(*boxes).bound
    )


@pytest.mark.parametrize("axis", [0, -3])
def test_an_axis_before_that_of_images_is_not_bounded(axis: int) -> None:
    network = Wrapped(lambda images: images.flatten(1)[:, :2].unsqueeze(axis).flatten(0, 1)).eval()
    with pytest.raises(NotSupportedError, match="unsqueeze is not supported across images"):
        bounds_of(network, torch.rand(1, 1, 3, 3), 0, as_run=False)


def test_a_single_value_for_each_image_is_not_bounded() -> None:
    network = Wrapped(lambda images: (images.sum((1, 2, 3)) - 1)[:, None].expand(-1, 2)).eval()
    with pytest.raises(NotSupportedError, match="on values with no axis besides that of images"):
        bounds_of(network, torch.rand(1, 1, 3, 3), 0, as_run=False)


def test_a_product_of_two_values_is_not_bounded() -> None:
    class Squared(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return (images * images).flatten(1)[:, :2]

    with pytest.raises(NotSupportedError, match="mul is not supported"):
        bounds_of(Squared().eval(), torch.rand(1, 1, 3, 3), 0, as_run=False)


def test_a_product_of_matrices_in_a_batch_is_named() -> None:
    with pytest.raises(NotSupportedError, match="is not supported"):
        bounds_of(LinearNetwork(torch.randn(1, 3, 4)).eval(), torch.rand(1, 1, 3, 4), 0, as_run=True)
