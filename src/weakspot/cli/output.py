"""Output: scores for people and for machines."""

from __future__ import annotations

import json
import os
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from weakspot.cli.app import USAGE, Failure

if TYPE_CHECKING:
    import pandas as pd

    from weakspot.classifier import Classifier
    from weakspot.explanations import Explanation


def check_folder(out: Path) -> None:
    """Raises Failure where `out` is a file."""
    if out.exists() and not out.is_dir():
        raise Failure(f"out is {out}, which is a file; accepted is a folder", USAGE)


def make_folder(out: Path) -> None:
    """Before the work, so that nothing is computed that cannot be kept."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"out is {out}, which cannot be made ({error.strerror})", USAGE) from None
    if not os.access(out, os.W_OK):
        raise Failure(f"out is {out}, where you may not write", USAGE)


def describe_run(classifier: Classifier, model: str, seed: int, skipped: list[str]) -> dict[str, str]:
    """How it was made, for report and run.json."""
    from weakspot.audit.store.run_info import versions
    from weakspot.models.specs import fingerprint

    made = {
        "model": f"{classifier.name} ({model}), weights {fingerprint(classifier)}",
        "seed": str(seed),
        "device": str(classifier.mean.device),
        "command": shlex.join(["weakspot", *sys.argv[1:]]),
        "versions": ", ".join(f"{name} {value}" for name, value in versions().items()),
        "made at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return made | ({"skipped": "; ".join(skipped)} if skipped else {})


def print_json(explanation: Explanation, paths: dict[str, Path], skipped: list[str]) -> None:
    """Every score, verdicts and files as one JSON document on standard output."""
    rows = json.loads(explanation.scores.to_json(orient="records", double_precision=9))
    verdicts = [explanation.verdict(index) for index in range(len(explanation))]
    for row, said in zip(rows, verdicts, strict=True):
        row["verdict"] = said
    files = {name: str(path.resolve()) for name, path in paths.items()}
    typer.echo(json.dumps({"scores": rows, "skipped": skipped, "files": files}, indent=2))


def print_table(explanation: Explanation, seconds: float, skipped: int) -> None:
    """A table, then a verdict per image."""
    from weakspot.report.image_verdict import headline
    from weakspot.statistics.number_format import p_value, percent

    console = Console(highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    scores = explanation.scores
    placed = "effect_in_roi" in scores and bool(scores["effect_in_roi_shift_p"].notna().any())
    compared = "relation" in scores and bool(scores["relation"].notna().any())
    headings = ["image", "before → after"]
    headings += ["effect where it looks"] if placed else []
    headings += ["in other images", "p"] if compared else []
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for _, row in scores.iterrows():
        failed = "" if row["success_8bit"] or row["linf"] == 0 else " [yellow](failed)[/yellow]"
        cells = [escape(str(row["image"])), escape(headline(row)) + failed]
        if placed:  # of an attack confined to a part of the image it follows from that part
            cells.append(percent(row["effect_in_roi"]) if row["effect_in_roi_shift_p"] >= 0 else "")
        if compared:
            known = row["relation_p"] >= 0
            cells.append(percent(row["effect_in_roi_null"]) if known else "")
            cells.append(p_value(row["relation_p"]).removeprefix("p = ").removeprefix("p ") if known else "")
        table.add_row(*cells)
    console.print(table)
    for index in range(len(explanation)):
        console.print(
            f"\n[bold]{escape(str(explanation.scores['image'].iloc[index]))}[/bold]", soft_wrap=True
        )
        console.print(escape(explanation.verdict(index)))
    tail = f", {skipped} skipped" if skipped else ""
    console.print(f"\n{len(explanation)} explained{tail} in {seconds:.1f} s", style="dim")


def print_attack(scores: pd.DataFrame, seconds: float, skipped: int) -> None:
    """A row for each image: what it was read as before and after, how far it was moved, what that cost."""
    console = Console(highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    spent = [name for name in ("ssim_budget_spent", "ssim_local_budget_spent") if name in scores]
    similarities = ["ssim_windowed", "ssim_windowed_min", *spent]
    headings = (
        "image",
        "before → after",
        "fooled",
        "unrounded",
        "linf",
        "l2",
        "pixels",
        *similarities,
        "n_forward",
        "n_backward",
    )
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for _, row in scores.iterrows():
        table.add_row(
            escape(str(row["image"])),
            escape(f"{row['before']} → {row['after']}"),
            *("yes" if row[key] else "[yellow]no[/yellow]" for key in ("success_8bit", "success")),
            *(f"{row[key]:.3g}" for key in ("linf", "l2")),
            str(row["pixels"]),
            *(f"{row[name]:.3g}" if name in spent else f"{row[name]:.3f}" for name in similarities),
            *(str(row[key]) for key in ("n_forward", "n_backward")),
        )
    console.print(table)
    tail = f", {skipped} skipped" if skipped else ""
    fooled, floats = (int(scores[key].sum()) for key in ("success_8bit", "success"))
    console.print(
        f"\n{fooled} of {len(scores)} fooled as 8-bit files ({floats} before rounding){tail}, in {seconds:.1f} s",
        style="dim",
    )


def print_rows(rows: list[dict[str, str]], as_json: bool) -> None:
    """Rows of one shape as a table or as JSON."""
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in rows[0]:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(escape(value) for value in row.values()))
    Console(highlight=False).print(table)
