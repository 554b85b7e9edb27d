"""Where a run is stored while an audit works on it: its own folder, or a URL that a local folder is sent to."""

import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from weakspot._errors import first_line
from weakspot._io.urls import Place, is_url, place
from weakspot.audit.store.maps import MAPS, drop_maps
from weakspot.audit.store.records import LISTING, RECORDS, SHARDS, SKIPPED, shard_files, shard_number
from weakspot.audit.store.run_info import RUN_FILE
from weakspot.audit.store.unfinished import SUFFIX, UNFINISHED, remove_unfinished, unfinished_files

DRAFT = ".part"
# Protocols by which an upload appears as a whole or not at all.
ATOMIC = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory"}
P = ParamSpec("P")
T = TypeVar("T")


class LocalStore:
    """A run in its own folder.

    Attributes:
        folder: where the audit works.
        name: the path or URL that the user gave.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def check_free(self, names: tuple[str, ...]) -> None:
        """Raises ValueError if a run is stored already under one of these file names."""
        taken = next((name for name in names if self._holds(name)), None)
        # A listing alone was left by a run that died before it began.
        if taken is not None and not (taken == LISTING and not self._holds(RUN_FILE)):
            raise ValueError(
                f"out must be empty, got {self.name}, which holds a run already ({taken}; continue it with --resume "
                f"{shlex.quote(self.name)}, or give another place)"
            )

    def _holds(self, name: str) -> bool:
        return (self.folder / name).exists()

    @property
    def begun(self) -> bool:
        """Whether the run can be resumed."""
        return (self.folder / RUN_FILE).is_file()

    def fetch(self) -> None:
        """Bring the run into the folder, so that it can be continued.

        Raises:
            FileNotFoundError: if there is no run.
        """

    def save_info(self) -> None:
        """Store the list of images and run.json, which have changed."""

    def add(self, shard: Path) -> None:
        """Store a shard and its maps, which have been written to the folder."""
        del shard

    def add_unfinished(self, path: Path) -> None:
        """Store results of an unfinished shard, which have been written to the folder."""
        del path

    def drop_unfinished(self, numbers: Collection[int]) -> None:
        """Remove the unfinished results of these shards."""
        remove_unfinished(self.folder, numbers)

    def map_sizes(self) -> Mapping[str, int] | None:
        """Sizes of the maps' files by their paths below maps.zarr; None if their content can be read instead."""
        return None

    def drop(self, numbers: Collection[int]) -> None:
        """Remove these shards, then their maps: without a shard, maps count for nothing."""
        for path in (self.folder / SHARDS).glob("[0-9]*-*.parquet"):
            if shard_number(path) in numbers:
                path.unlink()
        drop_maps(self.folder, numbers)
        self.drop_unfinished(numbers)

    def finish(self) -> None:
        """Store everything that is left and remove drafts; the run is complete."""
        clear_drafts(self.folder)


class RemoteStore(LocalStore):
    """A run at a URL. Maps are sent before their shard, so that a shard there implies its maps.

    Maps are removed from the local folder once they have been sent. Nothing prevents two processes from writing to
    one URL.
    """

    def __init__(self, folder: Path, url: str) -> None:
        super().__init__(folder, url)
        self.remote = place(url)
        self.sent: dict[Path, tuple[int, int]] = {}

    def _holds(self, name: str) -> bool:
        system, path = self.remote.below(name)
        return bool(self._call(system.exists, path))

    @property
    def begun(self) -> bool:
        return self.folder / RUN_FILE in self.sent

    def fetch(self) -> None:
        """Fetch everything but the contents of maps."""
        self.folder.mkdir(parents=True)
        download(self.remote, self.folder, self.name)
        for name, end in ((MAPS, "/zarr.json"), (UNFINISHED, SUFFIX)):
            system, root = self.remote.below(name)
            for path in self._call(system.find, root):
                if path.endswith(end):
                    target = self.folder / name / path[len(root) :].lstrip("/")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    self._call(system.get_file, path, str(target))
        # What was fetched is there already and need not be sent.
        self.sent = {path: _state(path) for path in self.folder.rglob("*") if path.is_file()}

    def save_info(self) -> None:
        # run.json last: it makes the run one that can be resumed, which needs the listing.
        for name in (LISTING, RUN_FILE):
            self._send(self.folder / name)

    def add(self, shard: Path) -> None:
        # zarr.json stays here: later shards of the array are written against it.
        for path in sorted((self.folder / MAPS).rglob("*")):
            if path.is_file():
                self._send(path)
                if path.name != "zarr.json":
                    path.unlink()
        self._send(shard)

    def add_unfinished(self, path: Path) -> None:
        self._send(path)

    def drop_unfinished(self, numbers: Collection[int]) -> None:
        for path in unfinished_files(self.folder):
            if shard_number(path) in numbers:
                system, target = self.remote.below(path.relative_to(self.folder).as_posix())
                if self._call(system.exists, target):
                    self._call(system.rm_file, target)
        super().drop_unfinished(numbers)

    def map_sizes(self) -> Mapping[str, int]:
        system, root = self.remote.below(MAPS)
        files = self._call(system.find, root, detail=True)
        return {path[len(root) :].lstrip("/"): int(facts["size"]) for path, facts in files.items()}

    def drop(self, numbers: Collection[int]) -> None:
        # Only if needed, because it takes a list of everything at the URL.
        if numbers:
            # Before the local files are removed, whose names have the digests.
            shards = {path.name for number, path in shard_files(self.folder).items() if number in numbers}
            self._remove(
                lambda path: path.rpartition("/")[2] in shards or _chunk_number(path) in numbers,
            )
        super().drop(numbers)

    def finish(self) -> None:
        files = {path for path in self.folder.iterdir() if path.is_file() and path.suffix != ".lock"}
        # run.json last: it says that the run is complete.
        for path in [*sorted(files - {self.folder / RUN_FILE}), self.folder / RUN_FILE]:
            self._send(path)
        self._remove(lambda path: path.endswith(DRAFT))  # of a writer that died
        super().finish()

    def _remove(self, matches: Callable[[str], bool]) -> None:
        system, root = self.remote
        for path in self._call(system.find, root):
            if matches(path):
                self._call(system.rm_file, path)

    def _send(self, path: Path) -> None:
        state = _state(path)
        # Time and size suffice: only this process writes to the folder, and only new content.
        if self.sent.get(path) == state:
            return
        system, target = self.remote.below(path.relative_to(self.folder).as_posix())
        folder, _, name = target.rpartition("/")
        self._call(system.makedirs, folder, exist_ok=True)
        protocols = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
        if protocols & ATOMIC:
            self._call(system.put_file, str(path), target)
        else:
            # Elsewhere an interrupted upload would leave a cut file under the final name.
            draft = f"{folder}/.{name}{DRAFT}"
            self._call(system.put_file, str(path), draft)
            self._call(system.mv, draft, target)
        self.sent[path] = state

    def _call(self, operation: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return _call(self.name, operation, *args, **kwargs)


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _chunk_number(path: str) -> int:
    """The shard whose map values a remote file holds, -1 for every other file."""
    chunk = re.search(rf"/{re.escape(MAPS)}/.*/c/(\d+)/", path)
    return int(chunk[1]) if chunk else -1


def download(
    remote: Place, folder: Path, name: str, *, shards: Callable[[Path], bool] = lambda _: True
) -> None:
    """Fetch run.json, records, skipped images, the list of images and the shards of a remote run, if they exist.

    Args:
        remote: the run.
        folder: where to write the files.
        name: the URL as the user gave it.
        shards: called with the folder once run.json is in it; returns whether the shards are wanted as well.

    Raises:
        FileNotFoundError: if there is no run.
        OSError: if it cannot be fetched.
    """
    system, root = remote
    if not _call(name, system.exists, remote.below(RUN_FILE).path):
        raise FileNotFoundError(f"{name} holds no run (it has no {RUN_FILE})")

    def fetch(path: str) -> None:
        target = folder / path[len(root.rstrip("/")) + 1 :]
        target.parent.mkdir(parents=True, exist_ok=True)
        _call(name, system.get_file, path, str(target))

    for file in (LISTING, RECORDS, SKIPPED, RUN_FILE):
        path = remote.below(file).path
        if _call(name, system.exists, path):
            fetch(path)
    home = remote.below(SHARDS).path
    if shards(folder) and _call(name, system.exists, home):
        for path in _call(name, system.find, home):
            if path.endswith(".parquet") and not path.rpartition("/")[2].startswith("."):
                fetch(path)


def _call(name: str, operation: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of an operation on a remote file system; any exception becomes an OSError of one line."""
    try:
        return operation(*args, **kwargs)
    except Exception as error:
        raise OSError(f"{name}: {first_line(error)}") from error


def clear_drafts(folder: Path) -> None:
    """Remove drafts of writers that died; the caller must hold the folder's lock."""
    # The names that `write_atomic` and Zarr give to a file until it is whole.
    places, endings = (folder, folder / SHARDS, folder / UNFINISHED), (".parquet", ".json", SUFFIX)
    drafts = [
        *(draft for place in places for ending in endings for draft in place.glob(f".*{ending}.*")),
        *folder.glob(f"{MAPS}/**/*.partial"),
    ]
    for draft in drafts:
        draft.unlink(missing_ok=True)


@contextmanager
def open_store(out: Path | str) -> Iterator[LocalStore]:
    """The store for a path or URL; the local folder of a URL is removed after the block."""
    if not is_url(out):
        yield LocalStore(Path(out), str(out))
        return
    scratch = tempfile.mkdtemp(prefix="weakspot-")
    try:
        yield RemoteStore(Path(scratch, "run"), str(out))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
