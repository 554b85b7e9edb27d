"""SSIM alignment on real networks: calibrated on unrelated images, and silent where the control explains it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from weakspot import SSIM, Classifier, attacks, ssim_alignment
from weakspot.classifier import predict
from weakspot.explanations.alignment_findings import STATISTICS, alignment
from weakspot.statistics import other_image_test

pytestmark = [pytest.mark.data, pytest.mark.slow]


@pytest.fixture
def networks(data: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("networks", data / "networks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "count"), [("mobilenet_v2_1.0_224", 40), ("cifar10_resnet20", 200)])
def test_an_ssim_attack_goes_with_its_image_no_more_than_variance_and_gradient(
    networks: ModuleType, name: str, count: int
) -> None:
    images, _ = networks.imagenet(count) if name.startswith("mobile") else networks.cifar10("test", count)
    model = Classifier.wrap(networks.network(name))
    labels = predict(model, images).argmax(1)
    found = ssim_alignment(model, attacks.pgd(model, images, labels, budget=SSIM(0.005), steps=10))
    assert found.why_not == ("",) * count
    assert ("other images" in found.exceeded) <= name.startswith("mobile")
    assert "variance_gradient" not in found.exceeded
    assert not found.aligned_overall
    assert not found.aligned.any()
    matrices = alignment(found.change, found.importance)
    for statistic in STATISTICS:
        rates = []
        for shift in range(1, 20):
            unrelated = matrices[statistic][:, torch.arange(count).roll(shift)]
            rates.append(float((other_image_test(unrelated).p <= 0.05).double().mean()))
        assert sum(rates) / len(rates) <= 0.10, statistic
