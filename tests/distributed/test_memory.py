"""What each of two processes really holds under ``fsdp2``, beside what ``plan`` says."""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from ows_lightning import CausalLMModule, GaLoreAdamW, LayerwiseSampling, galore_param_groups
from ows_lightning.distributed.sharded_model import shard_model
from ows_lightning.memory.plan_settings import settings_from_config
from ows_lightning.memory.prediction import predict_memory
from ows_lightning.models.causal_lm import CausalLM
from ows_lightning.models.decoder import decoder_layers
from tests.data.samples import tiny_tokenizer
from tests.distributed.launch import run
from tests.memory.test_plan import make_config
from tests.tiny import tiny_batch, tiny_model


class Held(TorchDispatchMode):
    """The peak of what a process holds in tensors, whose storages FSDP2 empties and fills again."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, Any] = {}
        self.peak = 0
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            part = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            if isinstance(part, Tensor) and part.device.type == "cpu":
                storage = part.untyped_storage()
                self.storages.setdefault(storage._cdata, weakref.ref(storage, lambda _, key=storage._cdata: self.drop(key)))
        alive = [] if self.paused else [storage() for storage in list(self.storages.values())]
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive if storage is not None))
        return result

    def drop(self, key: int) -> None:
        self.storages.pop(key, None)

    @contextlib.contextmanager
    def without_gloos_copy(self) -> Iterator[None]:
        """NCCL reduces and scatters in place."""
        reduce_scatter = dist.reduce_scatter_single

        def paused(*args: Any, **kwargs: Any) -> Any:
            self.paused = True
            try:
                return reduce_scatter(*args, **kwargs)
            finally:
                self.paused = False

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "reduce_scatter_single", paused)
            yield


class Track(Callback):
    """Follows a run from its first step on."""

    def __init__(self) -> None:
        self.held = Held()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.held.__enter__()
        for tensor in [*pl_module.parameters(), *pl_module.buffers()]:
            tensor.detach()  # is seen

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.held.__exit__(None, None, None)


def measured(arguments: list[str]) -> None:
    """Trains, and writes down what was held and what was predicted."""
    directory, precision, always, output = arguments
    train = [*filter(None, always.split(","))]
    weights = [1.0, 0.0, 0.0, 1.0, 1.0]  # neighbours, whose gradients meet
    config = make_config(
        directory, model__rank=8, model__gradient_checkpointing=True, data__batch_size=1, data__max_seq_length=16,
        trainer__precision=precision, trainer__devices=2, trainer__strategy="fsdp2", sampling__always_train=train,
        sampling__activated_layers=3,
    )  # fmt: skip
    settings = {key: value for key, value in config["model"]["init_args"].items() if key != "optimizer"}
    module = CausalLMModule(**settings, optimizer=lambda groups: GaLoreAdamW(groups, lr=1e-3))
    track = Track()
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="fsdp2", precision=precision, max_steps=2, logger=False,  # type: ignore[arg-type]
        callbacks=[track, LayerwiseSampling(3, 5, weights, always_train=train)], enable_checkpointing=False,  # type: ignore[arg-type]
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with track.held.without_gloos_copy():
        trainer.fit(module, DataLoader([tiny_batch(1, 16, vocab_size=100)] * 2, batch_size=None))  # type: ignore[arg-type]
    if dist.get_rank() == 0:
        planned = predict_memory(settings_from_config(config)).peak_bytes
        Path(output).write_text(json.dumps([track.held.peak, planned]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vocabulary", "precision", "always"),
    [(1000, "bf16-true", "norm"), (1000, "32-true", "norm"), (8000, "bf16-true", "norm,lm_head"), (8000, "bf16-true", "norm")],
)
def test_plan_counts_what_is_gathered_and_reduced(vocabulary: int, precision: str, always: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 5, "tie_word_embeddings": False}
    tiny_model("llama", vocab_size=vocabulary, **shape).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    output = tmp_path / "bytes.json"
    for _ in range(3):  # on a busy machine gloo's thread may let go of a gathered block late, which is no need of the method
        run([str(tmp_path / "model"), precision, always, str(output)], tmp_path, 2, target=measured)
        held, planned = json.loads(output.read_text())
        if held <= 1.05 * planned:
            break
    assert held <= 1.05 * planned <= 1.15 * held


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])  # with vectors, and with routers of few rows
def test_gradients_in_full_rank_do_not_keep_those_of_their_whole_block(architecture: str) -> None:
    """FSDP2 gives out views of what it reduced at once, and a single one that is left would hold all of it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = CausalLM(tiny_model(architecture))
    shard_model(model, init_device_mesh("cpu", (1,)))
    optimizer = GaLoreAdamW(galore_param_groups(model, rank=4))
    optimizer.project_in_backward()
    for _ in range(2):  # micro-batches
        model(**tiny_batch()).loss.backward()
        full_rank = [(p, p.grad) for p in decoder_layers(model).parameters() if p.grad is not None]
        assert full_rank
        for p, gradient in full_rank:
            assert isinstance(gradient, DTensor)
            assert gradient.placements == p.placements  # type: ignore[attr-defined]
            part = gradient.to_local()
            assert part.untyped_storage().nbytes() == part.nbytes
