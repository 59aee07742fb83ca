"""The callback and the optimizer in TRL's own trainers."""

from __future__ import annotations

import csv
import gc
import signal
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ows_lightning.errors import UsageError
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.optim.param_groups import galore_param_groups

pytest.importorskip("trl", reason='needs TRL: pip install "ows_lightning[trl]"')

from ows_lightning.integrations.transformers import LayerwiseSamplingCallback, use_galore
from tests.distributed.launch import Launch, free_port
from tests.integrations.trainers import ACCUMULATE, INTERVAL, STEPS, make_trainer, run
from tests.tiny import tiny_batch, tiny_model


class Watcher(TrainerCallback):
    """Compares the weights and states around every step with what the callback says is active."""

    def __init__(self) -> None:
        self.sampling: Any = None
        self.steps: list[tuple[int, ...]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        active = self.sampling.active_blocks
        self.steps.append(tuple(active))
        states = optimizer.optimizer.state
        for index, layer in enumerate(decoder_layers(model)):
            for name, p in layer.named_parameters():
                assert torch.equal(p, self.before[f"model.layers.{index}.{name}"]) == (index not in active), (index, name)
                assert bool(states.get(p)) == (index in active), (index, name)
                assert index in active or p.grad is None
        assert torch.equal(model.lm_head.weight, self.before["lm_head.weight"])
        assert not torch.equal(model.model.norm.weight, self.before["model.norm.weight"])


@pytest.mark.parametrize(
    ("kind", "galore"),
    [
        ("sft", True),
        pytest.param("sft", False, marks=pytest.mark.slow),
        pytest.param("dpo", True, marks=pytest.mark.slow),
        pytest.param("dpo", False, marks=pytest.mark.slow),
    ],
)
def test_only_active_blocks_train_and_hold_state(kind: str, galore: bool, tmp_path: Path) -> None:
    watcher = Watcher()
    trainer, watcher.sampling = make_trainer(tmp_path, kind, galore, watcher)
    trainer.train()
    sampling = watcher.sampling
    assert len(watcher.steps) == STEPS
    assert [step for _, step, _ in sampling.history] == list(range(0, STEPS, INTERVAL))
    assert len(set(watcher.steps)) > 1
    assert all(p.requires_grad for p in trainer.model.parameters())
    with (tmp_path / "sampling_history.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [step for _, step, _ in sampling.history]
    assert sum(sampling.outlier_scores.outlier_ratios) > 0


def test_blocks_above_the_lowest_active_one_train_at_rest(tmp_path: Path) -> None:
    class WatchesRest(Watcher):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.steps.append(tuple(self.sampling.active_blocks))
            for index, layer in enumerate(decoder_layers(model)):
                for name, p in layer.named_parameters():
                    trains = index in self.steps[-1] or (index > self.steps[-1][0] and p.dim() == 2)
                    assert torch.equal(p, self.before[f"model.layers.{index}.{name}"]) == (not trains), (index, name)

    watcher = WatchesRest()
    watcher.sampling = LayerwiseSamplingCallback(
        activated_layers=1, interval_steps=INTERVAL, distribution="uniform", always_train=["norm"], resting_rank=2
    )
    trainer, _ = make_trainer(tmp_path, "sft", True, watcher, sampling=watcher.sampling)
    trainer.train()
    assert len(set(watcher.steps)) > 1
    other, _ = make_trainer(tmp_path / "adamw", "sft", False, sampling=LayerwiseSamplingCallback(resting_rank=2))
    with pytest.raises(UsageError, match=r"^sampling\.resting_rank: AdamW can't train frozen blocks at rest"):
        other.train()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_run_that_was_killed_resumes_bit_for_bit(kind: str, tmp_path: Path) -> None:
    def fit(folder: str, *more: str) -> int | None:
        launch = Launch([str(tmp_path / folder), kind, "galore", *more], tmp_path / "output", target=run)
        return launch.wait()[0]

    assert fit("whole") == 0
    assert fit("killed", "--die", "7") == -signal.SIGKILL
    assert fit("killed", "--resume") == 0
    whole, resumed = (torch.load(tmp_path / folder / "end.pt", weights_only=True) for folder in ("whole", "killed"))
    assert whole["history"] == resumed["history"]
    assert all(torch.equal(resumed["weights"][name], value) for name, value in whole["weights"].items())


def test_clipping_acts_on_what_the_optimizer_consumes_and_is_logged(tmp_path: Path) -> None:
    class Norms(TrainerCallback):
        def __init__(self) -> None:
            self.norms: list[float] = []

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            gradients = optimizer.optimizer.gradients()
            self.norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
            assert len(gradients) == 2 * 9 + 1  # two blocks, and the final norm

    clipped, free = Norms(), Norms()
    for norms, limit, name in ((clipped, 1e-3, "clipped"), (free, 0.0, "free")):
        trainer, _ = make_trainer(tmp_path / name, "sft", True, norms, max_grad_norm=limit, max_steps=4)
        trainer.train()
        logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        assert min(logged) > 1e-2
        if name == "free":
            assert logged == pytest.approx(norms.norms, rel=1e-4)
    assert clipped.norms == pytest.approx([1e-3] * 4, rel=1e-2)


def test_draws_by_norms_of_gradients_are_refused_where_the_trainer_has_clipped_them(tmp_path: Path) -> None:
    def make(limit: float, **options: Any) -> Trainer:
        sampling = LayerwiseSamplingCallback(activated_layers=1, interval_steps=1, distribution="gradient_norm")
        trainer, _ = make_trainer(tmp_path / str(limit), sampling=sampling, max_grad_norm=limit, max_steps=2)
        use_galore(trainer, rank=4, **options)
        return trainer

    with pytest.raises(UsageError, match=r"^max_grad_norm: the Trainer clips .*set it to 0 \(and clip by use_galore"):
        make(1.0).train()
    make(0.0, max_grad_norm=1.0).train()
    args = TrainingArguments(tmp_path / "fp16", max_grad_norm=0.0, use_cpu=True)
    args.fp16 = True  # which transformers takes for a GPU alone
    sampling = LayerwiseSamplingCallback(activated_layers=1, interval_steps=1, distribution="gradient_norm")
    model = tiny_model("llama")
    with pytest.raises(UsageError, match=r"^fp16: the loss is scaled before any callback sees the gradients.*take bf16"):
        sampling.on_train_begin(args, TrainerState(), TrainerControl(), model=model, optimizer=SGD(model.parameters(), 0.1))


def test_accumulated_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    weights = []
    for size, accumulate in ((2, ACCUMULATE), (2 * ACCUMULATE, 1)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate, "max_steps": 3}
        trainer, _ = make_trainer(tmp_path / str(size), "sft", True, **options)
        trainer.train()
        weights.append(trainer.model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=2e-2, atol=2e-3)


def test_a_projecting_optimizer_of_ones_own_is_refused_where_the_trainer_clips(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path)
    optimizer = GaLoreAdamW(galore_param_groups(trainer.model, rank=4), lr=1e-2)
    optimizer.project_in_backward()
    trainer.optimizer = optimizer
    with pytest.raises(UsageError, match=r"^max_grad_norm: .* call use_galore\(trainer\)"):
        trainer.train()
    with pytest.raises(UsageError, match=r"^use_galore: this Trainer has an optimizer"):
        use_galore(trainer)


def test_an_optimizer_that_does_not_project_in_backward_may_meet_hooks_of_others(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, max_steps=1)
    seen: list[torch.Tensor] = []
    trainer.model.model.norm.weight.register_post_accumulate_grad_hook(seen.append)
    trainer.optimizer = GaLoreAdamW(galore_param_groups(trainer.model, rank=4), lr=1e-2)
    trainer.train()
    assert seen


def test_a_callback_used_again_starts_afresh_also_after_an_exception(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                raise KeyboardInterrupt

    trainer, sampling = make_trainer(tmp_path / "first", "sft", False, Fails())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    first = list(sampling.history)
    again, _ = make_trainer(tmp_path / "second", sampling=sampling)
    assert all(p.requires_grad for p in trainer.model.parameters())
    again.train()
    assert sampling.history[:2] == first
    assert len(sampling.history) == 4


def test_a_model_can_be_trained_again_with_a_new_callback_and_is_not_kept(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    def make(model: Any, *others: TrainerCallback) -> tuple[Trainer, LayerwiseSamplingCallback]:
        sampling = LayerwiseSamplingCallback(activated_layers=1, interval_steps=1, distribution="uniform")
        args = TrainingArguments(
            str(tmp_path), max_steps=2, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True
        )
        rows = [{name: value[0] for name, value in tiny_batch(1).items()}] * 16
        made = Trainer(model, args=args, train_dataset=rows, callbacks=[sampling, *others])
        use_galore(made, rank=4)
        return made, sampling

    model = tiny_model("llama")
    failed, interrupted = make(model, Fails())
    with pytest.raises(KeyboardInterrupt):
        failed.train()
    interrupted.release()
    del failed
    trainer, sampling = make(model)
    trainer.train()
    assert len(sampling.history) == 2
    kept = weakref.ref(model)
    del model, trainer
    gc.collect()
    assert kept() is None
    assert interrupted.history


@pytest.mark.parametrize("checkpointing", [True, False])
def test_adapters_under_dpo_are_clipped_by_what_trains(checkpointing: bool, tmp_path: Path) -> None:
    """The reference is the model without adapters, all of which peft unfreezes after each of its passes."""
    peft = pytest.importorskip("peft")
    norms = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))
            assert len(gradients) == sum(p.requires_grad for p in model.parameters())

    lora = peft.LoraConfig(r=2, target_modules="all-linear")
    options = {"gradient_checkpointing": checkpointing, "max_steps": 2, "max_grad_norm": 1e9}
    trainer, _ = make_trainer(tmp_path, "dpo", False, Norms(), peft_config=lora, **options)
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(norms, rel=1e-4)


def test_a_resumed_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    other = LayerwiseSamplingCallback(activated_layers=1, interval_steps=INTERVAL, always_train=["norm"])
    trainer, _ = make_trainer(tmp_path, sampling=other)
    with pytest.raises(UsageError, match=r"^sampling: .*activated_layers \(2 in the checkpoint, 1 now\)"):
        trainer.train(resume_from_checkpoint=True)


def test_a_resumed_run_with_other_settings_of_galore_is_refused_before_blocks_are_frozen(tmp_path: Path) -> None:
    make_trainer(tmp_path, galore=True, max_steps=2)[0].train()
    trainer, _ = make_trainer(tmp_path)
    use_galore(trainer, rank=8, update_proj_gap=7, moments_dtype="bfloat16")
    with pytest.raises(UsageError, match=r"^use_galore: .* other settings: ") as refused:
        trainer.train(resume_from_checkpoint=True)
    for changed in ("rank (4 in", "update_proj_gap (4 in the checkpoint, 7 now)", "moments_dtype ('float32' in"):
        assert changed in str(refused.value)
    assert all(p.requires_grad for p in trainer.model.parameters())


@pytest.mark.parametrize("optim", ["galore", "adafactor", "sgd", "sgd with momentum"])
def test_a_checkpoint_without_the_optimizer_is_refused_where_it_has_a_state(optim: str, tmp_path: Path) -> None:
    def trainer(**options: Any) -> Any:
        made, _ = make_trainer(tmp_path, galore=optim == "galore", **options)
        if optim.startswith("sgd"):
            made.optimizer = torch.optim.SGD(made.model.parameters(), lr=1e-2, momentum=0.9 if "momentum" in optim else 0.0)
        return made

    options = {"optim": optim} if optim == "adafactor" else {}
    trainer(max_steps=2, save_only_model=True, **options).train()
    resumed = trainer(max_steps=4, **options)
    if optim == "sgd":
        resumed.train(resume_from_checkpoint=True)
        return
    with pytest.raises(UsageError, match=r"^resume_from_checkpoint: .* no state of the optimizer \(save_only_model=True\)"):
        resumed.train(resume_from_checkpoint=True)


def test_a_resumed_run_says_which_setting_changes_its_draws(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(tmp_path, max_steps=2)[0].train()
    settings: dict[str, Any] = {"activated_layers": 2, "calibration_samples": 4, "threshold": 2.0, "always_train": ["norm"]}
    sampling = LayerwiseSamplingCallback(interval_steps=INTERVAL, seed=3, **settings)
    make_trainer(tmp_path, sampling=sampling, max_steps=4)[0].train(resume_from_checkpoint=True)
    said = [record.getMessage() for record in caplog.records if "The resumed run changes" in record.getMessage()]
    assert said == ["The resumed run changes seed from 0 to 3"]


def test_another_trainer_of_the_same_model_trains_its_blocks_while_one_with_galore_lives(tmp_path: Path) -> None:
    first, _ = make_trainer(tmp_path, galore=True, max_steps=2)
    second = Trainer(first.model, args=first.args, train_dataset=first.train_dataset, data_collator=first.data_collator)
    for before in ("the first trains", "the first has trained"):
        weights = {name: p.detach().clone() for name, p in first.model.named_parameters()}
        second.train()
        assert not [name for name, p in first.model.named_parameters() if torch.equal(p, weights[name])], before
        first.train()


def test_a_trainer_with_galore_trains_again_also_after_others_and_after_an_exception(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    class Hooked(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            matrices = [p for p in decoder_layers(model).parameters() if p.dim() == 2]
            assert all(p.grad is None for p in matrices)
            assert len(trainer.optimizer.optimizer.gradients()) == 2 * 9 + 1  # two blocks, and the final norm

    trainer, sampling = make_trainer(tmp_path, "sft", True, Hooked(), max_steps=2)
    same = {"args": trainer.args, "train_dataset": trainer.train_dataset, "data_collator": trainer.data_collator}
    use_galore(Trainer(trainer.model, **same), rank=4)  # takes no gradients before it trains
    trainer.train()
    trainer.train()
    trainer.add_callback(Fails)
    for _ in range(2):  # the second begins with frozen blocks
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    plain = Trainer(trainer.model, callbacks=[sampling], **same)
    plain.train()
    block = decoder_layers(trainer.model)[sampling.active_blocks[0]]
    assert all(plain.optimizer.optimizer.state.get(p) for p in block.parameters())
    trainer.remove_callback(Fails)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_run_that_ended_within_a_step_leaves_no_gradient_for_the_next(tmp_path: Path) -> None:
    class FailsOnce(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.remove_callback(self)
            raise torch.OutOfMemoryError  # as auto_find_batch_size catches it

    ends = []
    for callbacks in ((), (FailsOnce(),)):
        trainer, _ = make_trainer(tmp_path, "sft", True, *callbacks, max_steps=1, save_strategy="no")
        with pytest.raises(torch.OutOfMemoryError) if callbacks else nullcontext():
            trainer.train()
        if callbacks:
            trainer.train()
        ends.append(trainer.model.state_dict())
    assert all(torch.equal(ends[0][name], weight) for name, weight in ends[1].items())


def test_trainers_of_one_model_leave_no_hook_on_it(tmp_path: Path) -> None:
    class Counts(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            counts.append(len(model._forward_pre_hooks))
            if fails:
                raise KeyboardInterrupt

    counts: list[int] = []
    first, _ = make_trainer(tmp_path, "sft", True, Counts(), max_steps=1)
    model = first.model
    second = Trainer(model, args=first.args, train_dataset=first.train_dataset, data_collator=first.data_collator)
    use_galore(second, rank=4)
    second.add_callback(Counts())
    for trainer, fails in ((first, False), (second, False), (first, True), (second, False)):
        with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
            trainer.train()
    assert counts == [0, 0, 0, 0]


def test_a_model_that_the_trainer_makes_itself_is_refused(tmp_path: Path) -> None:
    made, _ = make_trainer(tmp_path)
    trainer = Trainer(model_init=lambda: made.model, args=made.args, train_dataset=made.train_dataset)
    with pytest.raises(UsageError, match=r"^model_init: .* give Trainer the model itself"):
        use_galore(trainer)


def test_settings_of_the_trainers_arguments_are_named(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path)
    with pytest.raises(UsageError, match=r"^use_galore: lr comes from the Trainer's arguments"):
        use_galore(trainer, lr=1e-3)


def test_float16_is_refused(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path)
    trainer.args.fp16 = True
    with pytest.raises(UsageError, match=r"^fp16: "):
        use_galore(trainer)


def test_a_launcher_is_refused_also_for_one_process(tmp_path: Path) -> None:
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    launcher["MASTER_PORT"] = str(free_port())
    launch = Launch([str(tmp_path), "sft", "adamw"], tmp_path / "output", target=run, environment=launcher)
    assert launch.wait() == [1]
    assert "train on one process without torchrun" in launch.output
