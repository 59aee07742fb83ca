"""MemoryTracker against torch's own allocator, and what it says of a step."""

from __future__ import annotations

import gc
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import flop_registry

from ows_lightning.memory.simulated_step import TrainingMethod, Workload, simulate_steps
from ows_lightning.memory.tracker import MemoryTracker
from ows_lightning.optim.galore import GaLoreAdamW
from tests.tiny import tiny_model

OURS = TrainingMethod(GaLoreAdamW, activated_layers=2, always_train=("norm",), rank=8, ours=True)
SHAPE = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 160}


def allocated_peak(prof: profile, folder: Path) -> int:
    """The most bytes that torch's CPU allocator had handed out at a time during a profile."""
    trace = folder / "trace.json"
    prof.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        total += event["args"]["Bytes"]
        peak = max(peak, total)
    return peak


@pytest.mark.parametrize(
    "method",
    [
        OURS,
        TrainingMethod(partial(torch.optim.AdamW, foreach=False)),
        TrainingMethod(GaLoreAdamW, activated_layers=2, rank=8, subspace="svd", keeps_states=True),
    ],
    ids=["ours", "full", "published"],
)
def test_counts_what_torch_allocates(method: TrainingMethod, tmp_path: Path) -> None:
    model = tiny_model("llama", **SHAPE)
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    gc.collect()  # what an earlier profile saw allocated, and this one would see freed, counted below zero
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        peaks = simulate_steps(model, method, Workload(batch_size=4, length=64), MemoryTracker()).peaks
    tracked = max(sum(sizes.values()) for sizes in peaks.values())
    assert tracked == pytest.approx(held + allocated_peak(prof, tmp_path), rel=0.02)


def test_fused_attention_counts_the_same_with_versions_of_torch_that_have_no_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    def count() -> int:
        query, key, value = (torch.randn(2, 4, length, 8, requires_grad=True) for length in (16, 24, 24))
        with MemoryTracker() as tracker:
            F.scaled_dot_product_attention(query, key, value).sum().backward()
        return sum(tracker.flops.values())

    counts = [count()]
    for name in ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"):
        monkeypatch.delitem(flop_registry, getattr(torch.ops.aten, name), raising=False)
    counts.append(count())
    assert counts == [7 * 2 * (2 * 4 * 16 * 24 * 8)] * 2  # two products in forward, five in backward


def test_frees_what_dies_and_keeps_what_a_view_holds() -> None:
    with MemoryTracker() as tracker:
        tracker.begin_span(("one",))
        whole = torch.zeros(1000)
        part = whole[:10]
        del whole
        tracker.begin_span(("two",))
        del part
        torch.zeros(10)
        tracker.begin_span(("three",))
    assert tracker.peaks()[("one",)] == tracker.peaks()[("two",)] == {"other": 4000}
    assert tracker.peaks()[("three",)] == {}


def test_a_late_label_counts_for_a_peak_that_is_past() -> None:
    with MemoryTracker(alignment=512) as tracker:
        tracker.begin_span(("step",))
        gradient, temporary = torch.zeros(100), torch.zeros(300)
        del temporary
        tracker.label("gradients", [gradient])
        tracker.begin_span(())
    assert tracker.peaks()[("step",)] == {"gradients": 512, "other": 1536}


def test_host_memory_does_not_count() -> None:
    with MemoryTracker() as tracker:
        tensor = torch.zeros(100)
        tracker.label("host", [tensor])
        tracker.begin_span(("later",))
        other = torch.zeros(10)
        tracker.begin_span(("last",))
        tracker.label("gradients", [tensor])
        del other
    assert tracker.peaks()[("later",)] == {"other": 40}
    assert tracker.peaks()[("last",)] == {"gradients": 400, "other": 40}


def test_categories_are_what_a_step_is_made_of() -> None:
    model = tiny_model("llama", **SHAPE)
    peaks = simulate_steps(model, OURS, Workload(batch_size=2, length=16), MemoryTracker()).peaks
    ordinary_step = peaks[(False, "step")]
    active = [model.model.layers[index] for index in (0, 3)]
    assert ordinary_step["weights"] == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    matrices = [p for layer in active for p in layer.parameters() if p.dim() == 2]
    vectors = [p for layer in active for p in layer.parameters() if p.dim() == 1] + [model.model.norm.weight]
    projected, full = sum(8 * max(p.shape) for p in matrices), sum(p.numel() for p in vectors)
    assert ordinary_step["moments"] == 2 * 4 * (projected + full)
    assert ordinary_step["projectors"] == 4 * sum(8 * min(p.shape) for p in matrices)
    assert ordinary_step["gradients"] == 4 * (projected + full)
