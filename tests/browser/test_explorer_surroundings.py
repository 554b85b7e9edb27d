"""The explorer where people run it: behind proxies, without a network, on phones, in the dark, with a screen reader."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
import uvicorn
import websockets
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from torch import nn

from tests.browser.explorer_page import WAIT, BenchPage, box_mask, expect, served
from weakspot import Classifier
from weakspot.explorer.bench import Bench
from weakspot.explorer.desk import Desk
from weakspot.explorer.service import Service
from weakspot.report.rendering import bundled, drawing_modules

axe = pytest.importorskip("axe_playwright_python.sync_playwright")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:the gradient of CornerNetwork is zero"),
]
INJECTED = '<img src=x onerror="document.title = 1"><p id=in style="position: fixed">'
FOLDS = (
    "Weak-spot map",
    "Undo a place",
    "Explain the attack",
    "Where is the picture weak?",
    "Layers and units",
)
PREFIX = "/user/me/proxy/8765"
OWN = {"host", "connection", "content-length", "transfer-encoding", "content-encoding"}


# ---------------------------------------------------------------- proxies


class Proxy:
    """A proxy that shows a server below a path, with or without removing the path from its requests."""

    def __init__(self, *, strips: bool) -> None:
        self.strips, self.upstream = strips, ""
        self.listener = socket.create_server(("127.0.0.1", 0))  # takes visitors from now on
        self.port = self.listener.getsockname()[1]
        app = Starlette(
            routes=[
                WebSocketRoute(PREFIX + "/{path:path}", self.socket),
                Route(PREFIX + "/{path:path}", self.request, methods=["GET", "POST"]),
            ]
        )
        config = uvicorn.Config(
            app, log_level="critical", lifespan="off", ws="websockets-sansio", timeout_graceful_shutdown=1
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],), daemon=True)

    def __enter__(self) -> Proxy:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(WAIT / 1000)
        self.listener.close()

    def url(self, path: str, query: str) -> str:
        """Of the server, for a path below the prefix."""
        below = f"/{path}" if self.strips else f"{PREFIX}/{path}"
        return f"{self.upstream}{below}" + (f"?{query}" if query else "")

    async def request(self, request: Request) -> Response:
        headers = {name: value for name, value in request.headers.items() if name not in OWN | {"origin"}}
        async with httpx.AsyncClient(timeout=WAIT / 1000) as client:
            answer = await client.request(
                request.method,
                f"http://{self.url(request.path_params['path'], request.url.query)}",
                headers=headers,
                content=await request.body(),
            )
        kept = {name: value for name, value in answer.headers.items() if name not in OWN}
        return Response(answer.content, answer.status_code, kept)

    async def socket(self, browser_side: WebSocket) -> None:
        await browser_side.accept()
        url = f"ws://{self.url(browser_side.path_params['path'], browser_side.url.query)}"
        cookie = {"cookie": browser_side.headers.get("cookie", "")}
        async with websockets.connect(
            url, additional_headers=cookie, max_size=None, open_timeout=WAIT / 1000
        ) as server_side:

            async def back() -> None:
                async for text in server_side:
                    await browser_side.send_text(str(text))

            async def texts() -> AsyncIterator[str]:
                with contextlib.suppress(Exception):
                    while True:
                        yield await browser_side.receive_text()

            task = asyncio.create_task(back())
            async for text in texts():
                await server_side.send(text)
            task.cancel()


@pytest.mark.parametrize("strips", [True, False], ids=["stripping", "not stripping"])
def test_the_bench_works_below_a_path(browser: Any, strips: bool) -> None:
    base = "" if strips else PREFIX
    with Proxy(strips=strips) as proxy, served(base) as running:
        proxy.upstream = f"127.0.0.1:{running.access.port}"
        bench = BenchPage(browser, f"http://127.0.0.1:{proxy.port}{PREFIX}/?token={running.access.token}")
        bench.open_mask(box_mask(0, 0, 13, 13))
        bench.attack()
        assert bench.hosts == {f"127.0.0.1:{proxy.port}"}
        assert all(
            urlsplit(url).path.startswith(PREFIX) for url in bench.asked if url[:4] in {"http", "ws:/"}
        )
        assert bench.wrong == []


# ---------------------------------------------------------------- nothing leaves


def test_nothing_leaves_the_host_whatever_is_done(browser: Any, service: Service) -> None:
    bench = BenchPage(browser, service.url)
    bench.point(5, 5)
    bench.attack()
    for title in ("Weak-spot map", "Explain the attack", "Where is the picture weak?", "Layers and units"):
        bench.unfold(title)
    bench.page.click("text=Estimate only")
    expect(bench.page.locator(".cells .spot").first).to_be_attached()
    expect(bench.page.locator(".inside canvas.map").first).to_have_attribute("width", "48")
    bench.page.click("text=Copy as Python")
    expect(bench.page.locator("dialog pre")).to_contain_text("weakspot")
    assert len(bench.asked) > 15
    assert bench.hosts == {f"127.0.0.1:{service.access.port}"}
    assert bench.wrong == []


def test_every_module_of_the_bench_is_asked_for_at_once() -> None:
    """Modules that import modules would otherwise be loaded one after the other."""
    page = files("weakspot.explorer").joinpath("static/index.html").read_text("utf-8")
    preloaded = set(re.findall(r'modulepreload" href="static/(\w+)\.js', page))
    imported = set(
        re.findall(
            r"const (\w+)_module = ", bundled("bench.js", [files("weakspot.explorer").joinpath("static")])
        )
    )
    assert preloaded == imported | {"bench"}


def test_the_page_weighs_less_than_300_kilobytes(browser: Any, service: Service) -> None:
    bench = BenchPage(browser, service.url)
    loaded = {urlsplit(url).path.rpartition("/")[2] for url in bench.asked if "/static/" in url}
    folders = (files("weakspot.explorer").joinpath("static"), drawing_modules())
    sizes = [
        len(folder.joinpath(name).read_bytes())
        for name in (*loaded, "index.html")
        for folder in folders
        if folder.joinpath(name).is_file()
    ]
    assert len(sizes) == len(loaded) + 1 > 15
    assert sum(sizes) < 300_000


def test_an_injected_script_does_not_run(browser: Any, service: Service) -> None:
    bench = BenchPage(browser, service.url)
    bench.page.evaluate("html => document.body.insertAdjacentHTML('beforeend', html)", INJECTED)
    bench.page.evaluate(
        "text => document.body.append(Object.assign(document.createElement('script'), { textContent: text }))",
        "document.title = 1",
    )
    # The browser reports each of the three: a handler, a style and a script.
    bench.wait_until(lambda: sum("Content Security Policy" in text for text in bench.wrong) >= 3)
    assert bench.page.title() == "weakspot explorer"
    assert bench.page.evaluate("getComputedStyle(document.getElementById('in')).position") == "static"


def test_the_page_says_when_the_program_has_ended(browser: Any) -> None:
    with served() as running:
        bench = BenchPage(browser, running.url)
    bench.page.click(".thumb >> nth=1")
    expect(bench.page.locator(".message")).to_contain_text("Start weakspot explore again")


# ---------------------------------------------------------------- for everyone


@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
)
def test_axe_has_no_serious_finding(browser: Any, service: Service, width: int, scheme: str) -> None:
    bench = BenchPage(browser, service.url, width, scheme)
    bench.attack()
    bench.unfold_settings()
    for title in FOLDS:
        bench.unfold(title)
    bench.page.click("text=Estimate only")
    expect(bench.page.locator(".cells .spot").first).to_be_attached()
    expect(bench.page.locator(".units button").first).to_be_visible()
    expect(bench.page.locator(".inside canvas.map").first).to_have_attribute("width", "48")
    response = axe.Axe().run(bench.page).response
    assert len(response["passes"]) > 20  # it has looked
    found = response["violations"]
    serious = [
        (one["id"], [node["html"][:200] for node in one["nodes"]])
        for one in found
        if one["impact"] in {"serious", "critical"}
    ]
    assert serious == []


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_the_page_fits_its_window(browser: Any, service: Service, width: int) -> None:
    bench = BenchPage(browser, service.url, width)
    bench.attack()
    bench.unfold_settings()
    for title in ("Weak-spot map", "Undo a place", "Explain the attack", "Layers and units"):
        bench.unfold(title)
    expect(bench.page.locator(".units button").first).to_be_visible()
    assert bench.page.evaluate("document.documentElement.scrollWidth") <= width
    box = bench.canvas.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width


@pytest.mark.parametrize(
    ("channels", "size", "correct"),
    [(1, (28, 28), False), (3, (12, 90), True), (3, (90, 12), True), (3, (1, 1), True)],
    ids=["gray, misclassified", "wide", "tall", "one pixel"],
)
def test_other_networks_and_sizes(
    browser: Any,
    channels: int,
    size: tuple[int, int],
    correct: bool,
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )
    model = Classifier.wrap(network.eval(), input_size=size, class_names=["a" * 80, "b" * 80])
    desk = Desk(Bench(model))
    images = torch.rand(1, channels, *size)
    says = model(images).argmax(1)
    desk.bench.add(images, ["x" * 150], says if correct else 1 - says)
    service = Service.prepare(desk, port=0)
    service.start()
    try:
        bench = BenchPage(browser, service.url, 390)
        assert bench.pixels().shape == (*size, 3)
        bench.canvas.hover()
        expect(bench.page.locator(".tip strong")).to_contain_text("Row")
        bench.attack()
        told = bench.text("figure.side.attack .says")
        assert told.startswith("Misclassified as it was: ") != correct
        assert "ooled" not in told or correct
        assert bench.page.evaluate("document.documentElement.scrollWidth") <= 390
        assert bench.wrong == []
    finally:
        service.close()


def test_nothing_jumps_while_an_attack_runs(browser: Any, service: Service) -> None:
    """Neither choosing a tool nor an attack moves the picture, the button or the results."""
    bench = BenchPage(browser, service.url)
    watched = ["canvas.picture", "button.primary", "figure.side.attack", ".chart"]

    def places() -> list[tuple[int, int]]:
        boxes = [bench.page.locator(one).bounding_box() for one in watched]
        return [(round(box["x"]), round(box["y"])) for box in boxes]

    start = places()
    for key in "berp":
        bench.page.keyboard.press(key)
        assert places() == start
    bench.open_mask(box_mask(0, 0, 13, 13))
    bench.unfold_settings()
    bench.page.fill("label:has-text('Steps') input", "1000000")
    before = places()
    bench.page.click("button.primary")
    expect(bench.page.locator("figure.side.attack .says")).to_contain_text("step")
    assert places() == before
    bench.page.click("button.primary")
    expect(bench.page.locator(".attack .sentence")).to_contain_text("nside the mask")
