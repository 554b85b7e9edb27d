"""Progress of long calls: a bar on a terminal or in a notebook, a line every 30 seconds elsewhere.

A long call reports to a `Progress`, a function of the fraction done. Callers pass one of their own, or True for ours.
"""

from __future__ import annotations

import html
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import NoneType
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

T = TypeVar("T")
Progress = Callable[[float], None]  # called with the fraction done, 0 to 1
ProgressOption = bool | Progress | None  # True shows a bar; False and None show nothing
FIRST_LINE, LINE_EVERY = 5.0, 30.0  # seconds until the first line, and between lines
NOTEBOOK_EVERY = 1.0
SAVE_EVERY = 20.0  # seconds between checkpoints
SAVE_AT_MOST = 0.1  # of the time may be spent on them
MEASURABLE = 1.0  # seconds of work from which a rate is stated
WINDOW = 60.0  # seconds that a rate is measured over
RESUMED = 0.5  # a first report within so many seconds of the start is what an earlier run had done
clock = time.monotonic


@contextmanager
def shown(
    progress: ProgressOption, name: str, *, total: int = 1, unit: str = "image", counted: bool = True
) -> Iterator[Progress | None]:
    """What a long call reports to: the caller's function, a bar of our own if `progress` is True, or None.

    Args:
        progress: the argument of the long call.
        name: what it does, as in "attacking".
        total: how many units it works on.
        unit: what they are, in the singular.
        counted: whether one unit is finished after the other, so that a count of them is true. An attack that takes
            steps on all images at once has none finished at half its steps.
    """
    if not isinstance(progress, bool | NoneType) and not callable(progress):
        raise ValueError(
            f"progress must be True, False, None or a function of the fraction done, got {progress!r}"
        )
    if progress is True:
        with open_display() as display:
            yield display.step(name, total=total, unit=unit, counted=counted)
    else:
        yield progress or None


def part(progress: Progress | None, start: float, end: float, whole: float = 1.0) -> Progress | None:
    """Progress of a part of the work, as progress of the whole.

    Args:
        progress: of the whole, or None.
        start: how much of the whole is done before the part.
        end: how much is done after it.
        whole: what these count to.
    """
    if progress is None:
        return None
    return lambda fraction: progress((start + (end - start) * fraction) / whole)


class Checkpoints(Generic[T]):
    """Hands what is known so far to a function, every 20 seconds and less often where that takes long."""

    def __init__(self, save: Callable[[T], object] | None) -> None:
        self.save = save
        self.due = clock() + SAVE_EVERY

    def __call__(self, known: Callable[[], T]) -> None:
        """Save what `known` makes, if it is time to; never without a function."""
        begun = clock()
        if self.save is None or begun < self.due:
            return
        self.save(known())
        now = clock()
        self.due = now + max(SAVE_EVERY, (1 / SAVE_AT_MOST - 1) * (now - begun))


@dataclass(eq=False)
class Step:
    """A step of the work, which is a `Progress`.

    Attributes:
        name: what is done.
        total: how many units it works on.
        unit: what they are, in the singular.
        counted: whether one unit is finished after the other.
        began: time of the start, by `clock`.
        done: fraction done.
    """

    name: str
    total: int = 1
    unit: str = "image"
    counted: bool = True
    began: float = field(default_factory=lambda: clock())  # noqa: PLW0108 - tests replace the clock
    done: float = 0.0
    _reports: deque[tuple[float, float]] = field(default_factory=deque)

    def __call__(self, fraction: float) -> None:
        """Report the fraction done, which never decreases."""
        now = clock()
        if not self._reports:
            # A first report at once says what an earlier run had done.
            resumed = now - self.began < RESUMED
            self._reports.append((self.began, fraction if resumed else 0.0))
        self.done = min(1.0, max(fraction, self.done))
        self._reports.append((now, self.done))
        # The rate is that of the last minute, since parts of the work differ in speed.
        # The last report before that minute stays: it is where the rate is measured from.
        while len(self._reports) > 2 and self._reports[1][0] < now - WINDOW:
            self._reports.popleft()

    @property
    def status(self) -> str:
        """How far the step is, its rate and the time left, as far as they are known."""
        now = clock()
        amount = self._amount
        since, before = self._reports[0] if self._reports else (self.began, 0.0)
        gained, elapsed = self.done - before, now - since
        if gained <= 0 or elapsed < MEASURABLE:
            return f"{amount}{', ' if amount else ''}{duration(now - self.began)} so far"
        # A single unit has no rate.
        rate = gained * self.total / elapsed
        if rate >= 1:
            speed = f"{_number(f'{rate:.2g}', self.unit)}/s"
        else:
            each = 1 / rate
            speed = f"{duration(each) if each > 10 else f'{each:.2g} s'} per {self.unit}"
        left = f"about {duration(elapsed * (1 - self.done) / gained)} left"
        return ", ".join([amount, *([speed] if self.total > 1 else []), left])

    @property
    def _amount(self) -> str:
        if self.counted and self.total > 1:
            # A sum of fractions may be a hair below the whole number.
            return f"{int(self.done * self.total + 1e-6)}/{_number(self.total, self.unit)}"
        whole = f" of {_number(self.total, self.unit)}" if self.total > 1 else ""
        return f"{self.done:.0%}{whole}" if self.done else ""


class Display:
    """Shows the current step.

    Attributes:
        current: the step that is shown.
        paused: a context manager in which a bar is out of the way of other output.
    """

    def __init__(self) -> None:
        self.current = Step("starting")
        self.paused: Callable[[], AbstractContextManager[None]] = nullcontext

    def step(self, name: str, *, total: int = 1, unit: str = "image", counted: bool = True) -> Step:
        """Begin a step; returns what it reports to. Arguments are those of `shown`."""
        self.current = Step(name, total, unit, counted)
        return self.current

    def __str__(self) -> str:
        return f"{self.current.name}: {self.current.status}"


@contextmanager
def open_display(console: Console | None = None) -> Iterator[Display]:
    """Show progress until the end of the block.

    Args:
        console: of standard error; a new one by default.
    """
    from rich.console import Console

    console = console or Console(stderr=True, highlight=False)
    display = Display()
    if in_notebook():
        shower = _notebook_bar(display)
    elif console.is_terminal and not console.is_dumb_terminal:
        shower = _terminal_bar(display, console)
    else:
        shower = _lines(display, console)
    with shower:
        yield display


def duration(seconds: float) -> str:
    """Seconds as a reader wants them: "7 s", "3 min", "2.5 h"."""
    # Seconds and minutes are used below 100 of them.
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@contextmanager
def _lines(display: Display, console: Console) -> Iterator[None]:
    """A line after 5 seconds, and then every 30."""

    def print_line() -> None:
        console.print(str(display), soft_wrap=True, markup=False, emoji=False)

    with repeat(print_line, FIRST_LINE, LINE_EVERY):
        yield


@contextmanager
def _terminal_bar(display: Display, console: Console) -> Iterator[None]:
    """A bar that rich draws four times a second, so that a slow step shows life as well."""
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.spinner import Spinner
    from rich.table import Table
    from rich.text import Text

    spinner = Spinner("dots")

    def draw() -> Table:
        step = display.current
        status = step.status
        # The bar takes what the text leaves.
        room = console.width - len(step.name) - len(status) - 6
        row = Table.grid(padding=(0, 1))
        for _ in range(4):
            row.add_column(no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(1.0, step.done, width=max(4, min(24, room)))
        row.add_row(spinner, Text(step.name), bar, Text(status))
        return row

    # With redirection, rich would print standard output to this console, which is that of standard error, and
    # the results of a command would not reach its reader.
    live = Live(get_renderable=draw, console=console, transient=True, redirect_stdout=False)

    @contextmanager
    def paused() -> Iterator[None]:
        live.stop()
        try:
            yield
        finally:
            live.start()

    display.paused = paused
    with live:
        yield


@contextmanager
def _notebook_bar(display: Display) -> Iterator[None]:
    """A progress element in the output of the cell. Needs IPython alone, which every notebook has."""
    from IPython.display import HTML
    from IPython.display import display as show

    def draw() -> HTML:
        bar = f'<progress value="{display.current.done:.4f}" max="1"></progress>'
        return HTML(f"{bar} {html.escape(str(display))}")

    handle = show(draw(), display_id=True)
    try:
        with repeat(lambda: handle.update(draw()), NOTEBOOK_EVERY, NOTEBOOK_EVERY):
            yield
    finally:
        handle.update(HTML(""))


@contextmanager
def repeat(action: Callable[[], None], first: float, every: float) -> Iterator[None]:
    """Call a function from a thread, first after `first` seconds, then every `every` seconds."""
    ended = threading.Event()

    def run() -> None:
        wait = first
        # The wait ends at once when the block does.
        while not ended.wait(wait):
            action()
            wait = every

    thread = threading.Thread(target=run, name="weakspot-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        # Without this, a last line could still appear after what follows the block.
        thread.join()


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    # A notebook has imported IPython before us; a shell of IPython in a terminal has no kernel.
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get_shell is not None and hasattr(get_shell(), "kernel")


def _number(amount: str | int, unit: str) -> str:
    plural = "analyses" if unit == "analysis" else f"{unit}s"
    return f"{amount} {unit if amount == '1' else plural}"
