"""run.json: a round trip keeps everything, and damage is one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weakspot.audit import ModelPlan, Plan
from weakspot.audit.store.run_info import ImageCounts, MissingImages, ModelInfo, RunInfo
from weakspot.models.identity import Probe


def example(status: str = "incomplete") -> RunInfo:
    planned = RunInfo.planned(Plan(("/images",), ModelPlan("a:b", size=(4, 4))), "weakspot audit")
    if status == "planned":
        return planned
    probe = Probe(np.ones((4, 3)), "cpu", low_precision=False, repeats=True)
    return RunInfo(
        **{
            **vars(planned),
            "status": status,
            "model": ModelInfo("net", "0123", 3, (4, 4), probe),
            "device": "cpu",
            "images": ImageCounts(5, 4, 0, 1),
            "labels": {"folder": 5},
            "absent": ("/gone",),
            "remarks": ("random",),
            "checksums": {"images.parquet": "ab"},
            "missing": MissingImages(1, ("x.png",), "gone"),
            "engine": {"name": "ray", "workers": 2},
        }
    )


def as_json(info: RunInfo) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(info.to_json()))
    return values


@pytest.mark.parametrize("status", ["planned", "running", "incomplete", "complete"])
def test_a_round_trip_keeps_everything(tmp_path: Path, status: str) -> None:
    info = example(status)
    info.write(tmp_path)
    again = RunInfo.read(tmp_path)
    assert as_json(again) == as_json(info) == json.loads((tmp_path / "run.json").read_text())
    assert again.plan == info.plan
    if info.model is not None:
        assert again.model is not None
        assert again.model.probe.agrees(info.model.probe)


def test_an_unknown_key_is_ignored() -> None:
    values = as_json(example())
    assert as_json(RunInfo.from_json({**values, "later": 1})) == values


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kind": None}, "run.json must be written by weakspot audit"),
        ({"schema": 2}, "was written by a newer weakspot .schema 2"),
        ({"schema": "1"}, "newer weakspot"),
        ({"plan": None}, "run.json is damaged"),
        ({"plan": {"images": "x", "atacks": "pgd"}}, "run.json is damaged: key of plan must be"),
        ({"model": {"name": "net"}}, "run.json is damaged"),
        ({"model": 3}, "run.json is damaged"),
        ({"images": {"counted": 3}}, "run.json is damaged"),
        ({"remarks": "random"}, "run.json is damaged"),
        ({"missing": {"names": None}}, "run.json is damaged"),
        ({"model": {**as_json(example())["model"], "probe": {"logits": "?"}}}, "run.json is damaged"),
    ],
)
def test_a_damaged_or_foreign_file_is_one_sentence(change: dict[str, object], sentence: str) -> None:
    values = {**as_json(example()), **change}
    with pytest.raises(ValueError, match=sentence) as raised:
        RunInfo.from_json(values)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("status", ["plan", "status", "command", "started", "versions", "host"])
def test_a_missing_value_is_damage(status: str) -> None:
    values = as_json(example())
    del values[status]
    with pytest.raises(ValueError, match=rf"run\.json is damaged: run must have the key {status}"):
        RunInfo.from_json(values)


def test_shortfalls_name_what_is_absent_and_a_command_that_runs() -> None:
    done = replace(example("complete"), missing=None)
    assert done.shortfall("runs/a").endswith("start another audit once it does")
    both = replace(done, absent=("/gone", "/too"))
    assert both.shortfall("runs/a").endswith("start another audit once they do")
    assert "weakspot audit --resume 'my runs/a'" in example().shortfall("my runs/a")
    assert "weakspot audit --resume s3://bucket/a" in example().shortfall("s3://bucket/a")
