"""Twenty draws of the fuzzer, with a seed that the output names; ``python -m tests.cli.fuzz`` runs thousands."""

from __future__ import annotations

import os

import pytest

from tests.cli import fuzz


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 20, 5))
def test_random_settings_train_and_resume(first: int) -> None:
    ends = fuzz.run(5, int(os.environ.get("OWS_TEST_SEED", "0")), first)
    assert not ends["wrong"]
    assert ends["killed"] >= 3
