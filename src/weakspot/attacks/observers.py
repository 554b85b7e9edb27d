"""Observers: a function that sees what a running attack tries, and may end the attack between two evaluations."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from weakspot.edits import Crops


@dataclass(frozen=True, eq=False)
class Observation:
    """Images that an attack has just evaluated.

    Attributes:
        rows: (M,) the number of the attacked image that each of them is an attempt on.
        margins: (M,) below zero where they fool.
        picture: number, 0 to M - 1, to that image (C, H, W).
    """

    rows: Tensor
    margins: Tensor
    picture: Callable[[int], Tensor]


Observer = Callable[[Observation | None], None]
"""Called after each evaluation; with None where an attack of another library has evaluated images of its own."""

_observers = threading.local()


class AttackEndedError(BaseException):
    """Raised by an observer to end an attack. No `Exception`, because other libraries' attacks catch those."""


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Pass everything that attacks in this thread evaluate to a function.

    The images are admissible attempts: inside the region, and inside the budget of attacks that have one.
    """
    before = current_observer()
    _observers.current = observer
    try:
        yield
    finally:
        _observers.current = before


def notify(
    observer: Observer | None,
    images: Tensor,
    owners: Tensor,
    margins: Tensor,
    rows: Tensor,
    crops: Crops | None = None,
) -> None:
    """Tell an observer, if there is one, of images (M, C, H, W) or of rectangles of them.

    Args:
        observer: of the attack.
        images: that were evaluated.
        owners: (M,) their clean images, numbers among the images of a problem.
        margins: (M,).
        rows: (n,) the attacked images of the problem.
        crops: if not None, `images` are these rectangles.
    """
    if observer is None:
        return

    def picture(number: int) -> Tensor:
        one = images[number : number + 1]
        return (one if crops is None else crops.select(owners[number : number + 1]).whole(one))[0]

    observer(Observation(rows[owners], margins, picture))


def current_observer() -> Observer | None:
    """The observer of this thread's attacks."""
    observer: Observer | None = getattr(_observers, "current", None)
    return observer
