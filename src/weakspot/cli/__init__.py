"""The command line: each command parses its options, calls the library and prints the results."""

# Importing a command registers it; the help lists them in this order.
from weakspot.cli import explain, map, certify, explore, attack, audit  # noqa: A004, F401, I001
from weakspot.cli import compare, defend, dissect, train, reproduce, doctor  # noqa: F401
from weakspot.cli.app import app, main

__all__ = ["app", "main"]
