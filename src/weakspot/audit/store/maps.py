"""Maps of a run as they are written: Zarr v3 arrays (image, attack, region, ...), one chunk per image.

Storage is lossy, with a stated bound. Integers from 0 to 254 (categories, regions) are stored exactly, in uint8.
Pictures are stored in uint8 as PNG files would be, off by at most half of 1/255. Everything else is stored in float16;
a map whose largest value lies outside the best range of float16 is first divided by a power of two, which the array
`<name>.scale` holds, so that no value is off by more than 1/2048 of itself or 1/4096 of its map's largest. Numbers of a
series that are drawn over the layers are stored as maps are, in `<series>/curves/<curve>`.

Every chunk ends in its CRC32C, which any Zarr reader checks. The note of a shard also has the digest of every file,
which reveals files that are gone or in another's place.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weakspot._io.files import synchronize
from weakspot.audit.store.digests import digest_or_none, file_digest

MAPS = "maps.zarr"
CLEAN = "clean"  # pictures of the images themselves, the only map without attacks and regions
SCALE = ".scale"
MISSING = 255  # in uint8, for images without this map
# From 2**-13 on, half of float16's smallest step (2**-24) is at most 1/4096 of the largest value. 2**14 is
# well below float16's largest number (65504).
LARGEST, SMALLEST = 2.0**14, 2.0**-13  # range of a map's largest value in which float16 needs no scale
LOSS = {
    "picture": "rounded to 8 bits: at most 1/510",
    "category": "none",
    "magnitude": "at most 1/2048 of a value or 1/4096 of its map's largest",
}
Values = NDArray[Any]  # of any number type
Attributes = Mapping[str, str | Sequence[str]]


def curve_name(series: str, curve: str) -> str:
    """The array (image, attack, region, layer) that holds the numbers of one curve of a series."""
    return f"{series}/curves/{curve.replace('/', ' ')}"


@dataclass(frozen=True, eq=False)
class MapBlock:
    """One quantity of some consecutive images of a run.

    Attributes:
        values: uint8 or float16. Of a group, (images, ...). Of a shard, (images, attacks, regions, ...) or, for the
            clean pictures, (images, ...).
        about: attributes of the array, such as kind and title.
        scale: float32, factors of float16 values: (images,) or (images, attacks, regions).
    """

    values: Values
    about: Attributes
    scale: NDArray[np.float32] | None = None

    @classmethod
    def empty(cls, shape: Sequence[int], cells: int, *, exact: bool, about: Attributes) -> MapBlock:
        """A block of missing values, of integers if `exact`; the scale has its first `cells` axes."""
        if exact:
            return cls(np.full(shape, MISSING, np.uint8), about)
        return cls(np.full(shape, np.nan, np.float16), about, np.ones(shape[:cells], np.float32))


@dataclass(eq=False)
class GroupMaps:
    """The maps of one group, packed as they are added, so that only the small form is in memory.

    Attributes:
        images: number of images of the group, including those without maps.
        blocks: name -> block.
    """

    images: int
    blocks: dict[str, MapBlock] = field(default_factory=dict)

    def add(self, name: str, places: Sequence[int], values: Values, about: Attributes) -> None:
        """Add maps (n, ...) of the images at these places; maps of another shape get their own block."""
        kind, name = _kind(name, values, about)
        shape, exact = (self.images, *values.shape[1:]), kind in {"category", "picture"}
        if name in self.blocks and self.blocks[name].values.shape != shape:
            name = _sized_name(name, shape[1:])
        if name not in self.blocks:
            about = {**about, "kind": kind, "loss": LOSS.get(kind, LOSS["magnitude"])}
            self.blocks[name] = MapBlock.empty(shape, 1, exact=exact, about=about)
        block, at = self.blocks[name], np.asarray(places, np.int64)
        if block.scale is not None:
            block.values[at], block.scale[at] = _packed(values)
        else:
            block.values[at] = _levels(values) if kind == "picture" else values.astype(np.uint8)


def merge_block(
    blocks: dict[str, MapBlock],
    name: str,
    block: MapBlock,
    shape: tuple[int, int, int],
    at: tuple[int, int, int],
) -> None:
    """Copy the block of a group into that of its shard; maps of another shape get a block of their own.

    Args:
        blocks: of the shard.
        name: of the map.
        block: of the group.
        shape: numbers of images, attacks and regions of the shard.
        at: the group's first image, its attack and its region.
    """
    # Pictures of the images themselves have neither attack nor region.
    whole = shape[:1] if name == CLEAN else shape
    full = (*whole, *block.values.shape[1:])
    if name in blocks and blocks[name].values.shape != full:
        name = _sized_name(name, block.values.shape[1:])
    if name not in blocks:
        blocks[name] = MapBlock.empty(full, len(whole), exact=block.scale is None, about=block.about)
    target = blocks[name]
    place: tuple[slice | int, ...] = (slice(at[0], at[0] + len(block.values)), *at[1 : len(whole)])
    target.values[place] = block.values
    if target.scale is not None and block.scale is not None:
        target.scale[place] = block.scale


def _kind(name: str, values: Values, about: Attributes) -> tuple[str, str]:
    """How values are stored, and under which name: an array has one type, so exceptions need a name of their own."""
    kind = str(about.get("kind", "magnitude"))
    if kind == "picture":
        return kind, name
    if values.dtype.kind in "biu" or kind == "category":
        if bool(((values >= 0) & (values < MISSING) & (values == np.floor(values))).all()):
            return "category", name
        # Categories beyond 254 do not fit uint8.
        return "magnitude", f"{name} unbounded"
    return ("signed" if kind == "signed" else "magnitude"), name


def _sized_name(name: str, shape: Sequence[int]) -> str:
    return f"{name} {'x'.join(map(str, shape))}"


def _levels(values: Values) -> NDArray[np.uint8]:
    return (values.clip(0, 1) * 255).round().astype(np.uint8)


def _packed(values: Values) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """Maps (n, ...) as float16, and the (n,) powers of two by which they were divided."""
    flat = values.reshape(len(values), -1).astype(np.float32)
    # NaN and infinity are stored as they are and do not decide the scale.
    top = np.where(np.isfinite(flat), np.abs(flat), 0).max(1, initial=0)
    unscaled = (top == 0) | ((top >= SMALLEST) & (top <= LARGEST))
    # A power of two changes only the exponent: dividing by it loses nothing.
    powers = np.exp2(np.floor(np.log2(np.where(top == 0, 1.0, top))))
    scales = np.where(unscaled, 1.0, powers).astype(np.float32)
    return (flat / scales[:, None]).astype(np.float16).reshape(values.shape), scales


class MapWriter:
    """Writes the maps of a run to the disk, block by block.

    Args:
        folder: of the run.
        images: number of images of the whole run.
        attacks: their labels, as attributes for readers of the maps.
        regions: their texts, as attributes for readers of the maps.
        shard: number of images of a block; each block is one file of every array.
    """

    def __init__(
        self, folder: Path, images: int, attacks: Sequence[str], regions: Sequence[str], shard: int
    ) -> None:
        import zarr

        self.images, self.shard = images, shard
        self.path = folder / MAPS
        about = {"attacks": list(attacks), "regions": list(regions)}
        try:
            self.group = zarr.open_group(self.path, mode="a", zarr_format=3)
            intact = dict(self.group.attrs) == about
        except Exception:  # noqa: BLE001 - damaged in some way; it follows from the plan alone
            intact = False
        if not intact:
            # Only the group's own description is replaced; arrays have theirs.
            (self.path / "zarr.json").unlink(missing_ok=True)
            self.group = zarr.open_group(self.path, mode="a", zarr_format=3)
            self.group.attrs.update(about)
            synchronize(self.path / "zarr.json")

    def write(self, number: int, blocks: Mapping[str, MapBlock]) -> dict[str, tuple[int, str]]:
        """Write the blocks of one shard; on return they have reached the disk. Writing twice gives the same files.

        Returns:
            Path below maps.zarr -> size and digest, for every file that the blocks are in.
        """
        paths: list[Path] = []
        for block_name, block in blocks.items():
            name = self._array_name(block_name, block.values)
            paths += self._write(name, number, block.values, block.about)
            # Most maps need no scale, and an array of ones would only cost files.
            if block.scale is not None and bool((block.scale != 1).any()):
                paths += self._write(name + SCALE, number, block.scale, {"kind": "scale", "of": name})
        return {
            path.relative_to(self.path).as_posix(): (path.stat().st_size, file_digest(path)) for path in paths
        }

    def _array_name(self, name: str, values: Values) -> str:
        """Maps of another size than those of earlier shards get an array of their own."""
        stored: Any = self.group.get(name)
        if stored is None or tuple(stored.shape[1:]) == values.shape[1:]:
            return name
        # Pictures of the images themselves have neither attack nor region.
        return _sized_name(name, values.shape[1 if name == CLEAN else 3 :])

    def _write(self, name: str, number: int, values: Values, about: Attributes) -> list[Path]:
        """Write the values; returns their file and the description of the array."""
        if name in self.group:
            array: Any = self.group[name]
        else:
            array = self._create(name, values, about)
        home = self.path.joinpath(*name.split("/"))
        chunk = self.path / chunk_path(name, number, values.ndim)
        # Zarr would merge the last block, which does not fill its file, with an existing file.
        chunk.unlink(missing_ok=True)
        array[number * self.shard : number * self.shard + len(values)] = values
        if not chunk.exists():  # Zarr stores no block of nothing but missing values
            return [home / "zarr.json"]
        # Zarr does not wait for the disk, but the shard's Parquet file will say that its maps exist.
        synchronize(chunk)
        return [home / "zarr.json", chunk]

    def _create(self, name: str, values: Values, about: Attributes) -> Any:
        from zarr.codecs import Crc32cCodec, ZstdCodec

        # Pictures of the images themselves have the axes image, channel, y, x.
        axes = ["image"] if name == CLEAN else ["image", "attack", "region"]
        first = "layer" if "steps" in about else "channel"
        more = values.ndim - len(axes)
        inner = [first] if "curve" in about else [first, "y", "x"][-more:] if more else []
        missing = MISSING if values.dtype == np.uint8 else float("nan")
        # A chunk is one image, because maps are read image by image; a file is one shard, because shards are
        # written and repaired one by one. The missing value of a scale is 1: values are then as they are.
        array = self.group.create_array(
            name,
            shape=(self.images, *values.shape[1:]),
            chunks=(1, *values.shape[1:]),
            shards=(self.shard, *values.shape[1:]),
            dtype=values.dtype,
            fill_value=1.0 if about["kind"] == "scale" else missing,
            compressors=[ZstdCodec(level=1), Crc32cCodec()],
            dimension_names=[*axes, *inner] if len(axes) + len(inner) == values.ndim else None,
            attributes=dict(about),
        )
        synchronize(self.path.joinpath(*name.split("/"), "zarr.json"))
        return array


def chunk_path(name: str, number: int, ndim: int) -> str:
    """Path below maps.zarr of the file that holds one shard of an array."""
    return "/".join([name, "c", str(number), *["0"] * (ndim - 1)])


def map_files(folder: Path) -> Iterator[tuple[str, int]]:
    """Every file that holds map values of a run: its path below maps.zarr and the number of its shard."""
    root = folder / MAPS
    for home in root.rglob("c"):
        for path in home.rglob("*"):
            # Names below c/ are numbers along each axis, that of the images first.
            number = path.relative_to(home).parts[0]
            if path.is_file() and number.isdigit():
                yield path.relative_to(root).as_posix(), int(number)


def drop_maps(folder: Path, numbers: Collection[int]) -> None:
    """Remove the map values of these shards."""
    for path, number in list(map_files(folder)):
        if number in numbers:
            (folder / MAPS / path).unlink(missing_ok=True)


def drop_array(folder: Path, description: str) -> None:
    """Remove a whole array whose zarr.json, at that path below maps.zarr, is damaged."""
    shutil.rmtree((folder / MAPS / description).parent, ignore_errors=True)


def damaged_maps(
    folder: Path, files: Mapping[str, tuple[int, str]], sizes: Mapping[str, int] | None = None
) -> list[str]:
    """Paths below maps.zarr of a shard's files that are gone or differ from what was written.

    Args:
        folder: of the run.
        files: of the shard, with their sizes and digests, as its note has them.
        sizes: of the files at a URL; if given, only sizes are compared.
    """
    if sizes is not None:
        return [path for path, (size, _) in files.items() if sizes.get(path) != size]
    return [path for path, (_, digest) in files.items() if digest_or_none(folder / MAPS / path) != digest]
