"""Gates: conditions on the rows of a run or comparison that make a build fail."""

import ast
import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from xml.etree import ElementTree as ET

import pandas as pd

from weakspot._checks import unknown_choice

Row = Mapping[str, object]
EXAMPLE = "robust_accuracy < 0.4"
OPERATIONS: Mapping[type[ast.AST], Callable[..., object]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_,
}  # fmt: skip
NOT_COMPUTABLE = (TypeError, ZeroDivisionError, OverflowError)


class _UnknownError(Exception):
    """The row has no known value for a column."""


class _UndefinedError(_UnknownError):
    """The row cannot have a value for a column."""


_UNDEFINED = object()  # marks such a column in a row


@dataclass(frozen=True)
class Verdict:
    """The result of one condition on one row.

    Attributes:
        condition: the condition's text.
        row: the row's name.
        failed: whether the condition holds or cannot be judged; both fail the gate.
        why: one sentence.
    """

    condition: str
    row: str
    failed: bool
    why: str

    def __repr__(self) -> str:
        return f"Verdict({'failed' if self.failed else 'passed'}, {self.row}: {self.why})"


class Condition:
    """A condition such as "robust_accuracy < 0.4" or "region == 'cam' and low < 0.2".

    Names are columns. Comparisons, and, or, not, parentheses and + - * / are allowed; nothing else is evaluated.

    Args:
        text: the condition.
        names: the columns that exist; None allows any name.

    Raises:
        ValueError: if the text is no such condition or names an unknown column.
    """

    def __init__(self, text: str, names: Sequence[str] | None = None) -> None:
        self.text = text.strip()
        self.names: list[str] = []
        self.limits: list[float] = []
        try:
            self._tree = ast.parse(self.text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ValueError(f"fail-if must be a condition such as {EXAMPLE}, got {text!r}") from None
        try:
            self._check(self._tree, names)
        except RecursionError:
            raise ValueError(f"fail-if must be shorter, got {len(self.text)} characters") from None
        negated = isinstance(self._tree, ast.UnaryOp) and isinstance(self._tree.op, ast.Not)
        if not negated and not isinstance(self._tree, ast.Compare | ast.BoolOp):
            raise ValueError(f"fail-if must compare something, as in {EXAMPLE}, got {text!r}")

    def _check(self, node: ast.AST, names: Sequence[str] | None) -> None:
        """Raise ValueError unless the node and its parts are in the allowed subset of Python."""
        parts: list[ast.AST] = []
        match node:
            case ast.Name():
                if names is not None and node.id not in names:
                    raise ValueError(unknown_choice("fail-if column", node.id, names))
                self.names.append(node.id)
            case ast.Constant():
                if not isinstance(node.value, str | int | float):
                    raise ValueError(
                        f"fail-if must hold numbers and texts only, got {node.value!r} in {self.text!r}"
                    )
                if not isinstance(node.value, str):
                    self.limits.append(node.value)
            case ast.BoolOp():
                parts = [*node.values]  # noqa: PD011 - a syntax tree
            case ast.Compare():
                parts = [node.left, *node.comparators, *node.ops]
            case ast.BinOp():
                parts = [node.left, node.right, node.op]
            case ast.UnaryOp():
                parts = [node.operand, node.op]
            # Operators are nodes as well: those of the table pass.
            case _ if type(node) not in OPERATIONS:
                raise ValueError(
                    "fail-if must consist of column names, numbers, quoted texts, comparisons, and, or, not, + - * /, "
                    f"got {self.text!r}"
                )
        for part in parts:
            self._check(part, names)

    @property
    def asked(self) -> list[tuple[str, str]]:
        """The (column, text) pairs that it asks for by ==, outside `not`."""
        return list(_asked(self._tree))

    def applies_to(self, row: Row, undefined: Collection[str]) -> bool:
        """False if the condition cannot be judged for the sole reason that the row cannot have these columns."""
        try:
            self._value(self._tree, {**row, **dict.fromkeys(undefined, _UNDEFINED)})
        except _UndefinedError:
            return False
        except (_UnknownError, *NOT_COMPUTABLE):
            pass
        return True

    def judge(self, row: Row, name: str) -> Verdict:
        """Evaluate the condition on a row; an unknown value that matters fails the gate, too."""
        try:
            holds = bool(self._value(self._tree, row))
        except _UnknownError as unknown:
            return Verdict(self.text, name, True, f"{unknown} is not known, so {self.text} cannot be judged")
        except NOT_COMPUTABLE as error:
            return Verdict(self.text, name, True, f"{self.text} cannot be judged ({error})")
        values = ", ".join(
            f"{column} is {_formatted(row[column], self.limits)}" for column in dict.fromkeys(self.names)
        )
        return Verdict(self.text, name, holds, f"{self.text}: {values}")

    def _value(self, node: ast.AST, row: Row) -> object:
        match node:
            case ast.Name():
                value = row[node.id]
                if value is _UNDEFINED:
                    raise _UndefinedError(node.id)
                if value is None or (isinstance(value, float) and math.isnan(value)):
                    raise _UnknownError(node.id)
                return value
            case ast.Constant():
                return node.value
            case ast.BoolOp():
                return self._combined(node, row)
            case ast.Compare():
                left = self._value(node.left, row)
                for sign, part in zip(node.ops, node.comparators, strict=True):
                    right = self._value(part, row)
                    if isinstance(left, str) != isinstance(right, str):
                        raise TypeError("a text is compared with a number")
                    if not OPERATIONS[type(sign)](left, right):
                        return False
                    left = right
                return True
            case ast.BinOp():
                sides = self._value(node.left, row), self._value(node.right, row)
                if any(isinstance(side, str) for side in sides):
                    raise TypeError("a text is not a number")
                return OPERATIONS[type(node.op)](*sides)
            case ast.UnaryOp():
                return OPERATIONS[type(node.op)](self._value(node.operand, row))
        raise TypeError(f"{type(node).__name__} is not supported")

    def _combined(self, node: ast.BoolOp, row: Row) -> bool:
        """`and` and `or`; an unknown part only matters if no other part decides."""
        all_must_hold = isinstance(node.op, ast.And)
        unknown: _UnknownError | None = None
        for part in node.values:  # noqa: PD011 - a syntax tree
            try:
                if bool(self._value(part, row)) != all_must_hold:
                    return not all_must_hold
            except _UnknownError as error:
                # A value that is merely unknown takes precedence over one that cannot exist: it must fail the gate.
                unknown = error if unknown is None or isinstance(unknown, _UndefinedError) else unknown
        if unknown is not None:
            raise unknown
        return all_must_hold


def _asked(node: ast.AST) -> Iterator[tuple[str, str]]:
    match node:
        case ast.BoolOp():
            for part in node.values:  # noqa: PD011 - a syntax tree
                yield from _asked(part)
        case ast.Compare(ast.Name(column), [ast.Eq()], [ast.Constant(str(text))]) | ast.Compare(
            ast.Constant(str(text)), [ast.Eq()], [ast.Name(column)]
        ):
            yield column, text


def judge(
    conditions: Sequence[str],
    rows: pd.DataFrame,
    name: Callable[[Row], str],
    *,
    undefined: Callable[[Row], Collection[str]] = lambda _: (),
    others: Sequence[tuple[str, pd.DataFrame]] = (),
) -> list[Verdict]:
    """Evaluate every condition on every row. The gate fails if any verdict does.

    Args:
        conditions: texts. One that asks by == for a text that no row has in that column fails.
        rows: the rows to check.
        name: names a row for the reader.
        undefined: the columns that a row cannot have, for example the robust accuracy of an attack without one. A
            condition that cannot be judged for this reason alone skips the row; a condition that skips every row fails.
        others: (case, table) pairs of what the rows could be as well; a condition must not hold in these cases either.

    Raises:
        ValueError: if a text is no condition.
    """
    parsed = [Condition(text, [str(column) for column in rows.columns]) for text in conditions]
    table = _records(rows)
    cases = [(case, _records(frame)) for case, frame in others]
    verdicts: list[Verdict] = []
    for condition in parsed:
        judged = [
            _worst(condition, row, name(row), [(case, frame[place]) for case, frame in cases])
            for place, row in enumerate(table)
            if condition.applies_to(row, undefined(row))
        ]
        # A gate on what is not there, such as an attack of another name, would pass whatever happens.
        absent = [
            Verdict(
                condition.text,
                "nothing",
                True,
                f"{condition.text} cannot be judged: no row has {column} {text!r}",
            )
            for column, text in condition.asked
            if table and text not in {row[column] for row in table}
        ]
        judged = [*(verdict for verdict in judged if verdict.failed or not absent), *absent]
        if not judged:
            why = f"there is no row on which {condition.text} could be judged"
            if table:
                names = ", ".join(dict.fromkeys(one for one in condition.names if one in undefined(table[0])))
                why += (
                    f": no row has {names} (for robust accuracy, give --budget or an attack that takes one)"
                )
            judged = [Verdict(condition.text, "nothing", True, why)]
        verdicts += judged
    return verdicts


def _worst(condition: Condition, row: Row, name: str, cases: Sequence[tuple[str, Row]]) -> Verdict:
    """The verdict on a row or, if that passes, on the first of its cases that fails."""
    verdict = condition.judge(row, name)
    for case, other in cases:
        if not verdict.failed and other != row:
            extreme = condition.judge(other, name)
            verdict = replace(extreme, why=f"{extreme.why} {case}") if extreme.failed else verdict
    return verdict


def _records(rows: pd.DataFrame) -> list[dict[str, object]]:
    return [{str(key): value for key, value in row.items()} for row in rows.to_dict("records")]


def junit(verdicts: Sequence[Verdict], suite: str) -> str:
    """The verdicts as JUnit XML, one test case each, for build servers."""
    failures = sum(verdict.failed for verdict in verdicts)
    counts = {"tests": str(len(verdicts)), "failures": str(failures), "errors": "0", "skipped": "0"}
    root = ET.Element("testsuites", {"name": "weakspot", **counts})
    inner = ET.SubElement(root, "testsuite", {"name": _xml_text(suite), **counts})
    for verdict in verdicts:
        name = _xml_text(f"not ({verdict.condition})")
        case = ET.SubElement(inner, "testcase", classname=_xml_text(verdict.row), name=name, time="0")
        if verdict.failed:
            failure = ET.SubElement(case, "failure", message=_xml_text(verdict.why), type="gate")
            failure.text = _xml_text(f"{verdict.row}: {verdict.why}")
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _formatted(value: object, limits: Sequence[float]) -> str:
    """A value with four digits, or with all of them where those would make it equal to a limit."""
    if not isinstance(value, float):
        return str(value)
    short = f"{value:.4g}"
    return repr(float(value)) if float(short) != value and abs(float(short)) in limits else short


def _xml_text(text: str) -> str:
    """Replace the characters that XML 1.0 does not allow."""

    def allowed(code: int) -> bool:
        return code in (9, 10) or 32 <= code < 0xD800 or 0xE000 <= code < 0xFFFE or code > 0xFFFF

    return "".join(char if allowed(ord(char)) else "?" for char in text)
