"""Runs of the command line that take no longer than they must."""

import pytest

from ows_lightning.callbacks import run_folder
from ows_lightning.callbacks.run_summary import RunSummary


def make_bare(patch: pytest.MonkeyPatch) -> None:
    """Leaves a run's pictures and the prediction of its memory out, which take longer than tiny runs."""
    patch.setattr(run_folder, "write_pictures", lambda _: [])
    patch.setattr(RunSummary, "_memory_text", lambda *_: "not predicted in tests")
