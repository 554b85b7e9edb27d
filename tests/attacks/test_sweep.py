"""The pixel sweep against brute force, a planted trigger, and searches, whose oracle it is."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from tests.networks import PoolingNetwork
from weakspot import attacks
from weakspot.attacks import pixel_sweep


class Triggered(nn.Module):
    """Class 1 where a filter sees one bright blue pixel in the middle of its window; planted at every place."""

    def __init__(self, reach: int = 3) -> None:
        super().__init__()
        self.reach = reach
        self.look = nn.Conv2d(3, 1, reach, padding=reach // 2, bias=False)
        with torch.no_grad():
            self.look.weight.zero_()
            self.look.weight[0, 2] = 1
            self.look.weight[0, :2] = -1

    def forward(self, images: Tensor) -> Tensor:
        seen = self.look(images)[:, :, 4:5, 6:7].amax((1, 2, 3))
        logits: Tensor = torch.stack([torch.full_like(seen, 0.5), seen], 1)
        return logits


def brute_force(model: nn.Module, image: Tensor, label: int, colors: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest margins (H, W) and classes under the colors reaching them."""
    height, width = image.shape[2:]
    margins, classes = torch.full((height, width), torch.inf), torch.zeros(height, width, dtype=torch.long)
    for row, column, color in itertools.product(range(height), range(width), colors):
        edited = image.clone()
        edited[0, :, row, column] = color
        with torch.no_grad():
            logits = model(edited)[0]
        others = torch.cat([logits[:label], logits[label + 1 :]])
        margin = logits[label] - others.max()
        if margin < margins[row, column]:
            margins[row, column], classes[row, column] = margin, logits.argmax()
    return margins, classes


def corners(channels: int) -> Tensor:
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=channels)))


@pytest.mark.parametrize("channels", [1, 3])
def test_margins_and_classes_equal_brute_force(channels: int) -> None:
    torch.manual_seed(0)
    model = PoolingNetwork(channels).eval()
    images = torch.rand(3, channels, 6, 7)
    labels = model(images).argmax(1)
    found = pixel_sweep(model, images, labels)
    for number in range(3):
        margins, classes = brute_force(
            model, images[number : number + 1], int(labels[number]), corners(channels)
        )
        torch.testing.assert_close(found.margin[number], margins, atol=1e-5, rtol=1e-4)
        clear = margins.abs() > 1e-4
        assert torch.equal(found.predicted[number][clear], classes[clear])
    assert found.n_forward.tolist() == [42 * 2**channels] * 3


def test_the_color_named_reaches_the_margin_named() -> None:
    torch.manual_seed(1)
    model = PoolingNetwork().eval()
    images = torch.rand(2, 3, 8, 5)
    labels = model(images).argmax(1)
    palette = torch.tensor([[0.2, 0.4, 0.6], [1.0, 0.0, 0.5], [0.9, 0.9, 0.1]])
    found = pixel_sweep(model, images, labels, colors=palette)
    for row, column in ((0, 0), (7, 4), (3, 2)):
        edited = images.clone()
        edited[:, :, row, column] = found.color[:, :, row, column]
        assert all((color == palette).all(1).any() for color in found.color[:, :, row, column])
        with torch.no_grad():
            logits = model(edited)
        own = logits.gather(1, labels[:, None])[:, 0]
        competing = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
        torch.testing.assert_close(found.margin[:, row, column], own - competing, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("early", [True, False])
def test_a_planted_trigger_is_found_where_it_is(early: bool) -> None:
    model = Triggered().eval()
    images = torch.zeros(1, 3, 10, 12)
    found = pixel_sweep(model, images, torch.tensor([0]), stop_early=early)
    assert bool(found.success[0])
    weak = (found.margin[0] < 0).nonzero()
    window = {(row, column) for row in range(3, 6) for column in range(5, 8)}
    hits = {tuple(place) for place in weak.tolist()}
    assert hits <= window
    assert early or hits == window
    if early:
        assert int(found.n_forward) <= 512
    pairs = found.pairs(images, torch.tensor([0]))
    with torch.no_grad():
        assert model(pairs.adversarial).argmax(1).tolist() == [1] == pairs.targets.tolist()
    assert pairs.distances["pixels"].tolist() == [1]


def test_a_model_without_a_weak_pixel_is_not_accused() -> None:
    model = Triggered().eval()
    images = torch.zeros(2, 3, 10, 12)
    images[1, :2] = 1  # what the filter holds against the trigger, everywhere
    found = pixel_sweep(model, images, torch.zeros(2, dtype=torch.long))
    assert found.success.tolist() == [True, False]
    assert bool((found.margin[1] > 0).all())


def test_only_the_region_is_tried() -> None:
    torch.manual_seed(2)
    model = PoolingNetwork().eval()
    images = torch.rand(2, 3, 8, 6)
    labels = model(images).argmax(1)
    region = torch.zeros(2, 1, 8, 6, dtype=torch.bool)
    region[0, :, 2:4, 1:3] = True
    region[1, :, 7, 5] = True
    found, everywhere = (pixel_sweep(model, images, labels, region=where) for where in (region, None))
    assert torch.equal(found.margin.isfinite(), region[:, 0])
    torch.testing.assert_close(found.margin[region[:, 0]], everywhere.margin[region[:, 0]])
    outside = ~region.expand(-1, 3, -1, -1)
    assert torch.equal(found.color[outside], images[outside])
    assert found.n_forward.tolist() == [4 * 8, 8]


def test_refined_is_never_weaker_and_batches_change_nothing() -> None:
    torch.manual_seed(3)
    model = PoolingNetwork().eval()
    images = torch.rand(3, 3, 7, 7)
    labels = model(images).argmax(1)
    plain, refined = (pixel_sweep(model, images, labels, colors=name) for name in ("corners", "refined"))
    assert bool((refined.margin <= plain.margin + 1e-6).all())
    lowest = [found.margin.flatten(1).amin(1) for found in (refined, plain)]
    assert bool((lowest[0] <= lowest[1]).all())
    alone = pixel_sweep(model, images[1:2], labels[1:2], batch_size=2)
    torch.testing.assert_close(alone.margin[0], plain.margin[1])


def test_the_oracle_beats_every_search() -> None:
    torch.manual_seed(4)
    model = PoolingNetwork().eval()
    images = torch.rand(6, 3, 8, 8) * 0.1 + 0.45
    labels = model(images).argmax(1)
    oracle = pixel_sweep(model, images, labels)
    for method in ("evolution", "guided"):
        searched = attacks.few_pixel(model, images, labels, method=method, population=40, generations=10)
        assert not bool((searched.success & ~oracle.success).any())


def test_bad_colors_get_one_sentence() -> None:
    model, images, labels = PoolingNetwork().eval(), torch.rand(1, 3, 6, 6), torch.tensor([0])
    with pytest.raises(ValueError, match="did you mean 'corners'"):
        pixel_sweep(model, images, labels, colors="corner")
    with pytest.raises(
        ValueError, match=r"colors must be corners, refined or a float tensor \(K, 3\), got \(2, 1\)"
    ):
        pixel_sweep(model, images, labels, colors=torch.rand(2, 1))
    with pytest.raises(ValueError, match="colors must be between 0 and 1"):
        pixel_sweep(model, images, labels, colors=torch.rand(2, 3) + 1)
