"""Searches for one pixel whose candidates go by windows equal those by whole passes, and are as reproducible."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from weakspot.attacks import few_pixel, pixel_search
from weakspot.edits import Edits

SIDE = 100


class Strided(nn.Module):
    """Two strided convolutions; most of the work lies where windows are small."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, 2, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
        )
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images).amax((2, 3)))
        return logits


def made(count: int) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, images = Strided().eval(), 0.4 + 0.2 * torch.rand(count, 3, SIDE, SIDE)
    with torch.no_grad():
        model.head.bias.sub_(model(images).mean(0))
        return model, images, model(images).argmax(1)


def through(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts of edits, call by call, that go through `Edits` from now on."""
    seen: list[int] = []
    logits = Edits.logits

    def watched(self: Edits, owners: Tensor, tops: Tensor, lefts: Tensor, patches: Tensor) -> Tensor:
        seen.append(len(owners))
        return logits(self, owners, tops, lefts, patches)

    monkeypatch.setattr(Edits, "logits", watched)
    return seen


@pytest.mark.parametrize("method", ["evolution", "guided"])
def test_the_search_is_the_same_as_by_whole_passes(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, labels = made(3)
    seen = through(monkeypatch)
    by_windows = few_pixel(model, images, labels, method=method, population=20, generations=4)
    assert seen
    monkeypatch.setattr(pixel_search, "LARGE", SIDE * SIDE + 1)
    seen.clear()
    whole = few_pixel(model, images, labels, method=method, population=20, generations=4)
    assert not seen
    assert torch.equal(by_windows.adversarial, whole.adversarial)
    assert torch.equal(by_windows.n_forward, whole.n_forward)
    assert torch.equal(by_windows.success, whole.success)


@pytest.mark.parametrize("method", ["evolution", "guided"])
def test_an_images_result_depends_on_no_batch_size_and_no_neighbor(method: str) -> None:
    model, images, labels = made(3)
    together = few_pixel(model, images, labels, method=method, population=20, generations=4)
    alone = few_pixel(
        model, images[1:2], labels[1:2], method=method, population=20, generations=4, batch_size=1
    )
    turned = few_pixel(model, images.flip(0), labels.flip(0), method=method, population=20, generations=4)
    assert torch.equal(together.adversarial[1:2], alone.adversarial)
    assert torch.equal(together.adversarial, turned.adversarial.flip(0))


def test_several_pixels_of_an_evolution_go_through_the_network_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, labels = made(1)
    seen = through(monkeypatch)
    few_pixel(model, images, labels, count=2, population=8, generations=1)
    assert not seen


def test_small_images_and_networks_of_one_glance_go_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = through(monkeypatch)
    model, images, labels = made(1)
    small = images[:, :, :64, :64]
    few_pixel(model, small, model(small).argmax(1), population=8, generations=1)
    glance = nn.Sequential(nn.Conv2d(3, 2, SIDE), nn.Flatten()).eval()
    few_pixel(glance, images, glance(images).argmax(1), population=8, generations=1)
    assert not seen
    few_pixel(model, images, labels, population=8, generations=1)
    assert seen
