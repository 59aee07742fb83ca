"""What is measured on a card: rows by part, each a dict that ``measure`` understands."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.models import WORKLOADS

Row = dict[str, Any]
"""``part`` and ``name``; ``config`` (as the command line parses it) or ``method``; ``limit``, the seconds that it may take."""

WARM_UP = 2  # optimizer steps; the first of them has the first draw
ASLEEP = ("nothing", "fetch", "computation", "packing")
"""What sleeps in an adversarial run: a fetch before it copies, a block before it computes, the packing of int8 before it."""

_OURS = {"class_path": "GaLoreAdamW", "init_args": {"lr": 1e-4}}
_ADAMW: dict[str, Any] = {
    "model__rank": None,
    "model__optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}},
}
_FULL = {**_ADAMW, "sampling": None}
_LORA = {**_FULL, "model__lora": {"r": 16, "target_modules": "all-linear"}}
_ALL = ["embeddings", "lm_head", "norm"]
_HOST = {"model__frozen_in": "host"}
_ACCUMULATED = {"data__batch_size": 1, "trainer__accumulate_grad_batches": 8}

# Peak memory beside plan's, on a Llama of 1.1e9 weights (TinyLlama's shape). The highest and the lowest block train: the
# draw that plan takes.
PLANNED: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, checkpointing": {"model__gradient_checkpointing": True},
    "ours, 11 of 22 blocks recompute": {"model__gradient_checkpointing": 11},
    "ours, 1 x 512 accumulated 8 times": _ACCUMULATED,
    "ours, two blocks": {"sampling__activated_layers": 2},
    "ours, embeddings and head in full rank": {"sampling__always_train": _ALL},
    "ours, embeddings and head in low rank": {"sampling__always_train": _ALL, "model__project_embeddings": True},
    "ours in full rank (AdamW)": _ADAMW,
    "GaLore, every block": {"sampling": None},
    "full AdamW": _FULL,
    "LoRA r=16": _LORA,
    "LoRA r=16, checkpointing": {**_LORA, "model__gradient_checkpointing": True},
    "ours, host": _HOST,
    "ours, host, checkpointing, accumulated": {**_HOST, **_ACCUMULATED, "model__gradient_checkpointing": True},
    "LoRA r=16, host": {**_LORA, **_HOST},
    "ours, int8 on the device": {"model__frozen_dtype": "int8"},
    "ours, int8 on the host": {**_HOST, "model__frozen_dtype": "int8"},
    "ours in float32": {"trainer__precision": "32-true"},
    "ours in bf16-mixed": {"trainer__precision": "bf16-mixed"},
}


def rows(model: str, directory: str) -> list[Row]:
    """Returns all rows in the order of their weight: what comes last is skipped first when time runs out.

    Args:
        model: Whose step times are measured: ``llama2-7b-random``, ``llama-1b-random`` on a small card, ``tiny`` in a dry run.
        directory: Where the configs of the models with random weights are.
    """
    dry = model == "tiny"
    small = "tiny" if dry else "llama-1b-random"
    length, batch = (16 if dry else 512), (2 if model == small else 8)  # a small card has neither memory nor time for more
    workload = WORKLOADS[model]
    common = {"sampling__distribution": list(workload.outlier_ratios or ()), "model__gradient_checkpointing": True}
    shapes = [{"data__batch_size": s.rows, "data__max_seq_length": s.length, "trainer__accumulate_grad_batches": s.accumulate}
              for s in workload.shapes]  # fmt: skip

    def ours(name: str, shape: dict[str, Any], **changes: Any) -> Row:
        config = _config(f"{directory}/{model}", workload.rank, **{**common, **shape, **changes})
        return {"part": "step", "name": name, "config": config, "draws": 4 if dry else 8, "limit": 90}

    def peer(name: str, method: str, limit: int, **changes: Any) -> Row:
        shape = list(workload.shapes[0])
        return {"part": "step", "name": name, "method": method, "model": model, "shape": shape, "limit": limit, **changes}

    planned = {"data__max_seq_length": length, "data__batch_size": batch}
    steps = [
        ours("ours", shapes[0]),
        ours("ours, grouping 1", shapes[0], sampling__grouping=1.0),
        ours("ours, host", shapes[0], **_HOST),
        peer("LoRA r=16 (peft)", "lora", 60, steps=8, interval=2),
        peer("full AdamW", "full", 60, steps=4, interval=2),
        peer("LISA, 2 blocks", "lisa", 60, steps=12, interval=2),
    ]
    more = [
        ours("ours, int8 on the host", shapes[0], **_HOST, model__frozen_dtype="int8"),
        ours("ours, int8 on the device", shapes[0], model__frozen_dtype="int8"),
        *(ours(f"ours, {where}, accumulated", shape, **changes)
          for shape in shapes[1:] for where, changes in (("device", {}), ("host", _HOST))),
        # One draw: its first step finds 35 subspaces by SVD, which takes minutes at this size.
        peer("OWS as published, one draw", "ows_published", 200, steps=4, interval=100),
    ]  # fmt: skip
    plans: list[Row] = []
    for name, changes in PLANNED.items():
        config = _config(f"{directory}/{small}", 8 if dry else 128, **{**planned, **changes})
        if config["sampling"] is not None:
            config["sampling"]["distribution"] = _lowest_and_highest(small, config["sampling"]["activated_layers"])
        plans.append({"part": "plan", "name": name, "config": config, "limit": 40})
    uniform = {"data__max_seq_length": 64, "data__batch_size": 2, "sampling__distribution": "uniform",
               "sampling__interval_steps": 4}  # fmt: skip
    waits: dict[str, dict[str, Any]] = {
        "ours": {}, "ours, accumulated": _ACCUMULATED, "ours, clipped": {"trainer__gradient_clip_val": 1.0},
        "ours, gradient_norm": {"sampling__distribution": "gradient_norm"}, "ours, host": _HOST,
    }  # fmt: skip
    # In eager attention, which adds up in the same order each time; the size of the model makes no difference.
    repeats = {**uniform, "model__attn_implementation": "eager"}
    offloads: dict[str, dict[str, Any]] = {
        "host": _HOST, "host, three slots": {**_HOST, "model__window_blocks": 3}, "disk": {"model__frozen_in": "disk"},
        "int8 on the host": {**_HOST, "model__frozen_dtype": "int8"}, "int8 on the device": {"model__frozen_dtype": "int8"},
    }  # fmt: skip
    checks: list[Row] = [
        {"part": part, "name": name, "config": _config(f"{directory}/{of}", 8, **{**common, **changes}), "limit": limit}
        for part, of, common, settings, limit in (
            ("waits", small, uniform, waits, 40), ("adversarial", "tiny", repeats, offloads, 60)
        )
        for name, changes in settings.items()
    ]  # fmt: skip
    sizes = (64, 32, 128) if dry else (8192, 4096, 32000)
    heads: list[Row] = [
        {"part": "loss head", "name": name, "head": head, "sizes": sizes, "limit": 30}
        for head in ("frozen", "trains")
        for name in ("ours", "whole", "checkpointed", "torch", "liger")
        if name != "torch" or hasattr(torch.nn.functional, "linear_cross_entropy")
    ]
    return [*steps, *checks, *plans, {"part": "tests", "name": "pytest -m gpu", "limit": 90}, *heads, *more]


def _config(name: str, rank: int, **changes: Any) -> dict[str, Any]:
    """A config as the command line parses it; changes are given as ``section__key``."""
    config: dict[str, Any] = {
        "model": {"model_name_or_path": name, "optimizer": _OURS, "rank": rank, "gradient_checkpointing": False},
        "data": {"batch_size": 1, "max_seq_length": 512},
        "sampling": {"activated_layers": 5, "interval_steps": 2, "always_train": ["norm"]},
        "trainer": {"precision": "bf16-true", "accumulate_grad_batches": 1},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name and config[section] is not None:
            config[section] = {**config[section], name: value}
        elif not name:
            config[section] = value
    return config


def _lowest_and_highest(model: str, active: int) -> list[float]:
    count = MODELS[model.rpartition("/")[2]]["num_hidden_layers"]
    return [float(block == 0 or block > count - active) for block in range(count)]


MODELS: dict[str, dict[str, Any]] = {
    name: dict(workload.source) for name, workload in WORKLOADS.items() if isinstance(workload.source, dict)
}
"""Dimensions of the Llamas that get random weights."""
