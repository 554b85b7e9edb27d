"""Captum on the same network and images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.networks import NETWORKS, Made
from weakspot.attribution import class_activation, margin_drop
from weakspot.explanations import overlap
from weakspot.pairs import Pairs

captum = pytest.importorskip("captum.attr")
pytestmark = pytest.mark.peers

CLASSES = torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    ("network", "layer", "cells"),
    [
        ("flat, gray, two classes, not square", "convolution", 8 * 6),
        ("pooling", "stem", 10 * 10),
        ("pooling", "stem.1", 10 * 10),
        ("pooling", "branch", 10 * 10),
        ("normalized", "network.stem.0", 9 * 13),
    ],
)
def test_grad_cam_is_captums_times_the_number_of_cells(network: str, layer: str, cells: int) -> None:
    """Captum averages gradients over the map, we sum them as plain CAM does."""
    model, images = NETWORKS[network]()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # captum reads what an in-place operation behind the layer made of it
    module = model.get_submodule(layer)
    cam = captum.LayerGradCam(model, module).attribute(images, target=CLASSES, relu_attributions=False)
    assert cam.shape[2] * cam.shape[3] == cells
    expected: Tensor = captum.LayerAttribution.interpolate(cells * cam, tuple(images.shape[2:]), "bilinear")
    found = class_activation(model, images, CLASSES, layer=layer)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


def test_the_margin_drop_is_captums_integrated_gradients_of_competing_less_label(any_model: Made) -> None:
    model, images = any_model
    with torch.no_grad():
        order = model(images).argsort(1, descending=True)
    labels, competing = order[:, 0], order[:, 1]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    adversarial = (0.6 * images + 0.05 * noise).clamp(0, 1)
    drop = margin_drop(model, images, adversarial, labels, competing)
    gradients = captum.IntegratedGradients(model)
    open_ = torch.ones(3, dtype=torch.bool)
    for points in (16, 32, 64, 128, 256):  # ours takes the first that is complete within one percent
        of_label, of_competing = (
            gradients.attribute(
                adversarial, baselines=images, target=classes, n_steps=points, method="gausslegendre"
            )
            for classes in (labels, competing)
        )
        sites = (of_competing - of_label).sum(1, keepdim=True).float()
        complete = (sites.flatten(1).sum(1) - drop.total).abs() <= 0.01 * drop.total.abs()
        now = open_ & complete
        torch.testing.assert_close(drop.sites[now], sites[now], rtol=1e-3, atol=1e-5)
        open_ &= ~complete
    assert not bool(open_.any())


def test_importance_by_gradient_is_the_norm_of_captums_saliency(any_model: Made) -> None:
    model, images = any_model
    saliency = captum.Saliency(model).attribute(images.clone().requires_grad_(), target=CLASSES, abs=False)
    found = overlap(model, Pairs(images, images.flip(3), CLASSES, 1 - CLASSES), importance="gradient")
    torch.testing.assert_close(found.importance, saliency.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-6)
