"""Files and folders by URL, of any protocol that fsspec knows."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from weakspot._io.files import write_whole


class FetchError(Exception):
    """A file behind a URL could not be fetched, for a reason that is not the file's own (such as the network)."""


AT_ONCE = 8  # files that are fetched at the same time
LOST = (FileNotFoundError, IsADirectoryError, PermissionError)


class Place(NamedTuple):
    """A file or folder somewhere else.

    Attributes:
        system: fsspec's.
        path: as the system takes it, without protocol.
    """

    system: Any
    path: str

    def below(self, name: str) -> Place:
        """What lies under that name in this folder."""
        return Place(self.system, f"{self.path.rstrip('/')}/{name}")


def is_url(text: object) -> bool:
    """Whether it names a place by protocol://; paths do not."""
    return isinstance(text, str) and re.match(r"[A-Za-z][\w+.-]*(://|::)", text) is not None


def place(url: str) -> Place:
    """The place of that URL; nothing is asked of it yet.

    Raises:
        ValueError: when nobody knows the protocol or its package is missing, saying what helps.
    """
    from fsspec import get_filesystem_class
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    if "::" in url:
        raise ValueError(f"{url}: a chain of protocols; accepted is one protocol://path")
    try:
        get_filesystem_class(protocol)
        return Place(*url_to_fs(url))
    except ValueError:
        raise ValueError(
            f"{url}: nothing installed knows the protocol {protocol}; accepted are those of fsspec, such as s3, gs, "
            "abfs, https, sftp, file"
        ) from None
    except ImportError as error:
        why = str(error).strip().partition("\n")[0]
        raise ValueError(f"{url}: the package for {protocol} is missing ({why}); install it by pip") from None


def exists(source: str) -> bool:
    """Whether there is such a file or folder, by path or by URL.

    Raises:
        ValueError: as `place`, or when a URL's host cannot be asked.
    """
    if not is_url(source):
        return Path(source).exists()
    system, path = place(source)
    try:
        return bool(system.exists(path))
    except Exception as error:
        raise ValueError(f"{source} cannot be asked for ({sentence(error)})") from error


def files(source: str) -> Iterator[tuple[str, str]]:
    """URL and path below `source` of every file there, hidden ones left out; ("...", "") where it is one itself."""
    system, root = place(source)
    if system.isfile(root):
        yield source, ""
        return
    for path in system.find(root):
        below = path[len(root) :].lstrip("/") if path.startswith(root) else path.rpartition("/")[2]
        if not any(part.startswith(".") for part in below.split("/")):
            yield system.unstrip_protocol(path), below


def fetched(urls: Sequence[str]) -> list[bytes | None]:
    """The contents of files, several at a time; None of those that are not there or closed to us.

    Raises:
        FetchError: when one cannot be fetched for another reason: the network's fault, not the file's.
    """

    def fetch(url: str) -> bytes | None:
        try:
            system, path = place(url)
            return bytes(system.cat_file(path))
        except LOST:
            return None
        except Exception as error:
            raise FetchError(f"{url} cannot be fetched ({sentence(error)})") from error

    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="weakspot-fetch") as pool:
        return list(pool.map(fetch, urls))


@lru_cache(maxsize=64)
def local_copy(url: str) -> Path:
    """A file's copy on this machine, made once as long as the file stays as it is.

    Raises:
        FileNotFoundError: when it is not there.
        FetchError: when it cannot be fetched.
    """
    system, path = place(url)
    try:
        state = str(system.ukey(path))
        name = f"{hashlib.blake2b(f'{url} {state}'.encode(), digest_size=16).hexdigest()}{Path(path).suffix}"
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "weakspot", "fetched")
        home.mkdir(parents=True, exist_ok=True)
        if not (home / name).exists():
            write_whole(home / name, lambda draft: system.get_file(path, str(draft)))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise FetchError(f"{url} cannot be fetched ({sentence(error)})") from error
    return home / name


def sentence(error: Exception) -> str:
    """What it says, in a line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
