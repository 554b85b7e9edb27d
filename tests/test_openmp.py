"""Threads spin less where weakspot is the program, and as before in every other process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from weakspot._openmp import ROUNDS, is_own_program

ROOT = Path(__file__).parents[1]
ALL = "import weakspot"
ALONE = f"import runpy; runpy.run_path({str(ROOT / 'src/weakspot/_openmp.py')!r})"  # quicker


@pytest.mark.parametrize(
    ("command", "own"),
    [
        (["python", "-m", "weakspot", "attack"], True),
        (["python", "-u", "-m", "weakspot"], True),
        (["python", "-X", "dev", "-m", "weakspot"], True),
        (["python", "-W", "ignore", "-Xdev", "-m", "weakspot"], True),
        (["python", "-uW", "ignore", "-mweakspot"], True),
        (["python", "--check-hash-based-pycs", "always", "-m", "weakspot"], True),
        (["/usr/bin/python3", "/opt/bin/weakspot", "audit"], True),
        (["python", "-W", "ignore", "study.py", "-m", "weakspot"], False),
        (["python", "-X", "dev", "-c", "import weakspot", "weakspot"], False),
        (["python", "-X"], False),
        (["python", "-m", "pytest", "weakspot"], False),
        (["python", "study.py", "weakspot"], False),
        (["python", "-c", "import weakspot", "weakspot"], False),
        (["python", "-m"], False),
        (["python"], False),
        ([], False),
    ],
)
def test_only_the_program_itself_is_meant(command: list[str], own: bool) -> None:
    assert is_own_program(command) is own


@pytest.mark.parametrize(
    ("as_program", "settings", "load", "printed"),
    [
        (True, {}, ALL, ROUNDS),
        (True, {"GOMP_SPINCOUNT": "7"}, ALONE, "7"),
        (True, {"OMP_WAIT_POLICY": "ACTIVE"}, ALONE, "None"),
        (False, {}, ALONE, "None"),
    ],
    ids=["unset", "rounds", "policy", "not the program"],
)
def test_a_setting_of_the_user_stays(
    tmp_path: Path, as_program: bool, settings: Mapping[str, str], load: str, printed: str
) -> None:
    script = tmp_path / ("weakspot" if as_program else "study.py")
    script.write_text(f"import os; {load}; print(os.environ.get('GOMP_SPINCOUNT'))")
    kept = {
        name: value for name, value in os.environ.items() if name not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    }
    ended = subprocess.run(
        [sys.executable, str(script)],
        env={**kept, "PYTHONPATH": str(ROOT / "src"), "PYTHONSAFEPATH": "1", **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.strip() == printed


def test_an_interrupt_while_torch_is_imported_is_a_sentence() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "weakspot", "--version"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    # Modules are named once they are imported: numpy is, before torch is.
    next(line for line in process.stderr if line.rstrip().endswith(" numpy"))
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == 130
    assert "weakspot: interrupted; nothing was written" in rest
    assert "Traceback" not in rest
