"""Sharded checkpoints: a directory into which each process wrote its part."""

import copy
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ows_lightning.checkpoints.files import DCP_METADATA_FILE, UNSAFE, load_file, root_cause
from ows_lightning.errors import UsageError, first_line
from ows_lightning.optim.resting import merged_weights

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"}, "collections": {"OrderedDict"}, "torch.serialization": {"_get_layout"},
}  # fmt: skip


def split_checkpoint(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Splits a Lightning checkpoint into its tensors, under flat names, and the rest."""
    rest = {key: value for key, value in checkpoint.items() if key != "state_dict"}
    tensors = {f"state_dict.{name}": tensor for name, tensor in checkpoint["state_dict"].items()}
    rest["optimizer_states"] = []
    for number, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        numbers = {p: {k: v for k, v in state.items() if not isinstance(v, Tensor)} for p, state in optimizer["state"].items()}
        rest["optimizer_states"].append({**optimizer, "state": numbers})
        values = ((p, key, value) for p, state in optimizer["state"].items() for key, value in state.items())
        tensors |= {f"optimizer_{number}.{p}.{key}": value for p, key, value in values if isinstance(value, Tensor)}
    return tensors, rest


def load_shards(path: Path, contents: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a directory of shards, given what its ``meta.pt`` holds, as the dict that a checkpoint in one file would be."""
    weights = {name: _empty(info) for name, info in _saved_tensors(path, "state_dict.").items()}
    read_into(weights, path)
    return {
        **contents,
        "state_dict": {name.removeprefix("state_dict."): weight for name, weight in weights.items()},
        "optimizer_states": load_optimizer_states(path, contents["optimizer_states"]),
    }


def load_optimizer_states(
    path: Path, states: list[dict[str, Any]], weights: Sequence[Sequence[Tensor]] | None = None
) -> list[dict[str, Any]]:
    """Returns optimizer states with the tensors that ``split_checkpoint`` took out of them; each process reads what it needs.

    Given each optimizer's ``weights``, a tensor of its weight's shape is sharded as the weight is; others are on the CPU.
    """
    states, tensors = copy.deepcopy(states), dict[str, Tensor]()
    for number, optimizer in enumerate(states):
        for name, info in _saved_tensors(path, f"optimizer_{number}.").items():
            _, parameter, key = name.split(".", 2)
            tensors[name] = _empty(info, None if weights is None else weights[number][int(parameter)])
            optimizer["state"].setdefault(int(parameter), {})[key] = tensors[name]
    read_into(tensors, path)
    return states


def _empty(info: TensorStorageMetadata, weight: Tensor | None = None) -> Tensor:
    """A tensor to read a saved one into: laid out as a weight if it has the weight's shape, else plain."""
    if weight is not None and info.size == weight.shape:
        return torch.empty_like(weight, dtype=info.properties.dtype)
    return torch.empty(info.size, dtype=info.properties.dtype)


@torch.no_grad()
def load_weights(module: nn.Module, path: Path, strict: bool = True) -> None:
    """Fills a module's weights from a file or shards, the latter DTensors, too; ``strict`` refuses others (UsageError)."""
    prefix = "state_dict."
    weights = {prefix + name: weight for name, weight in module.state_dict().items()}
    if path.is_dir():
        shapes = {name: info.size for name, info in _saved_tensors(path, prefix).items()}
    else:
        checkpoint = load_file(path)
        shapes = {prefix + name: weight.shape for name, weight in checkpoint["state_dict"].items()}
    if not strict:
        weights = {name: weights[name] for name in weights.keys() & shapes.keys()}
    elif different := sorted(shapes.items() ^ {name: weight.shape for name, weight in weights.items()}.items()):
        raise UsageError(f"ckpt_path: '{path}' is of another model, as to {different[0][0].removeprefix(prefix)}")
    if path.is_dir():
        read_into(weights, path)
    else:
        for name, weight in merged_weights(checkpoint["state_dict"], checkpoint.get("optimizer_states", ())):
            if prefix + name in weights:
                weights[prefix + name].copy_(weight)


def read_into(tensors: dict[str, Tensor], path: Path) -> None:
    """Fills tensors, plain ones or DTensors, from a directory of shards."""
    if not tensors:
        return
    try:
        dcp.load(tensors, storage_reader=ShardReader(path), no_dist=True)
    except dcp.CheckpointException as error:  # it derives from BaseException
        raise ValueError(first_line(root_cause(error))) from error


def _saved_tensors(path: Path, prefix: str) -> dict[str, TensorStorageMetadata]:
    """The saved tensors whose names begin with a prefix; anything else is never read, for torch would unpickle it."""
    contents = ShardReader(path).read_metadata().state_dict_metadata.items()
    return {k: info for k, info in contents if k.startswith(prefix) and isinstance(info, TensorStorageMetadata)}


class ShardReader(dcp.FileSystemReader):
    """torch's reader of shards, but it unpickles known classes alone; torch's would unpickle anything."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Which tensors a directory of shards holds, and where."""
        with open(Path(self.path) / DCP_METADATA_FILE, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class ShardWriter(dcp.FileSystemWriter):
    """torch's writer of shards; it raises an error's root cause, since other processes get no chained errors."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        """Writes this process's part."""
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as error:
            raise root_cause(error) from error


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib" and name == "PosixPath":
            return PurePath  # where it was written
        if name in _ALLOWED.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(UNSAFE)
