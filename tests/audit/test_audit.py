"""Audits: interruptions and faults change no record, and every fault is reported."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from PIL import Image

import weakspot
from tests.audit.fixtures import (
    FILES,
    audit_pictures,
    networks,
    pictures,
    same_maps,
    same_records,
    small_plan,
)
from weakspot import explain, regions
from weakspot._checks import ModelWarning
from weakspot._io import files
from weakspot.attacks import pgd
from weakspot.audit import AttackPlan, AuditProgress, Run, StoppedError, audit, open_run, resume, summarize
from weakspot.audit.execution.preparation import load_planned
from weakspot.audit.store.run_info import ImageCounts, MissingImages
from weakspot.images import open_pictures

__all__ = ["networks", "pictures"]  # fixtures


@pytest.fixture(scope="module")
def complete_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an audit of all pictures."""
    return audit_pictures(tmp_path_factory.mktemp("complete"))


@pytest.fixture
def whole(complete_folder: Path, pictures: Path) -> Run:
    """A copy of that audit."""
    return open_run(shutil.copytree(complete_folder, pictures.parent / "whole"))


def test_records_have_one_row_per_image_attack_and_region(whole: Run, pictures: Path) -> None:
    assert sorted(path.name for path in whole.folder.iterdir()) == FILES
    records = whole.records
    assert len(records) == 14 * 2 * 2
    assert not records.duplicated(["image", "attack", "region"]).any()
    assert records["image"].is_monotonic_increasing
    assert set(records["label_name"]) == {"cat", "dog", "fish"}
    assert set(records["label_from"]) == {"folder"}
    confined = records[(records["attack"] == "pgd") & (records["region"] == "cam")]
    assert (confined["pixels"] <= round(0.3 * 24 * 24)).all()
    np.testing.assert_allclose(confined["region_fraction"], 0.3, atol=1e-3)
    assert (records["adversarial_class"] == records["label"]).equals(~records["success_8bit"])
    assert whole.complete
    assert repr(whole).endswith("complete, Tiny, 14 images, 2 attacks, 2 regions)")
    assert whole.info.images == ImageCounts(listed=14, read=14, skipped=0)
    assert whole.info.host["cpus"] == os.cpu_count()
    assert replace(whole.plan, sources=(str(pictures),)) == small_plan(pictures).resolved()


def test_records_and_maps_equal_direct_calls(whole: Run, pictures: Path) -> None:
    model = load_planned(whole.plan.model)
    run = [picture for picture in open_pictures(pictures, size=(24, 24)) if picture.pixels is not None]
    images = torch.stack([picture.pixels for picture in run if picture.pixels is not None])
    records = whole.records[(whole.records["attack"] == "pgd") & (whole.records["region"] == "cam")]
    labels = torch.tensor(records["label"].to_numpy(dtype=np.int64))
    assert records["image"].tolist() == [picture.name for picture in run]
    region = regions.cam(model, images, labels, fraction=0.3)
    pairs = pgd(model, images, labels, region=region, steps=3)
    bare = explain(model, pairs, analyses=["overlap"])
    table = pairs.table
    assert records["success_8bit"].tolist() == table["success_8bit"].tolist()
    assert records["n_forward"].tolist() == table["n_forward"].tolist()
    for name, values in (("l2", table["l2"]), ("effect_in_roi", bare.scores["effect_in_roi"])):
        np.testing.assert_allclose(records[name].to_numpy(dtype=float), values, rtol=1e-3, atol=1e-4)
    stored = whole.maps["importance"][:, 0, 1]
    loss = np.abs(stored).max() / 2000
    np.testing.assert_allclose(stored, bare.maps["importance"][:, 0], atol=loss + 1e-5, rtol=0)
    np.testing.assert_array_equal(whole.maps["clean"][:], (images * 255).round().byte().numpy())
    np.testing.assert_allclose(whole.maps["adversarial"][:, 0, 1] / 255, pairs.adversarial, atol=0.51 / 255)


@pytest.mark.slow
def test_order_and_repetition_of_images_change_no_bit(pictures: Path) -> None:
    files = list(pictures.rglob("*.png"))
    random.Random(7).shuffle(files)  # noqa: S311 - no secret
    plan = small_plan(pictures, pictures.parent / "pictures/", labels="predictions")
    sorted_ = audit(plan, pictures.parent / "other")
    shuffled = audit(small_plan(*files, labels="predictions"), pictures.parent / "again")
    same_records(sorted_, shuffled)
    same_maps(sorted_, shuffled)


def test_curves_over_layers_are_independent_of_batch_and_shard(networks: Path, pictures: Path) -> None:
    plan = small_plan(pictures, analyses=("propagation",))
    run = audit(plan, networks / "found")
    curves = {name: stored for name, stored in run.maps.items() if "curve" in stored.about}
    assert set(curves) == {
        f"propagation/curves/{name}"
        for name in ("reach", "reach, random edit", "spread", "spread, random edit")
    }
    spread = curves["propagation/curves/spread"]
    assert spread.about["steps"] == ["body.1", "body"]
    assert spread.shape == (14, 2, 2, 2)
    assert spread.array.metadata.to_dict()["dimension_names"] == ("image", "attack", "region", "layer")
    np.testing.assert_allclose(
        spread[..., -1].reshape(-1),
        run.records["last_spread"].to_numpy(dtype=float),
        rtol=1 / 2048,
        atol=1e-6,
    )
    same_maps(run, audit(replace(plan, shard=5), networks / "other"))


def test_too_little_memory_gives_smaller_batches_and_the_same_records(pictures: Path) -> None:
    plan = small_plan(pictures, analyses=())
    expected = audit(plan, pictures.parent / "expected")
    hungry = replace(plan, model=replace(plan.model, spec="audited_networks:hungry"))
    same_records(expected, audit(hungry, pictures.parent / "a"))
    larger = replace(hungry, group=16, shard=16)
    with pytest.warns(
        RuntimeWarning, match="memory does not hold 16 images at once; from now on 8 at a time"
    ):
        run = audit(larger, pictures.parent / "b")
    assert run.records["success_8bit"].tolist() == expected.records["success_8bit"].tolist()


@pytest.mark.slow
def test_a_full_disk_at_any_moment_only_costs_time(
    whole: Run, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = pictures.parent / "other"
    own, calls, stops = files.synchronize, [0], [0]

    def full(path: Path) -> None:
        calls[0] += 1
        if calls[0] % 9 == 0:
            stops[0] += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        own(path)

    for module in ("_io.files", "audit.store.maps"):
        monkeypatch.setattr(f"weakspot.{module}.synchronize", full)
    messages: list[str] = []
    repeated = 0
    go: Callable[[], Run] = lambda: audit(small_plan(pictures), out)  # noqa: E731
    for _ in range(60):
        try:
            run = go()
            break
        except StoppedError as stopped:
            messages.append(str(stopped))
            rows = open_run(out).records
            repeated += int(rows.duplicated(["image", "attack", "region"]).sum()) if len(rows) else 0
            if stopped.resumable:
                go = lambda: resume(out)  # noqa: E731
    assert repeated == 0
    assert all("No space left on device" in sentence and "\n" not in sentence for sentence in messages)
    assert stops[0] > 5
    same_records(whole, run)
    same_maps(whole, run)
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert not list(out.rglob("*.partial"))


CHILD = """
import sys, torch
torch.set_num_threads(1)
from weakspot.audit import resume
print("ready", flush=True)
sys.stdin.readline()
resume(sys.argv[1])
"""


def kill_after(out: Path, seconds: float) -> bool:
    """Resume in another process and kill it after so many seconds; returns whether it was still running."""
    source = str(Path(weakspot.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, str(out.parent)])}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == "ready\n"
    child.stdin.write("\n")
    child.stdin.flush()
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
        child.wait()
        return True
    assert child.returncode == 0
    return False


@pytest.mark.kill
@pytest.mark.parametrize("shard", [4, 16])
def test_an_audit_killed_at_random_moments_ends_with_the_same_records(
    whole: Run, pictures: Path, shard: int
) -> None:
    out = pictures.parent / "other"

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(small_plan(pictures, shard=shard), out, watch=stop)
    assert not open_run(out).complete
    assert whole.info.seconds is not None
    rng = random.Random(2)  # noqa: S311 - no secret
    for _ in range(3):
        if not kill_after(out, rng.uniform(0, whole.info.seconds / 2)):
            break
        assert not open_run(out).records.duplicated(["image", "attack", "region"]).any()
    run = resume(out)
    same_records(whole, run)
    same_maps(whole, run)
    assert sorted(path.name for path in out.iterdir()) == FILES


def test_resuming_computes_only_missing_shards(pictures: Path) -> None:
    out = pictures.parent / "other"

    def stop(progress: AuditProgress) -> None:
        if progress.done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(small_plan(pictures), out, watch=stop)
    shards = {path: path.stat().st_mtime_ns for path in sorted((out / "shards").iterdir())}
    assert len(shards) == 2
    assert len(open_run(out).records) == 8 * 4
    assert open_run(out).sql("select count(*) from records").fetchall() == [(32,)]
    seen: list[AuditProgress] = []

    def stop_again(progress: AuditProgress) -> None:
        seen.append(progress)
        if progress.done > 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resume(out, watch=stop_again)
    assert seen[0].done == 8
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    assert seen[-1].seconds_left > 0
    assert resume(out).complete
    assert resume(out).complete  # a complete audit is left alone


def test_unreadable_files_are_skipped_with_a_reason(whole: Run, pictures: Path) -> None:
    good = (pictures / "cat/00.png").read_bytes()
    damaged = {
        "cat/01-cut.png": good[: len(good) // 2],
        "cat/02-empty.png": b"",
        "dog/notes.txt": b"no picture",
        "dog/text.png": b"<html>",
        "fish/flipped.png": good[:40] + bytes(byte ^ 0x55 for byte in good[40:80]) + good[80:],
    }
    for name, content in damaged.items():
        (pictures / name).write_bytes(content)
    failed = ("L", "LA", "RGBA", "P", "CMYK", "I;16", "1")
    for mode in failed:
        kind = "tiff" if mode == "CMYK" else "png"
        Image.new(mode, (30, 26), 1 if mode == "I;16" else None).save(
            pictures / f"fish/odd-{mode.replace(';', '')}.{kind}"
        )
    (pictures / "owl").mkdir()
    Image.open(pictures / "dog/01.png").save(pictures / "owl/really-a-jpeg.png", "JPEG")
    run = audit(small_plan(pictures), pictures.parent / "other")
    assert set(run.skipped["image"]) == set(damaged)
    assert run.skipped["reason"].str.len().min() > 5
    assert run.info.images == ImageCounts(listed=27, read=22, skipped=5)
    records = run.records
    assert "owl/really-a-jpeg.png" in set(records["image"])
    same = records[records["image"].isin(whole.records["image"])]
    assert same["success_8bit"].tolist() == whole.records["success_8bit"].tolist()
    assert np.isnan(run.maps["importance"][1]).all()  # cat/01-cut.png


def test_images_that_vanish_are_missing(pictures: Path) -> None:
    def vanish(_: Any) -> None:
        (pictures / "fish/02.png").unlink(missing_ok=True)

    run = audit(small_plan(pictures, analyses=()), pictures.parent / "other", watch=vanish)
    assert not run.complete
    assert run.skipped.empty
    assert run.info.missing == MissingImages(1, ("fish/02.png",), "the file no longer exists")


def test_nan_from_the_network_is_an_error_in_the_row(pictures: Path) -> None:
    Image.new("RGB", (24, 24), (3, 3, 3)).save(pictures / "dog/dark.png")
    Image.new("RGB", (24, 24), (250, 250, 250)).save(pictures / "dog/bright.png")
    plan = small_plan(pictures, attacks=(AttackPlan("pgd", settings=(("steps", 2),)),))
    run = audit(
        replace(plan, model=replace(plan.model, spec="audited_networks:silent")), pictures.parent / "other"
    )
    records = run.records
    assert len(records) == 16 * 2
    failed = records[records["error"].notna()]
    assert set(failed["image"]) == {"dog/dark.png", "dog/bright.png"}
    assert failed["success_8bit"].isna().all()
    assert (
        failed[failed["image"] == "dog/dark.png"]["error"]
        .str.contains("NaN or infinity for the clean image")
        .all()
    )
    assert (
        failed[failed["image"] == "dog/bright.png"]["error"]
        .str.contains("attack pgd in region .*: the model returned")
        .all()
    )
    fine = records[records["error"].isna()]
    assert fine["success_8bit"].notna().all()
    assert [cell.errors for cell in summarize(run).cells] == [2, 2]
    assert [cell.images for cell in summarize(run).cells] == [14, 14]


def test_a_network_that_returns_only_nan_does_not_stop_the_audit(pictures: Path) -> None:
    plan = small_plan(pictures)
    run = audit(
        replace(plan, model=replace(plan.model, spec="audited_networks:mute")), pictures.parent / "other"
    )
    assert run.records["error"].notna().all()
    assert summarize(run).weakest == "No attack has a known outcome, so nothing could be measured."


@pytest.mark.parametrize("package", ["duckdb", "pyarrow", "zarr", "fsspec"])
def test_a_missing_extra_names_its_install_command(
    whole: Run, pictures: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    sentence = rf"an audit needs {package}: pip install 'weakspot\[audit\]'"
    with pytest.raises(ValueError, match=sentence):
        audit(small_plan(pictures), pictures.parent / "other")
    for call in (resume, open_run):
        with pytest.raises(ValueError, match=sentence):
            call(whole.folder)
    assert not (pictures.parent / "other").exists()


def test_a_folder_holds_one_run(whole: Run, pictures: Path) -> None:
    with pytest.raises(ValueError, match=r"whole, which holds a run already .*--resume"):
        audit(small_plan(pictures), whole.folder)
    spaced = pictures.parent / "my run"
    spaced.mkdir()
    (spaced / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"continue it with --resume '[^']*my run', or"):
        audit(small_plan(pictures), spaced)
    (pictures.parent / "file").write_text("x")
    with pytest.raises(ValueError, match="which is a file"):
        audit(small_plan(pictures), pictures.parent / "file")


def test_an_impossible_plan_leaves_no_folder(pictures: Path) -> None:
    out = pictures.parent / "other"
    for change, sentence in [
        ({"regions": ("cma",)}, "region must .* 'cma'"),
        ({"regions": ("support",)}, "region must not be support without a class to reach"),
        ({"sources": (str(pictures / "nowhere"),)}, "nowhere does not exist"),
        ({"labels": "folders", "sources": (str(pictures / "cat"),)}, "got no folders"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            audit(replace(small_plan(pictures), **change), out)  # type: ignore[arg-type]
        assert not out.exists()


def test_an_audit_does_not_continue_with_other_weights(pictures: Path, networks: Path) -> None:
    out = pictures.parent / "other"

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(small_plan(pictures), out, watch=stop)
    about = json.loads((out / "run.json").read_text())
    about["plan"]["model"]["spec"] = "audited_networks:other"
    (out / "run.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="must have the weights with which the audit began"):
        resume(out)


def test_a_newer_schema_is_one_sentence(whole: Run) -> None:
    about = {**whole.info.to_json(), "schema": 2}
    (whole.folder / "run.json").write_text(json.dumps(about))
    for call in (open_run, resume):
        with pytest.raises(
            ValueError, match=r"written by a newer weakspot \(schema 2, this one reads up to 1; upgrade"
        ) as raised:
            call(whole.folder)
        assert "\n" not in str(raised.value)
    (whole.folder / "run.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        open_run(whole.folder)
    (whole.folder / "run.json").write_text('{"schema": 1, "attack": "pgd"}')
    with pytest.raises(ValueError, match="of another command"):
        open_run(whole.folder)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        resume(whole.folder.parent / "nowhere")


def test_sql_works_for_any_path_of_a_run(pictures: Path) -> None:
    run = audit(small_plan(pictures, analyses=(), maps=False), pictures.parent / "it's [a] run*")
    rows = run.sql(
        "select attack, region, avg(success_8bit::int) as fooled from records group by all order by all"
    ).df()
    expected = run.records.groupby(["attack", "region"])["success_8bit"].mean()
    assert dict(
        zip(zip(rows["attack"], rows["region"], strict=True), rows["fooled"], strict=True)
    ) == pytest.approx(expected.astype(float).to_dict())
    assert run.relation.aggregate("count(*)").fetchall() == [(56,)]
    assert run.sql("select count(*) from images").fetchall() == [(14,)]
    assert run.sql("select count(*) from skipped").fetchall() == [(0,)]
    assert list(run.maps) == []
    assert not (run.folder / "maps.zarr").exists()


def test_duckdb_and_zarr_alone_read_the_files(whole: Run) -> None:
    import duckdb

    path = whole.folder / "records.parquet"
    query = f"select attack, region, avg(success_8bit::int) from '{path}' group by all"  # noqa: S608
    rows = duckdb.connect().sql(query).fetchall()
    assert len(rows) == 4
    group = zarr.open_group(whole.folder / "maps.zarr", mode="r")
    assert group["partition"].shape == (14, 2, 2, 24, 24)  # type: ignore[union-attr]
    assert group.attrs["attacks"] == ["pgd", "few_pixel"]


def test_the_summary_equals_the_records(whole: Run) -> None:
    summary = summarize(whole)
    records = whole.records
    for cell in summary.cells:
        rows = records[(records["attack"] == cell.attack) & (records["region"] == cell.region)]
        assert cell.robust_accuracy == pytest.approx(1 - rows["success_8bit"].mean())
        assert cell.low <= cell.robust_accuracy <= cell.high
    assert summary.labels == "folder names"
    assert summary.weakest == (
        "Under pgd at linf:4/255 confined to cam (30% of the image), 29% [8%, 58%] of 14 images remain correctly "
        "classified (29% without an attack); on the whole image, 29% [8%, 58%]."
    )
    assert summary.regions == ()
    assert json.dumps(summary.as_mapping())


def test_columns_of_some_shards_are_missing_in_others(pictures: Path) -> None:
    # Only pairs that differ in one pixel have a locality.
    plan = small_plan(pictures, analyses=("locality", "ssim"), regions=("none",))
    records = audit(plan, pictures.parent / "other").records
    own = [name for name in map(str, records) if name.startswith("fools_at")]
    assert "ssim_windowed_score" in records
    assert pd.api.types.is_float_dtype(records["ssim_windowed_score"])
    assert own
    assert records[records["attack"] == "pgd"][own].isna().all(axis=None)


def test_spent_ssim_budgets_have_one_column_per_definition(
    pictures: Path,
) -> None:
    budgets = ("ssim:0.01", "ssim-local:0.05", "linf:4/255")
    plan = small_plan(
        pictures,
        attacks=tuple(AttackPlan("pgd", budget=budget, settings=(("steps", 1),)) for budget in budgets),
        regions=("none",),
        analyses=(),
    )
    records = audit(plan, pictures.parent / "other").records
    attacked = records[records["success"].notna()]
    assert set(attacked["budget"]) == set(budgets)
    for budget, rows in attacked.groupby("budget"):
        assert rows["ssim_budget_spent"].notna().all() == (budget == "ssim:0.01")
        assert rows["ssim_local_budget_spent"].notna().all() == (budget == "ssim-local:0.05")
        assert rows["ssim_windowed"].notna().all()
        assert (rows["ssim_windowed_min"] <= rows["ssim_windowed"]).all()
    assert "ssim" not in records


def test_a_plain_audit_raises_no_model_warning(pictures: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ModelWarning)
        # Region none: region cam would warn of labels without evidence, which a small network has.
        audit(small_plan(pictures, analyses=(), regions=("none",)), pictures.parent / "other")


def test_records_have_no_statistics_over_other_images(whole: Run) -> None:
    """P values against other images are a property of the run, not of a row."""
    assert "effect_in_roi_shift_p" in whole.records
    assert not whole.records.filter(regex="^relation|(?<!_shift)(_null|_p|_q)$").columns.tolist()


def test_progress_never_decreases_and_ends_with_all(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = small_plan(pictures, limit=3, analyses=())
    seen: list[float] = []
    audit(plan, pictures.parent / "seen", progress=seen.append)
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, 1)
    assert capsys.readouterr().err == ""


def test_a_plan_that_cannot_be_carried_out_leaves_its_place_free(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    wrong = small_plan(pictures, attacks=(AttackPlan("pgd", settings=(("steps", -1),)),), limit=2)
    with pytest.raises(ValueError, match="steps must be an integer of at least 1, got -1"):
        audit(wrong, folder)
    assert not folder.exists()
    folder.mkdir()
    (folder / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="steps must be an integer of at least 1, got -1"):
        audit(wrong, folder)
    right = small_plan(pictures, attacks=(AttackPlan("pgd", settings=(("steps", 1),)),), limit=2)
    assert audit(right, folder).complete
    assert (folder / "mine.txt").read_text() == "kept"
