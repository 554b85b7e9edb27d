"""Who may talk to the explorer: the token, the cookie, the names of the host, and the headers of every answer."""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import re
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
# Nothing that would end the path early: the link and the cookie's path are made of it.
BASE_URL = re.compile(r"(https?://([^\s/?#@:\[\]]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?)?(/(?!/)[^\s?#;]*)?")
DENIED = "This address needs the token in the link that weakspot explore printed. Open the whole link."


def check_base_url(base_url: str) -> None:
    """Raises ValueError unless it is empty, a path, or a whole URL of http or https."""
    if not BASE_URL.fullmatch(base_url):
        raise ValueError(
            "--base-url must be a path that begins with a slash, or a URL such as https://hub.example.org/proxy/8765/, "
            f"got {base_url!r}"
        )


@dataclass(frozen=True)
class Access:
    """What a request must show.

    Attributes:
        port: of the server.
        host: that it listens on.
        token: in the link, once; then in a cookie.
        base_url: where a proxy shows the explorer, as a path or a whole URL; may be empty.
    """

    port: int
    host: str = "127.0.0.1"
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    base_url: str = ""

    @property
    def cookie(self) -> str:
        """Name of the cookie; cookies do not tell ports apart."""
        return f"weakspot_{self.port}"

    @property
    def prefix(self) -> str:
        """The path under which a proxy that does not strip it passes requests on; empty or "/a/b"."""
        return urlsplit(self.base_url).path.rstrip("/")

    @property
    def hosts(self) -> frozenset[str]:
        """The host names with ports under which a browser may know this server."""
        public = urlsplit(self.base_url).netloc
        # Addresses that stand for all of the machine's are no names of it.
        names = {"127.0.0.1", "localhost", "[::1]", _bracketed(self.host)} - {"0.0.0.0", "[::]"}  # noqa: S104
        # Browsers leave out port 80, which is the usual one of http.
        own = {f"{name}:{self.port}" for name in names} | (names if self.port == 80 else set())
        return frozenset(name.lower() for name in own | ({public} if public else set()))

    @property
    def origins(self) -> frozenset[str]:
        """The origins that pages of this server have."""
        public = urlsplit(self.base_url)
        own = {f"http://{host}" for host in self.hosts if host != public.netloc.lower()}
        return frozenset(own | ({f"{public.scheme}://{public.netloc}".lower()} if public.netloc else set()))

    def knows(self, host: str) -> bool:
        """Whether a browser may know this server under a host name with its port.

        A server that listens on every address has names that it does not know; there, every address in numbers is one
        of its own: a page that abuses DNS has a name.
        """
        if host in self.hosts:
            return True
        name = host.removesuffix(f":{self.port}")
        everywhere = self.host in {"0.0.0.0", "::"}  # noqa: S104
        # Browsers leave out port 80 here, too.
        with_port = name != host or self.port == 80
        return everywhere and with_port and (name == socket.gethostname().lower() or _is_address(name))

    def has_token(self, headers: Mapping[str, str], query: str) -> bool:
        """Whether a request has the token in its link, its cookie or its header Authorization."""
        # A long query is not parsed, because whoever sent it has not shown a token yet.
        short = len(query) < 2000 and query.count("&") < 20
        given = parse_qs(query).get("token", [])[:1] if short else []
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given += [bearer.strip()] if scheme.lower() == "bearer" else []
        try:
            cookies: SimpleCookie = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            cookies = SimpleCookie()
        given += [cookies[self.cookie].value] if self.cookie in cookies else []
        # Compared in constant time, as bytes: compare_digest takes no other text than ASCII.
        wanted = self.token.encode()
        return any(hmac.compare_digest(one.encode("utf-8", "replace"), wanted) for one in given)

    def refusal(self, headers: Mapping[str, str], query: str) -> str | None:
        """Why a request is refused; None if it is not.

        The host must be one of ours, so that a foreign name that resolves to this machine is of no use (DNS rebinding),
        and the origin, if a browser sends one, must be that of our own page.
        """
        host = headers.get("host", "").lower()
        if not self.knows(host):
            return "This server does not answer under that host name (see weakspot explore --base-url)."
        origin = headers.get("origin")
        # Under an address that `knows` takes beyond the listed hosts, the page's own origin is that address.
        own = self.origins | ({f"http://{host}"} if host not in self.hosts else set())
        if origin is not None and origin.lower() not in own:
            return "This server answers its own pages only."
        return None if self.has_token(headers, query) else DENIED


def _is_address(name: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name.removeprefix("[").removesuffix("]")))
    return False


def _bracketed(host: str) -> str:
    """A host as it is written in a URL."""
    try:
        return f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    except ValueError:
        return host


class Guard:
    """Refuses requests without access, removes the prefix of a proxy, and adds the headers."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] not in {"http", "websocket"}:
            await self.app(scope, receive, send)
            return
        # Headers arrive as bytes, and latin-1 decodes any of them.
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        query = scope.get("query_string", b"").decode("latin-1")
        if (refusal := self.access.refusal(headers, query)) is not None:
            await _refuse(scope, receive, send, refusal)
            return
        path, prefix = scope["path"], self.access.prefix
        if path in {"", prefix} and scope["type"] == "http":
            # Relative URLs need the last slash.
            place = f"{prefix.rpartition('/')[2]}/{'?' + query if query else ''}"
            await _answer(send, 307, "The page is one slash further.", location=place)
            return
        if prefix and (path == prefix or path.startswith(f"{prefix}/")):
            scope = {**scope, "path": path[len(prefix) :], "raw_path": None}

        async def send_with_headers(message: MutableMapping[str, object]) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *own]  # type: ignore[misc]
            await send(message)

        await self.app(scope, receive, send_with_headers)


async def _refuse(scope: Scope, receive: Callable[[], Awaitable[object]], send: Send, sentence: str) -> None:
    if scope["type"] == "websocket":
        # The refusal answers the message "connect", which must have been received before it.
        await receive()
        await send({"type": "websocket.close", "code": 4403, "reason": "refused"})
        return
    await _answer(send, 403, sentence)


async def _answer(send: Send, status: int, sentence: str, **headers: str) -> None:
    every = {"content-type": "text/plain; charset=utf-8", **HEADERS, **headers}
    start = [(name.encode(), value.encode("latin-1")) for name, value in every.items()]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": sentence.encode()})
