"""Runs that read from and write to URLs equal local ones."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.audit.fixtures import FILES, QUICK, networks, pictures, same_maps, same_records, small_plan
from weakspot._io.urls import PARALLEL_FETCHES, local_copy
from weakspot.audit import StoppedError, audit, open_run, resume
from weakspot.audit.store.records import TIMES, shard_files

__all__ = ["networks", "pictures"]  # fixtures


class Flaky(MemoryFileSystem):  # type: ignore[misc]
    """A store that fails after a number of writes, and a host that stops answering on request."""

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012 - as in the class it is made of
    pseudo_dirs = [""]  # noqa: RUF012
    writes_left = 10**9
    silent = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("flaky://", "memory://")))

    def put_file(self, *arguments: Any, **options: Any) -> None:
        type(self).writes_left -= 1
        if self.writes_left < 0:
            raise RuntimeError("503 Slow Down\nrequest 17")
        super().put_file(*arguments, **options)

    def cat_file(self, *arguments: Any, **options: Any) -> bytes:
        if self.silent:
            raise ConnectionError("no route to host")
        return bytes(super().cat_file(*arguments, **options))


@pytest.fixture(autouse=True)
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Empty stores in memory, and a cache and a scratch folder per test."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    yield
    for system in (MemoryFileSystem, Flaky):
        system.store.clear()
        system.pseudo_dirs[:] = [""]
    Flaky.writes_left, Flaky.silent = 10**9, False


def upload(folder: Path, url: str) -> str:
    system, path = fsspec.core.url_to_fs(url)
    system.put(str(folder), path, recursive=True)
    return url


def listed(url: str) -> list[str]:
    system, path = fsspec.core.url_to_fs(url)
    return sorted({name[len(path) :].strip("/").split("/")[0] for name in system.find(path)})


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_a_remote_run_equals_the_local_one(pictures: Path, tmp_path: Path, protocol: str) -> None:
    (pictures / "dog/notes.txt").write_text("no picture")
    (pictures / "dog/.hidden.png").write_text("hidden")
    expected = audit(small_plan(pictures, **QUICK), tmp_path / "expected")
    base = "memory://bucket" if protocol == "memory" else f"file://{tmp_path}/bucket"
    source = upload(pictures, f"{base}/pictures")
    run = audit(small_plan(source, **QUICK), f"{base}/runs/v7")
    same_records(expected, run)
    same_maps(expected, run)
    assert run.skipped.equals(expected.skipped)
    assert listed(f"{base}/runs/v7") == FILES
    again = open_run(f"{base}/runs/v7")
    assert again.complete
    assert again.sql("select count(*) from records").fetchall() == [(28,)]
    assert again.plan.sources == (source,)
    assert resume(f"{base}/runs/v7").complete
    del run, again
    assert list((tmp_path / "scratch").glob("weakspot-*")) == []
    with pytest.raises(ValueError, match=r"which holds a run already \(run.json;"):
        audit(small_plan(source, **QUICK), f"{base}/runs/v7")


def test_an_audit_resumes_after_any_failed_upload(pictures: Path, tmp_path: Path) -> None:
    expected = audit(small_plan(pictures, **QUICK), tmp_path / "expected")
    url = "flaky://bucket/v7"
    messages: list[str] = []
    begun, uploads = False, 9
    for _ in range(30):
        Flaky.writes_left = uploads
        try:
            run = resume(url) if begun else audit(small_plan(pictures, **QUICK), url)
            break
        except StoppedError as stopped:
            messages.append(str(stopped))
            begun = True
        assert list((tmp_path / "scratch").glob("weakspot-*")) == []
        rows = open_run(url).records
        assert not len(rows) or not rows.duplicated(["image", "attack", "region"]).any()
    assert len(messages) > 1
    assert all(
        "503 Slow Down" in message and f"--resume {url}" in message and "\n" not in message
        for message in messages
    )
    same_records(expected, run)
    same_maps(expected, run)
    assert listed(url) == FILES


def test_another_machine_computes_only_missing_shards(pictures: Path, tmp_path: Path) -> None:
    url = "memory://bucket/v7"

    def stop(progress: Any) -> None:
        if progress.done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(small_plan(pictures, **QUICK), url, watch=stop)
    assert set(shard_files(open_run(url).folder)) == {0, 1}
    seen: list[float] = []
    run = resume(url, watch=lambda progress: seen.append(progress.done))
    assert seen[0] == 8
    same_maps(audit(small_plan(pictures, **QUICK), tmp_path / "expected"), run)


def test_remote_damage_and_changes_are_reported_and_repaired(pictures: Path, tmp_path: Path) -> None:
    source, url = upload(pictures, "memory://bucket/pictures"), "memory://bucket/v7"
    expected = audit(small_plan(source, **QUICK), url)
    files = MemoryFileSystem()

    def change(part: str, make: Any) -> None:
        (name,) = [name for name in files.store if part in name]
        files.pipe_file(name, make(files.store[name].getvalue()))

    change("/shards/0000000-", lambda content: content[:-1] + b"x")
    change("/maps.zarr/adversarial/c/2/", lambda content: content[:-9])
    named = r"Damaged files were found \(shards/0000000-.*maps.zarr/adversarial/c/2/"
    with pytest.warns(UserWarning, match=named):
        run = resume(url)
    same_records(expected, run)
    same_maps(expected, run)
    change("/shards/0000000-", lambda _: b"")
    change("/dog/04.png", lambda content: content + b"more")
    with pytest.warns(UserWarning, match=r"changed after being attacked \(dog/04.png\)"):
        run = resume(url)
    left, right = (run.records.drop(columns=[*TIMES, "content"]) for run in (expected, run))
    assert left.equals(right)
    assert (expected.records["content"] != run.records["content"]).sum() == 2


def test_remote_arrays_are_fetched_once_with_their_labels(networks: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "set.npz",
        images=rng.integers(0, 256, (6, 24, 24, 3), dtype=np.uint8),
        labels=np.arange(6) % 4,
    )
    expected = audit(small_plan(tmp_path / "set.npz", **QUICK), tmp_path / "expected")
    fsspec.filesystem("memory").put_file(str(tmp_path / "set.npz"), "/bucket/set.npz")
    run = audit(small_plan("memory://bucket/set.npz", **QUICK), tmp_path / "found")
    same_records(expected, run)
    same_maps(expected, run)
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 1


def test_threads_that_need_one_remote_array_fetch_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").pipe_file("/bucket/shared.npz", b"content")
    own, fetches = MemoryFileSystem.get_file, []

    def get_file(self: MemoryFileSystem, *arguments: Any) -> None:
        fetches.append(arguments)
        time.sleep(0.2)
        own(self, *arguments)

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    with ThreadPoolExecutor(PARALLEL_FETCHES) as pool:
        (copy,) = set(pool.map(local_copy, ["memory://bucket/shared.npz"] * PARALLEL_FETCHES))
    assert copy.read_bytes() == b"content"
    assert len(fetches) == 1


def test_several_sources_local_and_remote(pictures: Path, tmp_path: Path) -> None:
    shutil.move(pictures / "fish", tmp_path / "moved")
    upload(tmp_path / "moved", "memory://bucket/fish")
    plan = small_plan(pictures, "memory://bucket/fish", labels="predictions", **QUICK)
    assert len(set(audit(plan, tmp_path / "found").records["image"])) == 14


@pytest.mark.slow
def test_vanished_remote_images_are_missing_and_a_silent_host_stops_the_audit(
    pictures: Path, tmp_path: Path
) -> None:
    source = upload(pictures, "flaky://bucket/pictures")

    lost: dict[str, Any] = {}

    def vanish(_: Any) -> None:
        if name := next((name for name in Flaky.store if name.endswith("/fish/02.png")), None):
            lost[name] = Flaky.store.pop(name)

    run = audit(small_plan(source, **QUICK), tmp_path / "found", watch=vanish)
    assert run.info.missing
    assert run.info.missing.names == ("fish/02.png",)
    Flaky.store.update(lost)
    expected = audit(small_plan(source, **QUICK), tmp_path / "expected")
    same_records(expected, resume(tmp_path / "found"))

    def fall_silent(_: Any) -> None:
        Flaky.silent = True

    with pytest.raises(
        StoppedError, match=r"fish/05.png cannot be fetched \(no route|cat/00.png cannot be f"
    ) as raised:
        audit(small_plan(source, **QUICK), tmp_path / "other", watch=fall_silent)
    assert raised.value.resumable
    Flaky.silent = False
    same_records(audit(small_plan(source, **QUICK), tmp_path / "whole"), resume(tmp_path / "other"))


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("warp://bucket/photos", "protocol must be one that fsspec supports.* got warp"),
        ("gdrive://bucket/photos", "gdrive://bucket/photos needs a package for gdrive"),
        ("zip://photos::memory://a.zip", "chains of protocols are not supported"),
        ("memory://nowhere", "memory://nowhere does not exist"),
    ],
)
def test_unreachable_urls_are_refused_in_one_sentence(
    pictures: Path, tmp_path: Path, url: str, sentence: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as raised:
        audit(small_plan(url, **QUICK), tmp_path / "found")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "found").exists()
    with pytest.raises((ValueError, FileNotFoundError)):
        open_run(url)
