"""Offloaded blocks compute, train and are saved as if they had never left it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ows_lightning.errors import RunError
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.execution import checkpoint_activations
from ows_lightning.offload.disk import Disk, DiskWeights
from ows_lightning.offload.offloaded import page_locked
from ows_lightning.offload.offloader import BlockOffloader
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.sampling.activation import activate_blocks
from tests.offload.fake_gpu import FakeGpu
from tests.offload.steps import LateOffloader, Run, evaluate, train
from tests.tiny import KINDS, tiny_batch, tiny_model


@pytest.mark.parametrize("architecture", KINDS)
def test_every_architecture_trains_to_the_same_bits(architecture: str) -> None:
    expected = train(tiny_model(architecture))
    model = tiny_model(architecture)
    train(model, LateOffloader(decoder_layers(model))).assert_equals(expected)


def on_double(architecture: str) -> Run:
    model = tiny_model(architecture)
    offloader = BlockOffloader(decoder_layers(model))
    model.to("cuda")
    return train(model, offloader, device="cuda")


def test_no_operator_of_an_architecture_meets_a_block_that_is_offloaded() -> None:
    expected = train(tiny_model("gemma2"))  # llama is in test_order; kernels of the others are unknown to the double
    with FakeGpu(late=True).installed():
        on_double("gemma2").assert_equals(expected)


@pytest.mark.parametrize(
    ("slots", "checkpointing", "embeddings", "precision"),
    [  # each two settings in each combination
        (2, False, False, "float32"), (3, True, True, "float32"), (2, True, False, "bfloat16"), (3, False, True, "bfloat16"),
        (2, True, True, "mixed"), (3, False, False, "mixed"),
    ],
)  # fmt: skip
def test_every_way_to_train_gives_the_same_bits(slots: int, checkpointing: bool, embeddings: bool, precision: str) -> None:
    def make() -> torch.nn.Module:
        model = tiny_model("llama", dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32, num_hidden_layers=6)
        if checkpointing:
            checkpoint_activations(model)
        return model

    options = {"embeddings": embeddings, "autocast": precision == "mixed", "draws": [[2], [5, 1], [0, 3]]}
    expected = train(make(), **options)
    model = make()
    train(model, LateOffloader(decoder_layers(model), slots), **options).assert_equals(expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_tied_embeddings_and_evaluation_in_between(checkpointing: bool) -> None:
    def make() -> torch.nn.Module:
        model = tiny_model("gpt2", tie_word_embeddings=True, resid_pdrop=0.2, attn_pdrop=0.2, embd_pdrop=0.1)
        if checkpointing:
            checkpoint_activations(model)
        return model

    expected = train(make(), validate=True, embeddings=True)
    model = make()
    train(model, LateOffloader(decoder_layers(model)), validate=True, embeddings=True).assert_equals(expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_below_adapters_all_blocks_wait(checkpointing: bool, architecture: str) -> None:
    peft = pytest.importorskip("peft")

    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.1)
        model = peft.get_peft_model(tiny_model(architecture), config)
        if checkpointing:
            checkpoint_activations(model.get_base_model())
        return model

    def steps(model: torch.nn.Module) -> list[torch.Tensor]:
        optimizer, out = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
        for step in range(3):
            torch.manual_seed(step)
            loss = model(**tiny_batch(seed=step), use_cache=False).loss
            loss.backward()
            out += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            optimizer.step()
            optimizer.zero_grad()
        return out

    expected = steps(make())
    model = make()
    offloader = LateOffloader(decoder_layers(model), frozen_only=True)
    torch.testing.assert_close(steps(model), expected, rtol=0, atol=0)
    assert offloader.active == []


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_bits() -> None:
    def make() -> torch.nn.Module:
        model = tiny_model("llama", num_hidden_layers=3)
        for layer in decoder_layers(model):
            layer.compile(backend="aot_eager")
        return model

    expected = train(make(), draws=[[1], [0]])
    model = make()
    train(model, BlockOffloader(decoder_layers(model)), draws=[[1], [0]]).assert_equals(expected)


def assert_same_gradients(backward: Callable[[torch.nn.Module], None]) -> None:
    """Asserts that a model of which some blocks are offloaded gets the gradients of one without an offloader."""

    def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
        for index, layer in enumerate(decoder_layers(model)):
            layer.requires_grad_(index in (0, 2))
        backward(model)
        return [p.grad for p in decoder_layers(model).parameters() if p.requires_grad]

    expected = gradients(tiny_model("llama"))
    model = tiny_model("llama")
    LateOffloader(decoder_layers(model))
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=0)


def test_two_forward_passes_before_their_backward_passes() -> None:
    def backward(model: torch.nn.Module) -> None:
        losses = [model(**tiny_batch(seed=seed), use_cache=False).loss for seed in (0, 1)]
        for loss in losses:
            loss.backward()

    assert_same_gradients(backward)


def test_the_frozen_wait_in_host_memory_and_the_trained_come_home() -> None:
    model = tiny_model("llama")
    first = {name: value.clone() for name, value in model.state_dict().items()}
    offloader = BlockOffloader(decoder_layers(model))
    places = [[p.data_ptr() for p in layer.parameters()] for layer in decoder_layers(model)]
    train(model, offloader, draws=[[1]])
    now = [[p.data_ptr() for p in layer.parameters()] for layer in decoder_layers(model)]
    assert offloader.active == [1]
    assert [here == there for here, there in zip(now, places, strict=True)] == [True, False, True, True]
    trained = decoder_layers(model)[1].state_dict()
    decoder_layers(model).requires_grad_(False)
    offloader.apply_draw()
    assert [p.data_ptr() for p in decoder_layers(model)[1].parameters()] == places[1]
    torch.testing.assert_close(decoder_layers(model)[1].state_dict(), trained, rtol=0, atol=0)
    for name, value in model.state_dict().items():
        if ".layers." in name and ".layers.1." not in name:
            assert torch.equal(value, first[name]), name


def test_weights_that_are_loaded_or_exchanged_count_at_once() -> None:
    model, other = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    offloader = BlockOffloader(decoder_layers(model))
    decoder_layers(model).requires_grad_(False)
    expected = [tensor.clone() for tensor in evaluate(other)]
    list(evaluate(model))
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(list(evaluate(model)), expected, rtol=0, atol=0)
    with torch.no_grad():  # as weight averaging does, between training and evaluation
        for p, q in zip(model.parameters(), tiny_model("llama", seed=2).parameters(), strict=True):
            p.data.copy_(q.data)
    offloader.refresh_all()
    torch.testing.assert_close(list(evaluate(model)), list(evaluate(tiny_model("llama", seed=2))), rtol=0, atol=0)


@pytest.mark.parametrize("between", ["forward and backward", "backward and step"])
def test_a_move_to_where_it_is_changes_nothing(between: str) -> None:
    def backward(model: torch.nn.Module) -> None:
        loss = model(**tiny_batch(), use_cache=False).loss
        if between == "forward and backward":
            model.to("cpu")
        loss.backward()
        model.float()

    assert_same_gradients(backward)


def test_blocks_that_moved_between_forward_and_backward_are_an_error() -> None:
    model = tiny_model("llama")
    BlockOffloader(decoder_layers(model))
    layers = decoder_layers(model)
    layers.requires_grad_(False)
    layers[0].requires_grad_(True)
    loss = model(**tiny_batch(), use_cache=False).loss
    layers[2].requires_grad_(True)
    loss = loss + model(**tiny_batch(seed=1), use_cache=False).loss
    with pytest.raises(RunError, match="other blocks train in backward"):
        loss.backward()


def test_merging_what_rests_between_forward_and_backward_is_an_error() -> None:
    """Backward would fetch the merged weight, and add the update to it once more."""
    model = tiny_model("llama")
    named = list(model.named_parameters())
    optimizer = GaLoreAdamW([{"params": named, "rank": 4}], lr=1e-2)
    offloader = BlockOffloader(decoder_layers(model))
    offloader.attach_optimizer(optimizer)
    activate_blocks(decoder_layers(model), [0], optimizers=[optimizer], resting_rank=3, resting_seed=1)
    offloader.apply_draw([optimizer])
    for _ in range(2):
        model(**tiny_batch(), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    loss = model(**tiny_batch(), use_cache=False).loss
    model.state_dict()
    with pytest.raises(RunError, match="what rests was merged"):
        loss.backward()


@pytest.mark.parametrize("int8_in", [None, "host"])
def test_what_is_written_in_place_counts_at_once(int8_in: str | None) -> None:
    model, other = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    for each in (model, other):
        decoder_layers(each).requires_grad_(False)
        decoder_layers(each)[1].requires_grad_(True)
    with torch.no_grad():
        BlockOffloader(decoder_layers(model), int8_in=int8_in)
        model(**tiny_batch())
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.copy_(q)
        BlockOffloader(decoder_layers(other), int8_in=int8_in)
        assert torch.equal(model(**tiny_batch()).logits, other(**tiny_batch()).logits)
    decoder_layers(model)[3].requires_grad_(True)  # a draw, after another write
    with torch.no_grad():
        for each in (model, other):
            for p in each.parameters():
                p.mul_(0.5)
    decoder_layers(other)[3].requires_grad_(True)
    losses = [each(**tiny_batch()).loss for each in (model, other)]
    assert torch.equal(*losses)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("int8_in", [None, "host", "device"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_another_dtype_holds_for_all_blocks(int8_in: str | None, on_disk: bool, tmp_path: Path) -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    offloader = BlockOffloader(decoder_layers(model), disk=Disk(tmp_path) if on_disk else None, int8_in=int8_in)
    train(model, offloader)
    train(plain, BlockOffloader(decoder_layers(plain), int8_in=int8_in))
    for each in (model, plain):
        each.zero_grad()
        each.bfloat16()
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.bfloat16}
    if int8_in is None:
        ordinary = tiny_model("llama").bfloat16()
        ordinary.load_state_dict(plain.state_dict())
        train(model, offloader).assert_equals(train(ordinary))
    else:
        train(model, offloader).assert_equals(train(plain, decoder_layers(plain)[0].offloader))


@pytest.mark.parametrize("int8_in", [None, "host", "device"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_adapters_are_merged_into_weights_that_wait(int8_in: str | None, on_disk: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def make(offloader: bool) -> torch.nn.Module:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(tiny_model("llama"), config)
        if offloader:
            disk = Disk(tmp_path) if on_disk else None
            BlockOffloader(decoder_layers(model), frozen_only=True, disk=disk, int8_in=int8_in)
        return model

    plain, model = make(False), make(True)
    with torch.no_grad():
        before = [each(**tiny_batch()).logits for each in (plain, model)]
        for each in (plain, model):
            each.merge_adapter()
        merged = [each(**tiny_batch()).logits for each in (plain, model)]
        torch.testing.assert_close(plain.state_dict(), model.state_dict(), rtol=0, atol=0)
        for each in (plain, model):
            each.unmerge_adapter()
        after = [each(**tiny_batch()).logits for each in (plain, model)]
        unloaded = [each.merge_and_unload() for each in (plain, copy.deepcopy(model))]
    torch.testing.assert_close(unloaded[0].state_dict(), unloaded[1].state_dict(), rtol=0, atol=0)
    if int8_in is None:
        for ours in (before, merged, after):
            assert torch.equal(*ours)
    else:  # rounded before and after the adapters came in
        torch.testing.assert_close(merged[1], merged[0], rtol=0.1, atol=0.02)
        torch.testing.assert_close(after[1], before[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_has_a_window_of_its_own(duplicate) -> None:
    model = tiny_model("llama")
    offloader = BlockOffloader(decoder_layers(model))
    train(model, offloader, draws=[[2]])
    model.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = duplicate(model)
    theirs = decoder_layers(other)[0].offloader
    assert theirs is not offloader
    torch.testing.assert_close(dict(other.state_dict()), before, rtol=0, atol=0)
    run = train(other, theirs, draws=[[3], [1]])
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    train(model, offloader, draws=[[3], [1]]).assert_equals(run)


@pytest.mark.parametrize("int8_in", [None, "host"])
def test_what_ran_out_of_memory_while_it_was_offloaded_begins_anew(
    int8_in: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    offloader, ours = (BlockOffloader(decoder_layers(each), int8_in=int8_in) for each in (model, plain))
    offload, calls = BlockOffloader._offload, []

    def failing(self: BlockOffloader, weights: Any) -> Any:
        calls.append(weights)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("at the third block")
        return offload(self, weights)

    monkeypatch.setattr(BlockOffloader, "_offload", failing)
    with pytest.raises(torch.OutOfMemoryError):
        train(model, offloader, draws=[[2]])
    offloader.set_device(torch.device("meta"))  # as a Trainer's teardown does
    offloader.set_device(torch.device("cpu"))
    model.requires_grad_(True)
    train(model, offloader, draws=[[2]]).assert_equals(train(plain, ours, draws=[[2]]))


def test_slots_that_found_no_memory_are_made_at_the_next_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    offloader = BlockOffloader(decoder_layers(model))
    expected = train(tiny_model("llama"), draws=[[2]])

    def failing(*_: object) -> None:
        raise torch.OutOfMemoryError("no room for the slots")

    with monkeypatch.context() as patch:
        patch.setattr("ows_lightning.offload.offloader.total_nbytes", failing)
        with pytest.raises(torch.OutOfMemoryError):
            train(model, offloader, draws=[[2]])
    model.requires_grad_(True)
    train(model, offloader, draws=[[2]]).assert_equals(expected)


def test_a_draw_that_finds_no_memory_leaves_what_it_has_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, disk = tiny_model("llama"), Disk(tmp_path)
    offloader = BlockOffloader(decoder_layers(model), disk=disk)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load, written = BlockOffloader._load_for_training, []

    def failing(self: BlockOffloader, index: int) -> None:
        if index == 2:
            raise torch.OutOfMemoryError("at the second block that trains")
        load(self, index)

    monkeypatch.setattr(BlockOffloader, "_load_for_training", failing)
    monkeypatch.setattr(DiskWeights, "write_back", lambda weights, trained: written.append(weights))
    model.requires_grad_(False)
    for index in (1, 2):
        decoder_layers(model)[index].requires_grad_(True)
    with pytest.raises(torch.OutOfMemoryError):
        offloader.apply_draw()
    offloader.set_device(torch.device("meta"))
    assert len(written) == 1  # the one block that had come, not the whole model
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_a_failed_page_lock_leaves_no_error_for_the_next_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    pending = []

    def register(*_: int) -> int:
        pending.append("CUDA error: out of memory")
        return 2

    def kernel(*_: int, device: torch.device) -> None:
        if pending:
            raise RuntimeError(pending.pop())

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    monkeypatch.setattr(torch, "zeros", kernel)
    with pytest.raises(RunError, match="could not be page-locked"):
        page_locked(100, torch.device("cuda"))
    assert not pending


def test_a_block_is_held_on_the_device_while_it_is_looked_at() -> None:
    model = tiny_model("llama")
    offloader = BlockOffloader(decoder_layers(model))
    block = decoder_layers(model)[3]
    with offloader.on_device(block):
        held = block.mlp.up_proj.weight
        assert held.data_ptr() in range(
            offloader.slots[1].data_ptr(), offloader.slots[1].data_ptr() + offloader.slots[1].nbytes
        )
        assert torch.equal(held, offloader.offloaded[3].tensors[[p is held for p in block.parameters()].index(True)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("embeddings", [False, True])
def test_on_a_gpu_the_bits_are_those_of_a_resident_model(slots: int, checkpointing: bool, embeddings: bool) -> None:
    def make() -> torch.nn.Module:
        model = tiny_model("llama", dtype=torch.bfloat16, num_hidden_layers=6, hidden_size=256, intermediate_size=1024)
        if checkpointing:
            checkpoint_activations(model)
        return model

    def on_gpu(model: torch.nn.Module, offloader: BlockOffloader | None) -> torch.nn.Module:
        offloaded = set() if offloader is None else {p for weights in offloader.parameters for p in weights}
        for p in set(model.parameters()) - offloaded:
            p.data = p.data.cuda()
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.cuda()
        return model

    options = {"embeddings": embeddings, "draws": [[2], [5, 1], [0, 3]], "device": "cuda"}
    expected = train(on_gpu(make(), None), **options)
    model = make()
    offloader = BlockOffloader(decoder_layers(model), slots)
    offloader.set_device(torch.device("cuda"))
    train(on_gpu(model, offloader), offloader, **options).assert_equals(expected)
