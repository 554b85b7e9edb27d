"""State that weakspot changes and restores: modes, hooks, gradients of weights, random generators.

All of it is shared between threads: a module holds its train flags, its hooks and `requires_grad` of its weights, and
the process holds the random generators. weakspot changes it only through the context managers here. Two threads that
use one model at the same time get the results that each would get alone, and the last one to leave restores the state
that the first one found.
"""

from __future__ import annotations

import copy
import itertools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

SEEDED = threading.RLock()
"""Held while a global random generator runs from a seed, so that two threads do not draw from it in turn."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Item = TypeVar("Item")


@dataclass
class _Held(Generic[Item]):
    """A module or parameter, and the number of contexts that hold it in a changed state."""

    item: Item
    holders: int = 1


_lock = threading.RLock()
_this = threading.local()
_evaluated: dict[int, _Held[nn.Module]] = {}  # by id: modules in train mode that are held in eval mode
_frozen: dict[int, _Held[nn.Parameter]] = {}  # by id: parameters that are held without gradients


class EvalMode:
    """A context in which a module and all its submodules are in eval mode; on exit each returns to its own mode.

    They stay in eval mode while any thread is inside. The flags are set directly, because exported modules refuse
    `.eval()` and other modules override it.

    Attributes:
        switched: the modules that were in train mode on entry.
    """

    __slots__ = ("eval", "root", "switched", "train")

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.train: list[nn.Module] = []  # own mode, even if another thread holds them in eval mode
        self.eval: list[nn.Module] = []
        self.switched: list[nn.Module] = []

    def __enter__(self) -> EvalMode:
        # Every call of a classifier comes through here: plain dictionaries, because nn.Module's own attribute access
        # and `modules()` take ten times as long.
        with _lock:
            try:
                modules = [self.root]
                seen = set(modules)
                for module in modules:
                    state = module.__dict__
                    mode = state.get("training")
                    if id(module) in _evaluated:
                        _evaluated[id(module)].holders += 1
                        self.train.append(module)
                        _set_training(module, False)  # the user may have switched it since
                    elif module.training if mode is None else mode:  # None: TorchScript has a property
                        _evaluated[id(module)] = _Held(module)
                        self.train.append(module)
                        self.switched.append(module)
                        _set_training(module, False)
                    else:
                        self.eval.append(module)
                    for child in (state.get("_modules") or module._modules).values():
                        if child is not None and child not in seen:
                            seen.add(child)
                            modules.append(child)
            except BaseException:  # including an interrupt
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            # Ctrl-C raises after calls only, so that a module leaves `train` together with its entry.
            while self.train:
                module = self.train[-1]
                key = id(module)
                if _evaluated[key].holders == 1:
                    _set_training(module, True)
                    del _evaluated[key]
                else:
                    _evaluated[key].holders -= 1
                del self.train[-1]
            for module in self.eval:  # the network may have switched its own submodules
                if module.__dict__.get("training", False) and id(module) not in _evaluated:
                    _set_training(module, False)

    def __del__(self) -> None:
        if getattr(self, "train", None):  # Ctrl-C came on the way into `__exit__`
            self.__exit__()


def _set_training(module: nn.Module, mode: bool) -> None:
    state = module.__dict__
    if "training" in state:
        state["training"] = mode
    else:
        module.training = mode


def in_train_mode(module: nn.Module) -> bool:
    """The module's own mode, even while `EvalMode` holds it in eval mode."""
    with _lock:
        return module.training or id(module) in _evaluated


@contextmanager
def without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """Hold the model's parameters without gradients, so that backward passes do not add to their `.grad`."""
    with _lock:
        # Those that another thread holds count as well: it gives them their gradients back when it leaves.
        weights = [weight for weight in model.parameters() if weight.requires_grad or id(weight) in _frozen]
        for weight in weights:
            _frozen.setdefault(id(weight), _Held(weight, 0)).holders += 1
            weight.requires_grad_(False)
    try:
        yield
    finally:
        with _lock:
            for weight in weights:
                held = _frozen[id(weight)]
                held.holders -= 1
                if not held.holders:
                    del _frozen[id(weight)]
                    weight.requires_grad_(True)


class OwnHook:
    """A hook that is called in passes of the thread that registered it, and in no other thread's."""

    __slots__ = ("hook", "open", "thread")

    def __init__(self, hook: Callable[..., object]) -> None:
        self.hook, self.thread, self.open = hook, threading.get_ident(), True

    def __call__(self, *arguments: object) -> object:
        return self.hook(*arguments) if self.open and self.sees() else None

    def sees(self) -> bool:
        """Whether the hook is called in a pass of the current thread."""
        return self.thread == threading.get_ident() and not getattr(_this, "unwatched", 0)

    def __deepcopy__(self, memo: dict[int, object]) -> OwnHook:
        return self  # closing the hook also closes it in copies of the module


@contextmanager
def hooked(
    module: nn.Module, hook: Callable[..., object], *, before: bool = False, first: bool = False
) -> Iterator[None]:
    """Register a forward hook for passes of this thread, and remove it on exit.

    Args:
        module: gets the hook.
        hook: a function for `register_forward_hook`, or for `register_forward_pre_hook` if `before`.
        before: whether the hook is called before the module.
        first: whether the hook is called before the module's other hooks.
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


def hooks(module: nn.Module, kind: str) -> list[object]:
    """The hooks of a kind (one of `HOOKS`) that are called in passes of this thread."""
    registered = tuple(getattr(module, kind).values())
    return [
        hook for hook in registered if not isinstance(hook, OwnHook) or hook.thread == threading.get_ident()
    ]


@contextmanager
def unwatched() -> Iterator[None]:
    """Do not call weakspot's hooks in passes of this thread."""
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
    """A deep copy in the module's own modes, even while other threads hold the module in eval mode."""
    with _lock:  # no other thread adds or removes hooks during the copy
        memo: dict[int, nn.Module] = {}
        twin = copy.deepcopy(module, memo)
        for own in module.modules():
            if id(own) in memo:
                _set_training(memo[id(own)], in_train_mode(own))
    return twin


def unhooked_copy(module: Module) -> Module:
    """A deep copy without hooks, in the module's own modes."""
    twin = copied(module)
    for part in twin.modules():
        for name, value in vars(part).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                value.clear()
    return twin


class _RandomState:
    """States of the global generators of torch, numpy and random."""

    def __init__(self, device: torch.device | None) -> None:
        self.device = device if device is not None and device.type in {"cuda", "mps"} else None
        self._cpu = torch.get_rng_state()
        if self.device is not None:
            mps = self.device.type == "mps"
            self._own = torch.mps.get_rng_state() if mps else torch.cuda.get_rng_state(self.device)
        self._random = random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002 - models may draw from it

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self.device is not None and self.device.type == "mps":
            torch.mps.set_rng_state(self._own)
        elif self.device is not None:
            torch.cuda.set_rng_state(self._own, self.device)
        random.setstate(self._random)
        np.random.set_state(self._numpy)  # noqa: NPY002


_drawing: dict[int, int] = {}  # by thread: how many `preserve_random_state` it is inside
_first_states: list[_RandomState] = []  # states that the first thread found, one per device beside the CPU


@contextmanager
def preserve_random_state(device: torch.device | None = None) -> Iterator[None]:
    """Restore the global generators of torch, numpy and random on exit.

    If threads overlap in this context, the last one to leave restores the state that the first one found.

    Args:
        device: a CUDA or MPS device whose generator is restored too.
    """
    thread = threading.get_ident()
    with _lock:
        state = _RandomState(device)
        if not _drawing:
            _first_states[:] = [state]
        elif state.device is not None and all(first.device != state.device for first in _first_states):
            _first_states.append(state)
        _drawing[thread] = _drawing.get(thread, 0) + 1
    try:
        yield
    finally:
        with _lock:
            _drawing[thread] -= 1
            if not _drawing[thread]:
                del _drawing[thread]
            if not _drawing:
                for first in reversed(_first_states):  # the first thread's state last: it is the oldest
                    first.restore()
                _first_states.clear()
            # A nested context restores what it found, but not under another thread that draws from the same generators.
            elif set(_drawing) == {thread}:
                state.restore()


@contextmanager
def trial_copy(module: Module) -> Iterator[Module]:
    """A deep copy without hooks to try things on; the global generators are restored on exit."""
    device = next((tensor.device for tensor in itertools.chain(module.parameters(), module.buffers())), None)
    with preserve_random_state(device):
        yield unhooked_copy(module)


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the global generators of torch, numpy and random for code that draws from them; restore them on exit.

    Only one thread at a time is inside.

    Args:
        seed: of all generators; numpy takes its lowest 32 bits.
        device: a CUDA or MPS device whose generator is seeded and restored too.
    """
    with SEEDED, preserve_random_state(device):
        # Not torch.manual_seed, which would seed the generators of other devices, and nothing restores those.
        torch.default_generator.manual_seed(int(seed))
        if device is not None and device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device is not None and device.type == "mps":
            torch.mps.manual_seed(seed)
        random.seed(int(seed))
        np.random.seed(seed % 2**32)  # noqa: NPY002
        yield


class DispatchMode(TorchDispatchMode):
    """A dispatch mode that torch's compiler is kept out of, without importing the compiler.

    A compiled model that runs under the mode would have the mode compiled as well. torch prevents that by importing
    its compiler, which takes 1.3 s, whether or not a model is compiled. Here it happens only if it is loaded already.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # not when the class is made

    def __enter__(self) -> object:
        mode = type(self)
        if "torch._dynamo" in sys.modules and not hasattr(mode.__torch_dispatch__, "__wrapped__"):
            mode.__torch_dispatch__ = torch._disable_dynamo(mode.__torch_dispatch__, recursive=True)  # type: ignore[method-assign, attr-defined]
        return super().__enter__()  # type: ignore[no-untyped-call]
