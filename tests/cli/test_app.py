"""The application: help, refusals, exit codes, interrupts and models that exit, for all commands."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.core import TyperGroup

import weakspot
from tests.cli.conftest import NETWORKS, TINY, Run
from weakspot import Classifier, Linf, attacks
from weakspot._errors import ModelError
from weakspot.cli import doctor
from weakspot.cli.app import Failure, app, explained
from weakspot.cli.output import busy_remark

COMMANDS = (
    "explain",
    "attack",
    "audit",
    "map",
    "certify",
    "compare",
    "report",
    "defend",
    "dissect",
    "train",
    "models",
    "doctor",
)
# Options whose meaning depends on the command: on what is trained, or on what a plan.toml may hold.
OWN = {
    "train": {
        "--model",
        "--budget",
        "--steps",
        "--size",
        "--limit",
        "--batch-size",
        "--workers",
        "--list",
        "--quick",
    },
    "audit": {"--out", "--labels", "--set", "--steps", "--resume"},
    "dissect": {"--out", "--quick"},
    "explain": {"--quick"},  # each leaves out something else
    "defend": {"--quick"},
    "map": {"--quick"},  # no attack is chosen by name
    "certify": {"--quick"},
}


def parameters(command: str) -> dict[str, Any]:
    """The options of a command by their long name."""
    group: Any = typer.main.get_command(app)
    return {
        max(parameter.opts, key=len): parameter
        for parameter in group.commands[command].params
        if parameter.opts[0].startswith("-")
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_fits_80_columns_and_has_an_example(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ended = run(command, "--help")
    assert ended.code == 0
    assert max(map(len, ended.out.splitlines())) <= 80
    assert f"weakspot {command}" in ended.out.partition("Example")[2]
    assert "\\[" not in ended.out
    for option, parameter in parameters(command).items():
        assert parameter.help, option
        assert parameter.help[-1] == ".", option


def test_an_option_has_one_meaning_and_one_default_in_all_commands() -> None:
    first: dict[str, Any] = {}
    for command in COMMANDS:
        for name, parameter in parameters(command).items():
            if name in OWN.get(command, ()):
                continue
            known = first.setdefault(name, parameter)
            same = known.help == parameter.help or name == "--out"
            assert same, f"{command} {name}"
            if name not in {"--out", "--steps", "--analyses"}:  # whose defaults differ with the work
                assert known.default == parameter.default, f"{command} {name}"


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (Failure("no images were named"), 2, "no images were named"),
        (Failure("x.png: no such file", 4), 4, "x.png: no such file"),
        (ValueError("eps must be positive, got 0"), 2, "eps must be positive, got 0"),
        (FileNotFoundError("labels.csv does not exist"), 4, "labels.csv does not exist"),
        (OSError(28, "No space left on device"), 4, "[Errno 28] No space left on device"),
        (PermissionError(), 4, "PermissionError"),
        (ModelError("the model raised SystemExit: 0"), 1, "the model raised SystemExit: 0"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
        (
            ModuleNotFoundError("No module named 'duckdb'", name="duckdb"),
            2,
            "duckdb is not installed; run: pip install 'weakspot[audit]'",
        ),
        (
            TypeError("unsupported\nand more"),
            1,
            "unexpected TypeError: unsupported (run again with --debug to see the traceback)",
        ),
    ],
)
def test_an_exception_is_one_sentence_and_an_exit_code(
    error: BaseException, code: int, sentence: str
) -> None:
    assert explained(error) == (sentence, code)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--fast",), "unknown option --fast; see weakspot --help"),
        (("explain", "--regoin", "cam"), "unknown option --regoin (did you mean --region?)"),
        (("explian",), "no such command 'explian'. Did you mean 'explain'?; see weakspot --help"),
        (("compare", "runs/v7"), "missing argument 'AFTER'; see weakspot compare --help"),
        (
            ("explain", "--steps", "x"),
            "--steps must be a valid integer, got 'x'; see weakspot explain --help",
        ),
        (("explain", "--steps"), "option '--steps' requires an argument; see weakspot explain --help"),
        (("explain",), "no images were named (give files, folders, or --samples)"),
        (("",), "arguments must not be empty, got weakspot ''"),
        (("map", ""), "arguments must not be empty, got map '' (an empty shell variable?)"),
        (("dissect", ""), "arguments must not be empty, got dissect ''"),
        (("audit", "photos", "--out", ""), "arguments must not be empty, got --out ''"),
        (("train", "photos", "--out="), "arguments must not be empty, got --out= (an empty shell"),
    ],
)
def test_a_command_line_that_cannot_be_parsed_is_one_sentence(
    run: Run, arguments: tuple[str, ...], sentence: str
) -> None:
    ended = run(*arguments)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert sentence in ended.err


def test_no_command_prints_the_help_and_the_version_is_printed(run: Run) -> None:
    ended = run()
    assert (ended.code, "Usage: weakspot" in ended.out, ended.err) == (2, True, "")
    assert run("--version").out == f"weakspot {weakspot.__version__}\n"


def test_debug_shows_the_traceback(run: Run) -> None:
    with pytest.raises(Failure, match="no images were named"):
        run("explain", "--debug")


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("command", "where"),
    [
        (("explain", *TINY, "--steps", 3), "weakspot.attacks.pgd"),
        (("explain", *TINY, "--debug"), "weakspot.cli.session.load_classifier"),
        (("attack", *TINY), "weakspot.cli.attack_choice.ChosenAttack.run"),
        (("defend", *TINY), "weakspot.cli.defend.evaluate_defense"),
        (("dissect", "--demo", *TINY), "weakspot.cli.dissect._last_layers"),
    ],
)
def test_an_interrupt_before_anything_is_written_says_so(
    run: Run, photographs: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], where: str
) -> None:
    Path("run").mkdir()
    for name in ("run.json", "scores.csv", "notes.txt"):
        Path("run", name).write_text("from an earlier run")
    if command[0] == "dissect":
        assert run(*command, "--out", "run", "--quiet").code == 0
    monkeypatch.setattr(where, interrupt)
    ended = run(*command, *([] if "--demo" in command else [photographs]), "--out", "run")
    assert (ended.code, ended.out) == (130, "")
    assert ended.err == "weakspot: interrupted; nothing was written\n"


@pytest.mark.parametrize(
    ("command", "where", "written"),
    [
        (("explain",), "weakspot.audit.store.run._save_maps", "report.html, pairs.safetensors"),
        (
            ("attack", "--set", "steps=1"),
            "weakspot.report.figures.contact_sheet",
            "clean/ (1 file), adversarial/ (1 file)",
        ),
        (("defend", "--steps", 1, "--queries", 4), "weakspot.report.figures.accuracy_figure", "defense.json"),
    ],
)
def test_an_interrupt_names_the_files_written_by_this_run(
    run: Run,
    photographs: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    where: str,
    written: str,
) -> None:
    Path("run").mkdir()
    Path("run/defense.csv").write_text("from an earlier run")
    Path("run/notes.txt").write_text("from somebody else")
    monkeypatch.setattr(where, interrupt)
    analyses = ("--steps", 1, "--analyses", "ssim") if command[0] == "explain" else ()
    arguments = (*command, photographs / "coffee.png", *TINY, *analyses, "--out", "run")
    ended = run(*arguments)
    assert ended.code == 130
    assert ended.err == f"weakspot: interrupted; written to run so far: {written}\n"
    assert run(*arguments).err == ended.err  # files that are overwritten count too


def test_an_interrupt_outside_a_session_says_what_is_known(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("weakspot.cli.doctor.print_rows", interrupt)
        ended = run("models")
    assert (ended.code, ended.err) == (130, "weakspot: interrupted\n")
    monkeypatch.setattr(TyperGroup, "make_context", interrupt)
    ended = run("explain", "--samples")
    assert (ended.code, ended.err) == (130, "weakspot: interrupted; nothing was written\n")


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_an_attack_is_one_sentence(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny_networks.py").write_text(NETWORKS)
    child = subprocess.Popen(
        [
            sys.executable, "-m", "weakspot", "explain", str(photographs), *TINY, "--steps", "100000", "--out", "run",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(weakspot.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "run").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (130, "")
    lines = [line for line in err.splitlines() if not line.startswith("note: this machine is busy")]
    assert lines[-1] == "weakspot: interrupted; nothing was written"
    assert all(line.endswith((" so far", " left")) for line in lines[:-1])


LEAVING = """
import torch
from tiny_networks import build

class Leaving(type(build())):
    def forward(self, images):
        raise SystemExit(0)

class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(context, logits):
        return logits.clone()

    @staticmethod
    def backward(context, gradient):
        raise SystemExit(0)

class Behind(type(build())):
    def forward(self, images):
        return Backwards.apply(super().forward(images))

def made(kind):
    network = kind(*build())
    return network.eval()

def always(): return made(Leaving)
def behind(): return made(Behind)
def factory(): raise SystemExit(0)
"""


@pytest.mark.parametrize(
    ("factory", "command"),
    [
        ("always", ("audit", "photos", "--out", "made", "--fail-if", "robust_accuracy < 0", "--junit", "gate.xml")),
        ("behind", ("audit", "photos", "--out", "made", "--fail-if", "robust_accuracy < 0", "--junit", "gate.xml")),
        ("behind", ("attack", "photos", "--out", "made")),
        ("behind", ("explain", "photos", "--out", "made")),
        ("behind", ("defend", "photos", "--out", "made", "--steps", "1", "--queries", "1")),
        ("always", ("dissect", "--demo", "--out", "made")),
        ("factory", ("explain", "photos", "--out", "made")),
        ("factory", ("train", "set.npz", "--out", "made", "--epochs", "1", "--batch-size", "8")),
        ("behind", ("train", "set.npz", "--out", "made", "--epochs", "1", "--batch-size", "8")),
    ],
    ids=lambda part: part if isinstance(part, str) else part[0],
)  # fmt: skip
def test_a_model_that_exits_ends_no_command_with_success(
    run: Run, photographs: Path, tmp_path: Path, factory: str, command: tuple[str, ...]
) -> None:
    (tmp_path / "leaving_networks.py").write_text(LEAVING)
    (tmp_path / "gate.xml").write_text("<testsuites failures='0'/>")
    np.savez(
        tmp_path / "set.npz",
        images=np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8),
        labels=np.arange(40) % 4,
    )
    size = () if command[0] == "train" else ("--size", "32x32")
    ended = run(*command, "--model", f"leaving_networks:{factory}", *size)
    sys.modules.pop("leaving_networks")
    assert ended.code not in {0, None}, ended.out
    assert "SystemExit: 0" in ended.err
    assert (tmp_path / "gate.xml").exists() != (command[0] == "audit")


def test_models_and_doctor_list_what_is_missing(run: Run) -> None:
    rows = {row["model"]: row["usable"] for row in json.loads(run("models", "--json").out)}
    assert rows["efficientnet_lite0"] == "yes"
    assert {"hf:DIRECTORY", "timm:NAME", "torchvision:NAME", "model.pt2", "package.module:factory"} < set(
        rows
    )
    ended = run("doctor", "--json")
    assert ended.code == 0, ended.out + ended.err
    checks = {row["check"]: row["result"] for row in json.loads(ended.out)}
    assert checks["result"] == "everything works"
    assert checks["analyses"].startswith("weak_spots, cam, ssim, overlap")
    assert checks["extra audit"].endswith("for audit, compare, report")


def test_an_extra_is_missing_only_if_its_own_module_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("needy", "import weakspot_needs_this"), ("silent", "raise ImportError")):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor.installed(["absent"], "one") == "absent is not installed; run: pip install 'weakspot[one]'"
    assert doctor.installed(["needy"], "one").startswith(
        "needy is installed but cannot be imported: ModuleNotFoundError: No module named 'weakspot_needs_this'"
    )
    assert doctor.installed(["silent"], "one").startswith(
        "silent is installed but cannot be imported: ImportError"
    )


@pytest.mark.slow
def test_the_doctor_names_what_does_not_work(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def result() -> tuple[int, str]:
        ended = run("doctor", "--json")
        return ended.code, {row["check"]: row["result"] for row in json.loads(ended.out)}["result"]

    monkeypatch.setattr(doctor, "_compare_threads", lambda *_: "")
    monkeypatch.setattr(
        doctor, "installed", lambda _, extra: f"{extra} {doctor.BROKEN}" if extra == "ray" else "yes"
    )
    assert result() == (0, "the network works, but not extra ray")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    rows = json.loads(run("doctor", "--json").out)
    assert {row["check"]: row["result"] for row in rows}["device"] == "cpu, 1 thread"
    # The predictions are right, and no photograph is fooled.
    kept = attacks.pgd

    def weak(*arguments: object, **options: object) -> object:
        return kept(*arguments, **options | {"budget": Linf(1e-9)})  # type: ignore[arg-type]

    monkeypatch.setattr(doctor, "pgd", weak)
    assert result() == (1, "the attack should fool a photograph")


@pytest.mark.parametrize(
    ("load", "alone", "advice"),
    [
        (0.1, 0.5, ": give --threads 1 for single images"),
        (9.0, 0.5, "while this machine is busy"),
        (9.0, 2.0, "cores"),
    ],
)
def test_a_machine_is_called_busy_only_if_it_is(
    load: float, alone: float, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(doctor, "_seconds_per_pass", lambda *_: alone)
    wrapped = Classifier.wrap(torch.nn.Linear(1, 1))
    assert doctor._compare_threads(wrapped, torch.zeros(1), 1.0).endswith(advice)


def test_every_command_takes_threads(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run("models", "--threads", 3).code == 0
    assert (chosen, os.environ["OMP_NUM_THREADS"]) == ([3], "3")
    run("models")
    assert chosen == [3]
    assert run("models", "--threads", 0).code == 2
    for name in app.registered_commands:
        assert name.callback is not None
        assert "threads" in inspect.signature(name.callback).parameters


def test_a_busy_machine_is_remarked_on_only_if_threads_can_get_in_each_others_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for threads, load, remarked in ((4, 9.0, True), (4, 4.0, False), (1, 9.0, False)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0, 0))
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert (busy_remark() is not None) == remarked
    monkeypatch.delattr(os, "getloadavg")  # as on Windows
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert busy_remark() is None
