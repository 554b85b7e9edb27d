"""Shrinking against fixed steps of PGD at equal cost. Run: python -m benchmarks.steps

Robust accuracy (lower is the better attack) and mean margin on the first 200 CIFAR-10 test images, on networks from
the folder that WEAKSPOT_DATA names. The fixed step is Madry's, 2.5 / steps of the budget; starts, objective and best
iterate are the same.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from weakspot import L2, AttackResult, Budget, Classifier, Linf, attacks
from weakspot.attacks.context import AttackOptions, attack_context
from weakspot.attacks.gradient import Search, random_start
from weakspot.attacks.losses import margin as margin_objective
from weakspot.classifier import predict
from weakspot.logits import margin

CASES = {"cifar10_resnet2b_adv": 8 / 255, "cifar10_resnet4b_adv": 2 / 255, "cifar10_cnn_a_adv4": 8 / 255}
STEPS = 10


def fixed_steps(model: Classifier, images: Tensor, labels: Tensor, budget: Budget) -> AttackResult:
    """PGD with Madry's step, otherwise as attacks.pgd."""
    with attack_context(model, images, labels, AttackOptions(budget)) as problem:
        search = Search(problem, margin_objective)
        search.run(random_start(problem, 0), [2.5 / STEPS] * STEPS)
        return problem.result(search.best)


def linear() -> None:
    """Print the share of an L2 ball's optimum on a linear model, whose closed form is known: eps times |weight|."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3 * 8 * 8, generator=generator)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(len(weight), 2, bias=False)).eval()
    network[1].weight.data = torch.stack([weight, -weight])
    images = 0.4 + 0.2 * torch.rand(8, 3, 8, 8, generator=generator)
    labels, budget = predict(Classifier.wrap(network), images).argmax(1), L2(0.3)
    results = {
        "fixed": fixed_steps(Classifier.wrap(network), images, labels, budget),
        "shrinking": attacks.pgd(network, images, labels, budget=budget, steps=STEPS),
    }
    for name, result in results.items():
        share = (result.perturbation.flatten(1) @ weight).abs() / (budget.eps * weight.norm())
        print(f"Linear model, {budget}, {STEPS} steps, {name}: {float(share.mean()):.5f} of the optimum")


def main() -> None:
    """Print the table."""
    folder = Path(os.environ.get("WEAKSPOT_DATA", "../shared/data"))
    if not (folder / "networks.py").is_file():
        sys.exit(f"no real data at {folder}; set WEAKSPOT_DATA")
    sys.path.insert(0, str(folder))
    import networks  # type: ignore[import-not-found]

    linear()
    images, labels = networks.cifar10("test", 200)
    print(
        "| network | budget | robust, fixed | robust, shrinking | margin, fixed | margin, shrinking |\n"
        + "|---" * 6
        + "|"
    )
    for name, eps in CASES.items():
        model = Classifier.wrap(networks.network(name))
        for budget in (Linf(eps), L2(20 * eps)):
            results = (
                fixed_steps(model, images, labels, budget),
                attacks.pgd(model, images, labels, budget=budget, steps=STEPS),
            )
            robust = [f"{float((~result.success).float().mean()):.1%}" for result in results]
            left = [f"{float(margin(predict(model, r.adversarial), labels).mean()):.3f}" for r in results]
            print(f"| {name} | {budget} | {' | '.join(robust)} | {' | '.join(left)} |", flush=True)


if __name__ == "__main__":
    main()
