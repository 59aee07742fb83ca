"""Checkpoints in which bits have flipped are damaged, wherever the bits are, and the one before is offered."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ows_lightning.checkpoints.files import META_FILE, file_crc32, save_file, verify_checksum
from ows_lightning.checkpoints.find import find_checkpoint, last_good
from ows_lightning.checkpoints.io import AtomicCheckpointIO
from ows_lightning.checkpoints.shards import ShardWriter, split_checkpoint
from ows_lightning.distributed.fsdp2 import FSDP2Strategy
from ows_lightning.errors import UsageError
from tests.distributed.fixtures import Arguments, arguments, home  # noqa: F401
from tests.distributed.launch import Launch, run

SEED = int(os.environ.get("OWS_TEST_SEED", "0"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder of two checkpoints, of which `second.ckpt` is the newer."""
    folder = tmp_path / "version_0" / "checkpoints"
    state = {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(50, 20)}}
    for number, name in enumerate(("first", "second")):
        content = {
            "state_dict": {"w": torch.randn(50, 20)}, "loops": {}, "global_step": number,
            "optimizer_states": [{"state": state}],
        }  # fmt: skip
        AtomicCheckpointIO().save_checkpoint(content, folder / f"{name}.ckpt")
        os.utime(folder / f"{name}.ckpt", (number, number))
    return folder


@pytest.mark.parametrize("fails", ["open", "fsync"])  # on some network file systems
def test_a_checkpoint_is_written_where_no_directory_can_be_flushed(
    fails: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_os = getattr(os, fails)

    def not_of_a_directory(file: Any, *flags: int) -> Any:
        if Path(file if fails == "open" else f"/proc/self/fd/{file}").is_dir():
            raise OSError(22, "Invalid argument")
        return of_os(file, *flags)

    monkeypatch.setattr(os, fails, not_of_a_directory)
    content = {"state_dict": {"w": torch.randn(2)}, "loops": {}, "global_step": 3}
    AtomicCheckpointIO().save_checkpoint(content, saved / "third.ckpt")
    assert AtomicCheckpointIO().load_checkpoint(saved / "third.ckpt")["global_step"] == 3


def flip(file: Path, whole: bytes, place: int, bit: int) -> None:
    changed = bytearray(whole)
    changed[place] ^= 1 << bit
    file.write_bytes(changed)
    os.utime(file, ns=(now := time.time_ns(), now))  # many a system's clock of files ticks every 4 ms


def test_a_bit_anywhere_in_a_file(saved: Path, tmp_path: Path) -> None:
    newest = saved / "second.ckpt"
    whole, draw = newest.read_bytes(), random.Random(SEED)
    # All of the archive's end, which holds the sum, and places in all the rest.
    places = [*range(len(whole) - 60, len(whole)), *(draw.randrange(len(whole)) for _ in range(200))]
    for place in places:
        flip(newest, whole, place, draw.randrange(8))
        with pytest.raises(UsageError, match=r"second.ckpt' is damaged.*last good one is '.*first.ckpt'"):
            find_checkpoint(str(newest), tmp_path)
    assert find_checkpoint("last", tmp_path) == saved / "first.ckpt"
    with pytest.raises(UsageError, match="is damaged"):
        AtomicCheckpointIO().load_checkpoint(newest)
    newest.write_bytes(whole)
    assert find_checkpoint("last", tmp_path) == newest


def test_last_is_the_newest_of_files_that_were_copied_within_one_tick(saved: Path, tmp_path: Path) -> None:
    (saved / "second.ckpt").rename(saved / "last.ckpt")
    for file in saved.iterdir():
        os.utime(file, ns=(0, 0))
    assert find_checkpoint("last", tmp_path) == saved / "last.ckpt"


def test_a_folder_whose_number_is_none_is_no_run(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "version_²").mkdir()
    assert find_checkpoint("last", tmp_path) == saved / "second.ckpt"


@pytest.mark.slow
def test_a_bit_anywhere_in_a_folder_of_shards(arguments: Arguments, tmp_path: Path) -> None:  # noqa: F811
    command = arguments(
        "--trainer.max_steps=4", "--checkpoint.every_n_train_steps=2", "--checkpoint.save_top_k=-1", strategy="fsdp2", ranks=2
    )
    run(command, tmp_path / "two", 2)
    folder = tmp_path / "runs" / "version_0" / "checkpoints"
    checkpoint, before = (next(folder.glob(f"*step={step}.ckpt")) for step in (4, 2))
    draw = random.Random(SEED)
    for file in sorted(path for path in checkpoint.iterdir() if path.is_file()):
        whole = file.read_bytes()
        for _ in range(25):
            flip(file, whole, draw.randrange(len(whole)), draw.randrange(8))
            with pytest.raises(UsageError, match="is damaged"):
                find_checkpoint(str(checkpoint), tmp_path)
        file.write_bytes(whole)
    flip(file, whole, len(whole) // 2, 0)
    assert last_good(folder, other_than=folder / "last.ckpt") == before
    launch = Launch([*command, f"--ckpt_path={checkpoint}"], tmp_path / "resumed", 2)
    assert launch.wait() == [2, 2], launch.output
    assert launch.output.count("is damaged or no checkpoint of a run") == 2
    export = ["export", *command[1:], f"--ckpt_path={checkpoint}", f"--output={tmp_path / 'exported'}"]
    launch = Launch(export, tmp_path / "export")
    assert launch.wait() == [2], launch.output
    assert not (tmp_path / "exported").exists()


def write_shards(path: Path) -> dict[str, Any]:
    """Writes the shards of a checkpoint, and returns what stands beside them in ``meta.pt``."""
    checkpoint = {"state_dict": {"weight": torch.randn(64, 64)}, "optimizer_states": [], "loops": {}, "global_step": 1}
    tensors, rest = split_checkpoint(checkpoint)
    dcp.save(tensors, storage_writer=ShardWriter(path), no_dist=True)
    return {**rest, "sums": {file.name: file_crc32(file) for file in path.iterdir()}}


def test_a_damaged_shard_is_found_when_a_checkpoint_is_read(tmp_path: Path) -> None:
    """Not only when the command line looks for it."""
    path = tmp_path / "a.ckpt"
    save_file(write_shards(path), path / META_FILE)
    loads = AtomicCheckpointIO().load_checkpoint, FSDP2Strategy(save_distributed_checkpoint=True).load_checkpoint
    for load in loads:
        load(path)
    shard = next(path.glob("*.distcp"))
    flip(shard, shard.read_bytes(), shard.stat().st_size // 2, 1)
    for load in loads:
        with pytest.raises(UsageError, match="is damaged"):
            load(path)


def test_shards_of_an_older_version_are_complete_or_damaged(tmp_path: Path) -> None:
    """They have no sums."""
    path = tmp_path / "a.ckpt"
    rest = {key: value for key, value in write_shards(path).items() if key != "sums"}
    save_file(rest, path / META_FILE)
    assert find_checkpoint(str(path)) == path
    save_file({key: value for key, value in rest.items() if key != "loops"}, path / META_FILE)
    with pytest.raises(UsageError, match=r"is damaged or no checkpoint of a run \(it has no loops\)"):
        find_checkpoint(str(path))
    (path / META_FILE).unlink()
    with pytest.raises(UsageError, match="is damaged or no checkpoint of a run"):
        find_checkpoint(str(path))
    save_file(rest, path / META_FILE)
    shard = next(path.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UsageError, match=rf"is damaged or no checkpoint of a run \({shard.name} is cut short\)"):
        find_checkpoint(str(path))


def test_files_of_other_programs_have_no_sum(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(3)}, tmp_path / "plain.ckpt")
    assert verify_checksum(tmp_path / "plain.ckpt") is False


def test_a_file_of_other_programs_lacks_what_a_run_is_resumed_with(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(3)}, tmp_path / "plain.ckpt")
    with pytest.raises(UsageError, match=r"is damaged or no checkpoint of a run \(it has no state_dict\); there is no good"):
        find_checkpoint(str(tmp_path / "plain.ckpt"))


def test_what_was_read_may_be_written_by_other_programs(saved: Path) -> None:
    """They write no sum, and so it must not be missed."""
    torch.save(AtomicCheckpointIO().load_checkpoint(saved / "first.ckpt"), saved / "third.ckpt")
    assert AtomicCheckpointIO().load_checkpoint(saved / "third.ckpt")["global_step"] == 0


def test_a_file_that_took_the_place_of_another_is_read_anew(saved: Path) -> None:
    """Although it has the same size, and the same time, as a copy of a backup may have."""
    first, second = saved / "first.ckpt", saved / "second.ckpt"
    before = first.stat()
    sums = file_crc32(first), file_crc32(second)
    os.utime(second, ns=(before.st_atime_ns, before.st_mtime_ns))
    second.replace(first)
    assert first.stat().st_size == before.st_size
    assert sums[0] != sums[1] == file_crc32(first)
