"""Defenses of networks for digits, broken and genuine, with the right verdict on each.

Built on the networks of the real data folder. `nat` is trained without attacks and is the undefended model everywhere.
`convex`, used as another network, is fooled on every image at the budgets of these cases.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.defenses.planted import one_hot, reversed_gradient
from tests.networks import Wrapped

NAMES = {
    "nat": "mnist_conv_small_nat", "convex": "mnist_convex_eps0.1", "pgd": "mnist_cnn_pgd_eps0.3",
    "fgsm": "mnist_cnn_fgsm_eps0.3", "a_adv": "mnist_cnn_a_adv",
}  # fmt: skip
SIZE = 28
NONE, UNCLEAR, PROTECTS = "no protection", "cannot be judged", "protects"
WAVES = torch.arange(SIZE)
COSINES = ((WAVES + 0.5) * WAVES[:, None] * torch.pi / SIZE).cos() * (2 / SIZE) ** 0.5
COSINES[0] /= 2**0.5


@dataclass(frozen=True)
class Case:
    """A defended model, the L-infinity budget it is evaluated at, and the verdicts that are right."""

    build: Callable[[], nn.Module]
    eps: float
    statuses: tuple[str, ...]


class Inline(nn.Module):
    """The layers of a network called one by one, so that there is no inner network to go straight through to."""

    def __init__(
        self,
        network: nn.Module,
        *,
        before: Callable[[Tensor], Tensor] | None = None,
        inside: tuple[int, Callable[[Tensor], Tensor]] | None = None,
        after: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.parts, self.before, self.inside, self.after = network, before, inside, after

    def forward(self, images: Tensor) -> Tensor:
        parts: Any = self.parts
        hidden = images if self.before is None else self.before(images)
        hidden = (hidden - parts.mean) / parts.std
        for number, layer in enumerate(parts.body):
            if self.inside is not None and number == self.inside[0]:
                hidden = self.inside[1](hidden)
            hidden = layer(hidden)
        return hidden if self.after is None else self.after(hidden)


def detached(images: Tensor) -> Tensor:
    return images.detach()


def resized(images: Tensor) -> Tensor:
    side = int(torch.randint(24, SIZE + 1, ()))
    smaller = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
    top, left = (int(torch.randint(0, SIZE + 1 - side, ())) for _ in range(2))
    return F.pad(smaller, (left, SIZE - side - left, top, SIZE - side - top))


def shaken_blocks(images: Tensor) -> Tensor:
    """Blocks of 7 pixels, each rolled by up to a pixel, differently at every call."""
    blocks = images.unfold(2, 7, 7).unfold(3, 7, 7).clone()
    for row in range(4):
        for column in range(4):
            shift = (int(torch.randint(-1, 2, ())), int(torch.randint(-1, 2, ())))
            blocks[:, :, row, column] = torch.roll(blocks[:, :, row, column], shift, (2, 3))
    return blocks.permute(0, 1, 2, 4, 3, 5).reshape(images.shape)


def rounded_waves(images: Tensor) -> Tensor:
    """The images coarsely rounded in frequency, as JPEG does."""
    rounded: Tensor = COSINES.T @ ((COSINES @ images @ COSINES.T * 4).round() / 4) @ COSINES
    return rounded


def hashes(images: Tensor) -> list[int]:
    levels = (images.detach() * 255).round().byte().cpu().numpy()
    return [int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=4).digest()) for image in levels]


def rounded_waves_by_hash(images: Tensor) -> Tensor:
    """The same, with offsets drawn by a hash of the image."""
    offsets = torch.stack(
        [torch.rand(1, SIZE, SIZE, generator=torch.Generator().manual_seed(key)) for key in hashes(images)]
    )
    waves = COSINES @ images @ COSINES.T
    rounded: Tensor = COSINES.T @ (((3 * waves + offsets).floor() - offsets + 0.5) / 3) @ COSINES
    return rounded


def stopped_near_boundary(margin: float) -> Callable[[Tensor], Tensor]:
    """Logits without slope where the margin of the best class is small."""

    def stop(logits: Tensor) -> Tensor:
        best = logits.topk(2, 1).values
        near = (best[:, 0] - best[:, 1] < margin)[:, None]
        return torch.where(near, margin * F.one_hot(logits.argmax(1), logits.shape[1]).to(logits), logits)

    return stop


def rising_near_boundary(margin: float) -> Callable[[Tensor], Tensor]:
    """Logits whose margin grows again near the decision boundary."""

    def rise(logits: Tensor) -> Tensor:
        best = logits.topk(2, 1)
        lead = (best.values[:, 0] - best.values[:, 1])[:, None]
        return logits + F.one_hot(best.indices[:, 0], logits.shape[1]) * (2 * (margin - lead)).clamp(min=0)

    return rise


def few_winners(hidden: Tensor) -> Tensor:
    flat = hidden.flatten(1)
    least = flat.topk(flat.shape[1] // 10, 1).values[:, -1:]
    return (flat * (flat >= least)).view_as(hidden)


class Rippled(nn.Module):
    """Adds a wave of the image to every logit: true gradients that mislead."""

    def __init__(self, network: nn.Module, size: float, frequency: float) -> None:
        super().__init__()
        self.network = Inline(network)
        directions = torch.randn(SIZE * SIZE, 10, generator=torch.Generator().manual_seed(0))
        self.size, self.directions = size, frequency * directions

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images) + self.size * (images.flatten(1) @ self.directions).sin()
        return logits


class Nearest(nn.Module):
    """Replaces each image by the nearest of many known ones."""

    def __init__(self, network: nn.Module, known: Tensor) -> None:
        super().__init__()
        self.network, self.known = network, known

    def forward(self, images: Tensor) -> Tensor:
        distances = torch.cdist(images.flatten(1), self.known.flatten(1))
        logits: Tensor = self.network(self.known[distances.argmin(1)])
        return logits


class EitherByHash(nn.Module):
    """A hash of the image decides which of two networks is used; neither has a gradient."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, images: Tensor) -> Tensor:
        even = torch.tensor([key % 2 == 0 for key in hashes(images)], device=images.device)[:, None]
        return torch.where(even, self.first(images.detach()), self.second(images.detach()))


class Vote(nn.Module):
    """Counts the classes that several networks predict."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([one_hot(network(images)) for network in self.networks]).sum(0)


def cases(nets: Mapping[str, nn.Module], known: Tensor) -> dict[str, Case]:
    """The zoo; `nets` are networks by short name, `known` images of the training set."""
    nat, convex, pgd, a_adv = (nets[name] for name in ("nat", "convex", "pgd", "a_adv"))
    either = (NONE, UNCLEAR)
    return {
        # The cases that the thresholds were chosen on.
        "detach, own network": Case(lambda: Wrapped(nat, detached), 0.2, (NONE,)),
        "detach, foreign network": Case(lambda: Wrapped(convex, detached), 0.2, (NONE,)),
        "detach, robust network": Case(lambda: Wrapped(pgd, detached), 0.3, (PROTECTS,)),
        "softmax": Case(lambda: Wrapped(nat, after=lambda logits: 50 * (20 * logits).softmax(1)), 0.2, (NONE,)),
        "temperature of a million": Case(lambda: Wrapped(nat, after=lambda logits: 1e6 * logits), 0.2, (NONE,)),
        "noise": Case(lambda: Wrapped(nat, lambda images: images + 0.1 * torch.randn_like(images)), 0.2, (NONE,)),
        "resize and pad": Case(lambda: Wrapped(nat, resized), 0.2, (NONE,)),
        "wrong gradients": Case(lambda: Wrapped(nat, reversed_gradient), 0.2, (NONE,)),
        "rounded in frequency": Case(lambda: Wrapped(nat, rounded_waves), 0.2, (NONE,)),
        "images of two levels": Case(lambda: Wrapped(nat, lambda images: (images > 0.5).float()), 0.15, either),
        "hidden one-hot": Case(lambda: Inline(convex, after=one_hot), 0.2, either),
        "robust, one-hot": Case(lambda: Wrapped(pgd, after=one_hot), 0.3, (UNCLEAR,)),
        "robust, rounded images": Case(lambda: Wrapped(pgd, lambda images: (7 * images).round() / 7), 0.3, (UNCLEAR,)),
        "PGD training (.3)": Case(lambda: pgd, 0.3, (PROTECTS,)),
        "FGSM training (.3)": Case(lambda: nets["fgsm"], 0.3, (PROTECTS,)),
        "adversarial training (a_adv)": Case(lambda: a_adv, 0.3, (PROTECTS,)),
        "convex training (.1)": Case(lambda: convex, 0.1, (PROTECTS,)),
        # One of forty images that a lucky draw fools is already more than a doubling of draws may take.
        "robust, resize and pad": Case(lambda: Wrapped(pgd, resized), 0.3, (PROTECTS, UNCLEAR)),
        # Cases on which no threshold was chosen. The stopped slope showed that agreement must also be measured where
        # attacks end, and the noise before a robust network that draws must be doubled like queries.
        "robust, noise": Case(
            lambda: Wrapped(pgd, lambda images: images + 0.1 * torch.randn_like(images)), 0.3, either
        ),
        "slope stopped near the boundary": Case(lambda: Inline(convex, after=stopped_near_boundary(3.0)), 0.2, either),
        "lead rising near the boundary": Case(lambda: Inline(convex, after=rising_near_boundary(2.0)), 0.2, either),
        "detach between layers": Case(lambda: Inline(convex, inside=(4, detached)), 0.2, either),
        "wrong gradients between layers": Case(lambda: Inline(convex, inside=(4, reversed_gradient)), 0.2, either),
        "whole-number logits": Case(lambda: Inline(convex, after=torch.ceil), 0.2, either),
        "clipped logits": Case(lambda: Inline(convex, after=lambda logits: logits.clamp(-2, 2)), 0.2, either),
        "few winners": Case(lambda: Inline(convex, inside=(2, few_winners)), 0.2, either),
        "frequency rounding by hash": Case(lambda: Inline(convex, before=rounded_waves_by_hash), 0.2, either),
        "ripples": Case(lambda: Rippled(convex, 1.0, 3.0), 0.2, either),
        "nearest known image": Case(lambda: Nearest(nat, known), 0.3, either),
        "either network by hash": Case(lambda: EitherByHash(convex, a_adv), 0.2, either),
        "blocks rolled at every call": Case(lambda: Inline(convex, before=shaken_blocks), 0.2, either),
        "vote of three": Case(lambda: Vote(convex, nat, Inline(nat)), 0.2, either),
    }  # fmt: skip
