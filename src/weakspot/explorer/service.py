"""The service: the application on a port of this machine, until it is closed."""

from __future__ import annotations

import atexit
import contextlib
import errno
import ipaddress
import os
import socket
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weakspot.explorer.access import Access, check_base_url

if TYPE_CHECKING:
    import uvicorn

    from weakspot.explorer.desk import Desk
    from weakspot.explorer.gallery_desk import RecordDesk

TRIED = 50  # ports after the one that is asked for
LAST = 65535  # the largest port
GRACE = 1  # seconds that open connections have when the service ends


def open_port(host: str, port: int) -> socket.socket:
    """Listen on a port, or on the next free one.

    Args:
        host: name or address of this machine.
        port: to begin with; 0 for any.

    Raises:
        ValueError: if the host is not of this machine, or no port is free.
    """
    if not 0 <= port <= LAST:
        raise ValueError(f"port must be from 0 to {LAST}, got {port}")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise ValueError(f"host must be a name or an address of this machine, got {host!r}") from None
    for candidate in range(port, min(port + TRIED, LAST + 1)):
        # asyncio sends small answers at once (TCP_NODELAY) only on sockets that name their protocol; on others the
        # body of an answer waits 40 ms for the acknowledgment of its head.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        if os.name != "nt":  # on Windows, the option lets two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            # An address of IPv6 has two more parts after its port.
            listener.bind((address[0], candidate, *address[2:]))
            listener.listen(128)
        except OSError as error:
            listener.close()
            if error.errno not in {errno.EADDRINUSE, errno.EACCES}:
                raise ValueError(f"host must be an address of this machine, got {host!r}") from None
        else:
            return listener
    raise ValueError(f"no port from {port} to {min(LAST, port + TRIED - 1)} is free (give another --port)")


@dataclass(eq=False)
class Service:
    """A running explorer.

    Attributes:
        desk: answers the requests.
        access: who may make them.
    """

    desk: Desk | RecordDesk
    access: Access
    listener: socket.socket
    server: uvicorn.Server
    _thread: threading.Thread | None = None

    @staticmethod
    def prepare(
        desk: Desk | RecordDesk,
        *,
        host: str = "127.0.0.1",
        port: int = 8765,
        token: str | None = None,
        base_url: str = "",
    ) -> Service:
        """Take a port. `run` or `start` then serves.

        Raises:
            ValueError: if the host is not of this machine, no port is free, or the base URL is none.
        """
        import uvicorn

        from weakspot.explorer.application import Application

        check_base_url(base_url)
        listener = open_port(host, port)
        number = listener.getsockname()[1]
        access = Access(number, host, token, base_url) if token else Access(number, host, base_url=base_url)
        config = uvicorn.Config(
            Application(desk, access),
            log_level="critical",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=GRACE,
            ws="websockets-sansio",
            ws_max_size=4 * 2**20,
            server_header=False,
            proxy_headers=False,
        )
        return Service(desk, access, listener, uvicorn.Server(config))

    @property
    def url(self) -> str:
        """The link to open, with the token."""
        base = self.access.base_url
        if "://" not in base:
            base = f"http://{self.host}:{self.access.port}{self.access.prefix}/"
        return f"{base.rstrip('/')}/?token={self.access.token}"

    @property
    def host(self) -> str:
        """The host under which this machine reaches the service, in brackets if it has colons."""
        host = "127.0.0.1" if self.access.host in {"0.0.0.0", "::"} else self.access.host  # noqa: S104
        return f"[{host}]" if ":" in host else host

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return ipaddress.ip_address(self.listener.getsockname()[0].partition("%")[0]).is_loopback

    def run(self) -> bool:
        """Serve in this thread until Ctrl-C or `close`.

        Returns:
            Whether the worker has ended, too: False while a model is busy that cannot be interrupted.
        """
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again after it has ended
            self.server.run(sockets=[self.listener])
        return self.desk.close()

    def start(self) -> None:
        """Serve in a thread of its own."""
        self._thread = threading.Thread(target=self.run, name="weakspot-explorer-server", daemon=True)
        self._thread.start()
        # A thread that is inside the model when the interpreter ends would abort the process.
        atexit.register(self.close)

    def close(self) -> None:
        """End the service, and the worker that owns the model."""
        atexit.unregister(self.close)
        self.server.should_exit = True
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(GRACE + 2)
        self.desk.close()
        self.listener.close()


def forwarding_hint(port: int, host: str = "127.0.0.1") -> str | None:
    """How to reach this machine from the one in front of the user; None if that is the same machine.

    Args:
        port: of the service.
        host: under which this machine reaches it.
    """
    if "SSH_CONNECTION" not in os.environ:
        return None
    here = os.environ["SSH_CONNECTION"].split()
    user, machine = os.environ.get("USER", "USER"), here[2] if len(here) > 2 else socket.gethostname()
    return f"ssh -L {port}:{host}:{port} {user}@{machine}"


def has_display() -> bool:
    """Whether a browser that is opened here is seen by the user."""
    if "SSH_CONNECTION" in os.environ:
        return False
    return sys.platform in {"darwin", "win32"} or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
