"""Checks of arguments, and warnings at the line of the caller.

Every error is one sentence: "ARGUMENT must be EXPECTED, got VALUE (remedy)".
"""

import contextlib
import difflib
import importlib.util
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROUNDING = 1e-5
LISTED = 20  # choices that a message lists
INSIDE = (f"{Path(__file__).parent}{os.sep}", f"{Path(torch.__file__).parent}{os.sep}", contextlib.__file__)
"""Prefixes of files that `warn` skips on its way up to the caller's line."""


class ModelWarning(UserWarning):
    """The model is probably not what the user believes it to be."""


class ImageWarning(UserWarning):
    """An image was skipped or converted, or has values outside [0, 1]."""


class NotFiniteError(ValueError):
    """A network returned NaN or infinity."""


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line that called weakspot, however deep inside weakspot the cause is."""
    if (collected := getattr(_this, "collected", None)) is not None:
        collected += [] if is_quiet(category) else [message]
        return
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INSIDE):
        frame = frame.f_back
    # The registry of the caller's module, where Python notes which of its warnings have been shown.
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    module = frame.f_globals.get("__name__") or "<unknown>"
    warnings.warn_explicit(message, category, frame.f_code.co_filename, frame.f_lineno, module, registry)


_warned: weakref.WeakKeyDictionary[object, set[str]] = weakref.WeakKeyDictionary()


def warn_once(subject: object, cause: str, message: str, category: type[Warning]) -> None:
    """Warn once in the lifetime of the subject.

    Args:
        subject: a model.
        cause: key of the problem; each (subject, cause) warns once.
        message: text of the warning.
        category: of the warning.
    """
    # In this order: a quiet call does not use up the one warning.
    if not is_quiet(category) and is_news(subject, cause):
        warn(message, category)


def is_news(subject: object, cause: str) -> bool:
    """Whether this is the first call with this subject and cause."""
    with _lock:
        causes = _warned.setdefault(subject, set())
        news = cause not in causes
        causes.add(cause)
    return news


_lock = threading.Lock()
_this = threading.local()
_filters: dict[type[Warning], list[object]] = {}  # by category: number of quiet threads, and the filter


@contextlib.contextmanager
def quiet(category: type[Warning] = Warning) -> Iterator[None]:
    """Ignore warnings of a category in this thread only.

    `warnings.catch_warnings` changes the filters of all threads: if two threads overlap in it, the last one to leave
    restores the filters of the other, permanently.
    """
    depth: dict[type[Warning], int] = _this.__dict__.setdefault("depth", {})
    with _lock:
        depth[category] = depth.get(category, 0) + 1
        entry = _filters.setdefault(category, [0, ("ignore", _ThisThread(category), category, None, 0)])
        entry[0] += 1  # type: ignore[operator]
        # By hand, because `filterwarnings` takes only a text as the pattern of messages.
        warnings.filters.insert(0, entry[1])  # type: ignore[attr-defined]
    try:
        yield
    finally:
        with _lock:
            depth[category] -= 1
            entry[0] -= 1  # type: ignore[operator]
            if not entry[0]:
                del _filters[category]
            with contextlib.suppress(ValueError):  # other code has reset the filters
                warnings.filters.remove(entry[1])  # type: ignore[attr-defined]


@contextlib.contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """The messages of `warn` in this thread, in a list instead of as warnings, for callers that tell them otherwise."""
    before = getattr(_this, "collected", None)
    messages: list[str] = []
    _this.collected = messages
    try:
        yield messages
    finally:
        _this.collected = before


class _ThisThread:
    """Takes the place of a filter's message pattern; matches every message in a quiet thread."""

    def __init__(self, category: type[Warning]) -> None:
        self.category = category

    def match(self, message: str) -> bool:  # noqa: ARG002 - the signature of a pattern
        return bool(getattr(_this, "depth", {}).get(self.category))


def is_quiet(category: type[Warning]) -> bool:
    """Whether this thread currently ignores warnings of the category."""
    depth: dict[type[Warning], int] = getattr(_this, "depth", {})
    return any(count and issubclass(category, kind) for kind, count in depth.items())


def unknown_choice(name: str, value: object, choices: Iterable[str], *, remedy: str = "") -> str:
    """The message for a value that is not among the choices, with the closest choice as the remedy.

    Args:
        name: of the argument.
        value: that was given.
        choices: the valid values. More than 20 are abbreviated.
        remedy: what else the user can do, appended in parentheses.

    >>> unknown_choice("attack", "pdg", ["fgsm", "pgd"])
    "attack must be one of fgsm, pgd, got 'pdg' (did you mean 'pgd'?)"
    """
    names = list(choices)
    listed = ", ".join(names[:LISTED]) + (f", ... ({len(names)} in total)" if len(names) > LISTED else "")
    near = difflib.get_close_matches(str(value), names, n=3)
    hints = [f"did you mean {' or '.join(map(repr, near))}?"] if near else []
    hints += [remedy] if remedy else []
    hint = f" ({'; '.join(hints)})" if hints else ""
    return f"{name} must be one of {listed or '(none available)'}, got {value!r}{hint}"


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of the choices."""
    names = list(choices)
    if value not in names:
        raise ValueError(unknown_choice(name, value, names))


def require(purpose: str, *modules: str, extra: str) -> None:
    """Check that optional packages are installed, without importing them.

    Args:
        purpose: subject of the error's sentence, such as "an audit".
        *modules: names as they are imported.
        extra: the extra of weakspot that installs them.

    Raises:
        ValueError: if one is missing, with the command that installs it.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            package = module.replace("_", "-")
            raise ValueError(f"{purpose} needs {package}: pip install 'weakspot[{extra}]'")


def is_number(value: object) -> bool:
    """Whether the value is an int or a float, of Python or NumPy, and not a bool."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def with_plain_numbers(settings: object) -> None:
    """Replace the NumPy numbers in a frozen data class by Python's, which JSON and fingerprints need."""
    for name, value in vars(settings).items():
        if isinstance(value, np.generic):
            object.__setattr__(settings, name, value.item())


def check_count(name: str, value: object, *, least: int = 1) -> None:
    """Raises ValueError unless `value` is an integer of at least `least`."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_size(name: str, size: object) -> None:
    """Raises ValueError unless `size` is (height, width), both at least 1, or None."""
    whole = isinstance(size, tuple | list) and all(
        isinstance(side, int | np.integer) and not isinstance(side, bool) and side > 0 for side in size
    )
    if size is not None and not (whole and len(size) == 2):  # type: ignore[arg-type]
        raise ValueError(f"{name} must be (height, width) in pixels, both at least 1, got {size!r}")


def check_class_names(names: object) -> None:
    """Raises ValueError unless `names` is a list or tuple of texts, or None."""
    texts = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    if names is not None and not texts:
        raise ValueError(f"class_names must be a list of texts, one per class, got {names!r}")


def check_normalization(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raises ValueError unless mean and std have one value for all channels or one for each, on the scale of images."""
    for name, values in (("mean", mean), ("std", std)):
        if not isinstance(values, Sequence) or not all(isinstance(value, Real) for value in values):
            raise ValueError(
                f"{name} must be a list of one number for all channels or one for each, got {values!r}"
            )
    lengths = {len(mean), len(std)} - {1}
    if len(lengths) > 1 or 0 in lengths:
        raise ValueError(
            "mean and std must have one value for all channels or one for each, "
            f"got {len(mean)} and {len(std)} values"
        )
    if not all(0 < value < float("inf") for value in std):
        raise ValueError(f"std must be positive, on the [0, 1] scale of images, got {list(std)}")
    if not all(-1 <= value <= 2 for value in mean):
        raise ValueError(
            f"mean must be on the [0, 1] scale of images, got {list(mean)} (divide means of bytes by 255)"
        )


def check_batch(images: Tensor, *, name: str = "images") -> None:
    """Raises ValueError unless `images` is a finite float batch (N, C, H, W) with at least one pixel."""
    if not isinstance(images, Tensor):
        raise ValueError(f"{name} must be a float tensor (N, C, H, W) in [0, 1], got {type(images).__name__}")
    if images.is_meta or images.layout != torch.strided:
        kind = "meta" if images.is_meta else str(images.layout)
        raise ValueError(f"{name} must be a dense tensor that has values, got a {kind} tensor")
    if images.ndim != 4:
        hint = " (add a batch dimension with images[None])" if images.ndim == 3 else ""
        raise ValueError(f"{name} must have shape (N, C, H, W), got {tuple(images.shape)}{hint}")
    if not images.is_floating_point():
        raise ValueError(f"{name} must be floats in [0, 1], got {images.dtype} (divide bytes by 255)")
    if 0 in images.shape:
        raise ValueError(f"{name} must hold at least one pixel, got shape {tuple(images.shape)}")
    if not bool(images.isfinite().all()):
        bad = int((~images.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"{name} must be numbers in [0, 1], got NaN or infinity in {name}[{bad}]")


def check_range(images: Tensor, *, name: str = "images") -> None:
    """Warns with ImageWarning if values leave [0, 1] by more than rounding."""
    low, high = float(images.detach().min()), float(images.detach().max())
    if low < -ROUNDING or high > 1 + ROUNDING:
        warn(
            f"{name} span {low:.3g} to {high:.3g} and are clipped to [0, 1] (give unnormalized images and let the "
            "classifier normalize them: Classifier.wrap(module, mean=..., std=...))",
            ImageWarning,
        )


def check_classes(
    classes: Tensor, count: int, class_count: int | None = None, *, name: str = "labels"
) -> None:
    """Raises ValueError unless `classes` holds one class, below `class_count`, for each of `count` images."""
    is_numeric = isinstance(classes, Tensor) and classes.dtype != torch.bool
    if not (is_numeric and classes.shape == (count,)) or classes.is_floating_point() or classes.is_complex():
        raise ValueError(
            f"{name} must be an integer tensor of shape ({count},), one class per image, got {described(classes)}"
        )
    wrong = classes < 0 if class_count is None else (classes < 0) | (classes >= class_count)
    if bool(wrong.any()):
        expected = "at least 0" if class_count is None else f"between 0 and {class_count - 1}"
        raise ValueError(f"{name} must be classes {expected}, got {int(classes[wrong][0])}")


def described(value: object) -> str:
    """Shape and dtype of a tensor, the type of anything else."""
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def check_budget(budget: object) -> None:
    """Raises ValueError unless `budget` has the methods of the protocol `Budget`."""
    if not all(
        callable(getattr(budget, method, None)) for method in ("project", "steepest_step", "distance")
    ):
        raise ValueError(
            f"budget must be a budget such as Linf(4 / 255), L2(1.0), L1(10) or SSIM(0.01), got {budget!r}"
        )


def check_region(region: Tensor, images: Tensor) -> None:
    """Raises ValueError unless `region` is a bool tensor (N, 1, H, W) or (1, 1, H, W)."""
    count, _, height, width = images.shape
    shapes = {(count, 1, height, width), (1, 1, height, width)}
    if not isinstance(region, Tensor) or region.dtype != torch.bool or tuple(region.shape) not in shapes:
        raise ValueError(
            f"region must be a bool tensor of shape ({count}, 1, {height}, {width}), got {described(region)}"
        )


def check_seed(seed: int) -> None:
    """Raises ValueError unless `seed` is an integer that fits 64 bits."""
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or abs(int(seed)) >= 2**63:
        raise ValueError(f"seed must be an integer between -2**63 and 2**63, got {seed!r}")


def check_fraction(fraction: float, *, name: str = "fraction") -> None:
    """Raises ValueError unless `fraction` is a number between 0 and 1."""
    if not is_number(fraction):  # as --set leaves what is none
        raise ValueError(f"{name} must be between 0 and 1, got {fraction!r}")
    if not 0 <= fraction <= 1:
        tenth, percent = fraction / 10, fraction / 100
        hint = f" (did you mean {tenth if tenth < 1 else percent:g}?)" if 1 < fraction <= 100 else ""
        raise ValueError(f"{name} must be between 0 and 1, got {fraction!r}{hint}")


def check_finite(logits: Tensor, name: str) -> None:
    """Raises NotFiniteError unless logits (N, K) are all finite."""
    if not bool(logits.isfinite().all()):
        bad = int((~logits.isfinite()).any(1).nonzero()[0])
        raise NotFiniteError(
            f"{name} returned NaN or infinity for image {bad} of {len(logits)}, which may be changed images "
            "(check its weights and normalization)"
        )


def checked_batch_size(batch_size: int | None) -> int | None:
    """The batch size as Python's int, which `Tensor.split` needs.

    Raises:
        ValueError: unless `batch_size` is None or an integer of at least 1.
    """
    if batch_size is None:
        return None
    check_count("batch_size", batch_size)
    return int(batch_size)
