"""Certificates on real networks: equal to all 256 grays run by the network itself, pixel by pixel."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from weakspot import certify_pixels

GRAYS = torch.arange(256).float() / 255
IMAGES = 20


def nearest_to_flipping(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Numbers of 20 correctly classified images: the ten with the least margins, and the first ten."""
    with torch.no_grad():
        logits = torch.cat([network(batch) for batch in images.split(500)])
    top = logits.topk(2).values
    margins = torch.where(logits.argmax(1) == labels, top[:, 0] - top[:, 1], torch.inf)
    order = margins.argsort()
    first = margins.isfinite().nonzero()[:, 0]
    first = first[~torch.isin(first, order[:10])][: IMAGES - 10]
    return torch.cat([order[:10], first])


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist_cnn_a_adv", "mnist_cnn_pgd_eps0.3", "mnist_conv_small_nat"])
def test_mnist_equals_brute_force_over_all_grays(
    name: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(data))
    monkeypatch.delitem(sys.modules, "networks", raising=False)
    import networks  # type: ignore[import-not-found]

    network = networks.network(name)
    images, labels = networks.mnist(count=3000)
    chosen = nearest_to_flipping(network, images, labels)
    certificate = certify_pixels(network, images[chosen], labels[chosen], colors="8bit")
    expected = torch.ones(len(chosen), 784, dtype=torch.int8)
    for number, image in enumerate(images[chosen]):
        for pixel in range(784):
            edited = image.flatten().repeat(256, 1)
            edited[:, pixel] = GRAYS
            with torch.no_grad():
                classes = network(edited.view(256, 1, 28, 28)).argmax(1)
            expected[number, pixel] = 1 if bool((classes == labels[chosen[number]]).all()) else -1
    assert torch.equal(certificate.status.flatten(1), expected)
    refuted = (expected == -1).any(1)
    assert 1 <= int(refuted.sum()) < IMAGES
