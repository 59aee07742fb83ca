"""Plain training loops over tiny models, with and without a offloader, whose results are compared to the bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ows_lightning.models.decoder import decoder_layers, non_block_parameters
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.optim.param_groups import galore_param_groups
from ows_lightning.sampling.activation import activate_blocks
from ows_lightning.streaming.disk import Disk
from ows_lightning.streaming.offloader import BlockOffloader
from tests.tiny import tiny_batch

DRAWS = [[1], [3], [0, 2]]


@dataclass
class Run:
    """What a run computed, all of it."""

    losses: list[Tensor] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def assert_equals(self, other: Run) -> None:
        torch.testing.assert_close(self.losses, other.losses, rtol=0, atol=0)
        torch.testing.assert_close(self.gradients, other.gradients, rtol=0, atol=0)
        torch.testing.assert_close(self.weights, other.weights, rtol=0, atol=0)


class LateStream:
    """A device whose fetches are as late as they may be, and whose slots hold NaN at all other times."""

    def __init__(self) -> None:
        self.offloader: Any = None
        self.fetches: dict[int, Callable[[], None]] = {}
        self.fetching = False

    def issue(self, slot: int, fetch: Callable[[], None]) -> None:
        self.fetches[slot] = fetch
        self._poison(slot)

    def wait(self, slot: int) -> None:
        self.fetching = True
        self.fetches[slot]()
        self.fetching = False

    def release(self, slot: int) -> None:
        self._poison(slot)

    def after_computation(self) -> None:
        pass

    def synchronize(self) -> None:
        self.fetches.clear()  # what is waited for has to be fetched again

    def _poison(self, slot: int) -> None:
        self.offloader.slots[slot].fill_(255)  # NaN in float32 and in bfloat16


class NoComputeOnOffloaded(TorchDispatchMode):
    """Refuses every operator on a weight in host memory, other than its fetch."""

    LOOKS = ("aten::detach", "aten::alias", "aten::_has_compatible_shallow_copy_type")

    def __init__(self, offloader: BlockOffloader, stream: LateStream) -> None:
        super().__init__()
        offloader.prepare()
        waiting = [weight for block in offloader.timeline.order for weight in offloader.offloaded[block].tensors]
        self.offloaded = {weight.untyped_storage().data_ptr() for weight in waiting}
        self.stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.stream.fetching and func.name() not in self.LOOKS:
            for value in (*args, *(kwargs or {}).values()):
                for tensor in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in self.offloaded:
                        raise AssertionError(f"{func} on a weight in host memory")
        return func(*args, **(kwargs or {}))


def strict_offloader(
    model: nn.Module, slots: int = 2, frozen_only: bool = False, disk: Disk | None = None
) -> tuple[BlockOffloader, Callable[[], Any]]:
    """A offloader on a device that forgives nothing, and the mode to train in."""
    stream = LateStream()
    offloader = BlockOffloader(decoder_layers(model), slots=slots, frozen_only=frozen_only, stream=stream, disk=disk)
    stream.offloader = offloader
    return offloader, lambda: NoComputeOnOffloaded(offloader, stream)


def train(
    model: nn.Module,
    offloader: BlockOffloader | None = None,
    mode: Callable[[], Any] = contextlib.nullcontext,
    draws: list[list[int]] = DRAWS,
    embeddings: bool = False,
    accumulate: int = 2,
    steps_per_draw: int = 1,
    autocast: bool = False,
    validate: bool = False,
    device: str = "cpu",
    resting_rank: int = 0,
) -> Run:
    """Trains with redraws, accumulation and projection in backward, and other blocks at rest."""
    run, layers = Run(), decoder_layers(model)
    optimizer = GaLoreAdamW(galore_param_groups(model, rank=4, update_proj_gap=3), lr=1e-2)
    optimizer.project_in_backward()
    if resting_rank and offloader is not None:
        offloader.rest_with(optimizer)
    outside = non_block_parameters(model)
    others = [(p, embeddings or part == "norm") for part, parameters in outside.items() for p in parameters]
    for number, active in enumerate(draws):
        activate_blocks(layers, active, others, [optimizer], resting_rank)
        if offloader is not None:
            offloader.apply_draw([optimizer])
        for step in range(steps_per_draw):
            for micro in range(accumulate):
                optimizer.accumulating = micro + 1 < accumulate
                torch.manual_seed(100 * number + 10 * step + micro)
                batch = {k: v.to(device) for k, v in tiny_batch(seed=100 * number + 10 * step + micro).items()}
                with mode(), torch.autocast(device, torch.bfloat16, enabled=autocast):
                    loss = model(**batch, use_cache=False).loss
                    loss.backward()
                run.losses.append(loss.detach().cpu())
            run.gradients.append({str(i): g.cpu().clone() for i, g in enumerate(optimizer.gradients())})
            optimizer.step()
            optimizer.zero_grad()
            if validate:
                run.losses += list(evaluate(model, mode))
    if resting_rank:
        with torch.no_grad():  # after which blocks are fetched that rest
            run.losses.append(model(**batch, use_cache=False).loss.cpu())
        activate_blocks(layers, [], others, [optimizer])  # what was learned at rest is written into the weights
        with torch.no_grad(), contextlib.nullcontext() if offloader is None else offloader.resident(layers[-1]):
            run.losses.append(torch.stack([p.sum() for p in layers[-1].parameters()]).cpu())
    run.weights = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    return run


def evaluate(model: nn.Module, mode: Callable[[], Any] = contextlib.nullcontext) -> Iterator[Tensor]:
    """A held-out loss and generated tokens, then training again."""
    model.eval()
    with torch.inference_mode(), mode():
        yield model(**tiny_batch(seed=7)).loss.clone()
        yield model.generate(tiny_batch(rows=1, length=4)["input_ids"], max_new_tokens=3, do_sample=False).clone().float()
    model.train()
