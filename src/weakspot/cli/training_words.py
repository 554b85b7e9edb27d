"""What `weakspot train` says: a line for every epoch, the table at the end, what there is to choose from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

WIDE = 125  # columns of a terminal that takes the table with intervals


def teller() -> Callable[[str, Mapping[str, float]], None]:
    """A line on standard error for every epoch."""
    console = Console(stderr=True, highlight=False)

    def tell(name: str, row: Mapping[str, float]) -> None:
        if "epoch" not in row:
            line = ", ".join(f"{test} {value:.1%}" for test, value in row.items())
            console.print(f"{name}: {line}", soft_wrap=True)
            return
        judged = ", ".join(f"{key} {row[key]:.1%}" for key in ("clean", "robust") if key in row)
        console.print(
            f"{name}, epoch {row['epoch']:.0f}: loss {row['loss']:.3f}, held out: {judged or 'none'}; "
            f"{row['seconds']:.0f} s",
            style="dim",
            soft_wrap=True,
        )

    return tell


def print_training(said: Mapping[str, Any], seconds: float, out: Path, *, matrix: bool) -> None:
    """The table of accuracies, what stopped early, where all is written and what to do next."""
    console = Console(highlight=False)
    rows = said.get("accuracy") or said.get("tests") or []
    if rows:
        tests = list(dict.fromkeys(row["test"] for row in rows))
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        wide = console.width >= WIDE
        for heading in (["trained"] if matrix else []) + tests:
            table.add_column(heading, no_wrap=True)
        names = list(dict.fromkeys(row.get("recipe", "") for row in rows))
        for name in names:
            cells = [
                f"{row['accuracy']:.1%}"
                + (
                    f" ({row['low']:.1%}-{row['high']:.1%})"
                    if wide and row["low"] is not None and row["low"] == row["low"]
                    else ""
                )
                for row in rows
                if row.get("recipe", "") == name
            ]
            table.add_row(*([name] if matrix else []), *cells)
        console.print(table)
    if said.get("stopped") and not matrix:
        console.print(f"[yellow]stopped early:[/yellow] {said['stopped']}")
    for name, why in said["stopped"].items() if matrix else ():
        console.print(f"[yellow]{name} stopped early:[/yellow] {why}")
    spec = said.get("network", {}).get("spec")
    use = f"{spec} --weights {out / 'model.safetensors'}" if spec else str(out)
    what = "matrix.png and accuracy.csv" if matrix else f"weakspot explain PICTURES --model {use}"
    console.print(f"\nWritten to {out.resolve()} in {seconds:.0f} s; next: {what}", style="dim")


def everything() -> list[dict[str, str]]:
    """Recipes and tests, a row each."""
    from weakspot.defenses.training import RECIPES, TESTS

    rows = [{"kind": "recipe", "name": name, "what": recipe.summary} for name, recipe in RECIPES.items()]
    return rows + [{"kind": "test", "name": name, "what": what} for name, what in TESTS.items()]
