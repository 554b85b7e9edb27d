"""Gates: conditions on what a run or a comparison found, under which a build is to fail."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import numpy as np

from weakspot._checks import unknown_choice
from weakspot.statistics import proportion_interval

if TYPE_CHECKING:
    import pandas as pd

    from weakspot.audit.store.run import Run


Row = Mapping[str, Any]
ROBUST = ("robust_accuracy", "robust_low", "robust_high")
OPERATIONS: Mapping[type[ast.AST], Callable[..., Any]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_,
}  # fmt: skip


class _UnknownError(Exception):
    """A number of which nothing is known."""


class _UndefinedError(_UnknownError):
    """A number that the row cannot have."""


@dataclass(frozen=True)
class Verdict:
    """What a condition says of one row.

    Attributes:
        condition: as it was written.
        row: what it was asked of, in words.
        failed: whether it holds, or cannot be judged: either way the gate is shut.
        why: one sentence.
    """

    condition: str
    row: str
    failed: bool
    why: str


class Condition:
    """A condition such as "robust_accuracy < 0.4" or "region == 'cam' and low < 0.2".

    Names are columns; comparisons, and, or, not, brackets and + - * / are understood, nothing else is run.

    Args:
        text: as people write it.
        names: columns that there are; any, where they are not known yet.

    Raises:
        ValueError: when it is no such condition, or names something else.
    """

    def __init__(self, text: str, names: Sequence[str] | None = None) -> None:
        self.text = text.strip()
        try:
            self.tree = ast.parse(self.text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ValueError(
                f"fail-if is {text!r}; accepted is a condition such as robust_accuracy < 0.4"
            ) from None
        self.names: list[str] = []
        try:
            self._check(self.tree, names)
        except RecursionError:
            raise ValueError(f"fail-if has {len(self.text)} characters; accepted are fewer") from None
        if not isinstance(self.tree, ast.Compare | ast.BoolOp) and not (
            isinstance(self.tree, ast.UnaryOp) and isinstance(self.tree.op, ast.Not)
        ):
            raise ValueError(
                f"fail-if is {text!r}, which compares nothing; accepted is such as robust_accuracy < 0.4"
            )

    def _check(self, node: ast.AST, names: Sequence[str] | None) -> None:
        parts: list[ast.AST]
        match node:
            case ast.Name():
                if names is not None and node.id not in names:
                    raise ValueError(unknown_choice("column in fail-if", node.id, names))
                self.names.append(node.id)
                return
            case ast.Constant():
                if isinstance(node.value, str | int | float):
                    return
                raise ValueError(
                    f"fail-if is {self.text!r} with {node.value!r}; accepted are numbers and texts"
                )
            case ast.BoolOp():
                parts = [*node.values]  # noqa: PD011
            case ast.Compare():
                parts = [node.left, *node.comparators, *node.ops]
            case ast.BinOp():
                parts = [node.left, node.right, node.op]
            case ast.UnaryOp():
                parts = [node.operand, node.op]
            case _ if type(node) in OPERATIONS:
                return
            case _:
                raise ValueError(
                    f"fail-if is {self.text!r}; accepted are column names, numbers, texts in quotes, comparisons, and, "
                    "or, not, + - * /"
                )
        for part in parts:
            self._check(part, names)

    def asked(self, row: Row, undefined: Collection[str]) -> bool:
        """Whether it can be asked of a row: not where all that it lacks to be judged are columns in `undefined`."""
        try:
            self._value(self.tree, {**row, **dict.fromkeys(undefined, _UndefinedError)})
        except _UndefinedError:
            return False
        except (_UnknownError, TypeError, ZeroDivisionError, OverflowError):
            return True
        return True

    def judge(self, row: Row, words: str) -> Verdict:
        """Whether it holds of a row; what is missing in the row shuts the gate, too, where it decides."""
        try:
            holds = bool(self._value(self.tree, row))
        except _UnknownError as unknown:
            return Verdict(self.text, words, True, f"{unknown} is not known, so {self.text} cannot be judged")
        except (TypeError, ZeroDivisionError, OverflowError) as error:
            return Verdict(self.text, words, True, f"{self.text} cannot be judged ({error})")
        seen = ", ".join(f"{name} is {_shown(row[name])}" for name in dict.fromkeys(self.names))
        return Verdict(self.text, words, holds, f"{self.text}: {seen}")

    def _together(self, node: ast.BoolOp, row: Row) -> bool:
        """What and, or make of their parts; one that is missing counts only where no other decides."""
        every, unknown = isinstance(node.op, ast.And), None
        for part in node.values:  # noqa: PD011
            try:
                if bool(self._value(part, row)) != every:
                    return not every
            except _UnknownError as error:
                unknown = error if unknown is None or isinstance(unknown, _UndefinedError) else unknown
        if unknown is not None:
            raise unknown
        return every

    def _value(self, node: ast.AST, row: Row) -> Any:
        match node:
            case ast.Name():
                value = row[node.id]
                if value is _UndefinedError:
                    raise _UndefinedError(node.id)
                if value is None or (isinstance(value, float) and math.isnan(value)):
                    raise _UnknownError(node.id)
                return value
            case ast.Constant():
                return node.value
            case ast.BoolOp():
                return self._together(node, row)
            case ast.Compare():
                left = self._value(node.left, row)
                for sign, part in zip(node.ops, node.comparators, strict=True):
                    right = self._value(part, row)
                    if isinstance(left, str) != isinstance(right, str):
                        raise TypeError("a text and a number are compared")
                    if not OPERATIONS[type(sign)](left, right):
                        return False
                    left = right
                return True
            case ast.BinOp():
                sides = self._value(node.left, row), self._value(node.right, row)
                if any(isinstance(side, str) for side in sides):
                    raise TypeError("a text is no number")
                return OPERATIONS[type(node.op)](*sides)
            case ast.UnaryOp():
                return OPERATIONS[type(node.op)](self._value(node.operand, row))
        raise TypeError(f"{type(node).__name__} is not understood")


def judge(
    conditions: Sequence[str],
    rows: pd.DataFrame,
    words: Callable[[Row], str],
    *,
    undefined: Callable[[Row], Collection[str]] = lambda _: (),
    others: Sequence[tuple[str, pd.DataFrame]] = (),
) -> list[Verdict]:
    """Every condition on every row; the gate is shut where any of them fails, and where one is asked of no row.

    Args:
        conditions: as people write them.
        rows: what they are asked of.
        words: what to call a row.
        undefined: columns that a row cannot have, such as the robust accuracy of an attack that has none. A condition
            that cannot be judged for want of these alone is not asked of the row.
        others: what the rows could be as well, with the case in words; a condition must not hold of these either.

    Raises:
        ValueError: when one is no condition.
    """
    read = [Condition(text, [str(name) for name in rows.columns]) for text in conditions]
    table = _records(rows)
    cases = [(case, _records(frame)) for case, frame in others]
    verdicts: list[Verdict] = []
    for one in read:
        asked = [
            _worst(one, row, words(row), [(case, frame[place]) for case, frame in cases])
            for place, row in enumerate(table)
            if one.asked(row, undefined(row))
        ]
        if not asked:
            why = f"there is nothing that {one.text} could be asked of"
            if table:
                names = ", ".join(dict.fromkeys(name for name in one.names if name in undefined(table[0])))
                why += (
                    f": no row has {names} (for robust accuracy, give --budget or an attack that takes one)"
                )
            asked = [Verdict(one.text, "nothing", True, why)]
        verdicts += asked
    return verdicts


def _worst(condition: Condition, row: Row, words: str, cases: Sequence[tuple[str, Row]]) -> Verdict:
    """The verdict on a row, or on the first case of it that shuts the gate."""
    verdict = condition.judge(row, words)
    for case, other in cases:
        if not verdict.failed and other != row:
            found = condition.judge(other, words)
            verdict = replace(found, why=f"{found.why} {case}") if found.failed else verdict
    return verdict


def _records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in rows.to_dict("records")]


def unknown_cases(run: Run, rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """What `cell_table` could be: images on which the model raised may all have fallen, or all have withstood.

    Without these cases a model that raises on most images would be judged by the few others.
    """
    counts = run.sql(
        "select count(distinct index), count(distinct index) filter (correct is not null) from records"
    )
    total, clean = counts.fetchall()[0]
    cases = []
    for right, case in ((0, "if all images without a result counted as errors"), (1, "if none of them did")):
        frame = rows.copy()
        for place, row in enumerate(_records(rows)):
            known = int(row["images"])
            if 0 < known < total and math.isfinite(row["robust_accuracy"]):
                kept = round(known * row["robust_accuracy"]) + right * (total - known)
                frame.loc[frame.index[place], list(ROBUST)] = proportion_interval(np.arange(total) < kept)
        if 0 < clean < total:
            kept = (clean * frame["clean_accuracy"]).round() + right * (total - clean)
            frame["clean_accuracy"] = kept / total
        cases.append((case, frame))
    return cases


def junit(verdicts: Sequence[Verdict], suite: str) -> str:
    """The verdicts as JUnit XML, a test case for each, which build servers show."""
    failures = sum(verdict.failed for verdict in verdicts)
    counts = {"tests": str(len(verdicts)), "failures": str(failures), "errors": "0", "skipped": "0"}
    root = ET.Element("testsuites", {"name": "weakspot", **counts})
    inner = ET.SubElement(root, "testsuite", {"name": _legal(suite), **counts})
    for verdict in verdicts:
        case = ET.SubElement(
            inner,
            "testcase",
            classname=_legal(verdict.row),
            name=_legal(f"not ({verdict.condition})"),
            time="0",
        )
        if verdict.failed:
            ET.SubElement(case, "failure", message=_legal(verdict.why), type="gate").text = _legal(
                f"{verdict.row}: {verdict.why}"
            )
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _legal(text: str) -> str:
    """Without characters that XML does not know."""
    return "".join(
        char
        if char in "\t\n" or 32 <= ord(char) < 0xD800 or 0xE000 <= ord(char) < 0xFFFE or ord(char) > 0xFFFF
        else "?"
        for char in text
    )
