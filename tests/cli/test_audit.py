"""`weakspot audit`: what it prints, what it refuses, how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import weakspot
from tests.cli.conftest import Run
from weakspot import audit as runs
from weakspot._io.files import locked
from weakspot.audit.execution.lifecycle import LOCK
from weakspot.audit.store.records import TIMES
from weakspot.cli.app import Failure
from weakspot.cli.plan_options import PlanOptions, plan_table

TINY = ("--model", "tiny_networks:build", "--size", "32x32", "--mean", "0", "--std", "1")
WRITER = "weakspot.audit.execution.job.write_shard"
QUICK = ("--set", "pgd.steps=2", "--attacks", "pgd", "--analyses", "none", "--no-report")


@pytest.mark.slow
def test_an_audit_prints_a_table_and_a_sentence(run: Run, photographs: Path, tmp_path: Path) -> None:
    ended = run(
        "audit", photographs, *TINY, "--attacks", "pgd,few_pixel", "--regions", "none,cam,background", "--analyses",
        "overlap", "--set", "pgd.steps=2", "--set", "few_pixel.method=guided", "--set", "few_pixel.population=4",
        "--set", "few_pixel.generations=1", "--budget", "linf:8/255", "--out", "made",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    for word in (
        "robust",
        "background",
        "few_pixel",
        "pgd at linf:8/255, few_pixel",
        "4 images audited",
        "predictions",
    ):
        assert word in ended.out
    assert f"Written to {tmp_path / 'made'}" in ended.out
    audited = runs.open_run("made")
    assert len(audited.records) == 4 * 2 * 3
    assert audited.plan.attacks[0].settings == (("steps", 2),)
    assert audited.info.command.startswith("weakspot audit ")
    assert {"importance", "partition", "clean", "adversarial"} <= set(audited.maps)


def test_json_is_the_only_output(run: Run, photographs: Path) -> None:
    (photographs / "broken.png").write_bytes(b"\x89PNG")
    ended = run(
        "audit", photographs, *TINY, *QUICK, "--out", "made", "--json", "--model", "tiny_networks:Loud"
    )
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    assert document["counts"] == {"listed": 5, "read": 4, "skipped": 1}
    assert document["skipped"][0]["image"] == "broken.png"
    assert [cell["region"] for cell in document["cells"]] == ["none"]
    assert document["status"] == "complete"


def test_quiet_prints_nothing(run: Run, photographs: Path) -> None:
    ended = run("audit", photographs, *TINY, *QUICK, "--out", "made", "--quiet")
    assert (ended.code, ended.out, ended.err) == (0, "", "")


def test_a_plan_file_does_the_same_and_options_override_it(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    (tmp_path / "inner/plan.toml").write_text(
        'images = ["../photos"]\nout = "../planned"\nanalyses = "none"\nseed = 4\n'
        '[model]\nspec = "tiny_networks:build"\nsize = [32, 32]\nclasses = "../classes.txt"\n'
        "mean = [0]\nstd = [1]\n"
        '[[attacks]]\nname = "pgd"\nsettings = {steps = 2}\n'
    )
    assert run("audit", "inner/plan.toml", "--no-report").code == 0
    ended = run(
        "audit", photographs, *TINY, *QUICK, "--seed", 4, "--classes", "classes.txt", "--out", "typed",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    one, other = (runs.open_run(folder).records.drop(columns=list(TIMES)) for folder in ("planned", "typed"))
    pd.testing.assert_frame_equal(one, other)
    assert runs.open_run("planned").plan == runs.open_run("typed").plan
    ended = run(
        "audit", "inner/plan.toml", "--no-report", "--limit", 2, "--out", "less", "--set", "pgd.steps=1"
    )
    assert ended.code == 0, ended.err
    less = runs.open_run("less")
    assert (less.plan.limit, less.plan.seed, dict(less.plan.attacks[0].settings)) == (2, 4, {"steps": 1})
    assert len(less.records) == 2
    # A budget that the plan states for an attack is overridden, too; and two of them become one.
    plan = (tmp_path / "inner/plan.toml").read_text()
    attack = '[[attacks]]\nname = "pgd"\nbudget = "linf:1/255"\nsettings = {steps = 2}\n'
    (tmp_path / "inner/plan.toml").write_text(
        plan[: plan.index("[[")] + attack + attack.replace("1/255", "2/255")
    )
    ended = run(
        "audit", "inner/plan.toml", "--no-report", "--limit", 2, "--out", "wider", "--budget", "linf:8/255"
    )
    assert ended.code == 0, ended.err
    assert [attack.budget for attack in runs.open_run("wider").plan.attacks] == ["linf:8/255"]


def test_the_labels_of_an_array_are_used(run: Run, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(6) % 4)
    ended = run("audit", "set.npz", *TINY, *QUICK, "--out", "made")
    assert ended.code == 0, ended.err
    assert "Labels: the array's own" in ended.out
    assert runs.open_run("made").records["label"].tolist() == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--out", "x"), 2, "no images were named"),
        (("photos",), 2, "no output folder was named (give --out FOLDER)"),
        (("nowhere", "--out", "x"), 4, "nowhere: no such file or folder"),
        (("nowhere.toml", "--out", "x"), 4, "nowhere.toml"),
        (("photos", "--out", "x", "--attacks", "pgdd"), 2, "did you mean 'pgd'"),
        (
            ("photos", "--out", "x", "--fraction", ".5"),
            2,
            "--fraction has no effect without cam or superpixels or support in",
        ),
        (("photos", "--out", "x", "--control-images", "3"), 2, "--control-images has no effect without"),
        (("photos", "--out", "x", "--controls"), 2, "regions must name one to control"),
        (("photos", "--out", "x", "--labels", "nowhere.csv"), 2, "nowhere.csv"),
        (("photos", "--out", "x", "--model", "nothing:build"), 2, "there is no module 'nothing'"),
        (("photos", "--out", "x", "--engine", "rya"), 2, "did you mean 'ray'"),
        (("photos", "--out", "x", "--workers", "2"), 2, "workers"),
        (("photos", "--out", "tiny_networks.py"), 2, "tiny_networks.py"),
        (("--resume", "x"), 4, "x holds no run"),
        (("photos", "--resume", "x"), 2, "--resume takes no images and no plan options"),
        (("--resume", "x", "--seed", "1"), 2, "--resume takes no images and no plan options"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_leaves_nothing(
    run: Run, photographs: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    model = () if "--model" in arguments or "--resume" in arguments else TINY
    ended = run("audit", *arguments, *model)
    assert (ended.code, message in ended.err) == (code, True), ended.err
    assert ended.err.count("weakspot:") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["steps=2"], "--set must be ATTACK.NAME=VALUE such as pgd.steps=50, got 'steps'"),
        (["pgd.steps"], "--set must be ATTACK.NAME=VALUE such as pgd.steps=50, got 'pgd.steps'"),
        (["fgsm.steps=2"], "the attack in --set must be one of pgd, got 'fgsm'"),
    ],
)
def test_a_setting_belongs_to_an_attack_of_the_plan(
    tmp_path: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(Failure) as caught:
        plan_table([str(tmp_path)], {}, settings, "out")
    assert message in str(caught.value)
    table, _ = plan_table([str(tmp_path)], {"attacks": "pgd, fgsm"}, ["pgd.steps=2"], "out")
    assert table["attacks"] == [{"name": "pgd", "settings": {"steps": 2}}, {"name": "fgsm"}]


def test_the_defaults_in_the_help_are_those_of_a_plan(tmp_path: Path) -> None:
    options = PlanOptions()
    spelled = {field.name: getattr(options, field.name) for field in fields(options)}
    del spelled["settings"], spelled["steps"]
    plans = [runs.Plan.from_mapping({"images": str(tmp_path), **table}).resolved() for table in ({}, spelled)]
    assert replace(plans[1], stated_budgets=()) == plans[0]


def test_a_missing_source_is_reported_and_the_others_are_audited(run: Run, photographs: Path) -> None:
    ended = run("audit", photographs, "nowhere", *TINY, *QUICK, "--out", "made")
    assert ended.code == 4
    assert "nowhere: no such file or folder" in ended.err
    assert len(runs.open_run("made").records) == 4


def test_no_readable_image_is_code_four(run: Run, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.png").write_text("not an image")
    ended = run("audit", "texts", *TINY, *QUICK, "--out", "made")
    assert ended.code == 4
    assert "0 images audited, 1 skipped" in ended.out


def test_an_audit_whose_images_are_gone_ends_with_four_and_fails_the_gate(
    run: Run, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = (*TINY, *QUICK, "--set", "pgd.steps=1")
    assert run("audit", photographs, *quick, "--out", "whole").code == 0
    gate = ("--fail-if", "robust_accuracy < 0", "--junit", "gate.xml")

    def vanish(*_: Any) -> None:
        photographs.rename(tmp_path / "away")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(WRITER, vanish)
        assert run("audit", photographs, *quick, "--out", "made").code == 5
    (tmp_path / "gate.xml").write_text("<testsuites failures='0'/>")  # of another build
    for junit in (tmp_path / "gate.xml", None):
        ended = run("audit", "--resume", "made", "--no-report", *(gate if junit else ()))
        assert ended.code == 4, ended.err
        assert "the audit is not complete: 4 of 4 images can no longer be read (" in ended.err
        assert (
            "the file no longer exists); restore them and continue with weakspot audit --resume made"
            in ended.err
        )
        if junit is not None:
            assert ET.parse(junit).getroot().attrib["failures"] == "1"  # noqa: S314 - our own
            assert "gate: all images: robust_accuracy < 0 cannot be evaluated: the audit is not" in ended.err
    assert json.loads(run("audit", "--resume", "made", "--no-report", "--json").out)["status"] == "incomplete"
    assert run("report", "made").code == 0
    assert "The audit is not complete: 4 of 4 images" in (tmp_path / "made/report.html").read_text()
    ended = run("compare", "whole", "made", *gate)
    assert (ended.code, ended.out) == (2, "")  # it has no records at all
    assert not (tmp_path / "gate.xml").exists()
    (tmp_path / "away").rename(photographs)
    ended = run("audit", "--resume", "made", "--no-report", *gate)
    assert ended.code == 0, ended.err
    assert ET.parse(tmp_path / "gate.xml").getroot().attrib["failures"] == "0"  # noqa: S314
    times = list(TIMES)
    one, other = (runs.open_run(folder).records.drop(columns=times) for folder in ("whole", "made"))
    pd.testing.assert_frame_equal(one, other)


def test_a_comparison_with_an_incomplete_audit_fails_the_gate(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    assert run("audit", photographs, *TINY, *QUICK, "--out", "whole").code == 0
    assert run("audit", photographs, "nowhere", *TINY, *QUICK, "--out", "made").code == 4
    assert run("audit", "--resume", "made", "--no-report").code == 4  # still
    gate = ("--fail-if", "score == 'nothing'", "--junit", "gate.xml")
    ended = run("compare", "whole", "made", *gate)
    assert ended.code == 4
    assert "made: the audit lacks " in ended.err
    assert ET.parse(tmp_path / "gate.xml").getroot().attrib["failures"] == "1"  # noqa: S314
    whole = run("compare", "whole", "whole", *gate)
    assert whole.code == 3
    assert "no row has score 'nothing'" in whole.err


def test_damaged_records_are_named_and_repaired(run: Run, photographs: Path, tmp_path: Path) -> None:
    assert run("audit", photographs, *TINY, *QUICK, "--out", "made").code == 0
    records = tmp_path / "made/records.parquet"
    content = records.read_bytes()
    records.write_bytes(content[:200] + bytes([content[200] ^ 4]) + content[201:])
    for command in (("report", "made"), ("compare", "made", "made", "--fail-if", "score == 'nothing'")):
        ended = run(*command)
        assert ended.code == 4
        assert ended.err == (
            "weakspot: made is damaged: records.parquet differs from what was written (repair the run with weakspot "
            "audit --resume made)\n"
        )
    ended = run("audit", "--resume", "made", "--no-report")
    assert ended.code == 0
    assert "damaged files (records.parquet) are written again" in ended.err
    assert run("report", "made").code == 0


def test_an_interrupt_ends_with_five_and_the_audit_can_be_resumed(
    run: Run, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("audit", photographs, *TINY, *QUICK, "--out", "whole").code == 0

    def interrupt(*_: Any) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # where Ctrl-C arrives
        time.sleep(1)

    with monkeypatch.context() as patch:
        patch.setattr(WRITER, interrupt)
        ended = run("audit", photographs, *TINY, *QUICK, "--out", "made")
    assert ended.code == 5
    assert "planned attacks are saved; resume with weakspot audit --resume made" in ended.err
    assert run("audit", photographs, *TINY, *QUICK, "--out", "made").code == 2  # a run lies there
    ended = run("audit", "--resume", "made", "--no-report")
    assert ended.code == 0, ended.err
    one, other = (runs.open_run(folder).records.drop(columns=list(TIMES)) for folder in ("whole", "made"))
    pd.testing.assert_frame_equal(one, other)
    assert run("audit", "--resume", "made", "--no-report").code == 0


def test_an_interrupt_before_there_is_a_run_says_so(
    run: Run, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("weakspot.audit.Plan.from_mapping", interrupt)
    ended = run("audit", photographs, *TINY, *QUICK, "--out", "made")
    assert (ended.code, ended.err.strip()) == (130, "weakspot: interrupted; nothing was written")
    assert not Path("made").exists()


def test_a_full_disk_ends_with_five_and_one_sentence(
    run: Run, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if "parquet" in path.name:
            raise OSError(28, "No space left on device", str(path))
        return own(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    ended = run("audit", photographs, *TINY, *QUICK, "--out", "made")
    assert ended.code == 5
    assert ended.err.count("\n") == 1
    assert "made cannot be written (No space left on device)" in ended.err
    assert "--resume made" in ended.err
    monkeypatch.undo()


def test_a_folder_in_use_is_refused(run: Run, photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    with locked(tmp_path / "made", LOCK):
        ended = run("audit", photographs, *TINY, *QUICK, "--out", "made")
    assert ended.code == 2
    assert f"is being written by process {os.getpid()}" in ended.err


@pytest.mark.slow
def test_sigterm_is_an_interrupt(run: Run, photographs: Path, tmp_path: Path) -> None:
    source = str(Path(weakspot.__file__).parents[1])
    command = [
        sys.executable,
        "-m",
        "weakspot",
        "audit",
        "photos",
        *TINY,
        "--set",
        "pgd.steps=3000",
        "--out",
        "made",
    ]
    environment = {**os.environ, "PYTHONPATH": source}
    child = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "made/run.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 5, err
    assert "weakspot audit --resume made" in err


@pytest.mark.slow
def test_an_interrupt_inside_exec_keeps_the_exit_code(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text("def net():\n    exec('raise KeyboardInterrupt')\n")
    environment = {**os.environ, "PYTHONPATH": f"{Path(weakspot.__file__).parents[1]}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "weakspot", "audit", "photos", "--model", "planted:net", "--out", "made"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert (ended.returncode, "--resume made" in ended.stderr) == (5, True), ended.stderr


def with_ray(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command in a process group of its own, with a cluster of its own."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'weakspot[ray]'")
    environment = {**os.environ, "PYTHONPATH": str(Path(weakspot.__file__).parents[1])}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [sys.executable, "-m", "weakspot", "audit", *arguments, "--engine", "ray", "--workers", "1"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def is_gone(group: int) -> bool:
    """Whether the process group has no process left, within a while."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.2)
    return False


@pytest.mark.slow
def test_ray_prints_nothing_of_its_own_and_leaves_nothing_running(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    assert run("audit", photographs, *TINY, *QUICK, "--out", "here").code == 0
    child = with_ray(tmp_path, "photos", *TINY, *QUICK, "--out", "made")
    out, err = child.communicate(timeout=200)
    # Our own: how far the audit is, and that this machine is busy.
    own = ("loading the model: ", "auditing: ", "note: this machine is busy")
    assert (child.returncode, [line for line in err.splitlines() if not line.startswith(own)]) == (0, [])
    assert "4 images audited" in out
    assert "raylet" not in out
    one, other = (runs.open_run(tmp_path / folder) for folder in ("here", "made"))
    times = list(TIMES)
    pd.testing.assert_frame_equal(one.records.drop(columns=times), other.records.drop(columns=times))
    assert is_gone(child.pid)


def _without_progress(err: str) -> str:
    """Standard error without what depends on how busy the machine is."""
    changing = r"note: this machine is busy.*|.* so far|.* left"
    return "".join(f"{line}\n" for line in err.splitlines() if not re.fullmatch(changing, line))


@pytest.mark.slow
@pytest.mark.parametrize("request_to_end", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_workers_and_cluster_too(
    run: Run, photographs: Path, tmp_path: Path, request_to_end: signal.Signals
) -> None:
    child = with_ray(tmp_path, "photos", *TINY, "--set", "pgd.steps=100000", "--out", "made")
    deadline = time.monotonic() + 120
    while not (tmp_path / "made/maps.zarr").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(3)
    child.send_signal(request_to_end)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 5, err
    sentence = r"weakspot: interrupted; \d of 4 planned attacks are saved; resume with weakspot audit --resume made\n"
    assert re.fullmatch(sentence, _without_progress(err))
    assert is_gone(child.pid)


def test_from_and_to_urls(run: Run, photographs: Path, tmp_path: Path) -> None:
    assert run("audit", photographs, *TINY, *QUICK, "--out", "here").code == 0
    source, out = f"file://{photographs}", f"file://{tmp_path}/there"
    ended = run("audit", source, *TINY, *QUICK, "--out", out)
    assert ended.code == 0, ended.err
    assert f"Written to {out}" in ended.out
    one, other = (runs.open_run(place).records.drop(columns=list(TIMES)) for place in ("here", out))
    pd.testing.assert_frame_equal(one, other)
    assert run("audit", "--resume", out, "--no-report").code == 0
    assert f"--resume {out}" in run("audit", source, *TINY, *QUICK, "--out", out).err
    ended = run("audit", "warp://photos", *TINY, *QUICK, "--out", "x")
    assert (ended.code, ended.err.count("weakspot:")) == (2, 1)
    ended = run("audit", "--resume", "memory://nowhere")
    assert (ended.code, ended.err) == (
        4, "weakspot: memory://nowhere holds no run (it has no run.json)\n",
    )  # fmt: skip


def test_an_image_without_finite_logits_is_named_and_left_out_of_the_accuracy(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    Image.fromarray(np.full((64, 64, 3), 250, np.uint8)).save(photographs / "bright.png")
    dark = ("--model", "tiny_networks:dark", "--size", "64x64", "--mean", "0", "--std", "1")
    # Four other images are too few for five controls, which fails no image.
    plan = ("--analyses", "none", "--no-maps", "--regions", "cam", "--controls", "--attacks", "fgsm")
    ended = run("audit", photographs, *dark, *plan, "--out", "made")
    assert ended.code == 0, ended.err
    assert "Clean accuracy is 100% of 4 images with a result (5 were read)." in ended.out
    failures = [line for line in ended.out.splitlines() if line.startswith("failed ")]
    assert failures == ["failed bright.png: the model returned NaN or infinity for the clean image"]
    page = (tmp_path / "made/report.html").read_text()
    assert "classified as their label without an attack (of 4 images with a result)" in page
