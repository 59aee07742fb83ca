"""What people report of layerwise sampling elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from ows_lightning.models.decoder import decoder_layers
from ows_lightning.module import CausalLMModule
from ows_lightning.sampling.callback import LayerwiseSampling
from tests.regressions.runs import fit, galore
from tests.tiny import tiny_model

ModelDir = Callable[..., Path]


class States(Callback):
    """The blocks that hold optimizer state, and those that are active, after each step."""

    def __init__(self, sampling: LayerwiseSampling) -> None:
        self.sampling = sampling
        self.seen: list[tuple[list[int], list[int], int]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        state = trainer.optimizers[0].state
        blocks = [i for i, layer in enumerate(decoder_layers(pl_module)) if any(state.get(p) for p in layer.parameters())]
        size = sum(v.numel() for values in state.values() for v in values.values() if torch.is_tensor(v))
        self.seen.append((blocks, sorted(self.sampling.active_blocks), size))


@pytest.mark.parametrize("complaint", ["LMFlow 726", "LMFlow 768", "LMFlow 778"])
def test_lmflow_726_768_and_778(complaint: str, model_dir: ModelDir, tmp_path: Path) -> None:
    """LMFlow 726, LMFlow 768, LMFlow 778: LISA's memory grows until every block was active once.

    Here the state and the gradients of a block go when it is frozen again, so that their size is the same in each interval.
    """
    sampling = LayerwiseSampling(activated_layers=1, interval_steps=1, distribution="uniform", seed=int(complaint[-3:]))
    states = States(sampling)
    fit(CausalLMModule(str(model_dir()), rank=4, optimizer=galore), tmp_path, sampling, states, max_steps=8)
    assert all(blocks == active for blocks, active, _ in states.seen)
    assert len({block for blocks, _, _ in states.seen for block in blocks}) > 1
    assert len({size for _, _, size in states.seen}) == 1


def test_ms_swift_10140(model_dir: ModelDir, tmp_path: Path) -> None:
    """ms-swift 10140: blocks that were frozen before the optimizer was built never train, and nothing says so.

    Here every block that is drawn moves, also one that was frozen at the start.
    """
    module = CausalLMModule(str(model_dir()), rank=4, optimizer=galore, lr_scheduler_type="constant")
    module.configure_model()
    before = [{n: p.detach().clone() for n, p in layer.named_parameters()} for layer in decoder_layers(module)]
    sampling = LayerwiseSampling(activated_layers=2, interval_steps=1, distribution="uniform")
    states = States(sampling)
    fit(module, tmp_path, sampling, states, max_steps=10)
    drawn = {block for _, active, _ in states.seen for block in active}
    assert drawn == set(range(len(before)))
    for layer, weights in zip(decoder_layers(module), before, strict=True):
        assert not any(torch.equal(p, weights[name]) for name, p in layer.named_parameters() if p.dim() == 2)


def test_llama_factory_8927() -> None:
    """LLaMA-Factory 8927: blocks are found by the model's name, which fails for new models.

    Here they are found by structure: in a model of a name and with attributes that nobody has listed.
    """
    known = tiny_model("llama")

    class BrandNewBackbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = known.get_input_embeddings()
            self.the_stack = nn.ModuleList(known.model.layers)

    class BrandNewForCausalLM(type(known)):  # type: ignore[misc]
        pass

    model = BrandNewForCausalLM(known.config)
    backbone = BrandNewBackbone()
    del model.model.layers
    model.model.the_stack = backbone.the_stack
    assert list(decoder_layers(model)) == list(backbone.the_stack)
