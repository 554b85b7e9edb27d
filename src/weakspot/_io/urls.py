"""Files and folders by URL, of any protocol that fsspec knows."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from weakspot._checks import require
from weakspot._errors import first_line
from weakspot._io.files import write_atomic


class FetchError(Exception):
    """A file behind a URL could not be fetched, for a reason that is not the file's own (such as the network)."""


PARALLEL_FETCHES = 8
# These concern one file; any other error concerns the host or the network.
UNAVAILABLE = (FileNotFoundError, IsADirectoryError, PermissionError)


class Place(NamedTuple):
    """A file or folder behind a URL.

    Attributes:
        system: file system of fsspec.
        path: in that file system, without the protocol.
    """

    system: Any
    path: str

    def below(self, name: str) -> Place:
        """The entry of that name in this folder."""
        return Place(self.system, f"{self.path.rstrip('/')}/{name}")


def is_url(text: object) -> bool:
    """Whether the text starts with protocol://."""
    return isinstance(text, str) and re.match(r"[A-Za-z][\w+.-]*(://|::)", text) is not None


def place(url: str) -> Place:
    """Parse a URL, without contacting its host.

    Raises:
        ValueError: if the protocol is unknown or its package is not installed.
    """
    require("a URL", "fsspec", extra="audit")
    from fsspec import get_filesystem_class
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    if "::" in url:
        raise ValueError(f"URL must be protocol://path, got {url} (chains of protocols are not supported)")
    try:
        get_filesystem_class(protocol)
        return Place(*url_to_fs(url))
    except ValueError:
        raise ValueError(
            f"protocol must be one that fsspec supports, such as s3, gs, abfs, https, sftp or file, got {protocol} in "
            f"{url}"
        ) from None
    except ImportError as error:
        raise ValueError(f"{url} needs a package for {protocol}: {first_line(error)}") from None


def exists(source: str) -> bool:
    """Whether a file or folder exists at a path or URL.

    Raises:
        ValueError: if the URL is not valid or its host cannot be reached.
    """
    if not is_url(source):
        return Path(source).exists()
    system, path = place(source)
    try:
        return bool(system.exists(path))
    except Exception as error:
        raise ValueError(f"{source} cannot be reached ({first_line(error)})") from error


def files(source: str) -> Iterator[tuple[str, str]]:
    """Yield the URL of every file below `source` that is not hidden, and its path relative to `source`.

    If `source` is a file itself, its relative path is empty.
    """
    system, root = place(source)
    if system.isfile(root):
        yield source, ""
        return
    for path in system.find(root):
        below = path[len(root) :].lstrip("/") if path.startswith(root) else path.rpartition("/")[2]
        if not any(part.startswith(".") for part in below.split("/")):
            yield system.unstrip_protocol(path), below


def fetched(urls: Sequence[str]) -> list[bytes | None]:
    """Fetch files, several at a time; None for a file that does not exist or is not readable.

    Raises:
        FetchError: if a file cannot be fetched for another reason, such as the network.
    """

    def fetch(url: str) -> bytes | None:
        try:
            system, path = place(url)
            return bytes(system.cat_file(path))
        except UNAVAILABLE:
            return None
        except Exception as error:
            raise FetchError(f"{url} cannot be fetched ({first_line(error)})") from error

    with ThreadPoolExecutor(PARALLEL_FETCHES, thread_name_prefix="weakspot-fetch") as pool:
        return list(pool.map(fetch, urls))


_fetching = threading.Lock()


# The host is asked once for each file, and not once for each row of an array in it.
@lru_cache(maxsize=64)
def local_copy(url: str) -> Path:
    """Fetch a file into the cache of this machine, unless an unchanged copy is there.

    Raises:
        FileNotFoundError: if there is no such file.
        FetchError: if it cannot be fetched.
    """
    system, path = place(url)
    try:
        # It changes with the file, so that a changed file gets another name in the cache.
        state = str(system.ukey(path))
        name = f"{hashlib.blake2b(f'{url} {state}'.encode(), digest_size=16).hexdigest()}{Path(path).suffix}"
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "weakspot", "fetched")
        home.mkdir(parents=True, exist_ok=True)
        # One download at a time, because several threads may need rows of one array.
        with _fetching:
            if not (home / name).exists():
                write_atomic(home / name, lambda draft: system.get_file(path, str(draft)))
    # Callers tell a file that is gone (it is missing) from a host that does not answer (the work stops).
    except FileNotFoundError:
        raise
    except Exception as error:
        raise FetchError(f"{url} cannot be fetched ({first_line(error)})") from error
    return home / name
