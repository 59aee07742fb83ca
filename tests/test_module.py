"""CausalLMModule in real runs: the step's loss, precision, checkpointing, generation, schedules."""

from __future__ import annotations

import contextlib
import copy
import csv
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader, TensorDataset

from ows_lightning.callbacks.generations import PredictionFile, ShowGenerations
from ows_lightning.data import InstructionDataModule
from ows_lightning.errors import UsageError
from ows_lightning.fit.duration import expected_steps
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.pretrained import load_model
from ows_lightning.module import CausalLMModule
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.sampling.callback import LayerwiseSampling
from ows_lightning.sampling.outliers import layer_outlier_ratios
from ows_lightning.trainer import OWSTrainer
from tests.data.samples import tiny_tokenizer
from tests.tiny import tiny_batch, tiny_model

ModelDir = Callable[..., Path]


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def galore(params: Any) -> torch.optim.Optimizer:
    return GaLoreAdamW(params, lr=1e-2)


def trainer(tmp_path: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    settings = {"max_steps": 4, "logger": False, "enable_checkpointing": False, **settings}
    return Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        **settings,
    )


def rows_with_uneven_targets(rows: int = 8) -> list[dict[str, torch.Tensor]]:
    batch = tiny_batch(rows=rows, length=12)
    for row in range(rows):
        batch["labels"][row, : 1 + row % 8] = -100
    return [{key: value[row] for key, value in batch.items()} for row in range(rows)]


def weights(module: CausalLMModule) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.model.named_parameters()}


@pytest.mark.parametrize("make_optimizer", [adamw, galore])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_micro_batches_of_uneven_targets_equal_one_large_batch(
    make_optimizer: Any, clip: float | None, model_dir: ModelDir, tmp_path: Path
) -> None:
    directory, rank = model_dir(), (8 if make_optimizer is galore else None)
    start = dict(load_model(str(directory)).named_parameters())
    results = []
    for batch_size, micro_batches in ((8, 1), (2, 4), (1, 8)):
        module = CausalLMModule(str(directory), optimizer=make_optimizer, rank=rank, warmup_steps=0, update_proj_gap=2)
        run = trainer(tmp_path, accumulate_grad_batches=micro_batches, max_epochs=3, gradient_clip_val=clip)
        run.fit(module, DataLoader(rows_with_uneven_targets(), batch_size=batch_size))
        assert run.global_step == 3
        results.append((run.callback_metrics["train_loss"], run.callback_metrics["grad_norm"], weights(module)))
    for loss, norm, final in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm, results[0][1], rtol=1e-3, atol=1e-5)
        difference, update = (
            math.hypot(*((weight - other[name]).norm() for name, weight in final.items())) for other in (results[0][2], start)
        )
        # Adam scales rounding up where a gradient is next to nothing, and rounding turns singular vectors of like size.
        assert difference < (0.05 if rank else 0.01) * update


class SeenNorms(Callback):
    """The norms of the gradients that a callback sees before each step."""

    def __init__(self) -> None:
        self.norms: list[torch.Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.norms.append(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None]))


def test_hooks_and_draws_by_gradients_see_the_gradient_of_one_large_batch(model_dir: ModelDir, tmp_path: Path) -> None:
    seen, scores = [], []
    for batch_size, micro_batches in ((8, 1), (2, 4)):
        module = CausalLMModule(str(model_dir()), optimizer=adamw, rank=None, warmup_steps=0)
        sampling, norms = LayerwiseSampling(4, distribution="gradient_norm"), SeenNorms()
        run = trainer(tmp_path, norms, sampling, max_steps=2, max_epochs=2, accumulate_grad_batches=micro_batches)
        run.fit(module, DataLoader(rows_with_uneven_targets(), batch_size=batch_size))
        torch.testing.assert_close(norms.norms[-1], run.callback_metrics["grad_norm"])
        seen.append(norms.norms)
        scores.append(sampling.gradient_norms)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-3, atol=0)
    assert scores[1] == pytest.approx(scores[0], rel=1e-3)


def test_a_last_window_with_fewer_micro_batches_is_still_a_mean(model_dir: ModelDir, tmp_path: Path) -> None:
    rows = rows_with_uneven_targets(3)
    module = CausalLMModule(str(model_dir()), optimizer=adamw, rank=None, warmup_steps=0)
    run = trainer(tmp_path, accumulate_grad_batches=4, max_epochs=1, max_steps=-1)
    run.fit(module, DataLoader(rows, batch_size=1))
    other = CausalLMModule(str(tmp_path / "llama-chatml"), optimizer=adamw, rank=None, warmup_steps=0)
    large = trainer(tmp_path, max_epochs=1, max_steps=-1)
    large.fit(other, DataLoader(rows, batch_size=3))
    torch.testing.assert_close(run.callback_metrics["grad_norm"], large.callback_metrics["grad_norm"], rtol=1e-5, atol=1e-7)


def test_a_scheduler_of_accumulation_gives_the_same_steps(model_dir: ModelDir, tmp_path: Path) -> None:
    finals = []
    for callbacks, settings in (([], {"accumulate_grad_batches": 4}), ([GradientAccumulationScheduler({0: 4})], {})):
        module = CausalLMModule(str(model_dir()), optimizer=galore, rank=8)
        trainer(tmp_path, *callbacks, gradient_clip_val=0.01, **settings).fit(module, DataLoader(rows_with_uneven_targets()))
        finals.append(weights(module))
    assert all(torch.equal(weight, finals[1][name]) for name, weight in finals[0].items())


def test_an_epoch_that_ends_within_a_step_leaves_nothing_for_the_next(model_dir: ModelDir, tmp_path: Path) -> None:
    class EndsEpoch(CausalLMModule):
        """Lightning ends an epoch, and drops the gradients of the step that was under way, where this hook returns -1."""

        ends_at = 0

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            super().on_train_batch_start(batch, batch_idx)
            return -1 if (self.trainer.current_epoch, batch_idx) == (0, self.ends_at) else None

    found = []
    for ends_at in (0, 1):
        module = EndsEpoch(str(model_dir()), rank=4, optimizer=galore, warmup_steps=0)
        module.ends_at = ends_at
        fit = trainer(tmp_path, max_steps=2, accumulate_grad_batches=2, max_epochs=2)
        fit.fit(module, DataLoader(rows_with_uneven_targets(), batch_size=2))
        assert fit.global_step == 2
        found.append((fit.callback_metrics["train_loss"], module.state_dict()))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_bfloat16_that_a_card_only_emulates_is_said(
    model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = CausalLMModule(str(model_dir()))
    for emulated, precision in ((True, "bf16-true"), (True, "bf16-mixed"), (False, "bf16-true"), (True, "32-true")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, found=not emulated: found)
        module.trainer = Trainer(
            strategy=SingleDeviceStrategy(torch.device("cuda", 1), accelerator=CPUAccelerator()), precision=precision
        )
        module.setup("fit")
        assert ("emulates bfloat16" in caplog.text) == (emulated and precision != "32-true")
        caplog.clear()


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)]
)
def test_weights_have_the_dtype_that_precision_asks_for(
    precision: str, dtype: torch.dtype, model_dir: ModelDir, tmp_path: Path
) -> None:
    module = CausalLMModule(str(model_dir()), rank=8)
    run = trainer(tmp_path, LayerwiseSampling(activated_layers=1, distribution="uniform"), precision=precision)
    run.fit(module, DataLoader(rows_with_uneven_targets(), batch_size=4))
    assert {p.dtype for p in module.model.parameters()} == {dtype}
    frequencies = dict(load_model(str(model_dir()), dtype).named_buffers())  # which no precision rounds
    torch.testing.assert_close(dict(module.model.named_buffers()), frequencies, rtol=0, atol=0)
    moments = [state["exp_avg"] for state in run.optimizers[0].state.values()]
    assert moments
    assert {m.dtype for m in moments} == {torch.float32}


def test_gradient_checkpointing_changes_nothing_and_skips_blocks_below_the_active_ones(
    model_dir: ModelDir, tmp_path: Path
) -> None:
    directory, finals, recomputed = str(model_dir()), [], {}
    for checkpointing in (False, True):
        seed_everything(0)
        module = CausalLMModule(directory, gradient_checkpointing=checkpointing, rank=8)
        calls: list[int] = []

        class Count(Callback):
            def on_train_start(self, trainer: Trainer, pl_module: CausalLMModule, calls: list[int] = calls) -> None:
                for index, layer in enumerate(decoder_layers(pl_module)):
                    layer.mlp.register_forward_pre_hook(lambda *_, index=index: calls.append(index))

        sampling = LayerwiseSampling(1, 100, distribution=[0.0, 0.0, 1.0, 0.0], always_train=["norm"])
        run = trainer(tmp_path, sampling, Count(), max_steps=1)
        run.fit(module, DataLoader(rows_with_uneven_targets(), batch_size=4))
        finals.append(weights(module))
        recomputed[checkpointing] = [calls.count(index) for index in range(4)]
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])
    assert recomputed == {False: [1, 1, 1, 1], True: [1, 1, 2, 2]}


@pytest.mark.parametrize("lora", [None, {"r": 2, "lora_dropout": 0.2}], ids=["drawn", "lora"])
def test_any_number_of_recomputing_blocks_gives_the_same_bits(lora: Any, tmp_path: Path) -> None:
    tiny_model("llama", attention_dropout=0.3).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)

    class Losses(Callback):
        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            self.seen.append(trainer.callback_metrics["train_loss"].clone())

    def train(checkpointing: bool | int | str) -> tuple[list[int], list[torch.Tensor], dict[str, torch.Tensor]]:
        seed_everything(0)
        rank = 8 if lora is None else None
        make = galore if lora is None else adamw
        module = CausalLMModule(str(tmp_path), gradient_checkpointing=checkpointing, rank=rank, optimizer=make, lora=lora)
        sampling = [LayerwiseSampling(2, 2, distribution="uniform", always_train=["norm"])] if lora is None else []
        losses = Losses()
        run = trainer(tmp_path, *sampling, losses, max_steps=4)
        run.fit(module, DataLoader(rows_with_uneven_targets(), batch_size=2))
        flags = [int(layer.gradient_checkpointing) for layer in decoder_layers(module)]
        return flags, losses.seen, weights(module)

    first_flags, first_losses, first_weights = train(False)
    assert first_flags == [0, 0, 0, 0]
    assert len(first_losses) == 4
    for checkpointing, flags in ((1, [1, 0, 0, 0]), (2, [1, 1, 0, 0]), (9, [1, 1, 1, 1]), (True, [1, 1, 1, 1])):
        found, losses, final = train(checkpointing)
        assert found == flags
        assert all(map(torch.equal, losses, first_losses))
        assert all(torch.equal(final[name], weight) for name, weight in first_weights.items())


@pytest.mark.parametrize("wrong", [-1, 1.5, "most"])
def test_recomputation_is_a_number_of_blocks_or_a_word(wrong: Any) -> None:
    with pytest.raises(UsageError, match=r"^model.gradient_checkpointing: .* must be true, false, auto"):
        CausalLMModule("nowhere", gradient_checkpointing=wrong)


@pytest.mark.parametrize(
    ("kind", "last"), [("constant", 1.0), ("linear", 1 / 8), ("cosine", 0.5 * (1 + math.cos(math.pi * 7 / 8)))]
)
def test_schedules_count_optimizer_steps(kind: str, last: float, model_dir: ModelDir, tmp_path: Path) -> None:
    rates = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"] / 1e-2)

    module = CausalLMModule(str(model_dir()), optimizer=galore, rank=8, lr_scheduler_type=kind, warmup_steps=2)
    run = trainer(tmp_path, Rates(), max_steps=10, accumulate_grad_batches=2, max_epochs=50)
    run.fit(module, DataLoader(rows_with_uneven_targets(), batch_size=2))
    assert rates[:3] == [0.0, 0.5, 1.0]
    assert rates[-1] == pytest.approx(last)


@pytest.mark.parametrize(
    ("scheduling", "limits", "steps"),
    [
        ({0: 2, 1: 4}, {"max_epochs": 3}, 4 + 2 + 2),
        ({1: 3, 5: 8}, {"max_epochs": 2}, 8 + 3),
        ({0: 4}, {"max_epochs": 9, "max_steps": 3}, 3),
    ],
)
def test_schedules_know_the_steps_of_a_scheduler_of_accumulation(
    scheduling: dict[int, int], limits: dict[str, int], steps: int, model_dir: ModelDir, tmp_path: Path
) -> None:
    module = CausalLMModule(str(model_dir()), optimizer=galore, rank=8, lr_scheduler_type="linear", warmup_steps=0)
    run = trainer(tmp_path, GradientAccumulationScheduler(scheduling), **{"max_steps": -1, **limits})
    run.fit(module, DataLoader(rows_with_uneven_targets()))
    assert run.global_step == steps
    assert run.optimizers[0].param_groups[0]["lr"] == 0  # when all steps are done
    assert expected_steps(run) == steps  # also where the last epoch's number is the Trainer's


def test_validation_figures_are_means_over_tokens(model_dir: ModelDir, tmp_path: Path) -> None:
    module = CausalLMModule(str(model_dir()))
    rows = rows_with_uneven_targets()
    figures = trainer(tmp_path).validate(module, DataLoader(rows, batch_size=3), verbose=False)[0]
    whole = next(iter(DataLoader(rows, batch_size=8)))
    with torch.no_grad():
        expected = module.model.eval()(**whole).loss
    assert figures["val_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert figures["val_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_a_validation_loss_that_is_no_number_is_not_left_out_of_the_mean(model_dir: ModelDir, tmp_path: Path) -> None:
    module = CausalLMModule(str(model_dir()))
    rows = rows_with_uneven_targets()
    rows[0]["input_ids"] = torch.full_like(rows[0]["input_ids"], 5)
    module.trainer = run = trainer(tmp_path)
    module.configure_model()
    with torch.no_grad():
        module.language_model.get_input_embeddings().weight[5] = float("nan")
    figures = run.validate(module, DataLoader(rows, batch_size=1), verbose=False)[0]
    assert math.isnan(figures["val_loss"])
    assert math.isnan(figures["val_perplexity"])


def test_trains_on_real_rows_and_generates_the_answers(model_dir: ModelDir, rows_file: Path, tmp_path: Path) -> None:
    seed_everything(0)
    module = CausalLMModule(
        str(model_dir(hidden_size=64)),
        optimizer=galore,
        rank=16,
        warmup_steps=2,
        max_new_tokens=4,
        lr_scheduler_type="constant",
    )
    data = InstructionDataModule(str(rows_file), eval_dataset=str(rows_file), exact_match_rows=40)
    run = trainer(tmp_path, LayerwiseSampling(4, 10, distribution="uniform"), max_steps=60, max_epochs=-1)
    before = run.validate(module, data, verbose=False)[0]
    run.fit(module, data)
    after = run.validate(module, data, verbose=False)[0]
    assert after["val_loss"] < before["val_loss"] / 2
    assert before["val_exact_match"] == 0
    assert after["val_exact_match"] > 0.4
    rows = [row for batch in run.predict(module, data) for row in batch]
    assert len(rows) == 40
    assert sum(row["generated"].strip() == row["reference"] for row in rows) / 40 == pytest.approx(after["val_exact_match"])


def test_lora_freezes_the_base_and_trains(model_dir: ModelDir, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    module = CausalLMModule(str(model_dir()), optimizer=adamw, rank=None, lora=lora)
    run = trainer(tmp_path, max_epochs=5, max_steps=10)
    run.fit(module, DataLoader(rows_with_uneven_targets(), batch_size=4))
    assert {name.split(".")[-2] for name, p in module.model.named_parameters() if p.requires_grad} == {"default"}
    assert any(p.abs().sum() > 0 for name, p in module.model.named_parameters() if "lora_B" in name)


def test_adapters_are_evaluated_with_the_factor_that_they_were_trained_with(model_dir: ModelDir, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    directory, rows = str(model_dir()), DataLoader(rows_with_uneven_targets(), batch_size=4)

    def module(alpha: int) -> CausalLMModule:
        lora = {"r": 4, "lora_alpha": alpha, "target_modules": "all-linear"}
        return CausalLMModule(directory, optimizer=adamw, rank=None, warmup_steps=0, lora=lora)

    trained, run = module(64), trainer(tmp_path)
    run.fit(trained, rows)
    run.save_checkpoint(tmp_path / "lora.ckpt")
    assert trainer(tmp_path).test(module(64), rows, ckpt_path=tmp_path / "lora.ckpt") == run.test(trained, rows)
    with pytest.raises(UsageError, match=r"^ckpt_path: .* other settings: model.lora \({'r': 4, 'lora_alpha': 64"):
        trainer(tmp_path).test(module(4), rows, ckpt_path=tmp_path / "lora.ckpt")


class ScoresAndAnswersBeforeTraining(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ids = torch.arange(3, 12)[None]
        layer_outlier_ratios(pl_module, [{"input_ids": ids}], threshold=2)
        pl_module.generate({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


@pytest.mark.slow
def test_compiled_blocks_survive_resampling(model_dir: ModelDir, tmp_path: Path) -> None:
    directory, flat = str(model_dir(num_hidden_layers=10)), []
    batches = [tiny_batch(rows=rows, length=length) for rows in (2, 3, 4) for length in (8, 11, 13, 16)]
    for compiled in (False, True):
        recomputed = 5 if compiled else 0  # of 10: some blocks are compiled with their recomputation, frozen ones included
        module = CausalLMModule(directory, None, recomputed, compiled, galore, rank=8, max_new_tokens=4)
        module.configure_model()
        flat.append(torch.cat([weight.flatten() for weight in weights(module).values()]))
        sampling = LayerwiseSampling(1, 2, distribution="uniform", always_train=["norm"])
        run = trainer(tmp_path, sampling, ScoresAndAnswersBeforeTraining(), max_steps=16, max_epochs=20)
        # Whoever hits torch's limit goes on without compiling, and nobody is told.
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            run.fit(module, *(DataLoader(batches, batch_size=None) for _ in ("train", "validate")))
        flat.append(torch.cat([weight.flatten() for weight in weights(module).values()]))
    start, plain, _, fused = flat
    # Fused kernels round differently, and Adam takes full steps where a gradient is all but rounding.
    assert (fused - plain).norm() < 0.02 * (plain - start).norm()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "model.rank: 0 must be at least 1"),
        ({"rank": 2.5}, "model.rank: 2.5 must be at least 1, and whole"),
        ({"update_proj_gap": 0}, "model.update_proj_gap: 0 must be at least 1"),
        ({"update_proj_gap": 1.5}, "model.update_proj_gap: 1.5 must be a whole number"),
        ({"scale": 0}, "model.scale: 0 must be more than 0"),
        ({"frozen_in": "cpu"}, "model.frozen_in: cpu must be device, host or disk"),
        ({"frozen_dtype": "int4"}, "model.frozen_dtype: int4 must be int8 or null"),
        ({"subspace": "qr"}, "model.subspace: 'qr' must be randomized or svd or random"),
        ({"kernels": "ligr"}, "model.kernels: ligr must be liger or null"),
        ({"lr_scheduler_type": "polynomial"}, "model.lr_scheduler_type: polynomial must be cosine, linear or constant"),
        ({"warmup_steps": -1}, "model.warmup_steps"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_loads(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CausalLMModule("no/such-model", **settings)


def test_a_rank_for_an_optimizer_that_cannot_project_is_refused(model_dir: ModelDir, tmp_path: Path) -> None:
    module = CausalLMModule(str(model_dir()), optimizer=adamw, rank=8)
    with pytest.raises(UsageError, match=r"model\.rank: AdamW can't project"):
        trainer(tmp_path).fit(module, DataLoader(rows_with_uneven_targets(), batch_size=4))


def test_a_fused_optimizer_and_a_scaled_loss_are_refused_together(model_dir: ModelDir, tmp_path: Path) -> None:
    """It would be given scaled gradients, which clipping and the reported norm take as they are."""
    module = CausalLMModule(str(model_dir()), optimizer=lambda params: torch.optim.AdamW(params, fused=True), rank=None)
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(UsageError, match=r"^trainer\.precision: 16-mixed scales the loss, but a fused optimizer"):
        trainer(tmp_path, plugins=[scaled]).fit(module, DataLoader(rows_with_uneven_targets(), batch_size=4))


@pytest.mark.parametrize("stage", ["train", "validate"])
@pytest.mark.parametrize("as_tuple", [False, True])
def test_batches_without_labels_are_refused_in_a_line(stage: str, as_tuple: bool, model_dir: ModelDir, tmp_path: Path) -> None:
    ids = tiny_batch()["input_ids"]
    bad = DataLoader(TensorDataset(ids) if as_tuple else [{"input_ids": row} for row in ids], batch_size=2)
    good = DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=2)
    run = trainer(tmp_path, LayerwiseSampling(distribution="uniform", activated_layers=2))
    with pytest.raises(UsageError, match="must be a dict of input_ids and labels"):
        run.fit(CausalLMModule(str(model_dir()), rank=4), *((bad,) if stage == "train" else (good, bad)))


def test_unknown_lora_keys_are_refused(model_dir: ModelDir, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    module = CausalLMModule(str(model_dir()), optimizer=adamw, rank=None, lora={"rang": 4})
    with pytest.raises(UsageError, match=r"model\.lora\.rang: "):
        trainer(tmp_path).fit(module, DataLoader(rows_with_uneven_targets(), batch_size=4))


def test_a_module_can_be_used_again_in_every_way(model_dir: ModelDir, tmp_path: Path) -> None:
    module = CausalLMModule(str(model_dir()), rank=8)
    rows = DataLoader(rows_with_uneven_targets(), batch_size=4)
    validated = trainer(tmp_path)
    loss = validated.validate(module, rows, verbose=False)[0]["val_loss"]
    validated.save_checkpoint(tmp_path / "validated.ckpt")
    whole = next(iter(DataLoader(rows_with_uneven_targets(), batch_size=8)))
    assert module(**whole).loss.item() == pytest.approx(loss, rel=1e-5)
    assert module(input_ids=whole["input_ids"]).logits.shape == (8, 12, module.language_model.config.vocab_size)
    start = weights(module)
    Tuner(trainer(tmp_path)).lr_find(module, rows, num_training=3, update_attr=False)
    assert all(torch.equal(weight, start[name]) for name, weight in weights(module).items())
    sampling, finals = LayerwiseSampling(2, 2, distribution="uniform"), []
    others = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    for again in (module, *others):
        run = trainer(tmp_path, sampling)
        run.fit(again, rows)
        assert [step for _, step, _ in sampling.history] == [0, 2]
        assert all(p.requires_grad for p in again.parameters())
        finals.append(weights(again))
    for final in finals[1:]:
        assert all(torch.equal(weight, final[name]) for name, weight in finals[0].items())
    trainer(tmp_path).fit(module, rows)


def test_a_copy_made_in_mid_run_trains_all_its_blocks(model_dir: ModelDir, tmp_path: Path) -> None:
    class Copies(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            self.made = copy.deepcopy(module)

    copies, rows = Copies(), DataLoader(rows_with_uneven_targets(), batch_size=4)
    for module in (CausalLMModule(str(model_dir()), rank=8), None):
        run = trainer(tmp_path, LayerwiseSampling(1, 1, distribution="uniform"), copies, max_steps=2)
        run.fit(module or copies.made, rows)
    assert len(run.optimizers[0].state_dict()["param_groups"][0]["params"]) == 4 * 7
    assert all(p.requires_grad for p in run.lightning_module.parameters())


def test_a_copy_has_what_offloaded_blocks_have_learned_at_rest(model_dir: ModelDir, tmp_path: Path) -> None:
    class Copies(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            self.made = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
            self.there = weights(module)

    directory = str(model_dir())
    module, copies = CausalLMModule(directory, rank=4, optimizer=galore, warmup_steps=0, frozen_in="host"), Copies()
    sampling = LayerwiseSampling(1, 1, distribution=[1.0, 0.0, 0.0, 0.0], resting_rank=2)
    trainer(tmp_path, sampling, copies, max_steps=1).fit(module, DataLoader(rows_with_uneven_targets(), batch_size=4))
    start = dict(load_model(directory).named_parameters())
    for made in copies.made:
        assert all(torch.equal(weight, copies.there[name]) for name, weight in weights(made).items())
        assert not any(torch.equal(weight, start[name]) for name, weight in weights(made).items() if "proj" in name)


def test_modules_keep_the_mode_that_the_user_gave_them(model_dir: ModelDir, tmp_path: Path) -> None:
    class Modes(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            self.training = [layer.training for layer in decoder_layers(module)]

    modes, module = Modes(), CausalLMModule(str(model_dir()), rank=8)
    module.configure_model()
    decoder_layers(module)[1].eval()  # no dropout there
    shown = ShowGenerations(["why?"])
    trainer(tmp_path, modes, shown, max_steps=1).fit(module, DataLoader(rows_with_uneven_targets(), batch_size=4))
    assert modes.training == [True, False, True, True]


def test_answers_of_another_run_in_the_same_folder_are_gone(model_dir: ModelDir, tmp_path: Path) -> None:
    for _ in range(2):
        log = CSVLogger(tmp_path, name="", version=0)
        run = trainer(tmp_path, ShowGenerations(["why?"], every_n_steps=1), max_steps=1, logger=log)
        run.fit(CausalLMModule(str(model_dir()), rank=8), DataLoader(rows_with_uneven_targets(), batch_size=4))
    with (tmp_path / "version_0" / "generations.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "1"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": []}, "prompts: give one prompt"),
        ({"prompts": ["a?"], "every_n_steps": 0}, "every_n_steps: 0 must be at l"),
    ],
)
def test_answers_to_no_prompt_or_after_no_steps_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=rf"^ShowGenerations\.{message}"):
        ShowGenerations(**settings)


def test_predictions_are_written_as_they_are_read(model_dir: ModelDir, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Straße?", "output": "nö"}\n', encoding="utf-8")
    data = InstructionDataModule(str(tmp_path / "rows.jsonl"), eval_dataset=str(tmp_path / "rows.jsonl"), val_size=0)
    trainer(tmp_path, PredictionFile()).predict(CausalLMModule(str(model_dir()), max_new_tokens=2), data)
    line = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")
    assert '"reference": "nö"' in line
    assert "null" not in line


def test_an_answer_ends_before_a_stop_that_is_not_special(model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch) -> None:
    module = CausalLMModule(str(model_dir()))
    module.configure_model()
    module.tokenizer.add_tokens(["<|eot|>"])
    said = torch.tensor([module.tokenizer("yes<|eot|>", add_special_tokens=False).input_ids])
    module.model.generation_config.eos_token_id = int(said[0, -1])
    monkeypatch.setattr(module.causal_lm, "generate", lambda input_ids, **_: torch.cat([input_ids, said], 1))
    prompt = torch.tensor([[1, 2]])
    assert module.generate({"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}) == ["yes"]


def test_a_run_without_a_logger_leaves_files_of_the_user_alone(model_dir: ModelDir, tmp_path: Path) -> None:
    (tmp_path / "generations.csv").write_text("mine")
    run = trainer(tmp_path, ShowGenerations(["why?"], every_n_steps=1), max_steps=1, logger=False)
    run.fit(CausalLMModule(str(model_dir()), rank=8), DataLoader(rows_with_uneven_targets(), batch_size=4))
    assert (tmp_path / "generations.csv").read_text() == "mine"


def test_a_model_named_by_a_path_is_saved_and_resumed(model_dir: ModelDir, tmp_path: Path) -> None:
    directory, rows = model_dir(), DataLoader(rows_with_uneven_targets(), batch_size=4)
    for ckpt_path, steps in ((None, 1), (tmp_path / "one.ckpt", 2)):
        run = OWSTrainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, default_root_dir=tmp_path, max_steps=steps,
        )  # fmt: skip
        run.fit(CausalLMModule(directory, rank=4), rows, ckpt_path=ckpt_path)  # type: ignore[arg-type]
        run.save_checkpoint(tmp_path / "one.ckpt")
        assert run.global_step == steps


LORA = {"target_modules": "all-linear"}


@pytest.mark.parametrize(
    ("settings", "changed", "said"),
    [
        ({"rank": 4, "optimizer": galore}, {"proj_type": "left"}, r"model.proj_type \('std' in the checkpoint, 'left' now\)"),
        (
            {"rank": 4, "optimizer": galore},
            {"project_embeddings": True},
            r"model.project_embeddings \(False in the checkpoint",
        ),
        ({"rank": None, "optimizer": adamw, "lora": {"r": 4, **LORA}}, {"lora": {"r": 8, **LORA}}, r"model.lora \({'r': 4"),
    ],
    ids=["proj_type", "project_embeddings", "lora"],
)
def test_a_run_does_not_go_on_in_other_subspaces_or_adapters(
    settings: dict[str, Any], changed: dict[str, Any], said: str, model_dir: ModelDir, tmp_path: Path
) -> None:
    directory, rows = str(model_dir()), DataLoader(rows_with_uneven_targets(), batch_size=4)
    first = trainer(tmp_path, max_steps=1)
    first.fit(CausalLMModule(directory, **settings), rows)
    first.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(UsageError, match=rf"^ckpt_path: .* other settings: {said}"):
        trainer(tmp_path).fit(CausalLMModule(directory, **{**settings, **changed}), rows, ckpt_path=tmp_path / "one.ckpt")


def test_a_head_of_its_own_does_not_take_the_place_of_tied_embeddings(model_dir: ModelDir, tmp_path: Path) -> None:
    rows, losses = DataLoader(rows_with_uneven_targets(), batch_size=4), {}
    modules = {
        tied: CausalLMModule(model_dir("llama", template, tie_word_embeddings=tied), rank=4, optimizer=galore)
        for tied, template in ((False, "chatml"), (True, "none"))  # each in a folder of its own
    }
    for tied, module in modules.items():
        run = trainer(tmp_path, max_steps=1)
        run.fit(module, rows)
        run.save_checkpoint(tmp_path / f"{tied}.ckpt")
        losses[tied] = run.test(module, rows)
    with pytest.raises(UsageError, match=r"^ckpt_path: .* tied embeddings \(False in the checkpoint, True now\)"):
        trainer(tmp_path).test(modules[True], rows, ckpt_path=tmp_path / "False.ckpt")
    assert trainer(tmp_path).test(modules[False], rows, ckpt_path=tmp_path / "True.ckpt") == losses[True]


@pytest.mark.parametrize(
    ("callback", "instead"),
    [
        (StochasticWeightAveraging(1e-3), "take WeightAveraging or EMAWeightAveraging"),
        (ModelPruning("l1_unstructured"), "by torch.nn.utils.prune"),
        (LearningRateFinder(), "compare runs of a few steps"),
        (BatchSizeFinder(), "`plan` names a size that fits"),
    ],
)
def test_callbacks_that_can_not_work_are_refused(
    callback: Callback, instead: str, model_dir: ModelDir, tmp_path: Path
) -> None:
    module = CausalLMModule(str(model_dir()), rank=8, optimizer=galore)
    rows = InstructionDataModule(str(tmp_path / "nowhere.jsonl"), val_size=0)
    rows.prepare_data = rows.setup = lambda **_: None  # type: ignore[method-assign]
    with pytest.raises(UsageError, match=f"^trainer.callbacks: {type(callback).__name__} .*{instead}"):
        trainer(tmp_path, callback).fit(module, rows)
    assert module.model is None  # before any weight is loaded


class Teaching(LightningModule):
    """A frozen teacher that is registered before its student."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = tiny_model("llama", num_hidden_layers=6), tiny_model("llama", seed=1)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.student(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=1e-3)


def test_the_model_that_the_optimizer_holds_is_sampled(tmp_path: Path) -> None:
    module = Teaching()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    sampling = LayerwiseSampling(1, 100, distribution=[0.0, 1.0, 0.0, 0.0], always_train=["norm"])
    trainer(tmp_path, sampling).fit(module, DataLoader([tiny_batch()], batch_size=None))
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(name.startswith(("student.model.layers.1.", "student.model.norm.")) for name in changed)


@pytest.mark.parametrize("interrupted", [False, True])
def test_after_a_fit_gradients_are_everybodys_again(interrupted: bool, model_dir: ModelDir, tmp_path: Path) -> None:
    class Interrupt(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if interrupted and trainer.global_step == 2:
                raise KeyboardInterrupt

    module = CausalLMModule(str(model_dir()), rank=8, optimizer=galore)
    run = trainer(tmp_path, Interrupt())
    with contextlib.suppress(SystemExit, KeyboardInterrupt):  # which of them depends on Lightning's version
        run.fit(module, DataLoader(rows_with_uneven_targets(), batch_size=4))
    assert run.optimizers  # it is alive, with all of its state
    module(**tiny_batch()).loss.backward()
    assert all(p.grad is not None for p in module.model.parameters())
