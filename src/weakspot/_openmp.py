"""How long waiting threads of OpenMP spin where weakspot is a program of its own; imported before torch, which asks.

By default, waiting threads of GNU's OpenMP spin 300,000 rounds. With another job on one of the cores, each of thousands
of short operations waits for a thread that has no core, while the other fills its own: several times slower. The number
of rounds changes no bit of a result. A process that only imports weakspot keeps its setting.
"""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROUNDS = "3000"  # see docs/decisions.md
OPTION_WITH_VALUE = re.compile(
    "-[^-cmWX]*([cmWX])(.*)", re.DOTALL
)  # of the interpreter, maybe behind others as in -um


def is_own_program(command: Sequence[str]) -> bool:
    """Whether a command, such as `sys.orig_argv`, starts weakspot by its name or as a module."""
    # After the interpreter come its options, then -m with a module, -c with code, or a script.
    rest = iter(command[1:])
    for part in rest:
        if part == "-" or not part.startswith("-"):
            return Path(part).stem == "weakspot"
        if part == "--check-hash-based-pycs":
            next(rest, "")
        option = OPTION_WITH_VALUE.match(part)
        if option:
            # The value is the rest of this part, as in -Wignore, or the next part.
            value = option[2] or next(rest, "")
            if option[1] in "cm":
                return option[1] == "m" and value == "weakspot"
    return False


if is_own_program(sys.orig_argv) and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", ROUNDS)
