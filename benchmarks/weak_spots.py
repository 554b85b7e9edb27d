"""The weak-spot map beside the best of several references: sizes per cell, cells missed, ranks, CPU seconds.

Run: python -m benchmarks.weak_spots reference|measure|table|regions FOLDER [--network efficientnet|resnet20]
[--images N] [--every K] [--minutes M] [--json FILE].

- reference: for every K-th cell, the smallest size over `fmn` with 300 steps, foolbox's FMN with 300 steps, and PGD at
  bisected radii toward each of three runner-up classes. It stops after M minutes.
- measure: the search of `weak_spots` in the cells whose reference is complete.
- regions: `minimal_pgd` inside the class activation and the background beside the same references.
- table: ratios of sizes to the reference, and how they fall with the number of passes.

Every result is a JSON file in FOLDER, one per image, which grows cell by cell: a run that is stopped resumes.
Photographs: the four samples, then ImageNet's of the folder that WEAKSPOT_DATA names; for ResNet-20, CIFAR-10 test
images that it classifies correctly. Sizes are L-infinity in units of 1/255.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers, real
from benchmarks.records import recorded
from weakspot import load, sample_images
from weakspot.attacks import minimal_pgd
from weakspot.attacks.best_so_far import BestSoFar
from weakspot.attacks.confined import cropped
from weakspot.attacks.context import AttackOptions, Problem, attack_context
from weakspot.attacks.first_order import cell_numbers, estimate_places, linearize
from weakspot.attacks.losses import margin
from weakspot.attacks.minimum_norm import NORMS, walk
from weakspot.attacks.smallest_change import SmallestChange, Starts
from weakspot.regions import background, cam

STEPS = 300
RUNGS, RUNG_STEPS, CLASSES = 9, 20, 3
AT_ONCE = 7  # cells between two writes
GRIDS = {"efficientnet": 7, "resnet20": 8}


@dataclass(frozen=True)
class Case:
    """A network, an image (1, C, H, W) and its file in the folder of results."""

    name: str
    model: nn.Module
    image: Tensor
    label: Tensor
    grid: int
    file: Path

    def read(self) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = (
            json.loads(self.file.read_text("utf-8")) if self.file.exists() else {}
        )
        return found

    def add(self, method: str, values: dict[str, float]) -> None:
        found = self.read()
        found.setdefault(method, {}).update(values)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(found, indent=1), "utf-8")


def cases(network: str, count: int, folder: Path) -> list[Case]:
    """The images of a network: for EfficientNet-Lite0 the rocket first."""
    if network == "resnet20":
        model, images, labels = real.correct("cifar10_resnet20", count)
        names = [f"cifar{number}" for number in range(count)]
    else:
        model = load("efficientnet_lite0", device="cpu")
        images, names = sample_images()
        order = [2, 0, 1, 3]
        images, names = images[order], [names[number] for number in order]
        if count > 4 and real.available():
            more = real.networks().imagenet(200)[0]
            chosen = torch.arange(count - 4) * (200 // max(1, count - 4))
            images = torch.cat([images, more[chosen]])
            names += [f"imagenet{number}" for number in chosen.tolist()]
        images, names = images[:count].contiguous(), names[:count]
        labels = real.predictions(model, images)
    return [
        Case(
            name,
            model,
            images[k : k + 1],
            labels[k : k + 1],
            GRIDS[network],
            folder / network / f"{name}.json",
        )
        for k, name in enumerate(names)
    ]


def fmn_300(part: Problem, _: Tensor) -> Tensor:
    best = BestSoFar(part, NORMS["linf"].size, 0.0)
    walk(NORMS["linf"], best, STEPS, None)
    return best.images


def foolbox_300(part: Problem, _: Tensor) -> Tensor:
    return peers.foolbox("LInfFMNAttack", None, steps=STEPS)(_Cells(part), part.clean, part.labels)


class _Cells(nn.Module):
    """The classifier as a function of all cells at once, for other libraries."""

    def __init__(self, part: Problem) -> None:
        super().__init__()
        self.part = part
        self.eval()

    def forward(self, patches: Tensor) -> Tensor:
        inside = torch.where(self.part.region, patches, self.part.clean)
        rows = torch.arange(len(patches)).split(self.part.batch_size)
        return torch.cat([self.part._logits(inside[some], some) for some in rows])


def ladder(part: Problem, highest: Tensor) -> Tensor:
    """PGD from the clean image at bisected radii, toward each of the runner-up classes."""
    best = BestSoFar(part, NORMS["linf"].size, 0.0)
    for targets in highest.unbind(1):
        aimed = replace(part, loss_targets=targets)
        low, high = torch.zeros(len(part)), torch.full((len(part),), torch.inf)
        radius = torch.where(best.size.isfinite(), 0.9 * best.size, torch.full_like(best.size, 2 / 255))
        for _ in range(RUNGS):
            change, velocity = torch.zeros_like(part.clean), torch.zeros_like(part.clean)
            open_ = torch.ones(len(part), dtype=torch.bool)
            for step in range(RUNG_STEPS):
                rows = open_.nonzero()[:, 0]
                if not len(rows):
                    break
                some = aimed.select(rows)
                points = some.apply(change[rows])
                margins, _, direction = some.loss_and_gradient(points, margin)
                whole = part.clean.clone()
                whole[rows] = points
                every = torch.full((len(part),), torch.inf)
                every[rows] = margins
                best.record(whole, every)
                open_[rows[margins < 0]] = False
                norm = direction.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-30)
                velocity[rows] = 0.75 * velocity[rows] + direction / norm
                ball = radius[rows][:, None, None, None]
                length = 1.0 if not step else 0.5 * (1 - step / RUNG_STEPS)
                moved = change[rows] + length * ball * velocity[rows].sign()
                moved = torch.maximum(torch.minimum(moved, ball), -ball)
                change[rows] = (some.clean + moved).clamp(0, 1) - some.clean
            high = torch.where(open_, high, torch.minimum(high, radius))
            low = torch.where(open_, radius, low)
            radius = torch.where(
                high.isinf(), 2.5 * radius, torch.where(low == 0, 0.5 * high, (low * high).sqrt())
            ).clamp(max=1)
    return best.images


METHODS: dict[str, Callable[[Problem, Tensor], Tensor]] = {
    "fmn": fmn_300,
    "foolbox": foolbox_300,
    "ladder": ladder,
}


def reference(case: Case, every: int, deadline: float) -> None:
    """Fill in the cells that are missing, method by method."""
    size = case.image.shape[2], case.image.shape[3]
    numbers, (rows, columns) = cell_numbers(size, case.grid)
    with (
        attack_context(case.model, case.image, case.label, AttackOptions()) as problem,
        problem.fused_model(),
    ):
        highest = linearize(problem, CLASSES).classes
        for method, run in METHODS.items():
            known = case.read().get(method, {})
            missing = [cell for cell in range(0, rows * columns, every) if str(cell) not in known]
            for start in range(0, len(missing), AT_ONCE):
                if time.time() > deadline:
                    return
                some = torch.tensor(missing[start : start + AT_ONCE])
                begun = time.process_time()
                owners = torch.zeros_like(some)
                part = cropped(problem, (numbers == some[:, None, None])[:, None], owners)
                sizes = verified(part, run(part, highest[owners]))
                case.add(method, {str(int(cell)): float(one) for cell, one in zip(some, sizes, strict=True)})
                seconds = time.process_time() - begun
                print(f"{case.name} {method} {some.tolist()} {seconds:.0f} s", flush=True)


def verified(part: Problem, patches: Tensor) -> Tensor:
    """(M,) sizes in 1/255 of changes that fool in a fresh pass of the whole image; infinite for others."""
    whole = part.crops.whole(patches) if part.crops is not None else patches
    with torch.no_grad():
        classes = torch.cat([part.classifier(some).argmax(1) for some in whole.split(4)])
    size = 255 * NORMS["linf"].size(patches - part.clean)
    return torch.where(classes != part.labels, size, torch.inf)


def regions(several: list[Case], deadline: float) -> None:
    """Sizes of `minimal_pgd` inside the class activation and the background, relative to the reference."""
    print("| image | region | fraction | reference | minimal_pgd | ratio | passes | s |")
    print("|---|---|---|---|---|---|---|---|")
    for case in several:
        masks = {"cam": cam(case.model, case.image, case.label), "background": background(case.image)}
        for name, region in masks.items():
            if time.time() > deadline:
                return
            with attack_context(case.model, case.image, case.label, AttackOptions(region=region)) as problem:
                with problem.fused_model():
                    highest = linearize(problem, CLASSES).classes
                    found = {method: run(problem, highest) for method, run in METHODS.items()}
                sizes = {
                    method: float(verified(problem, torch.where(problem.region, images, problem.clean)))
                    for method, images in found.items()
                }
            begun = time.process_time()
            ours = minimal_pgd(case.model, case.image, case.label, region=region, on_grid=False)
            seconds = time.process_time() - begun
            size = 255 * float(ours.perturbation.abs().max()) if bool(ours.success) else float("inf")
            best = min(sizes.values())
            told = ", ".join(f"{method} {one:.3f}" for method, one in sizes.items())
            print(
                f"| {case.name} | {name} | {float(region.float().mean()):.2f} | {told} | {size:.3f} | "
                f"{size / best:.3f} | {int(ours.n_forward)} | {seconds:.1f} |",
                flush=True,
            )


class _Traced(SmallestChange):
    """Notes the passes per cell and the sizes after every round."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, "linf", thorough=False)
        self.trace: list[tuple[float, Tensor]] = []
        self.begun = int(problem.n_forward.sum())

    def _round(self, *arguments: Any, **options: Any) -> None:
        super()._round(*arguments, **options)
        passes = (int(self.problem.n_forward.sum()) - self.begun) / len(self.problem)
        self.trace.append((passes, 255 * self.best.size))


def measure(case: Case) -> None:
    """Sizes of the weak-spot map's own search in the cells of the reference, after every round."""
    known = case.read()
    done = [set(known.get(method, {})) for method in METHODS]
    cells = torch.tensor(sorted(int(cell) for cell in set.intersection(*done)))
    if not len(cells):
        return
    size = case.image.shape[2], case.image.shape[3]
    numbers, _ = cell_numbers(size, case.grid)
    masks = (numbers == cells[:, None, None])[:, None]
    owners = torch.zeros_like(cells)
    with (
        attack_context(case.model, case.image, case.label, AttackOptions()) as problem,
        problem.fused_model(),
    ):
        begun = time.process_time()
        linear = linearize(problem)
        sizes = estimate_places(linear, masks[None])[0]
        estimated = time.process_time() - begun
        part = cropped(problem, masks, owners)
        search = _Traced(part)
        search.run(Starts.nearest(linear.classes[owners], sizes, CLASSES))
        seconds = time.process_time() - begun
    names = [str(int(cell)) for cell in cells]
    final = verified(part, search.best.images)
    case.add("ours", dict(zip(names, final.tolist(), strict=True)))
    case.add("first_order", dict(zip(names, (255 * sizes.amin(1)).tolist(), strict=True)))
    case.add("cost", {"passes": search.trace[-1][0], "seconds": seconds, "estimate": estimated})
    for number, (passes, at) in enumerate(search.trace):
        case.add(f"round {number}", {"passes": passes, **dict(zip(names, at.tolist(), strict=True))})
    print(
        f"{case.name}: {seconds:.0f} s for {len(cells)} cells, {search.trace[-1][0]:.0f} passes each",
        flush=True,
    )


def table(several: list[Case]) -> None:
    """Ratios to the reference of each image, and the curve of passes over all cells."""
    print(
        "| image | cells | median ratio | worst | missed | rank of first order | passes per cell | s per cell |"
    )
    print("|---|---|---|---|---|---|---|---|")
    every: list[Tensor] = []
    curve: dict[int, list[Tensor]] = {}
    passes: dict[int, list[float]] = {}
    for case in several:
        known = case.read()
        if "ours" not in known:
            continue
        names = list(known["ours"])
        best = torch.tensor([min(known[method][name] for method in METHODS) for name in names])
        ours, first = (torch.tensor([known[key][name] for name in names]) for key in ("ours", "first_order"))
        both = best.isfinite() & ours.isfinite()
        ratio = (ours / best)[both]
        every.append(ratio)
        missed = int((best.isfinite() & ~ours.isfinite()).sum())
        cost = known["cost"]
        print(
            f"| {case.name} | {len(names)} | {ratio.median():.3f} | {ratio.max():.2f} | {missed} | "
            f"{spearman(first, torch.minimum(best, ours)):.2f} | {cost['passes']:.0f} | "
            f"{cost['seconds'] / len(names):.2f} |"
        )
        for number in range(12):
            # An image that needed fewer rounds than others stays where it ended.
            rounds = [known[key] for key in (f"round {n}" for n in range(number + 1)) if key in known]
            at = torch.tensor([rounds[-1][name] for name in names])
            curve.setdefault(number, []).append((at / best)[both])
            passes.setdefault(number, []).append(rounds[-1]["passes"])
    if not every:
        return
    joined = torch.cat(every)
    print(f"\nall: {len(joined)} cells, median {joined.median():.3f}, worst {joined.max():.2f}\n")
    print("| rounds | passes per cell | median ratio | 90% | worst |")
    print("|---|---|---|---|---|")
    for number, parts in curve.items():
        ratios = torch.cat(parts)
        mean = sum(passes[number]) / len(passes[number])
        print(
            f"| {number + 1} | {mean:.0f} | {ratios.median():.3f} | {ratios.quantile(0.9):.3f} | {ratios.max():.2f} |"
        )


def spearman(one: Tensor, other: Tensor) -> float:
    ranks = torch.stack([one.argsort().argsort().double(), other.argsort().argsort().double()])
    return float(torch.corrcoef(ranks)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=["reference", "measure", "table", "regions"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--network", choices=list(GRIDS), default="efficientnet")
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e9)
    given = parser.parse_args()
    deadline = time.time() + 60 * given.minutes
    several = cases(given.network, given.images, given.folder)
    if given.section == "table":
        table(several)
        return
    if given.section == "regions":
        regions(several, deadline)
        return
    for case in several:
        if given.section == "measure":
            measure(case)
        else:
            reference(case, given.every, deadline)


if __name__ == "__main__":
    with recorded("weak_spots", "The weak-spot map beside the best of several searches."):
        main()
