"""What several analyses need of one model, computed once within a call: layers, alignments, recordings.

Nothing is kept beyond the call, because a model's weights may change between calls, and nothing is shared with other
threads, whose hooks differ.
"""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from weakspot._state import HOOKS, hooks

Result = TypeVar("Result")
_this = threading.local()
_Memory = tuple[int, dict[Hashable, object]]  # how many hooks a model had, and what was computed for it


@contextmanager
def remembering(model: nn.Module) -> Iterator[None]:
    """Let `remembered` keep results in this thread; the model's weights must not change inside."""
    memories: dict[int, _Memory] = _this.__dict__.setdefault("memories", {})
    # Inside another `remembering`, whose results serve here as well.
    if id(model) in memories:
        yield
        return
    memories[id(model)] = _count_hooks(model), {}
    try:
        yield
    finally:
        del memories[id(model)]


def remembered(model: nn.Module, key: Hashable, compute: Callable[[], Result]) -> Result:
    """What `compute` returns; inside `remembering` it runs once for each key, unless hooks were added since.

    Args:
        model: that the result depends on.
        key: whatever else it depends on.
        compute: a function of nothing else.
    """
    # Outside `remembering` the count is None, which no number of hooks equals.
    count, results = getattr(_this, "memories", {}).get(id(model), (None, {}))
    if count != _count_hooks(model):
        return compute()
    if key not in results:
        results[key] = compute()
    result: Result = results[key]
    return result


def _count_hooks(model: nn.Module) -> int:
    return sum(len(hooks(module, kind)) for module in model.modules() for kind in HOOKS)
