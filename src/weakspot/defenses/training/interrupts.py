"""Interrupts: Ctrl-C waits until a training stands between two updates."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Whether somebody has asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    def heed(self) -> None:
        """Raises KeyboardInterrupt where somebody has."""
        if self.asked:
            raise KeyboardInterrupt


@contextmanager
def deferred() -> Iterator[Interrupts]:
    """The first Ctrl-C is noted, the second one strikes at once; as before on exit, and outside the main thread."""
    noted = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(number: int, frame: FrameType | None) -> None:
        if noted.asked:
            signal.default_int_handler(number, frame)
        noted.asked = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.default_int_handler)
