"""The gallery of 100,000 records against its goals: filters, histograms and pictures, through the server.

Run: python -m benchmarks.gallery [--json FILE]; benchmarks/explorer.py measures the same at its end. Every request goes
over HTTP to a served gallery, as the page sends it: filters drawn at random, sorted by a random column, and pages of
fifty small pictures that have not been read before.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.gallery_run import SCORES, synthetic_run
from benchmarks.records import recorded
from weakspot.explorer.gallery import Gallery
from weakspot.explorer.gallery_desk import RecordDesk
from weakspot.explorer.service import Service

IMAGES, PICTURED = 25_000, 1024  # of four records each
FILTERS, PAGES, SIZE = 200, 20, 50
COLUMNS = ("margin_clean", "margin_adversarial", "l2", *SCORES)
Ask = Callable[[str, dict[str, object]], dict[str, object]]


@dataclass(frozen=True)
class Measured:
    """One kind of request.

    Attributes:
        name: what is measured.
        goal: milliseconds at the 95th percentile; None if there is none.
        seconds: wall time of each request.
        cpu: processor time of the server, mean over requests.
    """

    name: str
    goal: float | None
    seconds: list[float]
    cpu: float

    def row(self) -> str:
        """A row of the table."""
        median, high = (1000 * float(np.quantile(self.seconds, part)) for part in (0.5, 0.95))
        goal = "" if self.goal is None else f"{self.goal:.0f} ms"
        verdict = "" if self.goal is None else "met" if high < self.goal else "missed"
        times = f"{median:.0f} ms | {high:.0f} ms | {goal} | {verdict} | {1000 * self.cpu:.0f} ms"
        return f"| {self.name} | {len(self.seconds)} | {times} |"


@contextmanager
def served() -> Iterator[Ask]:
    """Questions to a served gallery of `IMAGES` x 4 records."""
    with TemporaryDirectory() as name:
        run = synthetic_run(Path(name) / "run", IMAGES, pictures=PICTURED)
        begun = time.perf_counter()
        desk = RecordDesk(Gallery(run), "This benchmark has no model.")
        print(f"Opening {4 * IMAGES:,} records: {time.perf_counter() - begun:.1f} s.", flush=True)
        service = Service.prepare(desk, port=0)
        service.start()
        home, _, token = service.url.partition("?token=")

        def ask(question: str, body: dict[str, object]) -> dict[str, object]:
            headers = {"Authorization": f"Bearer {token}"}
            request = urllib.request.Request(f"{home}api/{question}", json.dumps(body).encode(), headers)  # noqa: S310
            with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310 - our own server
                answer: dict[str, object] = json.load(reply)
            return answer

        try:
            yield ask
        finally:
            service.close()


def timed(
    ask: Ask, name: str, goal: float | None, question: str, bodies: list[dict[str, object]]
) -> Measured:
    """Ask one after the other."""
    seconds, cpu = [], time.process_time()
    for body in bodies:
        begun = time.perf_counter()
        ask(question, body)
        seconds.append(time.perf_counter() - begun)
    return Measured(name, goal, seconds, (time.process_time() - cpu) / len(bodies))


def drawn_filters(rng: np.random.Generator) -> dict[str, object]:
    """A brush on one score and, half of the time each, some classes and an outcome."""
    first, last = sorted(rng.integers(0, 30, 2).tolist())
    filters: dict[str, object] = {str(rng.choice(COLUMNS)): {"bins": [first, last]}}
    if rng.random() < 0.5:
        filters["label_name"] = [f"class {number}" for number in rng.integers(4, 100, 3).tolist()]
    if rng.random() < 0.5:
        filters["fooled"] = [bool(rng.random() < 0.5)]
    return filters


def gallery_times() -> list[Measured]:
    """All measurements."""
    rng = np.random.default_rng(0)
    with served() as ask:
        ask("run", {})
        for column in COLUMNS:
            ask("histogram", {"column": column})  # axes are computed once
        filters = [drawn_filters(rng) for _ in range(FILTERS)]
        sorts = [
            {"column": str(rng.choice(COLUMNS)), "descending": bool(rng.random() < 0.5)} for _ in filters
        ]
        ids = rng.permutation(4 * PICTURED)[: PAGES * SIZE].reshape(PAGES, SIZE).tolist()
        return [
            timed(ask, "a filter: page of 50 records and their number", 150, "records",
                  [{"filters": one, "sort": sort} for one, sort in zip(filters, sorts, strict=True)]),
            timed(ask, "one histogram under a filter", None, "histogram",
                  [{"column": str(rng.choice(COLUMNS)), "filters": one} for one in filters]),
            timed(ask, "the classes under a filter", None, "histogram",
                  [{"column": "label_name", "filters": one} for one in filters]),
            timed(ask, "50 pictures, clean, read for the first time", 300, "thumbnails",
                  [{"ids": page} for page in ids]),
            timed(ask, "50 pictures, attacked, read for the first time", 300, "thumbnails",
                  [{"ids": page, "picture": "adversarial"} for page in ids]),
        ]  # fmt: skip


def main() -> None:
    """Print the table."""
    measured = gallery_times()
    print("\n| request | n | median | p95 | goal (p95) | | CPU per request |\n|---|---|---|---|---|---|---|")
    for one in measured:
        print(one.row())


if __name__ == "__main__":
    with recorded("gallery", "The gallery of 100,000 records against its goals."):
        main()
