"""Blocks that are offloaded to the disk: in the model's own files until they train, and no bit different."""

from __future__ import annotations

import copy
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ows_lightning.checkpoints import files as checkpoints
from ows_lightning.checkpoints.files import ChecksummedFile
from ows_lightning.errors import RunError, UsageError
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.export import save_huggingface
from ows_lightning.models.pretrained import empty_model, load_model
from ows_lightning.models.safetensors_file import SafetensorsFile
from ows_lightning.offload.disk import Disk, load_mapped_model
from ows_lightning.offload.offloader import BlockOffloader
from tests.data.samples import tiny_tokenizer
from tests.models.architectures import tiny_config
from tests.offload.steps import LateOffloader, evaluate, train
from tests.tiny import KINDS, tiny_model


def saved(folder: Path, architecture: str = "llama", **overrides: object) -> str:
    tiny_model(architecture, **overrides).save_pretrained(folder)
    return str(folder)


def scratch_bytes(disk: Disk) -> int:
    return 0 if disk.scratch is None else os.fstat(disk.scratch.fileno()).st_size


def test_a_system_that_can_not_allocate_writes_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
    disk = Disk(tmp_path)
    regions = [disk.extend_scratch(length) for length in (100, 5000)]
    assert scratch_bytes(disk) == 3 * 4096
    assert [(region.start, bytes(region.memory)) for region in regions] == [(0, bytes(4096)), (4096, bytes(8192))]


def mapped_bytes(path: Path) -> int:
    """How much of a mapped file counts as this process's memory."""
    here, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            here = line.endswith(str(path))
        elif here and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def test_a_whole_file_counts_beside_an_index_as_for_transformers(tmp_path: Path) -> None:
    old, new = tiny_model("llama"), tiny_model("llama", seed=1)
    old.save_pretrained(tmp_path, max_shard_size=50_000)  # whose shards are left behind
    save_file(
        {name: p.detach().clone() for name, p in new.named_parameters()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    model = load_mapped_model(str(tmp_path), 0, Disk(tmp_path))
    torch.testing.assert_close(dict(model.named_parameters()), dict(new.named_parameters()), rtol=0, atol=0)


def test_a_gpu_that_is_not_cudas_copies_from_ordinary_memory(tmp_path: Path) -> None:
    sizes = []
    Disk(tmp_path).read_into(lambda part: sizes.append((part.device.type, part.numel())), torch.empty(8, device="meta"))
    assert sizes == [("cpu", 8)]


@pytest.mark.parametrize("dtypes", ["the file's", "another"])
@pytest.mark.parametrize("architecture", [*KINDS, "tied"])
def test_a_model_is_loaded_as_transformers_loads_it(architecture: str, dtypes: str, tmp_path: Path) -> None:
    name = saved(tmp_path, tie_word_embeddings=True) if architecture == "tied" else saved(tmp_path, architecture)
    dtype = torch.float32 if dtypes == "the file's" else torch.bfloat16
    expected, found = load_model(name, dtype=dtype), load_mapped_model(name, 0, Disk(tmp_path), dtype=dtype)
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(dict(found.named_buffers()), dict(expected.named_buffers()), rtol=0, atol=0)
    assert [name for name, _ in found.named_parameters()] == [name for name, _ in expected.named_parameters()]
    assert found.config.to_dict() == expected.config.to_dict()
    assert found.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gpt_oss", "deepseek_v3"])
def test_what_transformers_keeps_in_float32_is_so_however_a_model_is_made(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Routers and norms of some families: what trained in float32 would else be exported in another dtype."""
    AutoModelForCausalLM.from_config(tiny_config(kind)).save_pretrained(tmp_path)
    expected = load_model(str(tmp_path), dtype=dtype).state_dict()
    mapped = load_mapped_model(str(tmp_path), 0, Disk(tmp_path), dtype=dtype).state_dict()
    torch.testing.assert_close(mapped, expected, rtol=0, atol=0)
    empty = empty_model(str(tmp_path), 0, dtype).state_dict()
    assert {name: weight.dtype for name, weight in empty.items()} == {name: weight.dtype for name, weight in expected.items()}
    assert len({weight.dtype for weight in expected.values()}) == 1 + (kind == "deepseek_v3" or dtype == torch.float16)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_training_gives_the_same_bits(architecture: str, tmp_path: Path) -> None:
    expected = train(tiny_model(architecture), validate=True)
    disk = Disk(tmp_path)
    model = load_mapped_model(saved(tmp_path, architecture), 0, disk)
    train(model, LateOffloader(decoder_layers(model), disk=disk), validate=True).assert_equals(expected)


def test_a_block_stays_in_the_models_own_file_until_it_has_trained(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "run")
    model = load_mapped_model(saved(tmp_path / "model"), 0, disk)
    before = load_file(tmp_path / "model" / "model.safetensors")
    offloader = BlockOffloader(decoder_layers(model), disk=disk)
    assert scratch_bytes(disk) == 0
    train(model, offloader, draws=[[1], [2]])
    one = sum(p.nbytes for p in decoder_layers(model)[0].parameters())
    assert one <= scratch_bytes(disk) < 2 * one  # block 2 still trains
    assert not list((tmp_path / "run").iterdir())  # a killed process leaves none
    after = load_file(tmp_path / "model" / "model.safetensors")
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_another_dtype_goes_to_the_scratch_file(tmp_path: Path) -> None:
    disk, name = Disk(tmp_path), saved(tmp_path, dtype=torch.bfloat16)
    model = load_mapped_model(name, 0, disk)
    train(model, BlockOffloader(decoder_layers(model), disk=disk)).assert_equals(train(load_model(name)))
    assert scratch_bytes(disk) >= sum(p.nbytes for p in decoder_layers(model).parameters())


def test_weights_that_are_loaded_or_exchanged_count(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    model = load_mapped_model(saved(tmp_path), 0, disk)
    BlockOffloader(decoder_layers(model), disk=disk)
    others = [tiny_model("llama", seed=seed) for seed in (1, 2)]
    model.load_state_dict(others[0].state_dict())
    torch.testing.assert_close(list(evaluate(model)), list(evaluate(others[0])), rtol=0, atol=0)
    duplicate = copy.deepcopy(model)
    with torch.no_grad():  # as weight averaging does with the copy that it made
        for p, q in zip(model.parameters(), others[1].parameters(), strict=True):
            p.data.copy_(q.data)
    torch.testing.assert_close(list(evaluate(model)), list(evaluate(others[1])), rtol=0, atol=0)
    torch.testing.assert_close(list(evaluate(duplicate)), list(evaluate(others[0])), rtol=0, atol=0)


@pytest.mark.parametrize("int8_in", [None, "disk"])
def test_a_copy_that_is_made_first_counts_too(int8_in: str | None, tmp_path: Path) -> None:
    """With copies in int8 it is made before any block is offloaded."""
    disk = Disk(tmp_path)
    model = load_mapped_model(saved(tmp_path), 0, disk)
    offloader = BlockOffloader(decoder_layers(model), disk=disk, int8_in=int8_in)
    copy.deepcopy(model)
    offloader.prepare()
    other = tiny_model("llama", seed=1)
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.data.copy_(q.data)
    offloader.refresh_all()
    with offloader.exact_weights():
        torch.testing.assert_close(list(evaluate(model)), list(evaluate(other)), rtol=0, atol=0)


@pytest.mark.slow
def test_what_is_written_is_read_a_weight_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, disk = saved(tmp_path / "model", hidden_size=256, intermediate_size=4096, num_hidden_layers=2), Disk(tmp_path)
    model = load_mapped_model(name, 0, disk)
    BlockOffloader(decoder_layers(model), disk=disk)
    largest = max(p.nbytes for p in decoder_layers(model).parameters())
    assert mapped_bytes(Path(name, "model.safetensors")) == 0
    seen: list[int] = []
    for kind in (ChecksummedFile, SafetensorsFile):
        write = kind.write

        def look(file: Any, *args: Any, write: Any = write) -> Any:
            seen.append(mapped_bytes(Path(name, "model.safetensors")))
            return write(file, *args)

        monkeypatch.setattr(kind, "write", look)
    checkpoints.save_file({"state_dict": model.state_dict()}, tmp_path / "a.ckpt")
    save_huggingface(model, tiny_tokenizer(), tmp_path / "exported")
    assert largest / 2 < max(seen) < 2 * largest  # the system may map some pages around what is read
    assert mapped_bytes(Path(name, "model.safetensors")) == 0


def test_a_full_disk_is_an_error_and_no_signal(tmp_path: Path) -> None:
    disk, limits = Disk(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"model.frozen_in: '.*' has no room for \d+ MB of blocks"):
            BlockOffloader(decoder_layers(tiny_model("llama", hidden_size=64)), disk=disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_that_was_cut_is_an_error(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    model = load_mapped_model(saved(tmp_path), 0, disk)
    BlockOffloader(decoder_layers(model), disk=disk)
    os.truncate(tmp_path / "model.safetensors", 20_000)
    with pytest.raises(RunError, match=r"model.safetensors has become shorter"):
        list(evaluate(model))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        decoder_layers(model)[2].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"not finite \(model.layers.2.mlp.up_proj.weight"):
        load_mapped_model(str(tmp_path), 0, Disk(tmp_path))


def test_what_is_written_into_the_models_own_file_counts(tmp_path: Path) -> None:
    name = saved(tmp_path)
    plain, disk = load_model(name, dtype=torch.float32), Disk(tmp_path)
    model = load_mapped_model(name, 0, disk, dtype=torch.float32)
    BlockOffloader(decoder_layers(model), disk=disk)
    for each in (plain, model):
        decoder_layers(each).requires_grad_(False)
        decoder_layers(each)[0].requires_grad_(True)
    with torch.no_grad():
        list(evaluate(model))
        for each in (plain, model):
            for p in each.parameters():
                p.mul_(0.5)
    torch.testing.assert_close(copy.deepcopy(model).state_dict(), plain.state_dict(), rtol=0, atol=0)
    save_huggingface(model, tiny_tokenizer(), tmp_path / "export")
    torch.testing.assert_close(load_file(tmp_path / "export" / "model.safetensors"), plain.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(list(evaluate(model)), list(evaluate(plain)), rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
