"""Recording: a classifier is watched once, and becomes a list of steps that can be repeated in other ways."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from weakspot._state import DispatchMode
from weakspot.classifier import Classifier
from weakspot.edits.steps import Arguments, CannotRecordError, Keywords, Recording, Slot, Step

LOOKS = {"tolist", "numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage"}
"""Methods that hand a tensor's values to Python, past the recorder."""


def record(classifier: Classifier, image: Tensor) -> Recording:
    """Watch images of this shape go through the classifier.

    What does not depend on the image, above all weights, is copied as it is now: a recording made while the classifier
    is `fused` holds the folded weights.

    Args:
        classifier: in eval mode.
        image: (1, C, H, W).

    Raises:
        CannotRecordError: if it draws random numbers, decides by an image's values, or writes into parts of tensors.
    """
    # With two images, shapes tell their axis from one of length 1.
    count = classifier.fixed_batch or 2
    images = image.detach().expand(count, -1, -1, -1).clone()
    recorder = _Recorder(images)
    with torch.no_grad(), recorder, _ReadGuard(recorder):
        logits = classifier(images)
    slot = recorder.slot_of(logits)
    if slot is None:
        raise CannotRecordError("its logits do not depend on the image by tensor functions alone")
    return Recording(_used(recorder.steps, slot), slot, count)


class _Recorder(DispatchMode):
    """Records every function called on what depends on the images."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.alive: list[Tensor] = [images]  # so that no id and no storage is reused
        self.slots = {id(images): 0}
        self.constants: dict[int, tuple[Tensor, Tensor]] = {}  # as given, and a copy
        self.current: dict[int, set[int]] = {}  # by storage written into: the tensors that are up to date

    def slot_of(self, value: object) -> int | None:
        return self.slots.get(id(value))

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        del types
        kwargs = kwargs or {}
        leaves = [leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        # Attention carries the tag because of dropout, which is off in eval mode.
        if torch.Tag.nondeterministic_seeded in func.tags and "scaled_dot_product" not in name:
            raise CannotRecordError(f"it draws random numbers ({func})")
        looks = torch.Tag.data_dependent_output in func.tags or (
            torch.Tag.dynamic_output_shape in func.tags and not _indexes_by_numbers(name, args)
        )
        if looks and any(id(leaf) in self.slots for leaf in leaves):
            raise CannotRecordError("it decides by the values of an image")
        # Functions with out=...; only in-place functions have a counterpart that returns its result.
        if any(
            argument.alias_info is not None and argument.alias_info.is_write
            for argument in func._schema.arguments
            if argument.name in kwargs
        ):
            raise CannotRecordError(f"{func} writes into a tensor that it is given")
        # A part of a tensor that was written into would be stale in other views of the same storage.
        for leaf in leaves:
            fresh = self.current.get(_storage(leaf))
            if fresh is not None and id(leaf) not in fresh:
                raise CannotRecordError("it writes into a part of a tensor and reads the whole")
        result = func(*args, **kwargs)
        if any(id(leaf) in self.slots for leaf in leaves):
            self._note(func, name, args, kwargs, result)
        return result

    def _note(self, func: OpOverload, name: str, args: Arguments, kwargs: Keywords, result: Any) -> None:
        # The states of this call fit one number of images, and with another it corrupts memory.
        if name == "mkldnn_rnn_layer":
            raise CannotRecordError("it has a recurrent layer")
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor)
        ]
        several = isinstance(result, tuple | list)
        results = list(result) if several else [result]
        call, arguments = func, args
        if name == "as_strided_" and _same(result, args[0]):
            # Pooling to one site calls it to set the strides.
            call, name, arguments, kwargs = torch.ops.aten.alias.default, "alias", args[:1], {}
        elif written:
            call, name = _without_writing(func, name)
        marked = _pytree.tree_map(
            lambda leaf: self._mark(leaf) if isinstance(leaf, Tensor) else leaf, (arguments, kwargs)
        )
        inputs = tuple(leaf.number for leaf in _pytree.tree_leaves(marked) if isinstance(leaf, Slot))
        outputs = []
        for value in results:
            if not isinstance(value, Tensor):
                outputs.append(-1)
                continue
            self.alive.append(value)
            # A slot is a place in `alive`, where slot 0 is the images.
            self.slots[id(value)] = number = len(self.alive) - 1
            outputs.append(number)
            storage = _storage(value)
            # Writing makes this tensor the only one of its storage that is up to date; later views of it are, too.
            if any(value is one for one in written):
                self.current[storage] = {id(value)}
            elif storage in self.current:
                self.current[storage].add(id(value))
        self.steps.append(Step(name, call, marked[0], marked[1], inputs, tuple(outputs), several))

    def _mark(self, tensor: Tensor) -> Slot | Tensor:
        """The slot of a value that depends on the images; a copy of a constant, which the network may change later."""
        if id(tensor) in self.slots:
            return Slot(self.slots[id(tensor)])
        if id(tensor) not in self.constants:
            self.constants[id(tensor)] = (tensor, tensor.detach().clone())
        return self.constants[id(tensor)][1]


class _ReadGuard(TorchFunctionMode):
    """Refuses calls that hand an image's values to Python, past the recorder."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        del types
        if getattr(func, "__name__", "") in LOOKS and args and self.recorder.slot_of(args[0]) is not None:
            raise CannotRecordError("it decides by the values of an image")
        return func(*args, **(kwargs or {}))


def _indexes_by_numbers(name: str, arguments: Arguments) -> bool:
    """Whether it indexes by integers only, so that the result's shape does not depend on values."""
    masks = {torch.bool, torch.uint8}
    return name == "index" and not any(
        isinstance(leaf, Tensor) and leaf.dtype in masks for leaf in _pytree.tree_leaves(arguments[1])
    )


def _without_writing(func: OpOverload, name: str) -> tuple[OpOverload, str]:
    """The counterpart of an in-place function that returns its result instead, and its name."""
    twin = getattr(torch.ops.aten, name.removesuffix("_"), None) if name.endswith("_") else None
    overload = getattr(twin, func._overloadname, None)
    if overload is None:
        raise CannotRecordError(f"{func} writes into its arguments")
    return overload, name.removesuffix("_")


def _used(steps: Sequence[Step], last: int) -> list[Step]:
    """The steps that lead to a slot."""
    wanted, needed = {last}, []
    for step in reversed(steps):
        if wanted & set(step.outputs):
            needed.append(step)
            wanted |= set(step.inputs)
    return needed[::-1]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
