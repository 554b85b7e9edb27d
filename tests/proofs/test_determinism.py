"""Networks that no certificate can be about: random ones, and those that mix the images of a batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.networks import Made, untouched
from weakspot._checks import NotFiniteError
from weakspot.classifier import as_classifier
from weakspot.proofs import certify_patches, certify_pixels, check_certificate
from weakspot.proofs.determinism import check_deterministic


def layers(between: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), between, nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
        ).eval()


class SeldomFlips(nn.Module):
    """Class 0, and once in a thousand images class 1: comparing a few runs does not show it."""

    def forward(self, images: Tensor) -> Tensor:
        flips = torch.rand(len(images), device=images.device) < 0.001
        score = torch.where(flips, -1.0, 1.0) + 0 * images.flatten(1).sum(1)
        return torch.stack([score, -score], 1)


class Counts(nn.Module):
    """Every call gives other logits, without any random number."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        score = images.flatten(1).sum(1) + 0.01 * self.calls
        return torch.stack([score, 9 - score], 1)


class DrawsByItself(nn.Module):
    """Noise from a generator of its own, always the same: no random network."""

    def forward(self, images: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        noise = torch.rand(images.shape[1:], generator=generator).to(images)
        score = (images + noise).flatten(1).mean(1)
        return torch.stack([score, 1 - score], 1)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "random": (lambda: SeldomFlips().eval(), r"SeldomFlips draws random numbers \(aten"),
    "batch statistics": (
        lambda: layers(nn.BatchNorm2d(4, track_running_stats=False)),
        "Sequential gives an image other logits beside other images",
    ),
    "a counter": (lambda: Counts().eval(), "Counts gives the same image other logits when asked again"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_nothing_is_certified_of_a_network_that_changes_its_mind(
    make: Callable[[], nn.Module], words: str, tmp_path: Path
) -> None:
    images, labels = torch.full((1, 1, 4, 4), 0.5), torch.tensor([0])
    sentence = f"^the network must give an image the same logits each time to be certified, but {words}"
    with pytest.raises(ValueError, match=sentence):
        certify_pixels(make(), images, labels, colors="8bit")
    with pytest.raises(ValueError, match=sentence):
        certify_patches(make(), images, labels, patch=1, masks=2)
    # A certificate that someone wrote without this test is not confirmed either.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weakspot.proofs.two_masks.check_deterministic", lambda *_: None)
        certify_patches(make(), images, labels, patch=1, masks=2).to_json(tmp_path / "certificate.json")
    with pytest.raises(ValueError, match=sentence):
        check_certificate(make(), tmp_path / "certificate.json", images)


class TurnsBad(nn.Module):
    """Logits that are NaN once it is turned bad, which no fingerprint sees."""

    def __init__(self) -> None:
        super().__init__()
        self.bad = False

    def forward(self, images: Tensor) -> Tensor:
        score = images.flatten(1).sum(1)
        return torch.stack([score, score - 1], 1) * (torch.nan if self.bad else 1)


def test_a_network_that_returns_nan_is_not_said_to_change_its_mind(tmp_path: Path) -> None:
    network, images = TurnsBad().eval(), torch.full((1, 1, 4, 4), 0.5)
    path = certify_patches(network, images, torch.tensor([0]), patch=1, masks=2).to_json(
        tmp_path / "one.json"
    )
    vars(network)["bad"] = True
    with pytest.raises(NotFiniteError, match=r"^TurnsBad returned NaN or infinity"):
        check_certificate(network, path, images)


@pytest.mark.parametrize(
    "network",
    [
        layers(nn.BatchNorm2d(4)),
        layers(nn.Dropout()),
        layers(nn.BatchNorm2d(4)).to(torch.bfloat16),
        DrawsByItself().eval(),
    ],
    ids=["batch norm", "dropout", "half precision", "its own generator"],
)
def test_networks_that_rounding_alone_changes_are_not_accused(network: nn.Module) -> None:
    image = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    check_deterministic(as_classifier(network), image)


def test_no_kind_of_network_is_accused_or_changed(any_model: Made) -> None:
    model, images = any_model
    with untouched(model, images):
        check_deterministic(as_classifier(model), images[:1])
