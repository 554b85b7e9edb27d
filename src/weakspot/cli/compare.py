"""`weakspot compare` and `weakspot report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from weakspot._io.files import write_atomic
from weakspot.cli.app import Failure, command, console, one_line
from weakspot.cli.gate_options import GateOptions, check_writable
from weakspot.cli.options import EveryOption, FloatOption, OutputOptions, argument, option
from weakspot.cli.output import (
    add_row,
    first_rows,
    make_table,
    print_json,
    print_table,
    print_text,
    shorten_name,
    warnings_as_notes,
)
from weakspot.statistics.number_format import counted, number, p_value

if TYPE_CHECKING:
    from weakspot.audit.findings.comparison import Comparison
    from weakspot.audit.findings.gates import Verdict

Row = Mapping[str, object]  # of a table
LEAST_NAME = 12  # characters of a name in a table


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
    every: EveryOption = False,
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
        from weakspot.audit import compare as compare_runs
        from weakspot.audit import open_run
        from weakspot.audit.findings.gates import judge

        runs = open_run(before, eight_bit=not floats), open_run(after, eight_bit=not floats)
        shortfalls = [f"{run.name}: {run.shortfall}" for run in runs if run.shortfall]
        comparison = compare_runs(*runs)
        result = gate.evaluate(
            lambda conditions: [
                *judge(conditions, comparison.table, _row_name),
                *_not_compared(conditions, comparison),
            ],
            f"compare {before} {after}",
            shortfalls,
        )
        if csv is not None:
            write_atomic(csv, lambda draft: comparison.table.to_csv(draft, index=False))
    if output.as_json:
        print_json({**comparison.as_mapping(), **result.as_json()})
    elif not output.quiet:
        _print(comparison, every=every)
    result.announce(silent=output.silent)


def _not_compared(conditions: Sequence[str], comparison: Comparison) -> list[Verdict]:
    """Failures of conditions that ask for no score or attack, where none under an attack could be compared."""
    from weakspot.audit.findings.gates import Condition, Verdict

    if comparison.table["attack"].ne("").any():
        return []
    why = f"cannot be judged: {comparison.sentence()}"
    return [
        Verdict(text, "robust accuracy", True, f"{text} {why}")
        for text in conditions
        if not {"score", "attack"} & {column for column, _ in Condition(text).asked}
    ]


def _row_name(row: Row) -> str:
    return " / ".join(str(row[key]) for key in ("score", "attack", "region") if row[key])


def _print(comparison: Comparison, *, every: bool) -> None:
    """The sentence that counts, the scores that moved (all with `every`), and other differences of the runs."""
    from weakspot.audit.findings.comparison import MAX_Q

    print_text(f"{comparison.sentence()}\n")
    rows, more = first_rows(list((comparison.table if every else comparison.moved).iterrows()), every=every)
    if rows:
        headings = ("score", "under", "before", "after", "difference [95%]")
        table = make_table((*headings, "images", "q") if every else headings, fold=())
        lines = []
        for _, row in rows:
            # NaN, which stands for no interval, is not equal to itself.
            interval = f" [{number(row['low'])}, {number(row['high'])}]" if row["low"] == row["low"] else ""
            lines.append([number(row["before"]), number(row["after"]), number(row["difference"]) + interval])
        # The names share what the numbers leave of a line.
        taken = sum(max(map(len, column)) + 2 for column in zip(headings[2:], *lines, strict=True))
        width = max(LEAST_NAME, (console().width - taken) // 2 - 2)
        for (_, row), line in zip(rows, lines, strict=True):
            names = [row["score"], " · ".join(filter(None, (row["attack"], row["region"])))]
            if every:
                line += [str(row["images"]), "" if row["q"] != row["q"] else p_value(row["q"], "")]
            shown = names if every else [shorten_name(one_line(name), width) for name in names]
            add_row(table, *shown, *line)
        print_table(table, whole=every)
    elif (uncertain := int((comparison.table["q"] < MAX_Q).sum())) > 0:
        print_text(
            f"{counted(uncertain, 'change')} of a score {'is' if uncertain == 1 else 'are'} significant (q below .05), "
            f"but without a 95% interval that excludes zero (show {'it' if uncertain == 1 else 'them'} with --all)."
        )
    elif comparison.table["attack"].ne("").any():
        print_text("No change of a score is significant (q below .05).")
    if more:
        print_text(f"... and {more} more (show them with --all)", style="dim")
    for sentence in (*comparison.remarks, *comparison.only):
        print_text(sentence, style="dim")


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
    if out is not None and (file := next(filter(Path.is_file, out.parents), None)):
        raise Failure(f"--out must be inside a folder, got {out} ({file} is a file)")
    where = store_run_report(opened) if out is None else str(write_run_report(opened, out).resolve())
    if output.as_json:
        print_json({"report": str(where)})
    elif not output.quiet:
        print_text(f"Written to {where}")
