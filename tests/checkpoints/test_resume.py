# ruff: noqa: F811
"""Runs that are killed, told to end, damaged or moved to other processes, and go on as if nothing had happened."""

from __future__ import annotations

import csv
import os
import pickle
import random
import resource
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file
from torch import Tensor

from ows_lightning.atomic_files import partial_path, replace_atomically
from ows_lightning.checkpoints.find import find_checkpoint, last_good, load_verified
from ows_lightning.checkpoints.fixed_settings import check_fixed_settings
from ows_lightning.checkpoints.io import AtomicCheckpointIO, save_error
from ows_lightning.cli.lightning_cli import OWSCLI
from ows_lightning.errors import RunError, UsageError
from tests.distributed.fixtures import Arguments, arguments, command_of, home  # noqa: F401
from tests.distributed.launch import Launch, run

SAVED = ["--checkpoint.every_n_train_steps=3", "--checkpoint.save_top_k=-1", "--trainer.max_steps=15",
         "--sampling.interval_steps=5"]  # fmt: skip
EPOCHS = ["--trainer.max_epochs=5", "--trainer.max_steps=-1"]  # as many: the schedule has to ask how many batches there are
ROUNDING = ["--model.optimizer=GaLoreAdamW", "--model.optimizer.stochastic_rounding=true"]
KILL, SIGNALLED = "tests.distributed.probe.Kill", "tests.distributed.probe.Signalled"
UNEVEN = ["--model.update_proj_gap=7", "--trainer.accumulate_grad_batches=2", "--sampling.interval_steps=5"]


def weights(runs: Path, version: int | None = None) -> dict[str, Tensor]:
    """The weights that a run ended with; those of the last run by default."""
    folders = sorted(runs.glob("version_*"), key=lambda path: int(path.name[8:]))
    return load_file(folders[-1 if version is None else version] / "model" / "model.safetensors")


def assert_identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, weight in one.items():
        assert (other[name] - weight).norm() <= 1e-4 * weight.norm(), name


def at_step(runs: Path, step: int, version: int = 0) -> Path:
    return next((runs / f"version_{version}" / "checkpoints").glob(f"epoch=*-step={step}.ckpt"))


# ------------------------------------------------------------------ exactly


@pytest.mark.parametrize(
    ("strategy", "ranks", "more"),
    [
        ("auto", 1, ["--data.num_workers=1", "--trainer.precision=bf16-true", *EPOCHS]),
        pytest.param("ddp_layerwise", 2, [], marks=pytest.mark.slow),
        pytest.param("fsdp2", 2, ["--trainer.precision=bf16-true", *ROUNDING, *EPOCHS], marks=pytest.mark.slow),
    ],
    ids=["one process", "ddp_layerwise", "fsdp2"],
)
def test_a_resumed_run_equals_one_that_went_through(
    strategy: str, ranks: int, more: list[str], arguments: Arguments, tmp_path: Path
) -> None:
    command = arguments(*SAVED, *UNEVEN, *more, "--checkpoint.every_n_train_steps=4", strategy=strategy, ranks=ranks)
    run(command, tmp_path / "through", ranks)
    runs = tmp_path / "runs"
    # In mid-epoch and mid-interval: 41 rows are 6 batches, which are 3 steps; intervals have 5 steps.
    run([*command, f"--ckpt_path={at_step(runs, 8)}"], tmp_path / "resumed", ranks)
    assert_identical(weights(runs, 0), weights(runs, 1))
    # Not again after the first micro-batch, whose gradients it would not have.
    assert not list((runs / "version_1" / "checkpoints").glob("*step=8.ckpt"))
    folders = [runs / "version_0", runs / "version_1"]
    assert len({(folder / "sampling_history.csv").read_text() for folder in folders}) == 1
    losses = [[row["train_loss"] for row in csv.DictReader((f / "metrics.csv").open()) if row["train_loss"]] for f in folders]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 15


@pytest.mark.parametrize(
    ("kills", "strategy", "ranks", "more"),
    [
        (1, "auto", 1, []),
        pytest.param(2, "auto", 1, [], marks=pytest.mark.slow),
        pytest.param(3, "auto", 1, ["--data.num_workers=1", "--trainer.precision=bf16-true"], marks=pytest.mark.slow),
        pytest.param(2, "ddp_layerwise", 2, [], marks=pytest.mark.slow),
        pytest.param(2, "fsdp2", 2, [], marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments(
    kills: int, strategy: str, ranks: int, more: list[str], arguments: Arguments, tmp_path: Path
) -> None:
    steps = 40 if ranks == 1 else 20
    settings = [*UNEVEN, *more, "--checkpoint.every_n_train_steps=1", f"--trainer.max_steps={steps}"]
    run(arguments(*settings, strategy=strategy, ranks=ranks, runs=tmp_path / "through"), tmp_path / "through", ranks)
    command = [*arguments(*settings, strategy=strategy, ranks=ranks), "--ckpt_path=last"]
    moments = random.Random(kills)
    for kill in range(kills):
        latest = steps * (kill + 1) // (kills + 1)  # by itself: all its steps may come while this process gets no turn
        itself = [f"--trainer.callbacks+={KILL}", "--trainer.callbacks.moment=on_train_batch_start"]
        launch = Launch([*command, *itself, f"--trainer.callbacks.step={latest}"], tmp_path / f"kill{kill}", ranks)
        folder = tmp_path / "runs" / f"version_{kill}" / "checkpoints"
        wanted, seen = moments.randint(1, steps // (2 * kills)), set[str]()
        while len(seen) < wanted and launch.processes[0].is_alive():
            seen |= {path.name for path in folder.glob("epoch=*.ckpt")}
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.1))
        launch.kill()
        assert all(process.exitcode for process in launch.processes), launch.output
    run(command, tmp_path / "last", ranks)
    assert_identical(weights(tmp_path / "through"), weights(tmp_path / "runs"))


SLURM = {"SLURM_JOB_ID": "1234", "SLURM_JOB_NAME": "train", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NTASKS": "2"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_at_the_end_of_the_step(number: signal.Signals, arguments: Arguments, tmp_path: Path) -> None:
    """In its midst. SIGUSR1 reaches one of two processes under SLURM, and the job is put into the queue again, once."""
    ranks, strategy = (2, "fsdp2") if number is signal.SIGUSR1 else (1, "auto")
    settings = [*UNEVEN, "--trainer.max_steps=14", "--checkpoint.every_n_train_steps=2"]
    command = arguments(*settings, strategy=strategy, ranks=ranks)
    scontrol, requeued = tmp_path / "bin" / "scontrol", tmp_path / "requeued.txt"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {requeued}\n')
    scontrol.chmod(0o755)
    slurm = {**SLURM, "PATH": f"{scontrol.parent}:{os.environ['PATH']}"} if number is signal.SIGUSR1 else {}
    signalled = [f"--trainer.callbacks+={SIGNALLED}", "--trainer.callbacks.during=step 5"]
    signalled += [f"--trainer.callbacks.number={int(number)}"]
    launch = Launch([*command, *signalled], tmp_path / "told", ranks, environment=slurm)
    assert launch.wait() == [1] * ranks, launch.output
    saved = tmp_path / "runs" / "version_0" / "checkpoints" / "interrupted-step=5.ckpt"
    assert launch.output.count(f"stopped by {number.name} after step 5") == ranks
    assert launch.output.count(f"resume with --ckpt_path {saved}") == ranks
    assert (requeued.read_text() if slurm else "requeue 1234\n") == "requeue 1234\n"
    run([*command, "--ckpt_path=last"], tmp_path / "resumed", ranks)
    run(arguments(*settings, strategy=strategy, ranks=ranks, runs=tmp_path / "through"), tmp_path / "through", ranks)
    assert_identical(weights(tmp_path / "through"), weights(tmp_path / "runs"))


@pytest.mark.slow
@pytest.mark.parametrize(("during", "strategy", "ranks"), [("validation", "auto", 1), ("scoring", "fsdp2", 2)])
def test_a_signal_before_the_first_step_waits_for_its_end(
    during: str, strategy: str, ranks: int, arguments: Arguments, tmp_path: Path
) -> None:
    signalled = [f"--trainer.callbacks+={SIGNALLED}", f"--trainer.callbacks.during={during}"]
    command = arguments(*signalled, "--data.val_size=4", "--trainer.max_steps=3", strategy=strategy, ranks=ranks)
    launch = Launch(command, tmp_path / "told", ranks)
    assert launch.wait() == [1] * ranks, launch.output
    saved = tmp_path / "runs" / "version_0" / "checkpoints" / "interrupted-step=1.ckpt"
    assert launch.output.count(f"stopped by SIGTERM after step 1; resume with --ckpt_path {saved}") == ranks
    assert find_checkpoint("last", tmp_path / "runs") == saved


# ------------------------------------------------------------------ on other processes

FULL = ["--trainer.strategy.class_path=ows_lightning.distributed.FSDP2Strategy",
        "--trainer.strategy.init_args.save_distributed_checkpoint=false"]  # fmt: skip


@pytest.fixture(scope="module")
def runs_of_two(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two processes, which nobody changes."""
    folder = tmp_path_factory.mktemp("two")
    run(command_of(home, folder / "runs", *SAVED, strategy="fsdp2", ranks=2), folder, 2)
    return folder / "runs"


@pytest.fixture(scope="module")
def runs_of_one(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on one."""
    folder = tmp_path_factory.mktemp("one")
    run(command_of(home, folder / "runs", *SAVED), folder)
    return folder / "runs"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_checkpoints_of_two_processes_load_on_one_and_back(
    kind: str, runs_of_one: Path, runs_of_two: Path, arguments: Arguments, tmp_path: Path
) -> None:
    full = FULL if kind == "full" else []
    if full:
        run([*arguments(*SAVED, strategy="fsdp2", ranks=2, runs=tmp_path / "two"), *full], tmp_path / "two", 2)
    of_two, of_one = at_step(tmp_path / "two" if full else runs_of_two, 6), at_step(runs_of_one, 6)
    assert of_two.is_dir() == (kind == "sharded")
    run([*arguments(*SAVED, runs=tmp_path / "to-one"), f"--ckpt_path={of_two}"], tmp_path / "to-one")
    run(
        [*arguments(*SAVED, strategy="fsdp2", ranks=2, runs=tmp_path / "to-two"), *full, f"--ckpt_path={of_one}"],
        tmp_path / "to-two",
        2,
    )
    through = weights(runs_of_one)
    for runs in ("to-one", "to-two"):
        assert_close(through, weights(tmp_path / runs))


@pytest.mark.slow
def test_checkpoints_of_two_processes_load_on_four_and_back(runs_of_two: Path, arguments: Arguments, tmp_path: Path) -> None:
    def fsdp2(ranks: int, *more: str) -> None:
        command = arguments(*SAVED, *more, strategy="fsdp2", ranks=ranks, runs=tmp_path / str(ranks))
        run(command, tmp_path / f"to-{ranks}", ranks)

    fsdp2(4, f"--ckpt_path={at_step(runs_of_two, 6)}")
    fsdp2(2, f"--ckpt_path={at_step(tmp_path / '4', 9)}")
    through = weights(runs_of_two)
    assert_close(through, weights(tmp_path / "4"))
    assert_close(through, weights(tmp_path / "2"))


@pytest.mark.slow
def test_a_sharded_checkpoint_exports_from_its_weights_alone(runs_of_two: Path, arguments: Arguments, tmp_path: Path) -> None:
    """The weights that the run began with are not read."""
    command = arguments()[1:]
    name = command.index("--model.model_name_or_path") + 1
    command[name] = str(shutil.copytree(command[name], tmp_path / "llama"))
    (tmp_path / "llama" / "model.safetensors").write_bytes(b"")
    last = runs_of_two / "version_0" / "checkpoints" / "last.ckpt"
    run(["export", *command, f"--ckpt_path={last}", f"--output={tmp_path / 'exported'}"], tmp_path / "export")
    assert_identical(weights(runs_of_two), load_file(tmp_path / "exported" / "model.safetensors"))


# ------------------------------------------------------------------ damaged


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder of two checkpoints, of which `second.ckpt` is the newer."""
    folder = tmp_path / "version_0" / "checkpoints"
    content = {"state_dict": {"w": torch.arange(1000.0)}, "loops": {}, "global_step": 3, "optimizer_states": []}
    for number, name in enumerate(("first", "second")):
        AtomicCheckpointIO().save_checkpoint({**content, "global_step": number}, folder / f"{name}.ckpt")
        os.utime(folder / f"{name}.ckpt", (number, number))
    return folder


def test_a_cut_checkpoint_is_named_and_passed_over(saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest = saved / "second.ckpt"
    assert find_checkpoint("last", tmp_path) == newest
    whole, places = newest.read_bytes(), random.Random(0)
    for _ in range(20):
        newest.write_bytes(whole[: places.randrange(len(whole))])
        with pytest.raises(UsageError, match=r"second.ckpt' is damaged.*last good one is '.*first.ckpt'"):
            find_checkpoint(str(newest), tmp_path)
        assert not caplog.messages  # the error says it
        assert find_checkpoint("last", tmp_path) == saved / "first.ckpt"
        assert f"Passed over the damaged checkpoint {newest} (" in caplog.text
        caplog.clear()


@pytest.mark.slow
def test_a_cut_shard_is_found(runs_of_two: Path, arguments: Arguments, tmp_path: Path) -> None:
    command = arguments(*SAVED, strategy="fsdp2", ranks=2)
    shutil.copytree(runs_of_two, tmp_path / "runs", symlinks=True)
    checkpoint = at_step(tmp_path / "runs", 12)
    places = random.Random(0)
    for file in [*checkpoint.glob("*.distcp"), checkpoint / "meta.pt", checkpoint / ".metadata"]:
        whole = file.read_bytes()
        for place in [*(places.randrange(len(whole)) for _ in range(5)), len(whole) - 1]:
            file.write_bytes(whole[:place])
            with pytest.raises(UsageError, match="is damaged") as error:
                find_checkpoint(str(checkpoint), tmp_path)
            assert "could run code" not in str(error.value)
        file.write_bytes(whole)
    assert find_checkpoint(str(checkpoint), tmp_path) == checkpoint
    for file in checkpoint.glob("*.distcp"):  # as long as it should be, and found out when it is read
        file.write_bytes(bytes(file.stat().st_size))
    launch = Launch([*command, f"--ckpt_path={checkpoint}"], tmp_path / "resumed", 2)
    assert launch.wait() == [2, 2], launch.output
    assert launch.output.count("is damaged or no checkpoint of a run") == 2
    assert launch.output.count(f"the last good one is '{checkpoint.parent}") == 2
    assert "Traceback" not in launch.output


class Malicious:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, ("ran",)


def test_a_checkpoint_that_would_run_code_is_refused(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Malicious(), "loops": {}, "global_step": 1}, saved / "third.ckpt")
    with pytest.raises(UsageError, match="more than tensors and plain values"):
        find_checkpoint(str(saved / "third.ckpt"), tmp_path)
    sharded = saved / "fourth.ckpt"
    sharded.mkdir()
    torch.save({"loops": {}, "global_step": 1}, sharded / "meta.pt")
    (sharded / ".metadata").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(UsageError, match="more than tensors and plain values"):
        find_checkpoint(str(sharded), tmp_path)
    assert find_checkpoint("last", tmp_path) == saved / "second.ckpt"
    with fsspec.open("memory://bucket/fifth.ckpt", "wb") as file:
        torch.save({"state_dict": Malicious(), "loops": {}, "global_step": 1}, file)
    with pytest.raises(pickle.UnpicklingError):
        AtomicCheckpointIO().load_checkpoint("memory://bucket/fifth.ckpt", weights_only=False)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_whose_replacement_was_cut_off_is_found(saved: Path) -> None:
    (saved / "first.ckpt").unlink()
    (saved / "second.ckpt").rename(saved / ".second.ckpt.old")  # a kill before the new one had its name
    assert last_good(saved) == saved / ".second.ckpt.old"


def test_a_folder_of_shards_that_is_being_removed_is_no_checkpoint_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    path.mkdir()
    monkeypatch.setattr(LocalFileSystem, "rm", lambda *_, **__: 1 / 0)  # a kill at this moment
    with pytest.raises(ZeroDivisionError):
        AtomicCheckpointIO().remove_checkpoint(path)
    assert [each.name for each in tmp_path.iterdir()] == [".last.ckpt.partial"]


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_checkpoint_of_the_other_kind_stays_until_the_new_one_is_whole(
    is_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a run on one device is resumed by ``fsdp2``, or the other way round."""
    path, partial = tmp_path / "last.ckpt", tmp_path / ".last.ckpt.partial"
    for written, folder in ((path, not is_folder), (partial, is_folder)):
        if folder:
            written.mkdir()
        (written / "shard" if folder else written).write_text(written.name)
    with monkeypatch.context() as killed:
        killed.setattr(Path, "replace", lambda *paths: 1 / 0)  # a kill at this moment
        with pytest.raises(ZeroDivisionError):
            replace_atomically(partial, path)
    old = tmp_path / ".last.ckpt.old"
    assert old.exists() or path.is_file()
    replace_atomically(partial, path)
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]
    assert path.is_dir() == is_folder


class Parsed(Exception):
    """The command line was understood."""


class ParsingCLI(OWSCLI):
    """Stops when all is parsed, before anything is made of it."""

    def before_instantiate_classes(self) -> None:
        found.append(self.config[self.config.subcommand].ckpt_path)
        raise Parsed


found: list[object] = []


@pytest.mark.parametrize("command", ["fit", "test", "export"])
@pytest.mark.parametrize("place", ["version_0/checkpoints", "checkpoints", "elsewhere"])
def test_last_looks_where_the_run_saves(
    command: str, place: str, saved: Path, arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["main.py"])
    root = tmp_path / "root"
    where = {"checkpoints": ["--trainer.logger=false"], "elsewhere": [f"--checkpoint.dirpath={root / place}"]}
    shutil.copytree(saved, root / place)
    with pytest.raises(Parsed):
        ParsingCLI([command, *arguments(*where.get(place, []), runs=root)[1:], "--ckpt_path=last"])
    assert Path(str(found.pop())) == root / place / "second.ckpt"


@pytest.mark.parametrize("command", ["test", "validate", "predict", "export"])
def test_no_untrained_model_is_evaluated_for_want_of_a_checkpoint(
    command: str, arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["main.py"])
    with pytest.raises(UsageError, match=r"ckpt_path: no run has saved a checkpoint in '.*runs'"):
        ParsingCLI([command, *arguments()[1:], "--ckpt_path=last"])


def test_last_without_a_checkpoint_starts_anew(arguments: Arguments, tmp_path: Path) -> None:
    command = arguments("--trainer.max_steps=2")
    assert "starts anew" in run([*command, "--ckpt_path=last"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(strategy: str, arguments: Arguments, tmp_path: Path) -> None:
    ranks, folder = 2 if strategy == "fsdp2" else 1, tmp_path / "saved"
    command = arguments(*SAVED, f"--checkpoint.dirpath={folder}", strategy=strategy, ranks=ranks)
    run([*command, "--trainer.max_steps=3"], tmp_path / "first", ranks)
    launch = Launch([*command, "--ckpt_path=last"], tmp_path / "full", ranks, file_bytes=100_000)
    assert launch.wait() == [1] * ranks, launch.output
    assert launch.output.count("can't write the checkpoint") == ranks
    assert launch.output.count("File too large") == ranks
    assert launch.output.count(f"'{last_good(folder)}' is still good") == ranks
    assert not list(folder.glob("*step=6*"))


@pytest.mark.slow
def test_what_fails_on_one_process_alone_ends_all(arguments: Arguments, tmp_path: Path) -> None:
    """Rank 0 makes the folder for the shards."""
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "steps").write_text("in the way")
    options = ["--trainer.max_steps=2", "--checkpoint.every_n_train_steps=1", "--checkpoint.filename=steps/{step}"]
    launch = Launch(arguments(*options, f"--checkpoint.dirpath={tmp_path / 'saved'}", strategy="fsdp2", ranks=2), tmp_path, 2)
    assert launch.wait() == [1, 1], launch.output
    assert launch.output.count("can't write the checkpoint") == 2
    assert launch.output.count("Not a directory") == 2


# ------------------------------------------------------------------ changed settings


@pytest.mark.slow
def test_another_model_rank_or_number_of_blocks_is_refused(arguments: Arguments, tmp_path: Path) -> None:
    run(arguments("--trainer.max_steps=3", "--checkpoint.every_n_train_steps=3"), tmp_path / "first")
    wide = arguments(hidden_size=64)
    namesake = shutil.copytree(wide[wide.index("--model.model_name_or_path") + 1], tmp_path / "elsewhere" / "llama")
    changes = {
        "model.model_name_or_path": arguments(num_hidden_layers=5),
        "model.rank": arguments("--model.rank=4"),
        "hidden_size": [*arguments(), f"--model.model_name_or_path={namesake}"],
        "sampling.activated_layers": arguments("--sampling.activated_layers=3"),
    }
    for key, command in changes.items():
        launch = Launch([*command, "--ckpt_path=last"], tmp_path / key)
        assert launch.wait() == [2], launch.output
        line = launch.output.strip().splitlines()[-1]
        assert line.startswith("error: ckpt_path"), launch.output
        assert key in line


def test_a_run_of_another_program_is_refused_but_its_weights_are_not() -> None:
    check_fixed_settings(None, {"model.rank": 8}, resumes=False)
    with pytest.raises(UsageError, match="ckpt_path: the checkpoint is of another program's run"):
        check_fixed_settings(None, {"model.rank": 8})


def test_evaluating_asks_for_the_same_model_alone() -> None:
    saved = {"model.rank": 8, "number of blocks": 4}
    check_fixed_settings(saved, {"model.rank": 4, "number of blocks": 4}, resumes=False)
    with pytest.raises(UsageError, match=r"number of blocks \(4 in the checkpoint, 6 now\)"):
        check_fixed_settings(saved, {"model.rank": 4, "number of blocks": 6}, resumes=False)


def test_a_model_may_have_been_moved_to_another_folder() -> None:
    key = "model.model_name_or_path"
    check_fixed_settings({key: "/before/llama"}, {key: "now/llama"})
    with pytest.raises(UsageError, match=r"model_name_or_path \('/before/llama' in the checkpoint, '/before/gpt2' now\)"):
        check_fixed_settings({key: "/before/llama"}, {key: "/before/gpt2"})


def test_a_run_from_before_blocks_trained_at_rest_goes_on_without() -> None:
    saved, now = {"sampling.interval_steps": 2}, {"sampling.interval_steps": 2, "sampling.resting_rank": 0}
    check_fixed_settings(saved, now)
    with pytest.raises(UsageError, match=r"sampling.resting_rank \(None in the checkpoint, 4 now\)"):
        check_fixed_settings(saved, {**now, "sampling.resting_rank": 4})


@pytest.mark.slow
def test_other_options_of_the_optimizer_and_number_of_steps_are_taken_and_logged(arguments: Arguments, tmp_path: Path) -> None:
    optimizer = ["--model.optimizer=GaLoreAdamW", "--model.lr_scheduler_type=constant", "--model.warmup_steps=0"]
    command = arguments("--checkpoint.every_n_train_steps=3", *optimizer)
    every = ["--checkpoint.every_n_train_steps=1", "--checkpoint.save_top_k=-1"]
    saved = ["--model.optimizer.lr=1e-3", "--model.optimizer.moments_dtype=bfloat16"]
    run([*command, *saved, "--trainer.max_steps=3"], tmp_path / "first")
    options = ["--model.optimizer.lr=5e-4", "--trainer.max_steps=5", "--ckpt_path=last", *every]
    printed = run([*command, *options], tmp_path / "second")
    assert "moments_dtype from bfloat16 to float32" in printed
    states = torch.load(at_step(tmp_path / "runs", 4, version=1), weights_only=True)["optimizer_states"][0]["state"].values()
    assert {state["exp_avg"].dtype for state in states} == {torch.float32}
    assert "lr from 0.001 to 0.0005" in printed
    assert "trainer.max_steps from 3 to 5" in printed
    rows = list(csv.DictReader((tmp_path / "runs" / "version_1" / "metrics.csv").open()))
    rates = [float(row[key]) for row in rows for key in row if key.startswith("lr-") and key.endswith("pg1") and row[key]]
    assert rates == [1e-3, 1e-3, 1e-3, 5e-4, 5e-4]


# ------------------------------------------------------------------ one of several


@pytest.mark.slow
def test_the_config_of_a_resumed_run_does_not_name_the_checkpoint_that_it_went_on_from(
    arguments: Arguments, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    run(arguments("--trainer.max_steps=2"), tmp_path / "first")
    run(arguments("--trainer.max_steps=4", "--ckpt_path=last"), tmp_path / "second")
    assert load_verified(runs / "version_1" / "checkpoints" / "last.ckpt")["global_step"] == 4
    assert yaml.safe_load((runs / "version_1" / "config.yaml").read_text())["ckpt_path"] is None


@pytest.mark.parametrize(
    ("strategy", "change", "line"),
    [
        (
            "auto",
            "model.optimizer=torch.optim.SGD",
            "model.optimizer: the checkpoint is of AdamW, this run of SGD; set it back",
        ),
        pytest.param(
            "fsdp2",
            "model.optimizer=torch.optim.SGD",
            "model.optimizer: the checkpoint is of AdamW, this run of SGD; set it back",
            marks=pytest.mark.slow,
        ),
        ("auto", "data.streaming=true", "data.streaming: the checkpoint is of a run with False; set it so, or start anew"),
    ],
    ids=["optimizer", "optimizer of shards", "streaming"],
)
def test_what_the_checkpoint_has_no_state_for_is_refused(
    strategy: str, change: str, line: str, arguments: Arguments, tmp_path: Path
) -> None:
    optimizer = ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-3", "--model.rank=null"]
    command = arguments(*optimizer, strategy=strategy)
    run([*command, "--trainer.max_steps=2"], tmp_path / "first")
    launch = Launch([*command, "--trainer.max_steps=4", "--ckpt_path=last", f"--{change}"], tmp_path / "second")
    assert launch.wait() == [2]
    assert line in launch.output


@pytest.mark.slow
def test_weights_alone_are_no_run_to_go_on_with(arguments: Arguments, tmp_path: Path) -> None:
    run(arguments("--trainer.max_steps=2", "--checkpoint.save_weights_only=true"), tmp_path / "first")
    launch = Launch(arguments("--trainer.max_steps=4", "--ckpt_path=last"), tmp_path / "second")
    assert launch.wait() == [2]
    assert "the checkpoint has weights alone (save_weights_only)" in launch.output


def test_a_signal_saves_where_last_looks_beside_a_callback_of_ones_own(arguments: Arguments, tmp_path: Path) -> None:
    best = ["--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={tmp_path / 'best'}"]
    signalled = [f"--trainer.callbacks+={SIGNALLED}", "--trainer.callbacks.during=scoring"]
    launch = Launch([*arguments(*best), *signalled], tmp_path)
    assert launch.wait() == [1]
    assert list((tmp_path / "runs" / "version_0" / "checkpoints").glob("interrupted-*"))


@pytest.mark.slow
def test_a_state_that_one_process_refuses_to_save_ends_all(arguments: Arguments, tmp_path: Path) -> None:
    options = ["--trainer.max_steps=2", "--trainer.callbacks+=tests.distributed.probe.KeepsAPath"]
    launch = Launch([*arguments(strategy="fsdp2", ranks=2), *options], tmp_path, 2)
    assert launch.wait() == [2, 2], launch.output
    assert launch.output.count("with which no run can be resumed") == 2


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_process_dying_ends_the_others(victim: int, arguments: Arguments, tmp_path: Path) -> None:
    launch = Launch(arguments("--trainer.max_steps=10000", strategy="fsdp2", ranks=2), tmp_path, 2)
    history = tmp_path / "runs" / "version_0" / "sampling_history.csv"
    while not history.exists() and launch.processes[0].is_alive():
        time.sleep(0.01)
    launch.processes[victim].kill()
    codes = launch.wait()
    assert codes[1 - victim] not in (0, None)
    assert "another process of this run has ended" in launch.output


def test_an_unwritable_folder_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="can't write the checkpoint"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, tmp_path / "file" / "x.ckpt")


def test_an_interrupt_while_a_checkpoint_is_written_is_an_interrupt(tmp_path: Path) -> None:
    path, main = tmp_path / "last.ckpt", threading.main_thread().ident
    os.mkfifo(partial_path(path))  # it is full as long as nobody reads: the writer waits in the midst of the file

    def interrupt() -> None:
        with partial_path(path).open("rb") as pipe:
            pipe.read(1)
            time.sleep(0.5)
            signal.pthread_kill(main, signal.SIGINT)  # type: ignore[arg-type]
            while pipe.read(1 << 20):
                pass

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.zeros(1 << 20)}}, path)
    thread.join()
    assert not list(tmp_path.iterdir())


def test_an_interrupt_of_one_process_while_shards_are_written_is_an_interrupt(tmp_path: Path) -> None:
    interrupted = dcp.CheckpointException("write", {1: (KeyboardInterrupt(), traceback.extract_stack())})
    assert isinstance(save_error(tmp_path / "last.ckpt", interrupted), KeyboardInterrupt)


@pytest.mark.parametrize("value", [np.float64(1.0), Path("a")])
def test_what_no_run_could_be_resumed_with_is_named_when_it_is_saved(value: object, tmp_path: Path) -> None:
    rates = [{"param_groups": [{"lr": value}]}]
    with pytest.raises(UsageError, match=r"^the checkpoint holds .*(scalar|Path).*, with which no run can be"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "optimizer_states": rates}, tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())


def test_the_tenth_run_is_newer_than_the_ninth(tmp_path: Path) -> None:
    for number in (9, 10):
        path = tmp_path / f"version_{number}" / "checkpoints" / "a.ckpt"
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "loops": {}, "global_step": 1}, path)
    assert find_checkpoint("last", tmp_path) == path


def test_a_run_whose_folder_was_renamed_and_a_link_to_what_is_gone_are_passed_over(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "version_old").mkdir()
    (saved / "last.ckpt").symlink_to(saved / "gone.ckpt")
    assert find_checkpoint("last", tmp_path) == saved / "second.ckpt"


def test_an_address_has_to_exist() -> None:
    with pytest.raises(UsageError, match=r"^ckpt_path: no checkpoint 'memory://bucket/none.ckpt'$"):
        find_checkpoint("memory://bucket/none.ckpt")


def test_a_folder_of_runs_is_no_checkpoint_but_has_one(saved: Path, tmp_path: Path) -> None:
    line = f"'{tmp_path}' is a folder, not a checkpoint; the last good one in it is '{saved / 'second.ckpt'}'"
    with pytest.raises(UsageError, match=line):
        find_checkpoint(str(tmp_path))


def test_a_disk_that_is_full_at_the_first_checkpoint(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    state = {"state_dict": {"w": torch.zeros(10_000)}, "loops": {}, "global_step": 0}
    try:
        with pytest.raises(RunError, match=r"can't write the checkpoint .*File too large.*there is no earlier one; free"):
            AtomicCheckpointIO().save_checkpoint(state, tmp_path / "a.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
