"""Queries of a run's tables that read these tables and nothing else, bounded in memory and time."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import duckdb

LOCKED = (
    "autoinstall_known_extensions = false",
    "autoload_known_extensions = false",
    "enable_external_access = false",  # files, network, and variables of the caller
)


class LockedConnection:
    """A DuckDB connection that reaches no file, no network and no extension, and whose settings cannot be changed.

    Args:
        connection: with the tables; it is locked for good.
        memory: of all its queries, such as "4GB".
        strict: no temporary files, and no evaluation of constants before the query runs, which counts for no limit
            (range(500000000) would take 30 GB). One expression that makes a long list can still exceed the memory.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, memory: str, *, strict: bool = False) -> None:
        self.connection: duckdb.DuckDBPyConnection | None = connection
        # Without external access, the folder of temporary files can no longer be changed.
        folding = "expression_rewriter,statistics_propagation"
        first = ("temp_directory = ''", f"disabled_optimizers = '{folding}'") if strict else ()
        # The lock comes last: from then on no setting can be changed, not even by a query that a user typed.
        for setting in (*first, *LOCKED, f"memory_limit = '{memory}'", "lock_configuration = true"):
            connection.execute(f"set {setting}")

    def sql(
        self,
        query: str,
        values: Mapping[str, object],
        *,
        seconds: float,
        remedy: str,
        rows: int | None = None,
    ) -> duckdb.DuckDBPyRelation:
        """Run a query to its end.

        Args:
            query: SQL.
            values: for the placeholders $name in the query.
            seconds: after which it is interrupted.
            remedy: for the message if it takes longer.
            rows: largest number of rows that are computed; None for all.

        Raises:
            duckdb.Error: if the query is invalid, needs too much memory, or wants more than the tables.
            TimeoutError: if it takes too long.
        """
        import duckdb

        connection, late = self._open(), threading.Event()

        def stop() -> None:
            # Set first: the query may end before this thread goes on.
            late.set()
            connection.interrupt()

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            result = connection.sql(query, params=dict(values)) if values else connection.sql(query)
            if result is None:  # a statement without a table
                result = connection.sql("select true as success")
            return _with_rows(result if rows is None else result.limit(rows))
        except duckdb.InterruptException:
            # It was interrupted by somebody else, not by the timer.
            if not late.is_set():
                raise
            raise TimeoutError(f"query must end within {seconds:g} s, got a longer one ({remedy})") from None
        finally:
            timer.cancel()

    def close(self) -> None:
        """Close the connection; it takes no more queries."""
        if self.connection is not None:
            self.connection.close()
        self.connection = None

    def _open(self) -> duckdb.DuckDBPyConnection:
        if self.connection is None:
            raise ValueError("the tables have been closed")
        return self.connection

    def select(self, query: str, *, seconds: float, rows: int) -> duckdb.DuckDBPyRelation:
        """Run one SELECT that somebody typed, and compute at most `rows` of its rows.

        The tables should be views: DuckDB counts a SELECT as one even if a common table expression in it writes.

        Raises:
            ValueError: if it is anything but one SELECT, or the connection has been closed.
            duckdb.Error: as `sql`.
            TimeoutError: as `sql`.
        """
        import duckdb

        # Parsed without being run: a text may hold several statements.
        statements = self._open().extract_statements(query)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            kinds = ", ".join(statement.type.name for statement in statements) or "nothing"
            raise ValueError(f"query must be one SELECT, got {kinds}")
        return self.sql(query, {}, seconds=seconds, rows=rows, remedy="ask for less at a time")


def _with_rows(relation: duckdb.DuckDBPyRelation) -> duckdb.DuckDBPyRelation:
    """The relation, run once: otherwise its query would run when its rows are asked for, without a limit of time."""
    keep = "materialize" if hasattr(relation, "materialize") else "execute"  # before DuckDB 2
    rows: duckdb.DuckDBPyRelation = getattr(relation, keep)()
    return rows
