"""Offloaded blocks in int8: the same bits wherever their copies are, and exact weights in all that trains and is saved."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.export import save_huggingface
from ows_lightning.offload.disk import Disk, load_mapped_model
from ows_lightning.offload.int8 import dequantize, quantize
from ows_lightning.offload.offloader import BlockOffloader
from tests.data.samples import tiny_tokenizer
from tests.offload.fake_gpu import FakeGpu
from tests.offload.steps import evaluate, train
from tests.tiny import KINDS, tiny_batch, tiny_model


def int8_offloader(model: torch.nn.Module, where: str, folder: Path, **options: object) -> BlockOffloader:
    return BlockOffloader(decoder_layers(model), disk=Disk(folder) if where == "disk" else None, int8_in=where, **options)


def round_to_int8(layer: torch.nn.Module) -> None:
    weights = [p.data for p in layer.parameters()]
    dequantize(quantize(weights), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 10), (3, 6, 10), (10,), (1, 1)])
def test_a_weight_is_off_by_half_a_step_at_the_most(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, before = torch.empty_like(weight), weight.clone()
    dequantize(quantize([weight]), [found])
    assert torch.equal(weight, before)
    if len(shape) == 1:
        assert torch.equal(found, weight)
    else:
        largest = weight.float().abs().amax(-1, keepdim=True)
        assert ((found.float() - weight.float()).abs() <= largest * (0.5 / 127 + torch.finfo(dtype).eps)).all()
        assert sum(part.nbytes for part in quantize([weight])) == weight.numel() + 4 * weight[..., 0].numel()


def test_a_row_of_zeros_stays_one() -> None:
    found = torch.ones(2, 3)
    dequantize(quantize([torch.zeros(2, 3)]), [found])
    assert torch.equal(found, torch.zeros(2, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_finds_the_codes_that_the_host_finds(dtype: torch.dtype) -> None:
    """A block is quantised on the host before it trains, and on the device afterwards."""
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    for there, here in zip(quantize([weight.cuda()]), quantize([weight]), strict=True):
        assert torch.equal(there.cpu(), here)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_the_bits_are_the_same_wherever_copies_wait(architecture: str, tmp_path: Path) -> None:
    runs = []
    for where in ("device", "host", "disk"):
        model = tiny_model(architecture)
        runs.append(train(model, int8_offloader(model, where, tmp_path), validate=True))
    runs[1].assert_equals(runs[0])
    runs[2].assert_equals(runs[0])
    assert not torch.equal(runs[0].losses[0], train(tiny_model(architecture)).losses[0])


@pytest.mark.parametrize("architecture", KINDS)
def test_computes_as_a_model_whose_frozen_blocks_are_rounded(architecture: str, tmp_path: Path) -> None:
    def loss(model: torch.nn.Module) -> torch.Tensor:
        for index, layer in enumerate(decoder_layers(model)):
            layer.requires_grad_(index == 2)
        torch.manual_seed(0)  # of dropout
        return model(**tiny_batch(), use_cache=False).loss

    rounded, model = tiny_model(architecture), tiny_model(architecture)
    for index in (0, 1, 3):
        round_to_int8(decoder_layers(rounded)[index])
    int8_offloader(model, "host", tmp_path)
    assert torch.equal(loss(model), loss(rounded))


@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_what_is_saved_are_exact_weights(where: str, tmp_path: Path) -> None:
    before = tiny_model("llama").state_dict()
    tiny_model("llama").save_pretrained(tmp_path)
    disk = Disk(tmp_path) if where == "disk" else None
    model = load_mapped_model(str(tmp_path), 0, disk) if disk else tiny_model("llama")
    offloader = BlockOffloader(decoder_layers(model), disk=disk, int8_in=where)
    train(model, offloader, draws=[[1], [2]])
    changed = {name.split(".")[2] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"1", "2"} <= changed
    assert not changed & {"0", "3"}
    trained = decoder_layers(model)[2].state_dict()
    trained = {name: value.clone() for name, value in trained.items()}
    decoder_layers(model).requires_grad_(False)
    offloader.apply_draw()
    torch.testing.assert_close(decoder_layers(model)[2].state_dict(), trained, rtol=0, atol=0)


@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_a_model_is_evaluated_with_its_exact_weights_on_request(where: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    offloader = int8_offloader(model, where, tmp_path)
    train(model, offloader, draws=[[1], [2]])
    resident = tiny_model("llama")
    resident.load_state_dict(model.state_dict())
    with offloader.exact_weights():
        torch.testing.assert_close(list(evaluate(model)), list(evaluate(resident)), rtol=0, atol=0)
    rounded, exact = (torch.stack(list(evaluate(each))[:1]) for each in (model, resident))
    assert not torch.equal(rounded, exact)


def test_weights_that_are_loaded_are_copied_into_int8(tmp_path: Path) -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    int8_offloader(model, "host", tmp_path)
    list(evaluate(model))
    model.load_state_dict(other.state_dict())
    for layer in decoder_layers(other):
        round_to_int8(layer)
    torch.testing.assert_close(list(evaluate(model)), list(evaluate(other)), rtol=0, atol=0)


def test_a_copy_on_the_device_is_freed_while_its_block_trains(tmp_path: Path) -> None:
    model = tiny_model("llama")
    offloader = int8_offloader(model, "device", tmp_path)
    train(model, offloader, draws=[[1]])
    assert [weights.copy is None for weights in offloader.offloaded] == [False, True, False, False]


@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_leaving_a_full_card_takes_no_memory_for_copies(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    offloader = int8_offloader(model, where, tmp_path)
    run = train(model, offloader, draws=[[1]])

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("ows_lightning.offload.int8.quantize", no_room)
    offloader.set_device(torch.device("meta"))  # as a Trainer's teardown does after an error
    torch.testing.assert_close(dict(model.state_dict()), run.weights, rtol=0, atol=0)


@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_an_export_after_an_interrupted_pass_is_made_of_exact_weights(where: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    save_huggingface(model, tiny_tokenizer(), tmp_path / "before")
    int8_offloader(model, where, tmp_path, frozen_only=True)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    decoder_layers(model)[1].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**tiny_batch())
    save_huggingface(model, tiny_tokenizer(), tmp_path / "after")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_copies_on_the_disk_wait_for_the_device_that_computes(tmp_path: Path) -> None:
    sizes = []
    for moves in (False, True):
        with FakeGpu(late=False).installed():
            model, disk = tiny_model("llama"), Disk(tmp_path)
            offloader = BlockOffloader(decoder_layers(model), disk=disk, int8_in="disk")
            if moves:
                model.to("cuda")
            offloader.prepare()
            assert disk.scratch is not None
            sizes.append(disk.scratch.seek(0, os.SEEK_END))
    assert sizes[0] == sizes[1]
