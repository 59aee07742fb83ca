"""Runs on several processes against the same run on one: the same draws, losses and weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.fixtures import Arguments
from tests.distributed.launch import run

LOSS, WEIGHTS = 1e-5, 1e-4


class Result:
    """What a run left behind."""

    def __init__(self, folder: Path) -> None:
        run_folder = folder / "runs" / "version_0"
        history = run_folder / "sampling_history.csv"
        self.draws = history.read_text() if history.exists() else None
        self.ranks: list[dict[str, Any]] = [json.loads(p.read_text()) for p in sorted((folder / "probe").glob("rank*.json"))]
        self.losses: list[float] = self.ranks[0]["losses"]
        self.weights: dict[str, Tensor] = load_file(run_folder / "model" / "model.safetensors")


def result(folder: Path, arguments: Arguments, *more: str, ranks: int = 1, strategy: str = "auto", **shape: object) -> Result:
    probe = ["--trainer.callbacks+=tests.distributed.probe.Probe", f"--trainer.callbacks.folder={folder / 'probe'}"]
    run(arguments(*more, *probe, ranks=ranks, strategy=strategy, runs=folder / "runs", **shape), folder, ranks)
    return Result(folder)


def assert_equal(one: Result, other: Result) -> None:
    assert other.draws == one.draws
    torch.testing.assert_close(torch.tensor(other.losses), torch.tensor(one.losses), rtol=LOSS, atol=LOSS)
    for name, weight in one.weights.items():
        assert (other.weights[name] - weight).norm() <= WEIGHTS * weight.norm(), name


STEPS = ["--trainer.max_steps=9", "--sampling.interval_steps=3"]  # three draws
# An uneven width, which 2 and 4 ranks can't divide: some matrices then lie with the projected dimension sharded.
CASES: dict[str, tuple[list[str], dict[str, object]]] = {
    "plain": (STEPS, {}),
    "uneven-tied": (
        [
            *STEPS,
            "--trainer.accumulate_grad_batches=2",
            "--model.gradient_checkpointing=true",
            "--model.project_embeddings=true",
        ],
        {"intermediate_size": 67, "hidden_size": 36, "num_attention_heads": 6, "tie_word_embeddings": True},
    ),
    "packed": ([*STEPS, "--data.packing=true", "--data.max_seq_length=128"], {}),
    "resting": ([*STEPS, "--sampling.resting_rank=3", "--trainer.accumulate_grad_batches=2"], {"intermediate_size": 67}),
    "experts": (STEPS, {"architecture": "qwen3_moe"}),  # stacks of experts, which transformers fuses when it loads them
}


RANKS = {"uneven-tied": 4}  # 2 for others


@pytest.mark.parametrize("case", [case if case == "plain" else pytest.param(case, marks=pytest.mark.slow) for case in CASES])
def test_several_processes_equal_one(case: str, arguments: Arguments, tmp_path: Path) -> None:
    more, shape = CASES[case]
    one = result(tmp_path / "one", arguments, *more, **shape)
    for strategy in ("fsdp2", "ddp_layerwise"):
        several = result(tmp_path / strategy, arguments, *more, ranks=RANKS.get(case, 2), strategy=strategy, **shape)
        assert_equal(one, several)
        if (case, strategy) == ("plain", "fsdp2"):  # every width can be divided
            assert_state_is_sharded(one, several)


def assert_state_is_sharded(one: Result, several: Result) -> None:
    """The optimizer's moments lie as the weights do: each rank has its part."""
    whole, parts = one.ranks[0]["state"], [rank["state"] for rank in several.ranks]
    assert all(part.keys() == whole.keys() for part in parts)
    for name, shapes in whole.items():
        moments = [sum(math.prod(shape) for shape in part[name][-2:]) for part in parts]
        assert sum(moments) == sum(math.prod(shape) for shape in shapes[-2:]), name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "ddp_layerwise"])
def test_an_ordinary_step_communicates_no_more_than_it_must(strategy: str, arguments: Arguments, tmp_path: Path) -> None:
    settings = ["--trainer.max_steps=3", "--sampling.always_train=[norm]"]
    two = result(tmp_path, arguments, *settings, ranks=2, strategy=strategy)
    shapes = {name: weight.shape for name, weight in two.weights.items()}
    trained = [shape for name, shape in shapes.items() if f"causal_lm.model.{name}" not in two.ranks[0]["frozen"]]
    renewing, ordinary = two.ranks[0]["sent"][0], two.ranks[0]["sent"][1]
    if strategy == "fsdp2":
        # The step's loss, targets, tokens and notes, and its norm; what is frozen reduces no gradient.
        assert ordinary["allreduce"] <= 5
        assert "broadcast" not in ordinary
        assert ordinary["reduce_scatter"] == sum(math.prod(shape) for shape in trained)
        assert renewing["allgather"] > ordinary["allgather"]
    else:
        projected = sum(max(shape) * 8 if len(shape) == 2 else shape[0] for shape in trained)
        flags = len(trained)  # of each, whether it has a gradient anywhere
        assert ordinary.keys() == {"allreduce"}
        assert (
            projected + flags <= ordinary["allreduce"] <= projected + flags + 4
        )  # of the step, as above; the norm is the same everywhere
        assert renewing["allreduce"] - ordinary["allreduce"] == sum(math.prod(s) for s in trained if len(s) == 2)
