"""What a crash costs an audit: photographs attacked by pgd and fmn, killed at random moments and resumed.

Run: python -m benchmarks.crashes [--photographs 16] [--kills 20] [--steps 100] [--longest SECONDS] [--analyses NAMES]
[--seed 0]. The photographs are the sample photographs and parts of them. The audit runs in a process of its own, which
SIGKILL ends. Lost is the time between the last write and the kill, or between the start of the work and the kill if
nothing was written. At the end, records and maps are compared bit by bit with those of an audit that was never
interrupted.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from PIL import Image

from weakspot.audit import AttackPlan, Plan, Run, audit, open_run
from weakspot.audit.store.records import TIMES
from weakspot.images import sample_images

LIMIT = 30.0  # seconds
CHILD = """
import sys
from weakspot.audit import resume
resume(sys.argv[1], watch=lambda progress: print(progress.done, flush=True))
"""


def photographs(folder: Path, count: int) -> Path:
    """Real photographs, or sample photographs followed by their corners, as PNG files."""
    folder.mkdir()
    images, _ = sample_images()
    pictures = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    corners = [
        picture[y : y + 150, x : x + 150]
        for y, x in ((0, 0), (0, 74), (74, 0), (74, 74))
        for picture in pictures
    ]
    for number, pixels in enumerate([*pictures, *corners][:count]):
        Image.fromarray(pixels).resize((224, 224)).save(folder / f"{number:02d}.png")
    return folder


def killed(out: Path, seconds: float) -> tuple[float, bool]:
    """Resume in another process and kill it after so many seconds of work; the seconds lost, and whether it ran."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(out)], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    first = child.stdout.readline() if child.stdout else ""  # the audit has been checked, and the work starts
    began = time.time()
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        stored = [
            path.stat().st_mtime for name in ("unfinished", "shards") for path in (out / name).glob("[0-9]*")
        ]
        return time.time() - max([began, *stored]), True
    if child.returncode or not first:
        sys.exit(f"the audit ended with {child.returncode}")
    return 0.0, False


def same(one: Run, other: Run) -> bool:
    left, right = (run.records.drop(columns=list(TIMES)) for run in (one, other))
    pd.testing.assert_frame_equal(left, right, check_exact=True)
    for name, stored in one.maps.items():
        np.testing.assert_array_equal(stored[:], other.maps[name][:], err_msg=name)
    return list(one.maps) == list(other.maps)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photographs", type=int, default=16)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100, help="of fmn; pgd takes a fifth")
    parser.add_argument("--longest", type=float, default=40.0, help="seconds of work before a kill")
    parser.add_argument("--analyses", default="")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    attacks = (
        AttackPlan("pgd", settings=(("steps", max(1, options.steps // 5)),)),
        AttackPlan("fmn", settings=(("steps", options.steps),)),
    )
    analyses = tuple(name for name in options.analyses.split(",") if name)
    rng = random.Random(options.seed)  # noqa: S311 - no secret
    with TemporaryDirectory() as name:
        source = photographs(Path(name, "photographs"), options.photographs)
        plan = Plan((str(source),), attacks=attacks, analyses=analyses)
        begun = time.perf_counter()
        whole = audit(plan, Path(name, "whole"))
        seconds = time.perf_counter() - begun
        group = whole.plan.group
        print(f"never interrupted: {seconds:.0f} s, groups of {group} images", flush=True)
        out = Path(name, "cut")

        def stop(_: object) -> None:
            raise KeyboardInterrupt

        try:
            audit(plan, out, watch=stop)
        except KeyboardInterrupt as interrupt:
            print(interrupt, flush=True)
        lost: list[float] = []
        while len(lost) < options.kills:
            cost, running = killed(out, rng.uniform(0, options.longest))
            if not running:
                break
            lost.append(cost)
            print(f"kill {len(lost)}: {cost:.1f} s lost", flush=True)
        while not open_run(out).complete:
            killed(out, 10 * seconds)
        equal = "bit-identical" if same(whole, open_run(out)) else "different"
        print(
            "\n| photographs | attacks | kills | most lost | median lost | records and maps |\n"
            "|---|---|---|---|---|---|\n"
            f"| {options.photographs} | pgd {max(1, options.steps // 5)}, fmn {options.steps} | {len(lost)} | "
            f"{max(lost):.1f} s | {np.median(lost):.1f} s | {equal} |"
        )
    if max(lost) > LIMIT:
        sys.exit(f"more than {LIMIT:.0f} s were lost")


if __name__ == "__main__":
    main()
