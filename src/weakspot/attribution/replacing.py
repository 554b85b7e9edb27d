"""Replacing: let a layer's maps be other ones while a network runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from typing import Any

from torch import Tensor, nn

from weakspot.attribution.layers import first_tensor
from weakspot.threads import hooked


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
