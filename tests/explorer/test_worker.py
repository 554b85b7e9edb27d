"""The worker: one thread, latest probe wins, short requests between steps, stop within a step."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Generator, Iterator
from functools import partial

import pytest
import torch

from tests.explorer.benches import wait_for
from weakspot.classifier import Classifier
from weakspot.explorer.worker import ProbeWaitsError, StopRequestedError, Worker, WorkerClosedError


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


def blocked(worker: Worker) -> threading.Event:
    """Keep the worker busy until the event is set."""
    go, begun = threading.Event(), threading.Event()

    def run() -> None:
        begun.set()
        go.wait(60)

    worker.long(run)
    assert begun.wait(60)
    return go


def test_everything_runs_in_one_thread(worker: Worker) -> None:
    names = {worker.short(threading.get_ident).result(60) for _ in range(5)}
    names.add(worker.long(threading.get_ident).result.result(60))
    names.add(worker.probe("", threading.get_ident).result(60))
    assert len(names) == 1
    assert threading.get_ident() not in names


def test_the_latest_probe_of_a_page_wins_and_pages_do_not_overtake_each_other(worker: Worker) -> None:
    go = blocked(worker)
    ran: list[str] = []

    def probe(name: str) -> str:
        ran.append(name)
        return name

    one = [worker.probe("one", partial(probe, f"one {number}")) for number in range(4)]
    two = worker.probe("two", partial(probe, "two"))
    # Told at once, before the worker is free.
    assert [future.result(0) for future in one[:3]] == [None] * 3
    assert not one[3].done()
    go.set()
    assert one[3].result(60) == "one 3"
    assert two.result(60) == "two"
    assert sorted(ran) == ["one 3", "two"]


def test_probes_come_first_then_short_requests_then_long_ones(worker: Worker) -> None:
    go = blocked(worker)
    order: list[str] = []
    last = worker.long(lambda: order.append("long"))
    worker.short(lambda: order.append("short"))
    worker.probe("", lambda: order.append("probe"))
    go.set()
    last.result.result(60)
    assert order == ["probe", "short", "long"]


def test_a_long_job_answers_others_between_its_steps_and_stops_within_one(worker: Worker) -> None:
    begun, enough = threading.Event(), threading.Event()
    after = 0  # steps that began after the job was stopped

    def job() -> str:
        nonlocal after
        begun.set()
        try:
            while True:
                if enough.is_set():
                    after += task.stop.is_set()
                    task.stop.set()
                worker.between_steps()
        except StopRequestedError:
            return "stopped"

    task = worker.long(job)
    assert begun.wait(60)
    assert worker.short(lambda: "answered").result(60) == "answered"
    assert worker.probe("", lambda: "probed").result(60) == "probed"
    assert not task.result.done()
    waiting = worker.long(lambda: "later")
    enough.set()
    assert task.result.result(60) == "stopped"
    assert after == 0
    assert waiting.result.result(60) == "later"


def test_the_memory_of_a_job_is_returned(worker: Worker) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    def job() -> int:
        large = torch.zeros(1000)
        kept.append(weakref.ref(large))
        return 1

    task = worker.long(job)
    assert task.result.result(60) == 1
    del task
    worker.short(lambda: None).result(60)
    gc.collect()
    assert kept[0]() is None


def test_background_work_goes_on_only_while_nothing_waits(worker: Worker) -> None:
    done: list[int] = []
    half, queued = threading.Event(), threading.Event()

    def steps() -> Generator[None]:
        for number in range(40):
            done.append(number)
            if number == 5:
                half.set()
                assert queued.wait(60)
            yield

    task = worker.background(steps)
    assert half.wait(60)
    waiting = worker.long(lambda: len(done))
    queued.set()
    assert waiting.result.result(60) == 6
    assert task.result.result(60) is None
    assert done == list(range(40))


def test_background_work_rests_while_probes_come(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weakspot.explorer.worker.REST", 1000.0)
    done: list[int] = []

    def steps() -> Generator[None]:
        while True:
            done.append(1)
            yield

    assert worker.probe("", lambda: 1).result(60) == 1
    task = worker.background(steps)
    for _ in range(5):
        assert worker.probe("", lambda: 1).result(60) == 1
        assert worker.short(lambda: 2).result(60) == 2
    assert not done
    monkeypatch.setattr("weakspot.explorer.worker.REST", 0.0)
    worker.short(lambda: 3).result(60)  # wakes the thread
    wait_for(lambda: len(done) > 3)
    task.stop.set()
    assert task.result.result(60) is None


def test_a_probe_ends_a_part_of_background_work_which_begins_again(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weakspot.explorer.worker.REST", 0.0)
    begun, results = threading.Event(), list[float]()
    starts, finished = list[int](), list[int]()

    def part() -> float:
        starts.append(1)
        total = torch.zeros(())
        begun.set()
        for _ in range(1 if len(starts) > 1 else 10**9):  # the first time, until a probe comes
            total = total + 1
        finished.append(1)
        return float(total)

    def steps() -> Generator[None]:
        results.append((yield from worker.unless_probed(part)))
        yield

    task = worker.background(steps)
    assert begun.wait(60)
    assert worker.probe("", lambda: len(finished)).result(60) == 0
    assert task.result.result(60) is None
    assert results == [1.0]
    assert len(starts) == 2


class Endless(torch.nn.Module):
    """A network whose first pass after `begin` ends only if something ends it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.begin, self.begun = False, threading.Event()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = images.mean((2, 3))
        if self.begin and not self.begun.is_set():
            self.begun.set()
            while True:
                means = means + 0
        logits: torch.Tensor = self.linear(means)
        return logits


def test_a_probe_ends_a_pass_of_any_network(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weakspot.explorer.worker.REST", 0.0)
    network = Endless().eval()
    model, images = Classifier.wrap(network), torch.rand(1, 3, 8, 8)
    results = list[torch.Tensor]()

    def steps() -> Generator[None]:
        results.append((yield from worker.unless_probed(lambda: model(images))))
        yield

    network.begin = True
    task = worker.background(steps)
    assert network.begun.wait(60)
    assert worker.probe("", torch.is_grad_enabled).result(60) is True
    assert task.result.result(60) is None
    assert torch.equal(results[0], model(images).detach())


def test_probes_do_not_keep_background_work_from_being_done(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weakspot.explorer.worker.REST", 0.0)

    def raise_probed() -> None:
        raise ProbeWaitsError

    monkeypatch.setattr(worker, "_raise_if_probed", raise_probed)

    def steps() -> Generator[None]:
        results.append((yield from worker.unless_probed(lambda: float(torch.zeros(1) + 1))))

    results = list[float]()
    assert worker.background(steps).result.result(60) is None
    assert results == [1.0]


def test_background_work_stops_and_its_errors_are_told(worker: Worker) -> None:
    closed = threading.Event()

    def endless() -> Generator[None]:
        try:
            while True:
                yield
        finally:
            closed.set()

    def broken() -> Generator[None]:
        yield
        raise ValueError("no")

    task, other = worker.background(endless), worker.background(broken)
    with pytest.raises(ValueError, match="no"):
        other.result.result(60)
    task.stop.set()
    assert task.result.result(60) is None
    assert closed.wait(60)


def test_an_error_of_any_kind_is_told_and_the_worker_lives_on(worker: Worker) -> None:
    def leave() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        worker.short(leave).result(60)
    assert worker.short(lambda: 1).result(60) == 1


def test_closing_cancels_what_waits_and_stops_what_runs() -> None:
    worker = Worker()
    begun = threading.Event()

    def job() -> str:
        begun.set()
        try:
            while True:
                time.sleep(0.001)
                worker.between_steps()
        except WorkerClosedError:
            return "stopped"

    running, waiting = worker.long(job), worker.long(lambda: 1)
    assert begun.wait(60)
    assert worker.close(60)
    assert running.result.result(0) == "stopped"
    assert waiting.result.cancelled()
    assert worker.short(lambda: 1).cancelled()
    for _ in range(2):
        assert worker.probe("", lambda: 1).cancelled()


def test_closing_during_a_step_cancels_the_steps_after_it() -> None:
    worker = Worker()
    begun, go = threading.Event(), threading.Event()
    ended: list[int] = []

    def steps() -> Generator[None]:
        try:
            begun.set()
            assert go.wait(60)
            yield
            yield
        finally:
            ended.append(threading.get_ident())

    task = worker.background(steps)
    assert begun.wait(60)
    assert not worker.close(0)
    go.set()
    assert worker.close(60)
    assert task.result.cancelled()
    assert ended == [worker._thread.ident]
