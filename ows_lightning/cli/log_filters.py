"""Filters messages that libraries print at every start and that a user of the command line can do nothing about."""

from __future__ import annotations

import logging
import warnings
from functools import partial

_WARNINGS = (
    "does not have many workers",  # rows are tokenised beforehand, so workers have nothing to do
    r"isinstance\(treespec, LeafSpec\)",  # Lightning uses a deprecated part of torch
    "skip_none parameter was deprecated",
    "args parameter is intended to run from within Python",
    "is_gradient_checkpointing",
    "GPU available but not used",
)
_LOGS = {
    "lightning.pytorch.utilities.rank_zero": ("litlogger", "GPU available:", "TPU available:", "HPU available:"),
    "torch._subclasses.fake_tensor": ("failed while attempting to run meta for",),  # a stack trace; it raises, too
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
}


def filter_messages() -> None:
    """Filters these messages, and no others."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", f".*{message}")
    for name, messages in _LOGS.items():
        logging.getLogger(name).addFilter(partial(_is_wanted, messages))


def _is_wanted(unwanted: tuple[str, ...], record: logging.LogRecord) -> bool:
    return not any(message in record.getMessage() for message in unwanted)
