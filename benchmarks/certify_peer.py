"""Bounds of margins over one pixel's whole cube of colors, beside those of auto_LiRPA on the same boxes.

Rows `PEERS` of `benchmarks.certify`. auto_LiRPA (Xu et al. 2020, arXiv 2002.12920) is not a dependency: put a copy of
its repository and the packages that it imports on PYTHONPATH. It computes in float32 and does not round outward, so it
is compared with our bounds for exact arithmetic, of one box, without splits.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import real
from weakspot.classifier import evaluating
from weakspot.proofs.margin_bounds import MarginBounds
from weakspot.proofs.network_steps import bound_network

PEERS = {"lirpa_cnn_a_adv": "cifar10_cnn_a_adv", "lirpa_conv_small_pgd": "cifar10_conv_small_pgd"}
IMAGES, COLORS, AT_ONCE = 5, 500, 16
Bound = Callable[[Tensor, Tensor], Tensor]  # rows and columns (M,) to lower bounds (M, K - 1)


def peer_table(name: str, pixels: int) -> None:
    """Print the table of one network; `pixels` of each of the first images."""
    if importlib.util.find_spec("auto_LiRPA") is None:
        print(f"\n{name}: auto_LiRPA is missing, so nothing was compared (put its repository on PYTHONPATH)")
        return
    model, images, labels = real.correct(PEERS[name], IMAGES)
    generator = torch.Generator().manual_seed(0)
    lows: dict[str, list[Tensor]] = {}
    seconds: dict[str, float] = {}
    sampled = []
    with evaluating(model) as classifier, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # auto_LiRPA's, on the shape of the mean
        for image, label in zip(images.split(1), labels.tolist(), strict=True):
            places = torch.randperm(image.shape[2] * image.shape[3], generator=generator)[:pixels]
            rows, columns = places // image.shape[3], places % image.shape[3]
            bounds = MarginBounds(bound_network(classifier, image), image, label, as_run=False)
            for method, bound in {**ours(bounds, image), **theirs(model, image, label)}.items():
                bound(rows[:2], columns[:2])  # what the first call sets up is not timed
                begun = time.process_time()
                parts = [bound(rows[part], columns[part]) for part in torch.arange(pixels).split(AT_ONCE)]
                seconds[method] = seconds.get(method, 0.0) + time.process_time() - begun
                lows.setdefault(method, []).append(torch.cat(parts).double())
            sampled.append(least_margins(model, image, label, (rows, columns), generator))
    show(name, torch.cat(sampled), {method: torch.cat(parts) for method, parts in lows.items()}, seconds)


def show(name: str, least: Tensor, lows: dict[str, Tensor], seconds: dict[str, float]) -> None:
    """The table, of least sampled margins and lower bounds (M, K - 1)."""
    count = len(least)
    print(
        f"\n{name}: {count} pixels of {IMAGES} images, the full cube of colors, one box each, {COLORS} colors sampled\n"
        "| bounds | proven | mean least margin | bounds above a sampled margin | by at most | CPU ms a pixel |\n"
        "|---|---|---|---|---|---|"
    )
    print(f"| least of the sampled | | {float(least.amin(1).mean()):.3f} | | | |")
    for method, low in lows.items():
        excess = low - least
        above = int((excess > 0).sum())
        print(
            f"| {method} | {int((low.amin(1) > 0).sum())} of {count} | {float(low.amin(1).mean()):.3f} | "
            f"{above} of {low.numel()} | {f'{float(excess.max()):.1e}' if above else ''} | "
            f"{1000 * seconds[method] / count:.1f} |"
        )


def ours(bounds: MarginBounds, image: Tensor) -> dict[str, Bound]:
    """Our bounds of a box, with three generators, and with one for each ReLU that is not stable."""

    def of(*, deep: bool) -> Bound:
        def bound(rows: Tensor, columns: Tensor) -> Tensor:
            low = image.new_zeros(len(rows), image.shape[1], dtype=torch.float64)
            return bounds.bounds(rows, columns, low, low + 1, deep=deep).lower

        return bound

    return {"weakspot, shared generators": of(deep=False), "weakspot, one for each ReLU": of(deep=True)}


def theirs(model: nn.Module, image: Tensor, label: int) -> dict[str, Bound]:
    """Bounds of the same margins by auto_LiRPA."""
    package: Any = importlib.import_module("auto_LiRPA")
    perturbations: Any = importlib.import_module("auto_LiRPA.perturbations")
    network = package.BoundedModule(copy.deepcopy(model), image, device="cpu")
    classes = model(image).shape[1]
    others = [k for k in range(classes) if k != label]
    margins = torch.eye(classes)[label] - torch.eye(classes)[others]

    def of(method: str) -> Bound:
        def bound(rows: Tensor, columns: Tensor) -> Tensor:
            low = image.repeat(len(rows), 1, 1, 1)
            high = low.clone()
            low[torch.arange(len(rows)), :, rows, columns] = 0.0
            high[torch.arange(len(rows)), :, rows, columns] = 1.0
            box = perturbations.PerturbationLpNorm(norm=float("inf"), x_L=low, x_U=high)
            given = package.BoundedTensor((low + high) / 2, box)
            network(given)
            lower, _ = network.compute_bounds(
                x=(given,), C=margins.expand(len(rows), -1, -1), method=method, bound_upper=False
            )
            result: Tensor = lower.detach()
            return result

        return bound

    return {f"auto_LiRPA, {method}": of(method) for method in ("IBP", "CROWN-IBP", "CROWN")}


def least_margins(
    model: nn.Module, image: Tensor, label: int, places: tuple[Tensor, Tensor], generator: torch.Generator
) -> Tensor:
    """(M, K - 1) least margins of a copy in float64 under random colors of the pixels, a third of them corners."""
    judge, least = copy.deepcopy(model).double(), []
    for row, column in zip(*(place.tolist() for place in places), strict=True):
        colors = torch.rand(COLORS, image.shape[1], generator=generator)
        colors[::3] = colors[::3].round()
        edited = image.repeat(COLORS, 1, 1, 1)
        edited[:, :, row, column] = colors
        logits = judge(edited.double())
        others = torch.arange(logits.shape[1]) != label
        least.append((logits[:, label : label + 1] - logits[:, others]).amin(0))
    return torch.stack(least)
