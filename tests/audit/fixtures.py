"""Small pictures and networks, runs audited once per session, and assertions that two runs are the same."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from weakspot.audit import AttackPlan, ModelPlan, Plan, Run, audit, open_run
from weakspot.audit.store.digests import file_digest
from weakspot.audit.store.records import TIMES

NETWORKS = """
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, images):
        return self.head(self.body(images).mean((2, 3)))


def build():
    torch.manual_seed(0)
    return Tiny().eval()


def other():
    torch.manual_seed(1)
    return Tiny().eval()


class Silent(nn.Module):
    # NaN for dark images; for bright ones too as soon as they are changed.
    def __init__(self):
        super().__init__()
        self.inner = build()

    def forward(self, images):
        logits = self.inner(images)
        dark = images.mean((1, 2, 3)) < 0.2
        odd = (images.mean((1, 2, 3)) > 0.8) & ((images * 255 - (images * 255).round()).abs().amax((1, 2, 3)) > 1e-3)
        return torch.where((dark | odd)[:, None], torch.nan, logits)


def silent():
    return Silent().eval()


def mute():
    network = build()
    network.head.bias.data.fill_(float("nan"))
    return network


class Hungry(nn.Module):
    def __init__(self, most):
        super().__init__()
        self.inner, self.most = build(), most

    def forward(self, images):
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return self.inner(images)


def hungry():
    return Hungry(8).eval()
"""
FILES = [
    "images.parquet",
    "maps.zarr",
    "records.parquet",
    "run.json",
    "shards",
    "skipped.parquet",
]  # of a whole run
QUICK: dict[str, Any] = {"attacks": (AttackPlan("pgd", settings=(("steps", 2),)),), "analyses": ()}
TINY = ModelPlan(
    "audited_networks:build", mean=(0.0,), std=(1.0,), size=(24, 24), classes=("cat", "dog", "fish", "owl")
)


Audited = Callable[[str, Plan, Path], Run]


@pytest.fixture(scope="session")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Audited:
    """Audit a plan once per session under a name, and give each test a copy that it may change."""
    runs: dict[str, Path] = {}

    def copy_of(name: str, plan: Plan, folder: Path) -> Run:
        if name not in runs:
            runs[name] = tmp_path_factory.mktemp(name) / "run"
            audit(plan, runs[name])
        shutil.copytree(runs[name], folder)
        return open_run(folder)

    return copy_of


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with audited_networks.py, on the module path and the working directory."""
    (tmp_path / "audited_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("audited_networks", None)


@pytest.fixture
def pictures(networks: Path) -> Path:
    """Fourteen pictures in folders named like classes."""
    return draw_pictures(networks / "pictures", 14)


def draw_pictures(folder: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / ("cat", "dog", "fish")[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(30, 226, (6, 6, 3), dtype=np.uint8))
        coarse.resize((24, 24), Image.Resampling.BICUBIC).save(path)
    return folder


def small_plan(*sources: Path | str, **changes: object) -> Plan:
    """Two attacks in two regions, an analysis, shards of four, groups of four."""
    plan = {
        "sources": tuple(str(source) for source in sources),
        "model": TINY,
        "attacks": (
            AttackPlan("pgd", settings=(("steps", 3),)),
            AttackPlan("few_pixel", settings=(("generations", 3), ("population", 6))),
        ),
        "regions": ("none", "cam"),
        "analyses": ("overlap",),
        "shard": 4,
        "group": 4,
    }
    return Plan(**{**plan, **changes})  # type: ignore[arg-type]


def audit_pictures(folder: Path, **changes: object) -> Path:
    """The folder of a complete audit of 14 pictures; its records equal those of any other folder."""
    (folder / "audited_networks.py").write_text(NETWORKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        audit(small_plan(draw_pictures(folder / "pictures", 14), **changes), folder / "whole")
        sys.modules.pop("audited_networks", None)
    return folder / "whole"


def same_records(one: Run, other: Run) -> None:
    """Assert that all records but their times are bit-equal."""
    left, right = (run.records.drop(columns=list(TIMES)) for run in (one, other))
    pd.testing.assert_frame_equal(left, right, check_exact=True)


def store_records(folder: Path, records: pd.DataFrame) -> None:
    """Replace the records of a complete run, with their digest."""
    records.to_parquet(folder / "records.parquet")
    about = json.loads((folder / "run.json").read_text())
    about["checksums"]["records.parquet"] = file_digest(folder / "records.parquet")
    (folder / "run.json").write_text(json.dumps(about))


def same_maps(one: Run, other: Run) -> None:
    """Assert that all maps are bit-equal."""
    assert list(one.maps) == list(other.maps)
    for name, stored in one.maps.items():
        np.testing.assert_array_equal(stored[:], other.maps[name][:], err_msg=name)
        assert stored.about == other.maps[name].about
