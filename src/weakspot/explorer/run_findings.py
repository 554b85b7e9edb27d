"""What the records say as a whole: weak regions of classes, and what changed between two runs.

Both are long computations in the background, which the page asks for until they are done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import pandas as pd

from weakspot.audit.findings.class_contrasts import ClassContrasts, class_contrasts
from weakspot.audit.findings.comparison import Comparison, compare
from weakspot.audit.store.run import Run
from weakspot.explorer.record_table import CHANGE, RecordTable, plain

T = TypeVar("T")
Reply = dict[str, object]

PATIENCE = 0.5  # seconds that a request waits for the result
MAX_ROWS = 100  # of a table
CHOOSING = (
    ("label_name", "name"),
    ("attack", "attack"),
    ("region", "region"),
)  # filters, and columns they choose by


class Later(Generic[T]):
    """A result that is computed once, from the first request on, in a thread of its own.

    Args:
        compute: takes a function that it calls with the fraction that is done.
        turn: a lock that computations share which must not run at once.
    """

    def __init__(
        self, compute: Callable[[Callable[[float], None]], T], turn: threading.Lock | None = None
    ) -> None:
        self._compute, self._turn = compute, turn or threading.Lock()
        self._lock, self._done = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._value: T | None = None
        self._error: Exception | None = None
        self._closed = False
        self.fraction = 0.0

    def result(self) -> T | None:
        """The result, or None if it takes longer than `PATIENCE`.

        Raises:
            Exception: that the computation raised, at every request.
        """
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="weakspot-gallery", daemon=True)
                self._thread.start()
        self._done.wait(PATIENCE)
        if self._error is not None:
            raise self._error
        return self._value

    def close(self) -> None:
        """End the computation at its next step."""
        self._closed = True

    def join(self, seconds: float) -> None:
        """Wait so long for its end."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        try:
            with self._turn:
                # It may have been closed while it waited for its turn.
                self._watch(0.0)
                self._value = self._compute(self._watch)
        except Exception as error:  # noqa: BLE001 - whatever it is, the one who asks gets it
            self._error = error
        finally:
            self._done.set()

    def _watch(self, fraction: float) -> None:
        if self._closed:
            raise RuntimeError("the gallery has been closed")
        self.fraction = fraction


class WeakRegions:
    """Classes and regions over the whole run, computed once.

    Filters choose rows of the table and change no number: a selection of images by outcome would decide the answer, and
    correcting only for the classes on display would hide how many were compared.

    Args:
        run: of an audit.
        turn: shared by what asks the run at length: a connection takes one question at a time.
    """

    def __init__(self, run: Run, turn: threading.Lock) -> None:
        self.later: Later[ClassContrasts] = Later(lambda watch: class_contrasts(run, watch), turn)

    def answer(self, body: Mapping[str, object]) -> Reply:
        """Rows and sentences of `class_contrasts`; {"working": fraction} until they are known."""
        done = self.later.result()
        if done is None:
            return {"working": self.later.fraction}
        given = body.get("filters")
        filters = given if isinstance(given, dict) else {}
        chosen = {name: own for name, own in CHOOSING if isinstance(filters.get(name), list)}
        table = done.table
        for name, own in chosen.items():
            table = table[[value in filters[name] for value in table[own]]]
        return {
            "rows": _rows(table),
            "more": max(0, len(table) - MAX_ROWS),
            "sentences": list(done.sentences[:MAX_ROWS]),
            "more_sentences": max(0, len(done.sentences) - MAX_ROWS),
            "ignored": sorted(set(filters) - set(chosen)),
        }


class RunComparison:
    """What a second run does with the same images, computed once.

    Args:
        run: the first.
        other: the second.
        table: the records of both.
        turn: as for `WeakRegions`.
    """

    def __init__(self, run: Run, other: Run, table: RecordTable, turn: threading.Lock) -> None:
        self.later: Later[Comparison] = Later(lambda _: compare(run, other), turn)
        self._table = table

    def answer(self, body: Mapping[str, object]) -> Reply:  # noqa: ARG002 - every question has a body
        """The verdict, the scores that moved, and how many images changed; {"working": 0} until they are known."""
        done = self.later.result()
        if done is None:
            return {"working": 0.0}
        changes = self._table.rows(
            f"select attack, region, {CHANGE} as value, count(*) as n from gallery "
            "group by all order by attack, region, value"
        )
        return {
            "verdict": done.sentence(),
            "images": done.images,
            "moved": _rows(done.moved),
            "more": max(0, len(done.moved) - MAX_ROWS),
            "compared": len(done.table),
            "only": list(done.only),
            "remarks": list(done.remarks),
            "changes": changes,
        }


def _rows(table: pd.DataFrame) -> list[Reply]:
    rows = table.head(MAX_ROWS).astype(object).to_dict("records")
    return [{str(name): plain(value) for name, value in row.items()} for row in rows]
