"""Runs: what a command leaves on disk."""

from weakspot.runs.folder import write_run

__all__ = ["write_run"]
