"""The fused form of a classifier: batch-norm folded into the convolutions before it, channels last.

In eval mode a batch-norm is a scale and a shift per channel, which the convolution before it can do at no cost
(Jacob et al. 2018, arXiv 1712.05877, section 3.2). Together with the channels-last memory layout this roughly halves
forward and backward passes on CPUs; either alone does not pay.

Nothing is copied or rewritten: while `fused` is entered, the module's own convolutions hold folded weights and its
batch-norms hand on what they are given. So hooks, wrappers and counters of the module go on working, and its Python
code runs as it is, whatever control flow it has. Which batch-norms may be folded is found once, by watching one image
go through a copy.
"""

from __future__ import annotations

import copy
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from weakspot.classifier import Classifier, default_batch

TOLERANCE = 1e-5  # of the largest logit
LOOKS = {"dim", "ndimension", "size", "stride", "numel", "is_contiguous", "is_floating_point", "is_complex"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
Fold = tuple[str, str]  # names of a convolution and of the batch-norm that follows it
Plan = Mapping[
    Fold, frozenset[str]
]  # folds, and the modules that what flows between the two goes into or comes out of

_plans: weakref.WeakKeyDictionary[nn.Module, tuple[object, Sequence[Fold]]] = weakref.WeakKeyDictionary()
_batches: weakref.WeakKeyDictionary[nn.Module, dict[object, int]] = weakref.WeakKeyDictionary()


@contextmanager
def fused(classifier: Classifier, image: Tensor) -> Iterator[None]:
    """The classifier in its fused form, equal to its own to 1e-5 of the largest logit; as it was on exit.

    What cannot be fused stays as it is: networks without batch-norm or with hooks inside, a convolution whose output
    is read by more than its batch-norm, a module that cannot be copied.

    Args:
        classifier: in eval mode.
        image: (1, C, H, W), what to watch on its way through the network the first time.
    """
    network = classifier.network
    modules = dict(network.named_modules())
    folds = [
        (modules[convolution], modules[norm])
        for convolution, norm in _plan(classifier, image)
        if _is_convolution(modules[convolution]) and _is_norm(modules[norm])
    ]
    with ExitStack() as stack:
        if folds:
            folded = {id(convolution) for convolution, _ in folds}
            for convolution, norm in folds:
                stack.enter_context(_folded(convolution, norm))
            for module in modules.values():
                if _is_convolution(module) and id(module) not in folded:
                    stack.enter_context(_replaced(module, weight=_channels_last(module.weight)))
        yield


def folded_convolutions(classifier: Classifier, image: Tensor) -> frozenset[nn.Module]:
    """The convolutions that `fused` would give other weights: their own outputs are not what they were, then."""
    modules = dict(classifier.network.named_modules())
    return frozenset(modules[convolution] for convolution, _ in _plan(classifier, image))


def _plan(classifier: Classifier, image: Tensor) -> Sequence[Fold]:
    """The folds that hold for this network and image shape, from memory where they were found before."""
    network = classifier.network
    structure = [(name, type(module)) for name, module in network.named_modules()]
    norms = [name for name, kind in structure if issubclass(kind, nn.BatchNorm2d)]
    if (
        not norms
        or not image.is_floating_point()
        or any(issubclass(k, nn.DataParallel) for _, k in structure)
        or _hooked_inside(network)
    ):
        return ()
    signature = _signature(classifier, image)
    known = _plans.get(network)
    if known is None or known[0] != signature:
        known = (signature, _find_folds(classifier, image))
        _plans[network] = known
    return known[1]


def _find_folds(classifier: Classifier, image: Tensor) -> Sequence[Fold]:
    """Watch the image go through a copy; keep the folds if the copy says the same with them."""
    try:
        with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(_devices(image)):
            warnings.simplefilter("ignore")
            twin = _without_hooks(classifier)
            probe = twin.filled(torch.cat([image, 1 - image]))
            expected, folds = _watch(twin, probe)
            _plans[twin.network] = (_signature(twin, image), folds)
            with fused(twin, image):
                found = twin(probe)
    except Exception:  # noqa: BLE001 - whatever a strange module raises, it then stays as it is
        return ()
    scale = expected.abs().amax(1, keepdim=True)
    return folds if bool(((found - expected).abs() <= TOLERANCE * scale).all()) else ()


def _signature(classifier: Classifier, image: Tensor) -> object:
    structure = [(name, type(module)) for name, module in classifier.network.named_modules()]
    return structure, tuple(image.shape[1:]), image.device


def _without_hooks(classifier: Classifier) -> Classifier:
    twin = copy.deepcopy(classifier)
    for module in twin.modules():
        for name, value in vars(module).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                value.clear()
    return twin


def _watch(twin: Classifier, images: Tensor) -> tuple[Tensor, Sequence[Fold]]:
    """Logits, and every batch-norm that alone reads the output of a convolution, each called once."""
    modules = dict(twin.network.named_modules())
    calls: dict[str, int] = {}
    made: dict[int, tuple[str, Tensor]] = {}  # holding the tensors keeps their ids from being used again
    read: dict[str, str] = {}
    names = {id(module): name for name, module in modules.items()}

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        source = made.get(id(arguments[0])) if arguments else None
        if source is not None:
            read[names[id(module)]] = source[0]

    def after(module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        name = names[id(module)]
        calls[name] = calls.get(name, 0) + 1
        if _is_convolution(module) and isinstance(output, Tensor):
            made[id(output)] = (name, output)

    handles = []
    for module in modules.values():
        if _is_norm(module):
            handles.append(module.register_forward_pre_hook(before))
        if _is_norm(module) or _is_convolution(module):
            handles.append(module.register_forward_hook(after))
    readers = _Readers(made)
    try:
        with readers:
            logits = twin(images)
    finally:
        for handle in handles:
            handle.remove()
    uses = {made[key][0]: count for key, count in readers.counts.items() if key in made}
    folds = [
        (convolution, norm)
        for norm, convolution in read.items()
        if calls.get(convolution) == calls.get(norm) == uses.get(convolution) == 1
        and modules[convolution].out_channels == modules[norm].num_features
    ]
    return logits, folds


class _Readers(TorchFunctionMode):
    """Counts the calls that take a tensor of `watched`; looking at its shape or type is none."""

    def __init__(self, watched: Mapping[int, object]) -> None:
        super().__init__()
        self.watched = watched
        self.counts: dict[int, int] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name not in LOOKS and not (name == "__get__" and not isinstance(result, Tensor)):
            leaves = _pytree.tree_leaves((args, kwargs))
            for key in {id(leaf) for leaf in leaves if isinstance(leaf, Tensor)} & self.watched.keys():
                self.counts[key] = self.counts.get(key, 0) + 1
        return result


def _is_convolution(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and isinstance(module._parameters.get("weight"), nn.Parameter)  # not computed by a parametrisation
        and "forward" not in vars(module)
    )


def _is_norm(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.BatchNorm2d)
        and type(module).forward is nn.BatchNorm2d.forward
        and module.running_mean is not None
        and "forward" not in vars(module)
    )


def _devices(images: Tensor) -> list[torch.device]:
    return [images.device] if images.is_cuda else []


def _hooked_inside(network: nn.Module) -> bool:
    """Whether a hook may see, change or call what folding changes: on all modules at once, or on any inner one.

    Modules around all convolutions and batch-norms are not inner ones; what counters hang on goes on working.
    """
    if any(bool(getattr(nn.modules.module, f"_global{name}", None)) for name in HOOKS):
        return True
    folded = {id(module) for module in network.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)}
    return any(
        _hooked(module) and not folded <= {id(inner) for inner in module.modules()}
        for module in network.modules()
    )


def _hooked(module: nn.Module) -> bool:
    return any(bool(getattr(module, name)) for name in HOOKS)


@contextmanager
def _folded(convolution: Any, norm: Any) -> Iterator[None]:
    """The convolution does the batch-norm's work and the batch-norm none."""
    with torch.no_grad():
        scale = (norm.running_var + norm.eps).rsqrt().double()
        shift = -norm.running_mean.double() * scale
        if norm.affine:
            scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
        weight = convolution.weight.double() * scale.view(-1, 1, 1, 1)
        bias = shift if convolution.bias is None else shift + convolution.bias * scale
        weight, bias = weight.to(convolution.weight.dtype), bias.to(convolution.weight.dtype)
    with _replaced(convolution, weight=_channels_last(weight), bias=bias):
        norm.forward = _unchanged
        try:
            yield
        finally:
            del norm.forward


@contextmanager
def _replaced(module: nn.Module, **tensors: Tensor) -> Iterator[None]:
    """The module with other parameters, its own put back on exit."""
    own = {name: module._parameters[name] for name in tensors}
    for name, tensor in tensors.items():
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    try:
        yield
    finally:
        module._parameters.update(own)


def _channels_last(weight: Tensor) -> Tensor:
    return weight.detach().contiguous(memory_format=torch.channels_last)


def _unchanged(images: Tensor) -> Tensor:
    return images


def measured_batch(classifier: Classifier, images: Tensor) -> int:
    """How many images of this shape go through the fused classifier at once: what costs least per image.

    Half, once and twice the usual number are timed once per network and shape, on a copy, where there are enough
    images for it to matter; another than the usual must save a tenth. Only multiples of four are tried: CPU kernels
    treat the rest of a division by four apart, and results would differ in their last bits.
    """
    usual = default_batch(images)
    if len(images) < max(4 * usual, 32):
        return usual
    key = (tuple(images.shape[1:]), images.device)
    known = _batches.setdefault(classifier.network, {})
    if key not in known:
        known[key] = _measure_batch(classifier, images, usual)
    return known[key]


def _measure_batch(classifier: Classifier, images: Tensor, usual: int) -> int:
    try:
        twin = _without_hooks(classifier)
    except Exception:  # noqa: BLE001 - a module that cannot be copied is not measured
        return usual
    sizes = sorted({max(4, usual // 8 * 4), usual, 2 * usual}, key=lambda size: size != usual)
    cost = {}
    with torch.random.fork_rng(_devices(images)), fused(twin, images[:1]):
        _seconds(twin, images[:usual])
        for size in sizes:
            with suppress(RuntimeError):  # too large for the memory
                cost[size] = _seconds(twin, images[:size]) / size
    if usual not in cost:
        return usual
    best = min(cost, key=cost.__getitem__)
    return best if cost[best] < 0.9 * cost[usual] else usual


def _seconds(classifier: Classifier, images: Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    point = images.clone().requires_grad_()
    logits = classifier(point)
    if logits.requires_grad:
        torch.autograd.grad(logits.sum(), point, allow_unused=True)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun
