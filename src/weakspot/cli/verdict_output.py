"""What `explain` prints: the first verdict as soon as it is known, and at the end what deeper analyses add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.text import Text

from weakspot.cli.app import one_line
from weakspot.cli.output import (
    add_row,
    first_rows,
    make_table,
    outcome_sentence,
    print_table,
    print_text,
    shorten_name,
)
from weakspot.cli.session import Session
from weakspot.explanations import Explanation
from weakspot.statistics import LEAST_OTHERS
from weakspot.statistics.number_format import counted, p_value, percent

if TYPE_CHECKING:
    import pandas as pd

SQUARES = "weak_spots"  # the analysis that finds the smallest squares


@dataclass(eq=False)
class VerdictOutput:
    """The verdicts of one `explain`.

    Attributes:
        session: of the command.
        planned: names of the analyses that will run.
        every: whether all images are shown.
        latest: the explanation after the last analysis that has finished.
        printed: the verdicts that were printed, by row.
        begun: whether the table of classes was printed.
    """

    session: Session
    planned: Sequence[str]
    every: bool
    latest: Explanation | None = None
    printed: dict[int, str] = field(default_factory=dict)
    begun: bool = False

    @property
    def missing(self) -> list[str]:
        """Analyses that have not finished."""
        done = self.latest.analyses if self.latest else {}
        return [name for name in self.planned if name not in done]

    def update(self, explanation: Explanation) -> None:
        """Keep the explanation so far; print what is known while deeper analyses follow.

        One image: its verdict after the first analysis. Several: first the sentence over all of them, so the smallest
        squares must be known.
        """
        self.latest = explanation
        several = len(explanation.scores) > 1
        if self.begun or self.session.output.silent or (several and SQUARES in self.missing):
            return
        with self.session.showing():
            self._print_classes(explanation)
            if not several:
                self._print_verdicts(explanation)
            if self.missing:
                following = f"Further analyses follow: {', '.join(self.missing)}"
                print_text(f"\n{following} (Ctrl-C keeps those that have finished)", style="dim")

    def finish(self, explanation: Explanation) -> None:
        """Print the verdicts, or what they say beyond those printed before, and what each analysis cost."""
        from weakspot.report.image_verdict import uncompared

        if not self.begun:
            self._print_classes(explanation)
        if self.printed:
            for index, before in self.printed.items():
                verdict = explanation.verdict(index)
                if verdict != before:
                    # Later analyses add sentences to a verdict; those that were printed before are left out.
                    print_text("\n" + " ".join(verdict.replace(before, "").split()))
        else:
            self._print_verdicts(explanation)
        if uncompared(explanation.scores):
            print_text(
                f"\nFor p values, compare with at least {LEAST_OTHERS} other images of the same source whose "
                "importance maps show evidence: --reference FOLDER",
                style="dim",
            )
        if explanation.seconds:
            costs = (f"{name} {seconds:.1f} s" for name, seconds in explanation.seconds.items())
            print_text(f"\nAnalyses: {', '.join(costs)}{self.session.ending()}", style="dim")

    def _print_classes(self, explanation: Explanation) -> None:
        """What holds for all images, and a table of their classes before and after."""
        from weakspot.report.image_findings import overview

        self.begun = True
        scores = explanation.scores
        if sentence := overview(scores, explanation.images):
            print_text(f"{sentence}\n", style="bold")
        right = (scores["read_clean_as"] == scores["label"]).tolist()
        # A targeted attack that ends in a third class has fooled the network, and is no success.
        done = "changed to the target" if scores["asked_for_target"].any() else "fooled"
        ending = self.session.ending()
        print_text(f"{outcome_sentence(scores, right, done, ending, noun=explanation.noun)}\n")
        _print_table(scores, self._rows(explanation)[0], every=self.every)

    def _print_verdicts(self, explanation: Explanation) -> None:
        """The verdict on each image of the table."""
        rows, more = self._rows(explanation)
        for index, row in enumerate(rows):
            self.printed[index] = explanation.verdict(index)
            print_text(f"\n{row['image']}", style="bold")
            print_text(self.printed[index])
        if more:
            print_text(
                f"\n... and {counted(more, f'more {explanation.noun}')} (show them with --all; all are in the report)",
                style="dim",
            )

    def _rows(self, explanation: Explanation) -> tuple[Sequence[pd.Series], int]:
        return first_rows([row for _, row in explanation.scores.iterrows()], every=self.every)


def _print_table(scores: pd.DataFrame, rows: Sequence[pd.Series], *, every: bool) -> None:
    """A row for each image: classes before and after, and where the effect lies if the verdict says so."""
    from weakspot.report.image_verdict import headline

    placed = "effect_in_roi" in scores and bool(scores["effect_in_roi_shift_p"].notna().any())
    compared = "relation" in scores and bool(scores["relation"].notna().any())
    headings = ["image", "before → after"]
    headings += ["effect where it looks"] if placed else []
    headings += ["in other images", "p"] if compared else []
    table = make_table(headings)
    for row in rows:
        # A targeted attack may have ended in a third class.
        missed = " (not the target)" if row["asked_for_target"] else " (not found)"
        missed = " (only before rounding)" if row["success"] else missed
        failed = "" if row["success_8bit"] or row["linf"] == 0 else missed
        failed = failed if row["read_clean_as"] == row["label"] else " (wrong before)"
        name = str(row["image"]) if every else shorten_name(str(row["image"]))
        cells: list[str | Text] = [name, Text.assemble(one_line(headline(row)), (failed, "yellow"))]
        if placed:  # NaN if the attack is confined to a region, which decides where it acts
            cells.append(percent(row["effect_in_roi"]) if row["effect_in_roi_shift_p"] >= 0 else "")
        if compared:
            tested = row["relation_p"] >= 0
            cells.append(percent(row["effect_in_roi_null"]) if tested else "")
            cells.append(p_value(row["relation_p"]).removeprefix("p = ").removeprefix("p ") if tested else "")
        add_row(table, *cells)
    print_table(table, whole=every)
