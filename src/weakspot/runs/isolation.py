"""Isolation: work on many images of which some fail, or for which memory is too small, done by halves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from weakspot.checks import NotFiniteError, warn
from weakspot.runs.steady import SteadyClassifier

T = TypeVar("T")
Found = list[tuple[Tensor, T]]
MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


def isolated(work: Callable[[Tensor], T], rows: Tensor, troubles: dict[int, str], what: str) -> Found[T]:
    """`work` on all rows, or where that fails on either half, down to the images that fail alone.

    Args:
        work: takes row numbers (n,).
        rows: (N,) row numbers.
        troubles: the row numbers that fail are entered here, each with the reason.
        what: the work in words.

    Returns:
        Row numbers and what came out of them, in order.

    Raises:
        ValueError: when every one of several images fails, and not for NaN: then it is no image's fault.
        MemoryError: or torch's own, as soon as memory runs out.
    """
    fresh: dict[int, Exception] = {}
    found = _halving(work, rows, fresh)
    if len(rows) > 1 and len(fresh) == len(rows):
        first = fresh[int(rows[0])]
        if not any(isinstance(error, NotFiniteError) for error in fresh.values()):
            raise ValueError(f"{what} failed on every image: {_sentence(first)}") from first
    troubles.update({row: f"{what}: {_sentence(error)}" for row, error in fresh.items()})
    return found


def _halving(work: Callable[[Tensor], T], rows: Tensor, fresh: dict[int, Exception]) -> Found[T]:
    if not len(rows):
        return []
    try:
        return [(rows, work(rows))]
    except OSError:
        raise  # the disk's fault, not an image's
    except Exception as error:
        if out_of_memory(error):
            raise
        if len(rows) == 1:
            fresh[int(rows[0])] = error
            return []
    half = (len(rows) + 1) // 2
    return _halving(work, rows[:half], fresh) + _halving(work, rows[half:], fresh)


def out_of_memory(error: Exception) -> bool:
    """Whether it says that memory has run out, of whatever device."""
    said = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in MEMORY)
    )


def _sentence(error: Exception) -> str:
    if isinstance(error, NotFiniteError):
        return "the model returned NaN or infinity"
    first = str(error).strip().partition("\n")[0]
    return (
        first if isinstance(error, ValueError) and first else f"{type(error).__name__}: {first}".rstrip(": ")
    )


class Lots:
    """How many images are worked on at once: as many as were asked for, or as memory allows.

    Args:
        batch_size: as many as were asked for; None for a whole shard.
        classifier: what goes in groups and may have its group halved at last, or None where lots go down to one image.
    """

    def __init__(self, batch_size: int | None, classifier: SteadyClassifier | None) -> None:
        self.classifier = classifier
        group = 1 if classifier is None else classifier.group
        self.size = None if batch_size is None else -(-batch_size // group) * group

    def each(
        self, work: Callable[[Tensor], T], rows: Tensor, troubles: dict[int, str], what: str
    ) -> Found[T]:
        """`isolated` work, lot by lot; a lot for which memory runs out is done again in halves.

        Raises:
            ValueError: as `isolated`, or when the memory is too small for a single image.
        """
        found: Found[T] = []
        start = 0
        while start < len(rows):
            lot = rows[start : start + (self.size or len(rows))]
            try:
                found += isolated(work, lot, troubles, what)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                said = str(error).strip().partition("\n")[0]
            else:
                start += len(lot)
                continue
            self._shrink(
                len(lot), f"{what}: {said}"
            )  # outside the handler, whose traceback keeps the memory in use
        return found

    def _shrink(self, count: int, what: str) -> None:
        group = 1 if self.classifier is None else self.classifier.group
        if count > group:
            self.size = max(group, count // 2 // group * group)
        elif self.classifier is not None and group > self.classifier.smallest_group:
            self.size = self.classifier.group = group // 2
            warn(
                f"memory does not hold {group} images at once; they go through the model {group // 2} at a time from "
                "here on, which can change last digits",
                RuntimeWarning,
            )
        else:
            raise ValueError(f"{what} (with {count} image at a time; the memory is too small for this model)")
