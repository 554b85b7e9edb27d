"""Digests of stored content, and the errors of runs that are damaged or cannot continue."""

import hashlib
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

SIZE = 8  # bytes of a digest: one damage in 2^64 would be overlooked
NAMED = 3


class DamagedError(OSError):
    """Stored content differs from what was written, so nothing may be concluded from it."""


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
        # Exceptions are pickled as their positional arguments alone, which do not suffice to make this one.
        return partial(StoppedError, resumable=self.resumable), self.args


def digest_of(content: bytes | memoryview, number: int | None = None) -> str:
    """Sixteen hex digits (BLAKE2b) of some content and, if given, of its number."""
    return hashlib.blake2b(content, digest_size=SIZE, salt=_salt(number)).hexdigest()


def file_digest(path: Path, number: int | None = None) -> str:
    """`digest_of` a file's content, without holding it in memory.

    Raises:
        OSError: if the file cannot be read.
    """
    blake2b = partial(hashlib.blake2b, digest_size=SIZE, salt=_salt(number))
    with path.open("rb") as file:
        return hashlib.file_digest(file, blake2b).hexdigest()


def digest_or_none(path: Path) -> str | None:
    """The digest of a file, None if it cannot be read."""
    try:
        return file_digest(path)
    except OSError:
        return None


def _salt(number: int | None) -> bytes:
    # The number of a shard is part of its digest: an intact file in another shard's place is damage, too.
    return b"" if number is None else f"{number}".encode()


def damaged(where: str, names: Sequence[str]) -> DamagedError:
    """The error that names the damaged files and the remedy."""
    verb = "differs" if len(names) == 1 else "differ"
    return DamagedError(
        f"{where} is damaged: {enumerated(names)} {verb} from what was written (repair the run with weakspot audit "
        f"--resume {where})"
    )


def enumerated(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"
