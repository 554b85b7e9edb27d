"""Masks: the numbers that were written are read, or the file is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from tests.dissection.broden_fixture import LAW, label_maps, paint
from weakspot.dissection.broden_files import nearest, read_labels, write_labels


@given(labels=label_maps())
@LAW
def test_label_maps_round_trip(tmp_path: Path, labels: NDArray[np.int64]) -> None:
    assert np.array_equal(read_labels(paint(tmp_path / "mask.png", labels)), labels)
    write_labels(tmp_path / "own.png", labels)
    assert np.array_equal(read_labels(tmp_path / "own.png"), labels)
    Image.fromarray(labels.astype(np.uint16)).save(tmp_path / "deep.png")
    assert np.array_equal(read_labels(tmp_path / "deep.png"), labels)
    Image.fromarray((labels % 256).astype(np.uint8)).save(tmp_path / "gray.png")
    assert np.array_equal(read_labels(tmp_path / "gray.png"), labels % 256)


@given(labels=label_maps(), zoom=st.integers(1, 4), shape=st.tuples(st.integers(1, 20), st.integers(1, 20)))
@LAW
def test_resizing_mixes_no_labels(labels: NDArray[np.int64], zoom: int, shape: tuple[int, int]) -> None:
    resized = nearest(labels, shape)
    assert resized.shape == shape
    assert set(resized.ravel().tolist()) <= set(labels.ravel().tolist())
    larger = labels.repeat(zoom, 0).repeat(zoom, 1)
    assert np.array_equal(nearest(labels, (larger.shape[0], larger.shape[1])), larger)
    assert np.array_equal(nearest(larger, (labels.shape[0], labels.shape[1])), labels)


def test_a_damaged_mask_is_unchanged_or_an_error(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 2000, (6, 5))
    whole = paint(tmp_path / "mask.png", labels).read_bytes()
    refused = 0
    for place in range(len(whole)):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :]):
            (tmp_path / "mask.png").write_bytes(damaged)
            try:
                assert np.array_equal(read_labels(tmp_path / "mask.png"), labels)
            except ValueError as error:
                assert str(error).startswith(f"{tmp_path / 'mask.png'} ")  # noqa: PT017 - either is right
                refused += 1
    assert refused > len(whole)
