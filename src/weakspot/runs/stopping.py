"""Stopping: what ends an audit that can go on later."""

from __future__ import annotations


class StoppedError(Exception):
    """The folder could not be written, or workers died; what is in it is whole, and an audit that had begun can go on.

    Attributes:
        resumable: whether it had begun.
    """

    def __init__(self, sentence: str, *, resumable: bool) -> None:
        super().__init__(sentence)
        self.resumable = resumable

    def __reduce__(self) -> tuple[object, ...]:
        return _again, (str(self), self.resumable)


def _again(sentence: str, resumable: bool) -> StoppedError:
    return StoppedError(sentence, resumable=resumable)
