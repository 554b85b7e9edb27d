"""Fixtures of the explorer's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.explorer.benches import filled_bench
from weakspot.explorer.desk import Desk


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, a computation in the background must not be answered by how far it is."""
    monkeypatch.setattr("weakspot.explorer.run_findings.PATIENCE", 60)


@pytest.fixture
def desk() -> Iterator[Desk]:
    """A desk with two images of a small network."""
    made = Desk(filled_bench())
    yield made
    made.close()
