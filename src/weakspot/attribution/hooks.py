"""Reading: the maps of many layers in one forward pass, each handed on as it appears and never kept.

Replacing: let a layer's maps be other ones while a network runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from weakspot._checks import unknown_choice
from weakspot._state import hooked
from weakspot.attribution.layers import Calls, Layout, first_tensor, noise_like
from weakspot.classifier import Classifier
from weakspot.fusion import folded_convolutions, fused

Visit = Callable[[str, Tensor], None]
"""Told the layer's name and its maps (N, C, h, w), which it must not change or keep."""


@dataclass(frozen=True)
class Place:
    """Where a map of the image is made.

    Attributes:
        layout: how the output is a map.
        module: the module that makes it, or None for a bare function call.
        turn: which of the module's calls in a forward pass, from 1; of a bare function the number of the call.
        calls: how often the module is called in a forward pass.
        maker: the module that made the output, where the module only hands on what a part of it made.
    """

    layout: Layout
    module: nn.Module | None
    turn: int
    calls: int = 1
    maker: nn.Module | None = None


def spatial_layers(
    classifier: Classifier, image: Tensor, names: Sequence[str] | None = None
) -> dict[str, Place]:
    """Name to place of the layers whose outputs are maps of the image, in the order they are made.

    Without names: behind every learned operation the last of its norms and activations, and each block whose output
    none of its parts made. Later calls of a module that is used several times are named "relu (call 2)". A network
    without modules, as exported ones are, has its convolutions' and attentions' function calls.

    Args:
        classifier: in eval mode.
        image: (1, C, H, W), of which only the size matters.
        names: modules, as `model.named_modules()` has them.

    Raises:
        ValueError: when a name is no such layer, or there are no such layers.
    """
    if names is None:
        chosen = default_layers(classifier, image)
        if not chosen:
            raise ValueError(
                f"{classifier.name} keeps no map of the image that can be watched; accepted are networks with "
                "convolutions or tokens that are not TorchScript"
            )
        return chosen
    if isinstance(names, str) or not len(names):
        raise ValueError(f"layers is {names!r}; accepted is a list of layer names")
    every = {output.name: output.place for output in _watch(classifier, _two(classifier, image))}
    every = every or _calls(classifier, image)
    known: dict[str, Place] = {}
    for name in names:
        spellings = (str(name), str(name).removeprefix("network."), f"network.{name}")
        plain = next((spelling for spelling in spellings if spelling in every), str(name))
        if plain not in every:
            modules = {key for key, _ in classifier.network.named_modules()}
            why = f"{plain} has no feature map" if plain in modules else ""
            raise ValueError(unknown_choice("layers", name, every, remedy=why))
        if every[plain] in known.values():
            raise ValueError(f"layers has {name!r}, which it has already; accepted is each layer once")
        known[name] = every[plain]
    return known


def default_layers(classifier: Classifier, image: Tensor) -> dict[str, Place]:
    """`spatial_layers` without names; none where the network keeps no maps."""
    outputs = _watch(classifier, _two(classifier, image))
    return {output.name: output.place for output in _last_of_each(outputs)} or _calls(classifier, image)


def _two(classifier: Classifier, image: Tensor) -> Tensor:
    """Two images, so that what is made once for all images is not taken for a map of one."""
    return classifier.filled(noise_like(image).expand(2, -1, -1, -1)[: classifier.fixed_batch or 2])


@contextmanager
def reading(classifier: Classifier, places: Mapping[str, Place], visit: Visit) -> Iterator[None]:
    """While open, every forward pass hands the maps of these places on as they are made.

    Modules are watched by hooks, gone on exit whatever happens: what a later in-place operation does to an output
    comes after it was read.

    Args:
        classifier: in eval mode.
        places: from `spatial_layers`.
        visit: called for each place in each pass.
    """
    turns: dict[nn.Module, int] = {}
    wanted: dict[nn.Module, dict[int, tuple[str, Layout]]] = {}
    calls: dict[int, tuple[str, Layout]] = {}
    for name, place in places.items():
        table = calls if place.module is None else wanted.setdefault(place.module, {})
        table[place.turn] = (name, place.layout)

    def see(known: tuple[str, Layout] | None, tensor: Tensor | None) -> None:
        if known is not None and tensor is not None:
            visit(known[0], known[1].maps(tensor.detach()))

    def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
        turns[module] = turns.get(module, 0) + 1
        see(wanted[module].get(turns[module]), first_tensor(output))

    def called(number: int, output: Any, *_: Any) -> Any:
        see(calls.get(number), output if isinstance(output, Tensor) else None)
        return output

    with ExitStack() as stack:
        stack.enter_context(hooked(classifier, lambda *_: turns.clear(), before=True))
        for module in wanted:
            stack.enter_context(hooked(module, hook))
        if calls:
            stack.enter_context(Calls(called).counted(classifier))
        yield


@contextmanager
def fused_for(classifier: Classifier, image: Tensor, places: Mapping[str, Place]) -> Iterator[None]:
    """The classifier in its fused form, unless that would change what one of the places hands on."""
    with ExitStack() as stack:
        makers = {place.maker for place in places.values()}
        if makers.isdisjoint(folded_convolutions(classifier, image)):
            stack.enter_context(fused(classifier, image))
        yield


@dataclass(frozen=True)
class _Output:
    """What one call of a module returned in the pass that was watched.

    Attributes:
        name: of the module, with the number of the call from the second on.
        place: where it is.
        read: ids of the tensors it was given.
        made: id of the tensor it returned.
        learned: whether it, or a module in it, has a weight matrix.
        leaf: whether it is an operation of its own: it holds a weight matrix itself, or has no parts.
    """

    name: str
    place: Place
    read: frozenset[int]
    made: int
    learned: bool
    leaf: bool


def _watch(classifier: Classifier, images: Tensor) -> list[_Output]:
    """Every call of a module in a forward pass that returned a map of the image, in the order they returned."""
    outputs: list[_Output] = []
    alive: list[Any] = []  # so that no id is used again
    turns: dict[str, int] = {}
    versions: dict[int, int] = {}  # of tensors: in-place operations raise them
    makers: dict[int, nn.Module] = {}

    def hook(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        tensor = first_tensor(output)
        turns[name] = turns.get(name, 0) + 1
        if tensor is None or not tensor.ndim or len(tensor) != len(images) or not tensor.is_floating_point():
            return
        layout = Layout.of(tensor, images)
        if layout is None:
            return
        given = frozenset(id(one) for one in inputs if isinstance(one, Tensor))
        if versions.get(id(tensor)) == tensor._version and id(tensor) in given:
            return  # it handed on what it was given
        alive.extend((inputs, tensor))
        if versions.get(id(tensor)) != tensor._version:
            makers[id(tensor)] = module
        versions[id(tensor)] = tensor._version
        turn = turns[name]
        outputs.append(
            _Output(
                name if turn == 1 else f"{name} (call {turn})",
                Place(layout, module, turn, maker=makers[id(tensor)]),
                given,
                id(tensor),
                any(weight.ndim > 1 for weight in module.parameters()),
                next(module.children(), None) is None
                or any(weight is not None and weight.ndim > 1 for weight in module._parameters.values()),
            )
        )

    with ExitStack() as stack, torch.no_grad():
        for name, module in classifier.network.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):
                stack.enter_context(
                    hooked(
                        module, lambda module, inputs, output, name=name: hook(name, module, inputs, output)
                    )
                )
        classifier(images)
    return [
        replace(one, place=replace(one.place, calls=turns[one.name.partition(" (call ")[0]]))
        for one in outputs
    ]


def _last_of_each(outputs: Sequence[_Output]) -> list[_Output]:
    """Of each chain of a learned operation, norms and activations the end, and blocks; what returns the same once."""
    first = next((number for number, output in enumerate(outputs) if output.learned and output.leaf), 0)
    rest = outputs[first:]
    outermost = {output.made: number for number, output in enumerate(rest)}  # the last to return it
    grids = {output.made: output.place.layout.cells for output in rest}
    chained: set[int] = set()
    continued: set[int] = set()
    for output in rest:
        behind = {given for given in output.read & chained if grids[given] == output.place.layout.cells}
        if output.leaf and (output.learned or behind):
            chained.add(output.made)
        if output.leaf and not output.learned:
            continued |= behind - {output.made}
    return [
        output
        for number, output in enumerate(rest)
        if outermost[output.made] == number
        and (output.made not in continued if output.made in chained else not output.leaf)
    ]


def _calls(classifier: Classifier, image: Tensor) -> dict[str, Place]:
    """Function calls with weights whose outputs are maps of the image, for networks that have no modules."""
    images, found = _two(classifier, image), {}

    def note(number: int, output: Any, function: Callable[..., Any], _arguments: Any) -> Any:
        kind = getattr(function, "__name__", str(function)).split(".")[0]
        if (
            ("conv" in kind or "attention" in kind)
            and isinstance(output, Tensor)
            and len(output) == len(images)
        ):
            layout = Layout.of(output, images)
            if layout is not None:
                found[f"{kind} (call {number})"] = Place(layout, None, number)
        return output

    with Calls(note).counted(classifier), torch.no_grad():
        classifier(images)
    return found


@contextmanager
def replacing(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, the first tensor that the module returns is changed before the network goes on with it.

    Args:
        module: any part of a network.
        change: from that tensor to one of the same shape.
    """

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        tensor = first_tensor(output)
        if tensor is None:
            return output
        return _with_first(output, change(tensor))

    with hooked(module, hook, first=True):  # hooks that read the module see the change
        yield


def _with_first(output: Any, tensor: Tensor) -> Any:
    """The same output, its first tensor another."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, tuple | list):
        place = next(number for number, item in enumerate(output) if isinstance(item, Tensor))
        items = [*output[:place], tensor, *output[place + 1 :]]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    if is_dataclass(output) and not isinstance(output, type):
        return replace(output, last_hidden_state=tensor)
    output.last_hidden_state = tensor
    return output
