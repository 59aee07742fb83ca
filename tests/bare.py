"""Runs of the command line, and plans, that take no longer than they must."""

from collections.abc import Callable
from typing import Any

import pytest

from ows_lightning.callbacks import run_folder
from ows_lightning.callbacks.run_summary import RunSummary
from ows_lightning.memory.plan_settings import PlanSettings

_FOLLOWED: dict[Any, Any] = {}


def make_bare(patch: pytest.MonkeyPatch) -> None:
    """Leaves a run's pictures and the prediction of its memory out, which take longer than tiny runs."""
    patch.setattr(run_folder, "write_pictures", lambda _: [])
    patch.setattr(RunSummary, "_memory_text", lambda *_: "not predicted in tests")


def follow_once(patch: pytest.MonkeyPatch) -> None:
    """Lets plans of the same model share the steps that they follow, which takes a plan most of its time."""

    def followed(settings: PlanSettings, key: Any, make: Callable[[], Any]) -> Any:
        key = settings.model_config.to_json_string(), repr(key)
        if key not in _FOLLOWED:
            _FOLLOWED[key] = make()
        return _FOLLOWED[key]

    patch.setattr(PlanSettings, "cached", followed)
