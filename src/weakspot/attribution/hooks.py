"""Reading and replacing the maps of many layers in one forward pass, each as it appears."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, is_dataclass, replace

import torch
from torch import Tensor, nn

from weakspot._checks import unknown_choice
from weakspot._memory import remembered
from weakspot._state import hooked
from weakspot.attribution.layers import Calls, first_tensor, layer_key, noise_like
from weakspot.attribution.layout import Layout
from weakspot.classifier import Classifier
from weakspot.fusion import folded_convolutions, fused

Visit = Callable[[str, Tensor], None]
"""Takes a layer's name and its maps (N, C, h, w), which it must neither change nor hold on to."""


@dataclass(frozen=True)
class Place:
    """Where a map of the image is made.

    Attributes:
        layout: how the output represents a map.
        module: the module that makes it, or None for a bare function call.
        turn: the number of the module's call in a forward pass, from 1; for a bare function that of the function call.
        calls: how often the module is called in a forward pass.
        maker: the module that made the output, if the module only returns what a part of it made.
    """

    layout: Layout
    module: nn.Module | None
    turn: int
    calls: int = 1
    maker: nn.Module | None = None


def spatial_layers(
    classifier: Classifier, image: Tensor, names: Sequence[str] | None = None
) -> dict[str, Place]:
    """The layers whose outputs are maps of the image, by name, in the order in which they are made.

    Without names: the last norm or activation behind every learned operation, and each block whose output none of its
    parts made. Later calls of a module that is used several times are named "relu (call 2)". For a network without
    modules, such as an exported one, these are the function calls of its convolutions and attentions.

    Args:
        classifier: in eval mode.
        image: (1, C, H, W), of which only the size matters.
        names: modules, as `model.named_modules()` has them.

    Raises:
        ValueError: if a name is not such a layer, or there are no such layers.
    """
    if names is None:
        default = default_layers(classifier, image)
        if not default:
            raise ValueError(
                f"{classifier.name} must have a map of the image that can be watched, got none (networks with "
                "convolutions or tokens have, unless they are TorchScript)"
            )
        return default
    if isinstance(names, str) or not len(names):
        raise ValueError(f"layers must be a list of layer names, got {names!r}")
    every = {output.name: output.place for output in _watch(classifier, _two(classifier, image))}
    every = every or _calls(classifier, image)
    chosen: dict[str, Place] = {}
    for name in names:
        plain = layer_key(name, every) or str(name)
        if plain not in every:
            modules = {key for key, _ in classifier.network.named_modules()}
            why = f"{plain} has no feature map" if plain in modules else ""
            raise ValueError(unknown_choice("layer", name, every, remedy=why))
        if every[plain] in chosen.values():
            raise ValueError(f"layers must name each layer once, got {name!r} twice")
        chosen[name] = every[plain]
    return chosen


def default_layers(classifier: Classifier, image: Tensor) -> dict[str, Place]:
    """`spatial_layers` without names; empty if the network has no maps."""

    def watch() -> dict[str, Place]:
        outputs = _watch(classifier, _two(classifier, image))
        return {output.name: output.place for output in _last_of_each(outputs)} or _calls(classifier, image)

    return remembered(classifier, ("default layers", image.shape), watch)


def _two(classifier: Classifier, image: Tensor) -> Tensor:
    """Two images, so that something made once for all images is not taken for a map of one."""
    # A network that takes one image at a time gets one.
    return classifier.filled(noise_like(image).expand(2, -1, -1, -1)[: classifier.fixed_batch or 2])


@contextmanager
def reading(classifier: Classifier, places: Mapping[str, Place], visit: Visit) -> Iterator[None]:
    """While open, every forward pass hands on the maps of these places as they are made.

    Modules are watched by hooks, which are removed on exit, also after exceptions. An output is read before a later
    in-place operation can change it.

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

    def see(layer: tuple[str, Layout] | None, tensor: Tensor | None) -> None:
        if layer is not None and tensor is not None:
            visit(layer[0], layer[1].maps(tensor.detach()))

    def hook(module: nn.Module, _inputs: object, output: object) -> None:
        turns[module] = turns.get(module, 0) + 1
        see(wanted[module].get(turns[module]), first_tensor(output))

    def called(number: int, output: object, *_: object) -> object:
        see(calls.get(number), output if isinstance(output, Tensor) else None)
        return output

    with ExitStack() as stack:
        # Each forward pass counts its calls from the start.
        stack.enter_context(hooked(classifier, lambda *_: turns.clear(), before=True))
        for module in wanted:
            stack.enter_context(hooked(module, hook))
        if calls:
            stack.enter_context(Calls(called).counted(classifier))
        yield


def fused_for(
    classifier: Classifier, image: Tensor, places: Mapping[str, Place]
) -> AbstractContextManager[None]:
    """The classifier in its fused form, unless that would change the maps of one of the places."""
    # Folding puts batch norm into the convolution before it, which then returns other maps.
    makers = {place.maker for place in places.values()}
    unchanged = makers.isdisjoint(folded_convolutions(classifier, image))
    return fused(classifier, image) if unchanged else nullcontext()


@dataclass(frozen=True)
class _Output:
    """What one call of a module returned in the watched pass.

    Attributes:
        name: of the module, with the number of the call from the second on.
        place: where it is.
        read: ids of the tensors that it got.
        made: id of the tensor that it returned.
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
    alive: list[object] = []  # so that no id is reused
    turns: dict[str, int] = {}
    versions: dict[int, int] = {}  # of tensors: in-place operations raise them
    makers: dict[int, nn.Module] = {}

    def hook(name: str, module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        tensor = first_tensor(output)
        turns[name] = turns.get(name, 0) + 1
        if tensor is None or not tensor.ndim or len(tensor) != len(images) or not tensor.is_floating_point():
            return
        layout = Layout.of(tensor, images)
        if layout is None:
            return
        given = frozenset(id(one) for one in inputs if isinstance(one, Tensor))
        if versions.get(id(tensor)) == tensor._version and id(tensor) in given:
            return  # it returned its input unchanged
        alive.extend((inputs, tensor))
        # A tensor of a new version was made or changed by this module; otherwise a part of it was the maker.
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
        # How often a module is called is known only after the pass.
        replace(one, place=replace(one.place, calls=turns[one.name.partition(" (call ")[0]]))
        for one in outputs
    ]


def _last_of_each(outputs: Sequence[_Output]) -> list[_Output]:
    """The ends of chains of a learned operation, norms and activations, and blocks; each tensor once."""
    # Before the first operation with weights there is only the image, for example normalized.
    first = next((number for number, output in enumerate(outputs) if output.learned and output.leaf), 0)
    rest = outputs[first:]
    outermost = {output.made: number for number, output in enumerate(rest)}  # the last to return it
    grids = {output.made: output.place.layout.cells for output in rest}
    chained: set[int] = set()  # outputs that belong to a chain
    continued: set[int] = set()  # outputs of a chain that goes on
    for output in rest:
        # An operation without weights continues a chain if it reads the chain's end on the same grid.
        behind = {given for given in output.read & chained if grids[given] == output.place.layout.cells}
        if output.leaf and (output.learned or behind):
            chained.add(output.made)
        if output.leaf and not output.learned:
            continued |= behind - {output.made}
    return [
        output
        for number, output in enumerate(rest)
        # Each tensor once: the ends of chains and, of tensors that no chain made, those of blocks.
        if outermost[output.made] == number
        and (output.made not in continued if output.made in chained else not output.leaf)
    ]


def _calls(classifier: Classifier, image: Tensor) -> dict[str, Place]:
    """Function calls with weights whose outputs are maps of the image, for networks that have no modules."""
    images, places = _two(classifier, image), {}

    def note(number: int, output: object, function: Callable[..., object], _arguments: object) -> object:
        kind = getattr(function, "__name__", str(function)).split(".")[0]
        if (
            ("conv" in kind or "attention" in kind)
            and isinstance(output, Tensor)
            and len(output) == len(images)
        ):
            layout = Layout.of(output, images)
            if layout is not None:
                places[f"{kind} (call {number})"] = Place(layout, None, number)
        return output

    with Calls(note).counted(classifier), torch.no_grad():
        classifier(images)
    return places


@contextmanager
def replacing(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, the first tensor that the module returns is changed before the network uses it.

    Args:
        module: any part of a network.
        change: maps that tensor to one of the same shape.
    """

    def hook(_module: nn.Module, _inputs: object, output: object) -> object:
        tensor = first_tensor(output)
        if tensor is None:
            return output
        return _with_first(output, change(tensor))

    with hooked(module, hook, first=True):  # hooks that read the module see the change
        yield


def _with_first(output: object, tensor: Tensor) -> object:
    """The same output with another first tensor."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, tuple | list):
        place = next(number for number, item in enumerate(output) if isinstance(item, Tensor))
        items = [*output[:place], tensor, *output[place + 1 :]]
        # A named tuple takes its items one by one.
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    if is_dataclass(output) and not isinstance(output, type):
        return replace(output, last_hidden_state=tensor)
    setattr(output, "last_hidden_state", tensor)  # noqa: B010  (an output class of any library)
    return output
