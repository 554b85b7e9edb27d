"""Results of benchmarks as JSON: one file for each run, and the page that shows all of them.

A benchmark prints tables in Markdown. Inside `recorded`, what it prints is also kept, and the file that `--json FILE`
names gets the tables and the lines around them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import torch


@dataclass(frozen=True)
class Record:
    """One run of a benchmark.

    Attributes:
        benchmark: name of the module.
        about: what it measures.
        command: what was typed.
        date: of its end.
        machine: processor, cores and versions.
        parts: lines of text, or tables as rows of cells, the first row the names of the columns.
    """

    benchmark: str
    about: str
    command: str
    date: str
    machine: str
    parts: Sequence[str | Sequence[Sequence[str]]]

    def to_markdown(self) -> str:
        """The section of this run."""
        parts = [part if isinstance(part, str) else markdown(part) for part in self.parts]
        made = f"`{self.command}`, {self.date}, {self.machine}."
        return "\n\n".join([f"## {self.benchmark}", self.about, *parts, made])


class _Both(io.TextIOBase):
    """Writes to a stream and keeps the text."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.text = stream, io.StringIO()

    def write(self, text: str) -> int:
        self.text.write(text)
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()


@contextmanager
def recorded(benchmark: str, about: str) -> Iterator[None]:
    """Run a benchmark; `--json FILE` is taken out of the command line, and the file is written at the end.

    Args:
        benchmark: name of the module in `benchmarks`.
        about: what it measures, in a sentence.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given, sys.argv[1:] = parser.parse_known_args()
    # For a page that others read: of absolute paths only the last part.
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    command = shlex.join(["python", "-m", f"benchmarks.{benchmark}", *words])
    both = _Both(sys.stdout)
    with redirect_stdout(both):
        yield
    if given.json is not None:
        date = f"{datetime.now(UTC):%Y-%m-%d}"
        record = Record(benchmark, about, command, date, machine(), list(parts_of(both.text.getvalue())))
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(asdict(record), indent=1, ensure_ascii=False) + "\n", "utf-8")


def parts_of(text: str) -> Iterator[str | list[list[str]]]:
    """The lines of a text, with its Markdown tables as rows of cells, the first row the names of the columns."""
    rows: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|"):
            if set("".join(cells)) - set("-: "):  # not the line under the names
                rows.append(cells)
            continue
        if rows:
            yield rows
            rows = []
        if line.strip():
            yield line.strip()


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    names, *body = rows
    lines = [names, ["---"] * len(names), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """Processor, cores, threads, load and torch's version; no name of a host."""
    load = f", load {os.getloadavg()[0]:.0f}" if hasattr(os, "getloadavg") else ""
    used = f"{os.cpu_count()} {platform.machine()} cores, {torch.get_num_threads()} used{load}"
    return f"{used}, torch {torch.__version__}"


def stored_tables(folder: Path) -> str:
    """All stored runs in Markdown, by the name of the file."""
    records = [Record(**json.loads(path.read_text("utf-8"))) for path in sorted(folder.glob("*.json"))]
    return "\n\n".join(record.to_markdown() for record in records)
