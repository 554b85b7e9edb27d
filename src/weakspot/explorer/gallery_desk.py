"""The gallery's requests at the desk, with the bench beside them or without a model."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from weakspot.audit.store.digests import DamagedError
from weakspot.explorer.desk import Desk, Question, refused, replied
from weakspot.explorer.gallery import Gallery, read_id
from weakspot.explorer.messages import Message, Request, RequestError, Send
from weakspot.explorer.worker import Task

THREADS = 2


def gallery_questions(gallery: Gallery) -> dict[str, Question]:
    """Name -> request, for a desk: those of the gallery, and "open", which puts a record's image on the bench."""

    def question(name: str) -> Question:
        return Question(lambda _, request: answered(gallery, name, request), apart=True)

    asked = {name: question(name) for name in gallery.names}
    return {**asked, "open": Question(lambda desk, request: _open(gallery, desk, request))}


def answered(gallery: Gallery, name: str, request: Request) -> Message:
    """The gallery's answer.

    Raises:
        RequestError: with the sentence of whatever is wrong.
    """
    try:
        return gallery.answer(name, request.body)
    except (ValueError, TimeoutError, DamagedError) as error:
        raise RequestError(str(error)) from None


def _open(gallery: Gallery, desk: Desk, request: Request) -> Message:
    """Put the image of a record on the bench, once, with the class that it was attacked as."""
    bench = desk.bench
    try:
        number = read_id(request.body.get("id"))
        record = gallery.record(number, bench.classifier)
    except (ValueError, DamagedError) as error:
        raise RequestError(str(error)) from None
    reply: Message = {
        "attack": record.attack,
        "budget": record.budget,
        "options": dict(record.settings),
        "seed": gallery.run.plan.seed,
        "region": record.region,
        "remark": record.remark,
    }
    pixels = record.image[None].to(bench.classifier.mean.device)
    for place, exhibit in enumerate(bench.exhibits):
        # The same picture may be there under another class, such as the one that the model predicts.
        same = exhibit.pixels.shape == pixels.shape and bool((exhibit.pixels == pixels).all())
        if same and record.label in {None, exhibit.label}:
            return {"image": place, **reply}
    labels = None if record.label is None else torch.tensor([record.label], device=pixels.device)
    return {"image": bench.add(pixels, [record.name], labels), **reply}


class RecordDesk:
    """The desk of a gallery whose model cannot be loaded: it takes the gallery's requests alone.

    Args:
        gallery: the records.
        reason: why there is no model, in a sentence.
    """

    def __init__(self, gallery: Gallery, reason: str) -> None:
        self.gallery, self.reason = gallery, reason
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="weakspot-gallery")

    def ask(self, name: str, body: object) -> Future[Message]:
        """Answer a request, as `Desk.ask`."""
        try:
            task = self._pool.submit(lambda: self._answer(name, Request(body)))
        except RuntimeError:  # the pool takes nothing after `close`
            return refused(RequestError("the explorer has been closed", 503))
        return replied(task, lambda message: {**message, "state": 0})

    def _answer(self, name: str, request: Request) -> Message:
        if name == "hello":
            return {"model": None, "reason": self.reason, "images": [], "gallery": True}
        if name not in self.gallery.names:
            raise RequestError(self.reason if name == "open" else "there is no such request", 404)
        return answered(self.gallery, name, request)

    def subscribe(self, name: str, body: object, send: Send) -> Task[object]:  # noqa: ARG002 - as `Desk.subscribe`
        """Refuse: every job needs the model."""
        send({"event": "error", "error": self.reason})
        task = Task[object](lambda: None)
        task.result.set_result(None)
        return task

    def close(self) -> bool:
        """End its threads; returns whether they have ended."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        return True
