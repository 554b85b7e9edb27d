"""The command line: parse, call, print. What the commands do is in the package."""

from weakspot.cli import attack, audit, dissect, explain, inspect  # noqa: F401 - importing a command registers it
from weakspot.cli.app import app, main

__all__ = ["app", "main"]
