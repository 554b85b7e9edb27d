"""The choice of a defense: a built-in one with its arguments, or a factory of the user's own."""

import inspect
from collections.abc import Callable, Sequence

from torch import nn

from weakspot._checks import unknown_choice
from weakspot.classifier import Classifier
from weakspot.cli.app import Failure
from weakspot.cli.options import parse_settings
from weakspot.defenses import mask_units, neutralizing
from weakspot.models.specs import find_factory

BUILT_IN = ("neutralize", "mask_units")
FORMS = "neutralize, mask_units or package.module:factory"


def find_defense(text: str, settings: Sequence[str] | None, classifier: Classifier) -> nn.Module:
    """The defended model that the options describe.

    Args:
        text: a built-in defense, or package.module:factory. The factory is called with the undefended classifier and
            the settings, and returns a module that takes the same images and returns logits.
        settings: NAME=VALUE each.
        classifier: the undefended classifier.
    """
    module, colon, name = text.partition(":")
    if not colon and text not in BUILT_IN:
        raise Failure(unknown_choice("--defense", text, BUILT_IN, remedy="or give package.module:factory"))
    if not colon:
        defended = _built_in(text, settings, classifier)
    else:
        factory = find_factory(module, name, kind="defense", forms=FORMS)
        if not callable(factory):
            raise Failure(
                f"--defense {text} must be a function of the undefended classifier, got {type(factory).__name__}"
            )
        values = parse_settings(settings, texts=("layer", "units"))
        try:
            defended = factory(classifier, **values)
        except Exception as error:
            given_settings = f" and {', '.join(settings)}" if settings else ""
            raise Failure(
                f"--defense {text} failed on the undefended classifier{given_settings}: {type(error).__name__}: {error}"
            ) from error
    if not isinstance(defended, nn.Module):
        raise Failure(
            f"--defense {text} must return a torch.nn.Module that takes images in [0, 1] and returns logits, got "
            f"{type(defended).__name__}"
        )
    for part in defended.modules():  # flags rather than .eval(), which exported modules refuse
        part.training = False
    return defended.to(classifier.mean.device)


def _built_in(name: str, settings: Sequence[str] | None, classifier: Classifier) -> nn.Module:
    make: Callable[..., nn.Module] = neutralizing if name == "neutralize" else mask_units
    values: dict[str, object] = {**parse_settings(settings, texts=("layer", "units"))}
    parameters = {key: p for key, p in inspect.signature(make).parameters.items() if key != "model"}
    for key in values:
        if key not in parameters:
            raise Failure(unknown_choice(f"--set of {name}", key, parameters))
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in values]
    if missing:
        raise Failure(f"{name} needs {' and '.join(missing)} (give --set layer=_blocks.5 --set units=3,17)")
    if name == "neutralize" and "seed" in values and not values.get("randomness"):
        raise Failure("--set seed has no effect without randomness (add --set randomness=0.5)")
    if "units" in values:
        units = [part.strip() for part in str(values["units"]).split(",")]
        if not all(part.isascii() and part.isdigit() for part in units):
            raise Failure(f"units must be integers separated by commas such as 3,17, got {values['units']!r}")
        values["units"] = [int(part) for part in units]
    try:
        return make(classifier, **values)
    except TypeError as error:
        raise Failure(f"{name} failed with {', '.join(settings or ())}: {error}") from error
