"""The first-order estimate: exact on linear networks, by closed form and by linear programs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor, nn

from weakspot.attacks.context import AttackOptions, attack_context
from weakspot.attacks.first_order import (
    CLASSES,
    Linearization,
    cell_numbers,
    estimate_cells,
    estimate_places,
    linearize,
)


def linear_network(shape: tuple[int, int, int], classes: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    count = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(count, classes)).eval()


def linearized(model: nn.Module, images: Tensor, labels: Tensor, classes: int = CLASSES) -> Linearization:
    with attack_context(model, images, labels, AttackOptions()) as problem:
        return linearize(problem, classes)


def linear_program(weight: Tensor, bias: float, image: Tensor, mask: Tensor) -> float:
    """The smallest L-infinity change inside the mask for which weight * image + bias <= 0, by a linear program."""
    inside = mask.expand_as(image).flatten().numpy()
    values, row = image.flatten().double().numpy(), weight.flatten().double().numpy()
    count = inside.sum()
    start = float(row @ values + bias)
    # Variables: the changes inside, then their largest size.
    bounds = [(-v, 1 - v) for v in values[inside]] + [(0, 1)]
    one = np.ones((count, 1))
    constraints = np.vstack(
        [np.append(row[inside], 0), np.hstack([np.eye(count), -one]), np.hstack([-np.eye(count), -one])]
    )
    limits = np.concatenate([[-start], np.zeros(2 * count)])
    solved = linprog(np.append(np.zeros(count), 1), A_ub=constraints, b_ub=limits, bounds=bounds)
    return float(solved.x[-1]) if solved.status == 0 else np.inf


@pytest.mark.parametrize("seed", range(4))
def test_equals_linear_programs_on_a_linear_network(seed: int) -> None:
    """Overlapping masks, an empty one and the whole image; in-between sizes where many values end at the box."""
    model = linear_network((2, 4, 5), 4, seed)
    torch.manual_seed(seed + 100)
    images = torch.rand(3, 2, 4, 5).round(decimals=1)  # some values are black or white already
    labels = model(images).argmax(1)
    masks = torch.rand(3, 5, 1, 4, 5) < 0.4
    masks[:, 0], masks[:, 1] = True, False
    sizes = estimate_places(linearized(model, images, labels), masks)
    assert sizes.shape == (3, 5, 3)
    layer = model[1]
    assert isinstance(layer, nn.Linear)
    finite = 0
    for n in range(3):
        others = [k for k in model(images)[n].argsort(descending=True).tolist() if k != labels[n]]
        for m in range(5):
            for t, other in enumerate(others):
                weight = (layer.weight[labels[n]] - layer.weight[other]).detach()
                bias = float((layer.bias[labels[n]] - layer.bias[other]).detach())
                expected = linear_program(weight, bias, images[n], masks[n, m])
                assert float(sizes[n, m, t]) == pytest.approx(expected, abs=1e-5)
                finite += np.isfinite(expected)
    assert 3 < finite < 45


def test_equals_the_closed_form_without_the_box() -> None:
    """Gray images and a small margin: the size is the margin over the dual norm of the gradient."""
    model = linear_network((1, 6, 6), 2)
    layer = model[1]
    assert isinstance(layer, nn.Linear)
    images = torch.full((1, 1, 6, 6), 0.5)
    with torch.no_grad():
        difference = model(images)[0, 0] - model(images)[0, 1]
        layer.bias[0] -= difference - 0.01
    linear = linearized(model, images, torch.tensor([0]))
    weight = (layer.weight[0] - layer.weight[1]).detach().abs()
    whole = torch.ones(1, 1, 1, 6, 6, dtype=torch.bool)
    assert float(estimate_places(linear, whole)) == pytest.approx(0.01 / float(weight.sum()), rel=1e-4)
    assert float(estimate_places(linear, whole, "l2")) == pytest.approx(0.01 / float(weight.norm()), rel=1e-4)


def test_the_l2_size_is_the_least_length_in_the_box() -> None:
    model = linear_network((1, 3, 3), 2, 3)
    layer = model[1]
    assert isinstance(layer, nn.Linear)
    torch.manual_seed(5)
    images = torch.rand(1, 1, 3, 3)
    with torch.no_grad():
        layer.bias[0] += 0.8 - (model(images)[0, 0] - model(images)[0, 1])
    found = float(
        estimate_places(linearized(model, images, torch.tensor([0])), torch.ones(1, 1, 1, 3, 3) > 0, "l2")
    )
    row = (layer.weight[0] - layer.weight[1]).detach().double().numpy()
    values = images.flatten().double().numpy()
    solved = minimize(
        lambda d: float(d @ d),
        np.where(row > 0, -values, 1 - values),
        jac=lambda d: 2 * d,
        bounds=list(zip(-values, 1 - values, strict=True)),
        constraints={"type": "ineq", "fun": lambda d: float(-0.8 - row @ d), "jac": lambda _: -row},
        options={"ftol": 1e-12},
    )
    assert solved.success
    assert found == pytest.approx(float(np.linalg.norm(solved.x)), rel=1e-4)
    assert found > 1.001 * 0.8 / float(np.linalg.norm(row))  # the box binds


def test_cells_are_places() -> None:
    model = linear_network((3, 7, 10), 6)
    torch.manual_seed(1)
    images = torch.rand(2, 3, 7, 10)
    linear = linearized(model, images, model(images).argmax(1))
    numbers, (rows, columns) = cell_numbers((7, 10), 3)
    assert (rows, columns) == (3, 3)
    masks = torch.stack([numbers == cell for cell in range(9)])[None, :, None]
    assert torch.equal(estimate_cells(linear, 3).flatten(1), estimate_places(linear, masks).amin(2))
    sizes = torch.bincount(numbers.flatten())
    assert 2 * 3 <= int(sizes.min()) <= int(sizes.max()) <= 3 * 4
    assert estimate_cells(linear, 64).shape == (2, 7, 10)  # no more cells than pixels


def test_more_room_and_more_classes_never_raise_the_estimate() -> None:
    model = linear_network((3, 8, 8), 9)
    torch.manual_seed(2)
    images = torch.rand(4, 3, 8, 8)
    labels = model(images).argmax(1)
    cells = [estimate_cells(linearized(model, images, labels, classes), 4) for classes in (1, 3, 20)]
    assert bool(((cells[0] >= cells[1]) & (cells[1] >= cells[2])).all())
    linear = linearized(model, images, labels)
    small = torch.zeros(1, 1, 1, 8, 8, dtype=torch.bool)
    small[..., 2:4, 2:4] = True
    large = small.clone()
    large[..., 1:6, 1:6] = True
    one, other = (estimate_places(linear, mask) for mask in (small, large))
    assert bool((other <= one).all())


def test_an_image_that_is_misclassified_already_needs_nothing() -> None:
    model = linear_network((1, 4, 4), 3)
    images = torch.rand(1, 1, 4, 4)
    wrong = model(images).argmin(1)
    assert bool((estimate_cells(linearized(model, images, wrong), 2) == 0).all())


def test_a_network_that_reads_one_corner_is_weak_only_there() -> None:
    class Corner(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            value = images[:, :, :4, :4].mean((1, 2, 3))
            return torch.stack([value, 0.6 - value], 1)

    cells = estimate_cells(linearized(Corner().eval(), torch.full((1, 3, 16, 16), 0.5), torch.tensor([0])), 4)
    assert float(cells[0, 0, 0]) == pytest.approx(0.2, rel=1e-4)
    cells[0, 0, 0] = torch.inf
    assert bool(cells.isinf().all())


@pytest.mark.parametrize("parts", [7, 10**6])
def test_results_do_not_depend_on_the_batch(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weakspot.attacks.first_order.ELEMENTS", parts)
    model = linear_network((3, 6, 6), 5)
    torch.manual_seed(3)
    images = torch.rand(5, 3, 6, 6)
    labels = model(images).argmax(1)
    together = estimate_cells(linearized(model, images, labels), 3)
    alone = [estimate_cells(linearized(model, images[n : n + 1], labels[n : n + 1]), 3) for n in range(5)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-5, atol=0)


@pytest.mark.parametrize("solve", [estimate_cells, estimate_places])
def test_an_unknown_norm_is_refused(solve: Callable[..., Tensor]) -> None:
    model = linear_network((1, 4, 4), 2)
    linear = linearized(model, torch.rand(1, 1, 4, 4), torch.tensor([0]))
    places = 2 if solve is estimate_cells else torch.ones(1, 1, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="norm must be"):
        solve(linear, places, "l7")
