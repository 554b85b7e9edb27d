"""Durability: what is done is on the disk within seconds, whatever the shard, and changes no bit of the result."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.audit.fixtures import (
    FILES,
    Audited,
    audited,
    networks,
    pictures,
    same_maps,
    same_records,
    small_plan,
)
from weakspot import Classifier
from weakspot.audit import AttackPlan, AuditInterrupt, AuditProgress, Plan, Run, audit, open_run, resume
from weakspot.audit.execution import attacked_groups, job
from weakspot.audit.execution.job import Job, affordable_group, estimated_passes, forward_flops
from weakspot.audit.store.records import shard_files
from weakspot.audit.store.unfinished import (
    merged,
    read_unfinished,
    remove_unfinished,
    unfinished_files,
    write_unfinished,
)

__all__ = ["audited", "networks", "pictures"]  # fixtures
CELLS = 4


def one_shard(pictures: Path, **changes: Any) -> Plan:
    """All 14 pictures in one shard: four groups in each of four cells."""
    return small_plan(pictures, **{"shard": 16, **changes})


@pytest.fixture
def whole(audited: Audited, pictures: Path) -> Run:
    return audited("one shard", one_shard(pictures), pictures.parent / "whole")


def stop_after(images: float) -> Callable[[AuditProgress], None]:
    def watch(progress: AuditProgress) -> None:
        if progress.done > images:
            raise KeyboardInterrupt

    return watch


def interrupted(pictures: Path, images: float = 6.5, **changes: Any) -> Path:
    """An audit interrupted inside its only shard, after six of its sixteen groups."""
    out = pictures.parent / "cut"
    with pytest.raises(
        AuditInterrupt, match=r"of 56 planned attacks are saved; resume with weakspot audit"
    ) as raised:
        audit(one_shard(pictures, **changes), out, watch=stop_after(images))
    results = [result for path in unfinished_files(out) for result in read_unfinished(path)]
    assert raised.value.saved == sum(len(result.rows) for result in results)
    assert not shard_files(out)
    return out


def test_an_interrupt_inside_a_shard_loses_only_the_group_at_work(
    whole: Run, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = interrupted(pictures)
    results = [result for path in unfinished_files(out) for result in read_unfinished(path)]
    assert len(results) in {6, 7}  # an attack may report its progress only at its end
    assert len(open_run(out).records) == 0  # the records are those of whole shards
    own, computed = attacked_groups._Images.attack, []

    def count(images: Any, key: Any, progress: Any) -> Any:
        computed.append(key)
        return own(images, key, progress)

    monkeypatch.setattr(attacked_groups._Images, "attack", count)
    run = resume(out)
    assert len(computed) == 16 - len(results)
    assert not {result.key for result in results} & set(computed)
    same_records(whole, run)
    same_maps(whole, run)
    assert sorted(path.name for path in out.iterdir()) == FILES


def test_repeated_interrupts_give_the_same_records(whole: Run, pictures: Path) -> None:
    out = interrupted(pictures, 0.5)
    for images in (3.2, 3.9, 8.1, 13.9):
        with pytest.raises(KeyboardInterrupt):
            resume(out, watch=stop_after(images))
    run = resume(out)
    same_records(whole, run)
    same_maps(whole, run)


def test_a_session_that_ends_before_the_shard_is_merged_computes_nothing_again(
    whole: Run, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "SAVE_EVERY", 0.0)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    out = pictures.parent / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(job, "write_shard", full)
        with pytest.raises(Exception, match="No space left"):
            audit(one_shard(pictures), out)
    assert sum(len(read_unfinished(path)) for path in unfinished_files(out)) == 15
    same_records(whole, resume(out))


@pytest.mark.parametrize("pause", [1.0, 7.0])
def test_what_is_done_is_written_within_seconds(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, pause: float
) -> None:
    """With a clock that runs `pause` seconds per group, no more than SAVE_EVERY and one group are unsaved."""
    clock = [0.0]
    monkeypatch.setattr("weakspot.audit.execution.job.time.monotonic", lambda: clock[0])
    unsaved: list[float] = []
    own = job.Ledger.add

    def add(self: job.Ledger, result: Any) -> None:
        clock[0] += pause
        own(self, result)
        unsaved.append(pause * len(self.unsaved))

    monkeypatch.setattr(job.Ledger, "add", add)
    audit(one_shard(pictures, analyses=()), pictures.parent / "out")
    assert max(unsaved) <= job.SAVE_EVERY
    assert len(unsaved) == 16


def test_results_survive_a_round_trip_and_merge_in_any_order(pictures: Path, tmp_path: Path) -> None:
    out = interrupted(pictures, 13.2, analyses=("overlap", "propagation"))
    results = [result for path in unfinished_files(out) for result in read_unfinished(path)]
    results[0] = replace(results[0], remarks=("The model is odd.",))
    again = read_unfinished(write_unfinished(tmp_path, results))
    assert [result.remarks for result in again[:2]] == [("The model is odd.",), ()]
    expected = merged(results, (14, 2, 2))
    random.Random(0).shuffle(again)  # noqa: S311 - no secret
    shuffled = merged(again, (14, 2, 2))
    assert shuffled.rows.equals(expected.rows)
    assert shuffled.note == expected.note
    assert shuffled.maps.keys() == expected.maps.keys()
    for name, block in shuffled.maps.items():
        np.testing.assert_array_equal(block.values, expected.maps[name].values)
        assert dict(block.about) == dict(expected.maps[name].about)


def test_damaged_unfinished_results_are_named_and_computed_again(whole: Run, pictures: Path) -> None:
    out = interrupted(pictures)
    (path,) = unfinished_files(out)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=rf"Damaged files were found \(unfinished/{path.name}\)"):
        run = resume(out)
    same_records(whole, run)
    same_maps(whole, run)


def test_an_image_that_changed_inside_an_unfinished_shard_is_named_and_attacked_again(pictures: Path) -> None:
    out = interrupted(pictures)
    Image.new("RGB", (24, 24), (10, 200, 10)).save(pictures / "cat/03.png")
    with pytest.warns(UserWarning, match=r"1 image was changed after being attacked \(cat/03.png\)"):
        run = resume(out)
    same_records(audit(one_shard(pictures), pictures.parent / "expected"), run)


def test_an_image_that_vanished_inside_an_unfinished_shard_is_missing_until_it_is_back(
    whole: Run, pictures: Path
) -> None:
    out, lost = interrupted(pictures), pictures / "cat/03.png"
    lost.rename(pictures.parent / "03.png")
    run = resume(out)
    assert run.info.missing is not None
    assert run.info.missing.names == ("cat/03.png",)
    assert len(run.records) == 13 * CELLS
    (pictures.parent / "03.png").rename(lost)
    run = resume(out)
    same_records(whole, run)
    same_maps(whole, run)


def test_a_crash_after_the_shard_leaves_unfinished_files_that_are_removed(whole: Run, pictures: Path) -> None:
    out = interrupted(pictures)
    (path,) = unfinished_files(out)
    content = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        resume(out, watch=stop_after(13.99))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    same_records(whole, resume(out))
    assert sorted(path.name for path in out.iterdir()) == FILES


def test_a_killed_writer_of_unfinished_results_leaves_a_draft_that_is_removed(
    whole: Run, pictures: Path
) -> None:
    out = interrupted(pictures)
    (out / "unfinished/.0000002-aa.safetensors.1").touch()
    same_records(whole, resume(out))
    assert sorted(path.name for path in out.iterdir()) == FILES


def test_the_folder_of_results_that_did_not_fit_the_disk_is_removed(tmp_path: Path) -> None:
    (tmp_path / "unfinished").mkdir()
    remove_unfinished(tmp_path, {0})
    assert not list(tmp_path.iterdir())


# --- sizes of groups


def square(side: int) -> Classifier:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    )
    return Classifier.wrap(network.eval(), input_size=(side, side))


class Transposed(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values.transpose(1, 2)


def test_flops_are_those_of_the_formula() -> None:
    classifier = square(24)
    expected = 2 * (24 * 24 * 32 * 3 * 9 + 32 * 5)
    assert forward_flops(classifier) == expected
    assert (
        forward_flops(Classifier.wrap(torch.jit.script(classifier.network), input_size=(24, 24))) == expected
    )
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_flops_of_transformer_layers_are_counted() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 4, 4), nn.Flatten(2), Transposed(), layer, nn.Flatten(), nn.Linear(16 * 40, 3)
    )
    tokens, width, hidden = 40, 16, 32
    linear = 2 * tokens * (width * 3 * width + width * width + 2 * width * hidden)
    attention = 4 * tokens * tokens * width
    ends = 2 * (tokens * width * 48 + tokens * width * 3)
    # Some versions of torch do not count attention itself, a few percent of a larger transformer.
    counted = forward_flops(Classifier.wrap(network.eval(), input_size=(20, 32)))
    assert counted in {linear + ends, linear + attention + ends}


def test_passes_are_estimated_from_the_settings() -> None:
    assert estimated_passes(AttackPlan("pgd", settings=(("steps", 7), ("restarts", 3)))) == 21
    assert estimated_passes(AttackPlan("fgsm")) == 1
    assert estimated_passes(AttackPlan("fmn", settings=(("steps", 1000),))) == 1000
    assert estimated_passes(AttackPlan("pgd", settings=(("steps", 0),))) == 1
    assert estimated_passes(AttackPlan("foolbox:LinfPGD")) == 100


def test_expensive_attacks_get_small_groups_and_cheap_ones_the_default(tmp_path: Path) -> None:
    cheap, costly = AttackPlan("fgsm"), AttackPlan("fmn", settings=(("steps", 1000),))
    classifier = square(224)
    sizes = [
        affordable_group(Plan((str(tmp_path),), attacks=attacks, analyses=()), classifier)
        for attacks in ((cheap,), (costly,), (cheap, costly))
    ]
    assert sizes == [4, 1, 1]
    assert affordable_group(Plan((str(tmp_path),), attacks=(costly,), analyses=()), square(8)) == 16
    many = Plan((str(tmp_path),), attacks=(cheap,), analyses=("overlap", "promotion", "propagation"))
    assert affordable_group(many, classifier) in {1, 2}


def test_the_size_of_groups_is_that_of_the_plan_once_it_is_stored(pictures: Path) -> None:
    plan = replace(small_plan(pictures), group=None, attacks=(AttackPlan("fgsm"),), analyses=())
    run = audit(plan, pictures.parent / "run")
    assert run.plan.group == 16
    import pyarrow.parquet as pq

    listing = pq.read_table(run.folder / "images.parquet")
    again = Job.of(replace(run.plan, group=2), square(24), listing)
    assert (again.group, [key.start for key in again.groups(0)][:2]) == (2, [0, 0])
    assert [key.start for key in again.groups(3)] == [0, 0]
    assert again.attacks == 28
