"""Twenty draws of the fuzzer, with a seed that the output names; ``python -m tests.cli.fuzz`` runs thousands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 20, 5))
def test_random_settings_train_and_resume(first: int) -> None:
    seed = os.environ.get("OWS_FUZZ_SEED", "0")
    command = [sys.executable, "-m", "tests.cli.fuzz", "5", "--seed", seed, "--first", str(first)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r": (\d+) trained", done.stdout)[1]) >= 3  # type: ignore[index]
