"""The parser of the commands that take no config."""

from __future__ import annotations

import argparse
from typing import NoReturn

from ows_lightning.errors import UsageError


class Parser(argparse.ArgumentParser):
    """argparse's, without abbreviated options, whose errors are UsageErrors."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"main.py {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises argparse's message.

        Raises:
            UsageError: Always.
        """
        raise UsageError(f"{self.prog.removeprefix('main.py ')}: {message}; `{self.prog} --help` lists the options")
