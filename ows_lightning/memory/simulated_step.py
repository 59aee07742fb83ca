"""A training step under a MemoryTracker, the same for real and for fake models and for every method that `plan` compares."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ows_lightning.compat import in_backward, own_parameters
from ows_lightning.memory.tracker import HOST, MemoryTracker
from ows_lightning.models.decoder import NON_BLOCK_PARTS, backbone, decoder_layers, language_model_of
from ows_lightning.models.execution import count_checkpointed
from ows_lightning.models.large_tensors import rows_at_a_time
from ows_lightning.models.loss import next_token_loss
from ows_lightning.optim.galore import GaLoreAdamW, ProjType
from ows_lightning.optim.linear import set_updates
from ows_lightning.optim.param_groups import galore_param_groups
from ows_lightning.optim.subspace import SubspaceMethod
from ows_lightning.sampling.activation import activate_blocks, non_block_trains, trainable_by_block
from ows_lightning.step import gradients_of

_NOT_TRACKED = "between"


@dataclass(frozen=True)
class TrainingMethod:
    """How a method trains, as far as memory depends on it."""

    optimizer: Callable[[Any], Optimizer]  # from parameters or groups
    activated_layers: int | None = None  # blocks that train at a time; None trains all
    always_train: tuple[str, ...] = NON_BLOCK_PARTS  # what trains outside the blocks
    rank: int | None = None  # of the projected gradients; None trains in full rank
    proj_type: ProjType = "std"
    subspace: SubspaceMethod = "randomized"
    project_embeddings: bool = False  # and the LM head
    ours: bool = False  # chunked loss, projection within backward; else all logits, and all gradients at once
    factored: bool = False  # gradients of linear layers are projected as factors, see `project_in_backward`
    keeps_states: bool = False  # optimizer states of blocks that are frozen again stay
    lora: dict[str, Any] | None = field(default=None, hash=False)  # of peft's LoraConfig
    resting_rank: int = 0  # in which frozen blocks above the lowest active one train
    distribution: str | None = None  # `uniform`, or None for the config's own

    def active_blocks(self, count: int) -> int:
        """How many of a model's blocks train at a time."""
        return count if self.activated_layers is None else min(self.activated_layers, count)


@dataclass(frozen=True)
class Workload:
    """What a step works on."""

    batch_size: int  # rows of a micro-batch
    length: int  # tokens in a row; every one is a target
    accumulates: bool = False  # it is the last of several micro-batches in a step
    autocast: torch.dtype | None = None  # of mixed precision; None computes in the weights' own
    on_gpu: bool = False  # the CPU stands for a GPU: what a step keeps on the host does not count
    offloads: bool = False  # frozen blocks, beside whose weights the device keeps what they learn at rest
    renews_while_active: bool = False  # any step may, also of blocks that have moments; FLOPs count renewals apart


@dataclass(frozen=True)
class StepCosts:
    """What a method's steps took, by span: a stage of a step, and within blocks the group of the block and its place there."""

    peaks: dict[tuple[Any, ...], dict[str, int]]  # span -> category -> bytes, at the span's peak
    trained: int  # parameters that train at a time
    consumed: int  # bytes of the gradients that the optimizer consumes: projected ones where there is a rank
    flops: dict[tuple[Any, ...], int] = field(default_factory=dict)  # span -> those of its matrix products


def simulate_steps(model: nn.Module, method: TrainingMethod, work: Workload, tracker: MemoryTracker) -> StepCosts:
    """Takes a method's worst optimizer steps under a tracker: the first one after a draw, which finds subspaces, and another.

    Of all draws, the one that costs most is taken: the lowest block trains, so that activations are kept from there up, and so
    do the highest ones, whose gradients come when most activations are still there. The model is a causal LM on the CPU, maybe
    within a peft model, real (its weights are changed) or fake (the tracker, a new one, runs its operators).
    """
    with tracker:
        tracker.label("weights", [*model.parameters(), *model.buffers()])
        simulation = _Simulation(model, method, work, tracker)
        simulation.prepare()
        everything_has_state = method.keeps_states or method.activated_layers is None
        for renews in (True,) if everything_has_state and method.rank is None else (True, False):
            for group in (group for group in simulation.optimizer.param_groups if "update_proj_gap" in group):
                group["update_proj_gap"] = 1 if renews or work.renews_while_active else 1 << 30
            hooks = simulation.watch_gradients(renews)
            consumed = simulation.step(renews)
            for hook in hooks:
                hook.remove()
    peaks = {span: sizes for span, sizes in tracker.peaks().items() if span and _NOT_TRACKED not in span[-1]}
    return StepCosts(peaks, sum(p.numel() for p in _trainable(model)), consumed, dict(tracker.flops))


class _Simulation:
    """A model that a method trains under a tracker."""

    def __init__(self, model: nn.Module, method: TrainingMethod, work: Workload, tracker: MemoryTracker) -> None:
        self.model, self.method, self.work, self.tracker = model, method, work, tracker
        groups: Any = _trainable(model)
        if method.rank is not None:
            names = ("rank", "proj_type", "subspace", "project_embeddings")
            groups = galore_param_groups(model, **{name: getattr(method, name) for name in names})
        self.optimizer = method.optimizer(groups)
        self.galore = self.optimizer if isinstance(self.optimizer, GaLoreAdamW) else None

    def prepare(self) -> None:
        """Brings the optimizer into the state that it has before the steps that are measured."""
        model, method, count = self.model, self.method, len(decoder_layers(self.model))
        active = method.active_blocks(count)
        self._watch_stages(_block_spans(block_groups(active, count - active, count_checkpointed(model))))
        in_blocks, others = trainable_by_block(model), non_block_trains(model, method.always_train)

        def draw(blocks: Sequence[int]) -> None:
            if method.activated_layers is not None:
                optimizers = [] if method.keeps_states else [self.optimizer]
                activate_blocks(in_blocks, blocks, others.items(), optimizers, method.resting_rank)

        def take_empty_step(parameters: Iterable[nn.Parameter]) -> None:
            for p in parameters:
                p.grad = torch.zeros_like(p)
            self.optimizer.step()
            self.optimizer.zero_grad()

        if self.work.offloads and self.galore is not None:
            self.galore.keep_updates_separate(decoder_layers(model).parameters(), merge=lambda weights: None)
        # What has a state by then: what trains always, every block if states are kept, or at rest.
        draw(range(count) if method.keeps_states else ())
        take_empty_step(_trainable(model))
        draw([0, *range(count - active + 1, count)])
        take_empty_step(p for p in _trainable(model) if self._rests(p))
        self._label_states()

    def step(self, renews: bool) -> int:
        """Takes one training step, CausalLMModule's or the usual one of other tools; returns the bytes of its gradients."""
        model, method, work, tracker = self.model, self.method, self.work, self.tracker
        language_model: Any = language_model_of(model)
        if work.accumulates:
            # Earlier micro-batches leave nothing but gradients, and need no more than the last one does beside those.
            tracker.begin_span(())
            if self.galore is not None:
                self.galore.accumulating = True
            for p in _trainable(model):
                p.backward(torch.zeros_like(p))
        if self.galore is not None:
            self.galore.accumulating = False
        tracker.begin_span((renews, "forward"))
        batch = _batch(work, _trainable(model)[0].device)
        tracker.category = "activations"
        device = torch.device("cuda" if work.on_gpu else "cpu")
        # Lightning keeps no low-precision copies of weights between operators; torch's default is to keep them.
        with torch.autocast("cpu", work.autocast, cache_enabled=not method.ours) if work.autocast else nullcontext():
            loss = next_token_loss(language_model, batch, device)[0] if method.ours else model(**batch, use_cache=False).loss
        loss.backward()
        del loss, batch
        tracker.category = "other"
        tracker.begin_span((renews, "step"))
        gradients = gradients_of(self.optimizer) if method.ours else [p.grad for p in _trainable(model) if p.grad is not None]
        consumed = sum(gradient.nbytes for gradient in gradients)
        torch.nn.utils.get_total_norm(gradients)
        del gradients
        self.optimizer.step()
        self._label_states()
        self.optimizer.zero_grad()
        return consumed

    def watch_gradients(self, renews: bool) -> list[RemovableHandle]:
        """Registers hooks for a step that tell the tracker which tensors are gradients, and what is computed from them."""
        galore, tracker, on_gpu = self.galore, self.tracker, self.work.on_gpu
        held: list[Any] = []  # from `begin` to `end`: the category before, and the part that arrives of an offloaded gradient

        def begin(p: Tensor) -> None:
            held[:], tracker.category = [tracker.category], "gradients"
            offloaded = galore.offloaded_gradients.get(p) if galore else None
            if offloaded is not None and on_gpu:
                held.append(offloaded.new_empty(min(offloaded.numel(), rows_at_a_time(1, torch.device("cuda")))))
            tracker.label("gradients", [p.grad, None if on_gpu else offloaded])
            tracker.category = "other"

        def end(p: Tensor) -> None:
            tracker.category = held[0]
            held.clear()
            if galore is not None:
                tracker.label("gradients", [galore.projected_gradients.get(p)])
                if p in galore.sketches:
                    sketch, projected, _ = galore.sketches[p]
                    tracker.label("projectors", [sketch.basis])
                    tracker.label("gradients", [projected])
                if on_gpu:
                    tracker.label(HOST, [galore.offloaded_gradients.get(p)])

        parameters = _trainable(self.model)
        if self.method.factored:
            # A hook would call for the gradients that linear layers do without in this step.
            linear = [module for module in decoder_layers(self.model).modules() if isinstance(module, nn.Linear)]
            factors = {own_parameters(module).get("weight") for module in linear}
            whole = renews or self.work.renews_while_active
            parameters = [p for p in parameters if p not in factors or (whole and not self._rests(p))]
        hooks = [p.register_hook(lambda gradient: tracker.label("gradients", [gradient])) for p in parameters]
        hooks += [p.register_post_accumulate_grad_hook(begin) for p in parameters]
        if galore is not None and self.method.ours:
            galore.project_in_backward(model=self.model if self.method.factored else None)
            for block in decoder_layers(self.model):
                set_updates(block, galore.resting_updates(block.parameters()))
        return [*hooks, *(p.register_post_accumulate_grad_hook(end) for p in parameters)]

    def _watch_stages(self, block_spans: Sequence[str]) -> None:
        """Registers the hooks that tell the tracker where in a step it is."""

        def stage(name: str, category: str = "activations") -> None:
            if self.galore is not None:
                self.tracker.label("gradients", self.galore.projected_gradients.values())
            self.tracker.begin_span((self.tracker.span[0], name))
            self.tracker.category = category

        def enter_block(index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if in_backward():
                return  # recomputed within backward
            stage(f"forward {block_spans[index]}")
            hidden = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))
            if index and hidden.requires_grad:  # once its gradient is there, backward goes on to the block below
                hidden.register_hook(lambda _: stage(f"backward {block_spans[index - 1]}"))

        def leave_decoder(decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            stage("loss_head", "loss_head")
            output.last_hidden_state.register_hook(lambda _: stage(f"backward {block_spans[-1]}"))

        for index, layer in enumerate(decoder_layers(self.model)):
            layer.register_forward_pre_hook(partial(enter_block, index), with_kwargs=True)
        backbone(language_model_of(self.model)).register_forward_hook(leave_decoder)

    def _rests(self, p: nn.Parameter) -> bool:
        return self.galore is not None and self.galore.is_resting(p)

    def _label_states(self) -> None:
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim():
                    self.tracker.label("projectors" if key == "projector" else "moments", [value])
        if self.galore is not None:
            self.tracker.label("projectors", self.galore.resting_projectors.values())


def _batch(work: Workload, device: torch.device) -> dict[str, Tensor]:
    ids = torch.zeros((work.batch_size, work.length), dtype=torch.int64, device=device)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # padding somewhere, so that attention gets a mask
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": mask}


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def block_groups(active: int, frozen: int, num_checkpointed: int) -> dict[str, int]:
    """Returns the sizes of the groups of blocks above the lowest one, upwards; that and the highest ones are active."""
    above = max(0, num_checkpointed - 1)
    some, more = min(frozen, above), min(active - 1, max(0, above - frozen))
    return {"frozen": some, "frozen, kept": frozen - some, "active": more, "active, kept": active - 1 - more}


def _block_spans(groups: dict[str, int]) -> list[str]:
    """Returns a span name for each block: `lowest`, or its group and `first` or `last`.

    Blocks in between share `_NOT_TRACKED`, since memory rises or falls evenly in a group: its peak lies at one of its ends.
    """
    names = ["lowest"]
    for kind, size in groups.items():
        if size:
            names += [f"{kind}, first", *[_NOT_TRACKED] * (size - 2), f"{kind}, last"][-size:]
    return names
