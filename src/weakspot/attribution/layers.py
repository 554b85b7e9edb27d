"""Layers: find where a network last has a map of the image, and read that map.

Calls are watched by torch's function mode rather than by module hooks alone: the last map of a network is often made by
a bare `relu(x + y)` that belongs to no module, and exported networks have no modules at all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from weakspot._checks import unknown_choice
from weakspot._random import float32_noise
from weakspot._state import hooked, is_unwatched
from weakspot.attribution.layout import Layout
from weakspot.classifier import Classifier

LEARNED = {"linear", "matmul", "__matmul__", "bmm", "mm", "addmm", "einsum"}
SEQUENCE = {
    "layer_norm",
    "rms_norm",
    "linear",
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
}


@dataclass(frozen=True)
class Layer:
    """A place in the network whose output is a map of the image.

    Attributes:
        name: the module's name, or the kind and number of the call.
        root: the classifier, whose forward passes are watched.
        layout: how its output represents a map.
        module: the module that makes it, or None for a bare function call.
        call: the number of that call in a forward pass.
        head: (K, C) weights if the logits are these times the map's mean (plus a bias), else None.
    """

    name: str
    root: Classifier = field(repr=False)
    layout: Layout
    module: nn.Module | None = None
    call: int | None = None
    head: Tensor | None = field(default=None, repr=False)

    @contextmanager
    def watched(self) -> Iterator[list[Tensor]]:
        """While open, each forward pass appends this layer's output to the list (the last one counts).

        The network continues with a copy, so that an in-place operation behind the layer cannot change it. Passes must
        run with gradients on, like `find_layer`: without them some modules take other paths.
        """
        seen: list[Tensor] = []

        def append(output: Tensor) -> Tensor:
            seen.append(output)
            return output.clone()

        if self.module is None:
            calls = Calls(lambda number, output, *_: append(output) if number == self.call else output)
            with calls.counted(self.root):
                yield seen
            return

        def hook(_module: nn.Module, _inputs: object, output: object) -> object:
            tensor = first_tensor(output)
            if tensor is None:
                return output
            copy = append(tensor)
            return copy if tensor is output else output

        with hooked(self.module, hook):
            yield seen


def find_layer(
    classifier: Classifier, image: Tensor, name: str | None = None, *, wanted: int | None = None
) -> Layer | None:
    """The named layer, or the last one that has a map of the image; None if the network has none.

    The search uses one fixed noise image of the given size, so that the result depends on the network alone.

    Args:
        classifier: in eval mode, gradients on.
        image: (1, C, H, W), of which only the size matters.
        name: a module's name as `model.named_modules()` has it.
        wanted: the class whose logit must depend on the layer; any class if None.

    Raises:
        ValueError: if there is no layer of that name, or its output is not a map of the image.
    """
    point = classifier.filled(noise_like(image)).requires_grad_()
    if name is not None:
        return _named_layer(classifier, point, name)
    calls: list[_Call] = []
    linear: list[tuple[Tensor, Tensor | None]] = []

    def record(
        number: int, output: object, function: Callable[..., object], arguments: tuple[Tensor, ...]
    ) -> object:
        kind = getattr(function, "__name__", str(function)).split(".")[0]
        if kind == "linear" and len(arguments) >= 2:
            linear.append((arguments[1], arguments[2] if len(arguments) > 2 else None))
        # Calls without gradient do not depend on the image.
        if isinstance(output, Tensor) and output.is_floating_point() and output.requires_grad:
            calls.append(_Call(number, kind, output))
        return output

    with Calls(record).counted(classifier):
        logits = classifier(point)
    candidates = _candidates(calls, point)
    if not candidates or not logits.requires_grad:
        return None
    # Unequal weights, so that what the classes share does not cancel.
    weights = noise_like(logits) if wanted is None else torch.eye(logits.shape[1]).to(logits)[wanted]
    gradients = torch.autograd.grad(
        (logits * weights).sum(),
        [call.output for call, _ in candidates],
        allow_unused=True,
        materialize_grads=True,
    )
    live = [
        (call, layout)
        for (call, layout), gradient in zip(candidates, gradients, strict=True)
        if bool(layout.maps(gradient).any())
    ]
    if not live:
        return None
    # The last map that the logits depend on: features of the highest level that still have places.
    chosen, layout = live[-1]
    readable = _module_that_made(classifier, point, chosen) or f"{chosen.kind} (call {chosen.number})"
    head = _pooling_head(layout.maps(chosen.output), linear, logits)
    return Layer(readable, classifier, layout, call=chosen.number, head=head)


def noise_like(image: Tensor) -> Tensor:
    """Uniform noise of the given shape, the same every time."""
    return float32_noise(torch.Generator().manual_seed(0), *image.shape).to(image)


@dataclass(frozen=True)
class _Call:
    number: int
    kind: str
    output: Tensor


def _candidates(calls: list[_Call], image: Tensor) -> list[tuple[_Call, Layout]]:
    """Calls whose output could be the last map: for a network of tokens its normalized tokens, else any map."""
    last_convolution = max((call.number for call in calls if "conv" in call.kind), default=-1)
    # Before the first learned operation comes the image itself, for example normalized.
    first_learned = min(
        (call.number for call in calls if call.kind in LEARNED or "conv" in call.kind), default=torch.inf
    )
    maps = [
        (call, layout)
        for call in calls
        # A view is the same map in another shape, in which channels and sites could be confused.
        if call.number >= first_learned
        and call.output.ndim in {3, 4}
        and len(call.output) == len(image)
        and not call.output._is_view()
        and "pool" not in call.kind
        if (layout := Layout.of(call.output, image)) is not None
    ]
    tokens = [(call, layout) for call, layout in maps if layout.kind != "channels_first"]
    after = (call for call, _ in tokens if call.number > last_convolution)
    if any(call.output.ndim == 3 and call.kind in SEQUENCE for call in after):
        return [(call, layout) for call, layout in tokens if call.kind == "layer_norm"] or tokens
    return [(call, layout) for call, layout in maps if call.output.ndim == 4 and "softmax" not in call.kind]


def _pooling_head(maps: Tensor, linear: list[tuple[Tensor, Tensor | None]], logits: Tensor) -> Tensor | None:
    """The last linear layer's weights if that layer of the maps' mean gives the logits of this image."""
    if not linear:
        return None
    weight, bias = linear[-1]
    if weight.shape != (logits.shape[1], maps.shape[1]):
        return None
    rebuilt = maps.mean((2, 3), dtype=logits.dtype) @ weight.to(logits).T + (0 if bias is None else bias)
    # In half precision, the network's own rounding counts.
    atol = max(1e-4, torch.finfo(weight.dtype).eps * float(logits.detach().abs().max()))
    return weight.detach() if torch.allclose(rebuilt, logits, rtol=1e-3, atol=atol) else None


def _module_that_made(classifier: Classifier, image: Tensor, chosen: _Call) -> str | None:
    """The name of the outermost module whose output equals the chosen one, for display."""
    names: list[str] = []
    with ExitStack() as stack:
        for name, module in classifier.network.named_modules():

            def hook(_module: nn.Module, _inputs: object, output: object, name: str = name) -> None:
                if (
                    isinstance(output, Tensor)
                    and output.shape == chosen.output.shape
                    and torch.equal(output, chosen.output)
                ):
                    names.append(name)

            if name:
                stack.enter_context(hooked(module, hook))
        classifier(image)
    return min(names, key=lambda name: name.count("."), default=None)


def _named_layer(classifier: Classifier, image: Tensor, name: str) -> Layer:
    modules = dict(classifier.network.named_modules())
    key = layer_key(name, modules)
    if key is None:
        raise ValueError(unknown_choice("layer", name, filter(None, modules)))
    probe = Layer(name, classifier, Layout("channels_first", 0, 0), modules[key])
    with probe.watched() as seen:
        classifier(image)
    if not seen:
        raise ValueError(f"layer must run and return a tensor, got {name!r} (choose another layer)")
    layout = Layout.of(seen[-1], image)
    if layout is None:
        raise ValueError(
            f"layer must return a map of an image of {image.shape[-2]} x {image.shape[-1]}, got {name!r}, which "
            f"returns {tuple(seen[-1].shape)} (name a layer with height and width)"
        )
    return replace(probe, layout=layout)


def layer_key(name: str, known: Container[str]) -> str | None:
    """The spelling of a layer's name that is known, with or without the "network." of a wrapper, or None."""
    spellings = (str(name), str(name).removeprefix("network."), f"network.{name}")
    return next((spelling for spelling in spellings if spelling and spelling in known), None)


def first_tensor(output: object) -> Tensor | None:
    """The tensor that a module returned, the first of several, or None."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple | list):
        return next((item for item in output if isinstance(item, Tensor)), None)
    state = getattr(output, "last_hidden_state", None)
    return state if isinstance(state, Tensor) else None


class Calls(TorchFunctionMode):
    """Numbers torch calls in a forward pass and lets `visit(number, output, function, arguments)` replace outputs."""

    def __init__(self, visit: Callable[..., object]) -> None:
        super().__init__()
        self.visit = visit
        self.number = 0

    @contextmanager
    def counted(self, root: nn.Module) -> Iterator[None]:
        """Watch calls, counting from the start of each forward pass of `root`."""

        def restart(_module: nn.Module, _inputs: object) -> None:
            self.number = 0

        # The compiler traces and checks with torch calls of its own, more in some passes than in others.
        compiled = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")
        eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with eager, hooked(root, restart, before=True), self:
            yield

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        output = func(*args, **(kwargs or {}))
        if is_unwatched():
            return output
        self.number += 1
        return self.visit(self.number, output, func, args)
