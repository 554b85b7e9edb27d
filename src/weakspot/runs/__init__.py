"""Runs: what a command leaves on disk."""

from weakspot.runs.folder import fingerprint, write_run

__all__ = ["fingerprint", "write_run"]
