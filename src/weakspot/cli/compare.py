"""`weakspot compare` and `weakspot report`, and the gate that they share with `weakspot audit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from rich.console import Console
from rich.markup import escape

from weakspot.cli.app import GATE_FAILED, UNREADABLE, Failure, command
from weakspot.cli.options import OUTPUT, OutputOptions, argument, flag, option
from weakspot.cli.output import make_table, print_json, print_table, print_text, warnings_as_notes

if TYPE_CHECKING:
    import pandas as pd

    from weakspot.audit.findings.gates import Verdict

Row = Mapping[str, Any]  # of a table
SHOWN = 20  # scores that are shown without --all
FloatOption = Annotated[
    bool,
    flag(
        "--float",
        "Count attacked images as the attack returned them, not rounded to 8 bits as image files are.",
    ),
]


@dataclass(frozen=True)
class GateOptions:
    """Conditions under which the command fails, for a build server."""

    panel: ClassVar[str | None] = OUTPUT

    fail_if: Annotated[
        list[str] | None,
        option(
            "--fail-if CONDITION",
            'Exit with code 3 if this holds for any row or cannot be evaluated: "robust_accuracy < 0.4", '
            "\"region == 'cam' and robust_high < 0.2\". Repeat for several.",
        ),
    ] = None
    junit: Annotated[Path | None, option("--junit FILE", "Write the results of --fail-if as JUnit XML.")] = (
        None
    )

    def check(self) -> None:
        """Check the conditions before anything is computed, and remove an earlier result file."""
        from weakspot.audit.findings.gates import Condition

        for text in self.fail_if or ():
            Condition(text)
        if self.junit is None:
            return
        if not self.fail_if:
            raise Failure("--junit has no effect without --fail-if")
        check_writable("--junit", self.junit)
        if self.junit.is_file() and not self.junit.is_symlink():
            self.junit.unlink()  # so that no earlier verdict is taken for the one of this run


def check_writable(option: str, path: Path) -> None:
    """Check that a file can be written at the path."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise Failure(f"{option} must be a file in an existing folder, got {path}")


@dataclass(frozen=True)
class Gate:
    """A gate after the work: the verdicts on all conditions.

    Attributes:
        verdicts: one for each condition and row; none without conditions.
        shortfalls: why the audits are incomplete. Every condition then fails, because missing images could decide it.
    """

    verdicts: Sequence[Verdict]
    shortfalls: Sequence[str] = ()

    @classmethod
    def evaluate(
        cls,
        options: GateOptions,
        judge: Callable[[Sequence[str]], Sequence[Verdict]],
        suite: str,
        shortfalls: Sequence[str] = (),
    ) -> Gate:
        """Evaluate the conditions, and write the result file.

        Args:
            options: conditions and result file.
            judge: evaluates the conditions on complete audits.
            suite: name of the JUnit suite.
            shortfalls: why the audits are incomplete.
        """
        from weakspot._io.files import write_atomic
        from weakspot.audit.findings.gates import Verdict, junit

        conditions = [text.strip() for text in options.fail_if or ()]
        if conditions and shortfalls:
            why = "; ".join(shortfalls)
            verdicts: Sequence[Verdict] = [
                Verdict(text, "all images", True, f"{text} cannot be evaluated: {why}") for text in conditions
            ]
        else:
            verdicts = judge(conditions) if conditions else []
        if options.junit is not None:
            text = junit(verdicts, suite)
            write_atomic(options.junit, lambda draft: draft.write_text(text, "utf-8"))
        return cls(verdicts, shortfalls)

    def as_json(self) -> dict[str, object]:
        """The entry of the JSON document; nothing without conditions."""
        if not self.verdicts:
            return {}
        failed = any(verdict.failed for verdict in self.verdicts)
        return {"gate": {"failed": failed, "checks": [asdict(verdict) for verdict in self.verdicts]}}

    def announce(self, *, silent: bool) -> None:
        """Print the failed checks to standard error.

        Raises:
            typer.Exit: with code 3 if a check failed, 4 if the audits are incomplete.
        """
        console = Console(stderr=True, highlight=False)
        failed = [verdict for verdict in self.verdicts if verdict.failed]
        for verdict in failed:
            console.print(escape(f"gate: {verdict.row}: {verdict.why}"), soft_wrap=True, style="red")
        if failed:
            raise typer.Exit(UNREADABLE if self.shortfalls else GATE_FAILED)
        if self.verdicts and not silent:
            count = len(self.verdicts)
            console.print(f"gate: passed, {count} check{'s' if count > 1 else ''}", style="dim")


@command(
    "weakspot compare runs/v7 runs/v8",
    "weakspot compare runs/v7 runs/v8 --csv changes.csv",
    "weakspot compare runs/v7 runs/v8 --fail-if \"score == 'robust_accuracy' and high < 0\" --junit gate.xml",
)
def compare(
    before: Annotated[str, argument("BEFORE", "Folder or URL of an audit.")],
    after: Annotated[
        str,
        argument("AFTER", "Folder or URL of another audit of the same images."),
    ],
    gate: GateOptions,
    output: OutputOptions,
    every: Annotated[
        bool, flag("--all", "Show all scores, not only those that changed significantly.")
    ] = False,
    csv: Annotated[Path | None, option("FILE", "Write all scores to this file.")] = None,
    floats: FloatOption = False,
) -> None:
    """Compare two audits image by image: which scores changed, by how much, and with what confidence.

    Images are matched by their content. Each interval is for the mean difference over images; q is a p value corrected
    for the number of scores.

    The conditions of --fail-if are evaluated on every row, with the columns score, attack, region, images, before,
    after, difference, low, high, p and q.
    """
    gate.check()
    if csv is not None:
        check_writable("--csv", csv)
    with warnings_as_notes(output.quiet):
        from weakspot._io.files import write_atomic
        from weakspot.audit import compare as compare_runs
        from weakspot.audit import open_run
        from weakspot.audit.findings.gates import judge

        runs = open_run(before, eight_bit=not floats), open_run(after, eight_bit=not floats)
        shortfalls = [f"{run.name}: {run.shortfall}" for run in runs if run.shortfall]
        comparison = compare_runs(*runs)
        result = Gate.evaluate(
            gate,
            lambda conditions: judge(conditions, comparison.table, _row_name),
            f"compare {before} {after}",
            shortfalls,
        )
        if csv is not None:
            write_atomic(csv, lambda draft: comparison.table.to_csv(draft, index=False))
    if output.as_json:
        print_json({**comparison.as_mapping(), **result.as_json()})
    elif not output.quiet:
        _print(comparison.table if every else comparison.moved, every=every)
        print_text(comparison.sentence())
        for sentence in (*comparison.remarks, *comparison.only):
            print_text(sentence, style="dim")
    result.announce(silent=output.silent)


def _row_name(row: Row) -> str:
    return " / ".join(str(row[key]) for key in ("score", "attack", "region") if row[key])


def _print(rows: pd.DataFrame, *, every: bool) -> None:
    if rows.empty:
        print_text("No score changed significantly.")
        return
    names = ("score", "attack", "region")
    headings = (*names, "images", "before", "after", "difference", "95% interval", "q")
    table = make_table(headings, fold=names)
    shown = rows if every else rows.head(SHOWN)
    for _, row in shown.iterrows():
        table.add_row(
            *(escape(str(row[key])) for key in (*names, "images")),
            *(f"{row[key]:.3g}" for key in ("before", "after", "difference")),
            # NaN differs from itself: no interval or p value was computed.
            f"{row['low']:.3g} to {row['high']:.3g}" if row["low"] == row["low"] else "",
            "" if row["q"] != row["q"] else "< 0.001" if row["q"] < 0.001 else f"{row['q']:.3f}",
        )
    print_table(table)
    more = len(rows) - len(shown)
    print_text(f"... and {more} more (show them with --all)\n" if more else "", style="dim")


@command("weakspot report runs/v7", "weakspot report runs/v7 --out v7.html")
def report(
    run: Annotated[
        str,
        argument("RUN", "Folder or URL of an audit, finished or not."),
    ],
    output: OutputOptions,
    out: Annotated[Path | None, option("FILE", "File to write.", default="report.html in the folder")] = None,
    floats: FloatOption = False,
) -> None:
    """Write the report of an audit: robust accuracy, distributions, classes, images and layers, with intervals.

    The report is one HTML file that includes its drawings and opens without a network. The report of an audit that is
    not finished shows the results so far, and says so.
    """
    from weakspot.audit import open_run, write_run_report
    from weakspot.audit.page.run_page import store_run_report

    opened = open_run(run, eight_bit=not floats)
    if out is not None and out.is_dir():
        raise Failure(f"--out must be a file, got the folder {out}")
    where = store_run_report(opened) if out is None else str(write_run_report(opened, out).resolve())
    if output.as_json:
        print_json({"report": str(where)})
    elif not output.quiet:
        print_text(f"Written to {where}")
