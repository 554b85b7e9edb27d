"""Fixtures that all tests share. The networks themselves are in tests/networks.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from tests.clock import FakeClock
from tests.networks import NETWORKS, Made
from weakspot import _progress

# Networks this small lose more time to synchronizing threads than they gain.
torch.set_num_threads(1)
# A script that starts tests in the background makes them ignore Ctrl-C, which some of them send.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=list(NETWORKS))
def any_model(request: pytest.FixtureRequest) -> Made:
    """A small network in eval mode and three images for it; the test runs on each kind."""
    return NETWORKS[request.param]()


@pytest.fixture
def pooling() -> Made:
    """A convolutional network that ends in pooling + linear, and three images (3, 3, 20, 20)."""
    return NETWORKS["pooling"]()


@pytest.fixture
def data() -> Path:
    """The folder of real networks and images that WEAKSPOT_DATA names."""
    folder = Path(os.environ.get("WEAKSPOT_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "MANIFEST.md").is_file():
        pytest.skip(f"no real data at {folder}; set WEAKSPOT_DATA to run this test")
    return folder


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """The clock that progress goes by."""
    fake = FakeClock()
    monkeypatch.setattr(_progress, "clock", fake)
    monkeypatch.setattr(_progress, "repeat", fake.repeat)
    return fake
