"""The command line from end to end, as a user meets it."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from ows_lightning.cli.main import main
from ows_lightning.report import RunRecord
from tests.distributed.launch import Launch
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def whole_config(model_dir: Callable[..., Path], rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config of a few steps on a tiny model, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["main.py"])
    path = tmp_path / "tiny.yaml"
    path.write_text(f"""
model: {{model_name_or_path: {model_dir()}, rank: 4, max_new_tokens: 4}}
data: {{dataset: {rows_file}, val_size: 4, batch_size: 4, exact_match_rows: 4}}
sampling: {{activated_layers: 2, interval_steps: 2, threshold: 2.0, always_train: [norm]}}
checkpoint: {{monitor: val_loss, every_n_train_steps: 2}}
trainer:
  {{accelerator: cpu, devices: 1, precision: 32-true, max_steps: 4, val_check_interval: 2, num_sanity_val_steps: -1,
    enable_progress_bar: false, default_root_dir: runs, log_every_n_steps: 1}}
""")
    return path


@pytest.fixture
def config(whole_config: Path, bare_runs: None) -> Path:
    """The same, for runs without pictures and without a prediction of memory."""
    return whole_config


def run(command: str, config: Path, *more: str) -> None:
    main([command, "--config", str(config), *more])


def test_fit_says_what_it_will_do_what_it_gained_and_how_to_go_on(
    whole_config: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "ows_lightning")
    run("fit", whole_config)
    said = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("ows_lightning"))
    whole = sum(p.numel() for p in tiny_model("llama", vocab_size=320).parameters())
    expected = [
        r"Model +\S+llama-chatml \(LlamaForCausalLM\), [\d.]+K weights in float32, 4 blocks",
        r"Data +36 rows, [\d,]+ tokens, 72 of them targets; 4 validation rows",
        r"A row +<\|im_start\|>user\\nis \d+ (odd|even)\?<\|im_end\|>\\n<\|im_start\|>assistant\\n«(yes|no)<\|im_end\|>»",
        r"Training +4 steps; at a time 2 blocks \+ norm: [\d.]+K weights \([\d.]+%\); new blocks every 2 steps",
        r"Memory +[\d.]+ GB predicted for tensors, [\d.]+ GB available on cpu",
        r"Run folder +runs/version_0",
        r"Before training: validation loss [\d.]+, exact match [\d.]+%",
        r"Over the run, [234] of 4 blocks train: [\d.]+K weights \([\d.]+%\)",
        r"After training: validation loss [\d.]+ -> [\d.]+, exact match [\d.]+% -> [\d.]+%",
        r"runs/version_0 has the model in model/ .*, checkpoints/, figures, pictures",
    ]
    position = 0
    for pattern in expected:  # in this order
        found = re.compile(pattern).search(said, position)
        assert found, f"{pattern}\nnot in\n{said[position:]}"
        position = found.end()
    share = float(re.search(r"at a time .*\(([\d.]+)%\)", said)[1])  # type: ignore[index]
    block = sum(p.numel() for p in tiny_model("llama").model.layers[0].parameters())
    assert share == pytest.approx(100 * (2 * block + 32) / whole, abs=2)

    history = (Path("runs/version_0") / "sampling_history.csv").read_text().split("\n")[1:3]
    drawn = {block for line in history for block in line.split(",")[2].split()}
    assert f"Over the run, {len(drawn)} of 4 blocks train" in said

    capsys.readouterr()
    for command in re.findall(r"python main\.py (.+)", said[position:]):
        main([*shlex.split(command)])
    output = capsys.readouterr().out
    assert "Written: runs/version_0/report/report.html" in output
    assert re.search(r"^test_loss +[\d.]+$", output, flags=re.MULTILINE)


@pytest.mark.slow
def test_a_resumed_run_keeps_the_figures_from_before(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ows_lightning")
    run("fit", config, "--trainer.max_steps", "2")
    before = re.search(r"Before training: validation loss ([\d.]+)", caplog.text)[1]  # type: ignore[index]
    caplog.clear()
    run("fit", config, "--ckpt_path", "last")
    assert re.search(rf"After training: validation loss {before} -> ", caplog.text)
    assert "Nothing was trained" not in caplog.text
    run("fit", config, "--ckpt_path", "last")
    assert "Nothing was trained: the checkpoint is of step 4 already; raise max_steps" in caplog.text


def test_predict_writes_a_line_a_row(
    config: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "ows_lightning")
    run("predict", config, "--trainer.enable_progress_bar", "true")
    assert "Written: runs/version_0/predictions.jsonl" in capsys.readouterr().out.splitlines()  # beside no bar
    assert "ckpt_path: none is given, so this is about the model as it is loaded" in caplog.messages
    rows = [json.loads(line) for line in Path("runs/version_0/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert all(row.keys() == {"row", "prompt", "reference", "generated"} for row in rows)
    assert [row["row"] for row in rows] == [0, 1, 2, 3]
    assert {row["reference"] for row in rows} <= {"yes", "no"}


def test_a_development_run_of_predict_leaves_the_answers_that_are_there(config: Path) -> None:
    answers = Path("runs/predictions.jsonl")
    answers.parent.mkdir()
    answers.write_text("of a whole run")
    run("predict", config, "--trainer.fast_dev_run", "true")
    assert answers.read_text() == "of a whole run"
    assert [path for path in Path("runs").rglob("*") if path.is_file()] == [answers]


def test_validate_prints_each_figure_once(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("validate", config)
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("val_")]
    assert lines == ["val_loss", "val_perplexity", "val_exact_match"]


def test_scores_are_written_drawn_and_taken_by_a_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("score", config, "--output", "scores")
    table = capsys.readouterr().out.splitlines()
    assert len([line for line in table if re.fullmatch(r" +[0-3] +[\d.]+ +[\d.]+", line)]) == 4
    assert Path("scores/outlier_scores.png").read_bytes().startswith(b"\x89PNG")
    scores = json.loads(Path("scores/outlier_scores.json").read_text())
    run("fit", config, "--sampling.scores", "scores/outlier_scores.json", "--trainer.max_steps", "2")
    used = json.loads(Path("runs/version_0/outlier_scores.json").read_text())
    assert used["probabilities"] == scores["probabilities"]


@pytest.mark.slow
def test_scores_serve_the_models_that_were_made_of_the_scored_one(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    run("score", config)
    without = json.loads(Path("outlier_scores.json").read_text())
    assert without.pop("architecture") == {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64}
    Path("older.json").write_text(json.dumps(without))
    given = ["--trainer.max_steps", "1", "--sampling.scores"]
    run("fit", config, *given, "outlier_scores.json")
    assert "sampling.scores" not in caplog.text
    for file in ("outlier_scores.json", "older.json"):
        caplog.clear()
        run("fit", config, *given, file, "--model.model_name_or_path", "runs/version_0/model")
        assert f"sampling.scores: '{file}' holds the scores of '{without['model']}'" in caplog.text


def test_commands_of_one_process_wait_for_no_other(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    awaited: list[int] = []  # the watchdog would end the command if so many were not there in time
    monkeypatch.setattr("ows_lightning.cli.peer_watchdog.set_local_world_size", awaited.append)
    run("score", config, "--trainer.devices", "2", "--trainer.strategy", "ddp_layerwise")
    assert awaited == []
    assert Path("outlier_scores.json").is_file()


def test_scores_are_outlier_ratios_whatever_the_config_samples_by(config: Path) -> None:
    run("score", config, "--output", "by_outliers")
    run("score", config, "--output", "uniform", "--sampling.distribution", "uniform")
    ratios = [
        json.loads(Path(name, "outlier_scores.json").read_text())["outlier_ratios"] for name in ("by_outliers", "uniform")
    ]
    assert ratios[0] == ratios[1] != [0.0] * 4


@pytest.mark.slow
def test_plan_loads_nothing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (weights,) = Path(re.search(r"model_name_or_path: (\S+),", config.read_text())[1]).glob("*.safetensors")  # type: ignore[index]
    weights.unlink()
    run(
        "plan", config, "--trainer.accelerator", "gpu", "--trainer.devices", "8", "--method", "ows,full", "--output", "planned"
    )
    said = capsys.readouterr().out
    assert "ows" in said
    assert "trainer.strategy: `fit` refuses auto here" in said
    run("plan", config, "--method", "[full]", "--format", "json")
    plan = json.loads(capsys.readouterr().out)
    assert list(plan) == ["full"]
    assert plan["full"]["peak_bytes"] == sum(plan["full"]["bytes"].values())
    assert {path.name for path in Path("planned").iterdir()} == {"plan.json", "plan.png"}
    assert not Path("runs").exists()


def test_export_of_the_last_checkpoint_is_the_model_of_the_run(config: Path) -> None:
    run("fit", config)
    trained = Path("runs/version_0")
    run("export", config, "--ckpt_path", str(trained / "checkpoints" / "last.ckpt"))  # beside what else the run left
    files = [load_file(folder / "model.safetensors") for folder in (trained / "model", trained / "model-last")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    run("export", config, "--ckpt_path", "last", "--output", "half", "--trainer.precision", "16-true")  # needs no GPU
    assert all(torch.equal(value, files[0][name].half()) for name, value in load_file("half/model.safetensors").items())
    cards = [(folder / "README.md").read_text() for folder in (trained / "model", trained / "model-last")]
    for card in cards:
        assert "| Sampling | outlier, 2 blocks every 2 steps |" in card
        assert "| Optimizer steps | 4 |" in card
        assert "activated_layers: 2" in card


@pytest.mark.slow
def test_every_command_takes_the_config_that_fit_wrote(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("fit", config, "--trainer.max_steps", "2")
    written, last = Path("runs/version_0/config.yaml"), "runs/version_0/checkpoints/last.ckpt"
    assert "ckpt_path: null" in written.read_text()
    capsys.readouterr()
    run("validate", written)
    run("test", written, "--ckpt_path", last)
    run("predict", written)
    run("score", written)
    run("plan", written, "--method", "ows")
    run("export", written, "--ckpt_path", last)
    said = capsys.readouterr().out
    for result in ("val_loss", "test_loss", "predictions.jsonl", "outlier_scores.json", "peak", "model-last"):
        assert result in said


def test_loggers_and_generations_by_yaml(whole_config: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Path("more.yaml").write_text("""
trainer:
  logger:
  - {class_path: CSVLogger, init_args: {save_dir: runs, name: csv}}
  - {class_path: TensorBoardLogger, init_args: {save_dir: runs, name: board}}
  callbacks:
  - {class_path: EarlyStopping, init_args: {monitor: val_loss}}
  - {class_path: ows_lightning.callbacks.generations.ShowGenerations, init_args: {prompts: [is 3 odd?], every_n_steps: 2}}
""")
    caplog.set_level(logging.INFO, "ows_lightning")
    run("fit", whole_config, "--config", "more.yaml")
    for step in (0, 2, 4):
        assert re.search(rf"Answers after step {step}:\n  'is 3 odd\?' -> '", caplog.text)
    assert (Path("runs/csv/version_0/metrics.csv")).is_file()
    events = EventAccumulator("runs/board/version_0")
    events.Reload()
    tags = events.Tags()
    assert {"train_loss", "val_loss", "tokens_per_second"} <= set(tags["scalars"])
    assert {"outlier_scores", "sampling_history", "loss"} <= set(tags["images"])
    assert [event.step for event in events.Tensors("generations/text_summary")] == [0, 2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("save_dir", ["board", "runs"])
def test_other_loggers_stand_beside_the_csv_one(whole_config: Path, save_dir: str) -> None:
    pytest.importorskip("tensorboard")
    run(
        "fit",
        whole_config,
        "--trainer.max_steps",
        "2",
        "--trainer.logger",
        "TensorBoardLogger",
        "--trainer.logger.save_dir",
        save_dir,
    )
    files = {"metrics.csv", "loss.png", "config.yaml", "sampling_history.csv", "outlier_scores.json", "model", "checkpoints"}
    assert files <= {path.name for path in Path("runs/version_0").iterdir()}
    assert "| Last validation loss |" in Path("runs/version_0/model/README.md").read_text()
    assert list(Path(save_dir).glob("lightning_logs/version_0/events.*"))
    main(["report", "runs"])
    assert Path("runs/report/loss.png").is_file()


class PlainModule(LightningModule):
    """Somebody else's LightningModule."""

    def __init__(self, optimizer: OptimizerCallable = torch.optim.AdamW, warmup_steps: int | None = None) -> None:
        super().__init__()  # to ours, `warmup_steps` is a number
        self.model = tiny_model("gpt2")
        self.optimizer = optimizer

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("train_loss", loss)
        return loss

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch).logits[:, -1]

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class PlainData(LightningDataModule):
    """Somebody else's LightningDataModule."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.randint(3, 100, (16, 12)), batch_size=4)

    predict_dataloader = train_dataloader


def test_classes_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["main.py"])
    classes = ["--model", "tests.cli.test_cli.PlainModule", "--data", "tests.cli.test_cli.PlainData"]
    classes += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    sampling = "--sampling.distribution uniform --sampling.activated_layers 1 --sampling.interval_steps 2"
    main(["fit", *classes, *sampling.split(), "--trainer.max_steps", "4"])
    assert Path("runs/version_0/sampling_history.csv").read_text().count("\n") == 3
    model = yaml.safe_load(Path("runs/version_0/config.yaml").read_text())["model"]
    assert model["init_args"]["optimizer"]["class_path"] == "torch.optim.AdamW"  # the module's own default
    main(["predict", *classes])
    assert not Path("runs/version_1/predictions.jsonl").exists()  # its predictions need not be texts


def test_an_evaluation_leaves_the_training_its_folder_and_config(config: Path) -> None:
    plain = ["--trainer.logger", "false", "--trainer.default_root_dir", "plain"]
    run("fit", config, *plain, "--trainer.max_steps", "1")
    written = Path("plain/config.yaml").read_text()
    run("validate", config, *plain)
    assert Path("plain/config.yaml").read_text() == written
    named = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs", "--trainer.logger.name="]
    named += ["--trainer.logger.version", "mine"]
    run("fit", config, *named, "--trainer.max_steps", "1")
    curves = Path("logs/mine/metrics.csv").read_text()
    run("validate", config, *named)
    assert Path("logs/mine/metrics.csv").read_text() == curves
    assert Path("logs/version_0/metrics.csv").exists()


@pytest.mark.slow
def test_start_is_quiet(config: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "main.py"), "fit", "--config", str(config), "--trainer.max_steps", "2"]
    command += ["--model.gradient_checkpointing", "true"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    said = done.stdout + done.stderr
    for noise in ("litlogger", "gemm_4bit", "LeafSpec", "many workers", "GPU available", "Deprecat", "FutureWarning"):
        assert noise not in said
    assert "Before training" in said
    for once in ("Seed set to 0", "`Trainer.fit` stopped"):  # two loggers would print them
        assert said.count(once) == 1


@pytest.mark.slow
def test_interrupt_is_one_line(config: Path, tmp_path: Path) -> None:
    launch = Launch(["fit", "--config", str(config), "--trainer.max_steps", "100000"], tmp_path / "out")
    while launch.processes[0].is_alive() and not list(tmp_path.glob("runs/version_0/checkpoints/*.ckpt")):
        time.sleep(0.1)
    os.kill(launch.processes[0].pid, signal.SIGINT)  # type: ignore[arg-type]
    assert launch.wait() == [130]
    said = launch.outputs[0].read_text()
    assert "error: interrupted; `--ckpt_path last` goes on from the newest checkpoint" in said
    assert "Traceback" not in said


class Interrupt(Callback):
    """Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("step", "hint"),
    [(1, "no checkpoint was saved yet"), (3, "`--ckpt_path last` goes on from the newest checkpoint")],
)
def test_an_interrupt_says_whether_the_run_can_go_on(
    config: Path, step: int, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)  # which Lightning ignores from then on
    callback = f"{{class_path: tests.cli.test_cli.Interrupt, init_args: {{step: {step}}}}}"
    try:
        with pytest.raises(SystemExit, match="130"):
            run("fit", config, "--trainer.callbacks", f"[{callback}]")
    finally:
        signal.signal(signal.SIGINT, before)
    assert f"error: interrupted; {hint}\n" in capsys.readouterr().err


@pytest.mark.slow
def test_a_resumed_run_says_what_it_changes(config: Path, capsys: pytest.CaptureFixture[str], caplog: Any) -> None:
    caplog.set_level(logging.INFO, "lightning.pytorch")
    run("fit", config, "--trainer.max_steps", "2", "--model.lr_scheduler_type", "constant")
    more = "--model.warmup_steps 0.5 --trainer.gradient_clip_val 0.5 --sampling.seed 3 --data.max_seq_length 64"
    run("fit", config, "--ckpt_path", "last", *more.split())
    said = caplog.text + capsys.readouterr().err
    changes = (
        "trainer.max_steps from 2 to 4, trainer.gradient_clip_val from None to 0.5, model.lr_scheduler_type from constant"
    )
    assert f"The resumed run changes {changes} to cosine" in said
    for change in ("model.warmup_steps from 0.03 to 0.5", "data.max_seq_length from 512 to 64", "sampling.seed from 0 to 3"):
        assert change in said


def test_barebones_leaves_the_model_alone(config: Path) -> None:
    config.write_text(re.sub(r"num_sanity_val_steps: -1,|log_every_n_steps: 1", "", config.read_text()))
    run("fit", config, "--trainer.barebones=true", "--checkpoint.monitor=null")
    assert [path.name for path in Path("runs").iterdir() if path.is_dir()] == ["model"]


def test_a_development_run_leaves_no_files_and_a_bar_of_the_users_is_the_only_one(
    config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ows_lightning")
    generations = "{class_path: ows_lightning.callbacks.generations.ShowGenerations, init_args: {prompts: [a?]}}"
    callbacks = ("--trainer.callbacks", f"[{{class_path: TQDMProgressBar}}, {generations}]")
    earlier = Path("runs/version_3/metrics.csv")
    earlier.parent.mkdir(parents=True)
    earlier.write_text("step,train_loss\n" + "".join(f"{step},{1 + step}\n" for step in range(20)))
    run("fit", config, "--trainer.fast_dev_run", "true", "--trainer.enable_progress_bar", "true", *callbacks)
    written = [path for path in Path("runs").rglob("*") if path.is_file() and path.name != ".lock"]
    assert written == [earlier]
    assert "checkpoints/" not in caplog.text  # nor is anything said to be there
    assert "poor result" not in caplog.text  # of another run's losses


def test_curves_by_time_and_tokens_do_not_end_at_the_last_logged_step(config: Path) -> None:
    run("fit", config, "--trainer.log_every_n_steps", "3")
    record = RunRecord.read(Path("runs"))
    steps, tokens = record.series("tokens")
    assert steps == [1, 2, 3]  # validations follow steps 1 and 3, counted from 0
    assert record.series("val_loss", "tokens")[0] == [tokens[0], tokens[2]]
    assert tokens[0] < tokens[1] < tokens[2]


def test_a_users_csv_logger_keeps_its_rows_in_a_resumed_run(config: Path) -> None:
    logger = "{class_path: CSVLogger, init_args: {save_dir: runs, name: mine, flush_logs_every_n_steps: 100}}"
    for steps, last in ((2, ()), (4, ("--ckpt_path", "last"))):
        more = ("--checkpoint.monitor", "null", "--sampling.interval_steps", "1", "--trainer.max_steps", str(steps), *last)
        run("fit", config, "--trainer.logger", logger, *more)
    steps, losses = RunRecord.read(Path("runs/mine/version_1")).series("train_loss")
    assert steps == [0, 1, 2, 3]
    assert losses[:2] == RunRecord.read(Path("runs/mine/version_0")).series("train_loss")[1]
    assert RunRecord.read(Path("runs/mine/version_1")).series("interval")[1] == [0, 1, 2, 3]


def test_a_run_without_validation_says_so_and_suggests_no_test_of_rows_that_there_are_not(
    config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ows_lightning")
    run("fit", config, "--trainer.max_steps", "1")
    assert "No validation in these 1 steps: lower trainer.val_check_interval" in caplog.text
    assert " test --config" in caplog.text
    caplog.clear()
    run("fit", config, "--trainer.max_steps", "1", "--data.val_size", "0", "--checkpoint.monitor", "null")
    assert "No validation" not in caplog.text
    assert " test --config" not in caplog.text


def test_answers_of_a_resumed_run_begin_where_the_run_began(config: Path) -> None:
    shows = "{class_path: ows_lightning.callbacks.generations.ShowGenerations, init_args: {prompts: [a?], every_n_steps: 2}}"
    for steps, last in ((2, ()), (4, ("--ckpt_path", "last"))):
        run("fit", config, "--trainer.callbacks", f"[{shows}]", "--trainer.max_steps", str(steps), *last)
    for version, expected in ((0, ["0", "2"]), (1, ["0", "2", "4"])):
        with Path(f"runs/version_{version}/generations.csv").open(newline="") as file:
            assert [row["step"] for row in csv.DictReader(file)] == expected


def test_a_default_that_is_an_enum_is_written_as_text(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning's Timer has one, and no run with it could write its config."""
    with pytest.raises(SystemExit):
        run("fit", config, "--trainer.callbacks", "Timer", "--trainer.callbacks.duration", "00:01:00:00", "--print_config")
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"][0]["init_args"]["interval"] == "step"


def test_without_checkpoints(config: Path) -> None:
    run("fit", config, "--trainer.enable_checkpointing", "false")
    assert Path("runs/version_0/model/model.safetensors").is_file()
    assert not list(Path("runs").rglob("*.ckpt"))


def test_slurm_in_an_interactive_job_is_explained(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_NAME", "mine")
    with pytest.raises(SystemExit, match="2"):
        run("fit", config)
    assert "unset SLURM_NTASKS" in capsys.readouterr().err
