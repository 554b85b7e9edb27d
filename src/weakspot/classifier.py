"""Models come in: any `nn.Module` becomes a `Classifier`, from images in [0, 1] to logits.

Wrapping: a network around a classifier is a classifier of the same images again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from weakspot._checks import (
    ModelWarning,
    check_batch,
    check_finite,
    check_range,
    contain_exits,
    is_news,
    is_quiet,
    quiet,
    warn_once,
)
from weakspot._state import EvalMode, preserve_random_state, unhooked_copy, unwatched

LARGEST_BATCH = 128
SUMS = 1e-4  # that a row of probabilities may be off by
SHAPES = (
    "View",
    "UnsafeView",
    "ReshapeAlias",
    "Squeeze",
    "Alias",
    "Clone",
    "ToCopy",
)  # steps that compute nothing
MODAL = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
    nn.MultiheadAttention,
    nn.RNNBase,
)
BATCH_PIXELS = 4 * 224 * 224  # four images of 224 x 224: small enough for caches, measured no slower than 16


_evaluating = threading.local()  # ids of the classifiers that this thread evaluates


class Classifier(nn.Module):
    """Images in [0, 1], (N, C, H, W), to logits (N, K). Normalization lives inside.

    It always answers in eval mode: a call turns dropout off, uses the running statistics of batch-norm and does not
    move them, and leaves the mode of every module as it was. Calls from several threads may overlap.

    Attributes:
        network: the wrapped module, the same object that was given.
        name: what reports call it.
        input_size: (height, width) that pictures are brought to.
        channels: 1 for gray images, 3 for color.
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
        _check_normalization(mean, std)
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
        """Make a classifier of `module`, which must take images normalized as (image - mean) / std.

        Args:
            module: any network; it may return logits (N, K), a tuple or mapping that holds them, or an
                object with `.logits`. It is used as it is, not copied and not changed.
            mean: one value for every channel or one for all, on the [0, 1] scale; 0 for no normalization.
            std: likewise; 1 for no normalization.
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
        """Logits (N, K) of images (N, C, H, W) in eval mode.

        Warns:
            ModelWarning: when the module is in train mode, once for each module.
        """
        if id(self) in getattr(_evaluating, "classifiers", ()):
            return self.in_own_mode(images)
        with EvalMode(self) as mode:
            if mode.switched:
                _warn_of_train_mode(self, mode.switched)
            return self.in_own_mode(images)

    def in_own_mode(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W) in the mode the module is in: what training needs."""
        if images.shape[1] != self.mean.shape[1] and self.mean.shape[1] != 1:
            raise ValueError(
                f"images have {images.shape[1]} channels; {self.name} is normalized for {self.mean.shape[1]}"
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
    """The model itself when it is a Classifier, else wrapped without normalization."""
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


def _check_normalization(mean: Sequence[float], std: Sequence[float]) -> None:
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
        ModelWarning: when the module is in train mode, once for each module.
    """
    with torch.inference_mode(mode=False):  # buffers made in inference mode cannot take part in gradients
        classifier = as_classifier(model)
    with EvalMode(classifier) as mode:
        if mode.switched:
            _warn_of_train_mode(classifier, mode.switched)
        inside = _evaluating.__dict__.setdefault("classifiers", [])
        inside.append(id(classifier))
        try:
            with (
                preserve_random_state(classifier.mean.device),
                torch.inference_mode(mode=False),
                torch.enable_grad(),
            ):
                yield classifier
        finally:
            inside.remove(id(classifier))


def _warn_of_train_mode(classifier: Classifier, switched: Sequence[nn.Module]) -> None:
    """Warn of a network in train mode, or of parts that are; flags of weakspot's own wrappers say nothing.

    Args:
        classifier: what is evaluated.
        switched: the modules in it that were in train mode.
    """
    ids, name = {id(module) for module in switched}, classifier.name
    every = dict(classifier.named_modules())
    fixed = tuple(
        f"{place}." for place, module in every.items() if "train" in vars(module)
    )  # by torch.export
    theirs = [
        (place.removeprefix("network."), module)
        for place, module in every.items()
        if not _is_wrapper(module) and not f"{place}.".startswith(fixed)
    ]
    parts = [place for place, module in theirs if id(module) in ids and _depends_on_mode(module)]
    if theirs and id(theirs[0][1]) in ids:
        message = (
            f"{name} was in train mode; weakspot evaluates it in eval mode and leaves its mode as it was"
        )
    elif parts:
        more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
        message = (
            f"parts of {name} were in train mode ({parts[0]}{more}); weakspot evaluates them in eval mode "
            "and leaves their mode as it was"
        )
    else:
        return
    warn_once(classifier.network, "train mode", message, ModelWarning)


def _depends_on_mode(module: nn.Module) -> bool:
    """Whether the module may compute something else in train mode: of torch's own, few do."""
    return not type(module).__module__.startswith("torch.") or isinstance(module, MODAL)


def _is_wrapper(module: nn.Module) -> bool:
    """Whether the module is one that weakspot puts around a network."""
    own = type(module).__module__
    return own.startswith("weakspot.") and not own.startswith("weakspot.zoo.")


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
    check_logits(logits, classifier, images)
    return logits


def check_logits(logits: Tensor, classifier: Classifier, images: Tensor) -> None:
    """Raise NotFiniteError when logits (N, K) are not finite; warn, once for each model, when they are probabilities.

    Args:
        logits: of some images.
        classifier: whose they are.
        images: (N, C, H, W), of which only size and type matter.
    """
    check_finite(logits, classifier.name)
    if float(logits.min()) >= 0 and float(logits.max()) <= 1 + SUMS:
        _warn_of_probabilities(classifier, images)


def _warn_of_probabilities(classifier: Classifier, images: Tensor) -> None:
    """Try the network on probe images: some logits may well lie between 0 and 1, those of all the probes do not.

    A copy is tried, so that the user's own hooks and counters see no passes but those that were asked for.
    """
    if is_quiet(ModelWarning) or not is_news(classifier.network, "outputs tried"):
        return
    switches = torch.inference_mode(mode=False), torch.enable_grad()
    with unwatched(), preserve_random_state(classifier.mean.device), quiet(), switches[0], switches[1]:
        output = _probed(classifier, images)
    if output is None:
        return
    values = output.detach()
    values = values[values.isfinite().all(1)]
    if not len(values) or float(values.min()) < 0 or float(values.max()) > 1 + SUMS:
        return
    if bool(((values.sum(1) - 1).abs() < SUMS).all()):
        what, before = "rows that are probabilities (they sum to one), not logits", "softmax"
    elif _ends_in_sigmoid(output) or (float(values.min()) < 0.001 and float(values.max()) > 0.999):
        what = "values between 0 and 1 that do not sum to one, as a sigmoid for each class does (multi-label)"
        before = "sigmoid"
    else:
        return
    warn_once(
        classifier.network,
        "probabilities",
        f"{classifier.name} returns {what}: gradients fade where it is certain and margins mislead; return the values "
        f"before the {before}",
        ModelWarning,
    )


def _probed(classifier: Classifier, images: Tensor) -> Tensor | None:
    """What a copy returns for probe images, for those in [0, 1] alone where it refuses others; None where for none."""
    try:
        twin = unhooked_copy(classifier)
    except Exception:  # noqa: BLE001 - whatever a strange module raises, it is then tried itself
        twin = classifier
    probes = _probes(images)
    for some in (probes, probes[:5]):
        try:
            output: Tensor = twin(twin.filled(some).requires_grad_())
        except Exception:  # noqa: BLE001, S112 - not every network takes images beyond [0, 1]
            continue
        return output
    return None


def _probes(images: Tensor) -> Tensor:
    """(8, C, H, W): noise, gray, black and white, then noise of a contrast that saturates what can be saturated."""
    noise = torch.rand((2, *images.shape[1:]), generator=torch.Generator().manual_seed(0)).to(images)
    flat = torch.tensor([0.5, 0.0, 1.0]).to(images).view(3, 1, 1, 1).expand(3, *images.shape[1:])
    strong = 1e4 * (noise - 0.5)
    return torch.cat([noise, flat, strong, -strong[:1]])


def _ends_in_sigmoid(output: Tensor) -> bool:
    """Whether the last thing that was computed is a sigmoid, as far as autograd recorded it."""
    step = output.grad_fn
    while step is not None and step.name().startswith(SHAPES) and step.next_functions:
        step = step.next_functions[0][0]
    return step is not None and step.name().startswith(("Sigmoid", "Hardsigmoid"))


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


def as_wrapped_classifier(network: nn.Module, classifier: Classifier, name: str) -> Classifier:
    """`network`, which takes images in [0, 1] and runs `classifier` somewhere inside, as a classifier of that name."""
    network.fixed_batch = classifier.fixed_batch  # type: ignore[assignment]
    network.training = classifier.training
    wrapped = Classifier(
        network, input_size=classifier.input_size, class_names=classifier.class_names, name=name
    )
    wrapped.channels = classifier.channels
    wrapped.training = classifier.training
    return wrapped
