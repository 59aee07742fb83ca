"""What other Lightning projects do with the package's parts: subclass the module, train it again, resume by other loaders."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ows_lightning import CausalLMModule, GaLoreAdamW, LayerwiseSampling, OWSTrainer, galore_param_groups
from ows_lightning.errors import RunError, UsageError
from ows_lightning.fit.checks import check_strategy
from ows_lightning.models.loss import LossParts
from tests.distributed.launch import run
from tests.tiny import tiny_batch, tiny_model

ModelDir = Callable[..., Path]
MATRICES = 4 * 7  # of a tiny Llama's blocks


def loader(rows: int = 16, batch_size: int = 4) -> DataLoader:
    batch = tiny_batch(rows=rows, length=12)
    return DataLoader([{key: values[i] for key, values in batch.items()} for i in range(rows)], batch_size=batch_size)


def trainer(folder: Path, *callbacks: Callback, kind: type[Trainer] = Trainer, **settings: Any) -> Trainer:
    settings = {
        "max_steps": 2, "logger": False, "enable_checkpointing": False, "accelerator": "cpu", "devices": 1,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder, **settings,
    }  # fmt: skip
    return kind(callbacks=[*callbacks], **settings)


def galore(groups: Any) -> GaLoreAdamW:
    return GaLoreAdamW(groups, lr=1e-2)


class Theirs(LightningModule):
    """A module of another project, around a causal LM."""

    def __init__(self, optimizer: str = "galore", lr: float = 1e-2) -> None:
        super().__init__()
        self.net, self.optimizer, self.lr = tiny_model("llama", num_hidden_layers=4), optimizer, lr

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.net(**batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        if self.optimizer == "galore":
            optimizer = GaLoreAdamW(galore_param_groups(self.net, rank=4), lr=self.lr)
            optimizer.project_in_backward(model=self.net)
            return optimizer
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def changed(model: nn.Module, action: Callable[[], Any]) -> int:
    """How many tensors an action changes."""
    before = [p.detach().clone() for p in model.parameters()]
    action()
    return sum(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


# ------------------------------------------------------------------ several fits


def test_another_optimizer_trains_all_that_a_projecting_one_trained_before(tmp_path: Path) -> None:
    module = Theirs()
    first = trainer(tmp_path, LayerwiseSampling(distribution="uniform", activated_layers=2))
    first.fit(module, loader())
    module.optimizer = "adamw"
    assert changed(module, lambda: trainer(tmp_path).fit(module, loader())) == len([*module.parameters()])
    assert first.optimizers  # which is still there


def test_a_subclass_with_callbacks_of_its_own_is_cleaned_up_after(model_dir: ModelDir, tmp_path: Path) -> None:
    class Module(CausalLMModule):
        def configure_callbacks(self) -> list[Callback]:
            return [ModelCheckpoint(save_last=True)]

    module = Module(str(model_dir(num_hidden_layers=4)), optimizer=galore, rank=4)
    trainer(tmp_path, enable_checkpointing=True).fit(module, loader())
    module.model(**tiny_batch()).loss.backward()
    assert all(p.grad is not None for p in module.parameters())


def test_a_fit_that_ends_before_it_begins_leaves_no_hook(model_dir: ModelDir, tmp_path: Path) -> None:
    module = CausalLMModule(str(model_dir(num_hidden_layers=4)), optimizer=galore, rank=4)
    with pytest.raises(UsageError) as error:
        trainer(tmp_path, max_steps=-1, max_epochs=-1).fit(module, loader())
    module.model(**tiny_batch()).loss.backward()
    assert all(p.grad is not None for p in module.parameters())
    assert error.traceback  # which keeps the optimizer alive, as a notebook does


def test_validation_leaves_another_loops_projection_alone(model_dir: ModelDir, tmp_path: Path) -> None:
    module = CausalLMModule(str(model_dir(num_hidden_layers=4)), optimizer=galore, rank=4)
    ours = trainer(tmp_path)
    ours.fit(module, loader())
    newer = galore(module.param_groups())
    newer.project_in_backward(model=module.model)
    ours.validate(module, loader(), verbose=False)
    module.model(**tiny_batch()).loss.backward()
    assert sum(p.grad is None for p in module.parameters()) == MATRICES
    assert newer.projects_in_backward


# ------------------------------------------------------------------ what a subclass overrides


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return itertools.islice(itertools.cycle(loader().dataset), 64)  # a run over all would hang


def test_a_schedule_over_a_stream_without_a_length_asks_for_the_number_of_steps(model_dir: ModelDir, tmp_path: Path) -> None:
    module = CausalLMModule(str(model_dir()), rank=4)
    with pytest.raises(UsageError, match="the schedule needs the number of steps"):
        trainer(tmp_path, max_steps=-1, max_epochs=1).fit(module, DataLoader(Endless(), batch_size=4))


class NeverANumber(Theirs):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * float("nan")


def test_gradients_that_stay_nan_end_another_projects_run_too(tmp_path: Path) -> None:
    module = NeverANumber()
    with pytest.raises(RunError, match="10 steps in a row"):
        trainer(tmp_path, kind=OWSTrainer, max_steps=40).fit(module, loader(rows=64))
    assert all(p.isfinite().all() for p in module.parameters())


class OfRank(Theirs):
    def __init__(self, rank: int, proj_type: Any = "std") -> None:
        super().__init__()
        self.rank, self.proj_type = rank, proj_type

    def configure_optimizers(self) -> Any:
        return GaLoreAdamW(galore_param_groups(self.net, rank=self.rank, proj_type=self.proj_type), lr=self.lr)


def test_a_resumed_run_of_ones_own_module_keeps_its_rank_and_projected_side(tmp_path: Path) -> None:
    first = trainer(tmp_path, kind=OWSTrainer)
    first.fit(OfRank(4), loader())
    first.save_checkpoint(tmp_path / "rank4.ckpt")
    for module, change in ((OfRank(8), "rank 4 in the checkpoint, 8"), (OfRank(4, "left"), "proj_type std .*, left")):
        with pytest.raises(UsageError, match=rf"^optimizer: {change} now; set it back, or start anew$"):
            trainer(tmp_path, kind=OWSTrainer, max_steps=4).fit(module, loader(), ckpt_path=tmp_path / "rank4.ckpt")


class StepsAsLightningsDocs(CausalLMModule):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)


def test_an_optimizer_step_of_ones_own_has_the_gradient_of_the_steps_mean(model_dir: ModelDir, tmp_path: Path) -> None:
    norms = []
    for batch_size, accumulate in ((16, 1), (4, 4)):
        module = StepsAsLightningsDocs(str(model_dir(num_hidden_layers=4)), optimizer=galore, rank=4)
        trainer(tmp_path, max_steps=1, accumulate_grad_batches=accumulate).fit(module, loader(16, batch_size))
        assert module.last_step_metrics is not None
        norms.append(float(module.last_step_metrics.grad_norm))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


class AddsATerm(CausalLMModule):
    def forward(self, **batch: Any) -> Any:
        parts = super().forward(**batch)
        return LossParts(parts.total * 0 + self.term * parts.num_targets, parts.num_targets)

    @property
    def term(self) -> Tensor:
        return sum(p.square().sum() for p in self.parameters())


def test_a_term_that_is_added_to_the_loss_weighs_the_same_under_accumulation(model_dir: ModelDir, tmp_path: Path) -> None:
    for batch_size, accumulate in ((16, 1), (4, 4)):
        module = AddsATerm(str(model_dir(num_hidden_layers=4)), optimizer=torch.optim.AdamW, rank=None)
        module.configure_model()
        expected = 2 * float(module.term.detach()) ** 0.5
        trainer(tmp_path, max_steps=1, accumulate_grad_batches=accumulate).fit(module, loader(16, batch_size))
        assert module.last_step_metrics is not None
        assert float(module.last_step_metrics.grad_norm) == pytest.approx(expected, rel=1e-4)


class SkipsASecondBatch(CausalLMModule):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


class HasALossOfItsOwn(CausalLMModule):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss


@pytest.mark.parametrize("kind", [SkipsASecondBatch, HasALossOfItsOwn])
def test_a_training_step_of_ones_own(kind: type[CausalLMModule], model_dir: ModelDir, tmp_path: Path) -> None:
    module = kind(str(model_dir(num_hidden_layers=4)), optimizer=galore, rank=4, warmup_steps=0)
    module.configure_model()
    run = trainer(tmp_path, max_steps=4, gradient_clip_val=1.0)
    assert changed(module, lambda: run.fit(module, loader())) == len([*module.parameters()])


class ClipsByItself(CausalLMModule):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, 1e-4, "norm")
        self.norm = float(torch.nn.utils.get_total_norm(optimizer.gradients()))


def test_lightnings_clipping_sees_projected_gradients_without_sampling_too(model_dir: ModelDir, tmp_path: Path) -> None:
    module = ClipsByItself(str(model_dir(num_hidden_layers=4)), optimizer=galore, rank=4)
    trainer(tmp_path, max_steps=1).fit(module, loader())
    assert module.norm == pytest.approx(1e-4, rel=1e-3)


class SavesMore(CausalLMModule):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 1


def test_a_checkpoint_that_lacks_our_settings_can_be_evaluated_and_says_why_not_resumed(
    model_dir: ModelDir, tmp_path: Path
) -> None:
    module, path = SavesMore(str(model_dir(num_hidden_layers=4)), optimizer=galore, rank=4), tmp_path / "saved.ckpt"
    first = trainer(tmp_path)
    first.fit(module, loader())
    first.save_checkpoint(path)
    assert trainer(tmp_path).test(module, loader(), ckpt_path=path, verbose=False)
    with pytest.raises(UsageError, match="overrides on_save_checkpoint without super"):
        trainer(tmp_path).fit(module, loader(), ckpt_path=path)


class LearnsFrom(CausalLMModule):
    def __init__(self, teacher: nn.Module, temperature: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.teacher = teacher


def test_checkpoints_hold_no_model_that_a_subclass_was_given(model_dir: ModelDir, tmp_path: Path) -> None:
    settings = {"model_name_or_path": str(model_dir(num_hidden_layers=4)), "optimizer": galore, "rank": 4}
    module = LearnsFrom(nn.Linear(2, 2), 2.0, **settings)
    assert isinstance(module.hparams["teacher"], nn.Linear)
    first = trainer(tmp_path)
    first.fit(module, loader())
    first.save_checkpoint(tmp_path / "saved.ckpt")
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)  # as every resume does
    assert saved["hyper_parameters"]["temperature"] == 2.0
    assert "teacher" not in saved["hyper_parameters"]


# ------------------------------------------------------------------ resuming


def test_a_resume_by_a_loader_that_forgets_its_position_says_so(tmp_path: Path) -> None:
    first = trainer(tmp_path, kind=OWSTrainer)
    first.fit(Theirs("adamw"), loader())
    first.save_checkpoint(tmp_path / "saved.ckpt")
    with pytest.warns(UserWarning, match="begins its epoch with rows that were seen"):
        trainer(tmp_path, kind=OWSTrainer, max_steps=4).fit(Theirs("adamw"), loader(), ckpt_path=tmp_path / "saved.ckpt")


def test_a_resume_behind_an_epochs_last_batch_misses_nothing(tmp_path: Path) -> None:
    first = trainer(tmp_path, ModelCheckpoint(tmp_path, "half", every_n_train_steps=4), kind=OWSTrainer,
                    max_steps=4, enable_checkpointing=True)  # fmt: skip
    first.fit(Theirs("adamw"), loader())
    resumed = trainer(tmp_path, kind=OWSTrainer, max_steps=6)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*rows that were seen.*")
        resumed.fit(Theirs("adamw"), loader(), ckpt_path=tmp_path / "half.ckpt")


class HoldsItsRows(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.dataset = TensorDataset(torch.arange(4))

    def train_dataloader(self) -> DataLoader:
        return loader()


def test_a_data_modules_rows_are_no_setting(tmp_path: Path) -> None:
    """Whatever it calls them: a checkpoint that held them could not be resumed."""
    first = trainer(tmp_path, kind=OWSTrainer)
    first.fit(Theirs("adamw"), datamodule=HoldsItsRows())
    first.save_checkpoint(tmp_path / "saved.ckpt")
    resumed = trainer(tmp_path, kind=OWSTrainer, max_steps=3)
    resumed.fit(Theirs("adamw"), datamodule=HoldsItsRows(), ckpt_path=tmp_path / "saved.ckpt")
    assert resumed.global_step == 3


class Stepped(Theirs):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 100), "interval": "step"}}


def test_a_rate_that_a_schedule_keeps_is_not_reported_as_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = trainer(tmp_path, kind=OWSTrainer)
    first.fit(Stepped("adamw"), loader())
    first.save_checkpoint(tmp_path / "saved.ckpt")
    resumed = trainer(tmp_path, kind=OWSTrainer, max_steps=3)
    with pytest.warns(UserWarning, match=r"keeps lr 0\.01, instead of 0\.0001"):
        resumed.fit(Stepped("adamw", lr=1e-4), loader(), ckpt_path=tmp_path / "saved.ckpt")
    assert resumed.optimizers[0].param_groups[0]["lr"] == 0.01
    assert "changes lr" not in caplog.text


# ------------------------------------------------------------------ strategies


@pytest.mark.parametrize("name", ["DDPStrategy", "FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_of_these_names_are_refused_in_whatever_package_they_are(name: str) -> None:
    theirs = type("Theirs", (type(name, (), {}),), {})  # a package of its own, whose classes derive from none of Lightning's
    with pytest.raises(UsageError, match="can't train sampled or projected weights"):
        check_strategy(theirs())


class LoadsItself(Theirs):
    def configure_model(self) -> None:
        """Lightning asks for it under strategies of this kind; this one shards nothing."""


def train_unsharded(arguments: list[str]) -> None:
    ours = trainer(
        Path(arguments[0]), LayerwiseSampling(distribution="uniform", activated_layers=2), devices=2, strategy="fsdp2"
    )
    with pytest.raises(UsageError, match="fsdp2 shards a CausalLMModule; any other module has to shard itself"):
        ours.fit(LoadsItself("adamw"), loader())


def evaluate_offloaded(arguments: list[str]) -> None:
    module = CausalLMModule(arguments[0], frozen_in="host")
    with pytest.raises(UsageError, match=r"model\.frozen_in: host is for one device, and trainer\.devices: 2 is set"):
        trainer(Path(arguments[0]), devices=2, strategy="ddp_layerwise").test(module, loader())


@pytest.mark.slow
def test_a_module_that_fsdp2_would_not_shard_is_refused(tmp_path: Path) -> None:
    run([str(tmp_path)], tmp_path, ranks=2, target=train_unsharded)


@pytest.mark.slow
def test_offloaded_blocks_are_refused_on_two_devices_in_every_stage(model_dir: ModelDir, tmp_path: Path) -> None:
    run([str(model_dir())], tmp_path, ranks=2, target=evaluate_offloaded)
