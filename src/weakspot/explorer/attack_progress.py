"""What a running attack has tried so far on both sides of a pair, step by step."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from weakspot.attacks.observers import AttackEndedError, Observation
from weakspot.explorer.messages import Message, Send, finite, picture_text
from weakspot.explorer.worker import StopRequestedError

SIDES = ("attack", "control")
EVENT_EVERY, PICTURE_EVERY = 0.05, 0.25  # seconds
Pause = Callable[[], None]


@dataclass(eq=False)
class Progress:
    """What has been tried so far on both sides, sent to the page in steps.

    Attributes:
        best: of each side, the lowest margin, or for attacks that minimize the size, the smallest image that fools.
        rank: of each best image: (does not fool, margin or size); smaller is better.
        steps: evaluations of each side.
    """

    send: Send
    pause: Pause
    clean: Tensor
    size: Callable[[Tensor], float] | None
    sides: int
    best: list[Tensor] = field(default_factory=list)
    rank: list[tuple[bool, float]] = field(default_factory=list)
    lowest: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    waiting: list[list[float]] = field(default_factory=list)
    fraction: float = 0.0

    def __post_init__(self) -> None:
        self.best = [self.clean] * self.sides
        self.rank = [(True, float("inf"))] * self.sides
        self.lowest = [float("inf")] * self.sides
        self.steps, self.passes = [0] * self.sides, [0] * self.sides
        self.waiting = [[] for _ in range(self.sides)]
        self._sent, self._drawn = [0.0] * self.sides, [0.0] * self.sides
        self._new = [False] * self.sides

    def __call__(self, seen: Observation | None) -> None:
        """Note what was evaluated; then let others have their turn, or end the attack."""
        if seen is not None:
            for side in seen.rows.unique().tolist():
                self._note(side, seen)
        try:
            self.pause()
        except StopRequestedError as stop:
            raise AttackEndedError from stop

    def advance(self, fraction: float) -> None:
        """The fraction done, as the attack reports it."""
        self.fraction = max(self.fraction, fraction)

    def _note(self, side: int, seen: Observation) -> None:
        own = (seen.rows == side).nonzero()[:, 0]
        margins = seen.margins[own]
        number = int(own[margins.argmin()])
        lowest = float(margins.min())
        self.steps[side] += 1
        self.passes[side] += len(own)
        self.waiting[side].append(lowest)
        self.lowest[side] = min(self.lowest[side], lowest)
        if self.size is not None and lowest < 0:
            fooling = own[(margins < 0).nonzero()[:, 0]]
            sizes = [(self.size(seen.picture(int(one)) - self.clean), int(one)) for one in fooling]
            smallest, number = min(sizes)
            rank = (False, smallest)
        else:
            # Attacks that minimize the size rank an image that does not fool behind all that do.
            rank = (self.size is not None, lowest)
        if rank < self.rank[side]:
            # A copy, because the picture may be a view of tensors that the attack goes on changing.
            self.rank[side], self.best[side] = rank, seen.picture(number).clone()
            self._new[side] = True
        if time.monotonic() - self._sent[side] >= EVENT_EVERY:
            self._emit(side)

    def _emit(self, side: int) -> None:
        now = time.monotonic()
        event: Message = {
            "event": "step",
            "side": SIDES[side],
            "step": self.steps[side],
            "margins": [finite(one) for one in self.waiting[side]],
            "best": finite(self.lowest[side]),
            "fraction": self.fraction,
        }
        if self._new[side] and now - self._drawn[side] >= PICTURE_EVERY:
            event["png"] = picture_text(self.best[side])
            self._drawn[side], self._new[side] = now, False
        self._sent[side] = now
        self.waiting[side] = []
        self.send(event)

    def flush(self) -> None:
        """Send what has not been sent."""
        for side in range(self.sides):
            if self.waiting[side]:
                self._emit(side)


NORMS: dict[str, Callable[[Tensor], float]] = {
    "linf": lambda change: float(change.abs().amax()),
    "l2": lambda change: float(change.norm()),
    "l1": lambda change: float(change.abs().sum()),
    "l0": lambda change: float((change != 0).any(0).sum()),
}
