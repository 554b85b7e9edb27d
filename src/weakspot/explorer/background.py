"""One long computation in the background, which the page asks for until it is done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

PATIENCE = 0.5  # seconds that a request waits for the result


class Later(Generic[T]):
    """A result that is computed once, from the first request on, in a thread of its own.

    Args:
        compute: takes a function that it calls with the fraction that is done.
        turn: a lock that computations share which must not run at once.
    """

    def __init__(
        self, compute: Callable[[Callable[[float], None]], T], turn: threading.Lock | None = None
    ) -> None:
        self._compute, self._turn = compute, turn or threading.Lock()
        self._lock, self._done = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._value: T | None = None
        self._error: Exception | None = None
        self._closed = False
        self.fraction = 0.0

    def result(self) -> T | None:
        """The result, or None if it takes longer than `PATIENCE`.

        Raises:
            Exception: that the computation raised, at every request.
        """
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="weakspot-gallery", daemon=True)
                self._thread.start()
        self._done.wait(PATIENCE)
        if self._error is not None:
            raise self._error
        return self._value

    def close(self) -> None:
        """End the computation at its next step."""
        self._closed = True

    def join(self, seconds: float) -> None:
        """Wait so long for its end."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        try:
            with self._turn:
                # It may have been closed while it waited for its turn.
                self._watch(0.0)
                self._value = self._compute(self._watch)
        except Exception as error:  # noqa: BLE001 - whatever it is, the one who asks gets it
            self._error = error
        finally:
            self._done.set()

    def _watch(self, fraction: float) -> None:
        if self._closed:
            raise RuntimeError("the gallery has been closed")
        self.fraction = fraction
