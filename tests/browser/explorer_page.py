"""A running explorer for browser tests, its small network, and a page that opens it."""

from __future__ import annotations

import copy
import functools
import io
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from weakspot import Classifier
from weakspot.explorer.bench import Bench, Origin
from weakspot.explorer.desk import Desk
from weakspot.explorer.service import Service

expect = pytest.importorskip("playwright.sync_api").expect
expect.set_options(timeout=60_000)
SIZE = (40, 48)  # height and width: not square, so that exchanged sides are noticed
CORNER = 16  # the network reads this many rows and columns
NAMES = ["ant", "bee", "<b>cat</b>", "dog"]
WAIT = 60_000  # milliseconds; the machine may be busy
SAMPLES = ["first.png", '<img src=x onerror="document.title=1">.png']


class CornerNetwork(nn.Module):
    """Two convolutions, of which a linear layer reads the upper left corner only."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU()
        )
        self.decide = nn.Linear(6 * CORNER * CORNER, 4)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 4)."""
        logits: Tensor = self.decide(self.seen(images)[:, :, :CORNER, :CORNER].flatten(1))
        return 3 * logits


@functools.cache
def corner_network() -> nn.Module:
    """The network, drawn once: a running explorer uses the global random generator in a thread of its own."""
    torch.manual_seed(3)
    return CornerNetwork().eval()


def corner_classifier() -> Classifier:
    """A copy of the network."""
    return Classifier.wrap(copy.deepcopy(corner_network()), input_size=SIZE, class_names=NAMES)


def corner_images() -> Tensor:
    """Two images on the 8-bit grid (2, 3, H, W)."""
    return torch.randint(40, 216, (2, 3, *SIZE), generator=torch.Generator().manual_seed(1)) / 255


@contextmanager
def served(base_url: str = "") -> Iterator[Service]:
    """The explorer on a free port."""
    bench = Bench(corner_classifier(), Origin(["--model", "tests:corner"], "corner()", samples=False))
    bench.add(corner_images(), SAMPLES, paths=["first.png", "second.png"])
    service = Service.prepare(Desk(bench), port=0, base_url=base_url)
    service.start()
    try:
        yield service
    finally:
        service.close()


def forget_attacks(service: Service) -> None:
    """As if nobody had used the bench; waits until the jobs of a page that was closed have ended."""
    desk = service.desk
    assert isinstance(desk, Desk)

    def forget() -> None:
        desk.bench.brushed = None
        for exhibit in desk.bench.exhibits:
            exhibit.pair = exhibit.control = exhibit.pair_logits = None

    desk.worker.long(forget).result.result(WAIT / 1000)


class BenchPage:
    """The bench in a browser, with what went wrong and which hosts were asked.

    Attributes:
        wrong: errors that the browser listed, apart from requests that the program refuses.
    """

    def __init__(
        self, browser: Any, url: str, width: int = 1280, scheme: str = "light", **options: object
    ) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, **options
        )
        self.context.set_default_timeout(WAIT)
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.note(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("websocket", lambda socket: self.asked.append(socket.url))
        self.page.goto(url)
        self.page.wait_for_selector("#bench[data-ready=yes]", timeout=WAIT)
        self.canvas = self.page.locator("canvas.picture")

    def note(self, text: str) -> None:
        # The tests themselves read canvases often, and a refusal is what some of them ask for.
        if "willReadFrequently" not in text and "status of 400" not in text:
            self.wrong.append(text)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for something on this side of the connection."""
        end = time.monotonic() + WAIT / 1000
        while not condition():
            assert time.monotonic() < end, "it did not become so"
            self.page.wait_for_timeout(20)  # takes what the browser sends meanwhile

    @property
    def hosts(self) -> set[str]:
        """Of every request that left the page."""
        return {urlsplit(url).netloc for url in self.asked if not url.startswith(("data:", "blob:"))}

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def pixels(self, selector: str = "canvas.picture") -> NDArray[np.uint8]:
        """(H, W, 3) of a canvas, after the page has drawn what it was going to draw."""
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(done))")
        width, height, values = self.page.eval_on_selector(
            selector,
            "c => [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]",
        )
        return np.array(values, np.uint8).reshape(height, width, 4)[..., :3]

    def place(self, x: int, y: int) -> tuple[float, float]:
        """The middle of a pixel of the picture, on the screen."""
        self.canvas.scroll_into_view_if_needed()
        box = self.canvas.bounding_box()
        return box["x"] + (x + 0.5) * box["width"] / SIZE[1], box["y"] + (y + 0.5) * box["height"] / SIZE[0]

    def point(self, x: int, y: int) -> None:
        self.page.mouse.move(*self.place(x, y))

    def drag(self, *places: tuple[int, int]) -> None:
        """Press at the first pixel, go through the others, release."""
        self.point(*places[0])
        self.page.mouse.down()
        for place in places[1:]:
            self.point(*place)
        self.page.mouse.up()

    def choose(self, number: int) -> None:
        """Put another picture on the bench."""
        thumb = self.page.locator(".thumb").nth(number)
        thumb.click()
        expect(thumb).to_have_attribute("aria-pressed", "true")

    def open_mask(self, mask: NDArray[np.bool_]) -> None:
        """Choose a file, and wait until the mask and its control are shown."""
        with self.page.expect_response("**/api/area"):
            self.page.set_input_files("input[aria-label='Open a mask file']", mask_file(mask))
        expect(self.page.locator(".area")).to_contain_text(f"{mask.sum():,} pixels")

    def saved_mask(self) -> NDArray[np.bool_]:
        """What "Save mask" gives (H, W)."""
        with self.page.expect_download() as download:
            self.page.click("text=Save mask")
        return read_mask(Path(download.value.path()))

    def attack(self) -> str:
        """Press the button and wait for the end; returns the sentence."""
        self.page.click("button.primary")
        expect(self.page.locator("section.attack")).to_have_attribute("data-running", "no")
        return self.text(".attack .sentence")

    def unfold(self, title: str) -> None:
        self.page.click(f"summary:has(strong:text-is('{title}'))")

    def unfold_settings(self) -> None:
        self.page.click("summary:text-is('Settings of the attack')")

    def number(self, selector: str) -> float:
        """The first number of a text."""
        return first_number(self.text(selector))


def logits_of(image: torch.Tensor) -> torch.Tensor:
    """(4,) of the corner network."""
    with torch.no_grad():
        logits: torch.Tensor = corner_classifier()(image[None])[0]
    return logits


def to_pixels(image: torch.Tensor) -> Any:
    """(H, W, C) uint8."""
    return (image * 255).round().byte().permute(1, 2, 0).numpy()


def first_number(text: str) -> float:
    match = re.search(r"[-\u2212]?\d+(\.\d+)?", text)
    assert match, text
    return float(match[0].replace("\u2212", "-"))


def read_mask(path: Path) -> NDArray[np.bool_]:
    """A one-bit PNG file as it is (H, W)."""
    with Image.open(path) as picture:
        assert picture.mode == "1", picture.mode
        return np.array(picture)


def mask_file(mask: NDArray[np.bool_]) -> dict[str, object]:
    """A mask as a file that a person chooses."""
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(buffer, "PNG")
    return {"name": "mask.png", "mimeType": "image/png", "buffer": buffer.getvalue()}


def box_mask(left: int, top: int, right: int, bottom: int) -> NDArray[np.bool_]:
    """True from (left, top) to (right, bottom), both included."""
    mask = np.zeros(SIZE, bool)
    mask[top : bottom + 1, left : right + 1] = True
    return mask
