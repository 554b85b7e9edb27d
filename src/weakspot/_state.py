"""Threads: the state of a model and of the process that one thread changes and another reads.

A module holds its train and eval flags, its hooks and whether its weights require gradients; the process holds the
random generators. What weakspot changes of these it changes through this file, so that two threads on one model get
the results that each would get alone, and the last one to finish leaves everything as the first one found it.
"""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

SEEDED = threading.RLock()
"""Held while a global random generator runs from a seed of ours: draws of two threads must not alternate."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_lock = threading.RLock()
_this = threading.local()
_evaluated: dict[
    int, list[Any]
] = {}  # modules whose own mode is train, by id, and how many hold them in eval mode
_frozen: dict[int, list[Any]] = {}  # parameters that require gradients, by id, and how many hold them without


class EvalMode:
    """A context in which a module and all its parts are in eval mode; afterward each is in the mode it had.

    While any thread is inside, they stay in eval mode. Flags are set rather than `.eval()` called, which exported
    modules refuse and others override.

    Attributes:
        switched: the modules that were in train mode on entry.
    """

    __slots__ = ("eval", "root", "switched", "train")

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.train: list[nn.Module] = []  # by their own mode, whoever holds them in eval mode already
        self.eval: list[nn.Module] = []
        self.switched: list[nn.Module] = []

    def __enter__(self) -> EvalMode:
        # Every call of a classifier comes through here: plain dictionaries, because nn.Module's own attribute access
        # and `modules()` take ten times as long.
        with _lock:
            try:
                found = [self.root]
                seen = set(found)
                for module in found:
                    state = module.__dict__
                    mode = state.get("training")
                    if id(module) in _evaluated:
                        _evaluated[id(module)][1] += 1
                        self.train.append(module)
                    elif module.training if mode is None else mode:  # None: a property, as of TorchScript
                        _evaluated[id(module)] = [module, 1]
                        self.train.append(module)
                        self.switched.append(module)
                        _set_training(module, False)
                    else:
                        self.eval.append(module)
                    for child in (state.get("_modules") or module._modules).values():
                        if child is not None and child not in seen:
                            seen.add(child)
                            found.append(child)
            except BaseException:  # an interrupt too
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            for module in self.train:
                entry = _evaluated[id(module)]
                entry[1] -= 1
                if not entry[1]:
                    del _evaluated[id(module)]
                    _set_training(module, True)
            for module in self.eval:  # a network may switch its own parts while it runs
                if module.__dict__.get("training", False) and id(module) not in _evaluated:
                    _set_training(module, False)


def _set_training(module: nn.Module, mode: bool) -> None:
    state = module.__dict__
    if "training" in state:
        state["training"] = mode
    else:
        module.training = mode


def in_train_mode(module: nn.Module) -> bool:
    """The module's own mode, whoever holds it in eval mode just now."""
    with _lock:
        return module.training or id(module) in _evaluated


@contextmanager
def without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """The model's parameters require no gradients, so that nothing is added to their `.grad`."""
    with _lock:
        held = [weight for weight in model.parameters() if weight.requires_grad or id(weight) in _frozen]
        for weight in held:
            _frozen.setdefault(id(weight), [weight, 0])[1] += 1
            weight.requires_grad_(False)
    try:
        yield
    finally:
        with _lock:
            for weight in held:
                entry = _frozen[id(weight)]
                entry[1] -= 1
                if not entry[1]:
                    del _frozen[id(weight)]
                    weight.requires_grad_(True)


# ---------------------------------------------------------------- hooks


class OwnHook:
    """A hook that sees the passes of the thread that registered it, and no other's."""

    __slots__ = ("hook", "open", "thread")

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook, self.thread, self.open = hook, threading.get_ident(), True

    def __call__(self, *arguments: Any) -> Any:
        return self.hook(*arguments) if self.open and self.sees() else None

    def sees(self) -> bool:
        """Whether a pass of the current thread would be seen."""
        return self.thread == threading.get_ident() and not getattr(_this, "unwatched", 0)

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnHook:
        return self  # so that it closes in copies of the module too


@contextmanager
def hooked(
    module: nn.Module, hook: Callable[..., Any], *, before: bool = False, first: bool = False
) -> Iterator[None]:
    """A forward hook, or one `before` the forward pass, for the passes of this thread; gone on exit.

    Args:
        module: what is watched.
        hook: as `register_forward_hook` and `register_forward_pre_hook` take it.
        before: whether it is called before the module.
        first: whether it is called before hooks that the module has already.
    """
    own = OwnHook(hook)
    register = module.register_forward_pre_hook if before else module.register_forward_hook
    with _lock:
        handle = register(own, prepend=first)
    try:
        yield
    finally:
        own.open = False
        with _lock:
            handle.remove()


def hooks(module: nn.Module, kind: str) -> list[Any]:
    """The hooks of a kind, one of `HOOKS`, that see passes of this thread."""
    found = tuple(getattr(module, kind).values())
    return [hook for hook in found if not isinstance(hook, OwnHook) or hook.thread == threading.get_ident()]


@contextmanager
def unwatched() -> Iterator[None]:
    """Passes of this thread that the hooks of weakspot do not see."""
    _this.unwatched = getattr(_this, "unwatched", 0) + 1
    try:
        yield
    finally:
        _this.unwatched -= 1


def is_unwatched() -> bool:
    """Whether this thread is inside `unwatched`."""
    return bool(getattr(_this, "unwatched", 0))


Module = TypeVar("Module", bound=nn.Module)


def copied(module: Module) -> Module:
    """A deep copy in the module's own modes, whatever other threads do to the module meanwhile."""
    with _lock:  # no hooks come or go
        memo: dict[int, Any] = {}
        twin = copy.deepcopy(module, memo)
        for own in module.modules():
            if id(own) in memo:
                _set_training(memo[id(own)], in_train_mode(own))
    return twin


def unhooked_copy(module: Module) -> Module:
    """`copied`, without any hooks."""
    twin = copied(module)
    for part in twin.modules():
        for name, value in vars(part).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                value.clear()
    return twin


# ---------------------------------------------------------------- random generators

_drawing: dict[int, int] = {}  # by thread: how often it is inside `random_state_kept`
_before: list[tuple[Any, ...]] = []  # the state that the first thread found


@contextmanager
def random_state_kept(device: torch.device | None = None) -> Iterator[None]:
    """Put the global generators of torch, numpy and random back on exit.

    Where threads are inside together, the last to leave puts back what the first one found.

    Args:
        device: whose generator is kept besides that of the CPU.
    """
    thread = threading.get_ident()
    with _lock:
        state = _random_state(device)
        if not _drawing:
            _before[:] = [state]
        elif device is not None and device.type == "cuda" and all(one[0] != device for one in _before):
            _before.append(state)
        _drawing[thread] = _drawing.get(thread, 0) + 1
    try:
        yield
    finally:
        with _lock:
            _drawing[thread] -= 1
            if not _drawing[thread]:
                del _drawing[thread]
            if not _drawing:
                for earlier in reversed(_before):
                    _put_back(earlier)
                _before.clear()
            elif set(_drawing) == {thread}:
                _put_back(state)


def _random_state(device: torch.device | None) -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state(device) if device is not None and device.type == "cuda" else None
    others = random.getstate(), np.random.get_state()  # noqa: NPY002 - what a model may draw from is put back
    return device, torch.get_rng_state(), cuda, *others


def _put_back(state: tuple[Any, ...]) -> None:
    device, cpu, cuda, *others = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)
    random.setstate(others[0])
    np.random.set_state(others[1])  # noqa: NPY002
