"""Runs by Lightning's Trainer on a GPU that is not there: no operator but a copy takes tensors of both sides.

Scores, draws, validation, checkpoints, a resumed run whose states are loaded before its draw, and export, each to the bit as
on the CPU without offloading.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from ows_lightning import CausalLMModule, GaLoreAdamW, LayerwiseSampling
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.export import save_huggingface
from ows_lightning.offload.offloader import BlockOffloader
from ows_lightning.optim.param_groups import galore_param_groups
from ows_lightning.sampling.activation import activate_blocks
from tests.offload.fake_gpu import GPU, FakeGpu, memory_of
from tests.offload.test_fit import assert_identical
from tests.tiny import tiny_batch, tiny_model

STEPS, SAVED = 4, 2


class AnyAccelerator(CPUAccelerator):
    """Takes the GPU that is not there."""

    def setup_device(self, device: torch.device) -> None:
        """Has nothing to set up."""


def fit(model: Path, folder: Path, gpu: FakeGpu | None = None, resume: Path | None = None, **settings: Any) -> dict[str, Any]:
    """Fits, validates, saves and exports; returns all that it leaves."""
    resting_rank = settings.pop("resting_rank", 0)
    module = CausalLMModule(
        str(model),
        rank=4,
        update_proj_gap=3,
        warmup_steps=0,
        optimizer=lambda groups: GaLoreAdamW(groups, lr=1e-2),
        **settings,
    )
    sampling = LayerwiseSampling(2, 1, threshold=2.0, calibration_samples=2, always_train=("norm",), resting_rank=resting_rank)
    checkpoint = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(
        strategy=SingleDeviceStrategy(GPU if gpu else "cpu", accelerator=AnyAccelerator()), max_steps=STEPS, logger=False,
        accumulate_grad_batches=2, gradient_clip_val=0.1, callbacks=[sampling, checkpoint], default_root_dir=folder,
        val_check_interval=2, enable_progress_bar=False, enable_model_summary=False, check_val_every_n_epoch=None,
    )  # fmt: skip
    rows = [{key: value[0] for key, value in tiny_batch(1, seed=seed).items()} for seed in range(16)]
    trainer.fit(
        module, DataLoader(rows, batch_size=2), DataLoader(rows[:2], batch_size=2), ckpt_path=resume, weights_only=True
    )
    left = {"metrics": dict(trainer.callback_metrics), "probabilities": sampling.probabilities}
    with gpu.offloaded_read() if gpu else contextlib.nullcontext():
        save_huggingface(module.model, module.tokenizer, folder / "model")
    left["model"] = load_file(folder / "model" / "model.safetensors")
    saved = torch.load(folder / f"step={STEPS}.ckpt", weights_only=True)
    return left | {"weights": saved["state_dict"], "states": saved["optimizer_states"]}


@pytest.mark.parametrize(("options", "step"), [({}, "cpu"), ({"fused": True}, "cuda"), ({"capturable": True}, "cuda")])
def test_a_state_that_was_loaded_before_the_draw_comes_to_the_device(options: dict[str, bool], step: str) -> None:
    with FakeGpu(late=True).installed():
        model = tiny_model("llama", num_hidden_layers=3)
        layers, offloader = decoder_layers(model), BlockOffloader(decoder_layers(model))
        model.to("cuda")
        activate_blocks(layers, [1])
        weight = layers[1].mlp.up_proj.weight
        optimizer = torch.optim.AdamW(layers.parameters(), **options)
        optimizer.state[weight] = {"step": torch.zeros(()), "exp_avg": torch.zeros(64, 32), "exp_avg_sq": torch.zeros(64, 32)}
        offloader.apply_draw([optimizer])
        found = {key: value.device.type for key, value in optimizer.state[weight].items()}
        del model, layers, offloader, weight, optimizer
    assert found == {"step": step, "exp_avg": "cuda", "exp_avg_sq": "cuda"}


def gradients_of_three_passes(device: str) -> tuple[list[torch.Tensor], set[int]]:
    """What a step whose subspaces are due consumes, and where its matrices' gradients waited in host memory, by address."""
    model = tiny_model("llama", num_hidden_layers=2).to(device)
    optimizer = GaLoreAdamW(galore_param_groups(model, rank=4, update_proj_gap=3), lr=1e-2)
    optimizer.project_in_backward()
    batches = [{key: value.to(device) for key, value in tiny_batch(seed=seed).items()} for seed in range(3)]
    addresses = set()
    for number, batch in enumerate(batches):
        optimizer.accumulating = number < 2
        model(**batch, use_cache=False).loss.backward()
        for waiting in optimizer.offloaded_gradients.values():
            assert memory_of(waiting).pinned == (device == "cuda")
            assert not waiting.is_cuda
            addresses.add(waiting.data_ptr())
    return [gradient.cpu() for gradient in optimizer.gradients()], addresses


def test_gradients_wait_for_a_step_in_page_locked_memory_that_is_used_again() -> None:
    expected, _ = gradients_of_three_passes("cpu")
    with FakeGpu(late=True).installed():
        found, addresses = gradients_of_three_passes("cuda")
    assert len(addresses) == 2 * 7  # a buffer for each matrix of two blocks, not one for each pass
    assert_identical(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"frozen_in": "disk"},
        {"frozen_in": "device", "frozen_dtype": "int8"},
        {"frozen_in": "host", "frozen_dtype": "int8"},
        {"frozen_in": "disk", "frozen_dtype": "int8"},
        {"frozen_in": "host", "resting_rank": 2},
        {"frozen_in": "disk", "frozen_dtype": "int8", "resting_rank": 2},
    ],
    ids=str,
)
def test_a_whole_run_and_a_resumed_one_keep_both_sides_apart(
    settings: dict[str, Any], model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = model_dir(num_hidden_layers=4)
    on_cpu = {"frozen_in": "host", "frozen_dtype": "int8"} if "frozen_dtype" in settings else {}
    on_cpu = (
        settings if "resting_rank" in settings else on_cpu
    )  # what is learned at rest is rounded otherwise than on the device
    for name, resume in (("whole", None), ("resumed", Path("cpu", "whole", f"step={SAVED}.ckpt"))):
        expected = fit(model, Path("cpu", name), None, resume, **on_cpu)
        for late in (True, False) if settings == {"frozen_in": "disk"} and not resume else (True,):
            gpu = FakeGpu(late)
            with gpu.installed():
                found = fit(model, Path("gpu" if late else "early", name), gpu, resume, **settings)
            assert_identical(found, expected)
            assert len(gpu.streams) > 1
