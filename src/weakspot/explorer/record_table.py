"""The tables of records that the page asks: those of one run, or those that two runs share, and what somebody types.

What is typed is one SELECT on the tables of a run, bounded in time, memory and rows.
"""

import math
import threading
from collections.abc import Iterable, Mapping, Sequence

from weakspot.audit.findings.comparison import Shared, same_limit, shared_parts
from weakspot.audit.findings.distributions import TAIL, axis_limits
from weakspot.audit.findings.outcomes import quoted_name
from weakspot.audit.store.locked_sql import LockedConnection
from weakspot.audit.store.records import quoted
from weakspot.audit.store.run import Run
from weakspot.explorer.record_filters import NUMBER, ORDER, Axis, Column, columns_of

Row = dict[str, object]

IN_MEMORY = 500_000  # records, about a kilobyte each
MEMORY = "2GB"
SECONDS = 20.0  # of a query of the page
REMEDY = "filter fewer columns, or use Run.connect"
TYPED_SECONDS, ROWS, TYPED_MEMORY = 10.0, 500, "512MB"  # of a query that somebody typed
MAX_QUERY = 20_000  # letters
MAX_CELL = 300  # letters of a value
EXACT = 2**53  # integers beyond are not exact in a browser
CHANGE = "change"  # the column that says what the second run does with an image
LOST, GAINED = "newly fooled", "no longer fooled"
AFTER = (
    "index", "robust", "fooled", "correct", "margin_clean", "margin_adversarial", "predicted_name",
    "adversarial_class_name",
)  # fmt: skip
SUFFIX = "_after"  # of the second run's columns


class RecordTable:
    """Records with a number each, `ORDER`: the place of its cell in the plan after that of its image.

    Only the gallery's own queries use its connection. Any thread may ask.

    Args:
        run: whose records they are.
        other: a second run; then only records of images, attacks and regions that both contain remain, with columns of
            the second run in addition, and `CHANGE`.

    Raises:
        ValueError: if the two runs have nothing in common.
    """

    def __init__(self, run: Run, other: Run | None = None) -> None:
        connection = run.connect()
        # A number follows from the record alone, so that it means the same whenever the run is opened.
        cells = [(attack.label, region) for attack, region in run.plan.cells]
        cases = " ".join(
            f"when attack = {quoted(attack)} and region = {quoted(region)} then {place}"
            for place, (attack, region) in enumerate(cells)
        )
        connection.execute(
            f'create temp view numbered as select ("index" * {len(cells)} + case {cases} end)::bigint as {ORDER}, * '
            "from outcomes"
        )
        query = "select * from numbered"
        if other is not None:
            connection.register("other", _others(run, other))
            query = _paired_query()
        (count,) = connection.sql("select count(*) from records").fetchall()[0]
        # From memory, a page takes a quarter of the time that it takes from the run's files.
        kind = "table" if count <= IN_MEMORY else "view"
        connection.execute(f"create temp {kind} gallery as {query}")
        if other is not None and not connection.sql("select 1 from gallery limit 1").fetchall():
            raise ValueError(
                f"{run.name} and {other.name} have no image, attack and region in common (attacks are the same if "
                "their name, budget and settings are)"
            )
        relation = connection.sql("select * from gallery limit 0")
        self.columns: dict[str, Column] = columns_of(
            list(relation.columns), [str(kind) for kind in relation.types]
        )
        self._axes: dict[str, Axis] = {}
        self._locked, self._lock = LockedConnection(connection, MEMORY), threading.Lock()

    def rows(self, query: str, values: Mapping[str, object] | None = None) -> list[Row]:
        """The rows of a query on the table gallery.

        Raises:
            TimeoutError: if it takes longer than `SECONDS`.
        """
        with self._lock:
            relation = self._locked.sql(query, values or {}, seconds=SECONDS, remedy=REMEDY)
            names = relation.columns
            return [dict(zip(names, map(plain, row), strict=True)) for row in relation.fetchall()]

    def records(self, ids: Sequence[int], names: Iterable[str]) -> dict[int, Row]:
        """Id -> these columns of its record, for those that exist."""
        if not ids:
            return {}
        chosen = ", ".join(
            f"{self.columns[name].sql} as {quoted_name(name)}" for name in dict.fromkeys([ORDER, *names])
        )
        numbers = ", ".join(map(str, ids))
        rows = self.rows(
            # The limits let DuckDB skip the blocks that hold none of them.
            f"select {chosen} from gallery where {ORDER} between {min(ids)} and {max(ids)} and {ORDER} in ({numbers})"
        )
        return {whole(row[ORDER]): row for row in rows}

    def axis(self, column: Column) -> Axis:
        """The axis of a column's histogram, the same whatever the filters.

        Raises:
            ValueError: if the column holds no numbers.
        """
        if column.kind != NUMBER:
            raise ValueError(f"column must hold numbers, got {column.name}")
        if column.name not in self._axes:
            query = (
                f"select min(x) as least, max(x) as most, quantile_cont(x, {TAIL}) as lower, "
                f"quantile_cont(x, {1 - TAIL}) as upper from (select {column.sql}::double as x from gallery)"
            )
            with self._lock:
                summary = self._locked.sql(query, {}, seconds=SECONDS, remedy=REMEDY).df()
            known = bool(summary.notna().all(axis=None))
            self._axes[column.name] = Axis(*axis_limits(summary)) if known else Axis(0.0, 1.0)
        return self._axes[column.name]

    def close(self) -> None:
        """Close the connection; the table answers no more queries."""
        with self._lock:
            self._locked.close()


def _others(run: Run, other: Run) -> object:
    """The second run's outcomes in the parts that both have, under the first run's names of attacks."""
    shared: Shared = shared_parts(run, other)
    names = {after.label: before.label for before, after in shared.attacks}
    frame = other.sql(
        f"select content, attack, region, {', '.join(map(quoted_name, AFTER))} from outcomes"
    ).df()
    frame = frame[frame["attack"].isin(names) & frame["region"].isin(shared.regions)]
    frame = frame.assign(attack=frame["attack"].map(names))
    for before, after in shared.attacks:
        # Robust at one size says nothing about robust at another.
        if not same_limit(run.plan, before, other.plan, after):
            frame.loc[frame["attack"] == before.label, "robust"] = None
    return frame.astype({"robust": "boolean"})


def _paired_query() -> str:
    """Records of the first run with those of the second: the same content, attack and region; copies in order."""
    copy = 'row_number() over (partition by content, attack, region order by "index") as copy'
    after = ", ".join(f'o."{name}" as "{name}{SUFFIX}"' for name in AFTER)
    change = (
        "case when n.robust is null or o.robust is null then null when n.robust and o.robust then 'withstood in both' "
        f"when n.robust then '{LOST}' when o.robust then '{GAINED}' else 'fooled in both' end"
    )
    return (
        f"select n.* exclude (copy), {after}, {change} as {CHANGE} from (select *, {copy} from numbered) n join "
        f"(select *, {copy} from other) o using (content, attack, region, copy)"
    )


def plain(value: object) -> object:
    """A value for JSON: numbers, flags and texts as they are, what is not finite as None, others as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def whole(value: object) -> int:
    """A value of an integer column."""
    if not isinstance(value, int):
        raise TypeError(f"value must be an integer, got {value!r}")
    return value


class QueryBox:
    """Answers queries on the tables records, outcomes, skipped and images, as `Run.sql` names them.

    It has a connection of its own: nothing that is typed can disturb the page's tables.

    Args:
        run: of an audit.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._locked: LockedConnection | None = None
        self._lock = threading.Lock()

    def answer(self, body: Mapping[str, object]) -> dict[str, object]:
        """Columns and at most `ROWS` rows, and whether there are more.

        Raises:
            ValueError: if the query is not one SELECT.
            duckdb.Error: if it is invalid, or wants more than the tables or than `TYPED_MEMORY`.
            TimeoutError: if it takes longer than `TYPED_SECONDS`.
        """
        query = body.get("query")
        if not isinstance(query, str) or not query.strip() or len(query) > MAX_QUERY:
            raise ValueError(f"query must be one SELECT of at most {MAX_QUERY:,} letters")
        with self._lock:
            if self._locked is None:
                self._locked = LockedConnection(self.run.connect(), TYPED_MEMORY, strict=True)
            # One more row than is shown, which says whether there are more.
            relation = self._locked.select(query, seconds=TYPED_SECONDS, rows=ROWS + 1)
            rows = relation.fetchall()
        return {
            "columns": [_shortened(name) for name in relation.columns],
            "rows": [[_value(value) for value in row] for row in rows[:ROWS]],
            "more": len(rows) > ROWS,
        }

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            if self._locked is not None:
                self._locked.close()
            self._locked = None


def _value(value: object) -> object:
    """A value for JSON, without loss where it is short: numbers that JSON or a browser lacks become texts."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return value if abs(value) < EXACT else str(value)
    return f"{len(value):,} bytes" if isinstance(value, bytes) else _shortened(str(value))


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 1] + "…"
