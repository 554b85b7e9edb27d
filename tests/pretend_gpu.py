"""A pretend GPU, for tests of devices on a machine without one.

    with PretendGPU():
        model.to(GPU)

Its tensors compute on the CPU. They say that they are on `GPU`, and refuse what tensors of a GPU refuse: `.numpy()`
and operations together with tensors of the CPU. The rounding and the memory of a GPU are not pretended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
COMPARING = ("aten::equal", "aten::_local_scalar_dense", "aten::is_same_size")  # they return no tensor


class OnGPU(Tensor):
    """A tensor that is said to be on the GPU; `stored` is where its values are."""

    stored: Tensor
    device = GPU
    is_cuda, is_cpu = True, False

    @staticmethod
    def __new__(cls, stored: Tensor) -> OnGPU:
        made: OnGPU = Tensor._make_wrapper_subclass(
            cls,
            stored.shape,
            strides=stored.stride(),
            storage_offset=stored.storage_offset(),
            dtype=stored.dtype,
            device=torch.device("cpu"),  # of torch's own code, which would look for CUDA
        )
        made.stored = stored
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = function._schema.name, kwargs or {}
        if name == "aten::copy_":
            _inner(args[0]).copy_(_inner(args[1]))
            return args[0]
        leaves = tree_leaves((args, kwargs))
        # Indices may be on any device, if what they index is on the GPU.
        checked = [args[0], *args[2:3]] if name in INDEXING else leaves
        if any(isinstance(one, Tensor) and not isinstance(one, OnGPU) and one.dim() for one in checked):
            raise RuntimeError(f"Expected all tensors to be on the same device, got {GPU} and cpu ({name})")
        result = function(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if name in COMPARING:
            return result
        # What works in place returns the tensor that it was given.
        given = {id(one.stored): one for one in leaves if isinstance(one, OnGPU)}
        return tree_map(lambda one: given[id(one)] if id(one) in given else _outer(one), result)

    def __deepcopy__(self, memo: dict[int, object]) -> Tensor:
        copied: Tensor = OnGPU(self.detach().stored.clone())  # type: ignore[attr-defined]
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        return copied

    def numpy(self, **_: object) -> Any:
        raise TypeError(f"can't convert {GPU} device type tensor to numpy")

    __array__ = numpy  # type: ignore[assignment]

    def tolist(self) -> Any:
        return self.detach().stored.tolist()  # type: ignore[attr-defined]

    def new_tensor(self, values: Any, **given: Any) -> Tensor:  # type: ignore[override]
        return OnGPU(self.detach().stored.new_tensor(values, **given))  # type: ignore[attr-defined]


def _inner(one: Any) -> Any:
    return one.stored if isinstance(one, OnGPU) else one


def _outer(one: Any) -> Any:
    if not isinstance(one, Tensor) or isinstance(one, OnGPU):
        return one
    return OnGPU(one.resolve_conj())  # a conjugate that is only marked as one would be lost


class _Up(torch.autograd.Function):
    """To the GPU; gradients come back to the CPU."""

    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:
        return OnGPU(tensor.detach().clone())

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Any:
        return _inner(gradient)


class _Down(torch.autograd.Function):
    """To the CPU; gradients go back to the GPU."""

    @staticmethod
    def forward(_: Any, tensor: OnGPU) -> Tensor:
        return tensor.stored.detach().clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient if isinstance(gradient, OnGPU) else OnGPU(gradient)


class PretendGPU(TorchFunctionMode):
    """A context in which `device=GPU`, `.to(GPU)` and `.cpu()` make tensors of the pretend GPU, and of the CPU."""

    def __enter__(self) -> Self:
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(torch.cuda, "get_rng_state", lambda _: torch.zeros(1, dtype=torch.uint8))
        self._patch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
        self._patch.setattr(torch.cuda, "manual_seed", lambda _: None)
        self._patch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        # A module that moves makes new parameters: those that it has are tensors of the CPU for good.
        self._patch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._patch.undo()

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is Tensor.cpu:
            return _moved(args[0], torch.device("cpu"))
        if function is Tensor.to:
            return _to(*args, **kwargs)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == GPU.type:
            return _outer(function(*args, **{**kwargs, "device": "cpu"}))
        return function(*args, **kwargs)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device.type == device.type:
        return tensor
    moved: Tensor = (_Up if device.type == GPU.type else _Down).apply(tensor)  # type: ignore[no-untyped-call]
    return moved


def _to(tensor: Tensor, goal: Any = None, *more: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to` in its three forms: another tensor, a device with or without a type, or a type."""
    device = kwargs.pop("device", None)
    if isinstance(goal, Tensor):
        device, more = goal.device, (goal.dtype, *more)
    elif isinstance(goal, str | torch.device):
        device, more = goal, ("cpu", *more)  # torch's own code knows no other
    elif goal is not None:
        more = (goal, *more)
    moved = tensor if device is None else _moved(tensor, torch.device(device))
    return moved.to(*more, **kwargs) if more or kwargs else moved
