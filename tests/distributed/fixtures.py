from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.samples import tiny_tokenizer
from tests.tiny import tiny_model

Arguments = Callable[..., list[str]]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows to train on; models are put beside them."""
    folder = tmp_path_factory.mktemp("home")
    rows = [{"instruction": f"is {i} {'even' if i % 3 else 'odd'}?", "output": "yes" * (1 + i % 4)} for i in range(41)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command_of(
    home: Path,
    runs: Path,
    *more: str,
    strategy: str = "auto",
    ranks: int = 1,
    architecture: str = "llama",
    **shape: object,
) -> list[str]:
    """The command line of a run of 60 steps of 8 rows that draws blocks every 10."""
    model = home / "-".join([architecture, *(f"{key}-{value}" for key, value in sorted(shape.items()))])
    if not model.exists():
        tokenizer = tiny_tokenizer()
        tiny_model(architecture, vocab_size=len(tokenizer), **shape).save_pretrained(model)
        tokenizer.save_pretrained(model)
    settings = {
        "model.model_name_or_path": model, "model.rank": 8,
        "data.dataset": home / "rows.jsonl", "data.val_size": 0, "data.batch_size": 8 // ranks,
        "sampling.activated_layers": 2, "sampling.interval_steps": 10,
        "sampling.calibration_samples": 8, "sampling.threshold": 3,
        "trainer.accelerator": "cpu", "trainer.devices": ranks, "trainer.strategy": strategy, "trainer.max_steps": 60,
        "trainer.default_root_dir": runs, "trainer.gradient_clip_val": 1.0,
        "trainer.log_every_n_steps": 1, "trainer.enable_progress_bar": "false", "trainer.enable_model_summary": "false",
    }  # fmt: skip
    return ["fit", *(word for key, value in settings.items() for word in (f"--{key}", str(value))), *more]


@pytest.fixture
def arguments(home: Path, tmp_path: Path) -> Arguments:
    """``command_of`` in the test's own folder, unless ``runs`` names another."""

    def make(*more: str, runs: Path | None = None, **settings: Any) -> list[str]:
        return command_of(home, runs or tmp_path / "runs", *more, **settings)

    return make
