"""Entry points of installed packages, which add attacks, models, analyses and engines."""

from __future__ import annotations

import importlib.metadata
import sys
from functools import lru_cache
from importlib.metadata import EntryPoint


def entry_points(*, group: str, name: str | None = None) -> list[EntryPoint]:
    """The installed entry points of a group, like `importlib.metadata.entry_points`, whose scan takes milliseconds.

    The installed packages are scanned once per search path.
    """
    return [entry for entry in _entry_points(group, tuple(sys.path)) if name in {None, entry.name}]


@lru_cache(maxsize=64)
def _entry_points(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:  # noqa: ARG001 - a key of the cache
    return tuple(importlib.metadata.entry_points(group=group))
