"""Checkpoints that are written whole or not at all, hold tensors and plain values only, and are found again.

A checkpoint is a file, or a directory into which every process wrote its shards (``meta.pt`` and the format of
``torch.distributed.checkpoint``). Both hold the same dict, so that either can be resumed on any number of processes.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ows_lightning.errors import RunError, UsageError

log = logging.getLogger(__name__)

T = TypeVar("T")

META = "meta.pt"  # Lightning's name for what is in a sharded checkpoint beside the shards
NEEDED = ("state_dict", "loops", "global_step")
# What a file that is no checkpoint, or a cut one, makes torch and pickle raise.
UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, LookupError, AttributeError, TypeError, pickle.UnpicklingError)


class Forbidden(pickle.UnpicklingError):
    """A pickle asks for more than tensors and plain values."""

    def __str__(self) -> str:
        return "it holds more than tensors and plain values, which could run code when it is read"


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints, made safe against kills, full disks and damaged files."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes a file under a temporary name, and gives it its own when it is on the disk.

        Raises:
            RunError: It can't be written; what was at ``path`` is still there.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        partial = partial_path(path)
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            write(checkpoint, partial)
            put_in_place(partial, Path(path))
        except (OSError, RuntimeError) as error:
            raise not_written(path, error) from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Reads a file or a directory of shards, always with ``weights_only=True``; a file's tensors are mapped into memory.

        Raises:
            UsageError: There is no checkpoint, or it is damaged; names the last good one beside it.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, weights_only=True)
        return read(Path(path), lambda path: load_shards(path) if path.is_dir() else load_file(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint; a directory that is half removed never bears a checkpoint's name."""
        if Path(path).is_dir():
            path = Path(path).rename(partial_path(path))
        super().remove_checkpoint(path)


# ------------------------------------------------------------------ finding


def find_checkpoint(ckpt_path: str, *places: Path) -> Path | None:
    """Returns the checkpoint that a user means, if it is good.

    Args:
        ckpt_path: A path; or ``last``, the newest good checkpoint of the first place that has one.
        places: Where runs may have saved: folders of checkpoints, or folders with runs' folders ``version_N``, of which the
            newest run counts that has a good checkpoint.

    Returns:
        A path, or None if there is no checkpoint for ``last`` yet.

    Raises:
        UsageError: There is no checkpoint, or it is damaged; names the last good one.
    """
    if ckpt_path != "last":
        read(Path(ckpt_path), inspect)
        return Path(ckpt_path)
    return next((path for place in places for folder in _folders(place) if (path := last_good(folder))), None)


def _folders(place: Path) -> Iterator[Path]:
    """Yields the folders of checkpoints in a place, the newest run's first."""
    runs = [run for run in place.glob("version_*") if run.name[8:].isdigit()]
    for run in sorted(runs, key=lambda run: int(run.name[8:]), reverse=True):
        yield run / "checkpoints"
    yield from (place / "checkpoints", place)


def last_good(folder: Path, other_than: Path | None = None) -> Path | None:
    """Returns the newest checkpoint in a folder that is whole; damaged ones are named in the log."""
    for pattern in ("*.ckpt", ".*.ckpt.old"):  # the latter is left by a kill in the midst of `put_in_place`
        for path in sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns, reverse=True):
            if path == other_than:
                continue
            try:
                inspect(path)
            except UNREADABLE as error:
                log.warning("Passed over the damaged checkpoint %s (%s)", path, one_line(error))
            else:
                return path
    return None


def inspect(path: Path) -> dict[str, Any]:
    """Returns a checkpoint's contents without reading its tensors, after a look at whether all of it is there."""
    if not path.is_dir():
        return load_file(path)
    for info in read_metadata(path).storage_data.values():
        if (path / info.relative_path).stat().st_size < info.offset + info.length:
            raise ValueError(f"{info.relative_path} is cut short")
    return load_file(path / META, needed=NEEDED[1:])


def read(path: Path, how: Callable[[Path], T]) -> T:
    """Reads a checkpoint; what is wrong with it becomes one line that names the last good one beside it."""
    if not path.exists():
        raise UsageError(f"ckpt_path: no checkpoint '{path}'; {_mend(path)}")
    try:
        return how(path)
    except UsageError:
        raise
    except UNREADABLE as error:
        reason = one_line(error)
        raise UsageError(f"ckpt_path: '{path}' is damaged or no checkpoint of a run ({reason}); {_mend(path)}") from error


def _mend(path: Path) -> str:
    good = last_good(path.parent, other_than=path) if path.parent.is_dir() else None
    return f"the last good one is '{good}'" if good else "there is no good one beside it"


# ------------------------------------------------------------------ files


def load_file(path: Path, needed: Iterable[str] = NEEDED) -> dict[str, Any]:
    """Reads a file of tensors and plain values; the tensors are mapped into memory, not read."""
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):  # of no pickle's
            raise ValueError("it is no file of torch's") from error
        raise Forbidden from error
    if missing := [key for key in needed if key not in checkpoint]:
        raise ValueError(f"it has no {missing[0]}")
    return checkpoint


def write(value: Any, path: Path) -> None:
    """Writes a file of tensors and plain values, and waits until it is on the disk."""
    with path.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:
            raise cause(error) from error
        file.flush()
        os.fsync(file.fileno())


def partial_path(path: Any) -> Path:
    """The temporary name of a checkpoint that is being written, or removed."""
    return Path(path).with_name(f".{Path(path).name}.partial")


def put_in_place(partial: Path, path: Path) -> None:
    """Gives a finished file or directory its name; what had the name before is there until then, if as ``.NAME.old``."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if partial.is_dir():
        for written in (*partial.iterdir(), partial):
            _to_disk(written)
    if path.is_dir():
        path.rename(old)
    partial.replace(path)
    shutil.rmtree(old, ignore_errors=True)
    _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def not_written(path: Any, error: BaseException) -> BaseException:
    """The error of a checkpoint that could not be written; a user's interrupt remains one."""
    reason = cause(error)
    if isinstance(reason, KeyboardInterrupt):
        return reason
    before = last_good(Path(path).parent)
    kept = f"'{before}' is still good" if before else "there is no earlier one"
    return RunError(f"can't write the checkpoint '{path}' ({one_line(reason)}); {kept}; free space on the disk and resume")


def cause(error: BaseException) -> BaseException:
    """What went wrong on the first process that failed; of a file that torch could not finish, why it could not."""
    if isinstance(error, dcp.CheckpointException):
        return cause(next(iter(error.failures.values()))[0])
    return error.__context__ if isinstance(error.__context__, (OSError, KeyboardInterrupt)) else error


def one_line(error: BaseException) -> str:
    """An error's message, or the first line of it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")


# ------------------------------------------------------------------ shards


def split(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Splits a Lightning checkpoint into its tensors, under flat names, and the rest."""
    rest = {key: value for key, value in checkpoint.items() if key != "state_dict"}
    tensors = {f"state_dict.{name}": tensor for name, tensor in checkpoint["state_dict"].items()}
    rest["optimizer_states"] = []
    for number, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        rest["optimizer_states"].append({**optimizer, "state": {}})
        for parameter, state in optimizer["state"].items():
            rest["optimizer_states"][-1]["state"][parameter] = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer_{number}.{parameter}.{key}"] = value
    return tensors, rest


def load_shards(path: Path) -> dict[str, Any]:
    """Reads a directory of shards as the dict that a checkpoint in one file would be."""
    checkpoint = load_file(path / META, needed=NEEDED[1:])
    checkpoint["state_dict"] = load_tensors(path, "state_dict.")
    checkpoint["optimizer_states"] = load_optimizers(path, checkpoint["optimizer_states"])
    return checkpoint


def load_optimizers(
    path: Path,
    states: list[dict[str, Any]],
    empty: Callable[[int, int, TensorStorageMetadata], Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Returns optimizer states with the tensors that ``split`` took out of them.

    Args:
        path: Directory of shards.
        states: The states without tensors.
        empty: Makes the tensor to read into, from the optimizer's and the parameter's number and the saved tensor's
            description; a plain one on the CPU by default.
    """
    states = copy.deepcopy(states)
    for number, optimizer in enumerate(states):
        prefix = f"optimizer_{number}."
        make = None if empty is None else lambda name, saved, n=number: empty(n, int(name.split(".")[0]), saved)
        for name, tensor in load_tensors(path, prefix, make).items():
            parameter, key = name.split(".", 1)
            optimizer["state"].setdefault(int(parameter), {})[key] = tensor
    return states


def load_tensors(
    path: Path, prefix: str, empty: Callable[[str, TensorStorageMetadata], Tensor] | None = None
) -> dict[str, Tensor]:
    """Reads the tensors whose names begin with a prefix, which is taken off; each process what it needs, on its own."""
    tensors = {
        name: empty(name.removeprefix(prefix), info) if empty else torch.empty(info.size, dtype=info.properties.dtype)
        for name, info in _contents(path, prefix).items()
    }
    read_into(tensors, path)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


@torch.no_grad()
def load_weights(module: nn.Module, path: Path) -> None:
    """Fills a module's weights, plain ones or DTensors, from a checkpoint of either kind; nothing else of it is read.

    Raises:
        UsageError: The checkpoint is of another model.
    """
    prefix = "state_dict."
    weights = {prefix + name: weight for name, weight in module.state_dict().items()}
    if path.is_dir():
        shapes = {name: info.size for name, info in _contents(path, prefix).items()}
    else:
        whole = {prefix + name: weight for name, weight in load_file(path)["state_dict"].items()}
        shapes = {name: weight.shape for name, weight in whole.items()}
    if different := sorted(shapes.items() ^ {name: weight.shape for name, weight in weights.items()}.items()):
        raise UsageError(f"ckpt_path: '{path}' is of another model, as to {different[0][0].removeprefix(prefix)}")
    if path.is_dir():
        read_into(weights, path)
    else:
        for name, weight in weights.items():
            weight.copy_(whole[name])


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes tensors, plain ones or DTensors, into a directory of shards; each process its part."""
    dcp.save(tensors, storage_writer=_Writer(path))


def read_into(tensors: dict[str, Tensor], path: Path) -> None:
    """Fills tensors, plain ones or DTensors, from a directory of shards."""
    if not tensors:
        return
    try:
        dcp.load(tensors, storage_reader=_Reader(path), no_dist=True)
    except dcp.CheckpointException as error:  # which is no Exception
        raise ValueError(one_line(cause(error))) from error


def _contents(path: Path, prefix: str) -> dict[str, TensorStorageMetadata]:
    """The saved tensors whose names begin with a prefix; anything else is never read, for torch would unpickle it."""
    contents = read_metadata(path).state_dict_metadata.items()
    return {k: info for k, info in contents if k.startswith(prefix) and isinstance(info, TensorStorageMetadata)}


def read_metadata(path: Path) -> Metadata:
    """Which tensors a directory of shards holds, and where."""
    return _Reader(path).read_metadata()


class _Reader(dcp.FileSystemReader):
    """torch's reader of shards; it would unpickle whatever is in the list of contents."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Writer(dcp.FileSystemWriter):
    """torch's writer of shards; only the error itself reaches the other processes, not what is behind it."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as error:
            raise cause(error) from error


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        plain = re.fullmatch(r"\w+", name) is not None
        dataclasses = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
        if plain and module in dataclasses and name in _METADATA_CLASSES:
            return super().find_class(module, name)
        if (module, name) in {("torch", "Size"), ("collections", "OrderedDict"), ("torch.serialization", "_get_layout")}:
            return super().find_class(module, name)
        if plain and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return PurePath  # where it was written; of any system
        raise Forbidden


_METADATA_CLASSES = {
    "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
    "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING", "_StorageInfo",
}  # fmt: skip
