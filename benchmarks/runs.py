"""The cost of an audit: overhead, several workers, resuming, and memory.

Run: python -m benchmarks.runs [SECTION ...]. Sections: overhead (compared with direct calls of the same attacks and
analyses), ray (one and two workers, one thread each), resume (killed halfway and resumed, compared with an undisturbed
audit), memory (peak for 1,000 and 10,000 images). CIFAR-10 and ResNet-20 of the folder that WEAKSPOT_DATA names.
"""

from __future__ import annotations

import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

import weakspot
from benchmarks import real, sections
from weakspot.attacks import AttackOptions, find_attack
from weakspot.audit import AttackPlan, AuditProgress, ModelPlan, Plan, audit
from weakspot.regions import read_region

MODEL = ModelPlan("benchmarks.real:resnet20", size=(32, 32))
ATTACKS = (AttackPlan("pgd", "linf:2/255"), AttackPlan("fmn", settings=(("steps", 20),)))
REGIONS = ("none", "cam")
ANALYSES = ("overlap", "ssim")
ROUNDS = 2  # after one that is not counted


def photographs(folder: Path, count: int) -> Path:
    """The first test images of CIFAR-10 as one array with labels."""
    images, labels = real.networks().cifar10(count=count)
    path = folder / f"cifar{count}.npz"
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    np.savez(path, images=pixels, labels=labels.numpy())
    return path


def overhead(count: int = 192) -> None:
    """Images are read, attacked in regions and explained: by an audit, and by direct calls in batches of a shard."""
    if not real.available():
        return
    with TemporaryDirectory() as name:
        folder = Path(name)
        source = photographs(folder, count)
        audited, bare, spent = [], [], []
        for number in range(ROUNDS + 1):
            plan = Plan((str(source),), MODEL, ATTACKS, REGIONS, analyses=ANALYSES)
            begun, cpu = time.perf_counter(), time.process_time()
            audit(plan, folder / f"run{number}")
            middle, cpu_middle = time.perf_counter(), time.process_time()
            by_hand(source, 128)
            end, cpu_end = time.perf_counter(), time.process_time()
            if number:
                audited.append(middle - begun)
                bare.append(end - middle)
                spent.append((cpu_middle - cpu) / (cpu_end - cpu_middle))
    ratios = [one / other for one, other in zip(audited, bare, strict=True)]
    print(
        f"\n| ResNet-20, {count} CIFAR-10 images, {len(ATTACKS)} attacks, {len(REGIONS)} regions, "
        f"{len(ANALYSES)} analyses | median | of direct calls | range | CPU time of direct calls |\n"
        "|---|---|---|---|---|\n"
        f"| direct calls | {statistics.median(bare):.1f} s | 1.00 | | |\n"
        f"| audit, maps and all | {statistics.median(audited):.1f} s | {statistics.median(ratios):.2f} | "
        f"{min(ratios):.2f} to {max(ratios):.2f} | {statistics.median(spent):.2f} |",
        flush=True,
    )


def by_hand(source: Path, batch: int) -> None:
    """The calls of the audit, without records, maps and checks."""
    model = weakspot.load(MODEL.spec, input_size=(32, 32))
    with np.load(source) as arrays:
        pixels, labels = arrays["images"], torch.from_numpy(arrays["labels"])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    for batch_images, batch_labels in zip(images.split(batch), labels.split(batch), strict=True):
        places = {text: read_region(text, model, batch_images, batch_labels) for text in REGIONS}
        for attack in ATTACKS:
            for region in places.values():
                pairs = find_attack(attack.name).run(
                    model,
                    batch_images,
                    batch_labels,
                    AttackOptions(attack.parsed_budget(), region),
                    attack.own_settings(),
                )
                weakspot.explain(model, pairs, analyses=ANALYSES)


def command(source: Path, out: Path, *options: str) -> list[str]:
    """`weakspot audit` on one thread."""
    return [
        sys.executable, "-m", "weakspot", "audit", str(source), "--model", MODEL.spec, "--size", "32x32",
        "--out", str(out), "--quiet", *options,
    ]  # fmt: skip


def one_thread() -> dict[str, str]:
    here = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": here,
        "WEAKSPOT_DATA": str(real.FOLDER.absolute()),
    }


def ray(count: int = 2048, steps: int = 20) -> None:
    """Images per second after the first shard of every worker, and total seconds including the start of Ray."""
    if not real.available():
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # of each worker
    print(
        f"\n| {count} CIFAR-10 images, ResNet-20, PGD-{steps}, one thread for each worker | seconds in all "
        "| images/s at work | times 1 worker |\n|---|---|---|---|"
    )
    with TemporaryDirectory() as name:
        folder = Path(name)
        source = photographs(folder, count)
        attack = AttackPlan("pgd", "linf:2/255", settings=(("steps", steps),))
        for number in range(2):
            speeds: list[float] = []
            for workers in (1, 2):
                seen: list[tuple[float, float]] = []

                def watch(standing: AuditProgress, seen: list[tuple[float, float]] = seen) -> None:
                    seen.append((time.perf_counter(), standing.done))

                plan = Plan((str(source),), MODEL, (attack,), ("none",), analyses=(), maps=False)
                begun = time.perf_counter()
                audit(plan, folder / f"{workers} {number}", engine="ray", workers=workers, watch=watch)
                whole = time.perf_counter() - begun
                start = next(mark for mark in seen if mark[1] >= workers * 128)
                end = next(mark for mark in seen if mark[1] == count)
                speeds.append((end[1] - start[1]) / (end[0] - start[0]))
                print(
                    f"| Ray, {workers} | {whole:.1f} | {speeds[-1]:.1f} | {speeds[-1] / speeds[0]:.2f} |",
                    flush=True,
                )


def resume(count: int = 256) -> None:
    """Seconds of an audit that is killed after half of its shards and resumed, and of an undisturbed one."""
    if not real.available():
        return
    options = ("--set", "pgd.steps=30", "--analyses", "overlap")
    print(f"\n| {count} CIFAR-10 images, PGD-30, overlap, one thread | seconds |\n|---|---|")
    with TemporaryDirectory() as name:
        folder = Path(name)
        source = photographs(folder, count)
        for number in range(2):
            begun = time.perf_counter()
            subprocess.run(command(source, folder / f"whole{number}", *options), check=True, env=one_thread())
            whole = time.perf_counter() - begun
            out = folder / f"cut{number}"
            begun = time.perf_counter()
            cut = subprocess.Popen(command(source, out, *options), env=one_thread())
            while len(list(out.glob("shards/[0-9]*.parquet"))) < count // 128 // 2:
                time.sleep(0.05)
            cut.send_signal(signal.SIGKILL)
            cut.wait()
            first = time.perf_counter() - begun
            begun = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "weakspot", "audit", "--resume", str(out), "--quiet"],
                check=True,
                env=one_thread(),
            )
            second = time.perf_counter() - begun
            print(
                f"| never stopped | {whole:.1f} |\n| killed and resumed | {first:.1f} + {second:.1f}, "
                f"{(first + second) / whole:.2f} of it |",
                flush=True,
            )


def memory(counts: Sequence[int] = (1000, 10_000)) -> None:
    """Peak resident memory of the command, by the system."""
    if not real.available():
        return
    print(
        "\n| CIFAR-10 images, FGSM, overlap, with maps | seconds | peak | of the first |\n|---|---|---|---|"
    )
    with TemporaryDirectory() as name:
        folder, peaks = Path(name), []
        for count in counts:
            source = photographs(folder, count)
            begun = time.perf_counter()
            watched = subprocess.Popen(
                command(source, folder / f"run{count}", "--attacks", "fgsm", "--analyses", "overlap"),
                env=one_thread(),
            )
            _, status, used = os.wait4(watched.pid, 0)
            if status:
                sys.exit(f"the audit of {count} images ended with {status}")
            seconds = time.perf_counter() - begun
            peaks.append(_megabytes(used))
            print(
                f"| {count} | {seconds:.0f} | {peaks[-1]:.0f} MB | {peaks[-1] / peaks[0]:.2f} |", flush=True
            )


def _megabytes(used: resource.struct_rusage) -> float:
    return used.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


SECTIONS: dict[str, Callable[[], None]] = {
    "overhead": overhead,
    "ray": ray,
    "resume": resume,
    "memory": memory,
}

if __name__ == "__main__":
    sections.run(SECTIONS)
