"""FLOPs a token: against torch's counter in a real run, and the figures of Llama-2-7B's shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import flop_registry

from ows_lightning.errors import UsageError
from ows_lightning.memory.cards import CARDS, estimate_speed, find_card
from ows_lightning.memory.flops import count_flops
from ows_lightning.memory.plan_settings import settings_from_config
from ows_lightning.memory.prediction import METHODS
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.module import CausalLMModule
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.sampling.callback import LayerwiseSampling
from ows_lightning.sampling.scores import BlockScores
from tests.bare import follow_once
from tests.memory.test_plan import LENGTH, llama_7b, make_config
from tests.tiny import tiny_batch, tiny_model

N = 6_738_415_616  # weights of Llama-2-7B


@pytest.fixture(autouse=True)
def followed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of these tests, whose settings differ little, each follows only the steps that no other one has followed."""
    follow_once(monkeypatch)


class Counter(TorchDispatchMode):
    """torch's formulas; its own FlopCounterMode can't stand `autograd.grad` within a checkpointed forward pass."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


class Count(Callback):
    """Counts a run's FLOPs after its first step, which finds all subspaces."""

    def __init__(self) -> None:
        self.counter, self.counting = Counter(), False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1 and not self.counting:
            self.counting = True
            self.counter.__enter__()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.counter.__exit__(None, None, None)


def run_and_count(config: dict[str, Any], steps: int) -> float:
    """Runs what a config describes and returns its FLOPs a token."""
    arguments, sampling, trainer_arguments = dict(config["model"]["init_args"]), config["sampling"], config["trainer"]
    optimizer = arguments.pop("optimizer")
    kind = GaLoreAdamW if optimizer["class_path"].endswith("GaLoreAdamW") else torch.optim.AdamW
    module = CausalLMModule(**arguments, optimizer=lambda groups: kind(groups, **optimizer["init_args"]))
    count = Count()
    rows, batches = config["data"]["init_args"]["batch_size"], steps * trainer_arguments["accumulate_grad_batches"]
    batch = tiny_batch(rows=rows, length=LENGTH, vocab_size=1000)
    trainer = Trainer(
        **trainer_arguments, callbacks=[count, *([LayerwiseSampling(**sampling)] if sampling else [])], max_steps=steps,
        default_root_dir=arguments["model_name_or_path"], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader([batch] * batches, batch_size=None))
    return count.counter.total / (batches // steps * (steps - 1) * rows * LENGTH)


ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {}}


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling__distribution": [0.0, 1.0, 0.0, 0.0, 1.0]},
        {"sampling__distribution": [0.0, 1.0, 0.0, 0.0, 1.0], "model__gradient_checkpointing": True},
        {"sampling__distribution": [0.0, 1.0, 0.0, 0.0, 1.0], "model__gradient_checkpointing": 3},
        {"sampling__distribution": [0.0, 0.0, 1.0, 1.0, 0.0], "trainer__accumulate_grad_batches": 2, "data__batch_size": 1},
        {
            "sampling__distribution": [0.0, 0.0, 1.0, 1.0, 0.0],
            "sampling__always_train": ["embeddings", "lm_head", "norm"],
        },
        {"sampling__distribution": [0.0, 1.0, 0.0, 0.0, 1.0], "sampling__resting_rank": 8},
        {"sampling__distribution": [0.0, 1.0, 0.0, 0.0, 1.0], "sampling__resting_rank": 8, "model__frozen_in": "host"},
        {
            "sampling__distribution": [0.0, 1.0, 0.0, 0.0, 1.0],
            "sampling__resting_rank": 8,
            "model__frozen_in": "host",
            "model__gradient_checkpointing": True,
        },
        {"sampling": None},
        {"sampling": None, "model__update_proj_gap": 2},
        {"sampling__distribution": [0.0, 1.0, 0.0, 0.0, 1.0], "sampling__interval_steps": 5, "model__update_proj_gap": 2},
        {"sampling__distribution": [0.0, 1.0, 0.0, 0.0, 1.0], "sampling__interval_steps": 2, "model__update_proj_gap": 4},
        {"sampling": None, "model__rank": None, "model__optimizer": ADAMW, "model__gradient_checkpointing": True},
        {
            "sampling": None,
            "model__rank": None,
            "model__optimizer": ADAMW,
            "model__lora": {"r": 4, "target_modules": "all-linear"},
        },
        {
            "sampling": None,
            "model__rank": None,
            "model__optimizer": ADAMW,
            "model__lora": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [4]},
            "model__gradient_checkpointing": True,
        },
    ],
    ids=[
        "sampled",
        "checkpointing",
        "checkpointing of some",
        "accumulation",
        "embeddings",
        "resting",
        "resting, host",
        "resting, host, checkpointing",
        "galore",
        "galore, gap 2",
        "gap 2",
        "gap 4",
        "full",
        "lora",
        "lora above, checkpointing",
    ],
)
def test_flops_are_those_that_torch_counts(directory: Path, changes: dict[str, Any]) -> None:
    config = make_config(directory, model__attn_implementation="eager", **changes)
    expected = count_flops(settings_from_config(config)).flops_per_token
    gap = config["model"]["init_args"].get("update_proj_gap", 2)  # counted are whole ages of a subspace
    assert expected == pytest.approx(run_and_count(config, steps=1 + gap), rel=0.02)


@pytest.mark.slow
def test_llama_2_7b_by_its_lowest_block() -> None:
    found = []
    for lowest in (0, 4, 8, 13, 16, 27):
        weights = [float(block in (lowest, 28, 29, 30, 31)) for block in range(32)]
        found.append(count_flops(settings_from_config(llama_7b(sampling__distribution=weights))).flops_per_token / N)
    assert found == pytest.approx([5.60, 5.15, 4.71, 4.16, 3.83, 2.61], rel=0.005)


@pytest.mark.slow
def test_blocks_at_rest_on_the_host_take_little_more() -> None:
    changes = {
        "model__frozen_in": "host",
        "sampling__activated_layers": 2,
        "sampling__scores": "configs/scores/llama2_7b.json",
    }
    settings = [settings_from_config(llama_7b(1, 16, **changes, sampling__resting_rank=rank)) for rank in (0, 16)]
    without, resting = (count_flops(one).flops_per_token / N for one in settings)
    assert 0.02 < resting - without < 0.04


def test_llama_2_7b_by_method() -> None:
    settings = settings_from_config(llama_7b(sampling__distribution="uniform"))
    methods = {name: replace(settings, method=METHODS[name](settings)) for name in ("ows", "full", "lora")}
    found = {name: count_flops(method).flops_per_token / N for name, method in methods.items()}
    assert found == pytest.approx({"ows": 5.09, "full": 7.53, "lora": 6.05}, rel=0.005)


def test_llama_2_7b_with_the_published_scores() -> None:
    changes = {"sampling__scores": "configs/scores/llama2_7b.json", "sampling__grouping": 1.0}
    settings = settings_from_config(llama_7b(**changes))
    ours, lora = (count_flops(replace(settings, method=METHODS[name](settings))).flops_per_token for name in ("ows", "lora"))
    assert ours / N == pytest.approx(4.81, rel=0.005)
    assert ours / lora <= 0.80


@pytest.mark.parametrize("changes", [{"model__compile": True}, {"trainer__precision": "bf16-mixed"}], ids=["compile", "mixed"])
def test_what_calls_for_whole_gradients_computes_them(directory: Path, changes: dict[str, Any]) -> None:
    factored, whole = (
        count_flops(settings_from_config(make_config(directory, sampling__distribution="uniform", **more))).flops_per_token
        for more in ({}, changes)
    )
    assert factored < whole


def test_says_where_probabilities_come_from(directory: Path, tmp_path: Path) -> None:
    def planned(**changes: Any) -> Any:
        return count_flops(
            settings_from_config(make_config(directory, **{f"sampling__{key}": v for key, v in changes.items()}))
        )

    assert "uniform, for want of sampling.scores" in planned(distribution="outlier").origin
    low = BlockScores("m", 5, 13.0, 8, "outlier", [9.0, 9.0, 0.1, 0.1, 0.1], [0.2] * 5)
    high = BlockScores("m", 5, 13.0, 8, "outlier", [0.1, 0.1, 0.1, 9.0, 9.0], [0.2] * 5)
    for name, scores in {"low": low, "high": high}.items():
        scores.save(tmp_path / f"{name}.json")
    below, above = (planned(distribution="outlier", scores=str(tmp_path / f"{name}.json")) for name in ("low", "high"))
    assert "low.json" in below.origin
    assert above.flops_per_token < planned(distribution="outlier").flops_per_token < below.flops_per_token


@pytest.mark.slow
def test_scores_count_as_often_as_they_are_computed(directory: Path) -> None:
    def scoring(distribution: str, **changes: Any) -> float:
        """Forward passes of a block over all calibration rows, of a run of 8 steps of 4 rows."""
        sampling = {"sampling__distribution": distribution, "sampling__calibration_samples": 16, **changes}
        settings = settings_from_config(make_config(directory, **sampling))
        without, scored = (count_flops(replace(settings, max_steps=steps)) for steps in (None, 8))
        return (scored.flops_per_token - without.flops_per_token) * 8 * 4 / 16 / scored.block_forward

    for distribution, blocks in {"outlier": 5, "outlier_reverse": 5, "window": 5, "uniform": 0, "weight_norm": 0}.items():
        assert scoring(distribution) == pytest.approx(blocks)
    assert scoring("window", sampling__rescore_every=3) == pytest.approx(10)  # at the first and the fourth of four draws


def test_scores_cost_a_token_the_less_the_more_tokens_there_are(directory: Path) -> None:
    settings = replace(settings_from_config(make_config(directory)), max_steps=8)

    def scoring(**changes: Any) -> float:
        without, scored = (count_flops(replace(settings, **changes, max_steps=steps)) for steps in (None, 8))
        return scored.flops_per_token - without.flops_per_token

    for key in ("devices", "accumulate_grad_batches"):
        assert 2 * scoring(**{key: 2}) == pytest.approx(scoring(), rel=1e-6)


@pytest.mark.parametrize("where", ["device", "host"])
def test_a_head_that_is_tied_to_the_embeddings_trains_them_too(where: str, tmp_path: Path) -> None:
    tiny_model("llama", num_hidden_layers=4, tie_word_embeddings=True).save_pretrained(tmp_path)
    head, embeddings = (
        count_flops(settings_from_config(make_config(tmp_path, sampling__always_train=[part, "norm"], model__frozen_in=where)))
        for part in ("lm_head", "embeddings")
    )
    assert head.flops_per_token == embeddings.flops_per_token


def test_a_file_of_scores_is_no_measure_of_gradients(directory: Path) -> None:
    config = make_config(directory, sampling__distribution="gradient_norm", sampling__scores="nowhere.json")
    assert count_flops(settings_from_config(config)).origin.startswith("uniform")


def test_grouped_draws_compute_less(directory: Path) -> None:
    alone, grouped = (
        count_flops(
            settings_from_config(make_config(directory, sampling__distribution="uniform", sampling__grouping=grouping))
        )
        for grouping in (0.0, 1.0)
    )
    assert grouped.flops_per_token < alone.flops_per_token


def test_a_runs_own_draws_stand_in_the_place_of_the_expectation(directory: Path) -> None:
    settings = settings_from_config(make_config(directory, sampling__distribution="uniform", sampling__activated_layers=2))
    fixed = settings_from_config(make_config(directory, sampling__distribution=[0.0, 1.0, 0.0, 0.0, 1.0]))
    expected = count_flops(fixed)
    assert count_flops(settings, drawn=[(1, 4)] * len(expected.draws)).flops_per_token == expected.flops_per_token
    assert count_flops(settings, drawn=[(3, 4)]).flops_per_token < count_flops(settings, drawn=[(0, 4)]).flops_per_token


# ---------------------------------------------------------------------- on a card


@pytest.mark.slow
def test_a_card_is_bound_by_compute_or_by_its_link() -> None:
    card = find_card("nvidia GeForce rtx-4090")
    assert card.memory == 24
    resident, small, large = (
        settings_from_config(llama_7b(*batch, sampling__distribution="uniform", **where))
        for batch, where in (((16, 1), {}), ((1, 16), {"model__frozen_in": "host"}), ((32, 1), {"model__frozen_in": "host"}))
    )
    speeds = [estimate_speed(settings, count_flops(settings), card) for settings in (resident, small, large)]
    assert [fast.bound_by for fast in speeds] == ["compute", "link", "compute"]
    assert speeds[0].fetched_bytes == 0
    assert speeds[1].fetched_bytes > 10 * speeds[2].fetched_bytes
    assert speeds[0].tokens_per_second == pytest.approx(card.tflops * 0.4e12 / count_flops(resident).flops_per_token)


@pytest.mark.parametrize(("rows", "bound_by"), [(1, "link"), (4096, "compute")])
def test_a_speed_follows_from_what_is_computed_and_fetched(rows: int, bound_by: str, directory: Path) -> None:
    config = make_config(directory, model__frozen_in="host", data__batch_size=rows, trainer__accumulate_grad_batches=2)
    settings, card = settings_from_config(config), CARDS[0]
    computed = count_flops(settings)
    speed = estimate_speed(settings, computed, card)
    rate, link = 0.4e12 * card.tflops, 0.8e9 * card.link  # as docs/memory.md and `LINK_SHARE` have it
    assert speed.compute_seconds == pytest.approx(2 * rows * LENGTH * computed.flops_per_token / rate)
    assert speed.fetch_seconds == pytest.approx(speed.fetched_bytes / link)
    assert speed.bound_by == bound_by
    assert speed.tokens_per_second == pytest.approx(2 * rows * LENGTH / max(speed.compute_seconds, speed.fetch_seconds))
    block = sum(p.nbytes for p in decoder_layers(settings.meta_model)[0].parameters())
    hidden = [(speed.hides_from_tokens + more) * computed.block_forward / rate >= block / link for more in (-1, 0)]
    assert hidden == [False, True]


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("RTX 3060 12 GB", "RTX 3060"),
        ("rtx3060 (12gb)", "RTX 3060"),
        ("4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("h100 pcie", "H100 PCIe"),
        ("a6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("b200", "B200"),
    ],
)
def test_cards_are_known_however_they_are_written(written: str, name: str) -> None:
    assert find_card(written).name == name


def test_cards_are_known_by_name() -> None:
    assert all(find_card(card.name) == card for card in CARDS)
    assert [card.memory for card in CARDS] == sorted(card.memory for card in CARDS)


@pytest.mark.parametrize(
    ("written", "error"),
    [
        ("RTX 4091", "^fit: unknown card 'RTX 4091'; did you mean 'RTX 4090'\\? Known: RTX 4060, "),
        ("banana", "^fit: unknown card 'banana'; Known: RTX 4060, "),
        ("", "^fit: unknown card ''; Known: "),
        ("A100", "^fit: 'A100' is no card that is known; did you mean 'A100 40GB' .* or 'A100 80GB' "),
        ("RTX 3060 8 GB", "^fit: 'RTX 3060 8 GB' is no card that is known; did you mean 'RTX 3060' \\(12 GB\\)"),
    ],
)
def test_a_card_that_is_not_known_is_one_line(written: str, error: str) -> None:
    with pytest.raises(UsageError, match=error):
        find_card(written, "fit")
