"""The desk: every request that a page or a notebook can make, by name, and whose turn it is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from weakspot._checks import NotFiniteError
from weakspot._errors import first_line
from weakspot.attacks import available_attacks, find_attack
from weakspot.budgets.parse import BUDGETS
from weakspot.explanations.analysis import usual_analyses
from weakspot.explorer.attack_order import Order, copy_command
from weakspot.explorer.bench import Bench, upload
from weakspot.explorer.image_robustness import certify_mask, provable, search_spots
from weakspot.explorer.messages import UPLOAD_BYTES, Message, Request, RequestError, Send
from weakspot.explorer.pair_attack import attack_pair, pair_message
from weakspot.explorer.pair_explanations import explain_pair, list_layers, show_layer, show_unit
from weakspot.explorer.place_edits import heat_map, probe, undo_place
from weakspot.explorer.place_masks import MASKS, measure_area, propose
from weakspot.explorer.worker import StopRequestedError, Task, Worker, WorkerClosedError
from weakspot.report.rendering import shared_colors

Result = TypeVar("Result")
Job = Callable[["Desk", Request, Send], Message]
Subscription = Callable[["Desk", Request, Send], Task[object]]
PREPARED = (1, 16, 8, 32, 4, 2)  # sides of probes for which the way of computing is decided in advance
APART = 2  # threads for requests that need neither model nor bench
PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class Question:
    """A request with one answer.

    Attributes:
        answer: of the desk and the request.
        short: whether it is answered between two steps of a running attack.
        apart: whether it needs neither model nor bench, and is answered in a thread of its own.
    """

    answer: Callable[[Desk, Request], Message]
    short: bool = True
    apart: bool = False


class Desk:
    """Answers requests about a bench; the model is used by one thread only.

    Attributes:
        bench: the images and pairs.
        worker: the thread.
        questions: name to request with one answer; other parts of the explorer add theirs.
    """

    def __init__(self, bench: Bench, questions: Mapping[str, Question] | None = None) -> None:
        self.bench, self.worker = bench, Worker()
        self._apart = ThreadPoolExecutor(APART, thread_name_prefix="weakspot-apart")
        self.questions = {**QUESTIONS, **(questions or {})}
        self._preparing: set[int] = set()

    def ask(self, name: str, body: object) -> Future[Message]:
        """Answer a request.

        Returns:
            The answer, or a RequestError with one sentence.
        """
        try:
            request = Request(body)
            # The page's own number of the request, which comes back with the answer.
            echoed = {"n": request.number("n", -1e15, 1e15)} if request.has("n") else {}
            task = self._queue(name, request)
        except RequestError as error:
            return refused(error)

        def reply(result: object) -> Message:
            # A probe that a later one of its page has overtaken has no result.
            message = result if isinstance(result, dict) else {"overtaken": True}
            return {**message, **echoed, "state": self.bench.state}

        return replied(task, reply)

    def _queue(self, name: str, request: Request) -> Future[object]:
        if name != "probe" and name not in self.questions:
            raise RequestError("there is no such request", 404)
        if name == "probe":
            return self.worker.probe(request.text("page", ""), lambda: probe(self.bench, request))
        question = self.questions[name]
        if question.apart:
            try:
                return self._apart.submit(lambda: question.answer(self, request))
            except RuntimeError:  # the pool takes nothing after `close`
                raise RequestError("the explorer has been closed", 503) from None
        if question.short:
            return self.worker.short(lambda: question.answer(self, request))
        return self.worker.long(lambda: question.answer(self, request)).result

    def subscribe(self, name: str, body: object, send: Send) -> Task[object]:
        """Start a job that sends events and ends with "done" or "error".

        Returns:
            The job: set its `stop` to end it at its next step.
        """
        # A job ends by an event of its own, and then its result arrives as well: the page gets one end.
        ended = threading.Event()

        def send_last(event: Message) -> None:
            if not ended.is_set():
                ended.set()
                send({**event, "state": self.bench.state})

        def send_on(event: Message) -> None:
            if event.get("event") == "done":
                send_last(event)
            elif not ended.is_set():
                send(event)

        def finish(done: Future[object]) -> None:
            if done.cancelled() or isinstance(done.exception(), StopRequestedError | WorkerClosedError):
                send_last({"event": "done", "stopped": True})
            elif (error := done.exception()) is not None:
                send_last({"event": "error", "error": str(as_request_error(error))})
            else:
                send_last({"event": "done", "stopped": task.stop.is_set()})

        try:
            task = _subscription(name)(self, Request(body), send_on)
        except RequestError as error:
            # Reported in the same way as the error of a job that has begun.
            task = Task(lambda: None, refused(error))
        task.result.add_done_callback(finish)
        return task

    def prepare_probes(self, number: int) -> None:
        """Record the network on an image while nothing else waits, so that the first probe finds it recorded."""
        if number in self.bench.recorded or number in self._preparing:
            return
        self._preparing.add(number)

        def steps() -> Generator[None]:
            for size in PREPARED:
                if number < len(self.bench.exhibits) and size <= min(self.bench.exhibit(number).size):
                    probe(self.bench, Request({"image": number, "y": 0, "x": 0, "size": size}))
                yield
            self._preparing.discard(number)

        self.worker.background(steps)

    def close(self) -> bool:
        """End the worker; returns whether it ended within a second."""
        self._apart.shutdown(wait=False, cancel_futures=True)
        return self.worker.close()


def replied(task: Future[Result], reply: Callable[[Result], Message]) -> Future[Message]:
    """What `reply` makes of the result of a task; if there is none, a RequestError with one sentence."""
    answer: Future[Message] = Future()

    def finish(done: Future[Result]) -> None:
        if done.cancelled():
            answer.set_exception(RequestError("the explorer has been closed", 503))
        elif (error := done.exception()) is not None:
            answer.set_exception(as_request_error(error))
        else:
            answer.set_result(reply(done.result()))

    task.add_done_callback(finish)
    return answer


def refused(error: RequestError) -> Future[Any]:
    """The answer to a request that is not begun."""
    answer: Future[Any] = Future()
    answer.set_exception(error)
    return answer


def as_request_error(error: BaseException) -> RequestError:
    """Any error as one sentence without a traceback or a path.

    The package's own checks raise ValueError with a sentence that is meant for people. What any other exception says
    may hold paths and internals, so the sentence names only its type.
    """
    if isinstance(error, RequestError):
        return error
    if isinstance(error, NotFiniteError):
        # What it says counts the images of a batch that only the program knows.
        return RequestError(
            "the network returned NaN or infinity for this image or a changed version of it (check its weights and "
            "normalization)"
        )
    # Not its subclasses: what a UnicodeError or an error of another library says is not written for people.
    if type(error) is ValueError:
        return RequestError(first_line(error))
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return RequestError("the memory is not enough for this request", 413)
    if isinstance(error, StopRequestedError | WorkerClosedError):
        return RequestError("the explorer has been closed", 503)
    return RequestError(f"the request failed with {type(error).__name__}, in the model or in weakspot")


def _hello(desk: Desk, _: Request) -> Message:
    bench = desk.bench
    return {
        "model": bench.classifier.name,
        "images": [bench.listed(number) for number in range(len(bench.exhibits))],
        "attacks": [one for one in map(_attack, available_attacks()) if one is not None],
        "budgets": [
            {"name": name, "example": kind.example, "summary": kind.summary} for name, kind in BUDGETS.items()
        ],
        "masks": [{"kind": name, "summary": kind.summary} for name, kind in MASKS.items()],
        "analyses": [{"name": name} for name in usual_analyses()],
        "limits": {"upload_bytes": UPLOAD_BYTES},
        "defaults": {"attack": "pgd", "budget": "linf:4/255", "seed": 0, "steps": 20},
        "colors": shared_colors(),
        "gallery": "records" in desk.questions,
    }


def _attack(name: str) -> Message | None:
    """An attack and its options; None if it cannot be loaded."""
    try:
        attack = find_attack(name)
    except ValueError:
        return None
    options = [
        {"name": key, "default": one.default}
        for key, one in attack.parameters.items()
        if isinstance(one.default, PLAIN)
    ]
    return {
        "name": name,
        "summary": attack.summary,
        "takes_budget": attack.takes_budget,
        "takes_target": "targets" in attack.accepts,
        "takes_region": "region" in attack.accepts,
        "minimizes": attack.minimizes,
        "options": options,
    }


def _image(desk: Desk, request: Request) -> Message:
    number = request.whole("image", 0, 10**6, 0)
    desk.prepare_probes(number)
    exhibit = desk.bench.exhibit(number)
    pair = None if exhibit.pair is None else pair_message(desk.bench, exhibit)
    return {**desk.bench.shown(number), "pair": pair}


def _classes(desk: Desk, request: Request) -> Message:
    text = request.text("text", "").strip().lower()
    names = [name.lower() for name in desk.bench.classifier.class_names]
    names += [""] * (desk.bench.class_count - len(names))
    fitting = [index for index, name in enumerate(names) if text == str(index) or (name and text in name)]
    # Names that begin with the text come first.
    fitting.sort(key=lambda index: not names[index].startswith(text))
    return {"classes": [desk.bench.named(index) for index in fitting[:20]]}


QUESTIONS = {
    "hello": Question(_hello),
    "classes": Question(_classes),
    "image": Question(_image),
    "mask": Question(lambda desk, request: propose(desk.bench, request), short=False),
    "upload": Question(lambda desk, request: upload(desk.bench, request)),
    "undo_place": Question(lambda desk, request: undo_place(desk.bench, request)),
    "command": Question(lambda desk, request: copy_command(desk.bench, request)),
    "provable": Question(lambda desk, request: provable(desk.bench, request), short=False),
    "layers": Question(lambda desk, request: list_layers(desk.bench, request), short=False),
    "layer": Question(lambda desk, request: show_layer(desk.bench, request), short=False),
    "unit": Question(lambda desk, request: show_unit(desk.bench, request), short=False),
    "area": Question(lambda desk, request: measure_area(desk.bench, request)),
}


def _subscription(name: str) -> Subscription:
    if name not in SUBSCRIPTIONS:
        raise RequestError("there is no such subscription", 404)
    return SUBSCRIPTIONS[name]


def _in_turn(job: Job) -> Subscription:
    """A job in the order of arrival, which returns its last event."""

    def subscribe(desk: Desk, request: Request, send: Send) -> Task[object]:
        return desk.worker.long(lambda: send(job(desk, request, send)))

    return subscribe


def _between_operations(job: Job) -> Subscription:
    """The same for a job without steps of its own: it can be ended between any two operations of torch."""

    def interruptible(desk: Desk, request: Request, send: Send) -> Message:
        with desk.worker.interruptible():
            return {"event": "done", "stopped": False, **job(desk, request, send)}

    return _in_turn(interruptible)


def _attack_pair(desk: Desk, request: Request, send: Send) -> Message:
    order = Order.read(desk.bench, request)
    return attack_pair(desk.bench, order, send, desk.worker.between_steps)


def _search_spots(desk: Desk, request: Request, send: Send) -> Message:
    return search_spots(desk.bench, request, send, desk.worker.between_steps)


def _subscribe_heat(desk: Desk, request: Request, send: Send) -> Task[object]:
    return desk.worker.background(lambda: heat_map(desk.bench, request, send, desk.worker))


SUBSCRIPTIONS: dict[str, Subscription] = {
    "weak_spots": _in_turn(_search_spots),
    "attack": _in_turn(_attack_pair),
    "heat": _subscribe_heat,
    "explain": _between_operations(lambda desk, request, _: explain_pair(desk.bench, request)),
    "certify": _between_operations(lambda desk, request, send: certify_mask(desk.bench, request, send)),
}
