"""What a classifier does to an image, as a list of steps that can be done again by other means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from weakspot.classifier import Classifier

LOOKS = {"tolist", "numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage"}
RESHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias", "expand"}  # their second argument is a shape


class CannotRecordError(Exception):
    """The network does something that cannot be done again from its steps; the message says what."""


@dataclass(frozen=True)
class Slot:
    """Stands in a step's arguments for a value that depends on the image."""

    number: int


@dataclass(frozen=True)
class Step:
    """One call of a tensor function.

    Attributes:
        name: of the function without overload: "convolution".
        call: the function; as recorded it changes none of its arguments.
        arguments: positional, with slots for what depends on the image; other tensors are constants.
        keywords: likewise.
        inputs: the slots among them, in order.
        outputs: the slots that it fills; -1 for a part that is no tensor.
        several: whether it returns a tuple.
    """

    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    several: bool

    def run(self, values: dict[int, Any], count: int, recorded: int) -> Any:
        """Call the function on these values of `count` images; the shapes in it were recorded with `recorded`."""
        arguments, keywords = filled(self.arguments, values), filled(self.keywords, values)
        if self.name == "convolution" and 1 in arguments[0].shape[1:]:
            # On CPUs torch 2.13 gives wrong numbers, or dies, for such maps with channels-last strides.
            arguments = (arguments[0].clone(memory_format=torch.contiguous_format), *arguments[1:])
        if self.name in RESHAPES:
            shape = list(arguments[1])
            if shape and shape[0] != -1:
                if shape[0] * count % recorded:
                    raise CannotRecordError(f"{self.name} mixes images: it makes shape {tuple(shape)}")
                shape[0] = shape[0] * count // recorded
            if self.name != "expand":  # the values may lie in memory in another order than the recorded ones
                return arguments[0].reshape(shape)
            arguments = (arguments[0], shape, *arguments[2:])
        elif self.name == "native_group_norm":
            arguments = (*arguments[:3], arguments[3] * count // recorded, *arguments[4:])
        return self.call(*arguments, **keywords)


@dataclass(frozen=True)
class Recording:
    """Steps from images (N, C, H, W) in slot 0 to logits (N, K).

    Attributes:
        steps: in the order they were done; each needs only slots that ones before it filled.
        logits: the slot that ends with the logits.
        count: images that were recorded with.
    """

    steps: Sequence[Step]
    logits: int
    count: int


def record(classifier: Classifier, image: Tensor) -> Recording:
    """Watch images of this shape go through the classifier.

    What does not depend on the image, weights above all, is kept as it is now: a recording made while the classifier
    is `fused` has the folded weights for good.

    Args:
        classifier: in eval mode.
        image: (1, C, H, W).

    Raises:
        CannotRecordError: when it draws random numbers, decides by an image's values, or writes into parts of tensors.
    """
    count = classifier.fixed_batch or 2
    images = image.detach().expand(count, -1, -1, -1).clone()
    recorder = _Recorder(images)
    with torch.no_grad(), recorder, _Looking(recorder):
        logits = classifier(images)
    slot = recorder.slot_of(logits)
    if slot is None:
        raise CannotRecordError("its logits do not depend on the image by tensor functions alone")
    return Recording(_used(recorder.steps, slot), slot, count)


class _Recorder(TorchDispatchMode):
    """Writes down every function called on what depends on the images."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []
        self.alive: list[Tensor] = [images]  # so that no id and no storage is used again
        self.slots = {id(images): 0}
        self.constants: dict[int, tuple[Tensor, Tensor]] = {}  # as given, and as they were then
        self.current: dict[int, set[int]] = {}  # storages written into: the tensors that are up to date

    def slot_of(self, value: object) -> int | None:
        return self.slots.get(id(value))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        leaves = [leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        # Attention carries the tag for the dropout that no network has in eval mode.
        if torch.Tag.nondeterministic_seeded in func.tags and "scaled_dot_product" not in name:
            raise CannotRecordError(f"it draws random numbers ({func})")
        looks = torch.Tag.data_dependent_output in func.tags or (
            torch.Tag.dynamic_output_shape in func.tags and not _by_numbers(name, args)
        )
        if looks and any(id(leaf) in self.slots for leaf in leaves):
            raise CannotRecordError("it decides by the values of an image")
        if any(
            argument.alias_info is not None and argument.alias_info.is_write
            for argument in func._schema.arguments
            if argument.name in kwargs
        ):
            raise CannotRecordError(f"{func} writes into a tensor that it is given")
        for leaf in leaves:
            fresh = self.current.get(_storage(leaf))
            if fresh is not None and id(leaf) not in fresh:
                raise CannotRecordError("it writes into a part of a tensor and reads the whole")
        result = func(*args, **kwargs)
        if any(id(leaf) in self.slots for leaf in leaves):
            self._note(func, name, args, kwargs, result)
        return result

    def _note(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if name in {"_local_scalar_dense", "equal", "is_nonzero"}:
            raise CannotRecordError("it decides by the values of an image")
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor)
        ]
        several = isinstance(result, tuple | list)
        found = list(result) if several else [result]
        call, arguments = func, args
        if name == "as_strided_" and _same(
            result, args[0]
        ):  # pooling to one site calls it for the layout's sake
            call, name, arguments, kwargs = torch.ops.aten.alias.default, "alias", args[:1], {}
        elif written:
            call, name = _without_writing(func, name)
        mark = _pytree.tree_map(
            lambda leaf: self._mark(leaf) if isinstance(leaf, Tensor) else leaf, (arguments, kwargs)
        )
        inputs = tuple(leaf.number for leaf in _pytree.tree_leaves(mark) if isinstance(leaf, Slot))
        outputs = []
        for value in found:
            if not isinstance(value, Tensor):
                outputs.append(-1)
                continue
            self.alive.append(value)
            self.slots[id(value)] = number = len(self.alive) - 1
            outputs.append(number)
            storage = _storage(value)
            if any(value is one for one in written):
                self.current[storage] = {id(value)}
            elif storage in self.current:
                self.current[storage].add(id(value))
        self.steps.append(Step(name, call, mark[0], mark[1], inputs, tuple(outputs), several))

    def _mark(self, tensor: Tensor) -> Slot | Tensor:
        """The slot of what depends on the images; of a constant a copy, whatever becomes of the network's own."""
        if id(tensor) in self.slots:
            return Slot(self.slots[id(tensor)])
        if id(tensor) not in self.constants:
            self.constants[id(tensor)] = (tensor, tensor.detach().clone())
        return self.constants[id(tensor)][1]


class _Looking(TorchFunctionMode):
    """Refuses what hands an image's values to Python past the recorder."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if getattr(func, "__name__", "") in LOOKS and args and self.recorder.slot_of(args[0]) is not None:
            raise CannotRecordError("it decides by the values of an image")
        return func(*args, **(kwargs or {}))


def filled(arguments: Any, values: dict[int, Any]) -> Any:
    """The arguments with values in place of slots."""
    kind = type(arguments)
    if kind is Slot:
        return values[arguments.number]
    if kind is tuple or kind is list:
        return kind(filled(leaf, values) for leaf in arguments)
    if kind is dict:
        return {name: filled(leaf, values) for name, leaf in arguments.items()}
    return arguments


def _by_numbers(name: str, arguments: tuple[Any, ...]) -> bool:
    """Whether it indexes with whole numbers only: the shape of that is known without looking at values."""
    masks = {torch.bool, torch.uint8}
    return name == "index" and not any(
        isinstance(leaf, Tensor) and leaf.dtype in masks for leaf in _pytree.tree_leaves(arguments[1])
    )


def _without_writing(func: Any, name: str) -> tuple[Any, str]:
    """The twin of an in-place function that returns its result instead."""
    twin = getattr(torch.ops.aten, name.removesuffix("_"), None) if name.endswith("_") else None
    overload = getattr(twin, func._overloadname, None)
    if overload is None:
        raise CannotRecordError(f"{func} writes into its arguments")
    return overload, name.removesuffix("_")


def _used(steps: Sequence[Step], last: int) -> list[Step]:
    """The steps that lead to a slot."""
    wanted, kept = {last}, []
    for step in reversed(steps):
        if wanted & set(step.outputs):
            kept.append(step)
            wanted |= set(step.inputs)
    return kept[::-1]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
