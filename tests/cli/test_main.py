"""The entry: what a command loads."""

from __future__ import annotations

import subprocess
import sys

import pytest

LATE = {"datasets", "peft", "matplotlib"}
MAIN = f"""
import sys
from ows_lightning.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print("loaded:", *{LATE} & {{*sys.modules}})
"""


@pytest.mark.slow
@pytest.mark.parametrize("words", ["plan --help", "report --help", "configs", "chat --help"])
def test_a_command_loads_no_library_that_it_does_not_need(words: str) -> None:
    ended = subprocess.run([sys.executable, "-c", MAIN, *words.split()], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    said, _, loaded = ended.stdout.rpartition("loaded:")
    assert said.count("\n") > 3
    assert loaded.split() == []
