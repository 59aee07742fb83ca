"""The parser of the commands that take no config, and flags that several of them share."""

from __future__ import annotations

import argparse
import io
import sys
from typing import NoReturn, TextIO

from ows_lightning.errors import UsageError, command_line

DTYPES = ("float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """argparse's, without abbreviated options, whose errors are UsageErrors."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=command_line(command), description=description, allow_abbrev=False)
        self.command = command

    def error(self, message: str) -> NoReturn:
        """Raises argparse's message.

        Raises:
            UsageError: Always.
        """
        raise UsageError(f"{self.command}: {message}; `{self.prog} --help` lists the options")


def standard_input() -> TextIO:
    """Returns standard input, as UTF-8 in any locale, with replacement characters for other bytes; empty if it is closed."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    return sys.stdin or io.StringIO()


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for loading a model to talk to, and for generating its answers."""
    parser.add_argument("--max_new_tokens", type=int, default=256, help="Most tokens of an answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, always takes the likeliest token")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="Draw from the likeliest tokens that make this share (default: all)"
    )
    parser.add_argument("--top_k", type=int, default=0, help="Draw from this many likeliest tokens (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the draws (default: 0)")
    parser.add_argument("--system", help="The system message")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is a GPU)")
    parser.add_argument("--dtype", choices=DTYPES, help="Of the weights; bfloat16 on a GPU, else float32")
