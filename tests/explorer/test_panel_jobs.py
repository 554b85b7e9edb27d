"""Panels and certificates: what they say, and that they end between two operations when they are stopped."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.explorer.benches import SIZE, Events, filled_bench, network, photographs, picture_of, png, square
from tests.networks import untouched
from weakspot import certify_pixels
from weakspot.classifier import Classifier
from weakspot.explanations.analysis import usual_analyses
from weakspot.explorer.bench import Bench
from weakspot.explorer.desk import SUBSCRIPTIONS, Desk
from weakspot.explorer.messages import Message
from weakspot.explorer.worker import StopRequestedError, Worker, WorkerClosedError

MASK = square(4, 5, 3)


def attacked(desk: Desk) -> None:
    order: Message = {"image": 0, "mask": png(square()), "options": {"steps": 2}, "budget": "linf:16/255"}
    assert Events(desk, "attack", order).last()["event"] == "done"


class NoBlack(nn.Module):
    """Returns NaN for images with a black pixel."""

    def forward(self, images: Tensor) -> Tensor:
        light, darkest = images.mean((1, 2, 3)), images.flatten(1).amin(1)
        logits = torch.stack([light, 0.9 - light, 0.1 * light], 1)
        return logits.where(darkest[:, None] > 0, torch.nan)


@pytest.mark.parametrize(
    ("job", "body"),
    [
        ("heat", {"color": [0, 0, 0], "grid": 4}),
        ("weak_spots", {"grid": 2, "verify": True, "budget": "linf:1"}),
        ("attack", {"budget": "linf:1", "options": {"steps": 2}}),
    ],
)
def test_nan_for_a_changed_image_is_told_without_its_number_in_a_batch(job: str, body: Message) -> None:
    bench = Bench(Classifier.wrap(NoBlack().eval(), input_size=SIZE))
    bench.add(torch.full((1, 3, *SIZE), 0.7), ["one"])
    desk = Desk(bench)
    try:
        last = Events(desk, job, {"image": 0, **body}).last()
    finally:
        desk.close()
    assert last["event"] == "error"
    assert last["error"] == (
        "the network returned NaN or infinity for this image or a changed version of it (check its weights and "
        "normalization)"
    )


class Counted(TorchFunctionMode):
    """Calls a function at one operation of torch in this thread, and counts those that follow."""

    def __init__(self, number: int, act: Callable[[], None]) -> None:
        super().__init__()
        self.left, self.act, self.after = number, act, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.left -= 1
        if self.left == 0:
            self.act()
        self.after += self.left < 0
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", usual_analyses())
def test_a_stopped_panel_ends_within_an_operation_and_is_computed_again(name: str) -> None:
    bench = filled_bench()
    desk, subscribed = Desk(bench), threading.Event()
    body: Message = {"image": 0, "analysis": name}
    try:
        attacked(desk)
        whole = Events(desk, "explain", body).last()
        assert whole["event"] == "done"
        assert whole["html"]
        with untouched(bench.classifier, bench.exhibit(0).pixels):

            def stop() -> None:
                assert subscribed.wait(60)
                events.task.stop.set()

            def enter() -> None:
                mode.__enter__()  # type: ignore[no-untyped-call]

            def leave() -> None:
                mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

            mode = Counted(40, stop)
            desk.worker.long(enter).result.result(60)
            events = Events(desk, "explain", body)
            subscribed.set()
            last = events.last()
            desk.worker.long(leave).result.result(60)
        assert last["stopped"] is True
        assert "html" not in last
        assert Events(desk, "explain", body).last()["html"] == whole["html"]
    finally:
        desk.close()


def test_only_one_operation_is_refused_so_that_the_model_is_restored() -> None:
    worker, ready = Worker(), threading.Event()

    def job() -> list[int]:
        assert ready.wait(60)
        values = []
        try:
            with worker.interruptible():
                values.append(1)
                torch.zeros(1).add(1)
                values.append(2)
        except StopRequestedError:
            return values
        return []

    def restoring() -> int:
        assert ready.wait(60)
        restored = 0
        with contextlib.suppress(StopRequestedError), worker.interruptible():
            try:
                torch.ones(1).add(1)
            finally:
                restored = int(torch.ones(2).add(1).sum())
        return restored

    try:
        tasks = [worker.long(job), worker.long(restoring)]
        for task in tasks:
            task.stop.set()
        ready.set()
        assert [task.result.result(60) for task in tasks] == [[1], 4]
    finally:
        worker.close()


def test_closing_ends_a_panel() -> None:
    worker, begun = Worker(), threading.Event()

    def job() -> None:
        with worker.interruptible():
            while True:
                torch.zeros(1).add(1)
                begun.set()

    task = worker.long(job)
    assert begun.wait(60)
    assert worker.close(60)
    with pytest.raises(WorkerClosedError):
        task.result.result(60)


def test_a_certificate_is_that_of_the_library(desk: Desk) -> None:
    assert desk.ask("provable", {"image": 0}).result(60)["reason"] is None
    events = Events(desk, "certify", {"image": 0, "mask": png(MASK), "colors": "8/255", "seconds": 300})
    last = events.last(300)
    exhibit = desk.bench.exhibit(0)
    alone = certify_pixels(
        desk.bench.classifier, exhibit.pixels, exhibit.label_tensor, region=MASK, colors="8/255"
    )
    proven = int((alone.status[0][MASK[0, 0]] == 1).sum())
    assert f"At {'all ' if proven == 9 else f'{proven} of '}9 pixels of the region, no color" in str(
        last["sentence"]
    )
    assert picture_of(last["png"]).size[0] > 400
    assert desk.bench.exhibit(0).pair is None


def test_a_network_that_cannot_be_bounded_says_so_in_one_sentence() -> None:
    bench = Bench(Classifier.wrap(nn.Sequential(network(), nn.Softsign()).eval(), input_size=SIZE))
    bench.add(photographs(1), ["one"])
    desk = Desk(bench)
    try:
        reason = desk.ask("provable", {"image": 0}).result(60)["reason"]
        told = Events(desk, "certify", {"image": 0, "mask": png(MASK)}).last()
    finally:
        desk.close()
    assert str(reason).startswith("Nothing can be proven of this network: ")
    assert told["event"] == "error"
    assert told["error"] == reason


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "mask must be a picture of the brushed pixels, got nothing"),
        ({"mask": png(MASK), "colors": "16/255"}, "colors must be one of"),
        ({"mask": png(MASK), "seconds": 0}, "seconds must be a number between 1 and 3600, got 0"),
    ],
)
def test_a_certificate_that_cannot_be_made_is_told(desk: Desk, body: Message, sentence: str) -> None:
    assert sentence in str(Events(desk, "certify", {"image": 0, **body}).last()["error"])


def test_a_stopped_certificate_says_nothing_about_any_pixel(desk: Desk) -> None:
    everything = torch.ones(1, 1, *SIZE, dtype=torch.bool)
    events = Events(desk, "certify", {"image": 0, "mask": png(everything), "seconds": 3600})
    events.task.stop.set()
    last = events.last()
    assert last["stopped"] is True
    assert "sentence" not in last


def test_every_job_is_tested_here_or_elsewhere() -> None:
    assert set(SUBSCRIPTIONS) == {"attack", "weak_spots", "heat", "explain", "certify"}
