"""The bench in a cell of a notebook: a widget whose messages take the place of the server, so no port is opened."""

import contextlib
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import cache
from importlib.resources import files
from typing import Protocol

from weakspot.explorer.desk import Desk
from weakspot.explorer.messages import Message
from weakspot.explorer.worker import Task
from weakspot.report.rendering import bundled, drawing_modules

JOBS = 16  # of all views of a widget at once


class Channel(Protocol):
    """What a widget does with messages."""

    def send(self, content: Message) -> None:
        """Send a message to every view."""


class NotebookDesk:
    """Answers the messages of a widget's views.

    Args:
        desk: that they are for.
        channel: to the views.
    """

    def __init__(self, desk: Desk, channel: Channel) -> None:
        self.desk, self.channel = desk, channel
        self._jobs: dict[str, Task[object]] = {}
        self._lock = threading.Lock()

    def receive(self, message: object) -> None:
        """Take a message of a view; replies and events follow from other threads."""
        if not isinstance(message, Mapping):
            return
        kind, number = message.get("kind"), message.get("id")
        if kind == "close":
            self._close(str(message.get("view")))
        elif not isinstance(number, str):
            return
        elif kind == "ask":
            self._ask(number, str(message.get("name")), message.get("body"))
        elif kind == "subscribe":
            self._subscribe(number, str(message.get("name")), message.get("body"))
        elif kind == "stop" and (task := self._jobs.get(number)) is not None:  # ended jobs are removed
            task.stop.set()

    def _ask(self, number: str, name: str, body: object) -> None:
        def finish(done: Future[Message]) -> None:
            error = done.exception()
            self._send({"id": number, "reply": done.result() if error is None else {"error": str(error)}})

        self.desk.ask(name, body).add_done_callback(finish)

    def _subscribe(self, number: str, name: str, body: object) -> None:
        if len(self._jobs) >= JOBS:
            sentence = f"at most {JOBS} jobs run at once (stop one)"
            self._send({"id": number, "event": {"event": "error", "error": sentence}})
            return

        ended = threading.Event()

        def send(event: Message) -> None:
            if event.get("event") in {"done", "error"}:
                ended.set()
                self._jobs.pop(number, None)
            self._send({"id": number, "event": event})

        task = self.desk.subscribe(name, body, send)
        self._jobs[number] = task
        # A short job may have ended before it was noted.
        if ended.is_set() or task.result.done():
            self._jobs.pop(number, None)

    def _close(self, view: str) -> None:
        """Stop the jobs of a view that is gone."""
        for number, task in list(self._jobs.items()):
            # A view numbers its jobs VIEW-1, VIEW-2 and so on.
            if number.startswith(f"{view}-"):
                task.stop.set()

    def _send(self, content: Message) -> None:
        # One at a time: threads of the desk and of the kernel share the connection.
        with self._lock, contextlib.suppress(RuntimeError):  # the kernel is going down
            self.channel.send(content)


class Widget(Channel, Protocol):
    """What a view needs of an anywidget."""

    def on_msg(self, callback: Callable[[object, object, object], None]) -> None:
        """Call with (widget, content, buffers) for every message of a view."""

    def close(self) -> None:
        """Remove it from all cells."""

    def _repr_mimebundle_(self, **kwargs: object) -> object: ...


def bench_widget(desk: Desk) -> Widget:
    """A widget that shows the bench of a desk; it needs the extra `weakspot[notebook]`."""
    widget: Widget = _widget_class()()
    shell = NotebookDesk(desk, widget)
    widget.on_msg(lambda _widget, content, _buffers: shell.receive(content))
    return widget


@cache
def _widget_class():  # type: ignore[no-untyped-def]  # anywidget and traitlets have no types
    import anywidget
    import traitlets

    static = files("weakspot.explorer").joinpath("static")
    styles = (drawing_modules().joinpath("drawing.css"), static.joinpath("bench.css"))

    class BenchWidget(anywidget.AnyWidget):  # type: ignore[misc]
        """The bench as a widget."""

        _esm = bundled("notebook.js", [static])
        style = traitlets.Unicode("\n".join(file.read_text("utf-8") for file in styles)).tag(sync=True)

    return BenchWidget
