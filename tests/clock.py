"""A clock whose time passes only where a test says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class FakeClock:
    """Time that passes only where the test says so, and functions that are called every so many seconds of it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[Callable[[], None], list[float], float]] = []
        self.silent = 0.0  # seconds that passed while nothing was to be called

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass, and call what is due meanwhile at its own time."""
        end = self.now + seconds
        self.silent += 0 if self.timers else seconds
        while due := [timer for timer in self.timers if timer[1][0] <= end]:
            action, when, every = min(due, key=lambda timer: timer[1][0])
            self.now = when[0]
            when[0] += every
            action()
        self.now = end

    @contextmanager
    def repeat(self, action: Callable[[], None], first: float, every: float) -> Iterator[None]:
        timer = (action, [self.now + first], every)
        self.timers.append(timer)
        yield
        self.timers.remove(timer)
