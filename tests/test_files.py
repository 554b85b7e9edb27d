"""Files are there whole, or not at all; pipes and links stay what they are."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from weakspot._io.files import write_atomic


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def fail(draft: Path) -> None:
        draft.write_text("half")
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write_atomic(path, fail)
    assert path.read_text() == "before"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("durable", [True, False])
def test_the_target_of_a_link_is_replaced_and_the_link_stays(tmp_path: Path, durable: bool) -> None:
    (tmp_path / "target").write_text("before")
    (tmp_path / "link").symlink_to("target")
    write_atomic(tmp_path / "link", lambda draft: draft.write_text("after"), durable=durable)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "after"


def test_threads_that_write_one_file_have_a_draft_each(tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=10)

    def write(draft: Path) -> None:
        draft.write_text("whole")
        both.wait()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: write_atomic(tmp_path / "file", write), range(2)))
    assert (tmp_path / "file").read_text() == "whole"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes by name there")
def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_atomic(pipe, lambda draft: draft.write_text("after"))
    reader.join(10)
    assert read == ["after"]
    assert pipe.is_fifo()
