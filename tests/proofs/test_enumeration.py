"""Certificates by enumeration against brute force over all 8-bit colors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.networks import NETWORKS, Wrapped, seeded, untouched
from weakspot import certify_pixels
from weakspot.classifier import Classifier
from weakspot.edits import prepare
from weakspot.proofs.enumeration import NetworkRuns, eight_bit_colors, levels_between

GRAYS = torch.arange(256).float() / 255


def weakened(network: nn.Module, images: Tensor, part: float = 0.95) -> tuple[nn.Module, Tensor]:
    """The network with a lead of the other classes, so that single pixels flip, and the labels it had.

    Each image's own class loses the given part of its margin by a constant shift of the logits.
    """
    with torch.no_grad():
        logits = network(images[:1])
    labels = logits.argmax(1)
    gap = logits.max(1).values - logits.topk(2).values[:, 1]
    shift = torch.zeros(logits.shape[1])
    shift[labels] = -part * gap
    return Wrapped(network, after=lambda output: output + shift).eval(), labels


def brute_force(network: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    """(H, W) 1 where no gray of the pixel changes the class, else -1."""
    _, _, height, width = image.shape
    status = torch.zeros(height, width, dtype=torch.int8)
    for row in range(height):
        for column in range(width):
            edited = image.repeat(256, 1, 1, 1)
            edited[:, 0, row, column] = GRAYS
            with torch.no_grad():
                status[row, column] = 1 if bool((network(edited).argmax(1) == label).all()) else -1
    return status


def gray_network() -> tuple[nn.Module, Tensor]:
    return NETWORKS["flat, gray, two classes, not square"]()


def gray_tokens() -> tuple[nn.Module, Tensor]:
    """A network that no bounds cover."""
    return seeded(
        lambda: nn.Sequential(nn.Conv2d(1, 6, 3), nn.GELU(), nn.Flatten(), nn.Linear(6 * 6 * 4, 3)), 1, 8, 6
    )


@pytest.mark.parametrize("made", [gray_network, gray_tokens])
def test_8bit_grays_equal_brute_force(made: object) -> None:
    network, images = made()  # type: ignore[operator]
    network, labels = weakened(network, images)
    with untouched(network, images):
        certificate = certify_pixels(network, images[:1], labels, colors="8bit")
    expected = brute_force(network, images[:1], labels)
    assert -1 in expected
    assert 1 in expected
    assert torch.equal(certificate.status[0], expected)
    assert len(certificate.counterexamples) == int((expected == -1).sum())
    with torch.no_grad():
        assert bool((network(certificate.counterexamples.adversarial).argmax(1) != labels).all())


def test_every_pixel_of_a_misclassified_image_is_refuted_by_its_own_color() -> None:
    network, images = gray_network()
    with torch.no_grad():
        labels = 1 - network(images).argmax(1)
    certificate = certify_pixels(network, images, labels)
    assert bool((certificate.status == -1).all())
    pairs = certificate.counterexamples
    assert torch.equal(pairs.clean, pairs.adversarial)


def test_no_counterexamples_are_pairs_without_rows(tmp_path: Path) -> None:
    linear = nn.Linear(4, 2)
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.copy_(torch.tensor([3.0, 0.0]))
    network = nn.Sequential(nn.Flatten(), linear).eval()
    certificate = certify_pixels(network, torch.rand(2, 1, 2, 2), torch.tensor([0, 0]), colors="8bit")
    assert bool((certificate.status == 1).all())
    assert len(certificate.counterexamples) == 0
    record = json.loads(certificate.to_json(tmp_path / "proof.json").read_text("utf-8"))
    assert record["status"] == certificate.status.tolist()
    assert len(record["boxes"]["pixels"]) == 8


def test_8bit_colors_of_a_box_are_all_and_only_those_inside() -> None:
    low = torch.tensor([[0.0, 0.5], [100 / 255 + 1e-6, 0.999]], dtype=torch.float64)
    high = torch.tensor([[2 / 255, 0.51], [102 / 255 + 1e-6, 1.0]], dtype=torch.float64)
    owners, colors = eight_bit_colors(*levels_between(low, high))
    expected = {
        (box, round(float(a), 6), round(float(b), 6))
        for box in range(2)
        for a in GRAYS.double()
        for b in GRAYS.double()
        if low[box, 0] <= a <= high[box, 0] and low[box, 1] <= b <= high[box, 1]
    }
    rows = zip(owners.tolist(), colors.tolist(), strict=True)
    found = [(box, round(a, 6), round(b, 6)) for box, (a, b) in rows]
    assert len(found) == len(set(found))
    assert set(found) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"colors": "half"}, 'colors must be "full", "8bit", a radius'),
        # A number whose digits would fill the memory.
        ({"colors": "1e99999999"}, 'colors must be "full", "8bit", a radius'),
        ({"colors": 8.0}, r"did you mean 8/255\?"),
        ({"colors": "8bit:1/500"}, "at least 1/255"),
        ({"seconds": 0}, "seconds must be a number above 0"),
        ({"statement": "proven"}, "statement must be"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(arguments: dict[str, object], message: str) -> None:
    network, images = gray_network()
    with pytest.raises(ValueError, match=message):
        certify_pixels(network, images, torch.zeros(3, dtype=torch.long), **arguments)  # type: ignore[arg-type]


def test_near_ties_of_two_classes_are_run_again() -> None:
    """The range of two logits is their margin: it cannot tell whether the margin is small."""

    def logits(images: Tensor) -> Tensor:
        score = images[:, 0, 1, 1] - 0.5
        return torch.stack([score, -score], 1)

    network = Classifier.wrap(Wrapped(logits).eval())
    image = torch.full((1, 1, 4, 4), 0.9)
    runs = NetworkRuns(network, image, torch.tensor([0]), prepare(network, image))
    values = torch.tensor([[0.500001], [0.9], [0.1]], dtype=torch.float64)
    margins, near = runs.margins(torch.ones(3).long(), torch.ones(3).long(), values)
    assert (margins < near).tolist() == [True, False, True]
