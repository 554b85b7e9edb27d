"""The command line: parse, call, print. What the commands do is in the package."""

from weakspot.cli import (  # noqa: F401 - importing a command registers it
    attack,
    audit,
    compare,
    defend,
    dissect,
    explain,
    inspect,
    train,
)
from weakspot.cli.app import app, main

__all__ = ["app", "main"]
