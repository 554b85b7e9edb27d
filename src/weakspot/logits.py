"""Logits: finding them in what a network returns, margins between classes, and telling probabilities from logits."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weakspot._checks import ModelWarning, is_news, is_quiet, quiet, warn_once
from weakspot._random import float32_noise
from weakspot._state import preserve_random_state, unhooked_copy, unwatched

ROUNDING = 1e-4  # by which a row of probabilities may miss a sum of 1
VIEWS = (
    "View",
    "UnsafeView",
    "ReshapeAlias",
    "Squeeze",
    "Alias",
    "Clone",
    "ToCopy",
)  # autograd steps without arithmetic


def logits_of(output: object) -> Tensor:
    """The logits (N, K) in what a network returned.

    Args:
        output: a tensor (N, K) or (N, K, 1, 1), a tuple or mapping that holds one, or an object with `.logits`.

    Raises:
        ValueError: if there is no tensor of this shape with at least two classes.
    """
    logits = _find_logits(output)
    if logits is None:
        value = (
            f"a tensor of shape {tuple(output.shape)}"
            if isinstance(output, Tensor)
            else type(output).__name__
        )
        # One value for each image.
        is_one = isinstance(output, Tensor) and output.ndim > 0 and output.numel() == len(output)
        remedy = " (one logit, z against 0: wrap the network in weakspot.OneLogit)" if is_one else ""
        raise ValueError(
            "the network must return logits of shape (images, classes) with at least two classes, a tuple or mapping "
            f"that holds them, or an object with .logits, got {value}{remedy}"
        )
    return logits.flatten(1)


class OneLogit(nn.Module):
    """A network with one logit z as a classifier of two classes, with logits (0, z): class 1 wins if z is positive.

    Also asks a multi-label network about one of its labels: without a label, weakspot compares each label with the
    others, as if exactly one of them held.

    Args:
        network: returns z as (N,), (N, 1) or, with `label`, (N, K); before any sigmoid.
        label: the label of a multi-label network to ask about.

    >>> network = OneLogit(nn.Sequential(nn.Flatten(), nn.Linear(12, 1)))
    >>> network(torch.rand(5, 3, 2, 2)).shape
    torch.Size([5, 2])
    """

    def __init__(self, network: nn.Module, *, label: int | None = None) -> None:
        super().__init__()
        self.network = network
        self.label = label

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 2).

        Raises:
            ValueError: if the network does not return one value for each image, or has no such label.
        """
        output = self.network(images)
        output = getattr(output, "logits", output)
        if not isinstance(output, Tensor):
            raise ValueError(f"the network must return a tensor of logits, got {type(output).__name__}")
        logits = output.flatten(1) if output.ndim > 1 else output[:, None]
        count = logits.shape[1]
        if self.label is None and count != 1:
            raise ValueError(f"the network must return one logit for each image, got {count} (give label=)")
        if self.label is not None and not 0 <= self.label < count:
            raise ValueError(f"label must be between 0 and {count - 1}, got {self.label}")
        column = self.label or 0
        # A zero is put before z.
        return F.pad(logits[:, column : column + 1], (1, 0))


def _find_logits(output: object) -> Tensor | None:
    if isinstance(output, Tensor):
        is_map = output.ndim == 4 and output.shape[2:] == (1, 1)
        return output if (output.ndim == 2 or is_map) and output.shape[1] >= 2 else None
    named = getattr(output, "logits", None)
    if named is not None:
        return _find_logits(named)
    parts: list[object] = []
    if isinstance(output, Mapping):
        # These names first: a mapping may also hold the logits of an auxiliary head.
        parts = [output[key] for key in ("logits", "out") if key in output] or list(output.values())
    elif isinstance(output, tuple | list):
        parts = list(output)
    return next((logits for logits in map(_find_logits, parts) if logits is not None), None)


def margin(logits: Tensor, labels: Tensor, others: Tensor | None = None) -> Tensor:
    """z_label - z_other, (N,); negative if the other class wins.

    Args:
        logits: (N, K).
        labels: (N,).
        others: (N,) the other class; by default the one with the largest logit.

    >>> margin(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
    tensor([1.])
    """
    own = logits.gather(1, labels[:, None])[:, 0]
    if others is not None:
        return own - logits.gather(1, others[:, None])[:, 0]
    return own - runner_up(logits, labels)[0]


def logit_scale(logits: Tensor) -> Tensor:
    """What rounding errors of logits (M, K) are relative to: their range over masks and classes.

    The range of one row will not do: of two classes, the margin is always the whole range.
    """
    # Logits that are large and close together are rounded by their size, not by their range.
    spread = logits.max() - logits.min()
    return torch.maximum(spread, 0.1 * logits.abs().max()).clamp(min=torch.finfo(logits.dtype).tiny)


def runner_up(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of a class other than the label, and that class, each (N,)."""
    best = logits.scatter(1, labels[:, None], -torch.inf).max(1)
    return best.values, best.indices


def may_be_probabilities(logits: Tensor) -> bool:
    """Whether all values lie in [0, 1]."""
    return float(logits.min()) >= 0 and float(logits.max()) <= 1 + ROUNDING


def probability_layer(output: Tensor) -> str | None:
    """The layer that made probabilities of logits, "softmax" or "sigmoid", or None if the values are logits.

    Args:
        output: (N, K) of `probe_images`, with its autograd history: logits of a few images may lie between 0 and 1 by
            chance, those of all the probes do not.
    """
    values = output.detach()
    values = values[values.isfinite().all(1)]
    if not len(values) or not may_be_probabilities(values):
        return None
    if bool(((values.sum(1) - 1).abs() < ROUNDING).all()):
        return "softmax"
    saturates = float(values.min()) < 0.001 and float(values.max()) > 0.999
    return "sigmoid" if saturates or _ends_in_sigmoid(output) else None


def warn_of_probabilities(model: nn.Module, network: nn.Module, images: Tensor, name: str) -> None:
    """Warn, once for each network, if the outputs for probe images are probabilities.

    The probes go through a copy, so that the user's hooks and counters see only the passes that the user asked for.

    Args:
        model: that returns logits, or what should be logits.
        network: the module inside that the user knows.
        images: (N, C, H, W); only their size and type matter.
        name: of the model.
    """
    if is_quiet(ModelWarning) or not is_news(network, "outputs probed"):
        return
    with (
        unwatched(),
        preserve_random_state(getattr(model, "mean", images).device),
        quiet(),
        torch.inference_mode(mode=False),
        torch.enable_grad(),
    ):
        output = _probe(model, images, getattr(network, "fixed_batch", None) or 1)
    layer = None if output is None else probability_layer(output)
    if layer is None:
        return
    values = {
        "softmax": "values between 0 and 1 that sum to one in each row, as a softmax does",
        "sigmoid": "values between 0 and 1 that do not sum to one, as a sigmoid for each class does (multi-label)",
    }
    remedy = {
        "softmax": "return the values before the softmax",
        "sigmoid": "return the values before the sigmoid; weakspot.OneLogit asks about one label",
    }
    warn_once(
        network,
        "probabilities",
        f"{name} returns {values[layer]}: gradients fade where it is certain and margins mislead ({remedy[layer]})",
        ModelWarning,
    )


def _probe(model: nn.Module, images: Tensor, multiple: int) -> Tensor | None:
    """Outputs of a copy for the probe images, or for those in [0, 1] if it refuses others; None if it refuses all."""
    try:
        copy = unhooked_copy(model)
    except Exception:  # noqa: BLE001 - a module that cannot be copied, for whatever reason, is probed itself
        copy = model
    probes = probe_images(images)
    for batch in (probes, probes[:5]):
        try:
            # With gradients, so that the graph shows whether a sigmoid came last.
            output: Tensor = copy(filled(batch, multiple).requires_grad_())
        except Exception:  # noqa: BLE001, S112 - not every network takes images beyond [0, 1]
            continue
        return output
    return None


def filled(images: Tensor, multiple: int) -> Tensor:
    """The images, with the last one repeated until their number is a multiple."""
    missing = -len(images) % multiple
    return torch.cat([images, images[-1:].expand(missing, *images.shape[1:])]) if missing else images


def probe_images(images: Tensor) -> Tensor:
    """Probes (8, C, H, W): two of noise, gray, black, white, then three of noise so strong that a sigmoid saturates."""
    generator = torch.Generator().manual_seed(0)
    noise = float32_noise(generator, 2, *images.shape[1:]).to(images)
    flat = torch.tensor([0.5, 0.0, 1.0]).to(images).view(3, 1, 1, 1).expand(3, *images.shape[1:])
    strong = 1e4 * (noise - 0.5)
    return torch.cat([noise, flat, strong, -strong[:1]])


def _ends_in_sigmoid(output: Tensor) -> bool:
    """Whether autograd recorded a sigmoid as the last computation."""
    step = output.grad_fn
    while step is not None and step.name().startswith(VIEWS) and step.next_functions:
        step = step.next_functions[0][0]
    return step is not None and step.name().startswith(("Sigmoid", "Hardsigmoid"))
