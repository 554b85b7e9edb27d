"""Run commands in the test's process, on tiny networks and small photographs."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from weakspot import _progress, cli, sample_images
from weakspot.cli import output


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Ended]

NETWORKS = """
import torch
from torch import nn

from weakspot import Classifier


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()


class Loud(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = build()

    def forward(self, images):
        print("hello from forward")
        return self.inner(images)


def normalized():
    return Classifier.wrap(build(), mean=[0.5], std=[0.25])


def gray():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 10)).eval()


class Dark(nn.Module):
    # NaN for images whose mean is above 0.9.

    def __init__(self):
        super().__init__()
        self.inner = build()

    def forward(self, images):
        return self.inner(images) + (0 / (0.9 - images.mean((1, 2, 3))).clamp(min=0))[:, None]


def dark():
    return Dark().eval()


class Brittle(nn.Module):
    # NaN for bright images that are not of one color.

    def __init__(self):
        super().__init__()
        self.inner = build()

    def forward(self, images):
        broken = (images.mean((1, 2, 3)) > 0.8) & (images.flatten(1).std(1) > 1e-3)
        return self.inner(images).masked_fill(broken[:, None], torch.nan)


def brittle():
    return Brittle().eval()


class Asserting(nn.Module):
    def forward(self, images):
        assert images.shape[2] == 32
"""
TINY = ("--model", "tiny_networks:build", "--size", "64x64", "--mean", "0", "--std", "1")
NAMES = ["chelsea.png", "coffee.png", "motorcycle.png", "rocket.png"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run `weakspot ARGUMENTS` in a folder of its own, which holds tiny networks in tiny_networks.py."""
    (tmp_path / "tiny_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    # No progress line, however slow the machine is.
    monkeypatch.setattr(_progress, "FIRST_LINE", 3600.0)
    monkeypatch.setattr(output, "busy_remark", lambda: None)
    monkeypatch.setattr("weakspot.report.figures.SHEET_ROWS", 4)

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["weakspot", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return Ended(int(stopped.value.code or 0), captured.out, captured.err)

    yield call
    sys.modules.pop("tiny_networks", None)


@pytest.fixture(scope="session")
def drawn_photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    images, names = sample_images((64, 64))
    for image, name in zip(images, names, strict=True):
        save(image, folder / f"{name}.png")
    return folder


@pytest.fixture
def photographs(tmp_path: Path, drawn_photographs: Path) -> Path:
    """A folder of four photographs of 64 x 64 pixels, the test's own."""
    return Path(shutil.copytree(drawn_photographs, tmp_path / "photos"))


def save(image: torch.Tensor, path: Path) -> None:
    """Write an image (C, H, W) as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(path)
