"""Classifiers: any `nn.Module` as a function from images in [0, 1] to logits, evaluated in eval mode."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from weakspot._checks import (
    ModelWarning,
    check_batch,
    check_class_names,
    check_finite,
    check_normalization,
    check_range,
    check_size,
    warn_once,
)
from weakspot._errors import contain_exits, first_line
from weakspot._network_config import configured_names, configured_size, image_channels
from weakspot._state import EvalMode, preserve_random_state
from weakspot.logits import filled, logits_of, may_be_probabilities, warn_of_probabilities
from weakspot.statistics.number_format import counted

MAX_BATCH = 128
BATCH_PIXELS = 4 * 224 * 224  # four images of 224 x 224: small enough for caches, measured no slower than 16
# Modules of torch that compute something else in train mode.
MODE_DEPENDENT = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
    nn.MultiheadAttention,
    nn.RNNBase,
)

_evaluating = threading.local()  # ids of the classifiers that this thread evaluates


class Classifier(nn.Module):
    """A function from images (N, C, H, W) in [0, 1] to logits (N, K). Normalization is part of it.

    A call always evaluates in eval mode: dropout is off, batch-norm uses its running statistics and does not update
    them, and the mode of every module is the same afterward. Calls from several threads may overlap.

    Attributes:
        network: the wrapped module itself, not a copy.
        name: in reports and messages.
        input_size: (height, width) to which images are cropped and resized.
        channels: 1 for gray images, 3 for color.
        class_names: one name per class, or empty if they are not known.
        fixed_batch: the only batch size that the network accepts, or None. `forward` accepts any, but code that looks
            inside the network must pad batches with `filled`.
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
        check_normalization(mean, std)
        check_size("input_size", input_size)
        check_class_names(class_names)
        tensors = itertools.chain(network.parameters(), network.buffers())
        reference = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.zeros(()))
        for key, values in (("mean", mean), ("std", std)):
            statistics = torch.tensor(values, dtype=reference.dtype, device=reference.device)
            self.register_buffer(key, statistics.view(1, -1, 1, 1), persistent=False)
        self.unscaled = all(value == 1 for value in std)
        self.network = network
        self.name = name or type(network).__name__
        height, width = input_size or configured_size(network) or (224, 224)
        self.input_size = (int(height), int(width))
        self.channels = image_channels(network, max(len(mean), len(std)), self.input_size)
        self.class_names = tuple(class_names or configured_names(network))
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
        """Wrap a network that takes images normalized as (image - mean) / std.

        Args:
            module: any network that returns logits (N, K), a tuple or mapping that holds them, or an object with
                `.logits`. It is neither copied nor changed.
            mean: one value per channel or one for all, on the [0, 1] scale of images; 0 for no normalization.
            std: one value per channel or one for all, on the same scale; 1 for no normalization.
            input_size: (height, width) to which images are cropped and resized; by default that in the config of a
                transformers network, else (224, 224).
            class_names: one name per class; by default those in the config of a transformers network.

        Raises:
            ValueError: if an argument does not fit, mean and std do not fit each other, or std is not positive.

        >>> toy = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
        >>> Classifier.wrap(toy, mean=[0.5], std=[0.25])(torch.rand(3, 3, 2, 2)).shape
        torch.Size([3, 2])
        """
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"model must be a torch.nn.Module that returns logits, got {type(module).__name__}"
            )
        return Classifier(module, mean=mean, std=std, input_size=input_size, class_names=class_names)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W) in eval mode.

        Warns:
            ModelWarning: if the module is in train mode, once for each module.
        """
        if id(self) in getattr(_evaluating, "classifiers", ()):
            return self.in_own_mode(images)
        with EvalMode(self) as mode:
            if mode.switched:
                _warn_of_train_mode(self, mode.switched)
            return self.in_own_mode(images)

    def in_own_mode(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W) in the module's current mode, for training."""
        if not images.is_floating_point():
            raise ValueError(f"images must be floats in [0, 1], got {images.dtype} (divide bytes by 255)")
        channels = max(self.mean.shape[1], self.std.shape[1])  # either may be one value for all
        if channels not in {1, images.shape[1]}:
            raise ValueError(
                f"images must have {counted(channels, 'channel')}, as mean and std, got {images.shape[1]}"
            )
        try:
            # A copy, so that in-place layers do not change the images.
            shifted = images.to(self.mean) - self.mean
            with contain_exits(self.name):
                output = self.network(shifted if self.unscaled else shifted / self.std)
        except RuntimeError as error:
            if "Inference tensors" in str(error):
                raise ValueError(
                    f"{self.name} must be made outside of torch.inference_mode() to have gradients, got tensors made "
                    "inside (copy it with copy.deepcopy outside)"
                ) from error
            if images.shape[1] != self.channels:
                raise ValueError(
                    f"images must have {counted(self.channels, 'channel')} for {self.name}, got {images.shape[1]}"
                ) from error
            if tuple(images.shape[2:]) == tuple(self.input_size) or not _concerns_shape(error):
                raise
            height, width = images.shape[2:]
            raise ValueError(
                f"images must have a size that {self.name} takes, such as its input_size "
                f"{' x '.join(map(str, self.input_size))}, got {height} x {width} ({first_line(error)})"
            ) from error
        logits = logits_of(output)
        # Where the network is traced for export, the comparison would fix the number of images.
        if not torch.compiler.is_compiling() and len(logits) != len(images):
            raise ValueError(
                f"{self.name} must return one row per image, got {len(logits)} for {len(images)}"
            )
        return logits if logits.dtype in {torch.float32, torch.float64} else logits.float()

    def filled(self, images: Tensor) -> Tensor:
        """The images, with the last one repeated until their number is a multiple of `fixed_batch`."""
        return filled(images, self.fixed_batch or 1)

    def __repr__(self) -> str:
        sides = " x ".join(map(str, (self.channels, *self.input_size)))
        classes = f", {len(self.class_names)} class names" if self.class_names else ""
        mean, std = (
            [round(value, 4) for value in values.flatten().tolist()] for values in (self.mean, self.std)
        )
        return f"Classifier({self.name}: images {sides}, mean {mean}, std {std}{classes})"

    def class_name(self, index: int) -> str:
        """Unique name of a class, with its number if others share the name, or "class 3" if it has no name."""
        name = self.class_names[index] if 0 <= index < len(self.class_names) else f"class {index}"
        return f"{name} (class {index})" if self.class_names.count(name) > 1 else name


def gives_again(classifier: Classifier, images: Tensor, logits: Tensor) -> bool:
    """Whether another pass of images (N, C, H, W) gives their logits (N, K) again, but for rounding.

    Only inside `evaluating`: when it ends, it restores the generators that a random network draws from.
    """
    again = predict(classifier, images, finite=False)
    return torch.allclose(again, logits, rtol=1e-2, atol=1e-3 * float(logits.abs().max()))


def as_classifier(model: nn.Module) -> Classifier:
    """The model itself if it is a Classifier, else the model wrapped without normalization."""
    return model if isinstance(model, Classifier) else Classifier.wrap(model)


def _concerns_shape(error: RuntimeError) -> bool:
    """Whether torch refused a tensor for its shape, and not for lack of memory, for example."""
    is_memory = isinstance(error, torch.OutOfMemoryError) or "memory" in str(error)
    return not is_memory and any(word in str(error) for word in ("shape", "size", "dimension"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[Classifier]:
    """Hold a model in eval mode, gradients enabled, as a classifier; modes, generators and grad mode return on exit.

    Warns:
        ModelWarning: if the module is in train mode, once for each module.
    """
    with torch.inference_mode(mode=False):  # buffers made in inference mode have no gradients
        classifier = as_classifier(model)
    if classifier.mean.is_meta:
        raise ValueError(f"{classifier.name} must have weights, got meta tensors (load its weights first)")
    with (
        EvalMode(classifier) as mode,
        preserve_random_state(classifier.mean.device),
        torch.inference_mode(mode=False),
        torch.enable_grad(),
    ):
        if mode.switched:
            _warn_of_train_mode(classifier, mode.switched)
        evaluated = _evaluating.__dict__.setdefault("classifiers", [])
        evaluated.append(id(classifier))
        try:
            yield classifier
        finally:
            evaluated.remove(id(classifier))


def _warn_of_train_mode(classifier: Classifier, switched: Sequence[nn.Module]) -> None:
    """Warn of a network in train mode, or of submodules in it, except weakspot's own wrappers.

    Args:
        classifier: that is evaluated.
        switched: its modules that were in train mode.
    """
    ids, name = {id(module) for module in switched}, classifier.name
    modules = dict(classifier.named_modules())
    # torch.export replaces the method `train` of a module whose mode is part of the exported program.
    exported = tuple(f"{path}." for path, module in modules.items() if "train" in vars(module))
    users = [
        (path.removeprefix("network."), module)
        for path, module in modules.items()
        if not _is_wrapper(module) and not f"{path}.".startswith(exported)
    ]
    parts = [path for path, module in users if id(module) in ids and _depends_on_mode(module)]
    if users and id(users[0][1]) in ids:
        message = f"{name} was in train mode; weakspot evaluates it in eval mode and then restores its mode"
    elif parts:
        more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
        message = (
            f"parts of {name} were in train mode ({parts[0]}{more}); weakspot evaluates them in eval mode "
            "and then restores their mode"
        )
    else:
        return
    warn_once(classifier.network, "train mode", message, ModelWarning)


def _depends_on_mode(module: nn.Module) -> bool:
    return not type(module).__module__.startswith("torch.") or isinstance(module, MODE_DEPENDENT)


def _is_wrapper(module: nn.Module) -> bool:
    file = type(module).__module__
    return file.startswith("weakspot.") and file != "weakspot.zoo"


def check_images(images: Tensor, classifier: Classifier, *, name: str = "images") -> Tensor:
    """A float copy of the images (N, C, H, W) on the model's device, clamped to [0, 1].

    Raises:
        ValueError: if they are not a batch of images.

    Warns:
        ImageWarning: if values lie outside [0, 1] by more than rounding.
    """
    check_batch(images, name=name)
    check_range(images, name=name)
    return images.detach().to(classifier.mean.device, torch.float32, copy=True).clamp_(0, 1)


def default_batch(images: Tensor) -> int:
    """How many images of this size go through a model at once by default."""
    return max(1, min(MAX_BATCH, BATCH_PIXELS // max(1, images.shape[-2] * images.shape[-1])))


def predict(
    classifier: Classifier, images: Tensor, batch_size: int | None = None, *, finite: bool = True
) -> Tensor:
    """Logits (N, K) of images (N, C, H, W), in batches, without gradients; see `check_logits` for warnings.

    Args:
        classifier: in eval mode.
        images: as above.
        batch_size: images at once.
        finite: False to return rows that hold NaN or infinity, too.
    """
    with torch.no_grad():
        logits = torch.cat([classifier(batch) for batch in images.split(batch_size or default_batch(images))])
    judged = logits if finite else logits[logits.isfinite().all(1)]
    if len(judged):
        check_logits(judged, classifier, images)
    return logits


def check_logits(logits: Tensor, classifier: Classifier, images: Tensor) -> None:
    """Raise NotFiniteError if logits (N, K) are not finite; warn, once for each model, if they are probabilities.

    Args:
        logits: of some images.
        classifier: that returned them.
        images: (N, C, H, W); only their size and type matter.
    """
    check_finite(logits, classifier.name)
    if may_be_probabilities(logits):
        warn_of_probabilities(
            classifier, classifier.network, images.to(classifier.mean.device), classifier.name
        )


def as_wrapped_classifier(network: nn.Module, classifier: Classifier, name: str) -> Classifier:
    """A classifier of a network that takes images in [0, 1] and contains `classifier`, with the same attributes."""
    network.fixed_batch = classifier.fixed_batch  # type: ignore[assignment]
    network.training = classifier.training
    wrapped = Classifier(
        network, input_size=classifier.input_size, class_names=classifier.class_names, name=name
    )
    wrapped.channels = classifier.channels
    wrapped.training = classifier.training
    return wrapped
