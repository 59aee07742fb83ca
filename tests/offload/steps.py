"""Plain training loops over tiny models, with and without an offloader, whose results are compared to the bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ows_lightning.models.decoder import decoder_layers, language_model_of, non_block_parameters
from ows_lightning.offload.offloader import BlockOffloader
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.optim.param_groups import galore_param_groups
from ows_lightning.sampling.activation import activate_blocks, unfreeze
from tests.offload.fake_gpu import POISON
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


class LateOffloader(BlockOffloader):
    """Fetches at the last moment, and has NaN in its slots whenever no block computes from them."""

    def issue(self, block: int, slot: int) -> None:
        self.slots[slot].fill_(POISON)

    def wait(self, block: int, slot: int) -> None:
        super().issue(block, slot)
        super().wait(block, slot)

    def release(self, block: int, slot: int) -> None:
        super().release(block, slot)
        self.slots[slot].fill_(POISON)


def train(
    model: nn.Module,
    offloader: BlockOffloader | None = None,
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
    unfreeze(model)  # of an earlier call: an optimizer gets all that may ever train
    optimizer = GaLoreAdamW(galore_param_groups(model, rank=4, update_proj_gap=3), lr=1e-2)
    optimizer.project_in_backward()
    if resting_rank and offloader is not None:
        offloader.attach_optimizer(optimizer)
    outside = non_block_parameters(model)
    others = [(p, embeddings or part == "norm") for part, parameters in outside.items() for p in parameters]
    for number, active in enumerate(draws):
        language_model_of(model).frozen_by_sampling = activate_blocks(layers, active, others, [optimizer], resting_rank)
        if offloader is not None:
            offloader.apply_draw([optimizer])
        for step in range(steps_per_draw):
            for micro in range(accumulate):
                optimizer.accumulating = micro + 1 < accumulate
                torch.manual_seed(100 * number + 10 * step + micro)
                batch = {k: v.to(device) for k, v in tiny_batch(seed=100 * number + 10 * step + micro).items()}
                with torch.autocast(device, torch.bfloat16, enabled=autocast):
                    loss = model(**batch, use_cache=False).loss
                    loss.backward()
                run.losses.append(loss.detach().cpu())
            run.gradients.append({str(i): g.cpu().clone() for i, g in enumerate(optimizer.gradients())})
            optimizer.step()
            optimizer.zero_grad()
            if validate:
                run.losses += list(evaluate(model))
    if resting_rank:
        with torch.no_grad():  # after which blocks are fetched that rest
            run.losses.append(model(**batch, use_cache=False).loss.cpu())
        activate_blocks(layers, [], others, [optimizer])  # what was learned at rest is written into the weights
        with torch.no_grad(), contextlib.nullcontext() if offloader is None else offloader.on_device(layers[-1]):
            run.losses.append(torch.stack([p.sum() for p in layers[-1].parameters()]).cpu())
    run.weights = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    return run


def evaluate(model: nn.Module) -> Iterator[Tensor]:
    """A validation loss and generated tokens, then training again."""
    model.eval()
    with torch.inference_mode():
        yield model(**tiny_batch(seed=7)).loss.clone()
        yield model.generate(tiny_batch(rows=1, length=4)["input_ids"], max_new_tokens=3, do_sample=False).clone().float()
    model.train()
