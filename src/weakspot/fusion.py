"""Batch-norm folded into the convolution before it, with the channels-last memory layout.

In eval mode a batch-norm is a scale and a shift per channel, which the convolution before it can apply at no cost
(Jacob et al. 2018, arXiv 1712.05877, section 3.2). Together with the channels-last layout this roughly halves the time
of forward and backward passes on CPUs; either one alone does not help.

The network is neither copied nor rewritten: inside `fused`, a function mode of this thread (torch.overrides) passes the
folded weights to the network's calls of conv2d and skips its calls of batch_norm. Hooks, wrappers and counters of the
network therefore still work, other threads see the unchanged network, and an interrupted search leaves nothing to
restore. Which batch-norms can be folded is determined once, by recording a pass of one image through a copy.
"""

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from weakspot._checks import quiet
from weakspot._state import HOOKS, hooks, trial_copy
from weakspot.classifier import Classifier, default_batch

TOLERANCE = 1e-5  # of the largest logit
CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")  # arguments of F.conv2d
INSPECTIONS = {
    "dim", "ndimension", "size", "stride", "numel", "is_contiguous", "is_floating_point", "is_complex",
}  # fmt: skip
Fold = tuple[str, str]  # names of a convolution and of the batch-norm that follows it
_plans: weakref.WeakKeyDictionary[nn.Module, tuple[object, Sequence[Fold]]] = weakref.WeakKeyDictionary()
_batches: weakref.WeakKeyDictionary[nn.Module, dict[object, int]] = weakref.WeakKeyDictionary()
_active = threading.local()  # the function modes that this thread is in


@contextmanager
def fused(classifier: Classifier, image: Tensor) -> Iterator[None]:
    """Evaluate a classifier in fused form in this thread; logits are equal to 1e-5 of the largest logit.

    A network is evaluated as it is if it has no batch-norm, has hooks inside or cannot be copied; so is a convolution
    whose output is used by more than its batch-norm. The weights on entry are folded; later changes are not seen.

    Args:
        classifier: in eval mode.
        image: (1, C, H, W); the first time, its pass through a copy of the network is recorded.
    """
    network = classifier.network
    active: list[_Folded] = _active.__dict__.setdefault("modes", [])
    if any(network is mode.network for mode in active):
        yield
        return
    modules = dict(network.named_modules())
    owners = _owners(network)
    folds = [
        (modules[convolution], modules[norm])
        for convolution, norm in _plan(classifier, image)
        if _is_convolution(modules[convolution])
        and _is_norm(modules[norm])
        and owners[id(modules[convolution].weight)] == owners[id(modules[norm].running_mean)] == 1
    ]
    if not folds:
        yield
        return
    mode = _Folded(network, folds)
    active.append(mode)
    try:
        with mode:
            yield
    finally:
        active.remove(mode)


def folded_convolutions(classifier: Classifier, image: Tensor) -> frozenset[nn.Module]:
    """The convolutions to which `fused` passes folded weights, so that their own outputs differ."""
    modules = dict(classifier.network.named_modules())
    return frozenset(modules[convolution] for convolution, _ in _plan(classifier, image))


def _plan(classifier: Classifier, image: Tensor) -> Sequence[Fold]:
    """The folds of this network for this image shape, cached."""
    network = classifier.network
    structure = [(name, type(module)) for name, module in network.named_modules()]
    norms = [name for name, kind in structure if issubclass(kind, nn.BatchNorm2d)]
    if (
        not norms
        or not image.is_floating_point()
        or any(issubclass(k, nn.DataParallel) for _, k in structure)
        or any(_is_compiled(module) for module in network.modules())
        or _hooked_inside(network)
    ):
        return ()
    signature = _signature(classifier, image)
    cached = _plans.get(network)
    if cached is None or cached[0] != signature:
        cached = (signature, _find_folds(classifier, image))
        _plans[network] = cached
    return cached[1]


def _find_folds(classifier: Classifier, image: Tensor) -> Sequence[Fold]:
    """Record a pass through a copy; return the folds if the copy's logits stay the same with them."""
    try:
        with quiet(), torch.no_grad(), trial_copy(classifier) as twin:
            probe = torch.cat([image, 1 - image])
            expected, folds = _record_folds(twin, probe)
            _plans[twin.network] = (_signature(twin, image), folds)
            with fused(twin, image):
                logits = twin(probe)
            if folds and _runs_again(twin, probe):
                return ()
    except Exception:  # noqa: BLE001 - a module that fails here, in whatever way, is not fused
        return ()
    scale = expected.abs().amax(1, keepdim=True)
    return folds if bool(((logits - expected).abs() <= TOLERANCE * scale).all()) else ()


def _runs_again(twin: Classifier, probe: Tensor) -> bool:
    """Whether the backward pass runs modules again (checkpointing), outside the function mode and so unfused."""
    calls: list[nn.Module] = []
    with torch.inference_mode(mode=False), torch.enable_grad():
        point = probe.clone().requires_grad_()
        logits = twin(point)
        for module in twin.network.modules():
            if _is_convolution(module):
                module.register_forward_hook(lambda module, *_: calls.append(module))
        if logits.requires_grad:
            torch.autograd.grad(logits.sum(), point, allow_unused=True)
    return bool(calls)


def _signature(classifier: Classifier, image: Tensor) -> object:
    structure = [(name, type(module)) for name, module in classifier.network.named_modules()]
    return structure, tuple(image.shape[1:]), image.device


def _record_folds(twin: Classifier, images: Tensor) -> tuple[Tensor, Sequence[Fold]]:
    """Logits, and the pairs of a convolution and the only reader of its output, a batch-norm, each called once."""
    modules = dict(twin.network.named_modules())
    calls: dict[str, int] = {}
    made: dict[int, tuple[str, Tensor]] = {}  # the tensors are held so that their ids are not reused
    read: dict[str, str] = {}
    names = {id(module): name for name, module in modules.items()}

    def before(module: nn.Module, arguments: tuple[object, ...]) -> None:
        source = made.get(id(arguments[0])) if arguments else None
        if source is not None:
            read[names[id(module)]] = source[0]

    def after(module: nn.Module, _: tuple[object, ...], output: object) -> None:
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
    with readers:
        logits = twin(images)
    for handle in handles:  # if the pass fails, the copy is not used again
        handle.remove()
    uses = {made[key][0]: count for key, count in readers.counts.items() if key in made}
    folds = [
        (convolution, norm)
        for norm, convolution in read.items()
        if calls.get(convolution) == calls.get(norm) == uses.get(convolution) == 1
        and modules[convolution].out_channels == modules[norm].num_features
    ]
    return logits, folds


def _owners(network: nn.Module) -> dict[int, int]:
    """By id, how many modules own each parameter and buffer; shared weights are not folded."""
    counts: dict[int, int] = {}
    for module in network.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            counts[id(tensor)] = counts.get(id(tensor), 0) + 1
    return counts


class _Readers(TorchFunctionMode):
    """Counts the calls that take a tensor of `watched`, except those that only inspect its shape or type."""

    def __init__(self, watched: Mapping[int, object]) -> None:
        super().__init__()
        self.watched = watched
        self.counts: dict[int, int] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name not in INSPECTIONS and not (name == "__get__" and not isinstance(result, Tensor)):
            leaves = _pytree.tree_leaves((args, kwargs))
            for key in {id(leaf) for leaf in leaves if isinstance(leaf, Tensor)} & self.watched.keys():
                self.counts[key] = self.counts.get(key, 0) + 1
        return result


def _is_convolution(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and isinstance(module._parameters.get("weight"), nn.Parameter)  # not computed by a parametrization
        and "forward" not in vars(module)
    )


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile made the module; it would compile the function mode, too, for every shape."""
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


def _is_norm(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.BatchNorm2d)
        and type(module).forward is nn.BatchNorm2d.forward
        and module.running_mean is not None
        and "forward" not in vars(module)
    )


def _hooked_inside(network: nn.Module) -> bool:
    """Whether a hook may see what folding changes: a global hook, or a hook of an inner module.

    A module that contains all convolutions and batch-norms is not an inner module, so that counters can stay on it.
    """
    if any(bool(getattr(nn.modules.module, f"_global{name}", None)) for name in HOOKS):
        return True
    folded = {id(module) for module in network.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)}
    return any(
        any(hooks(module, name) for name in HOOKS) and not folded <= {id(inner) for inner in module.modules()}
        for module in network.modules()
    )


class _Folded(TorchFunctionMode):
    """Passes folded, channels-last weights to convolutions and skips the batch-norms after them."""

    def __init__(self, network: nn.Module, folds: Sequence[tuple[Any, Any]]) -> None:
        super().__init__()
        self.network, self.folds = network, folds
        convolutions: list[Any] = [module for module in network.modules() if _is_convolution(module)]
        # Held, so that no other tensor can have one of their ids.
        self.parameters = [convolution.weight for convolution in convolutions]
        self.buffers = [norm.running_mean for _, norm in folds]
        self.weights = {id(weight): {"weight": _channels_last(weight)} for weight in self.parameters}
        self.weights |= {id(convolution.weight): _folded(convolution, norm) for convolution, norm in folds}
        self.statistics = {id(norm.running_mean) for _, norm in folds}

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> object:
        if func is F.conv2d:
            folded = self.weights.get(id(_argument(1, "weight", args, kwargs)))
            if folded is not None:
                call = dict(zip(CONVOLUTION, args, strict=False)) | (kwargs or {}) | folded
                return func(
                    **call | ({"dilation": 2} if runs_by_onednn(call["input"], folded["weight"]) else {})
                )
        elif func is F.batch_norm and id(_argument(1, "running_mean", args, kwargs)) in self.statistics:
            return _argument(0, "input", args, kwargs)
        return func(*args, **(kwargs or {}))


def runs_by_onednn(maps: Tensor, weight: Tensor) -> bool:
    """Whether to call a pointwise convolution with a dilation: one site has nothing to dilate.

    With one thread and fewer than 16 images torch 2.13 takes a slower matrix product for it unless it is dilated.
    """
    big = len(maps) > 1 or maps.numel() > 20480  # as in torch's `use_mkldnn`
    return big and weight.shape[2:] == (1, 1) and maps.is_cpu


def _argument(place: int, name: str, args: tuple[Any, ...], kwargs: Any) -> Any:
    return args[place] if len(args) > place else (kwargs or {}).get(name)


def _folded(convolution: Any, norm: Any) -> dict[str, Tensor]:
    """Weight and bias of the convolution followed by the batch-norm."""
    with torch.no_grad():
        # norm(conv(x)) = scale * (w * x + b - mean) + beta, with scale = gamma / sqrt(var + eps)
        scale = (norm.running_var + norm.eps).rsqrt().double()
        shift = -norm.running_mean.double() * scale
        if norm.affine:
            scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
        weight = convolution.weight.double() * scale.view(-1, 1, 1, 1)
        bias = shift if convolution.bias is None else shift + convolution.bias * scale
        kind = convolution.weight.dtype
        return {"weight": _channels_last(weight.to(kind)), "bias": bias.to(kind)}


def _channels_last(weight: Tensor) -> Tensor:
    return weight.detach().contiguous(memory_format=torch.channels_last)


def measured_batch(classifier: Classifier, images: Tensor) -> int:
    """The fastest batch size of the fused classifier for images of this shape.

    If there are enough images for it to matter, half, once and twice the default size are timed on a copy, once per
    network and shape; a size other than the default must save a tenth. Only multiples of four are tried: CPU kernels
    treat the remainder of a division by four differently, and results would differ in their last bits.
    """
    usual = default_batch(images)
    if len(images) < max(4 * usual, 32):
        return usual
    key = (tuple(images.shape[1:]), images.device)
    measured = _batches.setdefault(classifier.network, {})
    if key not in measured:
        measured[key] = _measure_batch(classifier, images, usual)
    return measured[key]


def _measure_batch(classifier: Classifier, images: Tensor, usual: int) -> int:
    sizes = sorted({max(4, usual // 8 * 4), usual, 2 * usual}, key=lambda size: size != usual)
    cost = {}
    try:
        with trial_copy(classifier) as twin, fused(twin, images[:1]):
            _seconds(twin, images[:usual])
            for size in sizes:
                with suppress(RuntimeError):  # out of memory
                    cost[size] = _seconds(twin, images[:size]) / size
    except Exception:  # noqa: BLE001 - a module that cannot be copied or run is not measured
        return usual
    if usual not in cost:
        return usual
    best = min(cost, key=cost.__getitem__)
    return best if cost[best] < 0.9 * cost[usual] else usual


def _seconds(classifier: Classifier, images: Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    point = images.clone().requires_grad_()
    logits = classifier(point)
    if logits.requires_grad:
        torch.autograd.grad(logits.sum(), point, allow_unused=True)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
