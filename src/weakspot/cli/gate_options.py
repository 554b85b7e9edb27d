"""The gate of `weakspot audit` and `weakspot compare`: --fail-if, --junit, and the exit code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from weakspot._io.files import write_atomic
from weakspot.cli.app import GATE_FAILED, UNREADABLE, Failure, notes, one_line
from weakspot.cli.options import OUTPUT, option

if TYPE_CHECKING:
    from weakspot.audit.findings.gates import Verdict


@dataclass(frozen=True)
class GateOptions:
    """Conditions under which the command fails, for a build server."""

    panel: ClassVar[str | None] = OUTPUT

    fail_if: Annotated[
        list[str] | None,
        option(
            "--fail-if CONDITION",
            "Exit with code 3 if this holds for any row or cannot be evaluated. The description above lists the names "
            "that it may contain. Repeat for several.",
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
        # A link such as /dev/stdout stays.
        if self.junit.is_file() and not self.junit.is_symlink():
            self.junit.unlink()  # so that no earlier verdict is taken for the one of this run

    def evaluate(
        self, judge: Callable[[Sequence[str]], Sequence[Verdict]], suite: str, shortfalls: Sequence[str] = ()
    ) -> Gate:
        """Evaluate the conditions, and write the result file.

        Args:
            judge: evaluates the conditions on complete audits.
            suite: name of the JUnit suite.
            shortfalls: why the audits are incomplete.
        """
        from weakspot.audit.findings.gates import Verdict, junit

        conditions = [text.strip() for text in self.fail_if or ()]
        if conditions and shortfalls:
            why = "; ".join(shortfalls)
            verdicts: Sequence[Verdict] = [
                Verdict(text, "all images", True, f"{text} cannot be evaluated: {why}") for text in conditions
            ]
        else:
            verdicts = judge(conditions) if conditions else []
        if self.junit is not None:
            text = junit(verdicts, suite)
            write_atomic(self.junit, lambda draft: draft.write_text(text, "utf-8"))
        return Gate(verdicts, shortfalls)


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
        failed = [verdict for verdict in self.verdicts if verdict.failed]
        for verdict in failed:
            notes.print(one_line(f"gate: {verdict.row}: {verdict.why}"), soft_wrap=True, style="red")
        if failed:
            raise typer.Exit(UNREADABLE if self.shortfalls else GATE_FAILED)
        if self.verdicts and not silent:
            count = len(self.verdicts)
            notes.print(f"gate: passed, {count} check{'s' if count > 1 else ''}", style="dim")
