"""LayerwiseSampling in a real Lightning run, in ours and in somebody else's module."""

from __future__ import annotations

import copy
import csv
import logging
import math
import pickle
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from ows_lightning.errors import UsageError
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.optim.param_groups import galore_param_groups
from ows_lightning.sampling.callback import LayerwiseSampling
from ows_lightning.sampling.distributions import sampling_probabilities
from ows_lightning.sampling.sampler import BlockSampler
from ows_lightning.sampling.scores import BlockScores
from tests.tiny import tiny_model

LAYERS = 6


class SomebodyElsesModule(LightningModule):
    """A module that knows nothing of this package, with a plain optimizer."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.net = tiny_model("llama", num_hidden_layers=LAYERS, tie_word_embeddings=tied)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.net(**batch).loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.net(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Projected(SomebodyElsesModule):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = GaLoreAdamW(galore_param_groups(self, rank=4), lr=1e-2)
        optimizer.project_in_backward()
        return optimizer


def loader(rows: int = 16, shuffle: bool = False, all_alike: bool = False) -> DataLoader:
    ids = torch.randint(3, 128, (rows, 12), generator=torch.Generator().manual_seed(0))
    ids = ids[:1].expand(rows, -1) if all_alike else ids
    return DataLoader(
        [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids],
        batch_size=2,
        shuffle=shuffle,
    )


class Watcher(Callback):
    """Compares every optimizer step's weights, gradients and states with what the callback says is active."""

    def __init__(self, sampling: LayerwiseSampling) -> None:
        self.sampling = sampling
        self.steps: list[tuple[int, list[int]]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            return
        active = self.sampling.active_blocks
        self.steps.append((self.step, active))
        optimizer = trainer.optimizers[0]
        for index, layer in enumerate(decoder_layers(pl_module)):
            for name, p in layer.named_parameters():
                before = next(b for n, b in self.before.items() if n.endswith(f"layers.{index}.{name}"))
                assert torch.equal(p, before) == (index not in active), (index, name)
                assert p.requires_grad == (index in active)
                assert bool(optimizer.state.get(p)) == (index in active)
                assert index in active or p.grad is None


def fit(
    module: LightningModule,
    sampling: LayerwiseSampling,
    tmp_path: Path,
    *extra: Callback,
    ckpt_path: Any = None,
    train: DataLoader | None = None,
    **settings: Any,
) -> Trainer:
    logger = CSVLogger(tmp_path, name="", version="")
    settings = {"max_steps": 12, "limit_val_batches": 0, "logger": logger, **settings}
    trainer = Trainer(
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[sampling, *extra],
        **settings,
    )
    trainer.fit(module, train or loader(), loader(4), ckpt_path=ckpt_path)
    return trainer


def history(folder: Path) -> list[tuple[int, int, list[int]]]:
    with (folder / "sampling_history.csv").open() as file:
        return [(int(r["interval"]), int(r["step"]), [int(b) for b in r["blocks"].split()]) for r in csv.DictReader(file)]


@pytest.mark.parametrize("module", [SomebodyElsesModule, Projected])
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 3, "max_epochs": 10}, {"gradient_clip_val": 0.1}])
def test_only_active_blocks_train_and_hold_state_at_every_step(
    module: type[LightningModule], settings: dict, tmp_path: Path
) -> None:
    sampling = LayerwiseSampling(activated_layers=2, interval_steps=3, distribution="uniform")
    watcher = Watcher(sampling)
    fit(module(), sampling, tmp_path, watcher, **settings)
    assert [step for step, _ in watcher.steps] == list(range(12))
    assert [step for _, step, _ in history(tmp_path)] == [0, 3, 6, 9]
    assert all(len(set(active)) == 2 for _, active in watcher.steps)
    assert len({tuple(active) for _, active in watcher.steps}) > 1


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 4, "max_epochs": 30},
        {"limit_val_batches": 2, "val_check_interval": 1},
        {"limit_val_batches": 2, "num_sanity_val_steps": 2},
        {"max_steps": -1, "max_epochs": 2},
    ],
)
def test_draws_by_optimizer_step_once_a_boundary(settings: dict, tmp_path: Path) -> None:
    sampling = LayerwiseSampling(activated_layers=1, interval_steps=5, distribution="uniform")
    trainer = fit(SomebodyElsesModule(), sampling, tmp_path, **settings)
    expected = list(range(0, trainer.global_step, 5))
    assert [(interval, step) for interval, step, _ in history(tmp_path)] == [(step // 5, step) for step in expected]
    assert history(tmp_path) == sampling.history
    with (tmp_path / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["interval"]] == expected


def test_a_model_that_a_module_names_by_a_path_is_named_in_the_scores(tmp_path: Path) -> None:
    class Module(SomebodyElsesModule):
        def __init__(self, model_name_or_path: Path) -> None:
            super().__init__()
            self.save_hyperparameters()

    fit(Module(tmp_path / "llama"), LayerwiseSampling(activated_layers=1, distribution="uniform"), tmp_path, max_steps=1)
    assert BlockScores.load(tmp_path / "outlier_scores.json").model == str(tmp_path / "llama")


@pytest.mark.parametrize(
    "always_train", [(), ("norm",), ("embeddings",), ("lm_head", "norm"), ("embeddings", "lm_head", "norm")]
)
@pytest.mark.parametrize("tied", [False, True])
def test_always_train_decides_what_outside_the_blocks_trains(always_train: tuple, tied: bool, tmp_path: Path) -> None:
    module = SomebodyElsesModule(tied)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(
        module, LayerwiseSampling(activated_layers=1, distribution="uniform", always_train=always_train), tmp_path, max_steps=2
    )
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert ("net.model.norm.weight" in changed) == ("norm" in always_train)
    if tied:
        assert ("net.model.embed_tokens.weight" in changed) == bool({"embeddings", "lm_head"} & set(always_train))
    else:
        assert ("net.model.embed_tokens.weight" in changed) == ("embeddings" in always_train)
        assert ("net.lm_head.weight" in changed) == ("lm_head" in always_train)


def test_what_the_user_froze_stays_frozen_and_the_rest_is_unfrozen_at_the_end(tmp_path: Path) -> None:
    module = SomebodyElsesModule()
    frozen = module.net.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = frozen.detach().clone()
    fit(module, LayerwiseSampling(activated_layers=LAYERS, distribution="uniform"), tmp_path)
    assert torch.equal(frozen, before)
    assert [name for name, p in module.named_parameters() if not p.requires_grad] == ["net.model.layers.0.mlp.up_proj.weight"]


class WithReference(SomebodyElsesModule):
    """As DPO with adapters: the reference model is the same one with its adapters off, after which peft unfreezes all."""

    def __init__(self, reference_first: bool) -> None:
        super().__init__()
        peft = pytest.importorskip("peft")
        self.net = peft.get_peft_model(self.net, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        self.reference_first = reference_first
        self.requiring: list[list[bool]] = []  # a gradient, of the adapters, as backward finds them
        self.net.gradient_checkpointing_enable()  # which recomputes a block as forward found it, or fails
        self.net.enable_input_require_grads()

    def on_before_backward(self, loss: torch.Tensor) -> None:
        self.requiring.append([p.requires_grad for name, p in self.named_parameters() if "lora" in name])

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        first = self.reference(batch) if self.reference_first else 0.0
        loss = self.net(**batch).loss - first
        return loss if self.reference_first else loss - self.reference(batch)

    @torch.no_grad()
    def reference(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with self.net.disable_adapter():
            return self.net(**batch).loss


@pytest.mark.parametrize("reference_first", [False, True])
def test_adapters_that_peft_unfreezes_stay_frozen(reference_first: bool, tmp_path: Path) -> None:
    sampling = LayerwiseSampling(1, interval_steps=100, distribution="uniform")
    module = WithReference(reference_first)
    trainer = fit(module, sampling, tmp_path, max_steps=3)
    trained = {name.split(".")[5] for name, p in module.named_parameters() if "lora_B" in name and p.abs().sum() > 0}
    assert trained == set(map(str, sampling.history[0][2]))
    assert len(trainer.optimizers[0].state) == 2
    assert [sum(each) for each in module.requiring] == [2, 2, 2]
    other = copy.deepcopy(module)
    with module.net.disable_adapter():
        pass
    adapters = [[p.requires_grad for name, p in one.named_parameters() if "lora" in name] for one in (module, other)]
    assert adapters == [[True] * 2 * LAYERS] * 2  # the run is over
    assert not any("enable_adapters" in vars(layer) for layer in module.modules())  # and leaves nothing behind


def test_a_folder_may_be_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sampling = LayerwiseSampling(1, interval_steps=100, distribution="uniform")
    sampling.folder = "mine"  # type: ignore[assignment]
    fit(SomebodyElsesModule(), sampling, tmp_path, max_steps=1)
    assert (tmp_path / "mine" / "sampling_history.csv").exists()


def test_memory_of_states_does_not_grow_with_the_intervals(tmp_path: Path) -> None:
    sizes = []

    class Sizes(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            states = trainer.optimizers[0].state.values()
            sizes.append(sum(value.numel() for state in states for value in state.values()))

    fit(
        Projected(),
        LayerwiseSampling(activated_layers=2, interval_steps=1, distribution="uniform"),
        tmp_path,
        Sizes(),
        max_steps=20,
    )
    assert len(set(sizes)) == 1


def test_scores_decide_the_draws_and_are_written(tmp_path: Path) -> None:
    sampling = LayerwiseSampling(activated_layers=1, interval_steps=1, calibration_samples=4, threshold=3.0)
    module = SomebodyElsesModule()
    with torch.no_grad():
        for index in (0, 1, 2, 3, 5):  # without outliers: a constant weight is never above its mean
            for p in decoder_layers(module)[index].parameters():
                if p.dim() == 2:
                    p.fill_(0.01)
    module.save_hyperparameters({"model_name_or_path": "hub/model"})
    fit(module, sampling, tmp_path, max_steps=8)
    written = BlockScores.load(tmp_path / "outlier_scores.json")
    assert written.model == "hub/model"
    assert len(written.outlier_ratios) == LAYERS
    assert written.calibration_samples == 4
    assert sum(written.probabilities) == pytest.approx(1)
    assert max(range(LAYERS), key=lambda block: written.probabilities[block]) == 4
    assert sum(blocks == [4] for _, _, blocks in history(tmp_path)) >= 4


def test_scores_from_a_file_are_taken_as_they_are(tmp_path: Path) -> None:
    ratios = [0.0, 0.0, 0.0, 2.0, 0.0, 0.0]
    BlockScores("m", LAYERS, 13.0, 8, "outlier", ratios, ratios).save(tmp_path / "scores.json")
    sampling = LayerwiseSampling(activated_layers=1, interval_steps=1, scores=tmp_path / "scores.json")
    fit(SomebodyElsesModule(), sampling, tmp_path, max_steps=3)
    assert [blocks for _, _, blocks in history(tmp_path)] == [[3]] * 3


def test_scores_of_another_model_are_refused(tmp_path: Path) -> None:
    BlockScores("other", 3, 13.0, 8, "outlier", [1.0] * 3, [1 / 3] * 3).save(tmp_path / "scores.json")
    with pytest.raises(UsageError, match=r"scores: holds those of 'other', whose number of blocks is 3, but the model's is 6"):
        fit(SomebodyElsesModule(), LayerwiseSampling(activated_layers=1, scores=tmp_path / "scores.json"), tmp_path)


@pytest.mark.parametrize(
    ("distribution", "ratios", "message"),
    [
        (
            "weight_norm",
            [1.0] * LAYERS,
            "sampling.scores: holds weight_norm (its distribution is weight_norm), from which",
        ),
        (
            "gradient_norm",  # what a run by it leaves in its folder
            [1.0] * LAYERS,
            "sampling.scores: holds gradient_norm (its distribution is gradient_norm), from which outlier can't",
        ),
        (
            "uniform",
            [0.0] * LAYERS,
            "sampling.scores: holds no scores (its distribution is uniform), from which outlier can't",
        ),
    ],
)
def test_scores_of_another_kind_are_refused(distribution: str, ratios: list, message: str, tmp_path: Path) -> None:
    BlockScores("m", LAYERS, 13.0, 8, distribution, ratios, ratios).save(tmp_path / "scores.json")
    with pytest.raises(UsageError, match=re.escape(message)):
        LayerwiseSampling(activated_layers=2, scores=tmp_path / "scores.json").check(LAYERS, {})


def test_the_table_of_scores_names_them() -> None:
    norms, ratios = (BlockScores("m", 1, 13.0, 8, name, [250.5], [1.0]) for name in ("weight_norm", "outlier"))
    assert norms.table() == "block   weight_norm   probability\n    0      250.5000        1.0000"
    assert "outlier_ratio_percent" in ratios.table()


def test_fewer_drawable_blocks_than_are_to_train_are_refused_before_there_is_a_model() -> None:
    with pytest.raises(UsageError, match="2 is more than the 1 of 6 blocks whose probability is not zero"):
        LayerwiseSampling(activated_layers=2, distribution=[1.0] + [0.0] * (LAYERS - 1)).check(LAYERS, {})


def test_calibration_leaves_the_data_order_alone(tmp_path: Path) -> None:
    class Order(Callback):
        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []

        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
            self.seen.append(batch["input_ids"])

    orders = []
    for distribution in ("outlier", "uniform"):
        order = Order()
        torch.manual_seed(3)
        sampling = LayerwiseSampling(activated_layers=1, calibration_samples=4, threshold=2.0, distribution=distribution)
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[sampling, order],
            max_steps=6,
        )
        trainer.fit(SomebodyElsesModule(), loader(shuffle=True))
        orders.append(torch.stack(order.seen))
    assert torch.equal(*orders)


def test_rescores_after_so_many_intervals(tmp_path: Path) -> None:
    sampling = LayerwiseSampling(activated_layers=1, interval_steps=2, calibration_samples=2, threshold=2.0, rescore_every=2)
    seen = []

    class Scores(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            seen.append(sampling.outlier_scores.outlier_ratios)

    fit(SomebodyElsesModule(), sampling, tmp_path, Scores(), max_steps=8)
    assert seen[0] == seen[3]
    assert seen[4] != seen[3]
    assert seen[4] == seen[7]


def test_blocks_that_never_trained_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sampling = LayerwiseSampling(activated_layers=1, interval_steps=6, distribution=[1.0, 0, 0, 0, 0, 0])
    with caplog.at_level(logging.WARNING):
        fit(SomebodyElsesModule(), sampling, tmp_path)
    assert "5 of 6 blocks never trained in 2 intervals: 1, 2, 3, 4, 5" in caplog.text


def test_draws_depend_on_the_seed(tmp_path: Path) -> None:
    def draws(seed: int) -> list[list[int]]:
        sampling = LayerwiseSampling(activated_layers=2, interval_steps=1, distribution="uniform", seed=seed)
        fit(SomebodyElsesModule(), sampling, tmp_path)
        return [blocks for _, _, blocks in sampling.history]

    assert draws(0) == draws(0)
    assert draws(0) != draws(1)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    class SaveAt(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 7 and not (tmp_path / "at7.ckpt").exists():
                trainer.save_checkpoint(tmp_path / "at7.ckpt")

    def run(*extra: Callback, ckpt_path: Path | None = None) -> tuple[SomebodyElsesModule, LayerwiseSampling]:
        module, sampling = (
            Projected(),
            LayerwiseSampling(activated_layers=2, interval_steps=5, calibration_samples=4, threshold=2.0),
        )
        # All rows are alike, since this loader does not know where it was.
        fit(module, sampling, tmp_path, *extra, max_steps=14, ckpt_path=ckpt_path, train=loader(all_alike=True))
        return module, sampling

    whole, sampled = run(SaveAt())
    resumed, resampled = run(ckpt_path=tmp_path / "at7.ckpt")
    assert sampled.history == resampled.history
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activated_layers": 0}, "activated_layers: 0 must be at least 1"),
        ({"interval_steps": 0}, "interval_steps: 0 must be at least 1"),
        ({"threshold": 0.0}, "threshold: 0.0 must be a finite number above 0"),
        ({"threshold": math.inf}, "threshold: inf must be a finite number above 0"),
        ({"calibration_samples": 0}, "calibration_samples: 0 must be at least 1"),
        ({"rescore_every": 0}, "rescore_every: 0 must be at least 1"),
        ({"rescore_every": 1.5}, "rescore_every: 1.5 is no whole number"),
        ({"interval_steps": 8 / 4}, "interval_steps: 2.0 is no whole number"),
        ({"seed": 1.7}, "seed: 1.7 is no whole number"),
        ({"activated_layers": "2"}, "activated_layers: '2' is no whole number"),
        ({"always_train": "norm"}, "always_train: norm is no list of names among"),
        ({"always_train": ("head",)}, r"always_train: \('head',\) is no list of names among embeddings, lm_head, norm"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LayerwiseSampling(**settings)


def test_more_active_blocks_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="activated_layers: 7 is more than the model's 6 blocks"):
        fit(SomebodyElsesModule(), LayerwiseSampling(activated_layers=7, distribution="uniform"), tmp_path)


def test_a_model_without_a_weight_to_train_in_its_blocks_is_refused(tmp_path: Path) -> None:
    module = SomebodyElsesModule()
    decoder_layers(module).requires_grad_(False)
    with pytest.raises(UsageError, match="no block of LlamaForCausalLM has a weight to train"):
        fit(module, LayerwiseSampling(activated_layers=1, distribution="uniform"), tmp_path)


def test_blocks_that_can_not_train_are_named_and_never_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = SomebodyElsesModule()
    decoder_layers(module)[:2].requires_grad_(False)
    sampling = LayerwiseSampling(activated_layers=1, interval_steps=1, distribution="uniform", always_train=[])
    fit(module, sampling, tmp_path, max_steps=20)  # if only they were drawn, no loss would require a gradient
    assert "Blocks [0, 1] have no weight to train, and only a window includes them" in caplog.messages
    assert not any("never trained" in message for message in caplog.messages)  # of blocks that could have
    assert sampling.outlier_scores.probabilities[:2] == [0, 0]
    assert sum(sampling.outlier_scores.probabilities) == pytest.approx(1)
    with pytest.raises(UsageError, match="activated_layers: 5 is more than the 4 blocks that can train"):
        fit(module, LayerwiseSampling(activated_layers=5, distribution="uniform"), tmp_path)
    assert {block for _, _, blocks in sampling.history for block in blocks} == set(range(2, LAYERS))


def test_an_optimizer_that_leaves_blocks_out_is_refused() -> None:
    model = tiny_model("llama", num_hidden_layers=LAYERS)
    sampler = BlockSampler(activated_layers=1, distribution="uniform")
    sampler.attach(model)
    some = torch.optim.SGD([*decoder_layers(model)[2:].parameters(), *model.lm_head.parameters()], lr=0.1)
    with pytest.raises(UsageError, match=r"the optimizer holds no weight of blocks \[0, 1\]"):
        sampler.start(0, [some], lambda: sampler.compute_scores(model, None))


def test_an_optimizer_that_steps_frozen_weights_is_refused(tmp_path: Path) -> None:
    module = SomebodyElsesModule()
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters())  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="LBFGS steps all weights by one history"):
        fit(module, LayerwiseSampling(activated_layers=1, distribution="uniform"), tmp_path)


def test_without_a_logger_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sampling = LayerwiseSampling(activated_layers=1, interval_steps=2, calibration_samples=2, threshold=2.0)
    fit(SomebodyElsesModule(), sampling, tmp_path, max_steps=4, logger=False)
    assert len(sampling.history) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_second_trainer_starts_afresh(tmp_path: Path) -> None:
    sampling = LayerwiseSampling(activated_layers=2, interval_steps=3, calibration_samples=2, threshold=2.0)
    fit(SomebodyElsesModule(), sampling, tmp_path / "first", max_steps=9)
    first, scores = sampling.history, sampling.outlier_scores
    sampling.load_state_dict({**sampling.state_dict(), "history": [(7, 21, [0, 1])]})  # as the evaluation of a checkpoint does
    watcher = Watcher(sampling)
    fit(SomebodyElsesModule(), sampling, tmp_path / "second", watcher, max_steps=9)
    assert sampling.history == first == history(tmp_path / "second")
    assert sampling.outlier_scores == scores
    assert len(watcher.steps) == 9


def test_a_search_for_the_learning_rate_and_then_a_fit(tmp_path: Path) -> None:
    class Searched(SomebodyElsesModule):
        lr = 1e-3

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=self.lr)

    module, sampling = Searched(), LayerwiseSampling(activated_layers=1, interval_steps=2, distribution="uniform")
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=4,
        default_root_dir=tmp_path, callbacks=[sampling], enable_model_summary=False,
    )  # fmt: skip
    Tuner(trainer).lr_find(module, loader(), num_training=6)
    trainer.fit(module, loader())
    assert [step for _, step, _ in sampling.history] == [0, 2]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_exception_everything_is_trainable_again(error: type[BaseException], tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                raise error

    module = SomebodyElsesModule()
    with pytest.raises((error, SystemExit)):
        fit(module, LayerwiseSampling(activated_layers=1, distribution="uniform"), tmp_path, Fails())
    assert all(p.requires_grad for p in module.parameters())


def test_a_used_callback_can_be_pickled(tmp_path: Path) -> None:
    sampling = LayerwiseSampling(activated_layers=1, interval_steps=4, distribution="uniform")
    fit(SomebodyElsesModule(), sampling, tmp_path)
    again = pickle.loads(pickle.dumps(sampling))
    fit(SomebodyElsesModule(), again, tmp_path)
    assert again.history == sampling.history


def test_seconds_and_scores_go_on_after_a_resume() -> None:
    before, after = LayerwiseSampling(), LayerwiseSampling()
    before.seconds = 3.5
    before.outlier_scores = BlockScores("m", 2, 13.0, 8, "outlier", [1.0, 3.0], [0.25, 0.75])
    after.load_state_dict(before.state_dict())
    assert after.seconds == 3.5
    assert after.outlier_scores == before.outlier_scores


def test_plain_ddp_is_refused_with_any_module(tmp_path: Path) -> None:
    try:
        with pytest.raises(UsageError, match="write strategy: ddp_layerwise"):
            fit(SomebodyElsesModule(), LayerwiseSampling(distribution="uniform"), tmp_path, strategy="ddp")
    finally:
        torch.distributed.destroy_process_group()


def test_what_trains_over_the_run_is_said_only_where_it_is_known(tmp_path: Path) -> None:
    class AtOtherTimes(LayerwiseSampling):
        def should_draw(self, step: int) -> bool:
            return step in (1, 4)

    sampling = LayerwiseSampling(activated_layers=2, interval_steps=5, distribution="uniform")
    fit(SomebodyElsesModule(), sampling, tmp_path, max_steps=1)
    planned = sampling.planned_blocks(23)
    fit(SomebodyElsesModule(), sampling, tmp_path, max_steps=23, max_epochs=-1)
    assert planned == {block for _, _, blocks in sampling.history for block in blocks}
    for other in (
        AtOtherTimes(activated_layers=2, distribution="uniform"),
        LayerwiseSampling(activated_layers=2, distribution="weight_norm", rescore_every=2),
        LayerwiseSampling(activated_layers=2, distribution="gradient_norm"),
    ):
        fit(SomebodyElsesModule(), other, tmp_path, max_steps=1)
        assert other.planned_blocks(23) is None


def test_a_subclass_may_draw_at_other_times(tmp_path: Path) -> None:
    class AtOtherTimes(LayerwiseSampling):
        def should_draw(self, step: int) -> bool:
            return step in (1, 4)

    sampling = AtOtherTimes(activated_layers=2, distribution="uniform")
    fit(SomebodyElsesModule(), sampling, tmp_path, max_steps=8)
    assert [step for _, step, _ in sampling.history] == [0, 1, 4]


def test_draws_within_an_interval_are_draws_of_their_own(tmp_path: Path) -> None:
    class MoreOften(LayerwiseSampling):
        def should_draw(self, step: int) -> bool:
            return super().should_draw(step) or step % 2 == 0

    sampling = MoreOften(activated_layers=2, interval_steps=5, distribution="uniform")
    fit(SomebodyElsesModule(), sampling, tmp_path, max_steps=20, max_epochs=-1)
    assert [step for _, step, _ in sampling.history] == [0, 2, 4, 5, 6, 8, 10, 12, 14, 15, 16, 18]
    assert len({tuple(blocks) for _, _, blocks in sampling.history}) > 3


def test_scores_of_a_file_are_those_of_the_first_draws_alone_where_blocks_are_scored_again(tmp_path: Path) -> None:
    measured = LayerwiseSampling(activated_layers=2, distribution="weight_norm")
    fit(SomebodyElsesModule(), measured, tmp_path, max_steps=1)
    assert measured.outlier_scores is not None
    known = replace(measured.outlier_scores, outlier_ratios=[float(i + 1) for i in range(measured.outlier_scores.num_layers)])
    known.save(tmp_path / "scores.json")
    sampling = LayerwiseSampling(
        activated_layers=2, interval_steps=2, distribution="weight_norm", scores=tmp_path / "scores.json", rescore_every=1
    )
    seen: list[list[float]] = []

    class Notes(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            assert sampling.outlier_scores is not None
            seen.append(sampling.outlier_scores.outlier_ratios)

    fit(SomebodyElsesModule(), sampling, tmp_path, Notes(), max_steps=4)
    assert seen[0] == known.outlier_ratios
    assert seen[3] != known.outlier_ratios


class Consumed(Callback):
    """Notes the norm, and the largest value, of what every step consumes, after all clipping."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.values: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def note(optimizer: Any, args: Any, kwargs: Any) -> None:
            loss = kwargs["closure"]()  # forward, backward, clipping
            gradients = optimizer.gradients()
            self.norms.append(torch.nn.utils.get_total_norm(gradients).item())
            self.values.append(max(gradient.abs().max().item() for gradient in gradients))
            return args, {**kwargs, "closure": lambda: loss}

        trainer.optimizers[0].register_step_pre_hook(note)


class ClipsByItself(Projected):
    """A module that clips where Lightning's documentation says so, by Lightning's own method."""

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)


class ClipsByHand(Projected):
    """The same in manual optimization, with a limit of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.clipping: tuple[float, str] | None = None

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        def closure() -> None:
            optimizer.zero_grad()
            self.manual_backward(self.net(**batch).loss)
            if self.clipping is not None:
                self.clip_gradients(optimizer, *self.clipping)

        optimizer = self.optimizers()
        optimizer.step(closure=closure)


@pytest.mark.parametrize("module", [Projected, ClipsByItself, ClipsByHand])
@pytest.mark.parametrize(("algorithm", "limit"), [("norm", 1e-3), ("value", 1e-4)])
def test_clipping_acts_on_projected_gradients_of_somebody_elses_module(
    module: type[Projected], algorithm: str, limit: float, tmp_path: Path
) -> None:
    def consumed(limit: float | None = None) -> Consumed:
        watcher, net = Consumed(), module()
        settings: dict[str, Any] = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm if limit else None}
        if isinstance(net, ClipsByHand):
            net.clipping, settings = (limit, algorithm) if limit else None, {}
        sampling = LayerwiseSampling(activated_layers=2, interval_steps=3, distribution="uniform")
        trainer = fit(net, sampling, tmp_path, watcher, max_steps=4, **settings)
        assert "clip_gradients" not in vars(trainer.precision_plugin)
        return watcher

    free, clipped = consumed(), consumed(limit)
    of_free, of_clipped = (w.norms if algorithm == "norm" else w.values for w in (free, clipped))
    assert len(of_clipped) == 4
    assert min(of_free) > 2 * limit
    assert of_clipped == pytest.approx([limit] * 4, rel=2e-2)
    assert max(of_clipped) <= limit * (1 + 1e-6)


def test_a_module_is_fitted_by_one_trainer_after_another(tmp_path: Path) -> None:
    module = Projected()
    trainers = []
    for run in range(2):
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        sampling = LayerwiseSampling(activated_layers=LAYERS, interval_steps=3, distribution="uniform")
        trainers.append(
            fit(module, sampling, tmp_path / str(run), max_steps=3)
        )  # the first Trainer, and its optimizer, live on
        assert all(not torch.equal(p, before[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize("module", [SomebodyElsesModule, Projected])
def test_gradient_norms_of_active_blocks_decide_the_draws(module: type[LightningModule], tmp_path: Path) -> None:
    class Norms(Callback):
        """The norm of each active block's gradients per weight, as the optimizer consumes them."""

        def __init__(self) -> None:
            self.seen: list[dict[int, float]] = []

        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            if isinstance(optimizer, GaLoreAdamW):
                optimizer.gradients()
            norms = {}
            for index in sampling.active_blocks:
                parameters = list(decoder_layers(pl_module)[index].parameters())
                gradients = [optimizer.gradient_of(p) if module is Projected else p.grad for p in parameters]
                square = sum(gradient.square().sum().item() for gradient in gradients)
                norms[index] = math.sqrt(square / sum(p.numel() for p in parameters))
            self.seen.append(norms)

    sampling, norms = LayerwiseSampling(activated_layers=2, interval_steps=3, distribution="gradient_norm"), Norms()
    fit(module(), sampling, tmp_path, norms, max_steps=12)
    means = [0.0] * LAYERS
    for step in norms.seen:
        for index, norm in step.items():
            means[index] = 0.9 * (means[index] or norm) + 0.1 * norm
    assert sampling.gradient_norms == pytest.approx(means, rel=1e-4)
    written = BlockScores.load(tmp_path / "outlier_scores.json")
    assert list(written.probabilities) == sampling.probabilities.tolist()
    assert len(set(written.probabilities)) > 2
    assert min(written.probabilities) >= 0.1 / LAYERS
    assert sum(written.probabilities) == pytest.approx(1)


class TwoOptimizers(Projected):
    """Steps matrices by GaLoreAdamW and all else by AdamW, or by one optimizer."""

    def __init__(self, kinds: Sequence[str]) -> None:
        super().__init__()
        self.automatic_optimization, self.kinds = False, kinds

    def configure_optimizers(self) -> Any:
        matrices, *others = galore_param_groups(self, rank=4)
        if not self.kinds:
            return GaLoreAdamW([matrices, *others], lr=1e-3)
        made = {"galore": GaLoreAdamW([matrices], lr=1e-3)}
        made["adamw"] = torch.optim.AdamW([p for group in others for _, p in group["params"]], lr=1e-3, weight_decay=0.0)
        return [made[kind] for kind in self.kinds]

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizers = found if isinstance(found := self.optimizers(), list) else [found]
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_gradient_norms_are_of_whole_blocks_whose_weights_several_optimizers_hold(tmp_path: Path) -> None:
    norms = []
    for kinds in ((), ("galore", "adamw"), ("adamw", "galore")):
        # Lightning counts the steps of every optimizer.
        sampling = LayerwiseSampling(2, 3 * max(1, len(kinds)), "gradient_norm", always_train=("norm",))
        fit(TwoOptimizers(kinds), sampling, tmp_path / "-".join(kinds), max_steps=6 * max(1, len(kinds)))
        norms.append(sampling.gradient_norms)
    assert norms[1] == norms[2]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)  # one optimizer clips and counts nothing else


@pytest.mark.parametrize("distribution", ["window", "gradient_norm"])
def test_a_resumed_run_draws_the_same(distribution: str, tmp_path: Path) -> None:
    class SaveAt(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 7 and not (tmp_path / "at7.ckpt").exists():
                trainer.save_checkpoint(tmp_path / "at7.ckpt")

    def run(*extra: Callback, ckpt_path: Path | None = None) -> LayerwiseSampling:
        sampling = LayerwiseSampling(2, 2, distribution, calibration_samples=4, threshold=2.0)
        fit(Projected(), sampling, tmp_path, *extra, max_steps=14, ckpt_path=ckpt_path, train=loader(all_alike=True))
        return sampling

    whole, resumed = run(SaveAt()), run(ckpt_path=tmp_path / "at7.ckpt")
    assert whole.history == resumed.history
    assert whole.gradient_norms == resumed.gradient_norms
    third = LayerwiseSampling(2, 2, distribution)  # of a run in float64
    third.load_state_dict({**whole.state_dict(), "gradient_norms": [1 / 3]})
    assert third.gradient_norms == [1 / 3]
    if distribution == "window":
        assert all(high == low + 1 for _, _, (low, high) in whole.history)


def test_scores_are_computed_in_the_trainers_precision(tmp_path: Path) -> None:
    dtypes: list[torch.dtype] = []

    class Watched(LayerwiseSampling):
        def compute_scores(self, model: LightningModule, loader: Any) -> BlockScores:
            layer = decoder_layers(model)[0].mlp.up_proj
            handle = layer.register_forward_hook(lambda layer, args, output: dtypes.append(output.dtype))
            scores = super().compute_scores(model, loader)
            handle.remove()
            return scores

    sampling = Watched(activated_layers=1, calibration_samples=2, threshold=2.0)
    fit(SomebodyElsesModule(), sampling, tmp_path, max_steps=1, precision="bf16-mixed")
    assert dtypes == [torch.bfloat16]


def test_blocks_that_were_not_active_yet_count_as_the_mean() -> None:
    assert sampling_probabilities([0.0, 0.0], "gradient_norm").tolist() == [0.5, 0.5]
    probabilities = sampling_probabilities([3.0, 0.0, 1.0, 0.0], "gradient_norm").tolist()
    assert probabilities == pytest.approx([0.9 * share / 8 + 0.025 for share in (3, 2, 1, 2)])


def test_a_window_is_grouped_already() -> None:
    with pytest.raises(UsageError, match=r"^sampling\.grouping: the blocks of a window are neighbours"):
        LayerwiseSampling(distribution="window", grouping=0.5)


def test_a_loader_of_whole_batches_gives_the_same_scores(tmp_path: Path) -> None:
    def scores(train: DataLoader) -> BlockScores | None:
        sampling = LayerwiseSampling(activated_layers=2, interval_steps=2, calibration_samples=16, threshold=2.0)
        fit(Projected(), sampling, tmp_path, train=train, max_steps=1)
        return sampling.outlier_scores

    torch.manual_seed(0)
    rows = scores(loader())
    torch.manual_seed(0)
    batches = scores(DataLoader([*loader()], batch_size=None))  # type: ignore[arg-type]
    assert rows is not None
    assert batches is not None
    assert batches.outlier_ratios == pytest.approx(rows.outlier_ratios)
