"""Callbacks, strategies, precisions and offloading that can't work with sampled or projected weights are refused."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch import callbacks as stock
from lightning.pytorch.plugins.precision import Precision

from ows_lightning.errors import UsageError

_UNSUITABLE_CALLBACKS = {
    stock.StochasticWeightAveraging: "copies the model before it is loaded; take WeightAveraging or EMAWeightAveraging",
    stock.ModelPruning: "looks for weights before they are loaded; prune the exported model by torch.nn.utils.prune",
    stock.BackboneFinetuning: "freezes a `backbone`, which the model does not have; sampling.always_train names what trains",
    stock.LearningRateFinder: "tries rates without sampling, and the schedule sets others; compare runs of a few steps",
    stock.BatchSizeFinder: "tries sizes without sampling, and the schedule keeps its steps; `plan` names a size that fits",
}
_PROJECTED = "gradients are projected in backward, before that can be undone"


def check_callbacks(callbacks: Sequence[Callback], sharded: bool = False) -> None:
    """Refuses callbacks of Lightning that can't work with CausalLMModule, or with shards of its weights: a UsageError."""
    copying = {stock.WeightAveraging: "copies the model, and fsdp2's shards can't be copied; leave it out"} if sharded else {}
    for kind, reason in (_UNSUITABLE_CALLBACKS | copying).items():
        if any(isinstance(one, kind) and not getattr(one, "_early_exit", False) for one in callbacks):  # not its Tuner's
            raise UsageError(f"trainer.callbacks: {kind.__name__} {reason}")


def check_strategy(strategy: object) -> None:
    """Refuses a strategy, or its name, in which trained blocks can't change or gradients can't be projected: a UsageError."""
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    kinds = {kind.__name__ for kind in type(strategy).__mro__}  # of pytorch_lightning, too, whose classes are others
    fixed = "DDPStrategy" in kinds and not getattr(strategy, "averages_changing_blocks", False)
    if kinds & {"FSDPStrategy", "DeepSpeedStrategy"} or re.match("fsdp(?!2$)|deepspeed", name):
        reason = "it shows the optimizer flat slices of weights, which have no singular vectors; write strategy: fsdp2"
    elif fixed and getattr(strategy, "_start_method", "popen") != "popen":
        reason = "it fixes the set of trained parameters; in a notebook set devices: 1, or start a script with ddp_layerwise"
    elif fixed or re.match("ddp(?!_layerwise$)", name):
        reason = "it fixes the set of trained parameters, and averages full gradients; write strategy: ddp_layerwise"
    else:
        return
    raise UsageError(f"trainer.strategy: {name} can't train sampled or projected weights: {reason}")


def check_unscaled(precision: Precision | str, why: str = _PROJECTED) -> None:
    """Refuses a precision, or its name, that scales the loss, as ``16-mixed`` does: a UsageError, which says why."""
    name = str(getattr(precision, "precision", precision))
    if name in ("16-mixed", "16") or getattr(precision, "scaler", None) is not None:
        raise UsageError(f"trainer.precision: {name} scales the loss, but {why}; write bf16-mixed, bf16-true or 32-true")


def offloads(settings: Mapping[str, Any]) -> bool:
    """Whether a module's settings have its frozen blocks offloaded."""
    return settings["frozen_in"] != "device" or settings["frozen_dtype"] is not None


def check_offloading(model: Mapping[str, Any], trains_unsampled: bool, devices: int, sharded: bool) -> None:
    """Refuses, by a UsageError, to offload where no block is frozen, or where several devices share the weights."""
    if not offloads(model):
        return
    frozen_in, frozen_dtype = model["frozen_in"], model["frozen_dtype"]
    key = f"model.frozen_in: {frozen_in}" if frozen_in != "device" else f"model.frozen_dtype: {frozen_dtype}"
    resident = "model.frozen_in: device" + (" without model.frozen_dtype" if frozen_dtype else "")
    if devices > 1 or sharded:
        what = "trainer.strategy: fsdp2" if sharded else f"trainer.devices: {devices}"
        hint = f"set trainer.devices: 1 and trainer.strategy: auto, or {resident} to share the weights among devices by fsdp2"
        raise UsageError(f"{key} is for one device, and {what} is set; {hint}")
    if trains_unsampled and model["lora"] is None:
        hint = f"sample blocks (`sampling`), or set model.lora or {resident}"
        raise UsageError(f"{key} needs frozen blocks, and full fine-tuning trains all of them; {hint}")
