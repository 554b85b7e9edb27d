"""The web application: the page and its files, one URL for each request, and one socket for jobs."""

from __future__ import annotations

import asyncio
import contextlib
import json
from importlib.resources import files
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from weakspot.explorer.access import Access, Guard
from weakspot.explorer.desk import Desk
from weakspot.explorer.messages import MASK_BYTES, UPLOAD_BYTES, Message, RequestError
from weakspot.explorer.worker import Task
from weakspot.report.rendering import drawing_modules

if TYPE_CHECKING:
    from weakspot.explorer.gallery_desk import RecordDesk

BODY = 2 * MASK_BYTES  # bytes of a request
UPLOAD_BODY = UPLOAD_BYTES * 4 // 3 + 65536  # base64 takes a third more
JOBS = 8  # of one page at once
EVENTS = 256  # that wait for a slow page; then pictures are left out
KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}


class Application(Starlette):
    """The explorer as an ASGI application.

    Attributes:
        desk: answers the requests.
        access: who may make them.
    """

    def __init__(self, desk: Desk | RecordDesk, access: Access) -> None:
        self.desk, self.access = desk, access
        super().__init__(
            routes=[
                Route("/", self.page),
                Route("/static/{name}", self.static),
                Route("/api/{name}", self.ask, methods=["POST"]),
                WebSocketRoute("/api/ws", self.socket),
            ],
            exception_handlers={Exception: _failed},
        )
        self.guarded = Guard(super().__call__, access)

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        """Every request passes the guard first."""
        scope["app"] = self
        await self.guarded(scope, receive, send)

    async def page(self, request: Request) -> Response:  # noqa: ARG002 - the signature of a route
        """The page; the first visit, with the token in the link, sets the cookie."""
        response = _file("index.html")
        response.set_cookie(
            self.access.cookie,
            self.access.token,
            path=self.access.prefix or "/",  # other servers behind the same proxy must not get it
            httponly=True,
            samesite="strict",
            secure=self.access.base_url.startswith("https:"),
        )
        return response

    async def static(self, request: Request) -> Response:
        """A file of the page, or a drawing module that it shares with the report."""
        return _file(request.path_params["name"])

    async def ask(self, request: Request) -> Response:
        """Answer a request of the desk."""
        name = request.path_params["name"]
        try:
            body = await _body(request, UPLOAD_BODY if name == "upload" else BODY)
            # The desk answers from threads of its own, and the loop serves others meanwhile.
            answer = await asyncio.wrap_future(self.desk.ask(name, body))
        except RequestError as error:
            return _json({"error": str(error)}, error.status)
        except ClientDisconnect:
            return Response(status_code=499)
        return _json(answer)

    async def socket(self, socket: WebSocket) -> None:
        """Jobs of one page: each request starts one, and its events come back under its number."""
        await socket.accept()
        outbox: asyncio.Queue[Message] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        jobs: dict[int, Task[object]] = {}
        writer = asyncio.create_task(_write(socket, outbox))

        def send(number: int, event: Message) -> None:
            def put() -> None:
                if outbox.qsize() > EVENTS:
                    event.pop("png", None)
                if event.get("event") in {"done", "error"}:
                    jobs.pop(number, None)
                outbox.put_nowait({"id": number, **event})

            # Events come from the desk's threads; only that of the loop touches the jobs and the outbox.
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(put)

        try:
            while True:
                self._receive(await socket.receive_text(), jobs, send)
        except (WebSocketDisconnect, KeyError):  # KeyError: bytes instead of text
            pass
        finally:
            # The page has gone, so nobody wants the rest of its jobs.
            for task in jobs.values():
                task.stop.set()
            writer.cancel()

    def _receive(self, text: str, jobs: dict[int, Task[object]], send) -> None:  # type: ignore[no-untyped-def]
        """Start or stop a job."""
        message: object = None
        with contextlib.suppress(ValueError, RecursionError):
            message = json.loads(text) if len(text) <= BODY else None
        number = message.get("id") if isinstance(message, dict) else None
        if not isinstance(message, dict) or not isinstance(number, int) or isinstance(number, bool):
            send(-1, {"event": "error", "error": "a message must be a JSON object with an integer id"})
        elif message.get("stop") is True:
            if number in jobs:
                jobs[number].stop.set()
        elif number in jobs:
            send(-1, {"event": "error", "error": "the id of a message must not be that of a running job"})
        elif len(jobs) >= JOBS:
            send(number, {"event": "error", "error": f"at most {JOBS} jobs run at once (stop one)"})
        else:
            name = message.get("name")
            subject = name if isinstance(name, str) else ""
            task = self.desk.subscribe(subject, message.get("body"), lambda event: send(number, event))
            if not task.result.done():
                jobs[number] = task


async def _write(socket: WebSocket, outbox: asyncio.Queue[Message]) -> None:
    """Send what waits; a page that has gone is noticed by the reader."""
    with contextlib.suppress(Exception):
        while True:
            await socket.send_text(json.dumps(await outbox.get(), allow_nan=False))


async def _body(request: Request, most: int) -> object:
    """The JSON of a request.

    Raises:
        RequestError: if it is too long or no JSON.
    """
    content = bytearray()
    # Counted as it arrives, because the length that a header states may be wrong.
    async for part in request.stream():
        content += part
        if len(content) > most:
            raise RequestError(f"a request must be at most {most / 2**20:.1f} MB", 413)
    try:
        return json.loads(content or b"{}")
    except (ValueError, RecursionError):
        raise RequestError("the request must be JSON") from None


def _json(content: Message, status: int = 200) -> Response:
    try:
        text = json.dumps(content, allow_nan=False)
    except ValueError:  # NaN, which JSON has not
        return _json({"error": "the answer holds values that are no numbers"}, 400)
    return Response(text, status, media_type="application/json")


def _file(name: str) -> Response:
    """A script, style or page of the package; no other file, and none of another folder."""
    suffix = f".{name.rpartition('.')[2]}"
    plain = name.replace("_", "").replace("-", "").replace(".", "")
    # Without separators, a name cannot lead out of the folder.
    if suffix in KINDS and plain.isalnum() and not name.startswith("."):
        for folder in (files("weakspot.explorer").joinpath("static"), drawing_modules()):
            path = folder.joinpath(name)
            if path.is_file():
                return Response(path.read_bytes(), media_type=KINDS[suffix])
    return PlainTextResponse("There is no such file.", 404)


async def _failed(request: Request, error: Exception) -> Response:  # noqa: ARG001 - the signature of a handler
    return _json({"error": f"unexpected: {type(error).__name__}"}, 500)
