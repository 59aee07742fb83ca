"""Runs whose frozen blocks are offloaded to host memory or disk: the same figures, draws, checkpoints, exports to the bit."""

from __future__ import annotations

import csv
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ows_lightning.cli.main import main
from ows_lightning.offload.fetch_schedule import FetchSchedule
from tests.distributed.launch import Launch

pytestmark = pytest.mark.usefixtures("bare_runs")

SETTINGS = [
    "--config=configs/quickstart.yaml", "--data.eval_dataset=null", "--data.val_size=4", "--data.batch_size=2",
    "--data.exact_match_rows=2", "--trainer.max_steps=4", "--trainer.val_check_interval=4",
    "--checkpoint.every_n_train_steps=2", "--checkpoint.save_top_k=-1", "--trainer.accumulate_grad_batches=2",
    "--sampling.threshold=2", "--sampling.interval_steps=1", "--sampling.activated_layers=2", "--sampling.resting_rank=0",
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
]  # fmt: skip

NORMS = ["--sampling.distribution=weight_norm", "--model.rank=4"]
VARIANTS: dict[str, list[str]] = {
    "bf16": ["--trainer.precision=bf16-true", "--model.gradient_checkpointing=true", *NORMS],
    "mixed": ["--trainer.precision=bf16-mixed", "--model.window_blocks=3", "--trainer.gradient_clip_val=0.1"],
    "embeddings": ["--sampling.always_train=[embeddings,lm_head,norm]", "--data.packing=true", "--data.group_by_length=false"],
    "averaged": ["--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging", "--trainer.callbacks.device=cpu"],
    "lora": ["--sampling=null", "--model.lora={r: 2}", "--model.rank=null", "--model.optimizer=torch.optim.AdamW"],
}


def fit(folder: Path, *arguments: str) -> Path:
    """Runs a fit and returns its folder."""
    main(["fit", *SETTINGS, f"--trainer.default_root_dir={folder}", *arguments])
    return max(folder.glob("version_*"), key=lambda path: int(path.name[8:]))


def outcome(run: Path) -> dict[str, Any]:
    """All that a run leaves and that does not depend on the clock or on where blocks are."""
    with (run / "metrics.csv").open() as file:
        kept = ("step", "train_loss", "grad_norm", "val_loss", "val_exact_match", "tokens")
        metrics = [{key: row[key] for key in kept if key in row} for row in csv.DictReader(file)]
    checkpoints = {}
    for path in sorted((run / "checkpoints").glob("*.ckpt")):
        saved = torch.load(path, weights_only=True, mmap=True)
        sampling = {key: value for key, value in saved["callbacks"].get("LayerwiseSampling", {}).items() if key != "seconds"}
        checkpoints[path.name] = [saved["state_dict"], saved["optimizer_states"], sampling]
    found = {"metrics": metrics, "checkpoints": checkpoints, "model": load_file(run / "model" / "model.safetensors")}
    for name in ("outlier_scores.json", "sampling_history.csv"):
        if (run / name).exists():
            found[name] = (run / name).read_text()
    if "outlier_scores.json" in found:
        found["outlier_scores.json"] = json.loads(found["outlier_scores.json"])
    return found


def assert_identical(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_identical(one[key], other[key], f"{where} {key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (here, there) in enumerate(zip(one, other, strict=True)):
            assert_identical(here, there, f"{where} {index}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    else:
        assert one == other, where


@pytest.mark.parametrize("variant", [v if v == "mixed" else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS])
def test_host_and_disk_leave_what_device_leaves(
    variant: str, model_dir: Callable[..., Path], rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variant == "lora":
        pytest.importorskip("peft")
    common = [
        f"--model.model_name_or_path={model_dir(num_hidden_layers=5)}",
        f"--data.dataset={rows_file}",
        *VARIANTS[variant],
    ]
    expected = outcome(fit(tmp_path / "device", *common))
    fetched = []
    issue = FetchSchedule._issue
    monkeypatch.setattr(FetchSchedule, "_issue", lambda self, block: (fetched.append(block), issue(self, block))[1])
    for mode in ("host", "disk"):
        assert_identical(outcome(fit(tmp_path / mode, *common, f"--model.frozen_in={mode}")), expected, mode)
        assert set(fetched) == set(range(5))
        fetched.clear()


def test_a_block_that_was_never_drawn_is_the_base_models(
    model_dir: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    model = model_dir(num_hidden_layers=5)
    weights = "[0, 1, 0, 1, 0]"
    arguments = [f"--model.model_name_or_path={model}", f"--data.dataset={rows_file}", f"--sampling.distribution={weights}"]
    run = fit(tmp_path / "runs", *arguments, "--model.frozen_in=host", "--model.warmup_steps=0")
    before, after = load_file(model / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    trained = {name.split(".")[2] for name in before if ".layers." in name and not torch.equal(before[name], after[name])}
    assert trained == {"1", "3"}


@pytest.mark.slow
def test_int8_computes_the_same_anywhere_and_says_what_it_cost(
    model_dir: Callable[..., Path], rows_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common = [f"--model.model_name_or_path={model_dir(num_hidden_layers=5)}", f"--data.dataset={rows_file}"]
    found: dict[str, Any] = {}
    for where in ("device", "disk"):
        caplog.clear()
        run = fit(tmp_path / where, *common, f"--model.frozen_in={where}", "--model.frozen_dtype=int8")
        found[where] = outcome(run)
        said = re.search(r"frozen blocks in int8: ([\d.]+); with the exact weights, as exported: ([\d.]+)", caplog.text)
        assert said
        after = [float(row["val_loss"]) for row in found[where]["metrics"] if row["val_loss"]]
        assert float(said[1]) == pytest.approx(after[-1], abs=1e-4)
        assert float(said[2]) == pytest.approx(float(said[1]), abs=0.01)
    assert_identical(found["device"], found["disk"])


def test_int8_of_averaged_weights_is_measured_with_averaged_copies(
    model_dir: Callable[..., Path], rows_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The average comes last of all, when copies in int8 are of the weights that it replaces."""
    common = [f"--model.model_name_or_path={model_dir(num_hidden_layers=5)}", f"--data.dataset={rows_file}"]
    offloaded = ["--model.frozen_in=host", "--model.frozen_dtype=int8", "--model.optimizer.init_args.lr=0.05"]
    run = fit(tmp_path / "runs", *common, *offloaded, *VARIANTS["averaged"])
    said = re.search(r"frozen blocks in int8: ([\d.]+); with the exact weights, as exported: ([\d.]+)", caplog.text)
    assert said
    after = [float(row["val_loss"]) for row in outcome(run)["metrics"] if row["val_loss"]]
    assert float(said[1]) == pytest.approx(after[-1], abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sampling=null"], "model.frozen_in: host needs frozen blocks"),
        (["--trainer.devices=2", "--trainer.strategy=fsdp2"], "model.frozen_in: host is for one device"),
        (["--trainer.devices=2", "--trainer.strategy=ddp_layerwise"], "model.frozen_in: host is for one device"),
        (["--model.window_blocks=1"], "model.window_blocks: 1 must be 2 or 3"),
        (["--sampling=null", "--model.frozen_in=disk"], "model.frozen_in: disk needs frozen blocks"),
        (
            ["--sampling=null", "--model.frozen_in=device", "--model.frozen_dtype=int8"],
            "model.frozen_dtype: int8 needs frozen",
        ),
    ],
)
def test_what_can_not_work_is_refused_with_a_line(
    arguments: list[str], words: str, model_dir: Callable[..., Path], rows_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    common = [f"--model.model_name_or_path={model_dir()}", f"--data.dataset={rows_file}", "--model.frozen_in=host"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        fit(tmp_path / "runs", *common, *arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_killed_run_goes_on_with_its_blocks_elsewhere(
    model_dir: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    common = [f"--model.model_name_or_path={model_dir(num_hidden_layers=5)}", f"--data.dataset={rows_file}"]
    common += ["--trainer.val_check_interval=null", "--trainer.limit_val_batches=0", "--checkpoint.monitor=null"]
    common += ["--checkpoint.every_n_train_steps=1"]
    runs = tmp_path / "parts"
    kill = ["--trainer.callbacks+=tests.distributed.probe.Kill", "--trainer.callbacks.moment=on_train_batch_start"]
    for step, mode in enumerate(("device", "host", "disk"), start=1):
        here = [f"--trainer.callbacks.step={step}", f"--model.frozen_in={mode}", f"--trainer.default_root_dir={runs}"]
        resume = ["--ckpt_path=last"] if step > 1 else []
        launch = Launch(["fit", *SETTINGS, *common, *kill, *here, *resume], tmp_path / mode)
        assert launch.wait() == [-signal.SIGKILL], f"{mode}: {launch.output}"
        left = [path for path in runs.rglob("*") if path.is_file() and path.parent.name != "checkpoints"]
        assert all(path.stat().st_size < 30_000 for path in left), f"{mode}: a block has more"
    last = outcome(fit(runs, *common, "--ckpt_path=last"))
    expected = outcome(fit(tmp_path / "whole", *common))
    assert_identical(last["model"], expected["model"])
    assert last["sampling_history.csv"] == expected["sampling_history.csv"]
