"""Settings: what a network's modules hold besides tensors and parts, as far as it can be written down."""

from __future__ import annotations

from torch import nn

PLAIN = (bool, int, float, complex, str, bytes, type(None))


def settings(network: nn.Module) -> list[tuple[str, str, list[tuple[str, object]]]]:
    """Of every module its name, its class, and its attributes that are numbers, words, or lists of such."""
    found = []
    for name, module in network.named_modules():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        plain = [(key, value) for key, value in vars(module).items() if key != "training" and _plain(value)]
        found.append((name, kind, plain))
    return found


def _plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(_plain(key) and _plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    return isinstance(value, PLAIN)
