"""The worker: one thread that owns the model, and the order in which requests have their turn.

Probes come first and only the latest of a page counts; then short requests; then long ones in the order of arrival.
Work in the background, a generator, goes on by one step whenever nothing else waits and no probe has come for a while:
while a cursor moves, its next probe would have to wait for the rest of a step. Between two evaluations of an
attack, probes and short requests are answered. A part of background work that a probe would have to wait for is ended
and begins again later.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from weakspot._errors import Interruption

REST = 0.25  # seconds after a probe in which nothing is done in the background
RESTARTS = 3  # of a part of background work, because of probes

Result = TypeVar("Result")


class StopRequestedError(Interruption):
    """Ends a long job whose stop flag is set."""


class WorkerClosedError(Interruption):
    """Ends a long job whose worker is closed; nothing of it is of use any more."""


class ProbeWaitsError(Interruption):
    """Ends a part of background work, because a probe waits."""


class _BetweenOperations(TorchFunctionMode):
    """Calls a function before each operation of torch in this thread, until that raises."""

    def __init__(self, check: Callable[[], None]) -> None:
        super().__init__()
        self._check, self._ended = check, False

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if not self._ended:  # afterward, what restores the model on the way out must run undisturbed
            # It stays set if the check raises.
            self._ended = True
            self._check()
            self._ended = False
        return func(*args, **(kwargs or {}))


@dataclass(eq=False)
class Task(Generic[Result]):
    """Work that waits for its turn.

    Attributes:
        run: does it.
        result: of `run`; None of a probe that a later one has overtaken.
        stop: set to end it early.
    """

    run: Callable[[], Result]
    result: Future[Result | None] = field(default_factory=Future)
    stop: threading.Event = field(default_factory=threading.Event)

    def work(self) -> None:
        """Run, and pass on the result or the error."""
        # From here on the result can no longer be cancelled.
        if not self.result.set_running_or_notify_cancel():
            return
        try:
            self.result.set_result(self.run())
        except BaseException as error:  # noqa: BLE001 - the caller gets whatever the model raises
            self.result.set_exception(error)


class Worker:
    """One thread that owns the model."""

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._probes: dict[str, Task[object]] = {}
        self._short: deque[Task[object]] = deque()
        self._long: deque[Task[object]] = deque()
        self._background: deque[Task[object]] = deque()
        self._running: Task[object] | None = None
        self._probed = -math.inf  # when the last probe began
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="weakspot-explorer", daemon=True)
        self._thread.start()

    def probe(self, page: str, run: Callable[[], object]) -> Future[object]:
        """Run ahead of everything else; an earlier probe of the page that still waits gets None."""
        task = Task[object](run)
        earlier: Task[object] | None = None
        with self._wake:
            if self._closed:
                task.result.cancel()
            else:
                earlier = self._probes.pop(page, None)
                self._probes[page] = task
            self._wake.notify()
        if earlier is not None:
            # Outside the lock, because callbacks of the result run at once, in this thread.
            earlier.result.set_result(None)
        return task.result

    def short(self, run: Callable[[], object]) -> Future[object]:
        """Run a short request, between two steps of a long one if need be."""
        return self._queued(self._short, Task[object](run)).result

    def long(self, run: Callable[[], object]) -> Task[object]:
        """Run a long request after those that came before."""
        return self._queued(self._long, Task[object](run))

    def background(self, steps: Callable[[], Generator[None]]) -> Task[object]:
        """Run a generator step by step while nothing else waits; its result is None."""
        task: Task[object] = Task(lambda: None)
        generator = steps()

        def step() -> object:
            try:
                if not (task.stop.is_set() or self._closed):
                    next(generator)
                    return True
            except StopIteration:
                return False
            # What the generator must still restore is restored here, in the thread that owns the model.
            generator.close()
            if self._closed:
                task.result.cancel()
            return False

        task.run = step
        return self._queued(self._background, task)

    def unless_probed(self, run: Callable[[], Result]) -> Generator[None, None, Result]:
        """Run a part of background work that changes nothing before it returns.

        A probe ends it between two operations of torch, and it begins again at the generator's next turn; after some
        times probes wait, so that many of them do not keep it from being done.
        """
        for _ in range(RESTARTS):
            try:
                # Outside the checks, one of which may end the work on the way out of its own contexts.
                with torch.no_grad(), _BetweenOperations(self._raise_if_probed):
                    return run()
            except ProbeWaitsError:
                pass
            yield
        with torch.no_grad():
            return run()

    def _raise_if_probed(self) -> None:
        if self._probes:
            raise ProbeWaitsError

    def between_steps(self) -> None:
        """Answer what is urgent; called by a long job between two of its steps.

        Raises:
            StopRequestedError: if the job has been stopped.
            WorkerClosedError: if the worker has been closed.
        """
        running = self._running
        while (task := self._next(urgent=True)) is not None:
            task.work()
        self._raise_if_stopped(running)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let the long job that runs be ended between any two operations of torch; nobody else has a turn meanwhile.

        For work that has no steps of its own. Raises as `between_steps` does.
        """
        running = self._running
        with _BetweenOperations(lambda: self._raise_if_stopped(running)):
            yield

    def _raise_if_stopped(self, running: Task[object] | None) -> None:
        if self._closed:
            raise WorkerClosedError
        if running is not None and running.stop.is_set():
            raise StopRequestedError

    def close(self, timeout: float = 1.0) -> bool:
        """End the thread; what waits is cancelled and a long job stops at its next step.

        Returns:
            Whether the thread ended within so many seconds.
        """
        with self._wake:
            self._closed = True
            waiting = [*self._probes.values(), *self._short, *self._long, *self._background]
            self._probes.clear()
            for queue in (self._short, self._long, self._background):
                queue.clear()
            self._wake.notify()
        for task in waiting:
            task.result.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _queued(self, queue: deque[Task[object]], task: Task[object]) -> Task[object]:
        with self._wake:
            if self._closed:
                task.result.cancel()
            else:
                queue.append(task)
            self._wake.notify()
        return task

    def _next(self, *, urgent: bool = False) -> Task[object] | None:
        with self._wake:
            if self._probes:
                self._probed = time.monotonic()
                # Of several pages, the one whose probe was asked for first.
                return self._probes.pop(next(iter(self._probes)))
            if self._short:
                return self._short.popleft()
            return self._long.popleft() if self._long and not urgent else None

    def _loop(self) -> None:
        while not self._closed:
            task = self._next()
            if task is not None:
                self._running = task
                task.work()
                self._running = None
                del task  # results may hold much memory
            else:
                self._step_in_background()

    def _step_in_background(self) -> None:
        """One step of the background work that has waited longest, or wait for something to do."""
        with self._wake:
            # Looked at again under the lock: a request that came after `_next` has notified nobody.
            if self._closed or self._probes or self._short or self._long:
                return
            rest = self._probed + REST - time.monotonic()
            # Without background work there is nothing to wake up for by itself: the next request notifies.
            if rest > 0 or not self._background:
                self._wake.wait(rest if self._background else None)
                return
            task = self._background.popleft()
        try:
            unfinished = bool(task.run())
            with self._wake:
                if unfinished and not self._closed:
                    self._background.append(task)
                    return
            if unfinished:
                # Closed during the step, when the task was in no queue: it ends as those that wait do.
                task.run()
            elif not task.result.cancelled():
                task.result.set_result(None)
        except BaseException as error:  # noqa: BLE001
            task.result.set_exception(error)
