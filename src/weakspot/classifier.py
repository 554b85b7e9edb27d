"""Models come in: any `nn.Module` becomes a `Classifier`, from images in [0, 1] to logits."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weakspot.checks import ModelWarning, check_batch, check_logits, check_range, contain_exits

LARGEST_BATCH = 128
BATCH_PIXELS = 4 * 224 * 224  # four images of 224 x 224: small enough for caches, measured no slower than 16


class Classifier(nn.Module):
    """Images in [0, 1], (N, C, H, W), to logits (N, K). Normalisation lives inside.

    Attributes:
        network: the wrapped module, the same object that was given.
        name: what reports call it.
        input_size: (height, width) that pictures are brought to.
        channels: 1 for grey images, 3 for colour.
        class_names: one name per class, or empty where none are known.
        fixed_batch: the one batch size the network can take, or None. `forward` takes any all the same, but who
            looks inside the network must give it that many images.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        input_size: tuple[int, int] | None = None,
        class_names: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        _check_normalisation(mean, std)
        reference = next(_floating_tensors(network), torch.zeros(()))
        for key, values in (("mean", mean), ("std", std)):
            statistics = torch.tensor(values, dtype=reference.dtype, device=reference.device)
            self.register_buffer(key, statistics.view(1, -1, 1, 1), persistent=False)
        self.unscaled = all(value == 1 for value in std) and len(std) <= len(mean)
        self.network = network
        self.name = name or type(network).__name__
        self.input_size = input_size or (224, 224)
        self.channels = _image_channels(network, max(len(mean), len(std)))
        self.class_names = tuple(class_names or ())
        self.fixed_batch: int | None = getattr(network, "fixed_batch", None)
        self.training = network.training

    @staticmethod
    def wrap(
        module: nn.Module,
        *,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        input_size: tuple[int, int] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Classifier:
        """Make a classifier of `module`, which must take images normalised as (image - mean) / std.

        Args:
            module: any network; it may return logits (N, K), a tuple or mapping that holds them, or an
                object with `.logits`. It is used as it is, not copied and not changed.
            mean: one value for every channel or one for all, on the [0, 1] scale; 0 for no normalisation.
            std: likewise; 1 for no normalisation.
            input_size: (height, width) that pictures are brought to; (224, 224) where nothing is said.
            class_names: one name per class.

        Raises:
            ValueError: when mean and std do not fit each other or std is not positive.

        >>> toy = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
        >>> Classifier.wrap(toy, mean=[0.5], std=[0.25])(torch.rand(3, 3, 2, 2)).shape
        torch.Size([3, 2])
        """
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"model is a {type(module).__name__}; accepted is a torch.nn.Module that returns logits"
            )
        return Classifier(module, mean=mean, std=std, input_size=input_size, class_names=class_names)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1] != self.mean.shape[1] and self.mean.shape[1] != 1:
            raise ValueError(
                f"images have {images.shape[1]} channels; {self.name} is normalised for {self.mean.shape[1]}"
            )
        try:
            shifted = (
                images.to(self.mean) - self.mean
            )  # a copy: what a network does in place, it does to that
            with contain_exits(self.name):
                output = self.network(shifted if self.unscaled else shifted / self.std)
        except RuntimeError as error:
            if images.shape[1] == self.channels:
                raise
            raise ValueError(
                f"images have {images.shape[1]} channels; {self.name}'s first convolution takes {self.channels}"
            ) from error
        logits = logits_of(output)
        return logits if logits.dtype in {torch.float32, torch.float64} else logits.float()

    def filled(self, images: Tensor) -> Tensor:
        """The images, the last one repeated until the network's own batch size divides their number."""
        missing = -len(images) % (self.fixed_batch or 1)
        return torch.cat([images, images[-1:].expand(missing, *images.shape[1:])]) if missing else images

    def class_name(self, index: int) -> str:
        """The class's name, or its number where no names are known."""
        return self.class_names[index] if 0 <= index < len(self.class_names) else f"class {index}"


def as_classifier(model: nn.Module) -> Classifier:
    """The model itself when it is a Classifier, else wrapped without normalisation."""
    return model if isinstance(model, Classifier) else Classifier.wrap(model)


def logits_of(output: Any) -> Tensor:
    """The logits (N, K) in whatever a network returned.

    Raises:
        ValueError: when no tensor of shape (N, K) with at least two classes is there.
    """
    found = _find_logits(output)
    if found is None:
        raise ValueError(
            f"the network returned {_describe(output)}; accepted are logits of shape (images, classes) with at "
            "least two classes, a tuple or mapping that holds them, or an object with .logits"
        )
    return found.flatten(1)


def _find_logits(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        singleton = output.ndim == 4 and output.shape[2:] == (1, 1)
        return output if (output.ndim == 2 or singleton) and output.shape[1] >= 2 else None
    if getattr(output, "logits", None) is not None:
        return _find_logits(output.logits)
    if isinstance(output, Mapping):
        named = [output[key] for key in ("logits", "out") if key in output]
        return next(
            (found for found in map(_find_logits, named or output.values()) if found is not None), None
        )
    if isinstance(output, tuple | list):
        return next((found for found in map(_find_logits, output) if found is not None), None)
    return None


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    return f"a {type(output).__name__}"


def _check_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    for name, values in (("mean", mean), ("std", std)):
        if not isinstance(values, Sequence):
            raise ValueError(
                f"{name} is {values!r}; accepted is a list, one number for all channels or one for each"
            )
    lengths = {len(mean), len(std)} - {1}
    if len(lengths) > 1 or 0 in lengths:
        raise ValueError(
            f"mean has {len(mean)} and std {len(std)} values; accepted is one for all channels or one for each"
        )
    if not all(0 < value < float("inf") for value in std):
        raise ValueError(f"std is {list(std)}; accepted are positive numbers on the [0, 1] scale of images")
    if not all(-1 <= value <= 2 for value in mean):
        raise ValueError(
            f"mean is {list(mean)}; accepted are numbers on the [0, 1] scale of images (divide 255ths by 255)"
        )


def _floating_tensors(network: nn.Module) -> Iterator[Tensor]:
    for tensors in (network.parameters(), network.buffers()):
        yield from (tensor for tensor in tensors if tensor.is_floating_point())


def _image_channels(network: nn.Module, statistics: int) -> int:
    """How many channels an image has: as many as there are statistics, else what the first convolution takes."""
    if statistics > 1:
        return statistics
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return 3


@contextmanager
def evaluating(model: nn.Module) -> Iterator[Classifier]:
    """The model as a classifier in eval mode, gradients on; mode, RNG and grad switches come back on exit.

    Warns:
        ModelWarning: when the module was left in train mode.
    """
    if isinstance(model, nn.Module) and model.training:
        warnings.warn(
            f"{getattr(model, 'name', type(model).__name__)} was left in train mode; it is evaluated in eval mode "
            "and put back afterwards (call model.eval() to silence this)",
            ModelWarning,
            stacklevel=4,
        )
    with torch.inference_mode(mode=False):  # buffers made in inference mode cannot take part in gradients
        classifier = as_classifier(model)
    modes = [(module, module.training) for module in classifier.modules()]
    device = classifier.mean.device
    others = random.getstate(), np.random.get_state()  # noqa: NPY002 - what a model may draw from is put back
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.inference_mode(mode=False),
            torch.enable_grad(),
        ):
            # Flags rather than .eval(): exported modules refuse .eval(), and an override could do anything.
            for module, _ in modes:
                module.training = False
            yield classifier
    finally:
        for module, mode in modes:
            module.training = mode
        random.setstate(others[0])
        np.random.set_state(others[1])  # noqa: NPY002


def check_images(images: Tensor, classifier: Classifier, *, name: str = "images") -> Tensor:
    """`images` as float (N, C, H, W) on the model's device, clamped to [0, 1]; never the caller's own tensor.

    Raises:
        ValueError: when they are not such a batch.

    Warns:
        ImageWarning: when values lie outside [0, 1] by more than rounding.
    """
    check_batch(images, name=name)
    check_range(images, name=name)
    return images.detach().to(classifier.mean.device, torch.float32, copy=True).clamp_(0, 1)


def default_batch(images: Tensor) -> int:
    """How many images of this size go through the model at once."""
    return max(1, min(LARGEST_BATCH, BATCH_PIXELS // (images.shape[-2] * images.shape[-1])))


def predict(classifier: Classifier, images: Tensor, batch_size: int | None = None) -> Tensor:
    """Logits (N, K) of images (N, C, H, W), in batches, without gradients; warns of probabilities."""
    with torch.no_grad():
        logits = torch.cat([classifier(batch) for batch in images.split(batch_size or default_batch(images))])
    check_logits(logits, classifier.name)
    return logits


def margin(logits: Tensor, labels: Tensor, rivals: Tensor | None = None) -> Tensor:
    """(N,) z_label - z_rival; without rivals, against the largest other logit. Negative: another class wins.

    >>> margin(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
    tensor([1.])
    """
    own = logits.gather(1, labels[:, None])[:, 0]
    if rivals is not None:
        return own - logits.gather(1, rivals[:, None])[:, 0]
    return own - runner_up(logits, labels)[0]


def runner_up(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit other than the label's and its class, each (N,)."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    best = others.max(1)
    return best.values, best.indices
