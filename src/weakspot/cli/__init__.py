"""The command line: each command parses its options, calls the library and prints the results."""

# Importing a command registers it; the help lists them in this order.
from weakspot.cli import explain, map, attack, audit, compare, defend, dissect, train, reproduce, doctor  # noqa: A004, F401, I001
from weakspot.cli.app import app, main

__all__ = ["app", "main"]
