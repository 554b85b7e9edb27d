"""The same attacks by other libraries. Each function returns adversarial images (N, C, H, W)."""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Counted(nn.Module):
    """A network that counts the images of its forward and backward passes, for every library in the same way."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.n_forward, self.n_backward = network, 0, 0
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        self.n_forward += len(images)
        if logits.requires_grad:
            logits.register_hook(self._back)
        return logits

    def _back(self, gradient: Tensor) -> None:
        self.n_backward += len(gradient)

    def reset(self) -> None:
        self.n_forward = self.n_backward = 0


def floor(steps: int) -> Attack:
    """Forward and backward passes of the network only."""

    def run(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        for _ in range(steps):
            point = images.clone().requires_grad_()
            torch.autograd.grad(model(point).gather(1, labels[:, None]).sum(), point)
        return images

    return run


def torchattacks(attack: str, **options: Any) -> Attack:
    def run(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        module = importlib.import_module("torchattacks")
        adversarial: Tensor = getattr(module, attack)(model, **options)(images, labels)
        return adversarial

    return run


def foolbox(attack: str, eps: float | None, **options: Any) -> Attack:
    def run(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        module = importlib.import_module("foolbox")
        network = module.PyTorchModel(model, bounds=(0, 1), device="cpu")
        attacker = getattr(module.attacks, attack)(**options)
        adversarial: Tensor = attacker(network, images, labels, epsilons=eps)[1]
        return adversarial

    return run


def art(attack: str, classes: int, **options: Any) -> Attack:
    def run(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        module = importlib.import_module("art.attacks.evasion")
        estimators = importlib.import_module("art.estimators.classification")
        network = estimators.PyTorchClassifier(
            model,
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(images.shape[1:]),
            nb_classes=classes,
            clip_values=(0.0, 1.0),
            device_type="cpu",
        )
        attacker = getattr(module, attack)(network, batch_size=len(images), verbose=False, **options)
        return torch.from_numpy(attacker.generate(images.numpy(), labels.numpy()))

    return run


def installed(**attacks: Attack) -> dict[str, Attack]:
    """The attacks whose library, the first part of their name, is installed."""
    warnings.filterwarnings("ignore", module=r"(foolbox|torchattacks|art)\..*")
    usable = {}
    for name, attack in attacks.items():
        if importlib.util.find_spec(name.partition("_")[0]) is None:
            print(f"(no {name.partition('_')[0]}: not installed)")
        else:
            usable[name.replace("_", " ", 1)] = attack
    return usable


def pgd(eps: float, steps: int, classes: int) -> dict[str, Attack]:
    """Madry's PGD from a random start under L-infinity with steps of 2.5 eps / steps, by every library."""
    step = 2.5 * eps / steps
    return installed(
        torchattacks_PGD=torchattacks("PGD", eps=eps, alpha=step, steps=steps),
        foolbox_LinfPGD=foolbox("LinfPGD", eps, abs_stepsize=step, steps=steps),
        art_PGD=art(
            "ProjectedGradientDescentPyTorch",
            classes,
            norm=math.inf,
            eps=eps,
            eps_step=step,
            max_iter=steps,
            num_random_init=1,
        ),
    )
