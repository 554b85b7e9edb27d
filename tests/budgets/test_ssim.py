"""Structural similarity as a budget: against its definition in plain Python, and against a convex solver."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from numpy.typing import NDArray
from torch import Tensor

from tests.budgets.strategies import LAW, Case, cases, similarities
from tests.covering import sampled
from weakspot.budgets import SSIM
from weakspot.similarity import ssim_map

C1, C2 = 0.01**2, 0.03**2

# Height, width and side of a patch: whole patches, ragged ones, one of a single pixel, one larger than the image.
LAYOUTS = [(8, 8, 8), (9, 9, 8), (6, 10, 4), (7, 5, 3), (3, 5, 8)]
MODES = ("global", "local")

Pixels = NDArray[np.float64]


def pieces(image: Tensor, patch: int) -> list[Pixels]:
    """Every patch of every channel of an image (C, H, W) as a row of float64."""
    _, height, width = image.shape
    return [
        channel[top : top + patch, left : left + patch].ravel()
        for channel in image.double().numpy()
        for top in range(0, height, patch)
        for left in range(0, width, patch)
    ]


def whole(rows: list[Pixels], like: Tensor, patch: int) -> Tensor:
    """The inverse of `pieces`."""
    image, rows = torch.zeros_like(like, dtype=torch.float64), list(rows)
    for channel in image:
        for top in range(0, channel.shape[0], patch):
            for left in range(0, channel.shape[1], patch):
                place = channel[top : top + patch, left : left + patch]
                place.copy_(torch.from_numpy(rows.pop(0)).view_as(place))
    return image


def by_definition(clean: list[float], changed: list[float]) -> tuple[float, float]:
    """d1^2 and d2^2 of one patch, term by term."""
    count = len(clean)
    mean_clean, mean_changed = math.fsum(clean) / count, math.fsum(changed) / count
    level = (mean_clean - mean_changed) ** 2 / (mean_clean**2 + mean_changed**2 + C1)
    if count == 1:
        return level, 0.0
    difference = energy = 0.0
    for x, y in zip(clean, changed, strict=True):
        difference += ((x - mean_clean) - (y - mean_changed)) ** 2
        energy += (x - mean_clean) ** 2 + (y - mean_changed) ** 2
    return level, difference / (energy + (count - 1) * C2)


def distances(image: Tensor, perturbation: Tensor, patch: int) -> list[tuple[float, float]]:
    changed = image.double() + perturbation.double()
    return [
        by_definition(list(x), list(y))
        for x, y in zip(pieces(image, patch), pieces(changed, patch), strict=True)
    ]


def size_of(budget: SSIM, image: Tensor, perturbation: Tensor) -> float:
    found = distances(image, perturbation, budget.patch)
    if budget.mode == "local":
        return max(max(both) for both in found)
    return sum(level + structure for level, structure in found) / len(found)


def drawn(height: int, width: int, *, contrast: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two images of three channels around gray, and a direction for each."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.5 + contrast * (torch.rand(2, 3, height, width, generator=generator) - 0.5)
    return images, torch.randn(images.shape, generator=generator)


@LAW
@given(similarities, cases())
def test_size_is_the_definitions(budget: SSIM, case: Case) -> None:
    changed = (case.images + case.wanted).clamp(0, 1)
    perturbation = changed - case.images
    for index, found in enumerate(budget.distance(perturbation, case.images)):
        expected = size_of(budget, case.images[index], perturbation[index])
        assert float(found) == pytest.approx(expected, rel=1e-3, abs=1e-6)


@LAW
@given(similarities, cases())
def test_the_similarity_of_patches_is_at_least_what_the_budget_leaves(budget: SSIM, case: Case) -> None:
    projected = budget.project(case.wanted, case.images, region=case.region)
    for image, perturbation in zip(case.images, projected, strict=True):
        found = [
            (1 - level) * (1 - structure) for level, structure in distances(image, perturbation, budget.patch)
        ]
        if budget.mode == "global":
            assert sum(found) / len(found) >= 1 - budget.eps * (1 + 1e-4) - 1e-6
        else:
            assert min(found) >= (1 - budget.eps * (1 + 1e-4)) ** 2 - 1e-6


@pytest.mark.parametrize("eps", [1e-3, 0.05, 0.3])
@pytest.mark.parametrize(("height", "width", "patch"), LAYOUTS)
def test_the_global_projection_goes_straight_home_and_stops_on_the_budget(
    height: int, width: int, patch: int, eps: float
) -> None:
    images, wanted = drawn(height, width)
    region = torch.rand(2, 1, height, width, generator=torch.Generator().manual_seed(1)) < 0.7
    budget = SSIM(eps, patch=patch, level=1)
    found = budget.project(wanted, images, region=region)
    for image, goal, mask, point in zip(images, wanted, region, found, strict=True):
        inside = torch.where(mask, (image + goal).clamp(0, 1) - image, 0).double()
        assert size_of(budget, image, inside) > eps  # the wanted point lies outside
        fraction = float((point * inside).sum() / inside.square().sum())
        torch.testing.assert_close(point.double(), fraction * inside, rtol=1e-4, atol=1e-6)
        assert (1 - 1e-3) * eps <= size_of(budget, image, point) <= eps * (1 + 1e-6)
        # The largest share: nothing further out on the way to the wanted point is within.
        assert all(
            size_of(budget, image, further * inside) > eps for further in np.linspace(fraction, 1, 20)[1:]
        )


@pytest.mark.parametrize("eps", [1e-3, 0.05, 0.5])
@pytest.mark.parametrize(("height", "width", "patch"), LAYOUTS)
def test_the_local_projection_leaves_every_patch_on_its_bound_where_all_is_wanted_outside(
    height: int, width: int, patch: int, eps: float
) -> None:
    images, wanted = drawn(height, width, contrast=0.2)
    images, wanted = images.roll(1, 0), 100 * wanted
    budget = SSIM(eps, patch=patch, mode="local")
    found = budget.project(wanted, images)
    for image, point in zip(images, found, strict=True):
        assert size_of(budget, image, point) == pytest.approx(eps, rel=1e-4)
        if eps < 0.1:  # where the box is far, no patch has to give way to it
            reached = [max(both) for both in distances(image, point, patch)]
            assert reached == pytest.approx([eps] * len(reached), rel=1e-3)


def convex() -> Any:
    return pytest.importorskip("cvxpy")


def solved(solver: Any, loss: Any, constraints: list[Any]) -> None:
    sharp = {"tol_gap_abs": 1e-10, "tol_gap_rel": 1e-10, "tol_feas": 1e-10}
    solver.Problem(loss, constraints).solve(solver=solver.CLARABEL, **sharp)


def within_local_bounds(solver: Any, change: Any, patch: Pixels, eps: float) -> list[Any]:
    """d1^2 <= eps and d2^2 <= eps of one patch, multiplied out to convex quadratics of the change."""
    count, mean = len(patch), patch.mean()
    centered = patch - mean
    centring = np.eye(count) - 1 / count
    structure = (1 - eps) * solver.sum_squares(centring @ change) - 2 * eps * (centered @ change)
    shift = solver.sum(change) / count
    level = (1 - eps) * solver.square(shift) - 2 * eps * mean * shift
    return [
        structure <= eps * (2 * centered @ centered + (count - 1) * C2),
        level <= eps * (2 * mean**2 + C1),
    ]


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
@pytest.mark.parametrize("eps", [0.01, 0.3])
@pytest.mark.parametrize(("height", "width", "patch"), LAYOUTS)
def test_the_local_step_from_zero_is_a_convex_solvers_steepest_point(
    height: int, width: int, patch: int, eps: float
) -> None:
    solver = convex()
    images, gradients = (tensor[:1, :1] for tensor in drawn(height, width))
    step = SSIM(eps, patch=patch, mode="local").steepest_step(gradients, torch.zeros_like(images), images)
    rows = []
    for x, slope in zip(pieces(images[0], patch), pieces(gradients[0], patch), strict=True):
        change = solver.Variable(len(x))
        solved(solver, solver.Maximize(slope @ change), within_local_bounds(solver, change, x, eps))
        rows.append(change.value)
    expected = whole(rows, images[0], patch)
    # The solver's gap is 1e-10 of the objective, so that its point is known to 1e-5 of its length.
    torch.testing.assert_close(step[0].double(), expected, rtol=0, atol=1e-5 * float(1 + expected.norm()))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
@pytest.mark.parametrize("reach", [0.1, 1.0], ids=["wanted inside the box", "wanted outside the box"])
@pytest.mark.parametrize("eps", [0.01, 0.1])
@pytest.mark.parametrize(("height", "width", "patch"), LAYOUTS)
def test_the_local_projection_is_a_convex_solvers_nearest_point_where_the_box_is_far(
    height: int, width: int, patch: int, eps: float, reach: float
) -> None:
    solver = convex()
    images, wanted = (tensor[:1, :1] for tensor in drawn(height, width, contrast=0.1))
    wanted = reach * wanted
    assert bool(((images + wanted).clamp(0, 1) == images + wanted).all()) is (reach < 1)
    found = SSIM(eps, patch=patch, mode="local").project(wanted, images)
    rows = []
    for x, goal in zip(pieces(images[0], patch), pieces(wanted[0], patch), strict=True):
        change = solver.Variable(len(x))
        nearest = solver.Minimize(solver.sum_squares(change - goal))
        solved(solver, nearest, within_local_bounds(solver, change, x, eps))
        rows.append(change.value)
    expected = whole(rows, images[0], patch)
    assert 0 < float((images + expected).min()) < float((images + expected).max()) < 1  # the box cuts no ball
    assert not torch.allclose(expected, wanted[0].double(), atol=1e-3)
    torch.testing.assert_close(found[0].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("eps", [0.01, 0.3, 0.8])
@pytest.mark.parametrize(("height", "width", "patch"), LAYOUTS)
def test_the_local_step_leads_to_the_same_point_from_anywhere_inside(
    height: int, width: int, patch: int, eps: float
) -> None:
    images, gradients = drawn(height, width)
    budget = SSIM(eps, patch=patch, mode="local")
    still = torch.zeros_like(images)
    here = budget.project(gradients.roll(1, 2), images)
    expected = budget.steepest_step(gradients, still, images)
    torch.testing.assert_close(
        here + budget.steepest_step(gradients, here, images), expected, rtol=0, atol=1e-5
    )


def frozen(image: Tensor, perturbation: Tensor, patch: int) -> list[tuple[float, float]]:
    """The denominators of d1^2 and d2^2 of every patch where the perturbed image is."""
    found = []
    changed = image.double() + perturbation.double()
    for x, y in zip(pieces(image, patch), pieces(changed, patch), strict=True):
        energy = ((x - x.mean()) ** 2).sum() + ((y - y.mean()) ** 2).sum() + (len(x) - 1) * C2
        found.append((float(x.mean() ** 2 + y.mean() ** 2 + C1), float(energy)))
    return found


@pytest.mark.parametrize("moved", [False, True], ids=["from the image", "from elsewhere"])
@pytest.mark.parametrize("eps", [1e-3, 0.3])
@pytest.mark.parametrize(("height", "width", "patch"), LAYOUTS)
def test_the_global_step_is_the_steepest_under_frozen_denominators(
    height: int, width: int, patch: int, eps: float, moved: bool
) -> None:
    """By the conditions of Lagrange and Cauchy-Schwarz: gradient proportional to the constraint's, all of it spent."""
    images, gradients = drawn(height, width)
    budget = SSIM(eps, patch=patch, level=1)
    here = budget.project(0.1 * gradients.roll(1, 3), images) if moved else torch.zeros_like(images)
    steps = budget.steepest_step(gradients, here, images)
    for image, point, gradient, step in zip(images, here, gradients, steps, strict=True):
        spent, ratios = [], []
        for change, slope, (level, structure) in zip(
            pieces(step, patch), pieces(gradient, patch), frozen(image, point, patch), strict=True
        ):
            mean, centered = change.mean(), change - change.mean()
            spent.append(mean**2 / level + ((centered @ centered) / structure if len(change) > 1 else 0))
            ratios.append(mean / level / slope.sum())
            if len(change) > 1:
                ratios.extend(centered / structure / (slope - slope.mean()))
        assert sum(spent) / len(spent) == pytest.approx(eps, rel=1e-4)
        assert min(ratios) > 0
        # Pixels whose slope nearly is their patch's mean have ratios of rounding errors.
        assert np.quantile(ratios, 0.02) == pytest.approx(np.quantile(ratios, 0.98), rel=1e-2)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
@pytest.mark.parametrize(("height", "width", "patch"), LAYOUTS)
def test_a_convex_solver_finds_the_same_global_step(height: int, width: int, patch: int) -> None:
    solver = convex()
    images, gradients = (tensor[:1, :1] for tensor in drawn(height, width))
    step = SSIM(0.01, patch=patch, level=1).steepest_step(gradients, torch.zeros_like(images), images)
    rows, spent, gained = [], [], []
    for slope, (level, structure) in zip(
        pieces(gradients[0], patch), frozen(images[0], torch.zeros_like(images[0]), patch), strict=True
    ):
        count = len(slope)
        rows.append(solver.Variable(count))
        spent.append(solver.square(solver.sum(rows[-1]) / count) / level)
        if count > 1:
            spent.append(solver.sum_squares((np.eye(count) - 1 / count) @ rows[-1]) / structure)
        gained.append(slope @ rows[-1])
    solved(solver, solver.Maximize(sum(gained)), [sum(spent) <= 0.01 * len(rows)])
    expected = whole([row.value for row in rows], images[0], patch)
    torch.testing.assert_close(step[0].double(), expected, rtol=0, atol=2e-5)


def test_the_global_step_asks_little_of_smooth_patches_and_much_of_rough_ones() -> None:
    # The left patch is flat, the right one a checkerboard: the same gradient is worth more where it cannot be seen.
    images = torch.full((1, 1, 8, 16), 0.5)
    images[..., 8:] += 0.3 * (-1) ** torch.arange(8).view(8, 1).add(torch.arange(8))
    gradient = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 1, 2)
    step = SSIM(0.01, level=1).steepest_step(gradient - gradient.mean(), torch.zeros_like(images), images)
    smooth, rough = step[..., :8].norm(), step[..., 8:].norm()
    energy = 64 * 0.3**2
    assert float(rough / smooth) == pytest.approx((2 * energy + 63 * C2) / (63 * C2), rel=1e-3)


@pytest.mark.parametrize("eps", [1e-3, 0.05, 0.4])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(8, 8), (9, 9), (1, 1)], ids=str)
def test_black_may_brighten_and_white_darken_by_what_the_level_term_allows(
    size: tuple[int, int], mode: str, eps: float
) -> None:
    budget = SSIM(eps, mode=mode)
    black, white = torch.zeros(1, 1, *size), torch.ones(1, 1, *size)
    # m^2 / (m^2 + c1) = eps, and m^2 / (1 + (1 - m)^2 + c1) = eps.
    up = math.sqrt(C1 * eps / (1 - eps))
    down = (math.sqrt(eps**2 + (1 - eps) * eps * (2 + C1)) - eps) / (1 - eps)
    found = budget.project(white, black)
    torch.testing.assert_close(found, torch.full_like(found, up), rtol=1e-4, atol=0)
    found = budget.project(-white, white)
    torch.testing.assert_close(found, torch.full_like(found, -down), rtol=1e-4, atol=0)
    assert not bool(budget.project(-white, black).any())
    assert not bool(budget.project(white, white).any())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_flat_images_may_be_roughened_by_what_the_constant_allows(level: float, mode: str) -> None:
    # A patch with no contrast of its own: |change|^2 / (|change|^2 + (n - 1) c2) = eps.
    images = torch.full((1, 1, 4, 4), level)
    checks = (-1.0) ** torch.arange(4).view(4, 1).add(torch.arange(4)).expand(1, 1, 4, 4)
    eps = 0.1
    budget = SSIM(eps, patch=4, mode=mode)
    found = budget.steepest_step(checks, torch.zeros_like(images), images)
    # The global step freezes the denominator at the flat image, so that it is a little shorter.
    expected = math.sqrt(15 * C2 * eps / ((1 - eps) if mode == "local" else 1)) / 4
    torch.testing.assert_close(found, expected * checks, rtol=1e-4, atol=1e-7)
    projected = budget.project(10 * checks, images)
    assert 0 <= float((images + projected).min()) <= float((images + projected).max()) <= 1
    assert size_of(budget, images[0], projected[0]) == pytest.approx(eps, rel=1e-4)


@sampled("layout, level, moved, masked", LAYOUTS, [0.03, 0.1, 0.5], [False, True], [False, True])
def test_means_take_their_fraction_of_the_steepest_step_and_all_of_the_budget_is_spent(
    layout: tuple[int, int, int], level: float, moved: bool, masked: bool
) -> None:
    height, width, patch = layout
    images, gradients = drawn(height, width)
    if masked:
        gradients = gradients * (
            torch.rand(2, 1, height, width, generator=torch.Generator().manual_seed(1)) < 0.6
        )
    here = SSIM(0.01, patch=patch).project(0.1 * gradients.roll(1, 3), images) if moved else 0 * images
    steepest = SSIM(0.01, patch=patch, level=1).steepest_step(gradients, here, images)
    steps = SSIM(0.01, patch=patch, level=level).steepest_step(gradients, here, images)
    for image, point, full, step, movable in zip(images, here, steepest, steps, gradients != 0, strict=True):
        spent, fractions, rests = [], [], []
        for whole, change, moves, (bright, structure) in zip(
            pieces(full, patch), pieces(step, patch), pieces(movable.float(), patch), frozen(image, point, patch),
            strict=True,
        ):  # fmt: skip
            mean, centered = change.mean(), change - change.mean()
            spent.append(mean**2 / bright + ((centered @ centered) / structure if len(change) > 1 else 0))
            if not moves.any():
                continue
            on = moves > 0
            fractions.append(change[on].mean() / whole[on].mean())
            if on.sum() > 1:
                rests.extend((change[on] - change[on].mean()) / (whole[on] - whole[on].mean()))
        assert sum(spent) / len(spent) == pytest.approx(0.01, rel=1e-4)
        scale = np.median(rests)
        assert np.quantile(fractions, 0.1) == pytest.approx(level * scale, rel=2e-2)
        assert np.quantile(fractions, 0.9) == pytest.approx(level * scale, rel=2e-2)


def test_a_smaller_fraction_of_means_leaves_fewer_edges_between_patches() -> None:
    generator = torch.Generator().manual_seed(0)
    images = 0.5 + 0.02 * torch.rand(2, 3, 64, 64, generator=generator)
    gradients = torch.randn(2, 3, 64, 64, generator=generator)

    def quality(budget: SSIM) -> Tensor:
        """Mean SSIM under sliding windows of a step of one and the same gain."""
        step = budget.steepest_step(gradients, torch.zeros_like(images), images)
        gain = (gradients * step).sum((1, 2, 3), keepdim=True)
        return ssim_map(images, images + 20 * step / gain).mean((1, 2, 3))

    assert bool((1 - quality(SSIM(0.01)) < 0.8 * (1 - quality(SSIM(0.01, level=1)))).all())


@pytest.mark.parametrize("level", [0, -1, 1.1, True, "0.1", float("nan")])
def test_a_fraction_of_means_outside_its_range_is_refused(level: Any) -> None:
    with pytest.raises(ValueError, match=r"level must be a fraction above 0 and at most 1, got"):
        SSIM(0.01, level=level)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_remembered_of_images_that_may_change(mode: str) -> None:
    budget = SSIM(0.01, mode=mode)
    pixels = np.random.default_rng(0).random((2, 3, 16, 16)).astype("float32")
    images, change = torch.from_numpy(pixels), torch.full((2, 3, 16, 16), 0.03)
    budget.distance(change, images)
    pixels[:] = 0.02  # torch does not see this
    torch.testing.assert_close(budget.distance(change, images), budget.distance(change, images.clone()))
    bright = torch.rand(2, 3, 16, 16, requires_grad=True)
    budget.distance(change, bright).sum().backward()
    assert bright.grad is not None
    assert bool(bright.grad.any())
    with torch.inference_mode():
        budget.distance(change, images)
    moved = change.clone().requires_grad_()
    budget.distance(moved, images).sum().backward()


def test_the_corner_pixel_of_nine_by_nine_is_a_patch_of_its_own() -> None:
    image = torch.full((1, 1, 9, 9), 0.5)
    change = torch.zeros_like(image)
    change[..., 8, 8] = 0.1
    level = 0.1**2 / (0.5**2 + 0.6**2 + C1)
    assert float(SSIM(0.5, mode="local").distance(change, image)) == pytest.approx(level, rel=1e-5)
    assert float(SSIM(0.5).distance(change, image)) == pytest.approx(level / 4, rel=1e-5)
    # Only its mean can change; the step goes to the end of its interval, up or down.
    for sign in (1, -1):
        step = SSIM(0.02, mode="local").steepest_step(sign * change, torch.zeros_like(image), image)
        reached = 0.5 + float(step[..., 8, 8])
        assert (reached - 0.5) * sign > 0
        assert (reached - 0.5) ** 2 / (0.5**2 + reached**2 + C1) == pytest.approx(0.02, rel=1e-4)
        assert not bool(step.flatten()[:-1].any())


@pytest.mark.parametrize("above", [1e-3, 1e-2, 0.1])
def test_a_global_projection_finds_the_budget_where_what_is_spent_is_nearly_flat(above: float) -> None:
    # On black, half a level of brightness spends nearly as much as all of them: no square law.
    black = torch.zeros(1, 1, 2, 8)
    wanted = black.clone()
    wanted[..., :2] = 1
    budget = SSIM(0.25 * (1 - above), patch=2)
    found = budget.project(wanted, black)
    expected = math.sqrt(C1 * (1 - above) / above)  # the root of m^2 / (m^2 + c1) = 1 - above
    torch.testing.assert_close(found, expected * wanted, rtol=5e-3, atol=0)
    assert float(budget.distance(found, black)) == pytest.approx(budget.eps, rel=1e-4)


@pytest.mark.parametrize("eps", [-0.1, 1.0, 1, 2.0, float("nan"), float("inf")])
def test_eps_is_a_fraction_below_one(eps: float) -> None:
    with pytest.raises(ValueError, match=r"^eps must be at least 0 and below 1, .*got"):
        SSIM(eps)


@pytest.mark.parametrize("patch", [-1, 0, 1, 2.5, 8.0, "8", None, True])
def test_a_patch_is_a_whole_number_of_pixels(patch: Any) -> None:
    with pytest.raises(ValueError, match=r"^patch must be an integer of at least 2, got"):
        SSIM(0.1, patch=patch)


@pytest.mark.parametrize(("mode", "words"), [("locale", r" \(did you mean 'local'"), ("", "")])
def test_a_mode_is_global_or_local(mode: str, words: str) -> None:
    with pytest.raises(ValueError, match=rf"^mode must be one of global, local, got {mode!r}{words}"):
        SSIM(0.1, mode=mode)


def test_it_is_named_with_its_mode_and_patch() -> None:
    assert str(SSIM(0.01)) == "0.01 SSIM (global, patches of 8)"
    assert str(SSIM(0.02, patch=4, mode="local")) == "0.02 SSIM (local, patches of 4)"


def test_a_change_inside_the_ball_that_leaves_the_box_is_only_clamped() -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images[:, :, 2, 3], images[:, :, 11, 9] = 1.0, 0.0
    perturbation = torch.full_like(images, 0.001)
    perturbation[:, :, 11, 9] = -0.004  # below 0; at (2, 3) above 1
    clamped = (images + perturbation).clamp(0, 1) - images
    budget = SSIM(0.05, mode="local")
    assert (budget.distance(clamped, images) < 0.05).all()
    # Neither the alternating projection nor the ball may move what was inside already.
    torch.testing.assert_close(budget.project(perturbation, images), clamped, atol=2e-6, rtol=0)
