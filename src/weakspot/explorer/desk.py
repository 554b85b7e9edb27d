"""The desk: every request that a page or a notebook can make, by name, and whose turn it is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from weakspot._checks import NotFiniteError, first_line
from weakspot.attacks import available_attacks, find_attack
from weakspot.budgets.parse import BUDGETS
from weakspot.explanations.analysis import usual_analyses
from weakspot.explorer.bench import Bench
from weakspot.explorer.edit_probe import LARGEST, heat_map, probe
from weakspot.explorer.layer_maps import list_layers, show_layer, show_unit
from weakspot.explorer.links import copy_command
from weakspot.explorer.mask_certificate import certify_mask, provable
from weakspot.explorer.messages import PIXELS, UPLOAD_BYTES, Message, Request, RequestError
from weakspot.explorer.pair_attack import Order, attack_pair, pair_message
from weakspot.explorer.pair_panels import explain_pair
from weakspot.explorer.place_masks import MASKS, measure_area, propose
from weakspot.explorer.place_undo import undo_place
from weakspot.explorer.spot_search import search_spots
from weakspot.explorer.uploads import upload
from weakspot.explorer.worker import StopRequestedError, Task, Worker, WorkerClosedError
from weakspot.report.rendering import shared_colors

Send = Callable[[Message], None]
Ask = Callable[["Desk", Request], Message]
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

    answer: Ask
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
        answer: Future[Message] = Future()
        try:
            request = Request(body)
            task = self._queue(name, request)
        except RequestError as error:
            answer.set_exception(error)
            return answer

        def finish(done: Future[object]) -> None:
            if done.cancelled():
                answer.set_exception(RequestError("the explorer has been closed", 503))
            elif (error := done.exception()) is not None:
                answer.set_exception(as_request_error(error))
            else:
                result = done.result()
                # A probe that a later one of its page has overtaken has no result.
                reply = result if isinstance(result, dict) else {"overtaken": True}
                echoed = {"n": request.body["n"]} if isinstance(request.body.get("n"), int | float) else {}
                answer.set_result({**reply, **echoed, "state": self.bench.state})

        task.add_done_callback(finish)
        return answer

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
            task = Task[object](lambda: None)
            task.result.set_exception(error)
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


def as_request_error(error: BaseException) -> RequestError:
    """Any error as one sentence without a traceback or a path.

    The package's own checks raise ValueError with a sentence that is meant for people. What any other exception says
    may hold paths and internals, so the sentence names only its type.
    """
    if isinstance(error, RequestError):
        return error
    # Not their subclasses: what a UnicodeError or an error of another library says is not written for people.
    if type(error) in {ValueError, NotFiniteError}:
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
        "classes": bench.class_count,
        "images": [bench.listed(number) for number in range(len(bench.exhibits))],
        "attacks": [one for one in map(_attack, available_attacks()) if one is not None],
        "budgets": [
            {"name": name, "example": kind.example, "summary": kind.summary} for name, kind in BUDGETS.items()
        ],
        "masks": [
            {
                "kind": name,
                "summary": kind.summary,
                "takes": list(kind.takes),
                "fraction": "fraction" in kind.takes,
            }
            for name, kind in MASKS.items()
        ],
        "analyses": [{"name": name} for name in usual_analyses()],
        "limits": {"upload_bytes": UPLOAD_BYTES, "pixels": PIXELS, "probe_size": LARGEST},
        "defaults": {"attack": "pgd", "budget": "linf:4/255", "seed": 0, "fraction": 0.3, "steps": 20},
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
        "needs_budget": attack.takes_budget and attack.default_budget,
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


def _subscribe_attack(desk: Desk, request: Request, send: Send) -> Task[object]:
    def run() -> object:
        order = Order.read(desk.bench, request)
        send(attack_pair(desk.bench, order, send, desk.worker.between_steps))
        return None

    return desk.worker.long(run)


def _subscribe_heat(desk: Desk, request: Request, send: Send) -> Task[object]:
    def steps() -> Generator[None]:
        return heat_map(desk.bench, request, send, desk.worker)

    return desk.worker.background(steps)


def _subscription(name: str) -> Subscription:
    if name not in SUBSCRIPTIONS:
        raise RequestError("there is no such subscription", 404)
    return SUBSCRIPTIONS[name]


def _subscribe_spots(desk: Desk, request: Request, send: Send) -> Task[object]:
    def run() -> object:
        send(search_spots(desk.bench, request, send, desk.worker.between_steps))
        return None

    return desk.worker.long(run)


def _subscribe_panel(desk: Desk, request: Request, send: Send) -> Task[object]:
    def run() -> object:
        with desk.worker.interruptible():
            panel = explain_pair(desk.bench, request)
        send({"event": "done", "stopped": False, **panel})
        return None

    return desk.worker.long(run)


def _subscribe_certificate(desk: Desk, request: Request, send: Send) -> Task[object]:
    def run() -> object:
        with desk.worker.interruptible():
            certificate = certify_mask(desk.bench, request, send)
        send({"event": "done", "stopped": False, **certificate})
        return None

    return desk.worker.long(run)


SUBSCRIPTIONS: dict[str, Subscription] = {
    "weak_spots": _subscribe_spots,
    "attack": _subscribe_attack,
    "heat": _subscribe_heat,
    "explain": _subscribe_panel,
    "certify": _subscribe_certificate,
}
