"""What benchmarks share with each other: sections named on the command line, and tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def run(sections: Mapping[str, Callable[[], None]]) -> None:
    """Run the sections that the command line names, all where it names none."""
    wanted = sys.argv[1:] or list(sections)
    unknown = [name for name in wanted if name not in sections]
    if unknown:
        sys.exit(f"no section {unknown[0]!r}; there are {', '.join(sections)}")
    for name in wanted:
        sections[name]()


def table(frame: pd.DataFrame) -> str:
    """The frame in Markdown, numbers with three decimals."""
    lines = [" | ".join(map(str, frame.columns)), "|".join(["---"] * len(frame.columns))]
    lines += [
        " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row)
        for row in frame.itertuples(index=False)
    ]
    return "\n".join(f"| {line} |" for line in lines)
