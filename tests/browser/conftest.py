"""A small running explorer and a fresh page of it, for the tests of the bench."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser.explorer_page import BenchPage, served
from weakspot.explorer.service import Service


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with served() as running:
        yield running


@pytest.fixture
def bench(browser: Any, service: Service) -> Iterator[BenchPage]:
    """A fresh page, which logs no error and asks no other host."""
    opened = BenchPage(browser, service.url)
    yield opened
    assert opened.wrong == []
    assert opened.hosts == {f"127.0.0.1:{service.access.port}"}
    opened.context.close()
