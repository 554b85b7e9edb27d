"""Given options: those that the user wrote, and a refusal of those that cannot take effect."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from weakspot.cli.app import USAGE, Failure


def given(context: typer.Context, names: Sequence[str]) -> list[str]:
    """Which of these parameters the user gave, as options are written; a default that was spelt out counts as given.

    Args:
        context: of the command that runs.
        names: of parameters of its function.
    """
    spelt = {parameter.name: max(parameter.opts, key=len) for parameter in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in names}
    return [spelt[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"]


def refuse(context: typer.Context, names: Sequence[str], why: str) -> None:
    """What is given and would be ignored is a mistake, not a wish.

    Args:
        context: of the command that runs.
        names: of parameters that do nothing as it is called.
        why: how it is called, and the remedy: "with --pair, which ...; leave out one or the other".

    Raises:
        Failure: when any of them was given, naming all that were.
    """
    found = given(context, names)
    if found:
        *rest, last = found
        listed = f"{', '.join(rest)} and {last}" if rest else last
        raise Failure(f"{listed} {'do' if rest else 'does'} nothing {why}", USAGE)


def refuse_keep(context: typer.Context, regions: Sequence[str], option: str = "--region") -> None:
    """The share to keep is that of two regions alone.

    Args:
        context: of the command that runs.
        regions: that the attack is confined to, as `read_region` takes them.
        option: that names them.

    Raises:
        Failure: when --keep was given and none of the regions depends on it.
    """
    from weakspot.regions.reading import depends_on_keep

    if not any(depends_on_keep(region) for region in regions):
        refuse(context, ["keep"], f"without cam or support in {option}; add one of them, or leave it out")
