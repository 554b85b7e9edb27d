"""The perceptual budget against its formulas in plain Python, a convex solver and its own optimality conditions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.budgets.strategies import drawn, pictures
from tests.covering import sampled
from weakspot.budgets import SSIM

LEVEL, STRUCTURE = 0.01**2, 0.03**2
SIZES = [(8, 8), (16, 8), (9, 9), (7, 13), (3, 2), (1, 5)]

PATCHES = [2, 3, 8]
every_patch = pytest.mark.parametrize("patch", PATCHES)
every_size = pytest.mark.parametrize("size", SIZES, ids=str)


def blocks(image: Tensor, patch: int) -> Iterator[Tensor]:
    """The pixels of every patch of every channel, row by row; cut at the right and lower border."""
    for channel in image:
        for rows in channel.split(patch, 0):
            for block in rows.split(patch, 1):
                yield block.flatten()


def moments(pixels: list[float]) -> tuple[float, list[float], float]:
    mean = sum(pixels) / len(pixels)
    centered = [value - mean for value in pixels]
    return mean, centered, sum(value * value for value in centered)


def distances(before: list[float], after: list[float]) -> tuple[float, float]:
    """d1^2 and d2^2 of one patch, in plain Python."""
    first, first_centered, first_energy = moments(before)
    second, second_centered, second_energy = moments(after)
    level = (first - second) ** 2 / (first**2 + second**2 + LEVEL)
    square = sum((one - two) ** 2 for one, two in zip(first_centered, second_centered, strict=True))
    bound = first_energy + second_energy + (len(before) - 1) * STRUCTURE
    return level, square / bound if bound else 0.0


def plain_size(perturbation: Tensor, image: Tensor, patch: int, mode: str) -> float:
    pairs = [
        distances(before.tolist(), (before + change).tolist())
        for before, change in zip(
            blocks(image.double(), patch), blocks(perturbation.double(), patch), strict=True
        )
    ]
    if mode == "local":
        return max(max(pair) for pair in pairs)
    return sum(map(sum, pairs)) / len(pairs)


@sampled("patch, size, channels, mode", PATCHES, SIZES, [1, 3], ["global", "local"])
def test_size_is_the_formula_patch_by_patch(
    patch: int, size: tuple[int, int], channels: int, mode: str
) -> None:
    images = pictures(channels, size)
    for scale in (1e-3, 0.05, 1.0):
        changes = (images + drawn(images, scale)).clamp(0, 1) - images
        found = SSIM(0.1, patch=patch, mode=mode).distance(changes, images)
        expected = [
            plain_size(change, image, patch, mode) for change, image in zip(changes, images, strict=True)
        ]
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-7)


def test_the_corner_pixel_of_nine_by_nine_is_a_patch_of_its_own() -> None:
    image = torch.full((1, 1, 9, 9), 0.5)
    change = torch.zeros_like(image)
    change[..., 8, 8] = 0.1
    level = 0.1**2 / (0.5**2 + 0.6**2 + LEVEL)
    assert float(SSIM(0.5, mode="local").distance(change, image)) == pytest.approx(level, rel=1e-5)
    assert float(SSIM(0.5).distance(change, image)) == pytest.approx(level / 4, rel=1e-5)
    # Only its mean can change; the step goes to the end of its interval, up or down.
    for sign in (1, -1):
        step = SSIM(0.02, mode="local").steepest_step(sign * change, torch.zeros_like(image), image)
        reached = 0.5 + float(step[..., 8, 8])
        assert (reached - 0.5) * sign > 0
        assert (reached - 0.5) ** 2 / (0.5**2 + reached**2 + LEVEL) == pytest.approx(0.02, rel=1e-4)
        assert not bool(step.flatten()[:-1].any())


@every_patch
@every_size
def test_mean_ssim_of_patches_is_at_least_one_minus_eps(patch: int, size: tuple[int, int]) -> None:
    images = pictures(3, size)
    changes = SSIM(0.1, patch=patch).project(drawn(images, 0.5), images)
    for change, image in zip(changes, images, strict=True):
        similarities = [
            (1 - level) * (1 - structure)
            for level, structure in (
                distances(before.tolist(), (before + moved).tolist())
                for before, moved in zip(
                    blocks(image.double(), patch), blocks(change.double(), patch), strict=True
                )
            )
        ]
        assert sum(similarities) / len(similarities) >= 0.9 - 1e-6


@sampled(
    "patch, size, eps, scale, kind",
    PATCHES,
    SIZES,
    [1e-4, 0.02, 0.3],
    [0.3, 100.0],
    ["everywhere", "scattered"],
)
def test_a_global_projection_spends_the_whole_budget_where_more_is_wanted(
    patch: int, size: tuple[int, int], eps: float, scale: float, kind: str
) -> None:
    images = pictures(3, size)
    wanted = drawn(images, scale)
    region = torch.rand(len(images), 1, *size, generator=torch.Generator().manual_seed(2)) < 0.4
    region[:, :, 0, 0] = True
    if kind == "everywhere":
        region[:] = True
    budget = SSIM(eps, patch=patch)
    inside = torch.where(region, (images + wanted).clamp(0, 1) - images, 0)
    found = budget.project(wanted, images, region=region)
    spent, asked = budget.distance(found, images), budget.distance(inside, images)
    outside = asked > eps
    assert bool((spent[outside] >= (1 - 1e-3) * eps).all())
    torch.testing.assert_close(found[~outside], inside[~outside], rtol=1e-5, atol=0)
    # It lies on the way from the image to what is wanted.
    fraction = (found * inside).flatten(1).sum(1) / inside.square().flatten(1).sum(1).clamp(min=1e-30)
    torch.testing.assert_close(found, fraction.view(-1, 1, 1, 1) * inside, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("above", [1e-3, 1e-2, 0.1])
def test_a_global_projection_finds_the_budget_where_what_is_spent_is_nearly_flat(above: float) -> None:
    # On black, half a level of brightness spends nearly as much as all of them: no square law of the share.
    black = torch.zeros(1, 1, 2, 8)
    wanted = black.clone()
    wanted[..., :2] = 1
    budget = SSIM(0.25 * (1 - above), patch=2)
    found = budget.project(wanted, black)
    expected = math.sqrt(LEVEL * (1 - above) / above)  # the root of m^2 / (m^2 + c1) = 1 - above
    torch.testing.assert_close(found, expected * wanted, rtol=5e-3, atol=0)
    assert float(budget.distance(found, black)) == pytest.approx(budget.eps, rel=1e-4)


@pytest.mark.parametrize("mode", ["global", "local"])
@every_patch
def test_a_perturbation_inside_is_left_alone(mode: str, patch: int) -> None:
    images = 0.2 + 0.6 * pictures(3, (9, 13))
    changes = drawn(images, 1e-3)
    budget = SSIM(0.3, patch=patch, mode=mode)
    assert bool((budget.distance(changes, images) < 0.3).all())
    torch.testing.assert_close(budget.project(changes, images), changes, rtol=0, atol=1e-6)


@sampled("patch, size, eps", PATCHES, SIZES, [1e-3, 0.02, 0.3])
def test_a_local_step_brings_every_patch_to_both_its_bounds(
    patch: int, size: tuple[int, int], eps: float
) -> None:
    images = pictures(3, size)
    gradient = drawn(images, 1.0)
    for start in (torch.zeros_like(images), SSIM(eps, patch=patch).project(drawn(images, 0.1, 5), images)):
        reached = start + SSIM(eps, patch=patch, mode="local").steepest_step(gradient, start, images)
        for image, change in zip(images.double(), reached.double(), strict=True):
            for before, moved in zip(blocks(image, patch), blocks(change, patch), strict=True):
                level, structure = distances(before.tolist(), (before + moved).tolist())
                assert level == pytest.approx(eps, rel=2e-3)
                assert structure == pytest.approx(eps if len(before) > 1 else 0, rel=2e-3)


@sampled("patch, size, begun", PATCHES, SIZES, [False, True])
def test_a_global_step_meets_the_conditions_of_lagrange(
    patch: int, size: tuple[int, int], begun: bool
) -> None:
    """Under denominators held where the perturbed image is, the budget's slope is parallel to the gradient."""
    images = pictures(3, size)
    budget = SSIM(0.02, patch=patch, level=1)
    start = budget.project(drawn(images, 0.1, seed=5), images) if begun else torch.zeros_like(images)
    gradient = drawn(images, 1.0)
    steps = budget.steepest_step(gradient, start, images)
    for row in zip(images.double(), start.double(), gradient.double(), steps.double(), strict=True):
        spent, slopes, gains = 0.0, [], []
        for before, change, slope, step in zip(*(blocks(each, patch) for each in row), strict=True):
            old, _, old_energy = moments(before.tolist())
            new, _, new_energy = moments((before + change).tolist())
            mean, centered, square = moments(step.tolist())
            structure = old_energy + new_energy + (len(before) - 1) * STRUCTURE
            level = old**2 + new**2 + LEVEL
            spent += mean**2 / level + (square / structure if len(before) > 1 else 0)
            # Half the derivatives by every pixel of what is spent.
            slopes += [
                (value / structure if len(before) > 1 else 0) + mean / level / len(before)
                for value in centered
            ]
            gains += slope.tolist()
        count = len(list(blocks(row[0], patch)))
        assert spent / count == pytest.approx(0.02, rel=1e-4)
        found, wanted = torch.tensor(slopes), torch.tensor(gains)
        multiplier = float((found * wanted).sum() / wanted.square().sum())
        assert multiplier > 0
        torch.testing.assert_close(
            found, multiplier * wanted, rtol=1e-3, atol=1e-3 * multiplier * float(wanted.abs().max())
        )


def solved(image: Tensor, eps: float, goal: Any) -> Tensor:
    """The change of one patch that is best by cvxpy, the definition written as it stands, without the box."""
    cvxpy = pytest.importorskip("cvxpy")
    before = image.flatten().double().numpy()
    count = len(before)
    mean, centered = float(before.mean()), before - before.mean()
    level, part = cvxpy.Variable(), cvxpy.Variable(count)
    # |u - v|^2 <= e (|u|^2 + |v|^2 + c), unfolded so that both sides are convex in v.
    energy = float(centered @ centered)
    inside = [
        cvxpy.sum(part) == 0,
        (1 - eps) * cvxpy.sum_squares(part) - 2 * (centered @ part) + (1 - eps) * energy
        <= eps * (count - 1) * STRUCTURE,
        (1 - eps) * cvxpy.square(level) - 2 * mean * level + (1 - eps) * mean**2 <= eps * LEVEL,
    ]
    precise = {f"tol_{kind}": 1e-13 for kind in ("gap_abs", "gap_rel", "feas")}
    cvxpy.Problem(goal(cvxpy, part + level - before), inside).solve(solver=cvxpy.CLARABEL, **precise)
    return torch.from_numpy(part.value + level.value - before).view_as(image)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
@pytest.mark.parametrize("eps", [1e-3, 0.05, 0.5])
@pytest.mark.parametrize("side", [2, 4, 8])
@pytest.mark.parametrize("contrast", [0.01, 0.3, 1.0])
def test_a_local_step_is_cvxpys_maximizer(eps: float, side: int, contrast: float) -> None:
    image = 0.5 + contrast * (pictures(1, (side, side))[:1] - 0.5)
    gradient = drawn(image, 1.0)
    slope = (gradient / gradient.norm()).double().flatten().numpy()
    expected = solved(image, eps, lambda cvxpy, change: cvxpy.Maximize(slope @ change))
    found = SSIM(eps, patch=side, mode="local").steepest_step(gradient, torch.zeros_like(image), image)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
@pytest.mark.parametrize("eps", [1e-3, 0.02])
@pytest.mark.parametrize("side", [2, 4, 8])
@pytest.mark.parametrize("scale", [0.01, 0.1, 3.0])
def test_a_local_projection_inside_the_box_is_cvxpys_nearest_point(
    eps: float, side: int, scale: float
) -> None:
    image = 0.5 + 0.3 * (pictures(1, (side, side))[:1] - 0.5)
    # The projection clips to the box first; what it is given here is inside already.
    wanted = (image + drawn(image, scale)).clamp(0, 1) - image
    goal = wanted.double().flatten().numpy()
    expected = solved(image, eps, lambda cvxpy, change: cvxpy.Minimize(cvxpy.sum_squares(change - goal)))
    assert 0 < float((image + expected).min()) < float((image + expected).max()) < 1
    found = SSIM(eps, patch=side, mode="local").project(wanted, image)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@every_patch
@pytest.mark.parametrize("mode", ["global", "local"])
def test_black_and_constant_patches_may_change_as_much_as_the_constants_allow(patch: int, mode: str) -> None:
    # One patch, black: d1^2 = m^2 / (m^2 + c1) <= e is m^2 <= c1 e / (1 - e).
    black = torch.zeros(1, 1, patch, patch)
    brighter = SSIM(0.1, patch=patch, mode=mode).project(torch.ones_like(black), black)
    expected = math.sqrt(LEVEL * 0.1 / 0.9)
    torch.testing.assert_close(brighter, torch.full_like(black, expected), rtol=1e-4, atol=1e-7)
    # One gray patch whose mean stays: d2^2 = q / (q + C2) <= e is q <= C2 e / (1 - e).
    gray = torch.full_like(black, 0.5)
    texture = drawn(gray, 0.05)
    texture = texture - texture.mean()
    found = SSIM(0.1, patch=patch, mode=mode).project(texture, gray)
    allowed = math.sqrt((patch * patch - 1) * STRUCTURE * 0.1 / 0.9)
    assert float(texture.norm()) > allowed
    torch.testing.assert_close(found, texture * (allowed / texture.norm()), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("eps", [-0.1, 1.0, 1, 2.0, float("nan"), float("inf")])
def test_eps_is_a_share_below_one(eps: float) -> None:
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
