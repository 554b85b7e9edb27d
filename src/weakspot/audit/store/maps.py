"""Maps of a run: Zarr v3 arrays (image, attack, region, ...), one chunk per image, packed at a stated loss.

Whole numbers from 0 to 254 (categories, regions) are kept as they are, in uint8. All else is kept in float16, a map
whose largest value lies outside float16's best range being divided by a power of two first, which `<name>.scale` holds:
no value is off by more than 1/2048 of itself or 1/4096 of its map's largest. Pictures are kept in uint8, as PNG files
would: off by at most half of 1/255. The numbers of a series that are drawn over the layers are kept as maps are, in
`<series>/curves/<curve>`.

Every chunk ends in its CRC32C, which any Zarr reader checks; the note of a shard has the digest of every file as well,
which also finds files that are gone or stand in another's place.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weakspot._io.files import synchronize
from weakspot._io.urls import place
from weakspot.audit.store.integrity import DamagedError, file_digest

Check = Callable[[str, int, NDArray[np.int64]], None]
FOLDER = "maps.zarr"
SCALE = ".scale"
MISSING = 255  # in uint8, of images without this map
LARGEST, SMALLEST = 2.0**14, 2.0**-13  # of a map's largest value, for it to need no scale
LOSS = {
    "picture": "rounded to 8 bits: at most 1/510",
    "category": "none",
    "magnitude": "at most 1/2048 of a value or 1/4096 of its map's largest",
}


def curve_name(series: str, curve: str) -> str:
    """Of the array (image, attack, region, layer) that holds the numbers of one curve of a series."""
    return f"{series}/curves/{curve.replace('/', ' ')}"


@dataclass(frozen=True, eq=False)
class MapBlock:
    """One quantity of some consecutive images of a run.

    Attributes:
        values: uint8 or float16, (images, attacks, regions, ...) or, of the images themselves, (images, ...).
        about: what the array says of itself: kind, title and such.
        scale: float32 (images, attacks, regions) that float16 values are to be multiplied by.
    """

    values: NDArray[Any]
    about: Mapping[str, Any]
    scale: NDArray[np.float32] | None = None


@dataclass(eq=False)
class BlockBuilder:
    """Blocks that are filled cell by cell, packed at once so that only the small form is in memory.

    Attributes:
        images: places of the block, also of images without maps.
        attacks: how many.
        regions: how many.
    """

    images: int
    attacks: int
    regions: int
    blocks: dict[str, MapBlock] = field(default_factory=dict)

    def add(
        self, name: str, places: Sequence[int], cell: tuple[int, int], values: Any, about: Mapping[str, Any]
    ) -> None:
        """Maps (n, ...) of the images at these places in one cell; of another shape under a name of its own."""
        values = np.asarray(values)
        kind, name = _kind(name, values, about)
        shape = (self.images, self.attacks, self.regions, *values.shape[1:])
        block = self.blocks.get(name)
        if block is not None and (block.values.shape != shape):
            name = _other(name, shape)
            block = self.blocks.get(name)
        if block is None:
            small = kind in {"category", "picture"}
            empty: NDArray[Any] = (
                np.full(shape, MISSING, np.uint8) if small else np.full(shape, np.nan, np.float16)
            )
            scale = None if small else np.ones(shape[:3], np.float32)
            block = self.blocks[name] = MapBlock(
                empty, {**about, "kind": kind, "loss": LOSS[_loss(kind)]}, scale
            )
        rows = np.asarray(places, dtype=np.int64)
        if block.scale is None:
            block.values[rows, cell[0], cell[1]] = (
                _levels(values) if kind == "picture" else values.astype(np.uint8)
            )
        else:
            packed, scales = _packed(values)
            block.values[rows, cell[0], cell[1]] = packed
            block.scale[rows, cell[0], cell[1]] = scales

    def add_pictures(self, name: str, places: Sequence[int], values: Any, about: Mapping[str, Any]) -> None:
        """Pictures (n, C, H, W) in [0, 1] of the images themselves, whatever the attack."""
        block = np.full((self.images, *values.shape[1:]), MISSING, np.uint8)
        block[np.asarray(places, dtype=np.int64)] = _levels(np.asarray(values))
        self.blocks[name] = MapBlock(block, {**about, "kind": "picture", "loss": LOSS["picture"]})


def _kind(name: str, values: NDArray[Any], about: Mapping[str, Any]) -> tuple[str, str]:
    """How it is stored, and its name: categories that are no such numbers go by another, as an array has one type."""
    kind = str(about.get("kind", "magnitude"))
    if kind == "picture":
        return kind, name
    if values.dtype.kind in "biu" or kind == "category":
        if bool(((values >= 0) & (values < MISSING) & (values == np.floor(values))).all()):
            return "category", name
        return "magnitude", f"{name} unbounded"
    return ("signed" if kind == "signed" else "magnitude"), name


def _other(name: str, shape: Sequence[int]) -> str:
    return f"{name} {'x'.join(map(str, shape[3:]))}"


def _loss(kind: str) -> str:
    return kind if kind in LOSS else "magnitude"


def _levels(values: NDArray[Any]) -> NDArray[np.uint8]:
    return (values.clip(0, 1) * 255).round().astype(np.uint8)


def _packed(values: NDArray[Any]) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """Maps (n, ...) as float16, and the (n,) powers of two they were divided by."""
    flat = values.reshape(len(values), -1).astype(np.float32)
    finite = np.where(np.isfinite(flat), np.abs(flat), 0)
    top = finite.max(1, initial=0)
    fine = (top == 0) | ((top >= SMALLEST) & (top <= LARGEST))
    scales = np.where(fine, 1.0, np.exp2(np.floor(np.log2(np.where(top == 0, 1.0, top))))).astype(np.float32)
    return (flat / scales[:, None]).astype(np.float16).reshape(values.shape), scales


class MapStore:
    """The maps of a run on the disk, written block by block.

    Args:
        folder: of the run.
        images: of the whole run.
        attacks: labels, for who reads the maps.
        regions: likewise.
        shard: images of a block; each block is one file of every array.
    """

    def __init__(
        self, folder: Path, images: int, attacks: Sequence[str], regions: Sequence[str], shard: int
    ) -> None:
        import zarr

        self.images, self.shard = images, shard
        self.path = folder / FOLDER
        about = {"attacks": list(attacks), "regions": list(regions)}
        try:
            self.group = zarr.open_group(self.path, mode="a", zarr_format=3)
            known = dict(self.group.attrs)
        except Exception:  # noqa: BLE001 - damaged in any way; it is made of the plan alone
            known = {}
        if known != about:
            (self.path / "zarr.json").unlink(missing_ok=True)
            self.group = zarr.open_group(self.path, mode="a", zarr_format=3)
            self.group.attrs.update(about)
            synchronize(self.path / "zarr.json")

    def write(self, number: int, blocks: Mapping[str, MapBlock]) -> dict[str, tuple[int, str]]:
        """Write the blocks of one shard; on return they have reached the disk. Written twice, they are the same.

        Returns:
            Path below maps.zarr to size and digest, of every file that the blocks are in.
        """
        paths: list[Path] = []
        for name, block in blocks.items():
            paths += self._write(name, number, block.values, block.about)
            if block.scale is not None and bool((block.scale != 1).any()):
                paths += self._write(name + SCALE, number, block.scale, {"kind": "scale", "of": name})
        return {
            path.relative_to(self.path).as_posix(): (path.stat().st_size, file_digest(path)) for path in paths
        }

    def _write(self, name: str, number: int, values: NDArray[Any], about: Mapping[str, Any]) -> list[Path]:
        """The files that the values are in, and what describes them."""
        known: Any = self.group.get(name)
        if known is not None and tuple(known.shape[1:]) != values.shape[1:]:
            name = _other(name, values.shape)
        array = self._array(name, values, about)
        home = self.path.joinpath(*name.split("/"))
        written = home.joinpath("c", str(number), *["0"] * (values.ndim - 1))
        written.unlink(
            missing_ok=True
        )  # or the last block, which does not fill its file, would be merged with it
        array[number * self.shard : number * self.shard + len(values)] = values
        if not written.exists():  # a block of nothing but missing values is not stored
            return [home / "zarr.json"]
        synchronize(written)
        return [home / "zarr.json", written]

    def _array(self, name: str, values: NDArray[Any], about: Mapping[str, Any]) -> Any:
        from zarr.codecs import Crc32cCodec, ZstdCodec

        if name in self.group:
            return self.group[name]
        axes = ["image", "attack", "region"] if about["kind"] != "picture" or values.ndim > 4 else ["image"]
        first = "layer" if "steps" in about else "channel"
        more = values.ndim - len(axes)
        inner = [first] if "curve" in about else [first, "y", "x"][-more:] if more else []
        # A scale is one unless it says otherwise.
        fill: Any = MISSING if values.dtype == np.uint8 else 1.0 if about["kind"] == "scale" else float("nan")
        array = self.group.create_array(
            name,
            shape=(self.images, *values.shape[1:]),
            chunks=(1, *values.shape[1:]),
            shards=(self.shard, *values.shape[1:]),
            dtype=values.dtype,
            fill_value=fill,
            compressors=[ZstdCodec(level=1), Crc32cCodec()],
            dimension_names=[*axes, *inner] if len(axes) + len(inner) == values.ndim else None,
            attributes=dict(about),
        )
        synchronize(self.path.joinpath(*name.split("/"), "zarr.json"))
        return array


def chunk_path(name: str, number: int, ndim: int) -> str:
    """Below maps.zarr, of the file that holds one shard of an array."""
    return "/".join([name, "c", str(number), *["0"] * (ndim - 1)])


def map_files(folder: Path) -> Iterator[tuple[str, int]]:
    """Every file of the maps of a run that holds values: its path below maps.zarr and the number of its shard."""
    root = folder / FOLDER
    for home in root.rglob("c"):
        for path in home.rglob("*"):
            parts = path.relative_to(home).parts
            if path.is_file() and parts[0].isdigit():
                yield path.relative_to(root).as_posix(), int(parts[0])


def drop_maps(folder: Path, numbers: Collection[int]) -> None:
    """Remove what the maps hold of these shards."""
    for path, number in list(map_files(folder)):
        if number in numbers:
            (folder / FOLDER / path).unlink(missing_ok=True)


def drop_array(folder: Path, description: str) -> None:
    """Remove a whole array, whose zarr.json of that path below maps.zarr is damaged."""
    shutil.rmtree((folder / FOLDER / description).parent, ignore_errors=True)


class Maps(Mapping[str, "StoredMap"]):
    """The maps of a run: name to `StoredMap`, read from the disk, or from a URL, image by image.

    Args:
        path: of maps.zarr.
        check: called with the name of an array, its number of dimensions and the images that are to be read; raises
            DamagedError where they are not what was written.
    """

    def __init__(self, path: Path | str, check: Check | None = None) -> None:
        self.path, self.check = path, check

    def __getitem__(self, name: str) -> StoredMap:
        if name not in self._names():
            raise KeyError(f"{name!r}; the run has the maps {', '.join(self) or 'none'}")
        group = self._group()
        scale = name + SCALE
        return StoredMap(group[name], group[scale] if scale in self._names() else None, self.check)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names() if not name.endswith(SCALE))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _names(self) -> list[str]:
        return sorted(
            name.rpartition("/")[0]
            for name, content in (self._nodes() if isinstance(self.path, Path) else self._nodes_there())
            if json.loads(content).get("node_type") == "array"
        )

    def _nodes(self) -> Iterator[tuple[str, str | bytes]]:
        for node in Path(self.path).rglob("zarr.json"):
            yield node.relative_to(self.path).as_posix(), node.read_text("utf-8")

    def _nodes_there(self) -> Iterator[tuple[str, str | bytes]]:
        system, path = place(str(self.path))
        for found in system.find(path):
            if found.endswith("/zarr.json"):
                yield found[len(path) :].lstrip("/"), system.cat_file(found)

    def _group(self) -> Any:
        import zarr

        if isinstance(self.path, Path):
            return zarr.open_group(self.path, mode="r", zarr_format=3)
        from zarr.storage import FsspecStore

        store = FsspecStore.from_url(self.path, read_only=True)
        return zarr.open_group(store, mode="r", zarr_format=3)


@dataclass(frozen=True, eq=False)
class StoredMap:
    """One quantity of all images: (images, attacks, regions, ...), or (images, C, H, W) of pictures of the images.

    Indexing reads what is asked for and no more; float16 comes back as float32, scaled. Images without the map, those
    that could not be read, are NaN, or 255 in uint8.

    Attributes:
        array: as it is stored.
        scale: what its values are to be multiplied by, or None.
        check: as of `Maps`.
    """

    array: Any
    scale: Any = None
    check: Check | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """As it is stored."""
        dtype: np.dtype[Any] = self.array.dtype
        return dtype

    @property
    def about(self) -> dict[str, Any]:
        """Its kind, title, loss and such."""
        return dict(self.array.attrs)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> NDArray[Any]:
        if self.check is not None:
            first = key[0] if isinstance(key, tuple) and key else key
            images = np.arange(len(self))
            rows = images if first is Ellipsis or first == () else np.atleast_1d(images[first])
            for array in (self.array, *([] if self.scale is None else [self.scale])):
                self.check(array.path, array.ndim, rows)
        try:
            values: NDArray[Any] = np.asarray(self.array[key])
        except ValueError as error:
            if "checksum" not in str(error):
                raise
            raise DamagedError(f"{self.array.store_path} is damaged: {error}") from error
        if values.dtype != np.float16:
            return values
        if self.scale is None:
            return values.astype(np.float32)
        keys = key if isinstance(key, tuple) else (key,)
        if Ellipsis in keys:
            place = keys.index(Ellipsis)
            whole = (slice(None),) * (self.array.ndim - len(keys) + 1)
            keys = (*keys[:place], *whole, *keys[place + 1 :])
        scales: NDArray[np.float32] = np.asarray(self.scale[tuple(keys[:3])])
        spread: NDArray[np.float32] = scales.reshape(*scales.shape, *[1] * (values.ndim - scales.ndim))
        return values.astype(np.float32) * spread

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        del copy
        values: NDArray[Any] = np.asarray(self[:], dtype=dtype)
        return values
