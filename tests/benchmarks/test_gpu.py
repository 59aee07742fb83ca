"""The benchmark of a card, as a dry run on a CPU: every kind of row is measured, and what fails is a row as well."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.measure import _Power, attempt
from benchmarks.gpu.report import as_markdown
from benchmarks.gpu.settings import ASLEEP, MODELS, rows

CPU = torch.device("cpu")


@pytest.fixture
def tiny(tmp_path):
    """The rows of a dry run by part and name."""
    AutoConfig.for_model("llama", **MODELS["tiny"], tie_word_embeddings=False).save_pretrained(tmp_path / "tiny")
    return {(row["part"], row["name"]): row for row in rows("tiny", str(tmp_path))}


@pytest.mark.slow
def test_a_row_of_each_kind(tiny):
    resident, waiting = (attempt(tiny["step", name], CPU) for name in ("ours", "ours, host"))
    assert resident["steps"] == waiting["steps"] == 8
    assert resident["tokens_per_second"] == pytest.approx(2 * 2 * 16 / resident["mean_s"])
    assert waiting["waits"] > 0
    assert "stall" not in resident
    assert waiting["hidden"] is None  # on a CPU nothing runs beside anything
    assert waiting["watts"] is None
    assert attempt(tiny["step", "full AdamW"], CPU)["steps"] == 4
    needs = attempt(tiny["plan", "ours, host, checkpointing, accumulated"], CPU)
    assert needs["predicted_mb"] > 0 < needs["host_mb"]
    assert attempt(tiny["loss head", "checkpointed"], CPU)["ms"] > 0


@pytest.mark.slow
def test_waits_are_counted_by_what_a_batch_does(tiny):
    tiny["waits", "ours, accumulated"]["config"]["trainer"]["accumulate_grad_batches"] = 2
    accumulated, whole = (attempt(tiny["waits", f"ours{name}"], CPU) for name in (", accumulated", ""))
    assert [accumulated[kind] for kind in ("micro-batch", "step", "draw")] == [0, 0, 0]
    assert [whole[kind] for kind in ("micro-batch", "step", "draw")] == [None, 0, 0]


@pytest.mark.slow
def test_slow_copies_change_no_bit(tiny):
    about = {**gpu.machine("cpu"), "model": "tiny", "dry_run": True}
    for name in ("disk", "int8 on the device"):
        found = attempt(tiny["adversarial", name], CPU)
        assert {found[asleep] for asleep in ASLEEP} == {True}
        assert "yes" in as_markdown(about, [tiny["adversarial", name] | found])


@pytest.mark.slow
def test_a_slow_card_has_fewer_draws_not_none(tiny):
    assert attempt({**tiny["step", "ours"], "draws": 10**4, "limit": 2}, CPU)["steps"] % 2 == 0


def test_power_is_the_mean_since_the_warm_up():
    power = _Power(CPU)
    power._read(["100.0\n", "[N/A]\n", "200.0\n"])
    assert power.mean(since=0) == 150
    assert power.mean(since=float("inf")) is None


def test_what_fails_is_a_row(tiny):
    row = {**tiny["plan", "ours"], "config": {**tiny["plan", "ours"]["config"], "model": {"model_name_or_path": "nowhere"}}}
    figures = attempt(row, CPU)
    about = {**gpu.machine("cpu"), "model": "tiny", "dry_run": True}
    table = as_markdown(about, [{"part": "plan", "name": "ours", **figures}])
    assert figures["error"] in table
    assert "these figures mean nothing" in table


@pytest.mark.parametrize("model", ["llama2-7b-random", "llama-1b-random"])
def test_twelve_settings_are_held_against_plan_and_each_home_is_timed(model, tmp_path):
    wanted = rows(model, str(tmp_path))
    assert all(row["limit"] <= 200 for row in wanted)
    assert sum(row["part"] == "plan" for row in wanted) >= 12
    timed = {row["name"] for row in wanted if row["part"] == "step"}
    assert {"ours", "ours, host", "ours, int8 on the host", "full AdamW", "LoRA r=16 (peft)", "LISA, 2 blocks"} <= timed


@pytest.mark.slow
def test_the_command_goes_on_behind_a_row_that_hangs_and_stops_in_time(tiny, tmp_path, monkeypatch, capsys):
    hangs = {**tiny["step", "full AdamW"], "limit": 1}
    python = tmp_path / "python"  # the first process hangs, the next is a real one
    first = f'if mkdir "{tmp_path}/first" 2> /dev/null; then echo ready; exec sleep 600; fi'
    python.write_text(f'#!/bin/sh\n{first}\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    other = {**tiny["loss head", "ours"], "limit": 600}
    monkeypatch.setattr(gpu, "rows", lambda model, directory: [hangs, other])
    monkeypatch.setattr(gpu, "MODELS", {})
    gpu.main(["--device", "cpu", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [row.get("error", "")[:8] for row in found["rows"]] == ["not done", ""]
    assert found["about"]["torch"].split("+")[0] == torch.__version__.split("+")[0]  # a package may leave out the build
    gpu.main(["--device", "cpu", "--minutes", "0", "--output", str(tmp_path)])
    assert capsys.readouterr().out.count("left out: no time was left") == 4


def test_a_process_that_starts_behind_the_deadline_costs_its_row(tiny, tmp_path, monkeypatch):
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\necho ready\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(gpu, "LEAST", 0)
    monkeypatch.setattr("sys.executable", str(slow))
    clock = iter([0.0, 2.0, 2.0])  # before it starts, when it is ready, and at the next row
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    wanted = [tiny["plan", "ours"], tiny["plan", "LoRA r=16"]]
    found = [figures["error"] for _, figures in gpu.measured(wanted, "cpu", deadline=1.0)]
    assert found == ["not done within 0 s", "left out: no time was left"]
