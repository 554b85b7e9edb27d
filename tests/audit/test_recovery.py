"""Recovery: missing, damaged and changed files are reported, and repaired to the same records."""

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

from tests.audit.fixtures import (
    QUICK,
    audit_pictures,
    networks,
    pictures,
    same_maps,
    same_records,
    small_plan,
)
from weakspot.audit import (
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


def stop_after(images: int) -> Callable[[AuditProgress], None]:
    def watch(progress: AuditProgress) -> None:
        if progress.done > images:
            raise KeyboardInterrupt

    return watch


def interrupted(pictures: Path, name: str = "cut", **changes: object) -> Path:
    """An audit interrupted after two of its four shards."""
    with pytest.raises(KeyboardInterrupt):
        audit(small_plan(pictures, **{**QUICK, **changes}), pictures.parent / name, watch=stop_after(8))
    assert set(shard_files(pictures.parent / name)) == {0, 1}
    return pictures.parent / name


@pytest.fixture(scope="module")
def complete_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a quick audit of all pictures."""
    return audit_pictures(tmp_path_factory.mktemp("complete"), **QUICK)


@pytest.fixture
def whole(complete_folder: Path, pictures: Path) -> Run:
    """A copy of that audit."""
    return open_run(shutil.copytree(complete_folder, pictures.parent / "whole"))


def flip(path: Path, place: int = -1, bit: int = 0) -> None:
    """Change one bit; in the middle of the file if no place is given."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place < 0 else place] ^= 1 << bit
    path.write_bytes(content)


# --- missing images


def test_an_audit_stays_incomplete_until_its_source_is_back(whole: Run, pictures: Path) -> None:
    out = interrupted(pictures)
    pictures.rename(pictures.parent / "away")
    for _ in range(2):  # trying again changes nothing
        run = resume(out)
        assert not run.complete
        assert run.info.images == ImageCounts(listed=14, read=8, skipped=0, missing=6)
        assert run.skipped.empty
        assert (
            "6 of 14 images can no longer be read (dog/10.png, dog/13.png, fish/02.png, fish/05.png, fish/08.png, "
            "...; the file no longer exists)"
        ) in run.shortfall
        assert summarize(run).images == 8
    (pictures.parent / "away").rename(pictures)
    run = resume(out)
    assert run.complete
    assert run.shortfall == ""
    assert run.info.missing is None
    same_records(whole, run)
    same_maps(whole, run)


def test_a_missing_image_does_not_affect_its_shard(whole: Run, pictures: Path) -> None:
    lost, out = pictures / "dog/07.png", pictures.parent / "cut"
    shutil.copy(lost, pictures.parent / "07.png")

    def vanish(_: AuditProgress) -> None:
        lost.unlink(missing_ok=True)

    run = audit(small_plan(pictures, **QUICK), out, watch=vanish)
    assert not run.complete
    assert len(set(run.records["image"])) == 13
    assert "1 of 14 images can no longer be read (dog/07.png; " in run.shortfall
    shards = {path.name for path in shard_files(out).values()}
    assert len(shards) == 4
    assert not resume(out).complete
    assert {path.name for path in shard_files(out).values()} == shards  # nothing is computed again
    (pictures.parent / "07.png").rename(lost)
    again = resume(out)
    same_records(whole, again)
    same_maps(whole, again)


@pytest.mark.slow
def test_rows_of_a_missing_array_are_missing(networks: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 24, 24, 3), dtype=np.uint8)
    for name in ("set.npz", "set.npy"):
        np.savez(networks / name, images=images) if name == "set.npz" else np.save(networks / name, images)
        expected = audit(small_plan(networks / name, **QUICK), networks / f"whole-{name}")
        out = interrupted(networks / name, f"cut-{name}")
        (networks / name).rename(networks / "away")
        run = resume(out)
        assert run.info.missing
        assert run.info.missing.images == 2
        np.save(networks / name, images[:9]) if name == "set.npy" else (networks / name).write_bytes(b"PK")
        again = resume(out).info.missing
        assert again
        assert again.images == (1 if name == "set.npy" else 2)
        (networks / "away").replace(networks / name)
        same_records(expected, resume(out))


def test_files_that_are_no_pictures_are_skipped(pictures: Path) -> None:
    (pictures / "dog/notes.png").write_text("no picture")
    (pictures / "dog/link.png").symlink_to(pictures / "nowhere.png")
    os.mkfifo(pictures / "dog/pipe.png")
    run = audit(small_plan(pictures, **QUICK), pictures.parent / "other")
    assert run.complete
    assert dict(zip(run.skipped["image"], run.skipped["reason"], strict=True)) == {
        "dog/link.png": "a link to nothing; skipped",
        "dog/notes.png": "not an image in a known format; skipped",
        "dog/pipe.png": "not a regular file; skipped",
    }


def test_replaced_and_failing_files_are_missing(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = interrupted(pictures)
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
        run = resume(out)
    assert run.info.missing
    assert run.info.missing.names == ("fish/02.png", "fish/05.png", "fish/08.png")
    again = resume(out).info.missing
    assert again
    assert again.names == ("fish/02.png",)


# --- damaged files


def test_a_flipped_bit_in_a_shard_is_reported_and_repaired(whole: Run, pictures: Path) -> None:
    out = interrupted(pictures)
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
        run = resume(out)
    same_records(whole, run)
    same_maps(whole, run)
    assert any(shard.name in remark for remark in summarize(run).remarks)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), shard=st.integers(0, 1))
def test_any_flipped_bit_is_detected(interrupted_once: Path, where: float, bit: int, shard: int) -> None:
    path = shard_files(interrupted_once)[shard]
    place = int(where * path.stat().st_size)
    flip(path, place, bit)
    try:
        with pytest.raises(DamagedError, match=path.name):
            _ = open_run(interrupted_once).records
    finally:
        flip(path, place, bit)
    assert len(open_run(interrupted_once).records) == 16


@pytest.fixture
def interrupted_once(pictures: Path) -> Path:
    return interrupted(pictures, maps=False)


@pytest.mark.parametrize("damage", ["copied over", "under another number", "beside", "emptied"])
def test_misplaced_shards_are_detected_and_repaired(whole: Run, pictures: Path, damage: str) -> None:
    out = interrupted(pictures)
    first, second = shard_files(out).values()
    if damage == "copied over":
        shutil.copy(first, second)
    elif damage == "under another number":
        second.unlink()
        shutil.copy(first, first.with_name(first.name.replace("0000000-", "0000001-")))
    elif damage == "beside":
        shutil.copy(first, first.with_name("0000000-0123456789abcdef.parquet"))
    else:
        second.write_bytes(b"")
    with pytest.raises(DamagedError):
        _ = open_run(out).records
    with pytest.warns(UserWarning, match="Damaged files were found"):
        same_records(whole, resume(out))


@pytest.mark.parametrize(
    ("damage", "finished"),
    [
        ("flip", False),
        ("flip", True),
        ("cut", False),
        ("gone", True),
        ("copied", False),
        ("metadata", True),
        ("stray", False),
    ],
)
def test_a_damaged_map_is_reported_and_repaired(
    whole: Run, pictures: Path, damage: str, finished: bool
) -> None:
    out = (
        open_run(shutil.copytree(whole.folder, pictures.parent / "cut")).folder
        if finished
        else interrupted(pictures)
    )
    chunk = next((out / "maps.zarr/adversarial/c/1").rglob("0"))
    while chunk.is_dir():
        chunk = next(chunk.iterdir())
    if damage == "flip":
        flip(chunk, 5)
    elif damage == "cut":
        chunk.write_bytes(chunk.read_bytes()[:-9])
    elif damage == "gone":
        chunk.unlink()
    elif damage == "copied":
        other = Path(str(chunk).replace("/c/1/", "/c/0/"))
        shutil.copy(other, chunk)
    elif damage == "metadata":
        description = out / "maps.zarr/adversarial/zarr.json"
        description.write_text(description.read_text().replace('"fill_value": 255', '"fill_value": 254'))
    else:
        stray = out / "maps.zarr/clean/c/1/0/0/1"
        stray.write_bytes(b"x")
    if damage != "stray":
        with pytest.raises(DamagedError, match=r"maps\.zarr/adversarial/"):
            _ = open_run(out).maps["adversarial"][4:6]
        if damage != "metadata":
            _ = open_run(out).maps["adversarial"][0]  # in another, intact file
    with pytest.warns(UserWarning, match=r"Damaged files were found \(maps.zarr/"):
        run = resume(out)
    same_records(whole, run)
    same_maps(whole, run)


def test_chunks_have_checksums_for_any_reader(whole: Run) -> None:
    chunk = whole.folder / "maps.zarr/adversarial/c/0/0/0/0/0/0"
    flip(chunk, 5)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_group(whole.folder / "maps.zarr", mode="r")["adversarial"][0]  # type: ignore[index]


@pytest.mark.parametrize("name", ["records.parquet", "skipped.parquet"])
def test_a_damaged_table_is_written_again_from_the_shards(whole: Run, pictures: Path, name: str) -> None:
    out = open_run(shutil.copytree(whole.folder, pictures.parent / "copy")).folder
    flip(out / name)
    with pytest.raises(DamagedError, match=f"copy is damaged: {name} differs from what was written"):
        summarize(open_run(out))
    with pytest.warns(UserWarning, match=f"damaged files .{name}. are written again"):
        run = resume(out)
    assert run.complete
    same_records(whole, run)
    (out / name).unlink()
    with pytest.raises(DamagedError, match=name):
        _ = open_run(out).records
    with pytest.warns(UserWarning, match=name):
        same_records(whole, resume(out))
    shutil.rmtree(out / "shards")
    assert resume(out).complete  # shards are needed only to repair
    flip(out / name)
    same_records(whole, resume(out))


def test_a_damaged_list_of_images_cannot_be_repaired(whole: Run, pictures: Path) -> None:
    out = interrupted(pictures)
    flip(out / "images.parquet")
    for call in (resume, lambda folder: open_run(folder).records):
        with pytest.raises(DamagedError, match=r"images\.parquet"):
            call(out)


def test_resuming_an_intact_complete_audit_writes_nothing(whole: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*") if path.is_file()}
    assert resume(whole.folder).complete
    assert {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*") if path.is_file()} == before


# --- changed images


@pytest.mark.slow
def test_changed_images_are_reported_and_attacked_again(pictures: Path) -> None:
    out = interrupted(pictures)
    edited = pictures / "cat/03.png"
    Image.new("RGB", (24, 24), (10, 200, 10)).save(edited)
    with pytest.warns(
        UserWarning, match=r"1 image was changed after being attacked \(cat/03.png\); the earlier"
    ):
        run = resume(out)
    expected = audit(small_plan(pictures, **QUICK), pictures.parent / "expected")
    same_records(expected, run)
    same_maps(expected, run)
    assert run.remarks == (
        "1 image was changed after being attacked (cat/03.png); the earlier results were discarded.",
    )
    assert "cat/03.png" in write_run_report(run, pictures.parent / "page.html").read_text()


def test_changes_that_keep_size_and_time_are_detected(pictures: Path) -> None:
    path = pictures / "cat/03.bmp"
    Image.new("RGB", (24, 24), (10, 200, 10)).save(path)
    out, about = interrupted(pictures), path.stat()
    flip(path)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (about.st_size, about.st_mtime_ns)
    with pytest.warns(UserWarning, match="cat/03.bmp"):
        run = resume(out)
    same_records(audit(small_plan(pictures, **QUICK), pictures.parent / "expected"), run)


@pytest.mark.slow
def test_changed_rows_of_arrays_and_repaired_pictures_are_detected(networks: Path, pictures: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 24, 24, 3), dtype=np.uint8)
    np.save(networks / "set.npy", images)
    out = interrupted(networks / "set.npy")
    images[2] = 255 - images[2]
    np.save(networks / "set.npy", images)
    with pytest.warns(UserWarning, match=r"set.npy#0000002"):
        run = resume(out)
    same_records(audit(small_plan(networks / "set.npy", **QUICK), networks / "expected"), run)
    good = (pictures / "cat/00.png").read_bytes()
    (pictures / "cat/00.png").write_bytes(good[:40])
    out = interrupted(pictures, "other")
    (pictures / "cat/00.png").write_bytes(good)
    with pytest.warns(UserWarning, match=r"1 image was changed after being attacked \(cat/00.png\)"):
        assert resume(out).skipped.empty


def test_an_image_deleted_after_its_attack_is_not_missed(whole: Run, pictures: Path) -> None:
    out = interrupted(pictures)
    (pictures / "cat/03.png").unlink()
    run = resume(out)
    assert run.complete
    same_records(whole, run)


def test_an_absent_source_is_a_shortfall(pictures: Path) -> None:
    run = audit(small_plan(pictures, pictures.parent / "nowhere", **QUICK), pictures.parent / "out")
    assert "nowhere, which did not exist when it began" in run.shortfall
    assert resume(run.folder).shortfall == run.shortfall
