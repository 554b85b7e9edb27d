"""A training that is killed at any moment ends with the weights of an undisturbed one; its folder belongs to it."""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.tiny import Dropping, fresh, halves, quick_train, weights
from weakspot._io.files import LockedError, locked
from weakspot.classifier import Classifier
from weakspot.training import fit

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore:.*lightning.*")]
ROOT = Path(__file__).parents[2]
RESULTS = {"model.safetensors", "training.json"}


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith("backgrounds")}


def interrupt_at(cut: float) -> Any:
    def interrupt(done: float) -> None:
        if done >= cut:
            raise KeyboardInterrupt

    return interrupt


@pytest.mark.parametrize("recipe", ["localized", "random_mask", "trades"])
def test_a_training_cut_off_anywhere_resumes_to_the_same_weights(recipe: str, tmp_path: Path) -> None:
    data = halves()
    options: dict[str, Any] = {"recipe": recipe, "epochs": 3, "augment": "crop,flip"}
    undisturbed: list[dict[str, float]] = []
    whole = quick_train(fresh(Dropping), data, on_epoch=undisturbed.append, **options)
    options |= {"out": tmp_path / "run", "save_every": 0.0}  # a checkpoint after every update
    rows: list[dict[str, float]] = []
    for cut in (0.34, 0.5, 0.97):
        with pytest.raises(KeyboardInterrupt):
            quick_train(fresh(Dropping), data, progress=interrupt_at(cut), **options)
    resumed = quick_train(fresh(Dropping), data, on_epoch=rows.append, **options)
    assert torch.equal(weights(whole), weights(resumed))
    assert [row["epoch"] for row in rows] == [3]
    record = json.loads((tmp_path / "run/training.json").read_text())
    assert record["finished"]
    for name in ("epoch", "loss", "learning_rate", "clean", "robust"):
        assert [row[name] for row in record["epochs"]] == [row[name] for row in undisturbed]
    assert written(tmp_path / "run") == RESULTS
    # A finished training is loaded, not repeated.
    assert torch.equal(weights(quick_train(fresh(Dropping), data, **options)), weights(whole))


class Interrupted(nn.Module):
    """Is interrupted in the middle of an update, when batch-norm has moved and the weights have not."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.body, self.at, self.calls = Dropping(), at, 0
        self.average: Tensor
        self.register_buffer("average", torch.zeros(2), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        logits, _ = self.body(images)
        if self.training:
            self.calls += 1
            self.average.copy_(0.9 * self.average + 0.1 * logits.detach().mean(0))
            if self.calls == self.at:
                signal.raise_signal(signal.SIGINT)
        noisy: Tensor = logits + random.random() + 0.01 * self.average  # noqa: S311 - a network that draws
        return noisy


@pytest.mark.parametrize("at", [1, 9, 10])
def test_ctrl_c_in_the_middle_of_an_update_waits_for_its_end(at: int, tmp_path: Path) -> None:
    data = halves()
    handler = signal.getsignal(signal.SIGINT)
    before = random.getstate()
    whole = quick_train(fresh(lambda: Interrupted(-1)), data)
    with pytest.raises(KeyboardInterrupt):
        quick_train(fresh(lambda: Interrupted(at)), data, out=tmp_path, save_every=1e9)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]
    assert state["epoch"] * 9 + state["update"] == at
    resumed = quick_train(fresh(lambda: Interrupted(-1)), data, out=tmp_path)
    assert torch.equal(weights(whole), weights(resumed))
    assert torch.equal(whole.average, resumed.average)  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGINT) is handler
    assert random.getstate() == before
    assert all(weight.grad is None for weight in resumed.parameters())


def test_another_training_in_the_folder_is_refused(tmp_path: Path) -> None:
    images, labels = halves()
    options: dict[str, Any] = {"recipe": "standard", "out": tmp_path, "epochs": 1}
    quick_train(fresh(), (images, labels), **options)
    changed = images.clone()
    changed[7] = 1 - changed[7]
    normalized = Classifier.wrap(fresh(), mean=[0.5], std=[0.5])
    for model, data, message, more in (
        (
            fresh(),
            (images, labels),
            r"other settings \(recipe was standard and is full\)",
            {"recipe": "full"},
        ),
        (fresh(), (images, 1 - labels), "other data", {}),
        (fresh(), (changed, labels), "other data", {}),
        (fresh(seed=5), (images, labels), "other start", {}),
        (normalized, (images, labels), "other start", {}),
    ):
        with pytest.raises(ValueError, match=f"out must not hold another training, got .* with {message}"):
            quick_train(model, data, **options | more)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="out must be a folder, got the file"):
        quick_train(fresh(), (images, labels), **options | {"out": file})


def test_damaged_results_are_named(tmp_path: Path) -> None:
    data, options = halves(), {"recipe": "standard", "out": tmp_path, "epochs": 1}
    quick_train(fresh(), data, **options)
    model, record = tmp_path / "model.safetensors", tmp_path / "training.json"
    content = model.read_bytes()
    assert model.stat().st_mode & 0o044 == record.stat().st_mode & 0o044
    for damage, message in (
        (b"", "is damaged"),
        (content[:-4] + b"\0\0\0\1", "does not hold the weights of its training"),
        (None, "is missing, although the training is finished"),
    ):
        model.unlink()
        if damage is not None:
            model.write_bytes(damage)
        with pytest.raises(ValueError, match=f"model.safetensors {message}.* to start over"):
            quick_train(fresh(), data, **options)
        model.write_bytes(content)
    record.write_text("{")
    with pytest.raises(ValueError, match=r"training.json is damaged.* to start over"):
        quick_train(fresh(), data, **options)


def test_a_damaged_checkpoint_is_named_and_a_pickle_in_its_place_is_not_run(tmp_path: Path) -> None:
    data, options = halves(), {"recipe": "standard", "out": tmp_path}
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        quick_train(fresh(), data, progress=interrupt_at(0.6), **options)
    (tmp_path / "training.json").unlink()
    with pytest.raises(ValueError, match=r"other settings \(recipe was standard and is full\)"):
        quick_train(fresh(), data, **options | {"recipe": "full"})
    for content in (b"", b"PK\x03\x04 no", b"cos\nsystem\n(S'touch pwned'\ntR."):
        checkpoint.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint.pt is damaged"):
            quick_train(fresh(), data, **options)
    torch.save({"format": 0}, checkpoint)
    with pytest.raises(ValueError, match=r"checkpoint.pt must have format 1, got 0"):
        quick_train(fresh(), data, **options)
    assert not (tmp_path / "training.lock").exists()


def test_a_second_training_in_the_folder_is_refused_and_the_first_is_not_disturbed(tmp_path: Path) -> None:
    data, options = halves(), {"save_every": 0.0}
    alone = quick_train(fresh(), data, **options)
    refused = []

    def intrude(row: dict[str, float]) -> None:
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(LockedError, match=f"{tmp_path} is being written by process {os.getpid()} on "):
            quick_train(fresh(), data, out=tmp_path, **options)
        refused.append(row["epoch"])
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    first = quick_train(fresh(), data, out=tmp_path, on_epoch=intrude, **options)
    assert refused == [1, 2]
    assert torch.equal(weights(first), weights(alone))
    assert written(tmp_path) == RESULTS


def test_a_lock_is_released_after_any_end_and_one_left_by_a_dead_process_blocks_nobody(
    tmp_path: Path,
) -> None:
    data, lock = halves(), tmp_path / "training.lock"
    with pytest.raises(KeyboardInterrupt):
        quick_train(fresh(), data, recipe="standard", out=tmp_path, progress=interrupt_at(0))
    assert (tmp_path / "checkpoint.pt").exists()
    assert not lock.exists()
    lock.write_text(json.dumps({"pid": 1, "host": platform.node(), "since": "yesterday"}))  # nobody holds it
    quick_train(fresh(), data, recipe="standard", out=tmp_path)
    assert not lock.exists()


def test_a_training_that_another_process_finished_in_the_meantime_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = halves()
    rows: list[dict[str, float]] = []
    others = []

    @contextmanager
    def late(folder: Path, name: str) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(fit, "locked", locked)
            others.append(quick_train(fresh(), data, out=tmp_path))
        with locked(folder, name):
            yield

    monkeypatch.setattr(fit, "locked", late)
    result = quick_train(fresh(), data, out=tmp_path, on_epoch=rows.append)
    assert len(others) == 1
    assert rows == []
    assert torch.equal(weights(result), weights(others[0]))


# ---------------------------------------------------------------- several processes

KILLED = """
import sys, torch
from pathlib import Path
from tests.training.tiny import Dropping, fresh, halves, quick_train
torch.set_num_threads(1)
quick_train(fresh(Dropping), halves(), recipe="localized", epochs=4, steps=40, out=Path(sys.argv[1]), save_every=0.05)
"""


@pytest.mark.slow
@pytest.mark.kill
def test_a_training_killed_at_random_moments_resumes_to_the_same_weights(tmp_path: Path) -> None:
    def start(out: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", KILLED, str(out)], cwd=ROOT, stderr=subprocess.DEVNULL)

    def saved(out: Path) -> float:
        path = out / "checkpoint.pt"
        return path.stat().st_mtime if path.exists() else 0.0

    assert start(tmp_path / "whole").wait() == 0
    generator = torch.Generator().manual_seed(0)
    killed = 0
    for _ in range(4):
        process = start(tmp_path / "cut")
        before = saved(tmp_path / "cut")
        while process.poll() is None and saved(tmp_path / "cut") == before:
            time.sleep(0.01)
        time.sleep(float(torch.rand((), generator=generator)) * 0.3)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
    assert start(tmp_path / "cut").wait() == 0
    assert killed >= 2
    results = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("cut", "whole")]
    assert results[0] == results[1]


def launch(
    folder: Path, script: str, *arguments: object, processes: int = 2
) -> subprocess.CompletedProcess[str]:
    """Run a script in this many processes of torchrun."""
    path = folder / "script.py"
    path.write_text(
        "import os, sys, torch\nfrom pathlib import Path\nfrom tests.training.tiny import *\n" + script
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    parallel = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [sys.executable, *(parallel if processes > 1 else []), str(path), *map(str, arguments)],
        env=environment, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip


ALL_RECIPES = """
import atexit
atexit.register(lambda: print('connected:', torch.distributed.is_initialized()))  # runs last
for recipe in ('full', 'localized', 'random_mask', 'noise'):
    quick_train(fresh(), halves(), recipe=recipe, out=Path(sys.argv[1], recipe))
"""


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for count, out in ((1, "one"), (2, "two")):
        ended = launch(tmp_path, ALL_RECIPES, tmp_path / out, processes=count)
        assert ended.returncode == 0, ended.stderr
        assert "connected: False" in ended.stdout
        assert "connected: True" not in ended.stdout
    for recipe in ("full", "localized", "random_mask", "noise"):
        one, two = (load_file(tmp_path / out / recipe / "model.safetensors") for out in ("one", "two"))
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


STATISTICS = """
def crash(row):
    if row['epoch'] == 1 and sys.argv[2] == 'crash':
        os._exit(3)
result = quick_train(fresh(Dropping), halves(), epochs=3, out=Path(sys.argv[1]), on_epoch=crash)
Path(sys.argv[1], 'rank' + os.environ['RANK']).write_bytes(weights(result).numpy().tobytes())
"""


@pytest.mark.slow
def test_two_processes_have_one_set_of_statistics_and_resume_with_it(tmp_path: Path) -> None:
    """Each updates its own batch-norm; adversary, checkpoint and result use those of the first process in all."""
    for out, mode, code in (("whole", "run", 0), ("cut", "crash", 1), ("cut", "run", 0)):
        ended = launch(tmp_path, STATISTICS, tmp_path / out, mode)
        assert ended.returncode == code, ended.stderr[-2000:]
    results = {(tmp_path / out / f"rank{rank}").read_bytes() for out in ("whole", "cut") for rank in range(2)}
    assert len(results) == 1


LOCKED = """
try:
    quick_train(fresh(), halves(), out=Path(sys.argv[1]) / 'run')
    outcome = 'trained'
except ValueError as error:
    outcome = str(error)
Path(sys.argv[1], 'rank' + os.environ['RANK']).write_text(outcome)
"""


@pytest.mark.slow
def test_two_processes_take_the_lock_once_and_are_both_refused_if_it_is_held(tmp_path: Path) -> None:
    def outcomes() -> set[str]:
        ended = launch(tmp_path, LOCKED, tmp_path)
        assert ended.returncode == 0, ended.stderr[-2000:]
        return {(tmp_path / f"rank{rank}").read_text() for rank in range(2)}

    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run", "training.lock"):
        (refusal,) = outcomes()
    assert f"is being written by process {os.getpid()} on" in refusal
    assert written(tmp_path / "run") == set()
    assert outcomes() == {"trained"}
    assert written(tmp_path / "run") == RESULTS
