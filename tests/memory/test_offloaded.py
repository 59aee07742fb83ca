"""Offloaded blocks: how much memory that leaves, and how much is fetched."""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from ows_lightning.memory.plan_settings import settings_from_config
from ows_lightning.memory.prediction import ModelSizes, fetched_blocks, predict_memory
from ows_lightning.memory.tracker import HOST
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.offload.int8 import Int8Weights, quantize
from ows_lightning.offload.offloader import BlockOffloader
from ows_lightning.sampling.activation import activate_blocks
from tests.memory.test_plan import SHAPE, Track, llama_7b, make_config, run_and_track
from tests.tiny import tiny_model

LLAMA_70B = {"model__model_name_or_path": "meta-llama/Llama-2-70b-hf"}


def documented(head: str) -> dict[str, dict[str, str]]:
    """A table of docs/memory.md: row -> column -> cell."""
    lines = iter((Path(__file__).parents[2] / "docs" / "memory.md").read_text().splitlines())
    header = next(line for line in lines if line.startswith(head))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in [header, *takewhile(bool, lines)]]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "changes", "limit"),
    [
        ((16, 1), {"model__frozen_in": "host"}, 7.8e9),
        ((1, 16), {"model__frozen_in": "host"}, 4.1e9),
        ((1, 16), {"model__frozen_in": "host", "sampling__activated_layers": 2}, 2.9e9),
        ((1, 16), {"model__frozen_in": "host", **LLAMA_70B}, 15.1e9),
        ((1, 16), {"model__frozen_in": "disk", "sampling__activated_layers": 2, **LLAMA_70B}, 10.0e9),
        ((1, 16), {"model__frozen_dtype": "int8"}, 9.5e9),
    ],
)
def test_large_models_fit_small_cards(batch: tuple[int, int], changes: dict[str, Any], limit: float) -> None:
    settings = settings_from_config(llama_7b(*batch, **changes))
    needs, resident = predict_memory(settings), predict_memory(replace(settings, frozen_in="device", frozen_dtype=None))
    assert needs.peak_bytes <= limit
    if batch == (1, 16):
        model = "Llama-2-70B" if LLAMA_70B.items() <= changes.items() else "Llama-2-7B"
        where = "int8 on the card" if settings.frozen_dtype else "in host memory"
        blocks = "two blocks" if changes.get("sampling__activated_layers") == 2 else "five blocks"
        assert documented("| model |")[model][f"{where}, {blocks}"] == f"{needs.peak_bytes / 1e9:.2f}"
    weights = resident.bytes["weights"]
    # What is offloaded; and, under accumulation, full gradients of the active blocks, in powers of two.
    matrices = sum(p.nbytes for p in decoder_layers(settings.meta_model)[0].parameters() if p.dim() > 1)
    gradients = settings.method.active_blocks(settings.num_blocks) * matrices * (settings.accumulate_grad_batches > 1)
    assert gradients <= resident.host_bytes <= 2 * gradients
    offloaded = needs.host_bytes - resident.host_bytes
    if settings.frozen_in == "disk":
        assert offloaded < 0.05 * weights
    else:
        assert 0.9 * weights < offloaded < weights
    assert {name: size for name, size in needs.bytes.items() if name != "weights"} == pytest.approx(
        {name: size for name, size in resident.bytes.items() if name != "weights"}
    )


@pytest.mark.slow
def test_gradients_in_full_rank_do_not_wait() -> None:
    host_bytes = [
        predict_memory(settings_from_config(llama_7b(1, 4, **changes))).host_bytes
        for changes in ({"model__lora": {"r": 16}}, {"model__rank": 4096}, {"model__rank": 128})
    ]
    assert host_bytes[:2] == [0, 0]
    assert host_bytes[2] > 1e9


def test_projected_embeddings_wait_in_host_memory_too() -> None:
    always = {"model__frozen_in": "host", "sampling__always_train": ["embeddings", "lm_head", "norm"]}
    low, full = (
        predict_memory(settings_from_config(llama_7b(1, 16, model__project_embeddings=project, **always))).host_bytes
        for project in (True, False)
    )
    assert low - full == 2 * 2**28  # 32,000 x 4,096 in bfloat16, in powers of two


class Device(Track):
    """Follows a run's memory on the device: all but weights that are offloaded elsewhere."""

    def label(self, module: Any) -> None:
        offloader = module.offloader
        offloader.prepare()
        elsewhere = {p.data_ptr(): p for block in offloader.parameters for p in block}
        copies = [
            tensor
            for home in offloader.offloaded
            if isinstance(home, Int8Weights) and home.copy
            for tensor in home.copy.tensors
        ]
        shared = [home.staging for home in offloader.offloaded if isinstance(home, Int8Weights)]
        staging = [memory for memory in shared if memory is not None]
        if module.hparams["frozen_in"] != "device":
            elsewhere |= {tensor.data_ptr(): tensor for tensor in copies}
        self.tracker.label(HOST, elsewhere.values())
        here = [*module.parameters(), *module.buffers(), *offloader.slots, *copies, *staging]
        self.tracker.label("weights", [tensor for tensor in here if tensor.data_ptr() not in elsewhere])


@pytest.mark.parametrize(
    ("frozen_in", "frozen_dtype", "precision"),
    [
        ("host", None, "32-true"),
        ("host", None, "bf16-true"),
        ("disk", None, "32-true"),
        ("device", "int8", "bf16-true"),
        ("host", "int8", "32-true"),
        ("disk", "int8", "bf16-true"),
    ],
)
def test_the_device_holds_what_was_predicted(
    frozen_in: str, frozen_dtype: str | None, precision: str, directory: Path
) -> None:
    waits = {"model__frozen_in": frozen_in, "model__frozen_dtype": frozen_dtype, "trainer__precision": precision}
    config = make_config(directory, **waits, model__gradient_checkpointing=True, data__batch_size=1)
    needs = predict_memory(settings_from_config(config))
    assert run_and_track(config, Device()) == pytest.approx(needs.peak_bytes, rel=0.005)


def test_blocks_of_several_sizes_count_each_as_it_is(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", num_hidden_layers=5, mlp_only_layers=[1, 2, 3], num_experts=16)  # the others are larger
    model.save_pretrained(tmp_path)
    layers = decoder_layers(model)
    small, large = (sum(p.nbytes for p in layers[index].parameters()) for index in (1, 0))
    assert large > 3 * small
    whole = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    settings = settings_from_config(make_config(tmp_path, model__rank=4, model__frozen_in="host", data__batch_size=1))
    needs = predict_memory(settings)
    offloader = BlockOffloader(layers)
    activate_blocks(layers, [0, 4])
    offloader.apply_draw()
    elsewhere = [t for index in offloader.schedule.order for t in offloader.offloaded[index].tensors]
    here = whole + sum(slot.nbytes for slot in offloader.slots) - sum(t.nbytes for t in elsewhere)
    assert needs.bytes["weights"] == pytest.approx(here, rel=0.01)
    assert needs.host_bytes == 2 * large + 3 * small

    sharded = predict_memory(replace(settings, frozen_in="device", strategy="fsdp2", devices=2))
    root = whole - 2 * large - 3 * small
    assert sharded.bytes["weights"] == pytest.approx(whole / 2 + root + 2 * large, rel=0.01)
    assert sharded.communicated_bytes == pytest.approx((root + 2 * (2 * large + 3 * small) + 2 * large) / 2, rel=0.03)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_blocks_in_int8_take_a_byte_a_weight_and_a_scale_a_row(precision: str, directory: Path) -> None:
    changes = {"model__frozen_dtype": "int8", "trainer__precision": precision}
    host, device, disk = (
        settings_from_config(make_config(directory, **changes, model__frozen_in=where)) for where in ("host", "device", "disk")
    )
    blocks = [[p.data for p in block.parameters()] for block in decoder_layers(tiny_model("llama", dtype=host.dtype, **SHAPE))]
    copies = [sum(part.nbytes for part in quantize(weights)) for weights in blocks]
    exact = sum(p.nbytes for weights in blocks for p in weights)
    assert ModelSizes.of(host).offloaded == copies
    assert [predict_memory(one).host_bytes for one in (host, device, disk)] == [exact + sum(copies), exact, 0]


@pytest.mark.parametrize(("active", "slots"), [(4, 2), (5, 2), (3, 3)])
def test_slots_are_there_where_fewer_blocks_are_frozen(active: int, slots: int, directory: Path) -> None:
    model = tiny_model("llama", **SHAPE)
    whole, layers = sum(t.nbytes for t in [*model.parameters(), *model.buffers()]), decoder_layers(model)
    changes = {"model__frozen_in": "host", "model__window_blocks": slots, "sampling__activated_layers": active}
    needs = predict_memory(settings_from_config(make_config(directory, **changes)))
    offloader = BlockOffloader(layers, slots)
    activate_blocks(layers, range(active))
    offloader.apply_draw()
    elsewhere = [t for index in offloader.schedule.order for t in offloader.offloaded[index].tensors]
    here = whole + sum(slot.nbytes for slot in offloader.slots) - sum(t.nbytes for t in elsewhere)
    assert needs.bytes["weights"] == pytest.approx(here, rel=0.001)


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("blocks", [[0, 3, 7], [4, 5, 6], [1, 5, 31], [29, 30, 31]])
@pytest.mark.parametrize("always_train", [["norm"], ["embeddings", "norm"]])
def test_counts_the_fetches_into_slots(number: int, blocks: list[int], always_train: list[str]) -> None:
    settings = settings_from_config(
        llama_7b(
            model__frozen_in="host",
            model__window_blocks=number,
            sampling__always_train=always_train,
            sampling__activated_layers=3,
        )
    )
    waiting = [block for block in range(32) if block not in blocks]
    reached = waiting if "embeddings" in always_train else [block for block in waiting if block > blocks[0]]
    order = [waiting.index(block) for block in [*waiting, *reversed(reached)]]
    slots: dict[int, int] = {}
    for _ in range(3):  # the last micro-batch counts: it finds what the one before has left
        fetched = 0
        for rank in order:
            fetched += slots.get(rank % number) != rank
            slots[rank % number] = rank
    assert fetched_blocks(blocks, settings) == fetched
