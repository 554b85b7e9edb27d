"""Integrity: digests of stored content, and the error of what no longer agrees with its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

SIZE = 8  # bytes of a digest: one in 2^64 damages would not be seen
NAMED = 3


class DamagedError(OSError):
    """Stored content that is not what was written; nothing is to be concluded from it."""


class StoppedError(Exception):
    """An audit stopped: its folder cannot be written, an image cannot be fetched, or its workers died.

    What was written before is intact.

    Attributes:
        resumable: whether the audit had begun, so that `resume` can continue it.
    """

    def __init__(self, sentence: str, *, resumable: bool) -> None:
        super().__init__(sentence)
        self.resumable = resumable

    def __reduce__(self) -> tuple[object, ...]:
        return partial(StoppedError, resumable=self.resumable), self.args


def digest_of(content: bytes | memoryview, number: int | None = None) -> str:
    """Sixteen hex digits (BLAKE2b) of some content and, where there is one, its number."""
    return hashlib.blake2b(content, digest_size=SIZE, salt=_salt(number)).hexdigest()


def file_digest(path: Path, number: int | None = None) -> str:
    """The same of a file, read in pieces.

    Raises:
        OSError: when it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(
            file, partial(hashlib.blake2b, digest_size=SIZE, salt=_salt(number))
        ).hexdigest()


def _salt(number: int | None) -> bytes:
    return b"" if number is None else f"{number}".encode()


def damaged(where: str, what: Sequence[str]) -> DamagedError:
    """The sentence that names what is damaged and what helps."""
    return DamagedError(
        f"{where} is damaged: {listed(what)} {'is' if len(what) == 1 else 'are'} not what was written; repair the run "
        f"with weakspot audit --resume {where}"
    )


def listed(names: Iterable[str], most: int = NAMED) -> str:
    """The first few names, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - most:,} more" if len(every) > most else ""
    return f"{', '.join(every[:most])}{more}"
