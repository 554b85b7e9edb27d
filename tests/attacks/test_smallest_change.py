"""The smallest change: closed forms in the box, brute force, and the case in which `fmn` ends far too high."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.attacks.test_few_pixels import convolutional
from tests.attacks.test_gradient import predicted
from tests.networks import LinearNetwork, Made, Wrapped, doubled, untouched
from weakspot import load, sample_images
from weakspot.attacks import fmn, minimal_pgd
from weakspot.attacks.confined import cropped
from weakspot.attacks.context import AttackOptions, attack_context
from weakspot.attacks.first_order import estimate_places, linearize
from weakspot.edits import Crops


def linear(shape: tuple[int, int, int], classes: int) -> nn.Module:
    torch.manual_seed(0)
    count = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(count, classes)).eval()


def square(size: tuple[int, int], top: int, left: int, side: int) -> Tensor:
    region = torch.zeros(1, 1, *size, dtype=torch.bool)
    region[:, :, top : top + side, left : left + side] = True
    return region


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("part", ["everywhere", "rows", "small"])
def test_on_a_linear_network_it_finds_the_smallest_change_in_the_box(norm: str, part: str) -> None:
    """The closed form counts the room to black and white, and takes the nearest of all classes."""
    model = linear((3, 8, 8), 5)
    torch.manual_seed(1)
    images = torch.rand(6, 3, 8, 8).round(decimals=1)
    labels = model(images).argmax(1)
    region = {
        "everywhere": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "rows": (torch.arange(8) % 2 == 0)[None, None, :, None].expand(1, 1, 8, 8),
        "small": square((8, 8), 2, 3, 4),
    }[part]
    with attack_context(model, images, labels, AttackOptions(region=region)) as problem:
        exact = estimate_places(linearize(problem), problem.region[:, None], norm)[:, 0].amin(1)
    result = minimal_pgd(model, images, labels, region=region, norm=norm, on_grid=False)
    size = result.perturbation.flatten(1).norm(p=torch.inf if norm == "linf" else 2, dim=1)
    assert result.success.tolist() == exact.isfinite().tolist()
    ratio = (size / exact)[result.success]
    assert len(ratio) >= 3
    assert bool(((ratio >= 1 - 1e-5) & (ratio <= 1.02)).all()), ratio


def test_it_comes_near_the_best_of_all_corners_of_the_ball_in_a_tiny_region() -> None:
    """Brute force: at a radius, each of four values is lowered, kept or raised; radii go up by one percent."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(150, 8), nn.ReLU(), nn.Linear(8, 3)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    images = torch.rand(12, 1, 5, 5)
    labels = model(images).argmax(1)
    region = square((5, 5), 1, 1, 2)
    result = minimal_pgd(model, images, labels, region=region, on_grid=False)
    signs = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=4))).view(-1, 1, 2, 2)
    radii = 1.01 ** torch.arange(-400.0, 1)
    compared = 0
    for image, label, size, fooled in zip(
        images, labels, result.perturbation.abs().amax((1, 2, 3)), result.success, strict=True
    ):
        # (radii, signs): every corner of every ball.
        corners = image.repeat(len(radii), len(signs), 1, 1, 1)
        corners[..., 1:3, 1:3] = (corners[..., 1:3, 1:3] + radii.view(-1, 1, 1, 1, 1) * signs).clamp(0, 1)
        with torch.no_grad():
            enough = (model(corners.flatten(0, 1)).argmax(1) != label).view(len(radii), -1).any(1)
        assert bool(fooled) == bool(enough.any())
        if bool(enough.any()):
            compared += 1
            assert float(size) <= 1.03 * float(radii[enough][0])
    assert compared >= 3


class Bent(nn.Module):
    """One pixel decides. Its gradient at the clean image is a twentieth of what it is a little farther away."""

    def forward(self, images: Tensor) -> Tensor:
        change = images[:, 0, 0, 0] - 0.1
        score = 0.05 - torch.where(change < 0.002, 0.05 * change, change - 0.0019)
        return torch.stack([score, -score], 1)


def test_it_corrects_a_first_guess_that_is_far_off_where_fmn_with_few_steps_does_not() -> None:
    model, images = Bent().eval(), torch.full((1, 1, 6, 6), 0.1)
    labels, region = torch.zeros(1, dtype=torch.long), square((6, 6), 0, 0, 2)
    exact = 0.0519
    ours = minimal_pgd(model, images, labels, region=region, on_grid=False)
    theirs = fmn(model, images, labels, region=region, on_grid=False, steps=30)
    assert bool(ours.success[0] & theirs.success[0])
    assert exact * (1 - 1e-5) <= float(ours.perturbation.abs().max()) <= 1.02 * exact
    assert float(theirs.perturbation.abs().max()) > 4 * exact  # its radius shrinks too slowly


def test_another_class_is_reached_where_the_nearest_to_first_order_is_out_of_reach() -> None:
    """Class 1 is nearest to first order, but saturates before it wins; class 2 wins at 0.3."""

    class Decoy(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raised = images.mean((1, 2, 3)) - 0.2
            decoy = 0.8 - torch.relu(0.05 - raised) * 16
            return torch.stack([torch.ones_like(raised), decoy, raised / 0.3], 1)

    images, labels = torch.full((1, 1, 4, 4), 0.2), torch.zeros(1, dtype=torch.long)
    result = minimal_pgd(Decoy().eval(), images, labels, on_grid=False)
    assert bool(result.success[0])
    assert int(result.targets[0]) == 2
    assert 0.3 <= float(result.perturbation.abs().max()) <= 0.306


def test_a_target_is_reached_and_costs_at_least_as_much_as_any_other_class() -> None:
    model, images = convolutional((3, 8, 8), 4)
    labels = predicted(model, images)
    targets = (labels + 2) % int(model(images).shape[1])
    aimed = minimal_pgd(model, images, labels, targets=targets, on_grid=False)
    free = minimal_pgd(model, images, labels, classes=3, on_grid=False)
    assert bool((model(aimed.adversarial).argmax(1) == targets)[aimed.success].all())
    assert bool(aimed.success.any())
    sizes = (one.perturbation.abs().amax((1, 2, 3)) for one in (aimed, free))
    larger, smaller = sizes
    assert bool((smaller <= 1.02 * larger)[aimed.success & free.success].all())


def test_results_are_in_region_and_range_and_the_model_is_untouched(any_model: Made) -> None:
    model, images = any_model
    labels = model(images).argmax(1)
    height, width = images.shape[2:]
    region = torch.zeros(3, 1, height, width, dtype=torch.bool)
    region[0, :, :3, :3] = True
    region[1, :, -4:, 2:5] = True  # the third image may not change at all
    with untouched(model, images, labels, region):
        result = minimal_pgd(model, images, labels, region=region)
    assert torch.equal(result.adversarial.where(~region, 0), images.where(~region, 0))
    assert 0 <= float(result.adversarial.min()) <= float(result.adversarial.max()) <= 1
    assert torch.equal(model(result.adversarial).argmax(1) != labels, result.success)
    assert not bool(result.success[2])


def test_an_image_that_is_misclassified_already_is_returned_as_it_is(pooling: Made) -> None:
    model, images = pooling
    labels = (model(images).argmax(1) + 1) % 4
    result = minimal_pgd(model, images, labels, on_grid=False)
    assert bool(result.success.all())
    assert torch.equal(result.adversarial, images)


@pytest.mark.parametrize("small", [pytest.param(False, marks=pytest.mark.slow), True])
def test_results_depend_on_no_batch_size_and_no_neighbor(pooling: Made, small: bool) -> None:
    model, images = doubled(pooling)
    labels = model(images).argmax(1)
    region = square((20, 20), 4, 6, 6) if small else torch.ones(1, 1, 20, 20, dtype=torch.bool)
    options: dict[str, Any] = {"region": region, "on_grid": False}
    together = minimal_pgd(model, images, labels, **options).adversarial
    for size in (1, 2):
        parts = [
            minimal_pgd(model, images[rows], labels[rows], batch_size=size, **options).adversarial
            for rows in torch.arange(3).split(size)
        ]
        torch.testing.assert_close(torch.cat(parts), together, rtol=0, atol=1e-6)


def test_crops_have_the_margins_and_gradients_of_whole_images(any_model: Made) -> None:
    model, images = any_model
    labels = model(images).argmax(1)
    height, width = images.shape[2:]
    masks = torch.zeros(6, 1, height, width, dtype=torch.bool)
    owners = torch.arange(6) % 3
    for number in range(6):
        masks[number, :, number : number + 3, number // 2 : number // 2 + 2 + number % 2] = True
    with attack_context(model, images, labels) as problem:
        part = cropped(problem, masks, owners)
        assert isinstance(part.crops, Crops)
        points = part.apply(torch.full_like(part.clean, 0.05))
        ours = part.loss_and_gradient(points)
        whole = part.crops.whole(points)
        assert torch.equal(whole.where(~masks, 0), images[owners].where(~masks, 0))
        theirs = problem.select(owners).loss_and_gradient(whole)
    torch.testing.assert_close(ours.margins, theirs.margins, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        part.crops.whole(ours.direction).where(masks, 0),
        theirs.direction.where(masks, 0),
        rtol=1e-3,
        atol=1e-4,
    )


def test_crops_of_a_network_with_a_backward_pass_of_its_own_use_that() -> None:
    """A straight-through defense: its forward pass rounds, and a recording of it has no gradient."""

    class Rounding(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, images: Tensor) -> Tensor:
            return (images * 64).round() / 64

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient

    torch.manual_seed(0)
    model = Wrapped(LinearNetwork(torch.randn(3, 12, 12)), before=Rounding.apply).eval()
    images = torch.rand(2, 3, 12, 12)
    labels = model(images).argmax(1)
    result = minimal_pgd(model, images, labels, region=square((12, 12), 3, 3, 5), on_grid=False)
    assert bool((result.perturbation != 0).flatten(1).any(1).all())


@pytest.mark.parametrize(
    ("argument", "value"), [("steps", 0), ("rounds", -1), ("classes", 0), ("norm", "l1")]
)
def test_a_wrong_argument_is_refused_by_name(pooling: Made, argument: str, value: object) -> None:
    model, images = pooling
    with pytest.raises(ValueError, match=rf"^{argument} must be "):
        minimal_pgd(model, images, torch.zeros(3, dtype=torch.long), **{argument: value})  # type: ignore[arg-type]


class TwoSides(nn.Module):
    """One pixel x = 0.5 whose gradient leads upward to a change of 0.4, while 0.1 downward is enough.

    With d = x - 0.5, the margin is 0.2 - 2 min(d, 0.09) - 0.065 max(d - 0.09, 0) - 8 max(-d - 0.05, 0): its first-order
    distance is 0.1, the upward boundary lies at 0.09 + 0.02 / 0.065 = 0.398 and the downward one at 0.1.
    """

    def forward(self, images: Tensor) -> Tensor:
        d = images.flatten(1)[:, :1] - 0.5
        margin = 0.2 - 2 * d.clamp(max=0.09) - 0.065 * (d - 0.09).clamp(min=0) - 8 * (-d - 0.05).clamp(min=0)
        return torch.cat([margin, torch.zeros_like(margin)], 1)


def test_a_nearer_change_against_the_gradient_is_found_from_a_corner() -> None:
    image, label = torch.full((1, 1, 1, 1), 0.5), torch.zeros(1, dtype=torch.long)
    result = minimal_pgd(TwoSides().eval(), image, label, on_grid=False)
    assert result.success.all()
    torch.testing.assert_close(result.perturbation.flatten(), torch.tensor([-0.1]), rtol=0.02, atol=0)


class OneCorner(nn.Module):
    """Class 1 wins in one corner of the box only; from near the clean image, gradients lead to the opposite one."""

    signs: Tensor

    def __init__(self) -> None:
        super().__init__()
        signs = torch.tensor([1, -1, -1, 1, 1, -1, 1, 1, -1, 1, -1, -1, -1, 1, 1, -1.0])
        self.register_buffer("signs", signs.view(1, 1, 4, 4))

    def forward(self, images: Tensor) -> Tensor:
        along = ((images[:, :, 1:5, 1:5] - 0.5) * self.signs).sum((1, 2, 3), keepdim=True)[:, :, 0, 0] / 8
        return torch.cat([1 - 0.9 * torch.relu(-along) - 1.02 * torch.relu(along), 0 * along], 1)


class ThinBasin(nn.Module):
    """Class 1 wins only where each value is near one of its own, far from the clean image and inside the box."""

    def forward(self, images: Tensor) -> Tensor:
        wanted = 0.7 + 0.015 * torch.arange(16.0).view(1, 1, 4, 4)
        far = (images[:, :, 1:5, 1:5] - wanted).abs().mean((1, 2, 3))[:, None]
        return torch.cat([far - 0.012, 0 * far], 1)


@pytest.mark.parametrize("planted", [OneCorner(), ThinBasin()])
def test_the_only_change_far_from_the_image_is_found(planted: nn.Module) -> None:
    """Both need most of the way to black or white, where steps as long as the ball pass over it or lead elsewhere."""
    image, label = torch.full((1, 1, 6, 6), 0.1), torch.zeros(1, dtype=torch.long)
    if isinstance(planted, OneCorner):
        image[:, :, 1:5, 1:5] = 0.45 - 0.03 * planted.signs
    region = square((6, 6), 1, 1, 4)
    result = minimal_pgd(planted.eval(), image, label, region=region, on_grid=False)
    assert result.success.all()
    assert float(result.perturbation.abs().max()) > 0.5


@pytest.mark.slow
def test_a_cell_far_from_linear_needs_no_more_than_twice_what_another_library_finds() -> None:
    """Foolbox's FMN finds 8.8/255 with 300 steps in this cell; steepest steps alone end at 68/255."""
    model = load("efficientnet_lite0", device="cpu")
    image = sample_images()[0][1:2]
    region = square((224, 224), 96, 192, 32)
    found = minimal_pgd(model, image, model(image).argmax(1), region=region, on_grid=False)
    assert bool(found.success.all())
    assert 255 * float(found.perturbation.abs().max()) < 2 * 8.8
