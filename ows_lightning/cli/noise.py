"""Leaves out what libraries say at every start and what a user of the command line can't act upon."""

from __future__ import annotations

import logging
import warnings

_WARNINGS = (
    "does not have many workers",  # rows are tokenised beforehand; there is nothing left to do for workers
    r"isinstance\(treespec, LeafSpec\)",  # torch and Lightning between themselves
    "skip_none parameter was deprecated",
    "args parameter is intended to run from within Python",
    "is_gradient_checkpointing",
    "GPU available but not used",
)
_LOGS = {
    "lightning.pytorch.utilities.rank_zero": ("litlogger", "GPU available:", "TPU available:", "HPU available:"),
    "torch._subclasses.fake_tensor": ("failed while attempting to run meta for",),  # a stack trace; what failed says so itself
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
}


def be_quiet() -> None:
    """Filters these messages, and no others."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", f".*{message}")
    for name, messages in _LOGS.items():
        logging.getLogger(name).addFilter(_without(messages))


def _without(messages: tuple[str, ...]) -> logging.Filter:
    class Filter(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            return not any(message in record.getMessage() for message in messages)

    return Filter()
