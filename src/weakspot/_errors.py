"""Exceptions that foreign code raises: their first lines, and those that would end the process."""

import contextlib
from collections.abc import Iterator


class ModelError(RuntimeError):
    """A model raised SystemExit or another exception that is not an `Exception`."""


class Interruption(BaseException):
    """Ends work of weakspot's own and passes through models. No `Exception`, so nothing takes it for a failure."""


@contextlib.contextmanager
def contain_exits(name: str) -> Iterator[None]:
    """Turn SystemExit, and every other exception that is not an `Exception`, into a `ModelError`.

    Code that comes with a model may call `sys.exit(0)`, which would end the process with a success code.
    KeyboardInterrupt passes, because the user may have sent it, and so does an `Interruption`.

    Args:
        name: of the model.

    Raises:
        ModelError: in place of the original exception.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, Interruption):
        raise
    except BaseException as error:
        raise ModelError(
            f"{name} raised {describe_error(error)}; a model must not end the process"
        ) from error


def describe_error(error: BaseException) -> str:
    """The type of an exception and the first line of its message."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if there is no message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
