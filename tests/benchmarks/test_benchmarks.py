"""The benchmark on a model of a few kilobytes: does every method run, and does the report say what was measured?"""

import csv
import functools
import itertools
import json
import math
import re
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import compare, learning, loss_head, step_overhead
from benchmarks.methods import METHODS, PACKAGES
from benchmarks.models import WORKLOADS
from benchmarks.report import targets_table, write_report
from benchmarks.worker import measure
from tests.distributed import launch
from tests.tiny import tiny_model

SETTINGS = {
    "model": "tiny",
    "device": "cpu",
    "dtype": "bfloat16",
    "shape": list(WORKLOADS["tiny"].shapes[0]),
    "steps": 6,
    "interval": 3,
    "repeat": 0,
    "versions": {"torch": "2", "transformers": "5"},
}


@functools.cache
def run(method):
    if method in PACKAGES:
        pytest.importorskip(PACKAGES[method])
    return measure({**SETTINGS, "method": method, "directory": ""})


def finished(seconds, held, peak):
    return {
        "settings": SETTINGS,
        "warm_up": [9.0] * 3,
        "seconds": seconds,
        "held_mb": held,
        "interval_peak_mb": [peak - 1, peak],
        "interval_tensors_mb": [held, held],
        "machine": "a computer",
    }


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_measured(method):
    result = run(method)
    assert len(result["seconds"]) == 6
    assert all(seconds > 0 for seconds in result["seconds"])
    assert len(result["interval_peak_mb"]) == len(result["interval_tensors_mb"]) == 3
    assert max(result["interval_peak_mb"]) > result["held_mb"] > 0
    assert all(math.isfinite(loss) for loss in result["losses"])


@pytest.mark.slow
def test_states_pile_up_in_the_published_code_but_not_in_ours():
    ours = run("ours_frozen")["interval_tensors_mb"]
    published = run("ows_published")["interval_tensors_mb"]
    assert ours[-1] == pytest.approx(ours[0], abs=1e-3)
    assert published[-1] > published[0] + 0.005


@pytest.mark.slow
def test_command_writes_a_report_and_goes_on_where_it_stopped(tmp_path, capsys):
    arguments = ["--model", "tiny", "--device", "cpu", "--methods", "ours_frozen", "--repeats", "1", "--steps", "2"]
    compare.main([*arguments, "--output", str(tmp_path)])
    assert "Ours, embeddings frozen" in capsys.readouterr().out
    (report,) = tmp_path.glob("tiny-cpu-*-2x16x2.md")
    name = report.stem
    assert {f"{name}.md", f"{name}.csv", f"{name}.png", "results.jsonl"} <= {path.name for path in tmp_path.iterdir()}
    results = (tmp_path / "results.jsonl").read_text()
    assert json.loads(results)["settings"]["method"] == "ours_frozen"

    compare.main([*arguments, "--output", str(tmp_path)])
    assert (tmp_path / "results.jsonl").read_text() == results


def test_a_worker_that_fails_is_a_row(tmp_path, monkeypatch):
    settings = {**SETTINGS, "method": "ours_frozen", "directory": str(tmp_path)}
    with pytest.raises(KeyError, match="missing"):
        measure({**settings, "model": "missing"})
    failing = tmp_path / "python"  # ends as Python does after an exception
    failing.write_text("#!/bin/sh\necho Traceback >&2\necho \"KeyError: 'missing'\" >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(failing))
    assert compare._run(settings)["error"] == "KeyError: 'missing'"
    runs = {"ours_frozen": [finished([1.0, 1.0, 2.0], 100, 300)], "full": [{"error": "out of memory"}]}
    write_report(runs, SETTINGS, tmp_path / "table")
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert "| Full AdamW | out of memory |" in lines[-1]
    ours, full = csv.DictReader((tmp_path / "table.csv").open())
    assert (ours["step_s"], ours["above_start_mb"], ours["worst_over_median"]) == ("1.0", "200", "2.0")
    assert full["error"] == "out of memory"


def test_ratios_are_taken_repeat_by_repeat():
    runs = {
        "ours_frozen": [finished([1.0, 1.0], 100, 200), finished([3.0, 3.0], 100, 200), finished([9.0], 100, 200)],
        "lora": [finished([2.0, 2.0], 100, 300), finished([4.0, 4.0], 100, 300), {"error": "killed by signal 9"}],
    }
    table = targets_table(runs)
    assert "| time a token, ours frozen / LoRA | 0.62 (0.50 to 0.75) | at most 0.80 |" in table
    assert "| peak above start, ours frozen / LoRA | 0.50 (0.50 to 0.50) | at most 0.60 |" in table
    assert "OWS as published" not in table
    assert "after a draw" not in table


def test_a_step_after_a_draw_is_compared_with_its_own_interval():
    seconds = [1.0, 3.0, 2.0, 4.0, 3.0]  # the warm-up's three and the first of these make the first interval
    run = {**finished(seconds, 100, 200), "settings": {**SETTINGS, "interval": 4}}
    assert "| step after a draw / later steps of its interval, ours frozen | 1.00 (1.00 to 1.00) |" in targets_table(
        {"ours_frozen": [run]}
    )


@pytest.mark.slow
def test_learning_compares_validation_losses_and_goes_on_where_it_stopped(model_dir, rows_file, tmp_path, monkeypatch, capsys):
    def forked(command, *, cwd, **_):
        assert command[:3] == [sys.executable, "main.py", "fit"]
        assert (cwd / "main.py").is_file()
        launch.run(command[2:], tmp_path / "output")

    monkeypatch.setattr(learning, "subprocess", SimpleNamespace(run=forked))  # which imports nothing anew
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {{model_name_or_path: {model_dir()}, rank: 8}}\n"
        f"data: {{dataset: {rows_file}, eval_dataset: {rows_file}}}\n"
        "sampling: {activated_layers: 2, distribution: uniform, always_train: [norm]}\n"
        "trainer: {accelerator: cpu, devices: 1, log_every_n_steps: 1, check_val_every_n_epoch: null}\n"
    )
    command = ["--config", str(config), "--seeds", "1", "--steps", "2", "--jobs", "2", "--output", str(tmp_path / "learning")]
    (done := tmp_path / "learning" / "float32-steps2-seed0").mkdir(parents=True)
    (done / "metrics.csv").write_text("step,val_loss\n2,1.5\n")
    learning.main([*command, "--settings", "float32", "full_rank"])
    assert capsys.readouterr().out.count(", seed 0: ") == 1
    learning.main([*command, "--settings", "float32", "full_rank"])
    assert ", seed 0: " not in capsys.readouterr().out
    header, _, *rows = (tmp_path / "learning" / "learning.md").read_text().splitlines()
    assert "Validation loss, 1 seeds" in header
    assert [row.split(" | ")[0] for row in rows] == ["| float32 throughout", "| embeddings and head train in full rank"]


def test_learning_pairs_seeds():
    table = learning.as_table({"base": [1.0, 2.0, 3.0], "keep": [1.5, 2.0, 3.25]}).splitlines()
    assert table[2].endswith("| 2.000 (1.000 to 3.000) |  |")
    assert table[3].endswith("| 2.000 (1.500 to 3.250) | +0.250 (+0.000 to +0.500) |")


def test_all_implementations_of_the_loss_agree(capsys):
    model = tiny_model("llama", vocab_size=64)
    targets = torch.randint(64, (24,), generator=torch.Generator().manual_seed(0))
    results = {}
    for key, (_, loss) in loss_head.IMPLEMENTATIONS.items():
        if key == "liger" or (key == "torch" and not hasattr(torch.nn.functional, "linear_cross_entropy")):
            continue
        hidden = torch.randn(24, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
        value = loss(model, hidden, targets)
        results[key] = (value, *torch.autograd.grad(value, [hidden, model.lm_head.weight]))
    for result in results.values():
        torch.testing.assert_close(result, results["whole"])
    loss_head.main(
        ["--device", "cpu", "--tokens", "8", "--hidden", "16", "--vocabulary", "64", "--head", "trains", "--only", "ours"]
    )
    assert len([float(figure) for figure in capsys.readouterr().out.split()]) == 2


@pytest.mark.parametrize("methods", [[], ["ours_frozen", "ours_host"]])
def test_step_overhead_compares_steps_of_one_process(methods, tmp_path, monkeypatch, capsys):
    for clock in ("perf_counter", "process_time"):  # they tick when they are read, not while the machine does something else
        monkeypatch.setattr(time, clock, map(float, itertools.count()).__next__)
    arguments = ["--model", "tiny", "--steps", "4", "--interval", "2", "--output", str(tmp_path)]
    step_overhead.main([*arguments, *(["--methods", *methods] if methods else [])])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny, 2 x 16 tokens, bfloat16, ")
    assert lines[0].endswith(f"4 steps: {' / '.join(reversed(methods)) or 'ours_frozen / forward_backward'}")
    ratios = [float(figure) for line in lines[2:4] for figure in re.findall(r"steps? ([\d.]+)", line)]
    assert len(ratios) == 4
    assert all(ratio > 0 for ratio in ratios)
    assert 0 < float(lines[4].split()[-1].rstrip("%")) < 100
