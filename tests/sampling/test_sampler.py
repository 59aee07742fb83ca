"""BlockSampler in a loop of one's own, and its state in runs that go on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from ows_lightning.errors import UsageError
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.optim.param_groups import galore_param_groups
from ows_lightning.sampling.callback import LayerwiseSampling
from ows_lightning.sampling.sampler import BlockSampler
from ows_lightning.sampling.scores import BlockScores
from tests.models import architectures
from tests.tiny import tiny_batch, tiny_model

SETTINGS: dict[str, Any] = {"activated_layers": 1, "interval_steps": 2, "distribution": "uniform"}
CHANGES = [
    ({"interval_steps": 4}, r"interval_steps \(2 in the checkpoint, 4 now\)"),
    ({"activated_layers": 2}, r"activated_layers \(1 in the checkpoint, 2 now\)"),
    ({"distribution": [1.0, 1.0, 0.0, 0.0]}, r"distribution \('uniform' in the checkpoint, \[1.0, 1.0, 0.0, 0.0\] now\)"),
    ({"grouping": 1.0}, r"grouping \(0.0 in the checkpoint, 1.0 now\)"),
    ({"always_train": ["norm"]}, r"always_train \(\['embeddings', 'lm_head', 'norm'\] in the checkpoint, \['norm'\] now\)"),
]


def train(sampler: BlockSampler, model: nn.Module, steps: range, state: Any = None, early: bool = True) -> None:
    """A loop that goes on from a state, if there is one, and does not release."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def compute() -> Any:
        return sampler.compute_scores(model, None)

    if state is not None and early:
        sampler.load_state_dict(state)
    sampler.attach(model)
    if state is not None and not early:
        sampler.load_state_dict(state)
    sampler.start(steps.start, [optimizer], compute)
    for step in steps:
        sampler.advance(step, [optimizer], compute)
        model(**tiny_batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trainable(model: nn.Module) -> int:
    return sum(p.requires_grad for p in model.parameters())


class Plain(LightningModule):
    """A module that compares no settings of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_model("llama")

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.net(**batch).loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.net(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(sampling: LayerwiseSampling, max_steps: int) -> Trainer:
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=max_steps,
        callbacks=[sampling], enable_model_summary=False,
    )  # fmt: skip


def loader() -> DataLoader:
    batch = tiny_batch(8)
    return DataLoader([{name: values[row] for name, values in batch.items()} for row in range(8)], batch_size=2)


def test_one_run_after_another_in_ones_own_loop() -> None:
    sampler = BlockSampler(**SETTINGS)
    train(sampler, tiny_model("llama"), range(8))
    sampler.release()
    first = sampler.history
    train(sampler, tiny_model("llama", seed=1), range(4))
    sampler.release()
    assert [step for _, step, _ in first] == [0, 2, 4, 6]
    assert sampler.history == first[:2]


@pytest.mark.parametrize("again", ["the same", "reset", "another", "of a copy"])
def test_what_an_interrupted_run_left_frozen_trains_in_the_next(again: str) -> None:
    model = tiny_model("llama")
    model.model.norm.requires_grad_(False)  # by the user: stays so
    sampler, free = BlockSampler(**SETTINGS), trainable(model)
    train(sampler, model, range(1))
    assert trainable(model) < free
    if again == "reset":
        sampler.reset()
    elif again == "another":  # a cell of a notebook that is run a second time
        sampler = BlockSampler(**SETTINGS)
    elif again == "of a copy":
        model = copy.deepcopy(model)
    train(sampler, model, range(1))
    sampler.release()
    assert trainable(model) == free


def test_who_ends_late_leaves_the_run_of_another_alone() -> None:
    model = tiny_model("llama")
    sampler, other = BlockSampler(**SETTINGS), BlockSampler(**SETTINGS)
    train(sampler, model, range(1))
    train(other, model, range(1))
    active = trainable(model)
    sampler.release()
    assert trainable(model) == active
    assert not sampler._frozen  # nor does it keep the weights


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_do_not_count_in_the_norms(value: float) -> None:
    model, sampler = tiny_model("llama"), BlockSampler(activated_layers=1, interval_steps=2, distribution="gradient_norm")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sampler.attach(model)
    sampler.start(0, [optimizer], lambda: sampler.compute_scores(model, None))
    (active,) = sampler.active_blocks
    model(**tiny_batch()).loss.backward()
    sampler.observe([optimizer])
    before = sampler.gradient_norms
    assert before[active] > 0
    next(decoder_layers(model)[active].parameters()).grad[0, 0] = value
    sampler.observe([optimizer])
    assert sampler.gradient_norms == before
    for p in decoder_layers(model)[active].parameters():
        p.grad.zero_()
    sampler.observe([optimizer])  # a step in which the block had nothing to learn
    assert sampler.gradient_norms == before


def test_numbers_of_numpy_and_torch_are_settings_like_any_other(tmp_path: Path) -> None:
    settings = {
        "activated_layers": np.int64(1),
        "interval_steps": np.int64(2),
        "threshold": np.float32(3),
        "grouping": np.float64(0),
    }
    for distribution in (np.array([1, 2, 0, 0]), torch.tensor([1.0, 2.0, 0.0, 0.0]), [np.float32(1), 2, 0, 0]):
        ours, plain = (
            BlockSampler(**settings, distribution=distribution),
            BlockSampler(**SETTINGS | {"distribution": [1, 2, 0, 0]}),
        )
        for sampler in (ours, plain):
            train(sampler, tiny_model("llama"), range(5))
            sampler.write(tmp_path)
        assert ours.history == plain.history
        torch.save(ours.state_dict(), tmp_path / "state.pt")
        torch.load(tmp_path / "state.pt", weights_only=True)
    with pytest.raises(UsageError, match=r"^sampling.activated_layers: True is no whole number$"):
        BlockSampler(activated_layers=True)


@pytest.mark.parametrize("early", [False, True])
def test_a_resumed_run_goes_on_in_ones_own_loop(early: bool) -> None:
    whole, before, after = BlockSampler(**SETTINGS), BlockSampler(**SETTINGS), BlockSampler(**SETTINGS)
    train(whole, tiny_model("llama"), range(9))
    train(before, tiny_model("llama"), range(5))
    train(after, tiny_model("llama"), range(20))  # an earlier run of its own, which it forgets
    train(after, tiny_model("llama"), range(5, 9), before.state_dict(), early)
    assert after.history == whole.history
    after.release()
    train(after, tiny_model("llama"), range(4))
    assert after.history == whole.history[:2]


def test_a_resumed_run_writes_all_its_draws(tmp_path: Path) -> None:
    sampler = BlockSampler(**SETTINGS)
    train(sampler, tiny_model("llama"), range(5))
    sampler.write(tmp_path / "first")
    train(sampler, tiny_model("llama"), range(5, 9), sampler.state_dict())
    sampler.write(tmp_path / "second")
    lines = (tmp_path / "second" / "sampling_history.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["interval", "0", "1", "2", "3", "4"]


@pytest.mark.parametrize(("step", "said"), [(2, {"interval": 1.0}), (3, {})])
def test_a_draw_is_said_again_where_the_step_that_it_was_for_is_made_again(step: int, said: dict[str, float]) -> None:
    before, after, model = BlockSampler(**SETTINGS), BlockSampler(**SETTINGS), tiny_model("llama")
    train(before, tiny_model("llama"), range(3))
    after.load_state_dict(before.state_dict())
    after.attach(model)
    assert after.start(step, [torch.optim.SGD(model.parameters())], lambda: after.compute_scores(model, None)) == said


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("changed", "message"), CHANGES)
def test_a_state_of_other_settings_is_refused_in_ones_own_loop(changed: dict, message: str, early: bool) -> None:
    before, model = BlockSampler(**SETTINGS), tiny_model("llama")
    train(before, tiny_model("llama"), range(3))
    with pytest.raises(UsageError, match=f"^sampling: .* other settings: {message}; set them back, or start anew$"):
        train(BlockSampler(**{**SETTINGS, **changed}), model, range(3, 4), before.state_dict(), early)
    assert trainable(model) == len(list(model.parameters()))


@pytest.mark.parametrize(("changed", "message"), CHANGES)
def test_somebody_elses_module_is_evaluated_but_not_resumed_with_other_settings(
    changed: dict, message: str, tmp_path: Path
) -> None:
    first = trainer(LayerwiseSampling(**SETTINGS), 3)
    first.fit(Plain(), loader())
    first.save_checkpoint(tmp_path / "at3.ckpt")
    other = trainer(LayerwiseSampling(**{**SETTINGS, **changed}), 4)
    other.validate(Plain(), loader(), ckpt_path=tmp_path / "at3.ckpt", verbose=False)
    with pytest.raises(UsageError, match=message):
        other.fit(Plain(), loader(), ckpt_path=tmp_path / "at3.ckpt")


def test_a_state_is_plain_whatever_numbers_the_settings_are(tmp_path: Path) -> None:
    before = BlockSampler(np.int64(1), 2, "uniform", always_train=("norm",))
    after = BlockSampler(1, 2, "uniform", always_train=["norm"])
    train(before, tiny_model("llama"), range(3))
    torch.save(before.state_dict(), tmp_path / "state.pt")
    train(after, tiny_model("llama"), range(3, 4), torch.load(tmp_path / "state.pt", weights_only=True))
    assert after.history == before.history


def test_an_older_state_without_settings_is_taken() -> None:
    before, after = BlockSampler(**SETTINGS), BlockSampler(**SETTINGS)
    train(before, tiny_model("llama"), range(3))
    state = before.state_dict()
    del state["settings"]
    train(after, tiny_model("llama"), range(3, 4), state)
    assert after.history == before.history


def test_a_head_beside_the_language_model_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"lm": tiny_model("llama"), "value": nn.Linear(32, 1)})
    sampler = BlockSampler(**SETTINGS)
    sampler.attach(model)
    assert "value.weight and all else outside the decoder stays frozen" in caplog.text
    caplog.clear()
    sampler.release()
    model["value"].requires_grad_(False)
    sampler.attach(model)
    assert not caplog.text


def test_what_trains_is_not_known_before_a_run() -> None:
    assert BlockSampler(**SETTINGS).planned_blocks(10) is None


@pytest.mark.parametrize(("resting_rank", "trained"), [(0, {1, 3}), (2, {1, 2, 3})])
def test_blocks_above_the_lowest_of_all_draws_have_trained_at_rest(resting_rank: int, trained: set[int]) -> None:
    sampler = BlockSampler(1, 2, "uniform", resting_rank=resting_rank)
    sampler.load_state_dict({"history": [(0, 0, [3]), (1, 2, [1])], "probabilities": [0.25] * 4})
    assert sampler.trained_blocks() == trained
    assert sampler.trained_blocks([[0]]) == trained | {0}


def test_blocks_that_the_user_froze_do_not_train_at_rest() -> None:
    model, sampler = tiny_model("llama", num_hidden_layers=6), BlockSampler(1, 2, [0, 1, 0, 0, 0, 0], resting_rank=2)
    for block in (2, 4):
        decoder_layers(model)[block].requires_grad_(False)
    sampler.attach(model)
    sampler.start(0, [GaLoreAdamW(model.parameters(), lr=1e-3)], lambda: sampler.compute_scores(model, None))
    assert sampler.resting_blocks([1]) == [3, 5]
    assert sampler.trained_blocks() == {1, 3, 5}
    assert sampler.resting_blocks([]) == []  # an overridden `blocks_of` may draw none


@pytest.mark.parametrize(("drawn", "resting"), [(3, [2]), (2, [3]), (1, [2, 3])])
def test_blocks_above_one_that_shares_weights_with_an_active_block_rest(
    drawn: int, resting: list[int], tmp_path: Path
) -> None:
    model = architectures.tiny_model(architectures.tiny_config("zamba2")).train()
    sampler = BlockSampler(1, 2, [0.25] * 4, always_train=(), resting_rank=2)
    sampler.blocks_of = lambda interval: [drawn]  # type: ignore[method-assign]
    sampler.attach(model)  # blocks 1 and 3 share a transformer
    optimizer = GaLoreAdamW(galore_param_groups(model, rank=4), lr=1e-2)
    sampler.start(0, [optimizer], lambda: sampler.compute_scores(model, None))
    before = [[p.detach().clone() for p in block.parameters()] for block in decoder_layers(model)]
    model(**tiny_batch(2, 8), use_cache=False).loss.backward()
    optimizer.step()
    pairs = [zip(block.parameters(), old, strict=True) for block, old in zip(decoder_layers(model), before, strict=True)]
    changed = [block for block, weights in enumerate(pairs) if any(not torch.equal(p, old) for p, old in weights)]
    assert sampler.resting_blocks([drawn]) == resting
    assert sampler.trained_blocks() == {drawn, *resting} == {*changed} - ({1} if drawn == 3 else set())
    sampler.write(tmp_path)
    row = (tmp_path / "sampling_history.csv").read_text().splitlines()[1]
    assert row == f"0,0,{drawn},{' '.join(map(str, resting))}"


def test_a_last_interval_that_is_cut_short_is_planned_too() -> None:
    for seed in range(8):
        sampler = BlockSampler(1, 2, "uniform", seed=seed)
        train(sampler, tiny_model("llama"), range(1))
        assert sampler.planned_blocks(5) == {block for interval in range(3) for block in sampler.blocks_of(interval)}


def test_an_optimizer_that_accelerate_has_wrapped_is_seen_through() -> None:
    norms = []
    for wrap in (False, True):
        model = tiny_model("llama")
        optimizer = GaLoreAdamW(galore_param_groups(model, rank=4), lr=1e-3)
        optimizer.project_in_backward(model=model)
        given = Accelerator(cpu=True).prepare(optimizer) if wrap else optimizer
        sampler = BlockSampler(1, 1, "gradient_norm", resting_rank=2)
        sampler.attach(model)
        sampler.start(0, [given], lambda model=model, sampler=sampler: sampler.compute_scores(model, None))
        model(**tiny_batch()).loss.backward()
        sampler.observe([given])
        norms.append(sampler.gradient_norms)
        assert [block for block, norm in enumerate(norms[-1]) if norm > 0] == sampler.active_blocks  # not those that rest
    assert sampler.active_blocks < [3]
    assert norms[0] == norms[1]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize(("reentrant", "recomputed"), [(False, [2, 3]), (True, [0, 1, 2, 3])])
def test_checkpointing_recomputes_no_frozen_block_below_the_active_ones(
    reentrant: bool, recomputed: list[int], twice: bool
) -> None:
    """Unless it is reentrant, and would give a block whose input has no gradient none."""
    model, sampler = tiny_model("llama"), BlockSampler(1, distribution=[0.0, 0.0, 1.0, 0.0], always_train=["norm"])
    if twice:
        model.enable_input_require_grads()  # as SFTTrainer does for a peft model, before its Trainer does the next
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    train(sampler, model, range(1))
    computed: list[int] = []
    for index, block in enumerate(decoder_layers(model)):
        block.mlp.register_forward_pre_hook(lambda *_, index=index: computed.append(index))
    model(**tiny_batch()).loss.backward()
    assert sorted(computed) == sorted([0, 1, 2, 3, *recomputed])
    assert all(p.grad is not None for p in decoder_layers(model)[2].parameters())


def test_a_window_takes_in_blocks_that_have_no_outliers(tmp_path: Path) -> None:
    BlockScores("m", 4, 13.0, 8, "outlier", [0.0, 0, 2, 0], [0.0, 0, 1, 0]).save(tmp_path / "scores.json")
    BlockSampler(2, distribution="window", scores=tmp_path / "scores.json").check(4, {})
    with pytest.raises(UsageError, match="2 is more than the 1 of 4 blocks whose probability is not zero"):
        BlockSampler(2, distribution="outlier", scores=tmp_path / "scores.json").check(4, {})


def test_the_rows_that_blocks_are_scored_on_follow_the_seed() -> None:
    model, samplers = (
        tiny_model("llama"),
        (BlockSampler(1, calibration_samples=2, threshold=2.0, seed=seed) for seed in (0, 0, 1)),
    )
    one, again, other = (sampler.compute_scores(model, loader()).outlier_ratios for sampler in samplers)
    assert one == again != other


def test_the_threshold_of_a_file_of_scores_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    rows = DataLoader([{key: value[0] for key, value in tiny_batch(1).items()}] * 4)
    made = BlockSampler(1, threshold=2.0, calibration_samples=2).compute_scores(model, rows)
    made.save(tmp_path / "scores.json")
    for threshold, times in ((2.0, 0), (5.0, 1)):
        BlockSampler(1, scores=tmp_path / "scores.json", threshold=threshold).compute_scores(model, rows)
        assert caplog.text.count("sampling.threshold: 5 counts where blocks are scored again alone") == times
    caplog.clear()
    norms = {"distribution": "weight_norm"}  # which know no outliers
    BlockSampler(1, **norms).compute_scores(model, rows).save(tmp_path / "norms.json")
    BlockSampler(1, **norms, scores=tmp_path / "norms.json", threshold=5.0).compute_scores(model, rows)
    assert not caplog.text
