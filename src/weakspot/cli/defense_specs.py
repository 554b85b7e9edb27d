"""Defenses: what --defense and the --set options beside it stand for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from weakspot.cli.app import USAGE, Failure
from weakspot.cli.inputs import setting_value

if TYPE_CHECKING:
    from torch import nn

    from weakspot.classifier import Classifier


OURS = ("neutralize", "mask_units")
FORMS = "neutralize, mask_units or package.module:factory"


def find_defense(text: str, settings: Sequence[str], classifier: Classifier) -> nn.Module:
    """The defended model that the options name.

    A factory is called with the undefended classifier, which takes images in [0, 1], and the settings; it returns a
    module that takes the same images and returns logits.
    """
    from torch import nn

    from weakspot._checks import unknown_choice
    from weakspot.models.specs import find_factory

    module, colon, name = text.partition(":")
    if not colon and text not in OURS:
        raise Failure(unknown_choice("--defense", text, OURS, remedy="or give package.module:factory"), USAGE)
    if not colon:
        defended = _ours(text, settings, classifier)
    else:
        factory = find_factory(module, name, kind="defense", forms=FORMS)
        if not callable(factory):
            raise Failure(
                f"defense {text} is a {type(factory).__name__}; accepted is a function of the undefended classifier",
                USAGE,
            )
        try:
            defended = factory(classifier, **_read(settings))
        except Exception as error:
            raise Failure(
                f"defense {text} failed when it was called with the undefended classifier"
                f"{' and ' + ', '.join(settings) if settings else ''}: {type(error).__name__}: {error}",
                USAGE,
            ) from error
    if not isinstance(defended, nn.Module):
        raise Failure(
            f"defense {text} returned a {type(defended).__name__}; accepted is a torch.nn.Module that takes images in "
            "[0, 1] and returns logits",
            USAGE,
        )
    for part in defended.modules():  # flags rather than .eval(), which exported modules refuse
        part.training = False
    return defended.to(classifier.mean.device)


def _ours(name: str, settings: Sequence[str], classifier: Classifier) -> nn.Module:
    from weakspot._checks import unknown_choice
    from weakspot.defenses import mask_units, neutralizing

    make: Callable[..., nn.Module] = neutralizing if name == "neutralize" else mask_units
    given = _read(settings)
    parameters = {key: p for key, p in inspect.signature(make).parameters.items() if key != "model"}
    for key in given:
        if key not in parameters:
            raise Failure(
                unknown_choice(f"--set of {name}", key, parameters),
                USAGE,
            )
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in given]
    if missing:
        raise Failure(
            f"{name} needs {' and '.join(missing)}: --set layer=_blocks.5 --set units=3,17 for example",
            USAGE,
        )
    if name == "neutralize" and "seed" in given and not given.get("randomness"):
        raise Failure(
            f"--set seed={given['seed']} does nothing without randomness; add --set randomness=0.5 for example, or "
            "leave it out",
            USAGE,
        )
    if "units" in given:
        given["units"] = _whole_numbers(given["units"])
    try:
        return make(classifier, **given)
    except TypeError as error:
        raise Failure(f"{name} cannot work with {', '.join(settings)}: {error}", USAGE) from error


def _read(settings: Sequence[str]) -> dict[str, Any]:
    """Name to value."""
    given: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise Failure(f"--set is {setting!r}; accepted is NAME=VALUE", USAGE)
        given[key] = value if key in {"layer", "units"} else setting_value(value)
    return given


def _whole_numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise Failure(f"units is {text!r}; accepted are whole numbers separated by commas: units=3,17", USAGE)
    return [int(part) for part in parts]
