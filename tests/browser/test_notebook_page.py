"""The widget's page side in a real browser, with a model of the widget that hands messages to the Python side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.browser.explorer_page import WAIT
from tests.networks import NETWORKS
from weakspot.explorer.desk import Desk
from weakspot.explorer.messages import Message
from weakspot.explorer.notebook_view import NotebookDesk, bench_widget
from weakspot.explorer.view import NotebookView, fill_bench

pytestmark = [pytest.mark.browser, pytest.mark.slow]
PAGE = "<!doctype html><html lang=en><style>h3 { font-size: 40px }</style><h3>A notebook</h3><div id=cell></div></html>"
SHELL = """
async ([source, style]) => {
  const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  const { default: widget } = await import(url);
  const hearers = new Set();
  const model = {
    get: (name) => ({ style })[name],
    on: (name, hear) => hearers.add(hear),
    off: (name, hear) => hearers.delete(hear),
    send: (message) => toKernel(message),
  };
  const poll = async () => {
    for (const message of await fromKernel()) for (const hear of hearers) hear(message, []);
    setTimeout(poll, 30);
  };
  poll();
  window.leave = widget.render({ model, el: document.getElementById("cell") });
}
"""


class Queue:
    """The channel: what the Python side sent and the page has not fetched."""

    def __init__(self) -> None:
        self.waiting: list[Message] = []

    def send(self, content: Message) -> None:
        self.waiting.append(content)

    def fetch(self) -> list[Message]:
        fetched, self.waiting = self.waiting, []
        return fetched


@pytest.fixture
def shown(browser: Any) -> Iterator[tuple[Any, NotebookView, list[str], NotebookDesk]]:
    model, images = NETWORKS["pooling"]()
    desk = Desk(fill_bench(model, images))
    widget: Any = bench_widget(desk)
    queue = Queue()
    shell = NotebookDesk(desk, queue)
    context = browser.new_context(viewport={"width": 1000, "height": 900})
    context.set_default_timeout(WAIT)
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None)
    page.expose_function("toKernel", shell.receive)
    page.expose_function("fromKernel", queue.fetch)
    page.set_content(PAGE)
    page.evaluate(SHELL, [widget._esm, widget.style])
    page.wait_for_selector(".weakspot .bars li")
    try:
        yield page, NotebookView("", desk.bench, desk, widget), wrong, shell
    finally:
        desk.close()


def wait_until(page: Any, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT / 1000
    while not condition():
        assert time.monotonic() < end, "it did not become so"
        page.wait_for_timeout(20)  # messages of the page are taken meanwhile


def test_a_mask_is_brushed_and_attacked_in_a_cell(shown: Any) -> None:
    page, view, wrong, _ = shown
    page.click("button:text-is('Brush')")
    box = page.locator("canvas.picture").bounding_box()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.3 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.4 * box["height"], steps=4)
    page.mouse.up()
    wait_until(page, lambda: view.mask is not None)
    assert view.mask is not None
    assert 0 < int(view.mask.sum()) < view.mask.numel()
    assert view.pairs is None
    page.click(".weakspot button.primary")
    wait_until(page, lambda: view.pairs is not None)
    assert view.pairs is not None
    outside = view.pairs.perturbation.masked_fill(view.mask, 0)
    assert float(outside.abs().max()) == 0
    page.click("button:text-is('Clear')")
    wait_until(page, lambda: view.mask is None)
    assert wrong == []


def test_the_notebook_keeps_its_style_and_the_cell_can_be_left(shown: Any) -> None:
    page, _, wrong, shell = shown
    size = "getComputedStyle(document.querySelector('#cell').previousElementSibling).fontSize"
    assert page.evaluate(size) == "40px"
    inside = "getComputedStyle(document.querySelector('#cell > div').shadowRoot.querySelector('.weakspot')).fontSize"
    assert page.evaluate(inside) == "15px"
    page.evaluate("leave()")
    assert page.evaluate("document.querySelector('#cell').children.length") == 0
    wait_until(page, lambda: not shell._jobs)
    assert wrong == []
