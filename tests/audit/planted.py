"""Pictures with one bright quarter, and networks that depend on it, on all pixels equally, or on the middle."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from weakspot.audit import AttackPlan, ModelPlan, Plan

SIDE = 24
SIZE = (SIDE, SIDE)
NETWORKS = """
import torch
from torch import nn
from torch.nn import functional as F


class Evidence(nn.Module):
    # The lead of the first class is a mean of evidence over sites, so that class activation is that evidence.
    def __init__(self, gain, least, slope, window):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 2, 1), nn.LeakyReLU(slope))
        self.head = nn.Linear(2, 2)
        self.register_buffer("window", window)
        with torch.no_grad():
            self.body[0].weight.fill_(1 / 3)
            self.body[0].weight[1].zero_()
            self.body[0].bias.copy_(torch.tensor([-least, 1.0]))
            self.head.weight.copy_(gain * torch.tensor([[1.0, -self.bias], [-1.0, self.bias]]))
            self.head.bias.zero_()

    bias = 0.0

    def forward(self, images):
        return self.head(self.body(images * self.window).mean((2, 3)))


class Spot(Evidence):
    bias = 0.0165


class Even(Evidence):
    bias = 0.372


class Central(Evidence):
    bias = 0.0645


def spot():
    # Brightness above one half counts fully, the rest counts one twentieth.
    generator = torch.Generator().manual_seed(0)
    return Spot(20.0, 0.5, 0.05, 0.95 + 0.1 * torch.rand(24, 24, generator=generator)).eval()


def even():
    return Even(20.0, 0.0, 1.0, torch.ones(24, 24)).eval()


def central():
    # Every image is weak in the middle, independent of its content.
    axis = torch.linspace(-1, 1, 24)
    return Central(20.0, 0.0, 1.0, torch.exp(-4 * (axis[:, None] ** 2 + axis[None] ** 2))).eval()
"""


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with quarter_networks.py, on the module path and the working directory."""
    (tmp_path / "quarter_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("quarter_networks", None)


def draw_quarters(folder: Path, count: int) -> Path:
    """Pictures with one bright quarter (each of the four equally often) of varying brightness."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.normal(0.3, 0.03, (SIDE, SIDE, 3))
        top, left = divmod(number % 4, 2)
        half = SIDE // 2
        pixels[top * half : (top + 1) * half, left * half : (left + 1) * half] += rng.uniform(0.3, 0.33)
        Image.fromarray((255 * pixels.clip(0, 1)).round().astype(np.uint8)).save(folder / f"{number:03d}.png")
    return folder


def planted_plan(source: Path, network: str, **changes: object) -> Plan:
    """PGD in the quarter with the most evidence, and in its controls."""
    usual = {
        "sources": (str(source),),
        "model": ModelPlan(f"quarter_networks:{network}", size=SIZE),
        "attacks": (AttackPlan("pgd", "linf:8/255", (("steps", 4),)),),
        "regions": ("cam",),
        "controls": True,
        "analyses": (),
        "labels": "predictions",
        "fraction": 0.25,
        "maps": False,
        "shard": 16,
        "group": 16,
    }
    return Plan(**{**usual, **changes})  # type: ignore[arg-type]
