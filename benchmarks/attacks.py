"""Attacks compared with those of other libraries, in one run. Run: python -m benchmarks.attacks [SECTION ...]

Sections: steps (PGD-20 under L-infinity), pixels (one pixel), quality (SSIM at equal success), robust (the ensemble
against AutoAttack), smallest (minimal norms). Default: all; sections without their real data print a note.
torchattacks, foolbox and ART are compared if they are installed. All numbers in the docs come from here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor, nn

from benchmarks import peers, real, sections
from benchmarks.peers import Attack, Counted
from benchmarks.timing import peak_gigabytes
from weakspot import L2, SSIM, AttackResult, Budget, Linf, Pairs, attacks, ssim_map

EPS, STEPS, SHORT = 4 / 255, 20, 10


@dataclass
class Outcome:
    """The result of one job: images, counts of one run, and seconds of each round."""

    adversarial: list[Tensor] = field(default_factory=list)
    n_forward: int = 0
    n_backward: int = 0
    seconds: list[float] = field(default_factory=list)


def ours(attack: Callable[..., AttackResult], **options: object) -> Attack:
    def run(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return attack(model, images, labels, **options).adversarial

    return run


def race(
    jobs: Mapping[str, Attack],
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    rounds: int,
    warm: bool = True,
) -> dict[str, Outcome]:
    """Run every job on every batch, in turn. Counts and images are of the first round, seconds of all rounds."""
    counted = Counted(model)
    outcomes = {name: Outcome() for name in jobs}
    if warm:
        for job in jobs.values():
            job(counted, *batches[0])
    for number in range(rounds):
        for batch in batches:
            for name, job in jobs.items():
                counted.reset()
                torch.manual_seed(0)
                np.random.seed(0)  # noqa: NPY002 - torchattacks draws from it
                begun = time.perf_counter()
                adversarial = job(counted, *batch)
                outcomes[name].seconds.append(time.perf_counter() - begun)
                if number == 0:
                    outcomes[name].adversarial.append(adversarial.detach())
                    outcomes[name].n_forward += counted.n_forward
                    outcomes[name].n_backward += counted.n_backward
    return outcomes


def show(
    title: str,
    outcomes: Mapping[str, Outcome],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    each: bool = True,
) -> None:
    """Print one row per job. Ratios are medians over rounds or, without `each`, ratios of the total times."""
    references = [name for name in outcomes if not name.startswith("weakspot")]
    print(f"\n{title}\n", flush=True)
    heads = ["job", "fooled", "mean L-inf", "median L2", "median L1", "forwards", "backwards", "seconds"]
    heads += [f"x {name.partition(',')[0]}" for name in references]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for name, outcome in outcomes.items():
        adversarial = torch.cat(outcome.adversarial)
        fooled = real.predictions(model, adversarial) != labels
        distances = Pairs(images, adversarial, labels, labels).distances[fooled.numpy()]
        cells = [name, f"{int(fooled.sum())} of {len(labels)}" if "floor" not in name else ""]
        if "floor" in name or not len(distances):
            cells += ["", "", ""]
        else:
            cells += [
                f"{255 * distances['linf'].mean():.2f}/255",
                f"{distances['l2'].median():.3f}",
                f"{distances['l1'].median():.2f}",
            ]
        cells += [f"{outcome.n_forward / len(labels):.1f}", f"{outcome.n_backward / len(labels):.1f}"]
        total = statistics.median(outcome.seconds) if each else sum(outcome.seconds)
        cells.append(f"{total:.2f}")
        for reference in references:
            base = outcomes[reference].seconds
            ratio = (
                statistics.median(a / b for a, b in zip(outcome.seconds, base, strict=True))
                if each
                else sum(outcome.seconds) / sum(base)
            )
            cells.append(f"{ratio:.2f}")
        print("| " + " | ".join(cells) + " |", flush=True)
    print(f"\nPeak memory so far: {peak_gigabytes():.2f} GB", flush=True)


def steps() -> None:
    """PGD-20 at 4/255: the cost of a step, and the savings of stopping early."""
    cases = {"EfficientNet-Lite0, 8 photographs at 224 x 224": (*real.embedded(8), 1000, 5)}
    if real.available():
        cases["MobileNetV2, 8 ImageNet photographs at 224 x 224"] = (
            *real.correct("mobilenet_v2_1.0_224", 8),
            1000,
            3,
        )
        cases["ResNet-20, 128 CIFAR-10 images at 32 x 32"] = (*real.correct("cifar10_resnet20", 128), 10, 5)
    for title, (model, images, labels, classes, rounds) in cases.items():
        jobs = {
            f"floor, {STEPS} forward + backward": peers.floor(STEPS),
            "weakspot pgd": ours(attacks.pgd, budget=Linf(EPS), steps=STEPS),
            "weakspot pgd, stop_early": ours(attacks.pgd, budget=Linf(EPS), steps=STEPS, stop_early=True),
            "weakspot pgd, SSIM(0.001) global": ours(attacks.pgd, budget=SSIM(0.001), steps=STEPS),
            "weakspot pgd, SSIM(0.01) local": ours(attacks.pgd, budget=SSIM(0.01, mode="local"), steps=STEPS),
            **peers.pgd(EPS, STEPS, classes),
        }
        outcomes = race(jobs, model, [(images, labels)], rounds=rounds)
        show(f"PGD, {STEPS} steps, 4/255: {title}", outcomes, model, images, labels)
        linf = outcomes["weakspot pgd"].seconds
        for name in ("weakspot pgd, SSIM(0.001) global", "weakspot pgd, SSIM(0.01) local"):
            ratio = statistics.median(a / b for a, b in zip(outcomes[name].seconds, linf, strict=True))
            print(f"{name}: {ratio:.2f} times L-infinity")


def pixels() -> None:
    """One pixel on ResNet-20: population 400, 100 generations, four batches of ten images in turn."""
    if not real.available():
        return
    model, images, labels = real.correct("cifar10_resnet20", 40)
    jobs = {
        "weakspot few_pixel, evolution": ours(attacks.few_pixel, population=400, generations=100),
        "weakspot few_pixel, guided": ours(
            attacks.few_pixel, population=400, generations=100, method="guided"
        ),
        **peers.installed(torchattacks_OnePixel=peers.torchattacks("OnePixel", steps=100, popsize=400)),
    }
    batches = list(zip(images.split(10), labels.split(10), strict=True))
    outcomes = race(jobs, model, batches, rounds=1, warm=False)
    show("One pixel, population 400 x 100: ResNet-20, first 40 correct CIFAR-10 test images", outcomes, model,
         images, labels, each=False)  # fmt: skip


def smallest_that_fools(
    model: nn.Module, images: Tensor, labels: Tensor, budgets: Sequence[Budget]
) -> tuple[Tensor, Tensor]:
    """PGD under growing budgets: the first success of each image, and whether there was one."""
    adversarial, fooled = images.clone(), torch.zeros(len(images), dtype=torch.bool)
    for budget in budgets:
        left = (~fooled).nonzero()[:, 0]
        if not len(left):
            break
        result = attacks.pgd(model, images[left], labels[left], budget=budget, steps=SHORT, stop_early=True)
        won = left[result.success]
        adversarial[won] = result.adversarial[result.success]
        fooled[won] = True
    return adversarial, fooled


def quality() -> None:
    """Mean SSIM of the images under the smallest budget that fools them, for several kinds of budgets."""
    if not real.available():
        return
    grid = [2.0**power for power in range(-3, 5)]  # multiples of the middle budget
    kinds: dict[str, list[Budget]] = {
        "L-infinity": [Linf(min(1, factor / 255)) for factor in grid],
        "L2": [L2(factor) for factor in grid],
        "SSIM(global)": [SSIM(min(0.99, 5e-5 * factor**2)) for factor in grid],
        "SSIM(global, level=1)": [SSIM(min(0.99, 5e-5 * factor**2), level=1) for factor in grid],
    }
    for title, (model, images, labels) in {
        "EfficientNet-Lite0": real.embedded(100),
        "MobileNetV2": real.correct("mobilenet_v2_1.0_224", 100),
    }.items():
        quality_of: dict[str, np.ndarray] = {}
        every = torch.ones(len(images), dtype=torch.bool)
        for kind, budgets in kinds.items():
            adversarial, fooled = smallest_that_fools(model, images, labels, budgets)
            quality_of[kind] = ssim_map(images, adversarial).mean((1, 2, 3)).numpy()
            every &= fooled
        rows = every.numpy()
        print(
            f"\nMean SSIM of the first budget on a grid (factor 2) that fools, PGD-{SHORT}: {title}, {rows.sum()} "
            f"of {len(images)} photographs that all of them fool\n"
        )
        print("| budget | mean SSIM | less L-infinity, paired | less L2, paired |\n|---|---|---|---|")
        for kind, values in quality_of.items():
            cells = [_interval(values[rows])]
            cells += [
                "" if kind == other else _interval((values - quality_of[other])[rows])
                for other in ("L-infinity", "L2")
            ]
            print(f"| {kind} | {' | '.join(cells)} |", flush=True)


def _interval(values: np.ndarray) -> str:
    """The mean and its 95% interval by bootstrap over images."""
    interval = bootstrap(
        (values,), np.mean, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return f"{values.mean():.5f} ({interval.low:.5f} to {interval.high:.5f})"


ROBUST = {
    "mnist_cnn_pgd_eps0.3": 0.3,
    "cifar10_resnet2b_adv": 2 / 255,
    "cifar10_cnn_a_adv": 2 / 255,
    "mnist_cnn_a_adv": 0.3,
    "mnist_cnn_fgsm_eps0.3": 0.3,
    "cifar10_resnet4b_adv": 2 / 255,
    "cifar10_cnn_a_adv4": 2 / 255,
    "cifar10_cnn_a_mix": 2 / 255,
    "cifar10_conv_small_pgd": 2 / 255,
}


def robust(count: int = 500) -> None:
    """Robust accuracy by the ensemble and by AutoAttack, five batches of a hundred images in turn."""
    if not real.available():
        return
    print(f"\nRobust accuracy under L-infinity, first {count} test images\n")
    heads = ["network", "eps", "attack", "robust", "forwards", "backwards", "seconds", "x AutoAttack"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|", flush=True)
    for name, eps in ROBUST.items():
        model, images, labels = real.first(name, count)
        jobs = {
            "weakspot ensemble": ours(attacks.ensemble, budget=Linf(eps)),
            **peers.installed(
                torchattacks_AutoAttack=peers.torchattacks("AutoAttack", eps=eps, n_classes=10, seed=0)
            ),
        }
        batches = list(zip(images.split(100), labels.split(100), strict=True))
        outcomes = race(jobs, model, batches, rounds=1, warm=False)
        last = sum(list(outcomes.values())[-1].seconds)
        for job, outcome in outcomes.items():
            correct = (real.predictions(model, torch.cat(outcome.adversarial)) == labels).float().mean()
            seconds = sum(outcome.seconds)
            print(
                f"| {name} | {_level(eps)} | {job} | {float(correct):.1%} | {outcome.n_forward / count:.0f} | "
                f"{outcome.n_backward / count:.0f} | {seconds:.0f} | {seconds / last:.2f} |",
                flush=True,
            )


def _level(eps: float) -> str:
    return f"{255 * eps:.0f}/255" if eps < 0.1 else f"{eps:g}"


def smallest(budget: int = 1000) -> None:
    """Minimal norms on ResNet-20: the same number of gradients for all attacks, five searches of the weight."""
    if not real.available():
        return
    model, images, labels = real.correct("cifar10_resnet20", 32)
    each = budget // 5
    jobs = {
        "weakspot carlini_wagner": ours(attacks.carlini_wagner, steps=budget, on_grid=False),
        **peers.installed(
            foolbox_CW=peers.foolbox(
                "L2CarliniWagnerAttack", None, binary_search_steps=5, steps=each, stepsize=0.01
            ),
            torchattacks_CW=peers.torchattacks("CW", c=1, steps=budget, lr=0.01),
        ),
    }
    batches = [(images, labels)]
    short = {
        "weakspot fmn": ours(attacks.fmn, steps=100, on_grid=False),
        **peers.installed(foolbox_FMN=peers.foolbox("LInfFMNAttack", None, steps=100)),
    }
    outcomes = race(short, model, batches, rounds=3)
    show(
        "Smallest L-infinity: ResNet-20, first 32 correct CIFAR-10 test images, 100 gradients",
        outcomes, model, images, labels,
    )  # fmt: skip
    title = f"ResNet-20, first 32 correct CIFAR-10 test images, {budget} gradients"
    outcomes = race(jobs, model, batches, rounds=1, warm=False)
    show(f"Smallest L2: {title}", outcomes, model, images, labels)
    jobs = {
        "weakspot ead": ours(attacks.ead, steps=budget, on_grid=False),
        "weakspot strattack, cells of 4": ours(attacks.strattack, group=4, steps=budget, on_grid=False),
        **peers.installed(
            foolbox_EAD=peers.foolbox(
                "EADAttack", None, binary_search_steps=5, steps=each, decision_rule="L1", regularization=0.001
            ),
            torchattacks_EADL1=peers.torchattacks("EADL1", binary_search_steps=5, max_iterations=each),
        ),
    }
    outcomes = race(jobs, model, batches, rounds=1, warm=False)
    show(f"Smallest L1: {title}", outcomes, model, images, labels)


SECTIONS = {"steps": steps, "pixels": pixels, "quality": quality, "smallest": smallest, "robust": robust}


if __name__ == "__main__":
    sections.run(SECTIONS)
