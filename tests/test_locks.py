"""The lock: one writer; the dead hold nothing."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from weakspot._io.files import LockedError, locked

FILE = "held.lock"

HOLDER = """
import sys, time
from pathlib import Path
from weakspot._io.files import locked
with locked(Path(sys.argv[1]), "held.lock"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_learns_the_holder_and_a_dead_holder_blocks_nobody(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(LockedError, match=f"is being written by process {holder.pid} on "),
            locked(tmp_path, FILE),
        ):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (tmp_path / FILE).exists()
    with locked(tmp_path, FILE), pytest.raises(LockedError), locked(tmp_path, FILE):
        pass
    assert not (tmp_path / FILE).exists()


def test_a_lock_of_another_machine_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(
        json.dumps({"pid": 1, "host": platform.node() + "-other", "since": "yesterday"})
    )
    with (
        pytest.raises(LockedError, match=r"if that process is dead, delete .*held\.lock"),
        locked(tmp_path, FILE),
    ):
        pass


@pytest.mark.parametrize("left", ["", "{", "[]", '{"pid": 4194304}'])
def test_a_file_that_nobody_holds_is_no_lock(tmp_path: Path, left: str) -> None:
    (tmp_path / FILE).write_text(left)
    with locked(tmp_path, FILE):
        assert (tmp_path / FILE).exists()


FORKING = """
import os, sys, time
from pathlib import Path
from weakspot._io.files import locked
with locked(Path(sys.argv[1]), "held.lock"):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system forks no processes")
def test_a_child_that_outlives_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", FORKING, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(LockedError, match=f"process {holder.pid} on "), locked(tmp_path, FILE):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        os.kill(child, 0)  # it lives
        with locked(tmp_path, FILE):
            pass
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)


def test_locks_of_two_names_in_one_folder_are_two(tmp_path: Path) -> None:
    with (
        locked(tmp_path, FILE),
        locked(tmp_path, "other.lock"),
        pytest.raises(LockedError),
        locked(tmp_path, FILE),
    ):
        pass
