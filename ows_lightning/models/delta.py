"""A delta: the tensors in which an exported model differs from the model that it was made from.

Its directory holds ``delta.json``, the tensors that differ as ``delta-*.safetensors``, and all other files of the export. A
tensor that the base has in the same dtype and shape is stored as `compress` makes it, where that is smaller.
``delta.json`` has the SHA-256 of what is stored, of the base's weights, and of every tensor and file of the export (but the
model card, which may be edited), beside the base's name and dtype. A tensor's SHA-256 is over its name, dtype, shape and
bytes; the whole base's is over those of its tensors.
"""

import hashlib
import json
import logging
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ows_lightning.compat import without_weight_conversions
from ows_lightning.errors import StrPath, UsageError, typed_path
from ows_lightning.models.model_directory import atomic_directory, check_replaceable, is_of_model
from ows_lightning.models.plain_weights import group_by_file_tensors, unique_weights
from ows_lightning.models.pretrained import load_model
from ows_lightning.models.source import DELTA_FILE

log = logging.getLogger(__name__)
_METADATA = {"format": "pt"}  # without which transformers does not read a safetensors file


class DeltaSize(NamedTuple):
    """How much a delta takes, and the model that it stands for, in bytes of their tensors."""

    delta: int
    model: int

    def __str__(self) -> str:
        return f"{self.delta / 1e6:,.3f} MB, {self.delta / max(self.model, 1):.1%} of the model's {self.model / 1e6:,.3f} MB"


class Delta:
    """A delta's directory; a UsageError says that it is none, or not complete and unchanged."""

    def __init__(self, directory: StrPath) -> None:
        self.directory = typed_path(directory)
        if not (self.directory / DELTA_FILE).is_file():
            raise UsageError(f"delta: {str(directory)!r} is no delta (it has no {DELTA_FILE}); `export --delta` writes one")
        try:
            about = json.loads((self.directory / DELTA_FILE).read_text(encoding="utf-8"))
            self.base, self._base_hash = str(about["base"]), str(about["base_sha256"])
            self.dtype: torch.dtype = getattr(torch, about["dtype"])  # that the base is loaded in
            self.files: dict[str, dict[str, str]] = about["files"]  # of weights, each with its tensors' SHA-256
            self.hashes = {name: value for tensors in self.files.values() for name, value in tensors.items()}
            self._compressed: dict[str, str] = about.get("packed", {})
            self.places: dict[str, Path] = {}  # of the tensors that differ from the base
            for path in self.directory.glob("delta-*.safetensors"):
                with safe_open(path, "pt") as file:
                    self.places |= dict.fromkeys(file.keys(), path)
            whole = len(self.places) == about["tensors"] and all(Path(file).name == file for file in self.files)
            expected = {**self.hashes, **self._compressed}
            if not whole or any(_tensor_hash(name, self._stored(name)) != expected.get(name) for name in self.places):
                raise ValueError("tensors have changed since it was written, or are missing")
            for name, value in about["other_files"].items():
                if _file_hash(self.directory / Path(name).name) != value:
                    raise ValueError(f"{name} has changed since it was written")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise UsageError(f"delta: {str(directory)!r} is damaged ({error}); copy or export it again") from error

    def read(self, name: str, base: Mapping[str, Tensor]) -> Tensor:
        """Reads one of the tensors that differ, given the base's."""
        stored = self._stored(name)
        return decompress(stored, base[name]) if name in self._compressed else stored

    def _stored(self, name: str) -> Tensor:
        with safe_open(self.places[name], "pt") as file:
            return file.get_tensor(name)

    def check_base(self, model: PreTrainedModel) -> None:
        """Raises a UsageError if a model is not the base, bit for bit, or is in another dtype."""
        if model.dtype != self.dtype:
            raise UsageError(f"delta: the base is in {model.dtype}, and the delta was made in {self.dtype}; load it in that")
        if _combined_hash({name: _tensor_hash(name, tensor) for name, tensor in _file_tensors(model)}) != self._base_hash:
            raise UsageError(f"delta: this base is not the one that {str(self.directory)!r} was made from; give {self.base!r}")

    def sizes(self, model: Mapping[str, Tensor]) -> DeltaSize:
        """Returns the sizes of the delta and of the restored model, given the base's tensors."""
        stored = {name: self._stored(name).nbytes for name in self.places}
        raw = {name: count for name, count in stored.items() if name not in self._compressed}
        return DeltaSize(sum(stored.values()), sum(raw[name] if name in raw else model[name].nbytes for name in self.hashes))


def write_delta(export: Path, directory: StrPath, base: str, dtype: torch.dtype, trust_remote_code: bool = False) -> DeltaSize:
    """Writes the tensors in which an export of `save_huggingface` differs from its base, loaded in the run's dtype."""
    target = check_replaceable(directory, base)
    of_base = dict(_file_tensors(load_model(base, dtype, None, trust_remote_code)))
    before = {name: _tensor_hash(name, tensor) for name, tensor in of_base.items()}
    files: dict[str, dict[str, str]] = {}
    compressed: dict[str, str] = {}
    count = delta_bytes = model_bytes = 0
    with atomic_directory(target, "delta") as partial:
        _copy_all_but_weights(export, partial)
        others = {p.name: _file_hash(p) for p in sorted(partial.iterdir()) if p.is_file() and p.name != "README.md"}
        for number, path in enumerate(sorted(export.glob("*.safetensors")), start=1):
            files[path.name], changed = {}, dict[str, Tensor]()
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (it is no mapping)
                    tensor = file.get_tensor(name)
                    value = files[path.name][name] = _tensor_hash(name, tensor)
                    model_bytes += tensor.nbytes
                    if value == before.get(name):
                        continue
                    stored, old = tensor, of_base.get(name)
                    if old is not None and (old.dtype, old.shape) == (tensor.dtype, tensor.shape):
                        stored = min(compress(tensor, old), tensor, key=lambda one: one.nbytes)
                    if stored is not tensor:
                        compressed[name] = _tensor_hash(name, stored)
                    changed[name] = stored
            if changed:
                save_file(changed, partial / f"delta-{number:05d}.safetensors", _METADATA)
                count, delta_bytes = count + len(changed), delta_bytes + sum(stored.nbytes for stored in changed.values())
        local = typed_path(base)
        about = {
            "base": local.absolute().name if local.exists() else base,  # without the folders of this machine
            "base_sha256": _combined_hash(before), "dtype": str(dtype).removeprefix("torch."),
            "tensors": count, "packed": compressed, "files": files, "other_files": others,
        }  # fmt: skip
        (partial / DELTA_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return DeltaSize(delta_bytes, model_bytes)


def apply_delta(base: str, delta: StrPath, directory: StrPath, trust_remote_code: bool = False) -> DeltaSize:
    """Writes the model that a delta was made from, with the same bytes in the same files as `save_huggingface` wrote."""
    target, change = check_replaceable(directory, base, delta), Delta(delta)
    model = load_model(base, change.dtype, None, trust_remote_code)
    change.check_base(model)
    of_base = dict(_file_tensors(model))
    with atomic_directory(target, "model") as partial:
        _copy_all_but_weights(change.directory, partial)
        for file, names in change.files.items():
            tensors = {name: change.read(name, of_base) if name in change.places else of_base[name].clone() for name in names}
            save_file(tensors, partial / file, _METADATA)
    return change.sizes(of_base)


@torch.no_grad()
def load_delta(model: PreTrainedModel, path: StrPath) -> DeltaSize:
    """Applies a delta to its base model, in place, bit for bit.

    Embeddings get the delta's rows, and a tied head is untied if the run untied it. On an error the model is unchanged.

    Args:
        model: The base, in the dtype that the run loaded it in, as `load_model` or `from_pretrained` gives it.
        path: The delta's directory.

    Returns:
        The bytes of the delta's tensors, and of the whole model's.

    Raises:
        UsageError: The model is not the delta's base, or the path has no undamaged delta.
    """
    change = Delta(path)
    change.check_base(model)
    sizes = change.sizes(dict(_file_tensors(model)))
    config = type(model.config).from_pretrained(change.directory)
    if (rows := config.get_text_config().vocab_size) != model.config.get_text_config().vocab_size:
        model.resize_token_embeddings(rows, mean_resizing=False)
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    if head is not None and not getattr(config, "tie_word_embeddings", False) and head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.clone())
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
    plain = without_weight_conversions(model)
    for group in group_by_file_tensors(plain, unique_weights(model)):
        weights = {weight.name: weight.tensor.detach() for weight in group}
        pieces = revert_weight_conversion(plain, weights)
        new = {piece: change.read(piece, pieces) for piece in pieces if piece in change.places}
        if list(pieces) == list(weights):
            for name, value in new.items():
                weights[name].copy_(value)
        elif new:  # the delta names tensors as files do: where the model has several of them as one, or one as several
            counts = [weight.numel() for weight in weights.values()]
            numbers = torch.arange(sum(counts)).split(counts)
            places = {name: at.view(weights[name].shape) for name, at in zip(weights, numbers, strict=True)}
            elements = torch.cat([weight.reshape(-1) for weight in weights.values()])
            place_of = revert_weight_conversion(plain, places)
            for piece, value in new.items():
                elements[place_of[piece].reshape(-1).to(elements.device)] = value.reshape(-1).to(elements.device)
            for weight, values in zip(weights.values(), elements.split(counts), strict=True):
                weight.copy_(values.view(weight.shape))
    if (change.directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(change.directory)
    log.info("The delta has %s.", sizes)
    return sizes


def _copy_all_but_weights(source: Path, target: Path) -> None:
    for path in source.iterdir():
        wanted = is_of_model(path) and path.suffix != ".safetensors" and path.name != DELTA_FILE
        if wanted and path.exists():  # the hub's cache has links to files; chat templates with names are a folder
            (shutil.copytree if path.is_dir() else shutil.copy)(path, target / path.name)


def _file_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors under the names and in the form of its files."""
    plain = without_weight_conversions(model)
    for group in group_by_file_tensors(plain, unique_weights(model)):
        yield from revert_weight_conversion(plain, {weight.name: weight.tensor.detach() for weight in group}).items()


def _tensor_hash(name: str, tensor: Tensor) -> str:
    value = hashlib.sha256(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
    value.update(_integers(tensor).data)
    return value.hexdigest()


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _combined_hash(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()


def compress(tensor: Tensor, base: Tensor) -> Tensor:
    """Returns the compressed difference of a tensor, of any dtype and shape, from its base, as uint8 of shape ``(bytes,)``."""
    # Of a trained weight's bits, read as an integer, the upper ones hardly change. So the integers are subtracted, their signs
    # put last (0, -1, 1, -2, ... become 0, 1, 2, 3, ...), bytes of the same place put together, and compressed.
    difference = _integers(tensor) - _integers(base)
    unsigned = (difference << 1) ^ (difference >> (8 * difference.itemsize - 1))
    planes: Any = np.ascontiguousarray(unsigned.view(np.uint8).reshape(-1, difference.itemsize).T)
    return torch.frombuffer(bytearray(zlib.compress(planes, 1)), dtype=torch.uint8)


def decompress(compressed: Tensor, base: Tensor) -> Tensor:
    """Returns the tensor that `compress` was given, to the bit; a zlib.error or ValueError if the bytes are damaged."""
    before = _integers(base)
    planes: Any = np.frombuffer(zlib.decompress(compressed.numpy().data), np.uint8).reshape(before.itemsize, before.size)
    unsigned: Any = np.ascontiguousarray(planes.T).view(f"u{before.itemsize}").reshape(-1)
    difference = (unsigned >> 1) ^ (~(unsigned & 1) + 1)
    return torch.from_numpy(before + difference.view(before.dtype)).view(base.dtype).view(base.shape)


def _integers(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().view(f"i{tensor.element_size()}")
