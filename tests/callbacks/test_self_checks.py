"""What a run says of itself at its end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ows_lightning.callbacks.self_checks import StateBytes, check_draws, check_loss, check_memory, measure_state_bytes
from ows_lightning.cli.main import main
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.module import CausalLMModule
from tests.data.samples import tiny_tokenizer
from tests.tiny import tiny_model


@pytest.fixture
def fit(tmp_path: Path, caplog: pytest.LogCaptureFixture, bare_runs: None) -> Callable[..., str]:
    """Trains a tiny model by the command line, and returns what the run says of itself."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), hidden_size=64)
    for block, outliers in enumerate((1, 2, 8, 1)):
        with torch.no_grad():
            decoder_layers(model)[block].mlp.down_proj.weight[0, :outliers] += 5
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = "".join(f'{{"instruction": "What is {i}?", "output": "It is {i % 3}."}}\n' for i in range(64))
    (tmp_path / "rows.jsonl").write_text(rows)

    def run(**settings: Any) -> str:
        given = {
            "model.model_name_or_path": tmp_path / "model", "model.rank": 4, "model.lr_scheduler_type": "constant",
            "data.dataset": tmp_path / "rows.jsonl", "data.val_size": 4, "data.batch_size": 4,
            "sampling.activated_layers": 1, "sampling.always_train": "[norm]",
            "trainer.max_steps": 20, "trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.log_every_n_steps": 1,
            "trainer.enable_progress_bar": "false", "trainer.default_root_dir": tmp_path / "runs",
        } | {key.replace("__", "."): value for key, value in settings.items()}  # fmt: skip
        caplog.clear()
        caplog.set_level(logging.INFO, "ows_lightning")
        main(["fit", *(f"--{key}={value}" for key, value in given.items())])
        return "\n".join(line for line in caplog.messages if line.startswith("Self-check"))

    return run


@pytest.mark.slow
def test_a_run_finds_the_failures_in_its_own_figures(fit: Callable[..., str]) -> None:
    optimizer = {"model__optimizer": "GaLoreAdamW"}
    healthy = fit(**optimizer, model__optimizer__init_args__lr=3e-3)
    assert healthy == "Self-checks: none of the method's known failures shows in this run's figures"

    assert "poor result" in fit(**optimizer, model__optimizer__init_args__lr=1e-9)

    everything = {"model__rank": 64, "sampling__distribution": "uniform", "sampling__activated_layers": 4}
    everything["sampling__always_train"] = "[embeddings,lm_head,norm]"
    assert "memory as LISA's" in fit(**optimizer, **everything, model__optimizer__init_args__lr=3e-3)

    even = {"sampling__threshold": 0.01}  # every weight is an outlier
    assert "expect no gain over LISA" in fit(**optimizer, **even, model__optimizer__init_args__lr=3e-3)


def test_a_poor_result_at_high_memory_asks_for_rank() -> None:
    losses = [2.0] * 40
    assert "model.rank" in str(check_loss(losses, StateBytes(held=90, for_lisa=100)))
    assert "model.rank" not in str(check_loss(losses, StateBytes(held=10, for_lisa=100)))
    assert check_loss(losses[:10], None) is None  # too short to tell
    assert check_loss([2.0] * 20 + [1.0] * 20, StateBytes(90, 100)) is None


def test_losses_are_means_of_the_first_and_the_last_tenth() -> None:
    found = check_loss([0.0, 4.0, 1.0, 3.0, *[9.0] * 32, 3.0, 1.0, 2.0, 1.8], None)
    assert str(found).startswith("poor result, the training loss went from 2.000 to 1.950;")
    assert check_loss([0.0, 4.0, 1.0, 3.0, *[9.0] * 32, 3.0, 1.0, 2.0, 1.4], None) is None


def test_the_state_of_lisa_is_that_of_two_blocks_and_all_outside(model_dir: Callable[..., Path]) -> None:
    module = CausalLMModule(str(model_dir()), rank=None)
    module.configure_model()
    optimizer = torch.optim.AdamW(module.parameters())
    assert measure_state_bytes(optimizer, module).held == 0
    blocks = decoder_layers(module)
    optimizer.state[blocks[0].mlp.up_proj.weight] = {"step": 3, "exp_avg": torch.zeros(10), "exp_avg_sq": torch.zeros(10)}
    outside = sum(p.numel() for p in module.parameters()) - sum(p.numel() for p in blocks.parameters())
    of_a_block = sum(p.numel() for p in blocks[0].parameters())
    assert measure_state_bytes(optimizer, module) == (80, 2 * 4 * (outside + 2 * of_a_block))


def test_figures_at_the_limits() -> None:
    assert check_memory(StateBytes(held=100, for_lisa=100)) is not None
    assert check_memory(StateBytes(held=80, for_lisa=100)) is None
    assert check_draws([0.25] * 4) is not None
    assert check_draws([0.7, 0.1, 0.1, 0.1]) is None
    assert check_draws([0.5, 0.5, 0.0, 0.0]) is None
