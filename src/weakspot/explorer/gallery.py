"""The records of a run, or of two runs side by side, for the page: rows, counts, pictures, and what they say.

Every answer is bounded, whatever the number of records: a page of rows, the bins of a histogram, the most frequent
values.
"""

import reprlib
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from weakspot._checks import unknown_choice
from weakspot.audit.findings.comparison import matched_attacks
from weakspot.audit.findings.distributions import BINS, MISCLASSIFIED
from weakspot.audit.findings.outcomes import score_names
from weakspot.audit.store.digests import DamagedError
from weakspot.audit.store.records import quoted
from weakspot.audit.store.run import Run
from weakspot.classifier import Classifier
from weakspot.explorer.record_filters import (
    MAX_TEXT,
    NUMBER,
    ORDER,
    TEXT,
    Column,
    Condition,
    find_column,
    read_condition,
    read_order,
)
from weakspot.explorer.record_pictures import KINDS, OpenedRecord, Place, RecordPictures
from weakspot.explorer.record_table import CHANGE, SUFFIX, QueryBox, RecordTable, whole
from weakspot.explorer.run_findings import RunComparison, WeakRegions

Reply = dict[str, object]
Body = Mapping[str, object]

PAGE, MAX_PAGE = 50, 200  # records
READERS = 4  # threads that read pictures: one waits for the disk and Zarr while another encodes
PREDICTED = (
    "Labels are the model's own predictions: fooled means that the answer changed, not that it became wrong."
)
GRACE = 1.0  # seconds that computations have when the gallery is closed
LISTED = 30  # values of a column that does not hold numbers
SHOWN = (
    ORDER, "index", "image", "attack", "region", "label", "label_name", "predicted_name", "correct",
    "adversarial_class_name", "fooled", "margin_adversarial", "error", CHANGE, "fooled_after",
    "adversarial_class_name_after", "margin_adversarial_after",
)  # fmt: skip
HISTOGRAMS = (
    "margin_clean",
    "margin_adversarial",
    "confidence_clean",
    "l2",
)  # shown first, if there are such columns
LEADING = (CHANGE, "attack", "region", "label_name", "adversarial_class_name", "fooled", "correct")
PLACES = ("index", "attack", "region")


class Gallery:
    """The records of a run; `answer` takes the page's questions, `record` gives an image to the bench.

    Any thread may ask. The run's files are only read, and no path is taken from the page.

    Args:
        run: of an audit.
        other: a second run. The records are then those of images, attacks and regions that both contain, with the
            second run's outcomes in addition.

    Raises:
        ValueError: if the runs have nothing in common.
        DamagedError: if the records differ from what was written.
    """

    def __init__(self, run: Run, other: Run | None = None) -> None:
        self.run, self.other = run, other
        self._table = RecordTable(run, other)
        self._pictures = RecordPictures(run)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="weakspot-pictures")
        self._other_pictures = None if other is None else RecordPictures(other)
        turn = threading.Lock()
        self._box, self._weak = QueryBox(run), WeakRegions(run, turn)
        self._compared = None if other is None else RunComparison(run, other, self._table, turn)
        self._questions: dict[str, Callable[[Body], Reply]] = {
            "run": self._about,
            "records": self._records,
            "record": self._record,
            "histogram": self._histogram,
            "thumbnails": self._thumbnails,
            "weak_regions": self._weak.answer,
            "sql": self._box.answer,
        }
        if self._compared is not None:
            self._questions["compare"] = self._compared.answer

    @property
    def names(self) -> tuple[str, ...]:
        """The questions that `answer` takes."""
        return tuple(self._questions)

    def close(self) -> None:
        """Close the connections; nothing is answered any more."""
        computing = [one.later for one in (self._weak, self._compared) if one is not None]
        # First, so that a computation that looks between its steps ends by itself.
        for later in computing:
            later.close()
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._table.close()
        self._box.close()
        for run in (self.run, self.other):
            if run is not None:
                run.close()
        for later in computing:  # their next query fails
            later.join(GRACE / len(computing))

    def answer(self, name: str, body: Body) -> Reply:
        """The reply to a question, as values for JSON.

        Raises:
            ValueError: if there is no such question, or the body does not fit it; the message is for the user.
            TimeoutError: if the records do not answer in time.
            DamagedError: if the run's files differ from what was written.
        """
        import duckdb

        if name not in self._questions:
            raise ValueError(unknown_choice("question", name, self._questions))
        try:
            return self._questions[name](body)
        except duckdb.Error as error:
            raise ValueError(str(error).strip()) from None

    def record(self, number: int, classifier: Classifier | None = None) -> OpenedRecord:
        """A record as the bench takes it.

        Args:
            number: its id.
            classifier: the model of the run. With it, the image is read from its file as the audit did; without it, or
                if the file is gone or has changed, it is the stored picture, rounded to 8 bits.

        Raises:
            ValueError: if there is no such record, or neither its file nor a stored picture.
            DamagedError: if the stored picture differs from what was written.
        """
        row = self._existing(number, ["image", "content", "label", *PLACES])
        place = self._place(row)
        attack = self.run.plan.attacks[place.attack]
        image, remark = None, ""
        if classifier is not None:
            image = self._pictures.original(place, str(row["content"]), classifier)
        if image is None:
            image = self._pictures.stored("clean", place)
            remark = "This is the stored picture, rounded to 8 bits."
            if classifier is not None:
                remark = f"The file is not at hand as it was audited. {remark}"
        if image is None:
            raise ValueError(
                f"{row['image']} must be where the audit read it, or stored in the run, got neither "
                "(restore the file, or audit with --maps)"
            )
        return OpenedRecord(
            name=str(row["image"]),
            image=image,
            label=None if row["label"] is None else whole(row["label"]),
            attack=attack.name,
            budget=attack.budget,
            settings=dict(attack.settings),
            region=str(row["region"]),
            adversarial=self._pictures.stored("adversarial", place),
            remark=remark,
        )

    def _existing(self, number: int, names: list[str]) -> Reply:
        rows = self._table.records([number], names)
        if number not in rows:
            raise ValueError(f"id must be that of a record, got {number}")
        return rows[number]

    def _place(self, row: Reply, suffix: str = "") -> Place:
        """Where the pictures of a record lie; with the suffix of the second run, in that one."""
        attacks = [attack.label for attack in self.run.plan.attacks]
        regions = self.run.plan.regions
        attack, region = attacks.index(str(row["attack"])), list(regions).index(str(row["region"]))
        if suffix and self.other is not None:
            # The second run may have the same attack under another number and label.
            other = {one.label: other for one, other in matched_attacks(self.run.plan, self.other.plan)}
            attack = self.other.plan.attacks.index(other[str(row["attack"])])
            region = list(self.other.plan.regions).index(str(row["region"]))
        return Place(whole(row["index" + suffix]), attack, region)

    def _about(self, body: Body) -> Reply:  # noqa: ARG002 - every question has a body
        run, columns = self.run, self._table.columns
        counts = self._table.rows(
            'select count(*) as records, count(distinct "index") as images from gallery'
        )
        return {
            "name": run.name,
            "status": run.info.status,
            "remarks": [
                *([PREDICTED] if set(run.info.labels) == {"prediction"} else []),
                *([run.shortfall] if run.shortfall else []),
                *run.remarks,
            ],
            "model": None if run.info.model is None else run.info.model.name,
            **counts[0],
            "columns": [{"name": column.name, "kind": column.kind} for column in columns.values()],
            "scores": [name for name in score_names(run, HISTOGRAMS, booleans=False) if name in columns],
            "values": [name for name in LEADING if name in columns],
            "bins": BINS,
            "pictures": [*self._pictures.kinds, *(f"{kind}{SUFFIX}" for kind in self._after_kinds())],
            "other": None if self.other is None else self.other.name,
        }

    def _after_kinds(self) -> list[str]:
        return [] if self._other_pictures is None else [k for k in self._other_pictures.kinds if k != "clean"]

    def _records(self, body: Body) -> Reply:
        columns = self._table.columns
        condition, order = self._condition(body), read_order(body.get("sort"), body.get("filters"), columns)
        after, size = order.after(body.get("after")), body.get("size", PAGE)
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= MAX_PAGE:
            raise ValueError(f"size must be a number from 1 to {MAX_PAGE}, got {size!r}")
        # First the page, from few columns; then the rest of its rows.
        # One more than a page, which says whether another one follows.
        keys = self._table.rows(
            f"select {ORDER}, {order.column.sql} as value from gallery where {condition.sql} and {after.sql} "
            f"order by {order.sql} limit {size + 1}",
            {**condition.values, **after.values},
        )
        more, keys = len(keys) > size, keys[:size]
        rows = self._table.records([whole(key[ORDER]) for key in keys], [n for n in SHOWN if n in columns])
        count = self._table.rows(f"select count(*) as n from gallery where {condition.sql}", condition.values)
        last = keys[-1] if more else None
        return {
            "records": [{**rows[whole(key[ORDER])], "value": key["value"]} for key in keys],
            "next": None if last is None else order.cursor(last["value"], whole(last[ORDER])),
            "count": count[0]["n"],
        }

    def _record(self, body: Body) -> Reply:
        number = read_id(body.get("id"))
        row = self._existing(number, list(self._table.columns))
        return {"record": [{"name": name, "value": value} for name, value in row.items()]}

    def _condition(self, body: Body, *, without: str = "") -> Condition:
        """The condition of the body's filters, apart from that of one column."""
        filters, columns = body.get("filters"), self._table.columns
        axes = {}
        if isinstance(filters, dict):
            binned = [
                name for name, wanted in filters.items() if isinstance(wanted, dict) and "bins" in wanted
            ]
            axes = {name: self._table.axis(find_column(name, columns)) for name in binned}
            filters = {name: wanted for name, wanted in filters.items() if name != without}
        return read_condition(filters, columns, axes)

    def _histogram(self, body: Body) -> Reply:
        column = find_column(body.get("column"), self._table.columns)
        # A histogram also shows what its own column's filter leaves out.
        condition = self._condition(body, without=column.name)
        if column.kind != NUMBER:
            return self._values(column, condition, body)
        axis = self._table.axis(column)
        rows = self._table.rows(
            f"select case when {column.sql} is null then -1 else {axis.bin_sql(column)} end as bin, "
            f"{OUTCOME} as outcome, count(*) as n from gallery where {condition.sql} group by all",
            condition.values,
        )
        counts: dict[str, list[int]] = {}
        missing = 0
        for row in rows:
            place, number = whole(row["bin"]), whole(row["n"])
            if place < 0:
                missing += number
            else:
                counts.setdefault(str(row["outcome"]), [0] * BINS)[place] += number
        return {
            "column": column.name, "kind": NUMBER, "low": axis.low, "high": axis.high, "counts": counts,
            "missing": missing,
        }  # fmt: skip

    def _values(self, column: Column, condition: Condition, body: Body) -> Reply:
        """The most frequent values of a column that does not hold numbers, with their counts."""
        search = body.get("search", "")
        if not isinstance(search, str) or len(search) > MAX_TEXT:
            raise ValueError(
                f"search must be a text of at most {MAX_TEXT} letters, got {type(search).__name__}"
            )
        values, matches = dict(condition.values), "true"
        if search and column.kind == TEXT:
            values["search"], matches = search, f"contains(lower({column.sql}), lower($search))"
        # A window over everything is computed after grouping and before the limit: it counts all values.
        rows = self._table.rows(
            f"select {column.sql} as value, count(*) as n, count(*) filter (where fooled) as fooled, "
            "count(fooled) as known, count(*) over () as distinct_values from gallery "
            f"where {condition.sql} and {matches} group by 1 order by n desc, value limit {LISTED}",
            values,
        )
        more = whole(rows[0]["distinct_values"]) - len(rows) if rows else 0
        listed = [{key: row[key] for key in ("value", "n", "fooled", "known")} for row in rows]
        return {"column": column.name, "kind": column.kind, "values": listed, "more": more}

    def _thumbnails(self, body: Body) -> Reply:
        """Small pictures by id; a sentence in place of a picture that cannot be shown."""
        ids, kind = body.get("ids"), body.get("picture", "clean")
        if not isinstance(ids, list) or len(ids) > MAX_PAGE:
            raise ValueError(f"ids must be a list of at most {MAX_PAGE} records")
        numbers = [read_id(one) for one in ids]
        suffix = SUFFIX if isinstance(kind, str) and kind.endswith(SUFFIX) and self.other is not None else ""
        name = str(kind).removesuffix(suffix)
        pictures = self._other_pictures if suffix else self._pictures
        if name not in KINDS or pictures is None:
            raise ValueError(unknown_choice("picture", str(kind)[:MAX_TEXT], KINDS))
        rows = self._table.records(numbers, ["attack", "region", "index" + suffix])

        def picture(row: Reply) -> Reply:
            try:
                return {"url": pictures.small(name, self._place(row, suffix))}
            except (ValueError, DamagedError) as error:
                return {"missing": str(error)}

        shown = dict(zip(map(str, rows), self._readers.map(picture, rows.values()), strict=True))
        return {"pictures": shown}


OUTCOME = (
    f"case when fooled is null then 'unknown' when not correct then {quoted(MISCLASSIFIED)} when fooled then 'fooled' "
    "else 'withstood' end"
)


def read_id(value: object) -> int:
    """The number of a record. Raises ValueError if it cannot be one."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError(f"id must be the number of a record, got {reprlib.repr(value)}")
    return value
