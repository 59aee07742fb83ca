"""How weights get into shards."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from ows_lightning.distributed.fsdp2 import FSDP2Strategy
from ows_lightning.distributed.sharded_model import load_into_shards
from ows_lightning.errors import UsageError
from ows_lightning.models.causal_lm import CausalLM
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.pretrained import empty_model, load_model
from ows_lightning.module import CausalLMModule
from tests.data.samples import tiny_tokenizer
from tests.distributed.launch import free_port, run
from tests.models.architectures import tiny_config
from tests.tiny import tiny_batch, tiny_model

WIDTH = 1024


def load_a_model(arguments: list[str]) -> None:
    name = arguments[0]
    dist.init_process_group("gloo")
    mesh, never = init_device_mesh("cpu", (dist.get_world_size(),)), []

    def build(empty: bool) -> nn.Module:
        never.append(not empty)
        return empty_model(name, 0) if empty else load_model(name)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = load_into_shards(build, name, mesh, torch.device("cpu"), "32-true").model
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert not any(never)
    # The mapped file's pages count as well: this process's part of it, and its shards.
    assert grown < 1.25 * size, (grown, size)
    whole = dict(load_model(name).named_parameters())
    for key, shard in model.named_parameters():
        assert isinstance(shard, DTensor)
        assert torch.equal(shard.full_tensor(), whole[key]), key
    dist.destroy_process_group()


def test_one_process_sends_no_offloaded_weights_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    sent: list[int] = []
    monkeypatch.setattr(dist, "_broadcast_coalesced", lambda group, tensors, *_: sent.extend(t.data_ptr() for t in tensors))
    trainer = Trainer(
        accelerator="cpu", devices=1, strategy="ddp_layerwise", logger=False, default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = CausalLMModule(str(tmp_path), frozen_in="host")
    trainer.test(module, DataLoader([tiny_batch()], batch_size=None), verbose=False)
    assert sent  # what is on the device; NCCL takes nothing from host memory
    assert not {p.data_ptr() for layer in decoder_layers(module) for p in layer.parameters()} & {*sent}


def sharded(folder: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    """The model of a folder, in the shards of this process alone."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    mesh, name, precision = init_device_mesh("cpu", (1,)), str(folder), "32-true" if dtype == torch.float32 else "bf16-true"
    build = lambda empty: empty_model(name, 0, dtype) if empty else load_model(name, dtype)  # noqa: E731
    return load_into_shards(build, name, mesh, torch.device("cpu"), precision)


def test_shards_are_refused_what_a_whole_model_is(tmp_path: Path) -> None:
    (model := tiny_model("llama")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UsageError, match="more blocks than its config"):
        sharded(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(UsageError, match="than the weight that its config ties it to"):
        sharded(tmp_path)
    model.model.layers[2].mlp.up_proj.weight.data[3, 4] = torch.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="not finite"):
        sharded(tmp_path)


def test_shards_have_one_dtype(tmp_path: Path) -> None:
    """FSDP takes no other; the router stays in float32 on one device."""
    AutoModelForCausalLM.from_config(tiny_config("deepseek_v3")).save_pretrained(tmp_path)
    model = sharded(tmp_path, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model(**tiny_batch()).total.backward()


@pytest.mark.slow
def test_every_process_reads_its_own_part_of_the_weights(tmp_path: Path) -> None:
    shape = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": 4, "max_position_embeddings": 64}
    tiny_model("llama", **shape).save_pretrained(tmp_path / "model", max_shard_size="60MB")
    run([str(tmp_path / "model")], tmp_path, ranks=4, target=load_a_model)


@pytest.mark.slow
def test_buffers_are_the_same_whatever_the_processes_hash_seeds(tmp_path: Path) -> None:
    """Stacked experts are handed out by rank 0, and with them the router's biases, which are buffers."""
    config = AutoConfig.for_model(
        "glm4_moe", vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=6,
        num_attention_heads=2, num_key_value_heads=1, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=0,
        pad_token_id=0, head_dim=8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for key, buffer in model.named_buffers():
        if "bias" in key:
            buffer.normal_()
    model.save_pretrained(tmp_path)
    program = f"from tests.distributed.buffers import hand_out_buffers; hand_out_buffers({str(tmp_path)!r})"
    processes, port = [], free_port()
    for rank in range(2):
        variables = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONHASHSEED": rank}
        environment = os.environ | {key: str(value) for key, value in variables.items()}
        processes.append(subprocess.Popen([sys.executable, "-c", program], env=environment, cwd=Path(__file__).parents[2]))
    assert [process.wait(600) for process in processes] == [0, 0]


def test_shards_are_not_written_to_or_read_from_an_address() -> None:
    """It would be taken for a local folder."""
    strategy = FSDP2Strategy()
    for act in (
        lambda: strategy.save_checkpoint({}, "s3://bucket/a.ckpt"),
        lambda: strategy.load_checkpoint("s3://bucket/a.ckpt"),
    ):
        with pytest.raises(UsageError, match=r"'s3://bucket/a.ckpt' is an address; give a local folder"):
            act()
