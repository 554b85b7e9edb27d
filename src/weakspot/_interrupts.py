"""Ctrl-C while weakspot, as a program of its own, is still importing torch: a sentence and exit code 130, as later."""

import os
import signal
import sys
from typing import Any

from weakspot._openmp import is_own_program

INTERRUPTED = 130
NOTHING_WRITTEN = "interrupted; nothing was written"


def stop_import(*_: Any) -> None:
    """End the process: an exception would appear as a traceback of whatever is being imported."""
    os.write(2, f"weakspot: {NOTHING_WRITTEN}\n".encode())
    os._exit(INTERRUPTED)


# A signal that is ignored, as in background jobs of a script, stays so.
if is_own_program(sys.orig_argv) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop_import)
