"""The bench in a notebook: a real kernel, the widget's messages on the Python side, and no port."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

import weakspot
from tests.networks import Made
from weakspot.explorer.desk import QUESTIONS, Desk, Question
from weakspot.explorer.messages import Message
from weakspot.explorer.notebook_view import JOBS, NotebookDesk, bench_widget
from weakspot.explorer.view import NotebookView, View, explore, fill_bench
from weakspot.explorer.worker import Task

PLAIN = """
import torch, weakspot
from torch import nn
torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
images = torch.rand(2, 3, 16, 20)
"""


class Cell:
    """A channel that keeps what the views would get."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.news = threading.Condition()

    def send(self, content: Message) -> None:
        with self.news:
            self.sent.append(content)
            self.news.notify_all()

    def wait(self, number: str, event: str | None = None) -> Any:
        """The reply to a question, or the first event of that name of a job."""

        def found() -> list[Any]:
            mine = [one for one in self.sent if one["id"] == number]
            if event is None:
                return [one["reply"] for one in mine]
            events: list[Any] = [one["event"] for one in mine]
            return [one for one in events if one["event"] == event]

        with self.news:
            assert self.news.wait_for(lambda: bool(found()), 60)
            return found()[0]


def png(mask: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture
def made(pooling: Made) -> Iterator[tuple[Desk, Cell, NotebookDesk]]:
    model, images = pooling
    desk = Desk(fill_bench(model, images))
    cell = Cell()
    yield desk, cell, NotebookDesk(desk, cell)
    desk.close()


def test_a_brushed_mask_and_the_attack_in_it_come_back_as_tensors(
    made: tuple[Desk, Cell, NotebookDesk],
) -> None:
    desk, cell, shell = made
    view = NotebookView("", desk.bench, desk, None)  # type: ignore[arg-type]
    assert view.mask is None
    assert view.pairs is None
    drawn = np.zeros((20, 20), bool)
    drawn[3:9, 5:7] = True
    shell.receive(
        {"kind": "ask", "view": "v", "id": "v-1", "name": "area", "body": {"image": 1, "mask": png(drawn)}}
    )
    assert cell.wait("v-1")["pixels"] == 12
    assert view.mask is not None
    assert (view.mask.dtype, tuple(view.mask.shape)) == (torch.bool, (1, 1, 20, 20))
    np.testing.assert_array_equal(view.mask[0, 0].numpy(), drawn)
    emptied = {"kind": "ask", "view": "v", "id": "v-0", "name": "area", "body": {"image": 1, "mask": None}}
    shell.receive(emptied)
    assert cell.wait("v-0")["pixels"] == 0
    assert view.mask is None
    order = {
        "image": 1,
        "mask": png(drawn),
        "attack": "pgd",
        "budget": "linf:8/255",
        "options": {"steps": 3},
        "seed": 0,
    }
    shell.receive({"kind": "subscribe", "view": "v", "id": "v-2", "name": "attack", "body": order})
    assert cell.wait("v-2", "done")["attack"]["linf"] <= 8 / 255 + 1e-6
    pairs = view.pairs
    assert pairs is not None
    assert pairs.names == ("image 1",)
    changed = (pairs.perturbation != 0).any(1)[0].numpy()
    assert changed.any()
    assert not changed[~drawn].any()


def test_stop_ends_a_job_and_leaving_a_page_ends_its_jobs(made: tuple[Desk, Cell, NotebookDesk]) -> None:
    _, cell, shell = made
    order = {"image": 0, "attack": "pgd", "budget": "linf:1/255", "options": {"steps": 100_000}, "seed": 0}
    for number, ending in (("a-1", {"kind": "stop", "id": "a-1"}), ("b-1", {"kind": "close", "view": "b"})):
        shell.receive({"kind": "subscribe", "view": number[0], "id": number, "name": "attack", "body": order})
        cell.wait(number, "step")
        shell.receive(ending)
        cell.wait(number, "done")
    assert shell._jobs == {}


def test_a_job_that_ends_before_it_is_noted_leaves_no_trace(
    made: tuple[Desk, Cell, NotebookDesk], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, cell, shell = made
    running: Task[object] = Task(lambda: None)

    def at_once(name: str, body: object, send: Callable[[Message], None]) -> Task[object]:
        del name, body
        send({"event": "done"})
        return running  # its future is set a moment later

    monkeypatch.setattr(desk, "subscribe", at_once)
    shell.receive({"kind": "subscribe", "view": "a", "id": "a-1", "name": "attack", "body": {}})
    cell.wait("a-1", "done")
    assert shell._jobs == {}


def test_a_job_may_end_while_it_is_being_stopped(made: tuple[Desk, Cell, NotebookDesk]) -> None:
    class Ending(dict[str, Task[object]]):
        """Jobs that another thread removes as soon as one was looked for."""

        def __contains__(self, number: object) -> bool:
            del self["a-1"]
            return True

    _, _, shell = made
    task = Task[object](lambda: None)
    shell._jobs = Ending({"a-1": task})
    shell.receive({"kind": "stop", "id": "a-1"})
    assert task.stop.is_set()


def test_pairs_of_images_of_different_sizes_are_refused_with_a_sentence(pooling: Made) -> None:
    bench = fill_bench(*pooling)
    bench.add(torch.rand(1, 3, 12, 14), ["small"])
    for exhibit in bench.exhibits:
        exhibit.pair = weakspot.attacks.pgd(bench.classifier, exhibit.pixels, exhibit.label_tensor, steps=1)
    with View("", bench, Desk(bench)) as view, pytest.raises(ValueError, match="got 12 x 14 and 20 x 20"):
        _ = view.pairs


@pytest.mark.parametrize("name", [*QUESTIONS, "probe", "apart"])
def test_a_closed_desk_says_so(pooling: Made, name: str) -> None:
    desk = Desk(fill_bench(*pooling), {"apart": Question(lambda _desk, _request: {}, apart=True)})
    desk.close()
    error = desk.ask(name, {}).exception(60)
    assert str(error) == "the explorer has been closed"


def test_odd_messages_are_answered_with_a_sentence_or_ignored(made: tuple[Desk, Cell, NotebookDesk]) -> None:
    _, cell, shell = made
    odd: list[object] = [
        None,
        [],
        "x",
        {},
        {"kind": "ask"},
        {"kind": "ask", "id": 3},
        {"kind": "stop", "id": "none"},
    ]
    for message in odd:
        shell.receive(message)
    assert cell.sent == []
    shell.receive({"kind": "ask", "id": "v-1", "name": "nothing", "body": {}})
    assert cell.wait("v-1") == {"error": "there is no such request"}
    shell.receive({"kind": "ask", "id": "v-2", "name": "image", "body": []})
    assert "JSON object" in cell.wait("v-2")["error"]
    shell.receive({"kind": "subscribe", "id": "v-3", "name": "nothing", "body": {}})
    assert cell.wait("v-3", "error")["error"]
    shell._jobs.update({str(number): None for number in range(JOBS)})  # type: ignore[misc]
    shell.receive({"kind": "subscribe", "id": "v-4", "name": "attack", "body": {}})
    assert "jobs run at once" in cell.wait("v-4", "error")["error"]


def test_without_the_extra_the_install_line_is_printed(
    pooling: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weakspot.explorer.view.in_notebook", lambda: True)
    monkeypatch.setattr("weakspot._checks.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs anywidget: pip install 'weakspot\[notebook\]'"):
        explore(*pooling)


def test_the_widget_holds_the_whole_page(pooling: Made) -> None:
    desk = Desk(fill_bench(*pooling))
    widget: Any = bench_widget(desk)
    assert "export default { render }" in widget._esm
    assert 'from "./' not in widget._esm
    assert "import(" not in widget._esm
    assert ".weakspot" in widget.style
    shown: Any = NotebookView("", desk.bench, desk, widget)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in shown[0]
    desk.close()


@pytest.mark.slow
def test_a_notebook_shows_the_bench_without_a_port() -> None:
    show = "view = weakspot.explore(network, images)\nview"
    about = (
        "[one.name for one in threading.enumerate() if 'server' in one.name], view.url, view.mask, view.pairs"
    )
    send = "view.widget._handle_custom_msg({'kind': 'ask', 'id': 'v-1', 'name': 'hello', 'body': {}}, [])"
    count = f"{send}\nlen(view.bench.exhibits)"
    cells = [PLAIN, show, f"import threading\n{about}", count, "weakspot.explore(network, images[0])"]
    v4: Any = nbformat.v4
    notebook = v4.new_notebook(cells=[v4.new_code_cell(text) for text in cells])
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", allow_errors=True)
    client.execute()
    shown, facts, answered, refused = (cell["outputs"] for cell in notebook["cells"][1:])
    (bundle,) = [one["data"] for one in shown if one["output_type"] == "execute_result"]
    model = bundle["application/vnd.jupyter.widget-view+json"]["model_id"]
    assert facts[-1]["data"]["text/plain"] == "([], '', None, None)"
    assert answered[-1]["data"]["text/plain"] == "2"
    state = client.widget_state[model]
    assert state["_anywidget_id"].endswith("BenchWidget")
    assert "export default { render }" in state["_esm"]
    assert refused[-1]["ename"] == "ValueError"
    assert "add a batch dimension" in refused[-1]["evalue"]


def test_outside_a_notebook_it_is_served() -> None:
    assert weakspot.explore is explore
