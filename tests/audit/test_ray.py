"""The Ray engine: the same records as one process, even if workers die."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import weakspot
from tests.audit.fixtures import (
    FILES,
    draw_pictures,
    networks,
    pictures,
    same_maps,
    same_records,
    small_plan,
)
from weakspot.audit import AttackPlan, StoppedError, audit, open_run, resume
from weakspot.audit.execution.audit_engine import open_engine
from weakspot.audit.execution.lifecycle import AuditProgress
from weakspot.audit.execution.ray_engine import allocation
from weakspot.audit.store.records import shard_files

__all__ = ["networks", "pictures"]  # fixtures
pytestmark = pytest.mark.ray
CHECKED = """
import os, signal, sys, time
from pathlib import Path
from audited_networks import build

class Mortal(type(build())):
    # Kills its worker once, or every time.
    def forward(self, images):
        here = Path("{folder}")
        if os.environ.get("RAY_JOB_ID") or "default_worker" in sys.argv[0]:
            if (here / "once").exists() and images.shape[0] > 1:
                (here / "once").unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            if (here / "always").exists() and images.shape[0] > 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)

class Waiting(type(build())):
    # A worker waits in its fortieth pass until a result has arrived.
    def forward(self, images):
        here = Path("{folder}")
        self.passes = getattr(self, "passes", 0) + 1
        if "default_worker" in sys.argv[0] and self.passes == 40:
            deadline = time.monotonic() + 120  # only so that a failure ends
            while time.monotonic() < deadline and not (here / "arrived").exists():
                time.sleep(0.05)
            (here / ("in time" if (here / "arrived").exists() else "late")).touch()
        return super().forward(images)

def mortal():
    return with_weights(Mortal())

def waiting():
    return with_weights(Waiting())

def with_weights(network):
    network.load_state_dict(build().state_dict())
    return network.eval()

def absent():
    if "default_worker" in sys.argv[0]:
        raise ValueError("weights are on another machine")
    return build()

def others():
    network = build()
    if "default_worker" in sys.argv[0]:
        network.head.bias.data += 1
    return network
"""


def cluster_path() -> list[str]:
    """The module path of workers."""
    return [str(Path(weakspot.__file__).parents[1]), str(Path(__file__).parents[2])]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine, shared by the tests of this module; audits must leave it running."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'weakspot[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(cluster_path()))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
            logging_level=logging.CRITICAL, object_store_memory=2**28,
        )  # fmt: skip
    yield
    assert ray.is_initialized()
    ray.shutdown()


@pytest.fixture
def mortal(pictures: Path) -> Path:
    """The folder of the pictures, and networks that know whether they are in a worker."""
    (pictures.parent / "checked_networks.py").write_text(CHECKED.replace("{folder}", str(pictures.parent)))
    return pictures


def with_model(pictures: Path, factory: str, **changes: object) -> Any:
    plan = small_plan(pictures, **changes)
    return replace(plan, model=replace(plan.model, spec=f"checked_networks:{factory}"))


@pytest.mark.parametrize("workers", [1, 2])
def test_records_and_maps_equal_those_of_one_process(
    cluster: None,
    pictures: Path,
    workers: int,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (pictures / "dog/notes.txt").write_text("no picture")
    expected = audit(small_plan(pictures), pictures.parent / "expected")
    capfd.readouterr()
    run = audit(small_plan(pictures), pictures.parent / "found", engine="ray", workers=workers)
    assert capfd.readouterr() == ("", "")
    same_records(expected, run)
    same_maps(expected, run)
    assert run.skipped.equals(expected.skipped)
    assert sorted(path.name for path in run.folder.iterdir()) == FILES
    assert run.info.engine["workers"] == workers
    assert run.info.engine["threads"] == 2 // workers
    assert run.plan == expected.plan


def test_a_killed_worker_costs_one_retry(
    cluster: None, mortal: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = audit(small_plan(mortal), mortal.parent / "expected")
    (mortal.parent / "once").touch()
    capfd.readouterr()
    run = audit(with_model(mortal, "mortal"), mortal.parent / "found", engine="ray", workers=2)
    assert capfd.readouterr() == ("", "")
    assert not (mortal.parent / "once").exists()
    same_records(expected, run)
    same_maps(expected, run)


def test_results_arrive_before_their_shard_is_complete(cluster: None, mortal: Path) -> None:
    arrived = mortal.parent / "arrived"
    plan = with_model(mortal, "waiting", shard=14)

    def watch(progress: AuditProgress) -> None:
        if progress.done:
            arrived.touch()

    audit(plan, mortal.parent / "found", engine="ray", workers=1, watch=watch)
    assert (mortal.parent / "in time").exists()


@pytest.mark.kill
def test_a_shard_that_kills_every_worker_stops_the_audit(cluster: None, mortal: Path) -> None:
    out = mortal.parent / "found"
    (mortal.parent / "always").touch()
    firsts = [path.relative_to(mortal).as_posix() for path in sorted(mortal.rglob("*.png"))][::4]
    any_shard = "|".join(rf"shard {number} \({first} .*" for number, first in enumerate(firsts))
    with pytest.raises(StoppedError, match=rf"({any_shard}) was given up after 3 workers") as raised:
        audit(with_model(mortal, "mortal"), out, engine="ray", workers=1)
    assert raised.value.resumable
    assert "\n" not in str(raised.value)
    (mortal.parent / "always").unlink()
    same_records(audit(small_plan(mortal), mortal.parent / "expected"), resume(out))


@pytest.mark.parametrize(
    ("factory", "sentence"),
    [
        ("absent", "weights are on another machine"),
        ("others", "model checked_networks:others has other weights on the machine"),
    ],
)
def test_exceptions_of_workers_arrive_unchanged(
    cluster: None, mortal: Path, factory: str, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence) as raised:
        audit(with_model(mortal, factory), mortal.parent / "found", engine="ray", workers=1)
    assert "\n" not in str(raised.value)
    assert "ray" not in str(raised.value).lower().replace("array", "")


def test_an_interrupted_audit_leaves_no_worker_and_resumes_with_either_engine(
    cluster: None, pictures: Path
) -> None:
    expected = audit(small_plan(pictures), pictures.parent / "expected")
    out = pictures.parent / "found"

    def stop(progress: Any) -> None:
        if progress.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(small_plan(pictures), out, engine="ray", workers=1, watch=stop)
    # What was done is on the disk: whole shards, or groups of the shard at work.
    assert shard_files(out) or list((out / "unfinished").iterdir())
    run = resume(out)
    same_records(expected, run)
    same_maps(expected, run)
    assert run.info.engine == {"name": "local"}
    assert idle(2)


def idle(cpus: int) -> bool:
    """Whether the whole cluster becomes free within a minute."""
    import ray

    free: Any = ray.available_resources
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if free().get("CPU") == cpus:
            return True
        time.sleep(0.2)
    return False


def test_too_small_clusters_are_refused_at_once(cluster: None, pictures: Path) -> None:
    with pytest.raises(
        ValueError, match="workers must be at most 2, the number of CPUs of the Ray cluster, got 9"
    ):
        audit(small_plan(pictures), pictures.parent / "found", engine="ray", workers=9)
    with pytest.raises(ValueError, match="the Ray cluster has no GPU"):
        allocation("cuda", 1)
    with (
        pytest.raises(
            ValueError,
            match="ray-address must be left out, got 'auto': this process",
        ),
        open_engine("ray", address="auto"),
    ):
        pass


def test_another_process_joins_a_cluster_by_its_address(cluster: None, pictures: Path) -> None:
    import ray

    expected = audit(small_plan(pictures), pictures.parent / "expected")
    address = ray.get_runtime_context().gcs_address
    program = (
        "import sys; from tests.audit.fixtures import small_plan; from weakspot.audit import audit; "
        "audit(small_plan('pictures'), 'found', engine='ray', workers=2, address=sys.argv[1])"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "ignore:the class activation", "-c", program, address],
        cwd=pictures.parent, capture_output=True, text=True, timeout=200,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*cluster_path(), str(pictures.parent)])},
    )  # fmt: skip
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    run = open_run(pictures.parent / "found")
    assert run.info.engine["workers"] == 2
    same_records(expected, run)
    same_maps(expected, run)
    assert idle(2)  # the cluster outlives the process that joined


def test_workers_share_the_cpus_and_respect_omp_num_threads(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [allocation("cpu", count) for count in (1, 2)] == [(1, 2, 0), (2, 1, 0)]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert allocation("cpu", 1) == (1, 1, 0)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("rya", None, None), "engine must be one of local, ray, got 'rya'"),
        (("ray", 0, None), "workers must be an integer of at least 1, got 0"),
        (("local", 2, None), "workers must be left out for the engine local, got 2"),
        (("local", None, "auto"), "ray-address must be left out for the engine local, got auto"),
    ],
)
def test_unusable_engine_options_are_refused(
    given: tuple[str, int | None, str | None], sentence: str, pictures: Path
) -> None:
    engine, workers, address = given
    with pytest.raises(ValueError, match=sentence):
        audit(small_plan(pictures), pictures.parent / "x", engine=engine, workers=workers, address=address)
    assert not (pictures.parent / "x").exists()


def test_a_missing_ray_names_its_install_command(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"the engine ray needs ray: pip install 'weakspot\[ray\]'"):
        audit(small_plan(pictures), pictures.parent / "x", engine="ray")
    assert not (pictures.parent / "x").exists()


CHILD = """
import sys, torch
torch.set_num_threads(1)
from weakspot.audit import resume
resume(sys.argv[1], engine="ray", workers=2)
"""


def kill_after(out: Path, seconds: float, *, at_work: bool) -> bool:
    """Resume on a cluster of its own and kill all of its process group; returns whether it was still running.

    Args:
        out: folder of the run.
        seconds: after the start or, `at_work`, after the first shard.
        at_work: whether to wait for the first shard.
    """
    before, deadline = len(set(shard_files(out))), time.monotonic() + 120
    source = str(Path(weakspot.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, str(out.parent)])}
    environment.pop("RAY_ADDRESS", None)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(out)],
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while at_work and child.poll() is None and time.monotonic() < deadline:
        if len(set(shard_files(out))) != before:
            break
        time.sleep(0.02)
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        return True
    assert child.returncode == 0, child.communicate()[1]
    return False


@pytest.mark.kill
def test_an_audit_killed_with_its_workers_ends_with_the_same_records(pictures: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'weakspot[ray]'")
    draw_pictures(pictures, 28)
    plan = small_plan(pictures, shard=1, attacks=(AttackPlan("pgd", settings=(("steps", 200),)),))
    expected = audit(plan, pictures.parent / "expected")
    out = pictures.parent / "found"

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(plan, out, watch=stop)
    rng = random.Random(3)  # noqa: S311 - no secret
    finished = []
    for number in range(2):
        at_work = bool(number % 2 == 0)
        if not kill_after(out, rng.uniform(0, 0.5 if at_work else 12), at_work=at_work):
            break
        finished.append(len(set(shard_files(out))))
        records = open_run(out).records
        assert not len(records) or not records.duplicated(["image", "attack", "region"]).any()
    assert finished[-1] > 0, finished
    run = resume(out, engine="ray", workers=2)
    same_records(expected, run)
    same_maps(expected, run)
    assert sorted(path.name for path in out.iterdir()) == FILES
