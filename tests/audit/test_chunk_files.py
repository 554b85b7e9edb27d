"""Pictures read straight from the files of a run: what Zarr reads, and damage is noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr

from weakspot.audit.store.digests import DamagedError
from weakspot.audit.store.maps import MapBlock, MapWriter
from weakspot.audit.store.stored_maps import ChunkFiles, StoredMaps

IMAGES, SHARD = 10, 4
ABOUT = {"kind": "picture", "title": "picture"}


@pytest.fixture
def maps(tmp_path: Path) -> StoredMaps:
    """Ten images, of which the last shard and one image of the first are missing."""
    writer = MapWriter(tmp_path, IMAGES, ["pgd", "fgsm"], ("none", "cam", "border"), SHARD)
    rng = np.random.default_rng(0)
    for number in range(2):
        clean = rng.integers(0, 200, (SHARD, 3, 9, 7), dtype=np.uint8)
        changed = rng.integers(0, 200, (SHARD, 2, 3, 3, 9, 7), dtype=np.uint8)
        if number == 0:
            clean[2] = changed[2] = 255
        writer.write(number, {"clean": MapBlock(clean, ABOUT), "adversarial": MapBlock(changed, ABOUT)})
    return StoredMaps(tmp_path / "maps.zarr")


def files_of(maps: StoredMaps, name: str) -> ChunkFiles:
    files = ChunkFiles.of(maps.path, maps[name].array)
    assert files is not None
    return files


@pytest.mark.parametrize("name", ["clean", "adversarial"])
def test_every_image_is_what_zarr_reads(maps: StoredMaps, name: str) -> None:
    files = files_of(maps, name)
    for image in range(IMAGES):
        np.testing.assert_array_equal(files.read(image), maps[name][image])
    assert (files.read(2) == 255).all()
    assert (files.read(9) == 255).all()


def test_every_damaged_byte_is_noticed_or_is_of_another_image(maps: StoredMaps) -> None:
    files = files_of(maps, "clean")
    (file,) = (files.folder / "1").rglob("0/0/0")
    whole = file.read_bytes()
    expected = [files.read(image).copy() for image in range(4, 8)]
    noticed = 0
    for place in range(0, len(whole), 5):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        for image in range(4, 8):
            try:
                np.testing.assert_array_equal(files.read(image), expected[image - 4])
            except DamagedError:
                noticed += 1
    assert noticed >= len(whole) // 5
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(DamagedError, match="is damaged"):
            files.read(4)


def test_other_layouts_are_left_to_zarr(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "maps.zarr", zarr_format=3)
    plain = group.create_array("plain", shape=(4, 3, 5), chunks=(1, 3, 5), dtype="uint8")
    floats = group.create_array(
        "floats", shape=(4, 3, 5), chunks=(1, 3, 5), shards=(4, 3, 5), dtype="float32"
    )
    assert ChunkFiles.of(tmp_path / "maps.zarr", plain) is None
    assert ChunkFiles.of(tmp_path / "maps.zarr", floats) is None
    assert ChunkFiles.of("memory://maps.zarr", plain) is None
