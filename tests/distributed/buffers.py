"""A rank of a test of buffers, apart from that test, whose other imports take each process seconds."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ows_lightning.distributed.sharded_model import load_into_shards
from ows_lightning.models.pretrained import empty_model, load_model


def hand_out_buffers(name: str) -> None:
    """Loads a model into shards, and compares its buffers with those that the model was saved with."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = load_into_shards(
        lambda empty: empty_model(name, 0) if empty else load_model(name), name, mesh, torch.device("cpu"), "32"
    ).model
    expected = dict(load_model(name).named_buffers())
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[key]), key
    dist.destroy_process_group()
