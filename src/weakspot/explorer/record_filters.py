"""What the page asks of the records, checked and turned into SQL: filters, order, and the place where a page ends.

Names of columns are compared with those that exist, and every value travels as a parameter, so nothing that the page
sends becomes part of the SQL.
"""

import base64
import hashlib
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from weakspot._checks import unknown_choice
from weakspot.audit.findings.distributions import BINS
from weakspot.audit.findings.outcomes import NUMBERS, quoted_name

NUMBER, FLAG, TEXT = "number", "flag", "text"  # kinds of columns
FRACTIONAL = ("DOUBLE", "FLOAT")
MAX_FILTERS = 32
MAX_VALUES = 200
MAX_TEXT = 500
ORDER = "id"  # the order of the images, their attacks and regions

Values = dict[str, object]


@dataclass(frozen=True)
class Column:
    """A column of the records that can be filtered and sorted.

    Attributes:
        name: of the column.
        kind: "number", "flag" (yes or no) or "text".
        fractional: whether it may hold NaN and infinity, which count as missing.
    """

    name: str
    kind: str
    fractional: bool = False

    @property
    def sql(self) -> str:
        """The value, null if it is missing."""
        name = quoted_name(self.name)
        return f"case when isfinite({name}::double) then {name}::double end" if self.fractional else name


class Axis(NamedTuple):
    """The axis of a histogram: its limits and the width of a bin; values beyond count in the outermost bins."""

    low: float
    high: float

    @property
    def width(self) -> float:
        return (self.high - self.low) / BINS

    def bin_sql(self, column: Column) -> str:
        """The number of the bin that a value is in; filters by bins use the same expression, so counts agree."""
        place = f"floor(({column.sql} - {self.low!r}) / {self.width!r})"
        return f"greatest(0, least({BINS - 1}, {place}))::integer"


class Condition(NamedTuple):
    """An SQL condition with its parameters."""

    sql: str
    values: Values


def columns_of(names: list[str], types: list[str]) -> dict[str, Column]:
    """The columns that the page may use; those of other types (lists, dates) are left out."""
    kinds = {**dict.fromkeys(NUMBERS, NUMBER), "BOOLEAN": FLAG, "VARCHAR": TEXT}
    return {
        name: Column(name, kinds[kind], kind in FRACTIONAL)
        for name, kind in zip(names, types, strict=True)
        if kind in kinds
    }


def find_column(name: object, columns: Mapping[str, Column]) -> Column:
    """Raises ValueError, with the closest name, if there is no such column."""
    if not isinstance(name, str) or name not in columns:
        raise ValueError(unknown_choice("column", str(name)[:MAX_TEXT], columns))
    return columns[name]


def read_condition(filters: object, columns: Mapping[str, Column], axes: Mapping[str, Axis]) -> Condition:
    """The condition that all filters hold.

    Args:
        filters: column -> a list of values of which it must have one (null for missing), {"bins": [first, last]} of
            its histogram, or {"contains": text}, whatever the case of letters.
        columns: that exist.
        axes: of the histograms, by column.

    Raises:
        ValueError: if a filter is none of these.
    """
    if filters is None:
        filters = {}
    if not isinstance(filters, dict) or len(filters) > MAX_FILTERS:
        raise ValueError(f"filters must be a mapping of at most {MAX_FILTERS} columns, got {_short(filters)}")
    # Begun with a condition that always holds, so that an empty mapping needs no case of its own.
    parts, values = ["true"], {}
    for number, (name, wanted) in enumerate(filters.items()):
        column = find_column(name, columns)
        if isinstance(wanted, list):
            part, more = _one_of(column, wanted, f"f{number}")
        elif isinstance(wanted, dict) and set(wanted) == {"bins"} and column.kind == NUMBER:
            part, more = _within_bins(column, wanted["bins"], axes), {}
        elif isinstance(wanted, dict) and set(wanted) == {"contains"} and column.kind == TEXT:
            text = wanted["contains"]
            if not isinstance(text, str) or len(text) > MAX_TEXT:
                raise ValueError(f"contains must be a text of at most {MAX_TEXT} letters, got {_short(text)}")
            part, more = f"contains(lower({column.sql}), lower($f{number}))", {f"f{number}": text}
        else:
            other = '{"bins": [first, last]}' if column.kind == NUMBER else '{"contains": text}'
            expected = "a list of values" + (f" or {other}" if column.kind != FLAG else "")
            raise ValueError(f"filter of {name} must be {expected}, got {_short(wanted)}")
        parts.append(part)
        values.update(more)
    return Condition(" and ".join(parts), values)


def _one_of(column: Column, wanted: list[object], prefix: str) -> tuple[str, Values]:
    if len(wanted) > MAX_VALUES:
        raise ValueError(f"filter of {column.name} must list at most {MAX_VALUES} values, got {len(wanted)}")
    known = [value for value in wanted if value is not None]
    for value in known:
        _check_value(column, value)
    names = [f"{prefix}_{place}" for place in range(len(known))]
    parts = [f"{column.sql} in ({', '.join(f'${name}' for name in names)})"] if known else []
    parts += [f"{column.sql} is null"] if len(known) < len(wanted) else []
    return f"({' or '.join(parts) or 'false'})", dict(zip(names, known, strict=True))


def _within_bins(column: Column, bins: object, axes: Mapping[str, Axis]) -> str:
    if (
        not isinstance(bins, list)
        or len(bins) != 2
        or not all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < BINS for one in bins)
    ):
        raise ValueError(f"bins must be two numbers between 0 and {BINS - 1}, got {_short(bins)}")
    # Greatest and least ignore missing values, which are in no bin.
    return (
        f"({column.sql} is not null and {axes[column.name].bin_sql(column)} between {bins[0]} and {bins[1]})"
    )


def _check_value(column: Column, value: object) -> None:
    if not _fits(column.kind, value):
        expected = {
            NUMBER: "a number between -2**63 and 2**63",
            FLAG: "true or false",
            TEXT: f"a text of at most {MAX_TEXT} letters",
        }
        raise ValueError(f"value of {column.name} must be {expected[column.kind]}, got {_short(value)}")


def _fits(kind: str, value: object) -> bool:
    """Whether DuckDB takes the value for a column; JSON has integers of any size, and Python's reader takes NaN."""
    if kind == NUMBER:
        # NaN fails every comparison.
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, bool) if kind == FLAG else isinstance(value, str) and len(value) <= MAX_TEXT


@dataclass(frozen=True)
class Order:
    """The order of the records, and the pages of it.

    Attributes:
        column: that is sorted by; missing values come last, equal ones in the order of id.
        descending: largest first.
        query: digest of filters and order, which every cursor carries.
    """

    column: Column
    descending: bool
    query: str

    @property
    def sql(self) -> str:
        """The content of ORDER BY."""
        value = self.column.sql
        return f"({value}) is null, {value} {'desc' if self.descending else 'asc'}, {ORDER}"

    def after(self, cursor: object) -> Condition:
        """The condition for the records behind a cursor; None stands for the start.

        Raises:
            ValueError: if it is not a cursor of this query.
        """
        if cursor is None:
            return Condition("true", {})
        value, last = self._decoded(cursor)
        own = self.column.sql
        if value is None:
            return Condition(f"({own} is null and {ORDER} > $last)", {"last": last})
        beyond = "<" if self.descending else ">"
        # Missing values come last, so that all of them follow any value.
        sql = f"({own} {beyond} $value or ({own} = $value and {ORDER} > $last) or {own} is null)"
        return Condition(sql, {"value": value, "last": last})

    def cursor(self, value: object, last: int) -> str:
        """The cursor of a page that ends with this record."""
        return base64.urlsafe_b64encode(json.dumps([self.query, value, last]).encode()).decode()

    def _decoded(self, cursor: object) -> tuple[object, int]:
        try:
            query, value, last = json.loads(base64.urlsafe_b64decode(str(cursor)))
        except (ValueError, TypeError, RecursionError):
            query, value, last = None, None, None
        fits = value is None or _fits(self.column.kind, value)
        if query != self.query or not isinstance(last, int) or not _fits(NUMBER, last) or not fits:
            raise ValueError(
                "after must be the cursor of the page before, with the same filters and the same order "
                "(leave it out for the first page)"
            )
        return value, last


def read_order(sort: object, filters: object, columns: Mapping[str, Column]) -> Order:
    """The order that is asked for: {"column": name, "descending": bool}, or None for that of the images.

    Raises:
        ValueError: if it is anything else.
    """
    if sort is None:
        sort = {"column": ORDER}
    if not isinstance(sort, dict) or not {"column"} <= set(sort) <= {"column", "descending"}:
        raise ValueError(f'sort must be {{"column": name, "descending": true or false}}, got {_short(sort)}')
    descending = sort.get("descending", False)
    if not isinstance(descending, bool):
        raise ValueError(f"descending must be true or false, got {_short(descending)}")
    column = find_column(sort["column"], columns)
    asked = json.dumps([filters or {}, column.name, descending], sort_keys=True).encode()
    return Order(column, descending, hashlib.blake2b(asked, digest_size=8).hexdigest())


_short = reprlib.repr
