"""The test zoo: small networks of every kind, the same in every run.

Use these before writing a network into a test file:

- `PoolingNetwork`, `FlatNetwork`, `TokenNetwork`: a residual convolutional network, a LeNet, a vision transformer.
- `LinearNetwork(weight)`: two logits; attacks on it have closed forms.
- `Wrapped(network, before, after)`: a network between two functions, for defenses and odd outputs.
- `NETWORKS[name]()`: a seeded network and three images for it; the fixture `any_model` runs a test on each.
- `seeded(build, *size)`, `doubled(made)`: a network of your own in the same form, and its copy in float64.
- `untouched(model, *tensors)`: a context that asserts that nothing outside the result was changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weakspot.classifier import Classifier


class PoolingNetwork(nn.Module):
    """Convolutions with batch-norm and in-place ReLU, a residual sum, then pooling and a linear layer.

    Its class activation map has a closed form; the layers are `stem`, `branch` and `head`.
    """

    def __init__(self, channels: int = 3, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.branch = nn.Conv2d(8, 8, 3, 1, 1)
        self.head = nn.Linear(8, classes)

    def forward(self, images: Tensor) -> Tensor:
        stem = self.stem(images)
        logits: Tensor = self.head(F.relu(stem + self.branch(stem)).mean((2, 3)))
        return logits


class FlatNetwork(nn.Module):
    """A convolution and a linear layer on its flattened map, as in LeNet; takes images of one size."""

    def __init__(self, size: tuple[int, int] = (16, 12), channels: int = 1, classes: int = 2) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, 4, 3, 2, 1)
        self.head = nn.Linear(4 * -(-size[0] // 2) * -(-size[1] // 2), classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.convolution(images)).flatten(1))
        return logits


class TokenNetwork(nn.Module):
    """A small vision transformer with a class token."""

    def __init__(self, size: tuple[int, int] = (16, 24), patch: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.places = nn.Parameter(torch.randn(1, 1 + size[0] * size[1] // patch**2, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(images), -1, -1), patches], 1) + self.places
        logits: Tensor = self.head(self.norm(self.encoder(tokens))[:, 0])
        return logits


class LinearNetwork(nn.Module):
    """Two logits, +<weight, image> and -<weight, image>: attacks on it have closed forms."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        score = torch.einsum("nchw,chw->n", images.to(self.weight), self.weight)
        return torch.stack([score, -score], 1)


class Wrapped(nn.Module):
    """A network between two functions: `after(network(before(images)))`.

    `network` may be any function of images, so that `Wrapped(torch.Tensor.sqrt)` is a module too.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Any],
        before: Callable[[Tensor], Tensor] | None = None,
        after: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.before = before
        self.after = after

    def forward(self, images: Tensor) -> Any:
        output = self.network(images if self.before is None else self.before(images))
        return output if self.after is None else self.after(output)


Made = tuple[nn.Module, Tensor]  # a network in eval mode and three images for it


def doubled(made: Made) -> Made:
    """A copy of the network and the images, in double precision."""
    network, images = made
    return copy.deepcopy(network).double(), images.double()


def seeded(build: Callable[[], nn.Module], *size: int) -> Made:
    """The network that `build` makes from seed 0, with random batch-norm statistics, and three images (3, *size)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build().eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.2, 0.2)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
        return network, torch.rand(3, *size)


NETWORKS: dict[str, Callable[[], Made]] = {
    "pooling": lambda: seeded(PoolingNetwork, 3, 20, 20),
    "flat, gray, two classes, not square": lambda: seeded(FlatNetwork, 1, 16, 12),
    "tokens, not square": lambda: seeded(TokenNetwork, 3, 16, 24),
    "normalized": lambda: seeded(
        lambda: Classifier.wrap(PoolingNetwork(), mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.25]), 3, 18, 26
    ),
    "linear": lambda: seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 9 * 7, 3)), 3, 9, 7),
}


@contextmanager
def untouched(model: nn.Module, *tensors: Tensor) -> Iterator[None]:
    """Assert that modes, parameters, gradients, hooks, random generators and the given tensors do not change."""

    def state() -> dict[str, Any]:
        return {
            "modes": [module.training for module in model.modules()],
            "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
            "needs gradients": [parameter.requires_grad for parameter in model.parameters()],
            "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            "hooks": [
                (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
                for m in model.modules()
            ],
            "random": torch.random.get_rng_state(),
            "grad mode": torch.is_grad_enabled(),
            "tensors": [tensor.clone() for tensor in tensors],
            "leaves": [(tensor.requires_grad, tensor.grad is None) for tensor in tensors],
        }

    before = state()
    try:
        yield
    finally:
        torch.testing.assert_close(state(), before, rtol=0, atol=0)
