"""The command line: each command parses its options, calls the library and prints the results."""

from weakspot.cli import explain, attack, audit, compare, defend, dissect, train, inspect  # noqa: F401, I001 - importing a command registers it, in the order of the help
from weakspot.cli.app import app, main

__all__ = ["app", "main"]
