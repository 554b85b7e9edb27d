"""SQL that somebody typed into the page: one SELECT on the tables of a run, bounded in time, memory and rows."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping

from weakspot.audit.store.locked_sql import LockedConnection
from weakspot.audit.store.run import Run

SECONDS, ROWS, MEMORY = 10.0, 500, "512MB"
MAX_QUERY = 20_000  # letters
MAX_CELL = 300  # letters of a value
EXACT = 2**53  # integers beyond are not exact in a browser


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
            duckdb.Error: if it is invalid, or wants more than the tables or than `MEMORY`.
            TimeoutError: if it takes longer than `SECONDS`.
        """
        query = body.get("query")
        if not isinstance(query, str) or not query.strip() or len(query) > MAX_QUERY:
            raise ValueError(f"query must be one SELECT of at most {MAX_QUERY:,} letters")
        with self._lock:
            if self._locked is None:
                self._locked = LockedConnection(self.run.connect(), MEMORY, strict=True)
            # One more row than is shown, which says whether there are more.
            relation = self._locked.select(query, seconds=SECONDS, rows=ROWS + 1)
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
