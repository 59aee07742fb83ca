"""What a run's validations, and what is written at its end, see of blocks that are offloaded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader

from ows_lightning import CausalLMModule, GaLoreAdamW, LayerwiseSampling, OWSTrainer
from ows_lightning.callbacks.run_checkpoint import RunCheckpoint
from ows_lightning.models.causal_lm import eval_mode
from ows_lightning.models.export import save_huggingface
from tests.tiny import tiny_batch

PLACES = {
    "device": {}, "host": {"frozen_in": "host"}, "disk": {"frozen_in": "disk"},
    "int8": {"frozen_dtype": "int8"}, "int8 on the host": {"frozen_in": "host", "frozen_dtype": "int8"},
}  # fmt: skip


class Evaluates(Callback):
    """Runs the model at the end of every step, as callbacks do that show answers."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: CausalLMModule, *_: Any) -> None:  # type: ignore[override]
        with eval_mode(pl_module), torch.no_grad():
            pl_module(**tiny_batch(seed=5))


class FailsInValidation(Callback):
    def on_validation_start(self, *_: Any) -> None:
        raise ZeroDivisionError


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append(float(trainer.callback_metrics["val_loss"]))


@pytest.fixture
def validate(model_dir: Callable[..., Path], tmp_path: Path) -> Callable[..., list[float]]:
    """Trains five steps with a validation after step 4, and returns the losses of validations."""

    def fit(
        place: str, *callbacks: Callback, averages: bool = False, folder: str = "through", resumes: bool = False
    ) -> list[float]:
        losses, kept = Losses(), RunCheckpoint(tmp_path / folder, every_n_train_steps=4, save_last=True)
        # Without buffers: averaging rounds RoPE's frequencies anew in each step, and a checkpoint does not hold the average's.
        averaging = [EMAWeightAveraging(device="cpu", decay=0.9, use_buffers=False)] if averages else []
        sampling = LayerwiseSampling(activated_layers=2, interval_steps=2, distribution="uniform")
        trainer = OWSTrainer(
            accelerator="cpu", max_steps=5, val_check_interval=4, check_val_every_n_epoch=None, num_sanity_val_steps=0,
            logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[*averaging, sampling, *callbacks, losses, kept],
        )  # fmt: skip
        module = CausalLMModule(
            str(model_dir(num_hidden_layers=4)), rank=4, optimizer=partial(GaLoreAdamW, lr=3e-2), **PLACES[place]
        )
        rows = DataLoader([tiny_batch(seed=i) for i in range(5)], batch_size=None)
        validation = DataLoader([tiny_batch(seed=99)], batch_size=None)
        with contextlib.suppress(ZeroDivisionError):
            trainer.fit(module, rows, validation, ckpt_path=tmp_path / folder / "last.ckpt" if resumes else None)
        return losses.seen

    return fit


@pytest.mark.parametrize("place", PLACES)
def test_a_validation_of_averaged_weights_does_not_depend_on_what_ran_before(
    place: str, validate: Callable[..., list[float]]
) -> None:
    """Averaging swaps the weights without a trace; what waits in slots, or in int8, would be those of training."""
    (plain,) = validate(place, averages=True)
    assert validate(place, Evaluates(), averages=True) == [plain]
    assert plain != validate(place)[0]
    if "int8" not in place:
        assert validate("device", averages=True) == [plain]


@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_a_resumed_run_makes_up_for_a_validation_with_the_same_figures(
    place: str, averages: bool, validate: Callable[..., list[float]]
) -> None:
    """Blocks that train are exact in it, also where frozen ones are rounded."""
    expected = validate(place, averages=averages)
    assert validate(place, FailsInValidation(), averages=averages, folder="failed") == []
    assert validate(place, averages=averages, folder="failed", resumes=True) == expected


def test_merging_adapters_for_an_export_copies_no_block_to_the_disk(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    lora = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}
    module = CausalLMModule(str(model_dir(num_hidden_layers=4)), lora=lora, frozen_in="disk")
    module.configure_model()
    save_huggingface(module.model, module.tokenizer, tmp_path / "exported")
    assert module.offloader is not None
    assert module.offloader._disk is not None
    assert module.offloader._disk.scratch is None
    there, merged = (CausalLMModule(str(name)) for name in (model_dir(num_hidden_layers=4), tmp_path / "exported"))
    for loaded in (there, merged):
        loaded.configure_model()
    name = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(there.model.state_dict()[name], merged.model.state_dict()[name])
