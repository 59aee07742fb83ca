"""The two errors that a user may cause, each one clear line."""

from __future__ import annotations


class UsageError(ValueError):
    """A setting or an input is wrong: the message names the key or the row, and the mend. Exit code 2."""


class RunError(RuntimeError):
    """A run that started well can't go on: the message says why, and what is left to resume from. Exit code 1."""
