"""Mirror: a run that is kept by URL. The work is done in a folder here, and every step that counts is sent there."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from weakspot._checks import first_line
from weakspot._io.urls import Place, is_url, place
from weakspot.audit.store.maps import FOLDER, drop_maps
from weakspot.audit.store.records import FILE, LISTING, SHARDS, SKIPPED, shard_files, shard_number
from weakspot.audit.store.run import ABOUT, Run

DRAFT = ".part"
WHOLE = {
    "s3",
    "s3a",
    "gs",
    "gcs",
    "abfs",
    "abfss",
    "az",
    "memory",
}  # what is put there is there whole or not at all


class LocalStore:
    """Where a run is kept: in its own folder.

    Attributes:
        folder: that the work is done in.
        name: what the user calls the place.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def check_free(self, names: tuple[str, ...]) -> None:
        """Raises ValueError where a run is kept already."""
        del names  # the folder is looked into by who works in it

    @property
    def begun(self) -> bool:
        """Whether it can be gone on with."""
        return (self.folder / ABOUT).is_file()

    def fetch(self) -> None:
        """Make ready to go on.

        Raises:
            FileNotFoundError: when there is no run.
        """

    def begin(self) -> None:
        """The run is fixed, or what run.json says has changed."""

    def add(self, shard: Path) -> None:
        """A shard and its maps have been written."""
        del shard

    def map_sizes(self) -> Mapping[str, int] | None:
        """Sizes of the maps' files by their paths below maps.zarr; None where they can be read themselves."""
        return None

    def drop(self, numbers: Collection[int]) -> None:
        """Remove these shards, then their maps: what is left of maps without a shard counts for nothing."""
        for path in (self.folder / SHARDS).glob("[0-9]*-*.parquet"):
            if shard_number(path) in numbers:
                path.unlink()
        drop_maps(self.folder, numbers)

    def end(self) -> None:
        """All is written."""

    def run(self) -> Run:
        """The run."""
        return Run(self.folder)


class RemoteStore(LocalStore):
    """A run kept by URL: maps, then the shard, so that a shard there says that its maps are, too.

    Maps are removed here once they are there. Nobody is kept from writing there at the same time.
    """

    def __init__(self, folder: Path, url: str) -> None:
        super().__init__(folder, url)
        self.there = place(url)
        self.sent: dict[Path, tuple[int, int]] = {}

    @property
    def begun(self) -> bool:
        return self.folder / ABOUT in self.sent

    def check_free(self, names: tuple[str, ...]) -> None:
        for name in names:
            there = self.there.below(name)
            if _asked(self.name, there.system.exists, there.path):
                raise ValueError(
                    f"out is {self.name}, which holds a run already ({name}); go on with it by --resume {self.name}, "
                    "or give another place"
                )

    def fetch(self) -> None:
        """What going on needs: all but the contents of maps."""
        self.folder.mkdir(parents=True)
        download(self.there, self.folder, self.name)
        system, path = self.there.below(FOLDER)
        for found in _asked(self.name, system.find, path):
            if found.endswith("/zarr.json"):
                target = self.folder / FOLDER / found[len(path) :].lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                _asked(self.name, system.get_file, found, str(target))
        self.sent = {path: _state(path) for path in self.folder.rglob("*") if path.is_file()}

    def begin(self) -> None:
        for name in (LISTING, ABOUT):
            self._send(self.folder / name)

    def add(self, shard: Path) -> None:
        for path in sorted((self.folder / FOLDER).rglob("*")):
            if path.is_file():
                self._send(path)
                if path.name != "zarr.json":
                    path.unlink()
        self._send(shard)

    def map_sizes(self) -> Mapping[str, int]:
        system, root = self.there.below(FOLDER)
        found = _asked(self.name, system.find, root, detail=True)
        return {path[len(root) :].lstrip("/"): int(about["size"]) for path, about in found.items()}

    def drop(self, numbers: Collection[int]) -> None:
        system, root = self.there
        gone = [path.name for number, path in shard_files(self.folder).items() if number in numbers]
        for found in _asked(self.name, system.find, root) if numbers else ():
            chunk = re.search(rf"/{re.escape(FOLDER)}/.*/c/(\d+)/", found)
            if (chunk and int(chunk[1]) in numbers) or found.rpartition("/")[2] in gone:
                _asked(self.name, system.rm_file, found)
        super().drop(numbers)

    def end(self) -> None:
        others = {
            path for path in self.folder.iterdir() if path.is_file() and not path.name.endswith(".lock")
        }
        for path in sorted(others - {self.folder / ABOUT}):
            self._send(path)
        self._send(self.folder / ABOUT)
        system, root = self.there
        for found in _asked(self.name, system.find, root):
            if found.endswith(DRAFT):  # of one that died
                _asked(self.name, system.rm_file, found)

    def run(self) -> Run:
        return Run(self.name)

    def _send(self, path: Path) -> None:
        state = _state(path)
        if self.sent.get(path) == state:
            return
        system, there = self.there.below(path.relative_to(self.folder).as_posix())
        _asked(self.name, system.makedirs, there.rpartition("/")[0], exist_ok=True)
        known = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
        if known & WHOLE:
            _asked(self.name, system.put_file, str(path), there)
        else:
            folder, _, name = there.rpartition("/")
            draft = f"{folder}/.{name}{DRAFT}"
            _asked(self.name, system.put_file, str(path), draft)
            _asked(self.name, system.mv, draft, there)
        self.sent[path] = state


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def download(there: Place, folder: Path, name: str, *, shards: bool = True) -> None:
    """run.json, records, skipped images, listing and shards of the run kept there, as far as there are any.

    Without `shards`, of a run that is complete all but those, which hold the same rows again.

    Raises:
        FileNotFoundError: when there is no run.
        OSError: when it cannot be fetched.
    """
    if not _asked(name, there.system.exists, there.below(ABOUT).path):
        raise FileNotFoundError(f"{name} holds no run (there is no {ABOUT} in it)")
    wanted = [there.below(one).path for one in (LISTING, FILE, SKIPPED, ABOUT)]
    if not shards:
        with suppress(ValueError, AttributeError):  # damaged: who opens it says so
            about = json.loads(_asked(name, there.system.cat_file, there.below(ABOUT).path))
            shards = about.get("status") != "complete"
    home = there.below(SHARDS).path
    if shards and _asked(name, there.system.exists, home):
        wanted += [one for one in _asked(name, there.system.find, home) if one.endswith(".parquet")]
    for path in wanted:
        target = folder / path[len(there.path.rstrip("/")) + 1 :]
        if target.name.startswith(".") or not _asked(name, there.system.exists, path):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        _asked(name, there.system.get_file, path, str(target))


def _asked(name: str, do: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What `do` returns; what it raises becomes an OSError in one line."""
    try:
        return do(*arguments, **options)
    except Exception as error:
        raise OSError(f"{name}: {first_line(error)}") from error


@contextmanager
def kept(out: Path | str) -> Iterator[LocalStore]:
    """Where a run is kept that the user calls so; of a URL the folder here is gone after the block."""
    if not is_url(out):
        yield LocalStore(Path(out), str(out))
        return
    scratch = tempfile.mkdtemp(prefix="weakspot-")
    try:
        yield RemoteStore(Path(scratch, "run"), str(out))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
