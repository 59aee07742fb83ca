"""OWSTrainer: what a run has with it and not with Lightning's Trainer."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader

from ows_lightning import CausalLMModule, OWSTrainer
from ows_lightning.callbacks.resume import Resume
from ows_lightning.callbacks.save_on_signal import SaveOnSignal
from ows_lightning.checkpoints.find import find_checkpoint
from ows_lightning.errors import RunError
from tests.data.samples import tiny_tokenizer
from tests.tiny import tiny_batch, tiny_model


class Terminate(Callback):
    """Tells the process to end in the second step."""

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_is_told_to_end_saves_itself(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    trainer = OWSTrainer(
        accelerator="cpu", max_steps=4, default_root_dir=tmp_path, logger=False, callbacks=Terminate(),
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(RunError, match="stopped by SIGTERM after step 2; resume with --ckpt_path"):
        trainer.fit(CausalLMModule(str(tmp_path), rank=4), DataLoader([tiny_batch()] * 4, batch_size=None))
    found = find_checkpoint("last", tmp_path)
    assert found is not None
    assert Path(found).name == "interrupted-step=2.ckpt"


def test_a_signal_ends_one_run_and_none_is_waited_for_in_a_thread(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    saves = SaveOnSignal()

    def fit(*callbacks: Callback) -> int:
        trainer = OWSTrainer(
            accelerator="cpu", max_steps=3, default_root_dir=tmp_path, logger=False, callbacks=[saves, *callbacks],
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(CausalLMModule(str(tmp_path), rank=4), DataLoader([tiny_batch()] * 3, batch_size=None))
        return trainer.global_step

    with pytest.raises(RunError, match="stopped by SIGTERM after step 2"):
        fit(Terminate())
    assert fit() == 3
    with ThreadPoolExecutor(1) as threads:  # in which Python takes no signals
        assert threads.submit(fit).result() == 3


def test_a_run_that_ends_before_a_validation_does_not_stop_early(tmp_path: Path) -> None:
    """Its last epoch is cut, and ends without the metric that EarlyStopping would ask for there."""
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    stopping = EarlyStopping("val_loss", patience=1, min_delta=100.0)
    batches = DataLoader([tiny_batch()] * 4, batch_size=None)

    def fit(max_steps: int) -> int:
        trainer = OWSTrainer(
            accelerator="cpu", max_steps=max_steps, default_root_dir=tmp_path, logger=False, callbacks=stopping,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(CausalLMModule(str(tmp_path), rank=4), batches, batches)
        return trainer.global_step

    assert fit(max_steps=2) == 2
    assert fit(max_steps=20) == 8  # after the second validation, which is no better than the first


class Overflow(Callback):
    """Makes every gradient of the run infinite."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        for p in pl_module.parameters():
            p.grad = None if p.grad is None else p.grad * float("inf")


@pytest.mark.parametrize(("fault", "name"), [(Terminate, "interrupted-step=2"), (Overflow, "stopped-step=2")])
def test_what_is_saved_at_the_end_lies_where_checkpoints_lie(fault: Any, name: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    trainer = OWSTrainer(
        accelerator="cpu", max_steps=4, default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
        callbacks=[fault(), ModelCheckpoint("memory://kept")], enable_model_summary=False,
    )  # fmt: skip
    module = CausalLMModule(str(tmp_path), rank=None, optimizer=torch.optim.AdamW, max_skipped_steps=2)
    with pytest.raises(RunError, match=f"memory://kept/{name}.ckpt"):
        trainer.fit(module, DataLoader([tiny_batch()] * 4, batch_size=None))
    assert fsspec.filesystem("memory").exists(f"memory://kept/{name}.ckpt")
    assert not Path("memory:").exists()


def test_a_callback_that_is_given_is_not_added_again() -> None:
    given = Resume()
    trainer = OWSTrainer(accelerator="cpu", callbacks=[given], logger=False, enable_checkpointing=False)
    assert [callback for callback in trainer.callbacks if isinstance(callback, Resume)] == [given]  # type: ignore[attr-defined]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell the peak of the whole process alone")
def test_the_peak_of_memory_is_not_that_of_an_earlier_run(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    held = bytearray(500_000_000)
    held[::4096] = b"1" * len(held[::4096])
    del held
    before, now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, psutil.Process().memory_info().rss / 1e6
    trainer = OWSTrainer(
        accelerator="cpu", max_steps=1, default_root_dir=tmp_path, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(CausalLMModule(str(tmp_path), rank=4), DataLoader([tiny_batch()], batch_size=None))
    assert 0.8 * now < trainer.callback_metrics["peak_memory_mb"] < before - 300


def test_a_run_is_resumed_from_an_address(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    modules = []
    for ckpt_path in (None, "memory://resumed/step=2.ckpt"):
        trainer = OWSTrainer(
            accelerator="cpu", max_steps=4, default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
            callbacks=[ModelCheckpoint("memory://resumed", "{step}", every_n_train_steps=2, save_top_k=-1)],
        )  # fmt: skip
        modules.append(CausalLMModule(str(tmp_path), rank=4, lr_scheduler_type="constant", warmup_steps=0))
        trainer.fit(modules[-1], DataLoader([tiny_batch()] * 4, batch_size=None), ckpt_path=ckpt_path)
        assert trainer.global_step == 4
    assert all(torch.equal(p, q) for p, q in zip(*(module.parameters() for module in modules), strict=True))


def test_the_norm_is_of_what_the_optimizer_consumes_before_it_is_clipped(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    norms = []

    class Norms(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            norms.append(torch.nn.utils.get_total_norm(optimizer.gradients()).item())

    trainer = OWSTrainer(
        accelerator="cpu", max_steps=1, default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
        callbacks=[Norms()], gradient_clip_val=1e-3, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(CausalLMModule(str(tmp_path), rank=4), DataLoader([tiny_batch()] * 4, batch_size=None))
    assert norms[0] > 1e-2
    assert trainer.callback_metrics["grad_norm"].item() == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.parametrize(
    ("algorithm", "size"),
    [("norm", torch.nn.utils.get_total_norm), ("value", lambda gradients: max(map(torch.max, gradients)))],
)
def test_gradients_are_clipped_as_the_trainer_is_told(
    algorithm: str, size: Callable[[list[torch.Tensor]], torch.Tensor], tmp_path: Path
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    sizes = []

    class Clipped(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            gradients = (p.grad for p in pl_module.parameters() if p.grad is not None)
            trainer.optimizers[0].register_step_post_hook(lambda *_: sizes.append(size([*gradients]).item()))

    trainer = OWSTrainer(
        accelerator="cpu", max_steps=1, default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
        callbacks=[Clipped()], gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm, enable_checkpointing=False,
    )  # fmt: skip
    module = CausalLMModule(str(tmp_path), optimizer=torch.optim.AdamW, rank=None)
    trainer.fit(module, DataLoader([tiny_batch()], batch_size=None))
    assert sizes == [pytest.approx(1e-3, rel=1e-4)]
