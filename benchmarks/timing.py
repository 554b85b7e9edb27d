"""Timing within one run: jobs take turns, and tables have medians, ranges and ratios."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path


def alternate(jobs: Mapping[str, Callable[[], object]], rounds: int = 5) -> dict[str, list[float]]:
    """Seconds of every job in every round. Jobs take turns, so that the machine's drift affects all of them."""
    for job in jobs.values():
        job()
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            begun = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def show(title: str, seconds: Mapping[str, list[float]], floor: str) -> None:
    """A table of medians, ranges and the median of round-by-round ratios to `floor`."""
    print(f"\n{title}\n| job | median | range | times the floor |\n|---|---|---|---|")
    for name, values in seconds.items():
        ratio = statistics.median(value / base for value, base in zip(values, seconds[floor], strict=True))
        print(
            f"| {name} | {1000 * statistics.median(values):.0f} ms | {1000 * min(values):.0f} to "
            f"{1000 * max(values):.0f} ms | {ratio:.2f} |"
        )


def peak_gigabytes() -> float:
    """The most memory this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


def peak_of(job: Callable[[], object]) -> tuple[float, float]:
    """The peak memory of this process during the job, and how much of it was added by the job, in megabytes.

    Linux only: the kernel's high-water mark is reset first.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    job()
    peak = _status("VmHWM")
    return peak, peak - before


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name)) / 1000
