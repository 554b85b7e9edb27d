"""Maps: stored within the stated loss, read where they were written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest.mock import MagicMock

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from zarr.storage import LocalStore

from weakspot.audit.store.digests import DamagedError
from weakspot.audit.store.maps import GroupMaps, MapBlock, MapWriter, _packed, merge_block
from weakspot.audit.store.stored_maps import StoredMap, StoredMaps

ANY = st.floats(-(2.0**99), 2.0**99, width=32)


@given(arrays(np.float32, (3, 4, 5), elements=ANY))
def test_packing_keeps_the_stated_loss(maps: np.ndarray) -> None:
    packed, scales = _packed(maps)
    back = packed.astype(np.float32) * scales[:, None, None]
    top = np.abs(maps).max((1, 2), keepdims=True)
    assert (np.abs(back - maps) <= np.maximum(np.abs(maps) / 2048, top / 4096)).all()


def test_maps_are_read_where_they_were_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    store = MapWriter(tmp_path, 6, ["pgd", "few_pixel"], ["none"], 4)
    written = {}
    for number, images in ((1, 2), (0, 4)):
        blocks: dict[str, MapBlock] = {}
        tiny, large = rng.normal(size=(2, 5, 7)), rng.integers(0, 4, (1, 5, 7))
        for attack in (1, 0):
            group = GroupMaps(images)
            group.add("tiny", [0], tiny[[attack]] * (1e-9, 1e9)[attack], {"kind": "signed"})
            if attack:
                group.add("cells", [1], large, {"kind": "category", "categories": list("abcd")})
            else:
                group.add("clean", [0, 1], rng.random((2, 3, 5, 7)), {"kind": "picture"})
            for name, block in group.blocks.items():
                merge_block(blocks, name, block, (images, 2, 1), (0, attack, 0))
        store.write(number, blocks)
        store.write(number, blocks)  # a shard that is done again changes nothing
        written[4 * number] = (tiny, large)
    maps = StoredMaps(store.path)
    assert list(maps) == ["cells", "clean", "tiny"]
    assert maps["tiny"].shape == (6, 2, 1, 5, 7)
    assert [str(maps[name].dtype) for name in ("tiny", "cells", "clean")] == ["float16", "uint8", "uint8"]
    assert maps["clean"].shape == (6, 3, 5, 7)
    for place, (tiny, large) in written.items():
        expected = tiny * np.array([1e-9, 1e9])[:, None, None]
        for attack in (0, 1):
            bound = np.abs(expected[attack]).max() / 2048
            for key in (
                (place, attack, 0),
                (place, attack, 0, ...),
                (place, attack, ..., slice(None)),
                (place, attack),
            ):
                np.testing.assert_allclose(maps["tiny"][key].squeeze(), expected[attack], atol=bound, rtol=0)
        np.testing.assert_array_equal(maps["tiny"][place, :, 0, 2], maps["tiny"][:][place, :, 0, 2])
        np.testing.assert_array_equal(maps["cells"][place + 1, 1, 0], large[0])
    assert np.isnan(maps["tiny"][1]).all()
    assert (maps["cells"][0] == 255).all()
    assert maps["cells"].about["categories"] == list("abcd")
    assert maps["cells"].about["loss"] == "none"
    outside = zarr.open_array(store.path / "tiny", mode="r")
    assert outside.metadata.to_dict()["dimension_names"] == ("image", "attack", "region", "y", "x")
    assert outside.chunks == (1, 2, 1, 5, 7)
    with pytest.raises(KeyError, match="map must be one of cells, clean, tiny"):
        maps["cell"]


def test_maps_of_another_size_are_scaled_by_their_own_factors(tmp_path: Path) -> None:
    store = MapWriter(tmp_path, 2, ["pgd"], ["none"], 1)
    written = {"tiny": np.full((1, 4, 4), 1e-9), "tiny 3x5": np.full((1, 3, 5), 7e-9)}
    for number, values in enumerate(written.values()):
        group, blocks = GroupMaps(1), dict[str, MapBlock]()
        group.add("tiny", [0], values, {"kind": "signed"})
        merge_block(blocks, "tiny", group.blocks["tiny"], (1, 1, 1), (0, 0, 0))
        store.write(number, blocks)
    maps = StoredMaps(store.path)
    assert list(maps) == list(written)
    for number, (name, values) in enumerate(written.items()):
        np.testing.assert_allclose(maps[name][number, 0, 0], values[0], rtol=1 / 2048)


@pytest.mark.parametrize("remote", [False, True])
def test_a_server_that_sends_whole_files_is_named_beside_damage(tmp_path: Path, remote: bool) -> None:
    """Asked for a part, such a server sends all of a file, whose checksum is then of other bytes."""

    def part(_: object) -> NoReturn:
        raise ValueError("Stored and computed checksum do not match.")

    store = SimpleNamespace() if remote else LocalStore(tmp_path)
    array: Any = MagicMock(path="clean", store=store, shape=(3, 1, 1, 1))
    array.__getitem__.side_effect = part
    with pytest.raises(DamagedError, match="the map clean is damaged") as raised:
        StoredMap(array)[0]
    assert ("its server does not send parts of files" in str(raised.value)) == remote
