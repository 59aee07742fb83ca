# ruff: noqa: F811
"""What a run leaves on the disk: ``last.ckpt`` without a second copy, nothing unfinished, nothing of an end long past."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils.data import DataLoader

from ows_lightning import CausalLMModule, GaLoreAdamW, OWSTrainer
from ows_lightning.callbacks.run_checkpoint import RunCheckpoint
from ows_lightning.checkpoints.files import META_FILE
from ows_lightning.checkpoints.find import find_checkpoint, load_verified
from ows_lightning.checkpoints.io import AtomicCheckpointIO
from ows_lightning.cli.main import main
from ows_lightning.errors import RunError
from ows_lightning.report.model_card import without_folders
from tests.data.samples import tiny_tokenizer
from tests.distributed.fixtures import Arguments, arguments, home  # noqa: F401
from tests.distributed.launch import Launch, run
from tests.tiny import tiny_batch, tiny_model


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "ranks"), [("auto", 1), ("fsdp2", 2)])
def test_last_is_the_newest_checkpoint_without_a_copy(strategy: str, ranks: int, arguments: Arguments, tmp_path: Path) -> None:
    command = arguments("--trainer.max_steps=4", "--checkpoint.every_n_train_steps=2", strategy=strategy, ranks=ranks)
    run(command, tmp_path / "out", ranks)
    folder = tmp_path / "runs" / "version_0" / "checkpoints"
    (newest,) = folder.glob("epoch=*.ckpt")
    last = folder / "last.ckpt"
    files = [Path(".")] if last.is_file() else [path.relative_to(last) for path in last.iterdir() if path.is_file()]
    assert files
    assert all((last / file).samefile(newest / file) for file in files)
    assert load_verified(last)["global_step"] == 4
    for file in files:  # as when it is no longer among the best
        (newest / file).unlink()
    assert load_verified(last)["global_step"] == 4


def test_last_is_a_second_copy_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    trainer = OWSTrainer(
        accelerator="cpu", max_steps=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[RunCheckpoint(tmp_path / "kept", save_last=True, every_n_train_steps=2)],
    )  # fmt: skip
    trainer.fit(CausalLMModule(str(tmp_path), rank=4), DataLoader([tiny_batch()] * 2, batch_size=None))
    newest, last = sorted((tmp_path / "kept").iterdir())
    assert (newest.name, last.name) == ("epoch=0-step=2.ckpt", "last.ckpt")
    assert not last.samefile(newest)
    assert load_verified(last)["global_step"] == 2


@pytest.mark.parametrize("resumes", [False, True])
def test_what_a_signal_left_of_another_run_stays(resumes: bool, model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """In the same folder, and in one of the user's, which may not be writable."""

    def fit(folder: str, steps: int, ckpt_path: Path | None = None) -> None:
        trainer = OWSTrainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=steps,
            callbacks=RunCheckpoint(tmp_path / folder, every_n_train_steps=1), default_root_dir=tmp_path / "runs",
        )  # fmt: skip
        rows = DataLoader([tiny_batch()] * 4, batch_size=None)
        trainer.fit(CausalLMModule(str(model_dir()), rank=4), rows, ckpt_path=ckpt_path)

    fit("first", 1)
    kept = tmp_path / ("backup" if resumes else "second") / "interrupted-step=1.ckpt"
    kept.parent.mkdir()
    (tmp_path / "first" / "epoch=0-step=1.ckpt").rename(kept)
    fit("second", 2, kept if resumes else None)
    assert kept.exists()


def test_last_is_written_where_the_newest_is_not_among_the_best(arguments: Arguments, tmp_path: Path) -> None:
    command = arguments(
        "--trainer.max_steps=4",
        "--checkpoint.every_n_train_steps=1",
        "--checkpoint.monitor=tokens",
        "--checkpoint.save_top_k=1",
    )
    run(command, tmp_path / "out")
    folder = tmp_path / "runs" / "version_0" / "checkpoints"
    (best,) = folder.glob("epoch=*.ckpt")
    assert load_verified(best)["global_step"] == 1  # of the fewest tokens
    assert load_verified(folder / "last.ckpt")["global_step"] == 4


@pytest.mark.slow
def test_last_is_saved_before_the_first_validation(arguments: Arguments, tmp_path: Path) -> None:
    """Lightning would save nothing before it, since what is monitored is not known yet."""
    every = ["--checkpoint.every_n_train_steps=2", "--checkpoint.monitor=val_loss", "--data.val_size=4"]
    settings = arguments(
        "--trainer.max_steps=8", "--trainer.val_check_interval=8", "--trainer.check_val_every_n_epoch=null", *every
    )
    kill = ["--trainer.callbacks=tests.distributed.probe.Kill", "--trainer.callbacks.moment=on_train_batch_end"]
    launch = Launch([*settings, *kill, "--trainer.callbacks.step=7"], tmp_path / "killed")
    assert launch.wait() == [-signal.SIGKILL], launch.output
    folder = tmp_path / "runs" / "version_0" / "checkpoints"
    assert load_verified(folder / "last.ckpt")["global_step"] == 6
    run([*settings, "--ckpt_path=last"], tmp_path / "resumed")
    (best,) = folder.parents[1].glob("version_*/checkpoints/epoch=*.ckpt")
    assert load_verified(best)["global_step"] == 8
    assert load_verified(best.with_name("last.ckpt"))["global_step"] == 8


class WhatWasThere(Callback):
    """The validation loss after each step with one, and the step of ``last.ckpt`` before each."""

    def __init__(self, last: Path) -> None:
        self.file, self.val_loss, self.last = last, {}, {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.val_loss[trainer.global_step] = float(trainer.callback_metrics["val_loss"])

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.file.exists():
            self.last[trainer.global_step] = load_verified(self.file)["global_step"]


def test_the_best_waits_for_a_validation_of_its_own_weights(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    rows = DataLoader([tiny_batch()] * 10, batch_size=None)

    def fit(steps: int, folder: str, ckpt_path: Path | None = None) -> WhatWasThere:
        last = tmp_path / folder / "last.ckpt"
        every = {"every_n_train_steps": 3, "save_top_k": -1, "save_last": "link"}
        trainer = OWSTrainer(
            accelerator="cpu", max_steps=steps, val_check_interval=4, check_val_every_n_epoch=None, logger=False,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[watch := WhatWasThere(last), RunCheckpoint(last.parent, monitor="val_loss", **every)],
        )  # fmt: skip
        trainer.fit(CausalLMModule(str(tmp_path), rank=4), rows, rows, ckpt_path=ckpt_path)
        return watch

    whole = fit(9, "whole")
    assert whole.last == {3: 3, 4: 4, 5: 4, 6: 6, 7: 6, 8: 8}
    kept = {int(path.stem.rpartition("=")[2]): path for path in (tmp_path / "whole").glob("epoch=*.ckpt")}
    assert sorted(kept) == [4, 8]
    scores = next(iter(load_verified(kept[8])["callbacks"].values()))["best_k_models"].values()
    assert [float(score) for score in scores] == [whole.val_loss[4], whole.val_loss[8]]
    fit(3, "resumed")
    fit(9, "resumed", tmp_path / "resumed" / "last.ckpt")
    assert {path.name for path in (tmp_path / "resumed").glob("epoch=*.ckpt")} == {path.name for path in kept.values()}


class CountsWrites(AtomicCheckpointIO):
    def __init__(self) -> None:
        super().__init__()
        self.written: list[str] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.written.append(Path(path).name)
        super().save_checkpoint(checkpoint, path, storage_options)


def test_accumulation_writes_a_step_once(tmp_path: Path) -> None:
    """And not again at the following micro-batches, in which the number of the step is the same."""
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    rows = DataLoader([tiny_batch()] * 20, batch_size=None)
    writes = CountsWrites()
    kept = RunCheckpoint(tmp_path / "kept", monitor="val_loss", every_n_train_steps=2, save_top_k=-1, save_last=True)
    trainer = Trainer(
        accelerator="cpu", max_steps=5, accumulate_grad_batches=4, val_check_interval=12, check_val_every_n_epoch=None,
        logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[kept], plugins=[writes],
    )  # fmt: skip
    trainer.fit(CausalLMModule(str(tmp_path), rank=4), rows, rows)
    # Of step 2 the best waits for the validation after step 3, of which last.ckpt is a link; steps 4 and 5 have none.
    assert writes.written == ["last.ckpt", "epoch=0-step=3.ckpt", "last.ckpt", "last.ckpt"]


def test_what_a_kill_and_a_signal_leave_is_cleared_away(arguments: Arguments, tmp_path: Path) -> None:
    command = arguments("--checkpoint.every_n_train_steps=100000")
    folder = tmp_path / "runs" / "version_0" / "checkpoints"
    launch = Launch([*command, "--trainer.max_steps=100000"], tmp_path / "first")  # it does not end before it is told to
    while not (folder.parent / "metrics.csv").exists() and launch.processes[0].is_alive():
        time.sleep(0.01)
    unfinished = folder / ".last.ckpt.partial"
    folder.mkdir(exist_ok=True)
    unfinished.write_bytes(bytes(1000))
    pid = launch.processes[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGTERM)
    assert launch.wait() == [1], launch.output
    (interrupted,) = folder.glob("interrupted-*.ckpt")
    assert unfinished.exists()
    two_more = int(interrupted.stem.rpartition("=")[2]) + 2
    run([*command, f"--ckpt_path={interrupted}", f"--trainer.max_steps={two_more}"], tmp_path / "second")
    assert not unfinished.exists()
    assert not interrupted.exists()
    assert find_checkpoint("last", tmp_path / "runs") is not None


def test_what_a_kill_leaves_in_a_folder_of_the_users_is_cleared_away(
    model_dir: Callable[..., Path], rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["main.py"])
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / ".epoch=9-step=9.ckpt.partial").write_bytes(bytes(1000))
    settings = {
        "model.model_name_or_path": model_dir(), "data.dataset": rows_file, "trainer.default_root_dir": tmp_path / "runs",
        "checkpoint.dirpath": folder, "trainer.accelerator": "cpu", "trainer.max_steps": 1, "sampling": "null",
        "trainer.enable_progress_bar": "false",
    }  # fmt: skip
    command = ["fit", *(f"--{key}={value}" for key, value in settings.items())]
    with FileLock(folder / ".lock"):  # of a run that still lives
        main(command)
    assert (folder / ".epoch=9-step=9.ckpt.partial").exists()
    main(command)
    assert not (folder / ".epoch=9-step=9.ckpt.partial").exists()


class FullDisk(Callback):
    """Lets the curves be written where there is no room."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(trainer.logger, CSVLogger)
        trainer.logger.experiment.metrics_file_path = "/dev/full"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_disk_that_is_full_for_the_curves_is_named(arguments: Arguments, tmp_path: Path) -> None:
    callback = "--trainer.callbacks=tests.callbacks.test_run_checkpoint.FullDisk"
    launch = Launch(arguments("--trainer.max_steps=2", callback), tmp_path / "out")
    assert launch.wait() == [1], launch.output
    line = f"error: '{tmp_path / 'runs' / 'version_0'}': No space left on device; free space or choose another folder"
    assert line in launch.output
    assert "Traceback" not in launch.output


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("--checkpoint.dirpath=/proc/nowhere", "checkpoint.dirpath"),
        ("--checkpoint.dirpath={file}", "checkpoint.dirpath"),
        ("--checkpoint.filename={nosuch", "checkpoint.filename"),
        ("--ckpt_path=", "ckpt_path"),
    ],
)
def test_settings_with_which_no_checkpoint_could_be_written(
    option: str,
    key: str,
    arguments: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["main.py"])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        main([*arguments(), option.replace("{file}", str(tmp_path / "file"))])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"error: {key}" in said
    assert "Traceback" not in said


def test_folders_are_left_out_everywhere() -> None:
    assert without_folders({"/a/b.jsonl": 1.0, "c": ["~/d/e", "owner/name", 3]}) == {
        "b.jsonl": 1.0,
        "c": ["e", "owner/name", 3],
    }


def test_a_mixture_of_files_of_one_name_keeps_all_its_sources() -> None:
    mixture = {"/a/train.jsonl": 1.0, "/b/train.jsonl": 3.0, "/c/other.jsonl": 2.0}
    assert without_folders(mixture) == {"train.jsonl": 1.0, "train.jsonl (2)": 3.0, "other.jsonl": 2.0}


class WritesInPlace(TorchCheckpointIO):
    """As fsspec does where the folder for temporary files is on another device."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(exist_ok=True)
        torch.save(checkpoint, path)


class Falling(CausalLMModule):
    def on_train_batch_end(self, *_: Any) -> None:
        self.log("falling", abs(self.trainer.global_step - 2.0))


def test_the_best_stays_what_it_is_when_last_is_written_in_place(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    checkpoint = RunCheckpoint(tmp_path / "kept", monitor="falling", every_n_train_steps=1, save_last=True)
    Trainer(
        accelerator="cpu", max_steps=4, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[checkpoint], plugins=[WritesInPlace()],
    ).fit(Falling(str(tmp_path), rank=4), DataLoader([tiny_batch()] * 4, batch_size=None))  # fmt: skip
    steps = {path.name: torch.load(path, weights_only=False)["global_step"] for path in (tmp_path / "kept").iterdir()}
    assert steps == {"epoch=0-step=3.ckpt": 3, "last.ckpt": 4}


def test_a_run_that_is_resumed_from_last_goes_on_with_it(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    last = tmp_path / "kept" / "last.ckpt"
    for steps in (2, 4, 6):
        OWSTrainer(
            accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[RunCheckpoint(last.parent, save_last=True, every_n_train_steps=2)],
        ).fit(
            CausalLMModule(str(tmp_path), rank=4), DataLoader([tiny_batch()] * 6, batch_size=None),
            ckpt_path=last if last.exists() else None,
        )  # fmt: skip
        assert load_verified(last)["global_step"] == steps
    assert not (last.parent / "last-v1.ckpt").exists()


@pytest.fixture
def fit(model_dir: Callable[..., Path], tmp_path: Path) -> Callable[..., dict[str, int]]:
    """Fits with a RunCheckpoint in a folder of this name; returns the steps of the checkpoints that are there afterwards."""

    def fit_it(
        folder: str,
        checkpoint: dict[str, Any],
        callbacks: tuple[Callback, ...] = (),
        resumes: str | None = None,
        **trainer: Any,
    ) -> dict[str, int]:
        directory = tmp_path / folder
        kept = RunCheckpoint(directory, **{"monitor": "val_loss", "save_last": True, **checkpoint})
        made = OWSTrainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            default_root_dir=tmp_path, callbacks=[*callbacks, kept], **trainer,
        )  # fmt: skip
        rows = DataLoader([tiny_batch(seed=1)] * 10, batch_size=None)
        validation = DataLoader([tiny_batch(seed=2)], batch_size=None)  # another text, whose loss rises at a rate like this
        module = CausalLMModule(
            str(model_dir()), rank=4, optimizer=partial(GaLoreAdamW, lr=3e-2), lr_scheduler_type="constant", warmup_steps=0
        )
        with contextlib.suppress(ZeroDivisionError, RunError):
            made.fit(module, rows, validation, ckpt_path=None if resumes is None else directory / resumes)
        return {path.name: load_verified(path)["global_step"] for path in directory.iterdir() if path.name[0] != "."}

    return fit_it


class Stops(Callback):
    """Ends a fit by an error, or tells its process to end, in one step."""

    def __init__(self, step: int, terminates: bool = False) -> None:
        self.step, self.terminates = step, terminates

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step + 1 == self.step and self.terminates:
            os.kill(os.getpid(), signal.SIGTERM)
        elif trainer.global_step + 1 == self.step:
            raise ZeroDivisionError


def test_the_best_that_waits_is_saved_by_a_validation_at_an_epochs_end(fit: Callable[..., dict[str, int]]) -> None:
    found = fit("kept", {"every_n_train_steps": 3}, max_epochs=2)
    assert found == {"epoch=0-step=10.ckpt": 10, "last.ckpt": 20}  # step 9's, which waited


@pytest.mark.parametrize("at_epochs_end", [False, True])
def test_last_is_of_the_newest_validation_also_where_the_loss_rises(
    at_epochs_end: bool, fit: Callable[..., dict[str, int]]
) -> None:
    settings: dict[str, Any] = {"max_epochs": 3} if at_epochs_end else {"max_epochs": 1, "val_check_interval": 3}
    first, last = (10, 20) if at_epochs_end else (3, 9)
    step = last + 1  # it ends in the step behind the last validation but one, or the last
    found = fit("kept", {}, (Stops(step),), **settings)
    assert found == {f"epoch=0-step={first}.ckpt": first, "last.ckpt": last}


def test_the_last_step_is_saved_at_the_end(fit: Callable[..., dict[str, int]]) -> None:
    assert fit("kept", {"every_n_train_steps": 4, "monitor": None}, max_steps=7) == {
        "epoch=0-step=4.ckpt": 4,
        "last.ckpt": 7,
    }
    assert fit("only_last", {"save_top_k": 0, "monitor": None}, (Stops(9),), max_epochs=1, val_check_interval=4) == {
        "last.ckpt": 8
    }


@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize(
    ("first", "whole", "steps"),
    [({"max_steps": 7}, {"max_steps": 17}, (7, 17)), ({"max_steps": 10}, {"max_steps": 17}, (10, 17)),
     ({"max_epochs": 1}, {"max_epochs": 2}, (10, 20))],
)  # fmt: skip
def test_a_run_goes_on_from_what_was_saved_at_the_end(
    first: dict[str, int], whole: dict[str, int], steps: tuple[int, int], averages: bool,
    fit: Callable[..., dict[str, int]], tmp_path: Path,
) -> None:  # fmt: skip
    """Where weights are averaged, the average replaces them at the end: that is not what goes on."""

    def averaging() -> tuple[Callback, ...]:
        return (EMAWeightAveraging(device="cpu", decay=0.5),) if averages else ()

    settings = {"every_n_train_steps": 4, "monitor": None}
    fit("through", settings, averaging(), **whole)
    assert fit("resumed", settings, averaging(), **first)["last.ckpt"] == steps[0]
    assert fit("resumed", settings, averaging(), **whole, resumes="last.ckpt")["last.ckpt"] == steps[1]
    weights = [load_verified(tmp_path / name / "last.ckpt")["state_dict"] for name in ("through", "resumed")]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.parametrize("every", [2, 4, None])
def test_the_best_of_a_validation_that_is_made_up_for_is_saved(every: int | None, fit: Callable[..., dict[str, int]]) -> None:
    """SIGTERM comes in step 4, which is saved before the validation that follows it; the resumed run validates first."""
    settings = {"every_n_train_steps": every, "save_top_k": -1}
    trainer = {"max_steps": 9, "val_check_interval": 4, "check_val_every_n_epoch": None}
    expected = fit("through", settings, **trainer)
    assert fit("told", settings, (Stops(4, terminates=True),), **trainer)["interrupted-step=4.ckpt"] == 4
    assert fit("told", settings, resumes="interrupted-step=4.ckpt", **trainer) == expected
    assert [step for name, step in expected.items() if name.startswith("epoch")] != []


def test_what_a_run_can_go_on_from_is_not_replaced_by_weights_alone(fit: Callable[..., dict[str, int]]) -> None:
    trainer = {"max_steps": 9, "val_check_interval": 3, "check_val_every_n_epoch": None}
    fit("kept", {}, (Stops(2, terminates=True),), **trainer)
    found = fit("kept", {"save_weights_only": True}, resumes="interrupted-step=2.ckpt", **trainer)
    assert found["interrupted-step=2.ckpt"] == 2
    assert found["last.ckpt"] == 9


def test_a_validation_within_a_step_counts_after_a_resume(fit: Callable[..., dict[str, int]]) -> None:
    settings = {"every_n_train_steps": 1, "save_top_k": -1}
    trainer = {"max_steps": 5, "val_check_interval": 5, "check_val_every_n_epoch": None, "accumulate_grad_batches": 2}
    expected = fit("through", settings, **trainer)
    fit("told", settings, (Stops(2, terminates=True),), **trainer)
    assert fit("told", settings, resumes="interrupted-step=2.ckpt", **trainer) == expected


def test_what_ends_an_epoch_is_not_done_twice(fit: Callable[..., dict[str, int]], tmp_path: Path) -> None:
    """A run that ends within an epoch calls its hooks, too; a checkpoint from before lets the resumed epoch end once."""

    class EndsOfEpochs(Callback):
        ends = 0

        def on_train_epoch_end(self, *_: Any) -> None:
            self.ends += 1

        def state_dict(self) -> dict[str, int]:
            return {"ends": self.ends}

        def load_state_dict(self, state_dict: dict[str, int]) -> None:
            self.ends = state_dict["ends"]

    settings: dict[str, Any] = {"every_n_train_steps": 4, "monitor": None}
    for ended in ({"max_steps": 7}, {"max_epochs": 1, "callbacks": True}):
        counts = EndsOfEpochs(), EndsOfEpochs()
        early = (StopsEarly(7),) if ended.pop("callbacks", False) else ()
        folder = f"ended{len(early)}"
        assert fit(folder, settings, (counts[0], *early), **ended)["last.ckpt"] == 7
        fit(folder, settings, (counts[1],), max_epochs=2, resumes="last.ckpt")
        assert (counts[0].ends, counts[1].ends) == (1, 2)


def test_a_run_that_may_not_end_yet_is_not_saved_at_each_step(fit: Callable[..., dict[str, int]], tmp_path: Path) -> None:
    settings = {"every_n_train_steps": 100, "monitor": None}
    (tmp_path / "kept").mkdir()
    assert fit("kept", settings, (StopsEarly(3), Stops(6)), max_steps=9, min_steps=8, min_epochs=0) == {}
    assert fit("kept", settings, (StopsEarly(3),), max_steps=9, min_steps=8, min_epochs=0) == {"last.ckpt": 8}


class StopsEarly(Callback):
    """Ends a run as Lightning's Timer does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def test_a_folder_of_links_is_known_as_the_last_checkpoint(tmp_path: Path) -> None:
    """Of two processes: `--ckpt_path last` may find the other name of what last.ckpt is."""
    for name in ("last.ckpt", "epoch=0-step=4.ckpt", "epoch=0-step=2.ckpt"):
        (tmp_path / name).mkdir()
    (tmp_path / "last.ckpt" / META_FILE).touch()
    os.link(tmp_path / "last.ckpt" / META_FILE, tmp_path / "epoch=0-step=4.ckpt" / META_FILE)
    (tmp_path / "epoch=0-step=2.ckpt" / META_FILE).touch()
    for name, found in (("epoch=0-step=4.ckpt", str(tmp_path / "last.ckpt")), ("epoch=0-step=2.ckpt", ""), (None, "")):
        kept, trainer = RunCheckpoint(tmp_path, save_last=True), Trainer(accelerator="cpu", logger=False)
        trainer.ckpt_path = None if name is None else tmp_path / name
        kept.on_train_start(trainer, LightningModule())
        assert kept.last_model_path == found


def test_a_checkpoint_on_a_signal_has_what_other_callbacks_did_in_its_step(
    fit: Callable[..., dict[str, int]], tmp_path: Path
) -> None:
    """Such as the average of the weights, which has this step's in it."""

    def averaging() -> Callback:
        return EMAWeightAveraging(device="cpu", decay=0.5)

    settings = {"monitor": None, "every_n_train_steps": 1, "save_top_k": 0}
    trainer = {"max_steps": 6, "limit_val_batches": 0}
    fit("through", settings, (averaging(),), **trainer)
    fit("told", settings, (averaging(), Stops(4, terminates=True)), **trainer)
    fit("told", settings, (averaging(),), resumes="interrupted-step=4.ckpt", **trainer)
    weights = [load_verified(tmp_path / name / "last.ckpt")["state_dict"] for name in ("through", "told")]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
