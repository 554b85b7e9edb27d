"""Recovery: what is missing, damaged or changed is named, and done again to the same records."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.audit.fixtures import networks, pictures, same_maps, same_records, small_plan
from weakspot.audit import (
    AttackPlan,
    AuditProgress,
    Run,
    audit,
    compare,
    open_run,
    resume,
    summarize,
    write_run_report,
)
from weakspot.audit.store.digests import DamagedError
from weakspot.audit.store.records import shard_files
from weakspot.audit.store.run_info import ImageCounts

__all__ = ["networks", "pictures"]  # fixtures
QUICK: dict[str, Any] = {"attacks": (AttackPlan("pgd", settings=(("steps", 2),)),), "analyses": ()}


def stop_after(images: int) -> Callable[[AuditProgress], None]:
    def watch(standing: AuditProgress) -> None:
        if standing.done > images:
            raise KeyboardInterrupt

    return watch


def cut_off(pictures: Path, name: str = "cut", **changes: object) -> Path:
    """An audit with two of its four shards."""
    with pytest.raises(KeyboardInterrupt):
        audit(small_plan(pictures, **{**QUICK, **changes}), pictures.parent / name, watch=stop_after(8))
    assert set(shard_files(pictures.parent / name)) == {0, 1}
    return pictures.parent / name


@pytest.fixture
def whole(pictures: Path) -> Run:
    """A quick audit that nothing disturbed."""
    return audit(small_plan(pictures, **QUICK), pictures.parent / "whole")


def flip(path: Path, place: int = -1, bit: int = 0) -> None:
    """Change one bit; in the middle of the file if no place is given."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place < 0 else place] ^= 1 << bit
    path.write_bytes(content)


# --- missing images


def test_an_audit_whose_source_is_gone_stays_incomplete_until_it_is_back(whole: Run, pictures: Path) -> None:
    out = cut_off(pictures)
    pictures.rename(pictures.parent / "away")
    for _ in range(2):  # trying again changes nothing
        found = resume(out)
        assert not found.complete
        assert found.info.images == ImageCounts(listed=14, read=8, skipped=0, missing=6)
        assert found.skipped.empty
        assert (
            "6 of 14 images can no longer be read (dog/10.png, dog/13.png, fish/02.png, fish/05.png, fish/08.png, "
            "...; the file no longer exists)"
        ) in found.shortfall
        assert summarize(found).images == 8
    (pictures.parent / "away").rename(pictures)
    found = resume(out)
    assert found.complete
    assert found.shortfall == ""
    assert found.info.missing is None
    same_records(whole, found)
    same_maps(whole, found)


def test_the_images_beside_a_missing_one_are_attacked_and_end_the_same(whole: Run, pictures: Path) -> None:
    lost, out = pictures / "dog/07.png", pictures.parent / "cut"
    shutil.copy(lost, pictures.parent / "07.png")

    def vanish(_: AuditProgress) -> None:
        lost.unlink(missing_ok=True)

    found = audit(small_plan(pictures, **QUICK), out, watch=vanish)
    assert not found.complete
    assert len(set(found.records["image"])) == 13
    assert "1 of 14 images can no longer be read (dog/07.png; " in found.shortfall
    shards = {path.name for path in shard_files(out).values()}
    assert len(shards) == 4
    assert not resume(out).complete
    assert {path.name for path in shard_files(out).values()} == shards  # nothing is done again for nothing
    (pictures.parent / "07.png").rename(lost)
    again = resume(out)
    same_records(whole, again)
    same_maps(whole, again)


def test_a_row_of_an_array_that_is_gone_is_missing(networks: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 24, 24, 3), dtype=np.uint8)
    for name in ("set.npz", "set.npy"):
        np.savez(networks / name, images=images) if name == "set.npz" else np.save(networks / name, images)
        expected = audit(small_plan(networks / name, **QUICK), networks / f"whole-{name}")
        out = cut_off(networks / name, f"cut-{name}")
        (networks / name).rename(networks / "away")
        found = resume(out)
        assert found.info.missing
        assert found.info.missing.images == 2
        np.save(networks / name, images[:9]) if name == "set.npy" else (networks / name).write_bytes(b"PK")
        again = resume(out).info.missing
        assert again
        assert again.images == (1 if name == "set.npy" else 2)
        (networks / "away").replace(networks / name)
        same_records(expected, resume(out))


def test_what_is_no_picture_is_skipped_and_what_could_never_be_read_too(pictures: Path) -> None:
    (pictures / "dog/notes.png").write_text("no picture")
    (pictures / "dog/link.png").symlink_to(pictures / "nowhere.png")
    os.mkfifo(pictures / "dog/pipe.png")
    found = audit(small_plan(pictures, **QUICK), pictures.parent / "other")
    assert found.complete
    assert dict(zip(found.skipped["image"], found.skipped["reason"], strict=True)) == {
        "dog/link.png": "a link to nothing; skipped",
        "dog/notes.png": "not an image in a known format; skipped",
        "dog/pipe.png": "not a regular file; skipped",
    }


def test_a_file_that_a_folder_replaces_or_whose_disk_fails_is_missing(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = cut_off(pictures)
    (pictures / "fish/02.png").unlink()
    (pictures / "fish/02.png").mkdir()
    own = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "05.png":
            raise PermissionError(13, "Permission denied", str(path))
        if path.name == "08.png":
            raise OSError(5, "Input/output error", str(path))
        return own(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        found = resume(out)
    assert found.info.missing
    assert found.info.missing.names == ("fish/02.png", "fish/05.png", "fish/08.png")
    again = resume(out).info.missing
    assert again
    assert again.names == ("fish/02.png",)


# --- damaged files


def test_a_flipped_bit_in_a_shard_is_named_and_the_shard_done_again(whole: Run, pictures: Path) -> None:
    out = cut_off(pictures)
    shard = shard_files(out)[1]
    flip(shard)
    for ask in (lambda run: run.records, summarize, lambda run: run.skipped, lambda run: compare(run, whole)):
        with pytest.raises(
            DamagedError, match=rf"cut is damaged: shards/{shard.name} differs from .* --resume "
        ):
            ask(open_run(out))
    with pytest.raises(DamagedError):
        write_run_report(open_run(out), pictures.parent / "page.html")
    assert not (pictures.parent / "page.html").exists()
    with pytest.warns(
        UserWarning,
        match=rf"Damaged files were found \(shards/{shard.name}\); the results of the 4 images in",
    ):
        found = resume(out)
    same_records(whole, found)
    same_maps(whole, found)
    assert any(shard.name in remark for remark in summarize(found).remarks)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), shard=st.integers(0, 1))
def test_any_flipped_bit_is_seen(one_cut: Path, where: float, bit: int, shard: int) -> None:
    path = shard_files(one_cut)[shard]
    place = int(where * path.stat().st_size)
    flip(path, place, bit)
    try:
        with pytest.raises(DamagedError, match=path.name):
            _ = open_run(one_cut).records
    finally:
        flip(path, place, bit)
    assert len(open_run(one_cut).records) == 16


@pytest.fixture
def one_cut(pictures: Path) -> Path:
    return cut_off(pictures, maps=False)


@pytest.mark.parametrize("crime", ["copied over", "under another number", "beside", "emptied"])
def test_shards_in_other_places_are_seen(whole: Run, pictures: Path, crime: str) -> None:
    out = cut_off(pictures)
    first, second = shard_files(out).values()
    if crime == "copied over":
        shutil.copy(first, second)
    elif crime == "under another number":
        second.unlink()
        shutil.copy(first, first.with_name(first.name.replace("0000000-", "0000001-")))
    elif crime == "beside":
        shutil.copy(first, first.with_name("0000000-0123456789abcdef.parquet"))
    else:
        second.write_bytes(b"")
    with pytest.raises(DamagedError):
        _ = open_run(out).records
    with pytest.warns(UserWarning, match="Damaged files were found"):
        same_records(whole, resume(out))


@pytest.mark.parametrize("crime", ["flip", "cut", "gone", "copied", "metadata", "stray"])
@pytest.mark.parametrize("finished", [False, True])
def test_a_damaged_map_is_named_and_done_again(
    whole: Run, pictures: Path, crime: str, finished: bool
) -> None:
    out = (
        open_run(shutil.copytree(whole.folder, pictures.parent / "cut")).folder
        if finished
        else cut_off(pictures)
    )
    chunk = next((out / "maps.zarr/adversarial/c/1").rglob("0"))
    while chunk.is_dir():
        chunk = next(chunk.iterdir())
    if crime == "flip":
        flip(chunk, 5)
    elif crime == "cut":
        chunk.write_bytes(chunk.read_bytes()[:-9])
    elif crime == "gone":
        chunk.unlink()
    elif crime == "copied":
        other = Path(str(chunk).replace("/c/1/", "/c/0/"))
        shutil.copy(other, chunk)
    elif crime == "metadata":
        description = out / "maps.zarr/adversarial/zarr.json"
        description.write_text(description.read_text().replace('"fill_value": 255', '"fill_value": 254'))
    else:
        stray = out / "maps.zarr/clean/c/1/0/0/1"
        stray.write_bytes(b"x")
    if crime != "stray":
        with pytest.raises(DamagedError, match=r"maps\.zarr/adversarial/"):
            _ = open_run(out).maps["adversarial"][4:6]
        if crime != "metadata":
            _ = open_run(out).maps["adversarial"][0]  # of another file
    with pytest.warns(UserWarning, match=r"Damaged files were found \(maps.zarr/"):
        found = resume(out)
    same_records(whole, found)
    same_maps(whole, found)


def test_chunks_have_checksums_for_any_reader(whole: Run) -> None:
    chunk = whole.folder / "maps.zarr/adversarial/c/0/0/0/0/0/0"
    flip(chunk, 5)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_group(whole.folder / "maps.zarr", mode="r")["adversarial"][0]  # type: ignore[index]


@pytest.mark.parametrize("name", ["records.parquet", "skipped.parquet"])
def test_a_damaged_table_of_a_complete_audit_is_written_again(whole: Run, pictures: Path, name: str) -> None:
    out = open_run(shutil.copytree(whole.folder, pictures.parent / "copy")).folder
    flip(out / name)
    with pytest.raises(DamagedError, match=f"copy is damaged: {name} differs from what was written"):
        summarize(open_run(out))
    with pytest.warns(UserWarning, match=f"damaged files .{name}. are written again"):
        found = resume(out)
    assert found.complete
    same_records(whole, found)
    (out / name).unlink()
    with pytest.raises(DamagedError, match=name):
        _ = open_run(out).records
    with pytest.warns(UserWarning, match=name):
        same_records(whole, resume(out))
    shutil.rmtree(out / "shards")
    assert resume(out).complete  # they are not needed as long as nothing is damaged
    flip(out / name)
    same_records(whole, resume(out))


def test_without_the_list_of_images_nothing_goes_on(whole: Run, pictures: Path) -> None:
    out = cut_off(pictures)
    flip(out / "images.parquet")
    for call in (resume, lambda folder: open_run(folder).records):
        with pytest.raises(DamagedError, match=r"images\.parquet"):
            call(out)


def test_a_complete_audit_that_is_sound_is_left_alone(whole: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*") if path.is_file()}
    assert resume(whole.folder).complete
    assert {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*") if path.is_file()} == before


# --- changed images


def test_images_that_were_changed_are_named_and_attacked_again(pictures: Path) -> None:
    out = cut_off(pictures)
    edited = pictures / "cat/03.png"
    Image.new("RGB", (24, 24), (10, 200, 10)).save(edited)
    with pytest.warns(
        UserWarning, match=r"1 image was changed after being attacked \(cat/03.png\); the earlier"
    ):
        found = resume(out)
    expected = audit(small_plan(pictures, **QUICK), pictures.parent / "expected")
    same_records(expected, found)
    same_maps(expected, found)
    assert found.remarks == (
        "1 image was changed after being attacked (cat/03.png); the earlier results were discarded.",
    )
    assert "cat/03.png" in write_run_report(found, pictures.parent / "page.html").read_text()


def test_an_image_of_the_same_size_and_time_is_another_all_the_same(pictures: Path) -> None:
    path = pictures / "cat/03.bmp"
    Image.new("RGB", (24, 24), (10, 200, 10)).save(path)
    out, about = cut_off(pictures), path.stat()
    flip(path)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (about.st_size, about.st_mtime_ns)
    with pytest.warns(UserWarning, match="cat/03.bmp"):
        found = resume(out)
    same_records(audit(small_plan(pictures, **QUICK), pictures.parent / "expected"), found)


def test_a_changed_row_of_an_array_and_a_repaired_picture_are_seen(networks: Path, pictures: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 24, 24, 3), dtype=np.uint8)
    np.save(networks / "set.npy", images)
    out = cut_off(networks / "set.npy")
    images[2] = 255 - images[2]
    np.save(networks / "set.npy", images)
    with pytest.warns(UserWarning, match=r"set.npy#0000002"):
        found = resume(out)
    same_records(audit(small_plan(networks / "set.npy", **QUICK), networks / "expected"), found)
    good = (pictures / "cat/00.png").read_bytes()
    (pictures / "cat/00.png").write_bytes(good[:40])
    out = cut_off(pictures, "other")
    (pictures / "cat/00.png").write_bytes(good)
    with pytest.warns(UserWarning, match=r"1 image was changed after being attacked \(cat/00.png\)"):
        assert resume(out).skipped.empty


def test_an_audited_image_that_is_gone_needs_no_second_look(whole: Run, pictures: Path) -> None:
    out = cut_off(pictures)
    (pictures / "cat/03.png").unlink()
    found = resume(out)
    assert found.complete
    same_records(whole, found)


def test_a_source_that_was_never_there_keeps_the_audit_from_being_final(pictures: Path) -> None:
    found = audit(small_plan(pictures, pictures.parent / "nowhere", **QUICK), pictures.parent / "out")
    assert "nowhere, which did not exist when it began" in found.shortfall
    assert resume(found.folder).shortfall == found.shortfall
