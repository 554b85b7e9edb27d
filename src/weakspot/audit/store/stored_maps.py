"""Maps of a run as they are read: image by image, scaled back, and compared with their digests."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from weakspot._io.urls import place
from weakspot.audit.store.digests import DamagedError, damaged, digest_or_none
from weakspot.audit.store.maps import MAPS, SCALE, chunk_path
from weakspot.audit.store.records import SHARDS, Note, is_intact, read_note, shard_files

if TYPE_CHECKING:
    import zarr

Check = Callable[[str, int, NDArray[np.int64]], None]
Index = int | slice | EllipsisType | NDArray[np.int64] | list[int]
# Of the files that `ChunkFiles` reads.
CHECKSUM = 4  # bytes
ENTRY = struct.Struct("<QQ")  # offset and length
# The entry of a chunk that is not stored.
ABSENT = (2**64 - 1, 2**64 - 1)
CODECS = ("bytes", "zstd", "crc32c")  # of a chunk, as `MapWriter` writes it


class StoredMaps(Mapping[str, "StoredMap"]):
    """The maps of a run: name -> `StoredMap`, read from the disk or from a URL.

    Args:
        path: of maps.zarr.
        check: called with the name of an array, its number of dimensions and the images about to be read; raises
            DamagedError if they differ from what was written.
    """

    def __init__(self, path: Path | str, check: Check | None = None) -> None:
        self.path, self.check = path, check

    def __repr__(self) -> str:
        return f"StoredMaps({', '.join(self)})"

    def __getitem__(self, name: str) -> StoredMap:
        names = self._arrays()
        if name not in names:
            raise KeyError(f"map must be one of {', '.join(self) or '(none stored)'}, got {name!r}")
        group, scale = self._group(), name + SCALE
        arrays = [cast("zarr.Array[Any]", group[one]) for one in (name, scale) if one in names]
        return StoredMap(arrays[0], arrays[1] if len(arrays) > 1 else None, self.check)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._arrays() if not name.endswith(SCALE))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _arrays(self) -> list[str]:
        """Names of all arrays, those of scales included."""
        nodes = self._local_nodes(self.path) if isinstance(self.path, Path) else self._remote_nodes(self.path)
        return sorted(
            path.rpartition("/")[0]
            for path, content in nodes
            if json.loads(content).get("node_type") == "array"
        )

    def _local_nodes(self, root: Path) -> Iterator[tuple[str, str | bytes]]:
        for node in root.rglob("zarr.json"):
            yield node.relative_to(root).as_posix(), node.read_text("utf-8")

    def _remote_nodes(self, url: str) -> Iterator[tuple[str, str | bytes]]:
        system, root = place(url)
        for path in system.find(root):
            if path.endswith("/zarr.json"):
                yield path[len(root) :].lstrip("/"), system.cat_file(path)

    def _group(self) -> zarr.Group:
        import zarr

        if isinstance(self.path, Path):
            return zarr.open_group(self.path, mode="r", zarr_format=3)
        from zarr.storage import FsspecStore

        return zarr.open_group(FsspecStore.from_url(self.path, read_only=True), mode="r", zarr_format=3)


@dataclass(frozen=True, eq=False)
class StoredMap:
    """One quantity of all images: (images, attacks, regions, ...), or (images, C, H, W) for pictures of the images.

    Indexing reads only what is asked for; float16 becomes float32, scaled back. Images without the map (those that
    could not be read) are NaN, or 255 in uint8.

    Attributes:
        array: as it is stored.
        scale: factors (images, attacks, regions) of its values, or None.
        check: see `StoredMaps`.
    """

    array: zarr.Array[Any]
    scale: zarr.Array[Any] | None = None
    check: Check | None = None

    def __repr__(self) -> str:
        return f"StoredMap({self.array.path}: {self.dtype}, shape {self.shape}, {self.about.get('title', 'untitled')})"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type on the disk."""
        return np.dtype(self.array.dtype)

    @property
    def about(self) -> dict[str, Any]:
        """Its kind, title, loss and other attributes of the Zarr array."""
        return dict(self.array.attrs)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Index | tuple[Index, ...]) -> NDArray[Any]:
        keys = key if isinstance(key, tuple) else (key,)
        self._check_images(keys)
        try:
            values: NDArray[Any] = np.asarray(self.array[cast("Any", key)])
        except ValueError as error:
            # Zarr reports a failed CRC32C as a ValueError.
            if "checksum" not in str(error):
                raise
            from zarr.storage import LocalStore

            # Some servers of files answer a request for a part with the whole.
            remote = not isinstance(self.array.store, LocalStore)
            why = ", or its server does not send parts of files" if remote else ""
            raise DamagedError(f"the map {self.array.path} is damaged{why}: {error}") from error
        if values.dtype != np.float16:
            return values
        if self.scale is None:
            return values.astype(np.float32)
        if Ellipsis in keys:
            # Written out, so that the first three keys are those of image, attack and region.
            place = keys.index(Ellipsis)
            whole = (slice(None),) * (self.array.ndim - len(keys) + 1)
            keys = (*keys[:place], *whole, *keys[place + 1 :])
        # The scale has only the first three axes (image, attack, region); it broadcasts over those that follow.
        scales: NDArray[np.float32] = np.asarray(self.scale[cast("Any", tuple(keys[:3]))])
        return values.astype(np.float32) * scales.reshape(*scales.shape, *[1] * (values.ndim - scales.ndim))

    def _check_images(self, keys: tuple[Index, ...]) -> None:
        if self.check is None:
            return
        # The numbers of all images, indexed like the map, are the numbers of the images that are read.
        images = np.arange(len(self))
        if keys and keys[0] is not Ellipsis:
            images = np.atleast_1d(images[cast("Any", keys[0])])
        for array in (self.array, self.scale):
            if array is not None:
                self.check(array.path, array.ndim, images)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        del copy
        return np.asarray(self[:], dtype=dtype)


class MapCheck:
    """Compares the files that maps are read from with their digests, each once.

    Maps of unfinished shards have no digests. Maps at a URL are left to the checksums of their chunks.

    Args:
        folder: of the run.
        size: number of images of a shard.
        name: the path or URL that the user gave.
    """

    def __init__(self, folder: Path, size: int, name: str) -> None:
        self.folder, self.size, self.name = folder, size, name
        self.shards = shard_files(folder)
        self.notes: dict[int, Note] = {}
        self.checked: set[tuple[str, int]] = set()

    def __call__(self, array: str, ndim: int, images: NDArray[np.int64]) -> None:
        """Raise DamagedError if one of these images of an array is in a file that differs from what was written."""
        bad = []
        # Consecutive images share a shard, and so one file of every array.
        for number in np.unique(images // self.size).tolist():
            if (array, number) in self.checked or number not in self.shards:
                continue
            note = self._note(number)
            for path in (f"{array}/zarr.json", chunk_path(array, number, ndim)):
                size_and_digest = note.maps.get(path)
                if size_and_digest is None and path.endswith("zarr.json"):
                    continue  # the array holds nothing of this shard
                # A chunk that the note does not mention must not exist.
                expected = None if size_and_digest is None else size_and_digest[1]
                if digest_or_none(self.folder / MAPS / path) != expected:
                    bad.append(f"{MAPS}/{path}")
            self.checked.add((array, number))
        if bad:
            raise damaged(self.name, bad)

    def _note(self, number: int) -> Note:
        if number not in self.notes:
            # The digests of maps are those of the note, so the note must be intact.
            if not is_intact(self.shards[number]):
                raise damaged(self.name, [f"{SHARDS}/{self.shards[number].name}"])
            self.notes[number] = read_note(self.shards[number])
        return self.notes[number]


@dataclass(frozen=True)
class ChunkFiles:
    """The chunks of an array of 8-bit pictures, read straight from its files, about twenty times as fast as by Zarr.

    Zarr takes two milliseconds for a chunk, whatever its size: 100 ms for a page of fifty pictures. A shard is a file
    of compressed chunks, one for each image; its last bytes are an index, (offset, length) of each chunk, and a CRC32C
    of the index (https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed). Every chunk ends in its own
    CRC32C. Arrays that are laid out otherwise, and those at a URL, are left to Zarr.

    Attributes:
        folder: of the files, the folder of the array with the name c.
        images: that a file holds.
        shape: of the chunk of one image, without the axis of images.
        fill: the value where nothing is stored.
    """

    folder: Path
    images: int
    shape: tuple[int, ...]
    fill: int

    @staticmethod
    def of(path: Path | str, array: zarr.Array[Any]) -> ChunkFiles | None:
        """The files of an array below `path`; None if only Zarr can read them."""
        described: Any = array.metadata.to_dict()
        outer, *others = described.get("codecs") or [{}]
        layout = outer.get("configuration") or {}
        codecs, index_codecs = (
            tuple(one["name"] for one in layout.get(name, ())) for name in ("codecs", "index_codecs")
        )
        # Only the layout that `MapWriter` writes.
        regular = (
            array.dtype == np.uint8
            and not others
            and outer.get("name") == "sharding_indexed"
            and layout.get("index_location") == "end"
            and codecs == CODECS
            and index_codecs == ("bytes", "crc32c")
            and tuple(array.chunks) == (1, *array.shape[1:])
            and array.shards is not None
            and tuple(array.shards[1:]) == tuple(array.shape[1:])
        )
        if not isinstance(path, Path) or array.shards is None or not regular:
            return None
        folder = path.joinpath(*array.path.split("/"), "c")
        return ChunkFiles(folder, int(array.shards[0]), tuple(array.shape[1:]), int(described["fill_value"]))

    def read(self, image: int) -> NDArray[np.uint8]:
        """All values of one image.

        Raises:
            DamagedError: if they differ from what was written.
        """
        shard, place = divmod(image, self.images)
        # A shard covers its images as a whole, so only the first number of its name differs.
        file = self.folder.joinpath(str(shard), *["0"] * len(self.shape))
        try:
            with file.open("rb") as opened:
                opened.seek(-(ENTRY.size * self.images + CHECKSUM), 2)
                index = self._checked(opened.read(), file)
                offset, length = ENTRY.unpack_from(index, ENTRY.size * place)
                if (offset, length) == ABSENT:
                    return np.full(self.shape, self.fill, np.uint8)
                opened.seek(offset)
                packed = self._checked(opened.read(length), file)
        except FileNotFoundError:  # Zarr writes no file of nothing but missing values
            return np.full(self.shape, self.fill, np.uint8)
        # The file is too short for its index, or an offset lies beyond any file.
        except (OSError, OverflowError) as error:
            raise DamagedError(f"{file} is damaged: {error}") from error
        from numcodecs import Zstd  # type: ignore[import-untyped]

        try:
            return np.frombuffer(Zstd().decode(packed), np.uint8).reshape(self.shape)
        except (RuntimeError, ValueError) as error:
            raise DamagedError(f"{file} is damaged: {error}") from error

    def _checked(self, content: bytes, file: Path) -> bytes:
        import google_crc32c

        body, checksum = content[:-CHECKSUM], content[-CHECKSUM:]
        if checksum != google_crc32c.value(body).to_bytes(CHECKSUM, "little"):
            raise DamagedError(f"{file} is damaged: its checksum differs")
        return body
