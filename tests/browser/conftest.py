"""Chromium, and a small running explorer with a fresh page of it, for the tests of pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser.explorer_page import BenchPage, forget_attacks, served
from weakspot.explorer.service import Service

playwright = pytest.importorskip("playwright.sync_api")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=found, args=FLAGS.split())
        try:
            yield running
        finally:
            running.close()


@pytest.fixture
def browser(chromium: Any) -> Iterator[Any]:
    """The browser; whatever a test opened in it is closed, also after a failure."""
    try:
        yield chromium
    finally:
        for context in list(chromium.contexts):
            context.close()


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with served() as running:
        yield running


@pytest.fixture
def bench(browser: Any, service: Service) -> Iterator[BenchPage]:
    """A fresh page, which logs no error and asks no other host."""
    forget_attacks(service)
    opened = BenchPage(browser, service.url)
    yield opened
    assert opened.wrong == []
    assert opened.hosts == {f"127.0.0.1:{service.access.port}"}
