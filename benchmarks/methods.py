"""The methods side by side: each one as its users run it, ready for one and the same training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from ows_lightning.models.decoder import decoder_layers, non_block_parameters
from ows_lightning.models.loss import next_token_loss
from ows_lightning.offload.offloader import BlockOffloader
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.optim.param_groups import galore_param_groups
from ows_lightning.sampling.activation import activate_blocks
from ows_lightning.sampling.distributions import sampling_probabilities
from ows_lightning.sampling.draws import draw_blocks

LR = 1e-4


@dataclass(frozen=True)
class Setting:
    """What the methods share.

    Attributes:
        rank: Rank r of projected gradients.
        interval: Optimizer steps K between two draws of blocks.
        probabilities: Each block's probability in OWS, shape (num_layers,).
        seed: Seed of the draws, the same for all methods.
    """

    rank: int
    interval: int
    probabilities: Tensor
    seed: int


@dataclass
class Training:
    """A method in the loop.

    Attributes:
        model: The model that the loss is computed with.
        optimizer: Steps after every batch.
        loss: From the model and a micro-batch to the mean loss of its targets.
        draw: Called at the start of every interval.
    """

    model: nn.Module
    optimizer: Optimizer
    loss: Callable[[Any, dict[str, Tensor]], Tensor] = lambda model, batch: model(**batch).loss
    draw: Callable[[], None] = lambda: None


def full(model: PreTrainedModel, setting: Setting) -> Training:
    """Full fine-tuning."""
    return Training(model, _adamw(model.parameters()))


def lora(model: PreTrainedModel, setting: Setting) -> Training:
    """LoRA, r = 16 on every linear layer of the blocks. Adapters in the weights' dtype, faster than peft's default."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    return Training(adapted, _adamw(p for p in adapted.parameters() if p.requires_grad))


def galore(model: PreTrainedModel, setting: Setting) -> Training:
    """GaLore as published: every matrix of the blocks projected, embeddings and head in full rank."""
    return Training(model, _galore_torch(model, setting, scale=0.25))


def lisa(model: PreTrainedModel, setting: Setting) -> Training:
    """LISA as in LMFlow: two blocks drawn uniformly beside embeddings, head and norm; optimizer states are kept."""
    uniform = sampling_probabilities(setting.probabilities, "uniform")
    return Training(model, _adamw(model.parameters()), draw=_draws(model, uniform, 2, setting))


def ows_published(model: PreTrainedModel, setting: Setting) -> Training:
    """OWS as in the authors' code: five blocks by galore-torch, the rest in full rank; optimizer states are kept."""
    optimizer = _galore_torch(model, setting, scale=1.0)
    return Training(model, optimizer, draw=_draws(model, setting.probabilities, 5, setting))


def badam(model: PreTrainedModel, setting: Setting) -> Training:
    """BAdam: one block at a time, in random order, with a float32 copy of it."""
    from badam import BlockOptimizer

    if model.is_gradient_checkpointing:
        model.disable_input_require_grads()  # what BAdam's callback does in a Trainer
    optimizer = BlockOptimizer(
        base_optimizer=_adamw(model.parameters()),
        named_parameters_list=list(model.named_parameters()),
        switch_block_every=setting.interval,
        switch_mode="random",
    )
    return Training(model, optimizer)


def ours(
    model: PreTrainedModel,
    setting: Setting,
    project_embeddings: bool = False,
    frozen: Sequence[str] = (),
    make_optimizer: Callable[..., Optimizer] = GaLoreAdamW,
    grouping: float = 0.0,
    factored: bool = True,
    resting_rank: int = 0,
    active: int = 5,
) -> Training:
    """This package. Embeddings and head train in full rank, unless they are projected like the blocks, or ``frozen``.

    Without ``factored``, gradients are whole, and projected as soon as they are there.
    """
    if model.is_gradient_checkpointing:
        model.disable_input_require_grads()  # as CausalLMModule does
    groups = galore_param_groups(model, rank=setting.rank, project_embeddings=project_embeddings)
    optimizer = make_optimizer(groups, lr=LR)
    if isinstance(optimizer, GaLoreAdamW):
        optimizer.project_in_backward(model=model if factored else None)
    outside = non_block_parameters(model)
    others = [(p, False) for part in frozen for p in outside[part]]

    def loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
        total, targets = next_token_loss(model, batch)
        return total / targets

    draw = _draws(model, setting.probabilities, active, setting, others, [optimizer], grouping, resting_rank)
    return Training(model, optimizer, loss, draw)


ours_frozen = partial(ours, frozen=("embeddings", "lm_head"))


def ours_host(model: PreTrainedModel, setting: Setting) -> Training:
    """Ours with frozen blocks in host memory, from where they pass through two slots on the device."""
    training = ours_frozen(model, setting)
    offloader, draw = BlockOffloader(decoder_layers(model)), training.draw
    offloader.set_device(model.device)

    def draw_and_apply() -> None:
        draw()
        offloader.apply_draw([training.optimizer])

    return replace(training, draw=draw_and_apply)


def ours_thin(model: PreTrainedModel, setting: Setting) -> Training:
    """Ours with more blocks in a smaller rank: two thirds of them, in a quarter of it."""
    thin = replace(setting, rank=setting.rank // 4)
    return ours_frozen(model, thin, active=2 * len(setting.probabilities) // 3)


class NoSteps(Optimizer):
    """Leaves the weights as they are, so that forward and backward are measured alone; gradients are whole, not projected."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Does nothing."""


METHODS: dict[str, tuple[str, Callable[[PreTrainedModel, Setting], Training]]] = {
    "full": ("Full AdamW", full),
    "lora": ("LoRA r=16 (peft)", lora),
    "galore": ("GaLore (galore-torch)", galore),
    "lisa": ("LISA, 2 blocks", lisa),
    "ows_published": ("OWS as published", ows_published),
    "badam": ("BAdam", badam),
    "ours_full_rank": ("Ours, embeddings full rank", ours),
    "ours_low_rank": ("Ours, embeddings low rank", partial(ours, project_embeddings=True)),
    "ours_frozen": ("Ours, embeddings frozen", ours_frozen),
    "ours_host": ("Ours, embeddings frozen, blocks on the host", ours_host),
    "ours_grouped": ("Ours, embeddings frozen, grouping 1", partial(ours_frozen, grouping=1.0)),
    "ours_resting": ("Ours, embeddings frozen, resting rank 16", partial(ours_frozen, resting_rank=16)),
    "ours_thin": ("Ours, embeddings frozen, two thirds of the blocks in a quarter of the rank", ours_thin),
    "ours_grouped_resting": (
        "Ours, embeddings frozen, grouping 1, resting rank 16", partial(ours_frozen, grouping=1.0, resting_rank=16)
    ),
    "ours_whole": (
        "Ours, embeddings frozen, grouping 1, whole gradients", partial(ours_frozen, grouping=1.0, factored=False)
    ),
    "forward_backward": ("Forward and backward of ours, grouping 0", partial(ours_frozen, make_optimizer=NoSteps)),
}  # fmt: skip
"""Key -> how tables call the method, and what sets it up."""

PACKAGES = {"lora": "peft", "galore": "galore_torch", "ows_published": "galore_torch", "badam": "badam"}
"""Key -> the peer's package, from the extra ``benchmarks``."""


def _draws(
    model: PreTrainedModel,
    probabilities: Tensor,
    count: int,
    setting: Setting,
    others: Sequence[tuple[nn.Parameter, bool]] = (),
    optimizers: Sequence[Optimizer] = (),
    grouping: float = 0.0,
    resting_rank: int = 0,
) -> Callable[[], None]:
    layers, generator = decoder_layers(model), torch.Generator().manual_seed(setting.seed)

    def draw() -> None:
        blocks = draw_blocks(probabilities, count, generator, grouping)
        activate_blocks(layers, blocks, others, optimizers, resting_rank, generator.initial_seed())

    return draw


def _adamw(params: Iterable[Tensor]) -> Optimizer:
    return torch.optim.AdamW(params, lr=LR, weight_decay=0.0, fused=True)  # fused is the default of transformers' Trainer


def _galore_torch(model: PreTrainedModel, setting: Setting, scale: float) -> Optimizer:
    from galore_torch import GaLoreAdamW as GaLoreTorchAdamW

    matrices = [p for p in decoder_layers(model).parameters() if p.dim() == 2]
    projected = set(matrices)
    groups = [
        {"params": [p for p in model.parameters() if p not in projected]},
        {"params": matrices, "rank": setting.rank, "update_proj_gap": 200, "scale": scale, "proj_type": "std"},
    ]
    return GaLoreTorchAdamW(groups, lr=LR, no_deprecation_warning=True)
