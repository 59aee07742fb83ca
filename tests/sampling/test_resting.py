"""Blocks that train at rest: against the formula, and through what a run does to them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ows_lightning.checkpoints.shards import load_weights
from ows_lightning.cli.commands import CommandTrainer
from ows_lightning.errors import UsageError
from ows_lightning.models.decoder import decoder_layers, on_device
from ows_lightning.models.delta import load_delta
from ows_lightning.models.export import save_huggingface
from ows_lightning.models.pretrained import load_model
from ows_lightning.module import CausalLMModule
from ows_lightning.offload.offloader import BlockOffloader
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.optim.param_groups import galore_param_groups
from ows_lightning.optim.resting import merged_weights
from ows_lightning.optim.subspace import random_subspace
from ows_lightning.sampling.activation import activate_blocks
from ows_lightning.sampling.callback import LayerwiseSampling
from ows_lightning.sampling.sampler import BlockSampler
from tests.tiny import tiny_batch, tiny_model

RANK, LR, SCALE, INTERVAL = 3, 1e-2, 0.5, 2
DRAWS = [[1], [2], [3], [1]]  # of the 4 blocks


class Given(BlockSampler):
    """Trains the blocks of ``DRAWS``."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(1, INTERVAL, "uniform", always_train=(), **{"resting_rank": RANK, **settings})

    def blocks_of(self, interval: int) -> list[int]:
        return DRAWS[interval]


class Run:
    """A loop of one's own, which can be saved and resumed."""

    def __init__(self, architecture: str = "llama", in_backward: bool = True, checkpointed: bool = False,
                 rank: int | None = 8, **settings: Any):  # fmt: skip
        self.model = tiny_model(architecture)
        for dropout in (module for module in self.model.modules() if isinstance(module, nn.Dropout)):
            dropout.p = 0.0
        if checkpointed:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        groups = galore_param_groups(self.model, rank=rank, update_proj_gap=3, scale=SCALE)
        self.optimizer = GaLoreAdamW(groups, lr=LR, **settings.pop("optimizer", {}))
        if in_backward:
            self.optimizer.project_in_backward(model=self.model)
        self.sampler = Given(**settings)
        self.step = 0
        self.sampler.attach(self.model)

    def train(self, steps: int, micro_batches: int = 1) -> Run:
        compute = lambda: self.sampler.compute_scores(self.model, None)  # noqa: E731
        self.sampler.start(self.step, [self.optimizer], compute)
        for _ in range(steps):
            self.sampler.advance(self.step, [self.optimizer], compute)
            rows = tiny_batch(4, seed=self.step)
            for part in range(micro_batches):
                self.optimizer.accumulating = part < micro_batches - 1
                batch = {name: values.chunk(micro_batches)[part] for name, values in rows.items()}
                (self.model(**batch).loss / micro_batches).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
        return self

    def save(self, path: Path) -> None:
        parts = (self.model, self.optimizer, self.sampler)
        torch.save([self.step, *(part.state_dict() for part in parts)], path)

    def load(self, path: Path) -> Run:
        self.step, model, optimizer, sampler = torch.load(path, weights_only=True)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.sampler.load_state_dict(sampler)
        return self


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def close(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)  # steps are of 1e-2


def matrices(block: nn.Module) -> list[nn.Parameter]:
    return [p for p in block.parameters() if p.dim() >= 2]


def by_the_formula(weight: Tensor, gradient: Tensor, q: Tensor, state: dict[str, Any]) -> None:
    """One step of a weight at rest: R = G Q, W <- W - lr * scale * Adam(R) Q^T."""
    r = gradient @ q
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = 0.9 * state.get("m", 0) + 0.1 * r
    v = state["v"] = 0.999 * state.get("v", 0) + 0.001 * r**2
    weight -= LR * SCALE * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * m / (v.sqrt() + 1e-8) @ q.mT


def test_the_scale_is_that_of_the_group_also_in_full_rank() -> None:
    runs = [Run(in_backward=False, rank=rank) for rank in (None, 10**6)]  # both train whole matrices
    for run in runs:
        run.train(INTERVAL)
    lowest_block = min(DRAWS[0])
    for index, blocks in enumerate(zip(*(decoder_layers(run.model) for run in runs), strict=True)):
        if index > lowest_block and index not in DRAWS[0]:
            torch.testing.assert_close(*(block.state_dict() for block in blocks), rtol=1e-5, atol=1e-7)


def test_a_rank_of_0_is_no_full_rank() -> None:
    with pytest.raises(ValueError, match=r"^rank: 0 must be at least 1"):
        GaLoreAdamW(galore_param_groups(tiny_model("llama"), rank=0), lr=LR)


@pytest.mark.parametrize("in_backward", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_equals_the_formula_in_a_plain_loop(architecture: str, in_backward: bool) -> None:
    run = Run(architecture, in_backward)
    rest: dict[str, dict[str, Any]] = {}  # what the formula keeps of each weight at rest
    numbers = {p: number for number, p in enumerate(p for group in run.optimizer.param_groups for p in group["params"])}
    for step in range(INTERVAL * len(DRAWS)):
        reference = copy.deepcopy(run.model)  # without the optimizer's hooks
        reference.requires_grad_(True)
        reference(**tiny_batch(4, seed=step)).loss.backward()
        run.train(1)
        interval = step // INTERVAL
        resting = {
            name
            for index, block in enumerate(decoder_layers(reference))
            for name, p in reference.named_parameters()
            if index > DRAWS[interval][0] and any(p is other for other in matrices(block))
        }
        rest = {name: state for name, state in rest.items() if name in resting}  # dropped with the rest
        for name in resting:
            weight, trained = reference.get_parameter(name), run.model.get_parameter(name)
            state = rest.setdefault(name, {"seed": 1_000_003 * interval + numbers[trained]})
            with torch.no_grad():
                by_the_formula(weight, weight.grad, random_subspace(weight, RANK, state["seed"]), state)
            torch.testing.assert_close(trained, weight, rtol=1e-4, atol=1e-5)
    assert not rest.keys() - {name for name, _ in run.model.named_parameters()}


def test_what_is_below_the_lowest_active_block_and_vectors_stay_bit_by_bit() -> None:
    run = Run()
    before = copy.deepcopy(run.model)
    run.train(INTERVAL)  # block 1 is active
    blocks, old = decoder_layers(run.model), decoder_layers(before)
    assert equal(blocks[0], old[0])
    assert not any(p.requires_grad or p in run.optimizer.state for p in blocks[0].parameters())
    for index in (2, 3):
        for p, q in zip(blocks[index].parameters(), old[index].parameters(), strict=True):
            assert torch.equal(p, q) == (p.dim() < 2)
            assert p.requires_grad == (p.dim() >= 2) == (p in run.optimizer.state)
    assert all(p.requires_grad for p in blocks[1].parameters())


def test_its_state_is_two_moments_of_the_resting_rank_and_no_projector() -> None:
    run = Run().train(INTERVAL + 1)  # block 2 is active, block 1 was
    blocks = decoder_layers(run.model)
    for p in matrices(blocks[3]):
        shapes = {key: tuple(value.shape) for key, value in run.optimizer.state[p].items()}
        moment = (p.size(0), RANK)
        assert shapes == {"rest": (RANK,), "step": (), "exp_avg": moment, "exp_avg_sq": moment}
        assert int(run.optimizer.state[p]["step"]) == INTERVAL + 1  # it goes on at rest
    assert all("projector" in run.optimizer.state[p] for p in matrices(blocks[2]))
    assert not any(p in run.optimizer.state for p in blocks[1].parameters())


@pytest.mark.parametrize("saved_at", [1, 2, 3])
@pytest.mark.parametrize("optimizer", [{}, {"moments_dtype": "bfloat16", "state_warmup_steps": 2}])
def test_a_resumed_run_equals_an_uninterrupted_one(saved_at: int, optimizer: dict, tmp_path: Path) -> None:
    whole = Run(optimizer=optimizer).train(8)
    Run(optimizer=optimizer).train(saved_at).save(tmp_path / "state.pt")
    resumed = Run(optimizer=optimizer).load(tmp_path / "state.pt").train(8 - saved_at)
    assert equal(whole.model, resumed.model)


def test_rank_0_is_the_method_without() -> None:
    assert not any("rest" in state for state in Run(resting_rank=0).train(8).optimizer.state.values())
    assert any("rest" in state for state in Run().train(8).optimizer.state.values())


def test_checkpointed_blocks_and_micro_batches_train_alike() -> None:
    plain, recomputed, accumulated = Run().train(6), Run(checkpointed=True).train(6), Run().train(6, micro_batches=4)
    assert equal(plain.model, recomputed.model)
    close(plain.model, accumulated.model)


def test_keeps_projected_inputs_for_backward_instead_of_inputs() -> None:
    def kept(resting_rank: int) -> int:
        run, sizes = Run(resting_rank=resting_rank), {}
        run.train(0)
        weights = {p.untyped_storage().data_ptr() for p in run.model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run.model(**tiny_batch(4))
        return sum(sizes.values())

    tokens, linear_layers = 4 * 16, 2 * 7
    assert kept(RANK) - kept(0) == tokens * linear_layers * RANK * 4


def test_the_subspaces_are_there_before_a_pass_whose_activations_would_lie_around_them() -> None:
    run = Run()
    run.train(0)
    above = [p for layer in decoder_layers(run.model)[2:] for p in layer.parameters() if p.dim() == 2]
    assert run.optimizer.resting_projectors.keys() == set(above)
    before = dict(run.optimizer.resting_projectors)
    run.train(2)
    assert all(run.optimizer.resting_projectors[p] is q for p, q in before.items())


def test_a_model_that_moves_after_a_draw_has_its_subspaces_where_it_computes() -> None:
    weight = nn.Parameter(torch.rand(8, 6))
    optimizer = GaLoreAdamW([weight], lr=0.1)
    optimizer.rest([weight], rank=2)
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach().to("meta")))  # `module.to` a GPU keeps the parameter, too
    assert optimizer.resting_projector(weight).device == weight.device == torch.device("meta")


def test_a_state_that_was_loaded_to_host_memory_is_merged_and_goes_on_where_the_weight_computes() -> None:
    """As on resuming, before the first forward pass, whoever reads the weights then; "meta" stands for a GPU."""
    weight = nn.Parameter(torch.rand(8, 6))
    optimizer = GaLoreAdamW([{"params": [("weight", weight)], "rank": 4}], lr=0.1)
    optimizer.rest([weight], rank=2)
    optimizer.keep_updates_separate([weight], optimizer.add_resting_updates)
    weight.grad = torch.rand(8, 6)
    optimizer.step()
    assert optimizer.state[weight]["update"].any()
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach().to("meta")))
    optimizer.merge_updates()
    assert "update" not in optimizer.state[weight]
    for moment in ("exp_avg", "exp_avg_sq"):  # they follow, before the next pass
        optimizer.state[weight][moment] = optimizer.state[weight][moment].to("meta")
    assert optimizer.resting_projector(weight).device == torch.device("meta")


def test_matrices_that_no_optimizer_holds_stay_frozen() -> None:
    model = tiny_model("llama")
    named = [(name, p) for name, p in model.named_parameters() if "self_attn" in name]
    activate_blocks(decoder_layers(model), [0], (), [GaLoreAdamW([{"params": named, "rank": 8}])], resting_rank=RANK)
    model(**tiny_batch(2)).loss.backward()
    above = [(name, p) for block in decoder_layers(model)[1:] for name, p in block.named_parameters()]
    assert {name for name, p in above if p.grad is not None} == {f"self_attn.{kind}_proj.weight" for kind in "qkvo"}


def test_another_rank_begins_another_rest() -> None:
    weight = nn.Parameter(torch.rand(8, 6))
    optimizer = GaLoreAdamW([{"params": [("weight", weight)], "rank": 4}], lr=0.1)
    optimizer.keep_updates_separate([weight], optimizer.add_resting_updates)
    optimizer.rest([weight], rank=2, seed=1)
    weight.grad = torch.rand(8, 6)
    optimizer.step()
    before, (update, projector) = weight.detach().clone(), optimizer.resting_updates([weight])[weight]
    optimizer.rest([weight], rank=3, seed=2)
    assert optimizer.state[weight].keys() == {"rest"}
    assert optimizer.resting_projector(weight).shape == (6, 3)
    torch.testing.assert_close(weight.detach(), before + update @ projector.mT)


def test_its_gradients_count_in_the_norm_and_a_nan_skips_the_step() -> None:
    run = Run().train(1)
    run.model(**tiny_batch(4)).loss.backward()
    shapes = [tuple(gradient.shape) for gradient in run.optimizer.gradients()]
    resting = [(p.size(0), RANK) for block in decoder_layers(run.model)[2:] for p in matrices(block)]
    assert [shape for shape in shapes if shape[-1] == RANK] == resting
    before = copy.deepcopy([run.model.state_dict(), run.optimizer.state_dict()["state"]])
    run.optimizer.gradient_of(matrices(decoder_layers(run.model)[3])[0])[0, 0] = float("nan")
    run.optimizer.step()
    assert run.optimizer.skipped_steps == 1
    torch.testing.assert_close([run.model.state_dict(), run.optimizer.state_dict()["state"]], before, rtol=0, atol=0)


def test_weight_decay_leaves_a_resting_weight_outside_its_subspace_alone() -> None:
    run = Run(optimizer={"weight_decay": 0.1})
    weight = decoder_layers(run.model)[3].mlp.up_proj.weight
    before = weight.detach().clone()
    run.train(INTERVAL)
    seed = int(run.optimizer.state[weight]["rest"][0])
    held = [p for group in run.optimizer.param_groups for p in group["params"]]
    number = next(number for number, p in enumerate(held) if p is weight)
    q = random_subspace(weight, RANK, 1_000_003 * seed + number)
    moved = weight.detach() - before
    assert moved.norm() > 0
    torch.testing.assert_close(moved @ q @ q.mT, moved, rtol=1e-4, atol=1e-6)


def test_a_copied_optimizer_goes_on_alike() -> None:
    run = Run(in_backward=False).train(3)
    other = copy.deepcopy(run)
    assert equal(run.train(3).model, other.train(3).model)


def test_an_optimizer_that_cannot_is_refused() -> None:
    model, sampler = tiny_model("llama"), Given()
    sampler.attach(model)
    with pytest.raises(
        UsageError, match=r"^sampling\.resting_rank: AdamW can't train frozen blocks at rest; take GaLoreAdamW"
    ):
        sampler.start(0, [torch.optim.AdamW(model.parameters())], lambda: sampler.compute_scores(model, None))
    with pytest.raises(UsageError, match=r"^sampling\.resting_rank: -1 must be at least 1, or 0"):
        Given(resting_rank=-1)
    with pytest.raises(ValueError, match="rank: 32 makes a weight of shape"):
        GaLoreAdamW(model.parameters()).rest(model.parameters(), 32)


def test_the_subspace_is_orthonormal_and_another_for_every_seed() -> None:
    weight = torch.empty(2, 5, 20, dtype=torch.float64)
    one, other = random_subspace(weight, 4, 0), random_subspace(weight, 4, 1)
    assert one.shape == (2, 20, 4)
    torch.testing.assert_close(one.mT @ one, torch.eye(4).double().expand(2, 4, 4))
    assert torch.equal(one, random_subspace(weight, 4, 0))
    assert (one.mT @ other).abs().max() < 0.9


def test_a_block_that_trains_in_random_subspaces_has_another_whenever_it_is_drawn() -> None:
    run = Run(resting_rank=0)
    for group in run.optimizer.param_groups:
        group.update(subspace="random")
    weight, found = decoder_layers(run.model)[DRAWS[0][0]].mlp.up_proj.weight, []
    for interval in range(len(DRAWS)):
        run.train(1).step = (interval + 1) * INTERVAL
        found += [run.optimizer.state[weight]["projector"].clone()] if weight.requires_grad else []
    assert len(found) > 1
    assert not torch.allclose(found[0], found[-1], atol=0.1)


def test_any_seed_of_a_run_is_one_of_its_subspaces() -> None:
    model = tiny_model("llama")
    weights = [p for p in model.parameters() if p.dim() == 2]
    optimizer = GaLoreAdamW(weights)
    optimizer.rest(weights[1:], 2, seed=1_000_003 * (2**32 - 1))  # the largest that seed_everything takes
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(optimizer.is_resting(p) for p in weights[1:])


class SaveAt(Callback):
    """Saves a checkpoint after five steps, in the middle of an interval."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 5 and not self.path.exists():
            trainer.save_checkpoint(self.path)


def fit(
    directory: Path, folder: Path, *callbacks: Callback, ckpt_path: Path | None = None, trainer: Any = None, **settings: Any
) -> CausalLMModule:
    """Trains a module for eight steps, with resting blocks and a new draw every two."""
    settings = {
        "rank": 8,
        "scale": SCALE,
        "optimizer": lambda params: GaLoreAdamW(params, lr=LR),
        "warmup_steps": 0,
        **settings,
    }
    distribution = settings.pop("distribution", "uniform")
    sampling = LayerwiseSampling(1, INTERVAL, distribution, always_train=("norm",), resting_rank=RANK)
    rows = [{name: values[0] for name, values in tiny_batch(1).items()}] * 32  # a plain loader begins anew on resuming
    module = settings.pop("module", None) or CausalLMModule(str(directory), **settings)
    Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[sampling, *callbacks], default_root_dir=folder,
        **{"max_steps": 8, "gradient_clip_val": 0.5, **(trainer or {})},
    ).fit(module, DataLoader(rows, batch_size=2), ckpt_path=ckpt_path)  # fmt: skip
    return module


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_a_run_of_the_trainer_is_resumed_bit_by_bit(precision: str, model_dir: Callable[..., Path], tmp_path: Path) -> None:
    settings = {"trainer": {"precision": precision, "accumulate_grad_batches": 2}}
    whole = fit(model_dir(), tmp_path, SaveAt(tmp_path / "at5.ckpt"), **settings)
    resumed = fit(model_dir(), tmp_path, ckpt_path=tmp_path / "at5.ckpt", **settings)
    assert equal(whole.model, resumed.model)
    assert not equal(whole.model, fit(model_dir(), tmp_path, trainer={**settings["trainer"], "max_steps": 1}).model)


def assert_agree(ours: Tensor, theirs: Tensor) -> None:
    """Updates are of 0.01 each; rounding, which differs from CPU to CPU, may decide the signs of a few."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    assert (ours - theirs).abs().mean() < 1e-5


OFFLOADED: list[Any] = [
    {"frozen_in": "host"},
    {"frozen_in": "disk"},
    {"frozen_in": "host", "gradient_checkpointing": True},
    {"frozen_in": "host", "distribution": "gradient_norm"},
    pytest.param({"frozen_in": "host", "compile": True}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("settings", OFFLOADED, ids=str)
def test_offloaded_blocks_rest_as_those_on_the_device_do(
    settings: dict, model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))  # without a C++ compiler
    common = {key: value for key, value in settings.items() if key in ("distribution", "compile")}
    start, on_device = load_model(str(model_dir())), fit(model_dir(), tmp_path, **common)
    offloaded = fit(model_dir(), tmp_path, **settings)
    moved = max((p - q).abs().max() for p, q in zip(on_device.model.parameters(), start.parameters(), strict=True))
    assert moved > 0.01
    for p, q in zip(on_device.model.parameters(), offloaded.model.parameters(), strict=True):
        assert_agree(p, q)


@pytest.mark.parametrize("settings", [{"frozen_in": "host"}, {"frozen_dtype": "int8"}], ids=str)
def test_a_run_with_offloaded_blocks_is_resumed_bit_by_bit_and_evaluated_with_what_they_learned(
    settings: dict, model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    seen = Seen()
    whole = fit(model_dir(), tmp_path, SaveAt(tmp_path / "at5.ckpt"), seen, **settings)
    resumed = fit(model_dir(), tmp_path, ckpt_path=tmp_path / "at5.ckpt", **settings)
    assert equal(whole.model, resumed.model)
    saved = torch.load(tmp_path / "at5.ckpt", weights_only=True)
    assert any("update" in state for state in saved["optimizer_states"][0]["state"].values())
    # Whoever evaluates or exports the checkpoint gets the weights that the run computed with.
    exported = CausalLMModule(str(model_dir()))
    exported.configure_model()
    load_weights(exported, tmp_path / "at5.ckpt")
    tolerance = 0.1 if "frozen_dtype" in settings else 1e-4
    assert float(exported(**tiny_batch(1)).loss) == pytest.approx(seen.losses[5], abs=tolerance)
    figures = Trainer(accelerator="cpu", logger=False).validate(
        exported, DataLoader([{name: values[0] for name, values in tiny_batch(1).items()}]), tmp_path / "at5.ckpt"
    )
    assert figures[0]["val_loss"] == pytest.approx(seen.losses[5], abs=tolerance)


@pytest.mark.parametrize("settings", [{"frozen_in": "host"}, {"frozen_in": "disk"}], ids=str)
def test_a_delta_has_what_offloaded_blocks_learned_at_rest(
    settings: dict, model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    seen, checkpoint = Seen(), tmp_path / "at5.ckpt"
    fit(model_dir(), tmp_path, SaveAt(checkpoint), seen, **settings)
    trainer: Any = CommandTrainer(accelerator="cpu", logger=False)
    trainer.export(CausalLMModule(str(model_dir()), **settings), None, checkpoint, tmp_path / "delta", delta=True)
    model = load_model(str(model_dir()))
    untrained = model(**tiny_batch(1)).loss.item()
    load_delta(model, tmp_path / "delta")
    assert float(model(**tiny_batch(1)).loss) == pytest.approx(seen.losses[5], abs=1e-4)
    assert seen.losses[5] < untrained - 0.1


def test_whoever_looks_at_an_offloaded_block_sees_what_it_has_learned(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    plain, seen, look = load_model(str(model_dir())), Seen(), Look()
    trained = fit(model_dir(), tmp_path, seen, look, frozen_in="host")
    plain.load_state_dict({name: look.weights.get(name, p) for name, p in plain.state_dict().items()})
    assert len(look.weights) == len(trained.model.state_dict())
    assert float(plain(**tiny_batch(1)).loss) == pytest.approx(seen.losses[5], abs=1e-5)
    assert seen.losses[6] == pytest.approx(look.later[6], abs=1e-6)  # and computing is none the worse for it


class Look(Callback):
    """Takes all weights after the fifth step, of each block while it is on the device; and losses as ``Seen`` does, later."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.later: dict[int, float] = {}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 5:
            for index, block in enumerate(decoder_layers(pl_module)):
                with on_device(block):
                    self.weights |= {f"model.layers.{index}.{name}": p.clone() for name, p in block.named_parameters()}
            rest = pl_module.model.state_dict()  # only now: it writes what blocks have learned into their weights
            self.weights |= {name: p.clone() for name, p in rest.items() if name not in self.weights}
        self.later[trainer.global_step] = float(pl_module(**tiny_batch(1)).loss)


class Seen(Callback):
    """The loss after each step, of what the module computes then."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.losses[trainer.global_step] = float(pl_module(**tiny_batch(1)).loss)


class AtEnd(Callback):
    """The weights as a callback finds them that exports the trained model."""

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.weights = {name: p.clone() for name, p in pl_module.model.state_dict().items()}


class SaveWeights(Callback):
    """Saves the weights alone after five steps."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 5:
            trainer.save_checkpoint(self.path, weights_only=True)


class ExportAt5(Callback):
    """Takes the model's state dict after five steps, and exports it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 5 and not self.path.exists():
            self.weights = {name: p.clone() for name, p in pl_module.language_model.state_dict().items()}
            save_huggingface(pl_module.model, pl_module.tokenizer, self.path)


def test_all_that_leaves_a_run_has_what_offloaded_blocks_learned(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    found: dict[str, list[dict[str, Tensor]]] = {}
    for where in ("device", "host"):
        at_end, whole, alone = AtEnd(), tmp_path / f"{where}.ckpt", tmp_path / f"{where}-weights.ckpt"
        fit(model_dir(), tmp_path, at_end, SaveAt(whole), SaveWeights(alone), frozen_in=where)
        loaded = CausalLMModule.load_from_checkpoint(whole, weights_only=True, frozen_in="device")
        export = ExportAt5(tmp_path / where)
        fit(model_dir(), tmp_path, export, frozen_in=where, trainer={"max_steps": 6})
        exported = load_model(str(tmp_path / where)).state_dict()
        weights = torch.load(alone, weights_only=True)["state_dict"]
        found[where] = [at_end.weights, dict(loaded.model.state_dict()), export.weights, exported, weights]
    for host, device in zip(found["host"], found["device"], strict=True):
        assert host.keys() == device.keys()
        for name, weight in host.items():
            assert_agree(weight, device[name])


def test_an_average_of_weights_has_what_offloaded_blocks_learned(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    def averaged(**settings: Any) -> nn.Module:
        return fit(model_dir(), tmp_path, EMAWeightAveraging(device="cpu", decay=0.5), **settings).model

    for p, q in zip(averaged().parameters(), averaged(frozen_in="host").parameters(), strict=True):
        assert_agree(p, q)


def test_an_average_that_begins_at_a_resume_has_what_was_learned_before(
    model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    def averaged(where: str) -> nn.Module:
        settings: dict[str, Any] = {"frozen_in": where, "trainer": {"accumulate_grad_batches": 2}}
        fit(model_dir(), tmp_path, SaveAt(tmp_path / f"{where}.ckpt"), **settings)
        average = EMAWeightAveraging(device="cpu", decay=0.99)  # first taken between two micro-batches, before any step
        return fit(model_dir(), tmp_path, average, ckpt_path=tmp_path / f"{where}.ckpt", **settings).model

    for p, q in zip(averaged("device").parameters(), averaged("host").parameters(), strict=True):
        assert_agree(p, q)


def test_an_optimizer_of_other_weights_need_not_let_them_rest() -> None:
    model, sampler = tiny_model("llama"), Given()
    matrices, *others = galore_param_groups(model, rank=8)
    optimizers = [
        torch.optim.AdamW([p for group in others for _, p in group["params"]], lr=LR),
        GaLoreAdamW([matrices], lr=LR),
    ]
    sampler.attach(model)
    sampler.start(0, optimizers, lambda: sampler.compute_scores(model, None))
    assert any(map(optimizers[1].is_resting, model.parameters()))


class StepsByHand(CausalLMModule):
    """Takes its steps itself, which Lightning's `optimizer_step` does not see."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        self.manual_backward(self(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()


def test_an_average_has_what_was_learned_whoever_takes_the_steps(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    def averaged(where: str) -> nn.Module:
        galore = partial(GaLoreAdamW, lr=LR)
        module = StepsByHand(str(model_dir()), rank=8, scale=SCALE, optimizer=galore, warmup_steps=0, frozen_in=where)
        average = EMAWeightAveraging(device="cpu", decay=0.5)
        # In float64: the rate of a loop by hand does not decay, and Adam makes 2e-5 of float32's rounding there.
        trainer = {"gradient_clip_val": None, "precision": "64-true"}
        return fit(model_dir(), tmp_path, average, module=module, trainer=trainer).model

    for p, q in zip(averaged("device").parameters(), averaged("host").parameters(), strict=True):
        assert_agree(p, q)


class Rewind(Callback):
    """Puts the first step's weights back after the fifth, in the middle of an interval."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 1:
            self.saved = {name: weight.clone() for name, weight in pl_module.model.state_dict().items()}
        if trainer.global_step == 5:
            pl_module.model.load_state_dict(self.saved)


@pytest.mark.parametrize("where", ["host", "disk"])
def test_weights_that_are_loaded_between_two_steps_replace_what_was_learned(
    where: str, model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    models = [fit(model_dir(), tmp_path, Rewind(), frozen_in=place).model for place in (where, "device")]
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert_agree(ours, theirs)


class WithTeacher(CausalLMModule):
    """There is a second model, of the same names, in front of the one that trains."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._modules = {"teacher": tiny_model("llama", seed=5).requires_grad_(False), **self._modules}


def test_what_a_model_learned_is_not_added_to_another(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    module = WithTeacher(str(model_dir()), rank=8, optimizer=partial(GaLoreAdamW, lr=LR), warmup_steps=0, frozen_in="host")
    at_end, saved = AtEnd(), tmp_path / "weights.ckpt"
    fit(model_dir(), tmp_path, at_end, SaveWeights(saved), module=module, trainer={"max_steps": 5})
    weights = torch.load(saved, weights_only=True)["state_dict"]
    for name, weight in tiny_model("llama", seed=5).state_dict().items():
        assert torch.equal(weights[f"teacher.{name}"], weight)
        assert_agree(weights[f"causal_lm.model.{name}"], at_end.weights[name])


@pytest.mark.parametrize("where", ["device", "host"])
def test_stochastic_rounding_keeps_small_updates_of_resting_weights(where: str) -> None:
    """Updates far below a weight's last bit, merged after every step, as an average of weights has them."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 8}], lr=1e-3, stochastic_rounding=True)
    optimizer.rest([weight], 4)
    if where == "host":
        optimizer.keep_updates_separate([weight], optimizer.add_resting_updates)
    direction = optimizer.resting_projector(weight) @ torch.ones(4, 64, dtype=torch.bfloat16)
    for _ in range(50):
        weight.grad = direction.T.clone()
        optimizer.step()
        optimizer.merge_updates()
    expected = 50 * 1e-3 * optimizer.resting_projector(weight).float().sum(1)  # Adam's steps are of 1 in the subspace
    found = (1 - weight.detach().float()).mean(0)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)  # the mean of 64 rows of random bits


def test_a_state_that_is_merged_is_rounded_as_in_the_run() -> None:
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = GaLoreAdamW([{"params": [("weight", weight)], "rank": 8}], lr=1e-3, stochastic_rounding=True)
    optimizer.rest([weight], 4, seed=7)
    optimizer.keep_updates_separate([weight], optimizer.add_resting_updates)
    for _ in range(5):
        weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
        optimizer.step()
    merged = dict(merged_weights({"weight": weight}, [optimizer.state_dict()]))["weight"]
    optimizer.merge_updates()
    assert torch.equal(merged, weight)
    assert not torch.equal(merged, torch.ones_like(merged))


def test_only_blocks_with_a_trainable_matrix_that_is_large_enough_rest() -> None:
    model = tiny_model("llama")
    for p in matrices(decoder_layers(model)[2]):
        p.requires_grad_(False)
    sampler = BlockSampler(1, 2, [1.0, *[0.0] * (len(decoder_layers(model)) - 1)], always_train=(), resting_rank=2)
    optimizer = GaLoreAdamW(galore_param_groups(model, rank=4), lr=LR)
    sampler.attach(model)
    sampler.start(0, [optimizer], lambda: sampler.compute_scores(model, None))
    above = [block for block in range(1, len(decoder_layers(model))) if block != 2]
    assert sampler.resting_blocks([0]) == above
    assert 2 not in sampler.trained_blocks()


def test_a_rank_that_no_matrix_has_is_refused_and_one_that_few_have_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        UsageError,
        match=r"sampling.resting_rank: 64 is no less than the inputs of 28 of the 28 matrices of .*; give at most 63$",
    ):
        BlockSampler(1, resting_rank=64).attach(tiny_model("llama"))
    BlockSampler(1, resting_rank=32).attach(tiny_model("llama"))
    assert "sampling.resting_rank: 32 is no less than the inputs of 24 of the 28 matrices" in caplog.text


class FailAt5(Callback):
    """Lets the forward pass of the fifth step fail within the last block."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 5:
            mlp = decoder_layers(pl_module)[-1].mlp
            handle = mlp.register_forward_hook(lambda *_: (handle.remove(), 1 / 0))


def test_a_fit_after_a_failed_one_computes_with_the_weights_alone(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    module = CausalLMModule(str(model_dir()), rank=8, optimizer=lambda params: GaLoreAdamW(params, lr=LR), frozen_in="host")
    with pytest.raises(ZeroDivisionError):
        fit(model_dir(), tmp_path, FailAt5(), module=module)
    plain = load_model(str(model_dir()))
    plain.load_state_dict(module.model.state_dict())
    assert not equal(plain, load_model(str(model_dir())))
    GaLoreAdamW(galore_param_groups(module.model, rank=8)).project_in_backward(model=module.model)
    assert torch.equal(module.model(**tiny_batch(2)).loss, plain(**tiny_batch(2)).loss)


class Placed(Callback):
    """After every step, the blocks that train and those that have memory of their own to train in."""

    def __init__(self) -> None:
        self.training: list[list[int]] = []
        self.on_device: list[list[int]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        blocks = enumerate(decoder_layers(pl_module.model))
        self.training.append([i for i, block in blocks if any(p.requires_grad for p in block.parameters())])
        self.on_device.append(pl_module.offloader.active)


def test_a_fit_with_another_optimizer_trains_what_rested_before(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """Blocks whose vectors do not train, so that all of a block has rested at the end of the first fit."""
    module = CausalLMModule(str(model_dir()), rank=8, optimizer=partial(GaLoreAdamW, lr=LR), frozen_in="host")
    module.configure_model()
    for vector in (p for block in decoder_layers(module.model) for p in block.parameters() if p.dim() == 1):
        vector.requires_grad = False
    fit(model_dir(), tmp_path, module=module)
    rested = [i for i, block in enumerate(decoder_layers(module.model)) if any(p.requires_grad for p in block.parameters())]
    assert len(rested) > 1
    placed, sampling = Placed(), LayerwiseSampling(1, INTERVAL, "uniform", always_train=("norm",))
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=LR)
    rows = [{name: values[0] for name, values in tiny_batch(1).items()}] * 32
    Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[sampling, placed], default_root_dir=tmp_path, max_steps=8,
    ).fit(module, DataLoader(rows, batch_size=2))  # fmt: skip
    assert placed.on_device == placed.training
    assert {i for blocks in placed.training for i in blocks} & {*rested}


def test_a_full_gpu_hides_no_error(
    model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class FullAt5(FailAt5):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            super().on_train_batch_start(trainer, pl_module)
            if trainer.global_step == 5:
                self.optimizer = trainer.optimizers[0]
                monkeypatch.setattr(BlockOffloader, "_load_for_training", full)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    failing = FullAt5()
    with pytest.raises(ZeroDivisionError):
        fit(model_dir(), tmp_path, failing, frozen_in="host")
    assert "learned at rest is lost (no room)" in caplog.text
    assert not any("update" in state for state in failing.optimizer.state.values())


class LookAtOnce(Callback):
    """Computes in inference mode right after a draw, before the blocks that begin to rest have trained."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        with torch.inference_mode():
            pl_module(**tiny_batch(1))


def test_what_is_made_in_inference_mode_can_train(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    seen = fit(model_dir(), tmp_path, LookAtOnce(), frozen_in="host")
    assert equal(seen.model, fit(model_dir(), tmp_path, frozen_in="host").model)


def test_what_is_learned_at_rest_is_kept_in_float32() -> None:
    """Steps of 2^-12 of what was learned before would be lost in bfloat16."""
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 8}], lr=1e-3)
    optimizer.rest([weight], 4)
    optimizer.keep_updates_separate([weight], optimizer.add_resting_updates)
    projector = optimizer.resting_projector(weight)
    for _ in range(600):
        weight.grad = (projector @ torch.ones(4, 64, dtype=torch.bfloat16)).T.contiguous()
        optimizer.step()
    learned = optimizer.resting_updates([weight])[weight][0].float()
    torch.testing.assert_close(learned, torch.full((64, 4), -0.6), rtol=2e-2, atol=0)


def test_blocks_at_rest_have_trained_in_subspaces_of_the_seed(caplog: pytest.LogCaptureFixture) -> None:
    projectors = []
    for seed in (0, 1):
        model = tiny_model("llama")
        sampler = BlockSampler(1, 1, [0.0, 1.0, 0.0, 0.0], resting_rank=2, always_train=(), seed=seed)
        optimizer = GaLoreAdamW(galore_param_groups(model, rank=8))
        sampler.attach(model)
        sampler.start(0, [optimizer], partial(sampler.compute_scores, model, None))
        projectors.append(optimizer.resting_projector(decoder_layers(model)[3].mlp.up_proj.weight))
    assert not torch.allclose(*projectors, atol=0.1)
    assert sampler.trained_blocks() == {1, 2, 3}
    sampler.warn_of_never_trained()
    assert "1 of 4 blocks never trained in 1 intervals: 0." in caplog.text
