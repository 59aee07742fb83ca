"""Blocks offloaded to the disk: in the model's own files, and in a scratch file once they have changed."""

import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from ows_lightning.compat import replace_parameters_
from ows_lightning.errors import RunError
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.large_tensors import map_file, release_mapped_pages
from ows_lightning.models.pretrained import check_finite, empty_model, find_stored_weights, load_model, persistent_buffers
from ows_lightning.models.safetensors_file import StoredWeight
from ows_lightning.offload.offloaded import OffloadedWeights, byte_offsets, copy_into, page_locked, tensor_at, total_nbytes


class FileRegion:
    """A part of a file that weights lie in: mapped for those who look at them, read without the mapping for a fetch."""

    def __init__(self, file: BinaryIO, writable: bool, start: int = 0, length: int = 0) -> None:
        self.file, self.start, self.memory = file, start, map_file(file, writable, start, length)

    def read(self, offset: int, target: Tensor) -> None:
        """Reads as many bytes as a tensor of uint8 in host memory has into it; a RunError if the file has become shorter."""
        view, position = memoryview(target.numpy().data), self.start + offset
        while view:
            read = os.preadv(self.file.fileno(), [view], position)
            if not read:
                raise RunError(f"model.frozen_in: {self.file.name} has become shorter while it was used; start the run again")
            view, position = view[read:], position + read


class DiskWeights(OffloadedWeights):
    """A block's weights on the disk, mapped: where ``Disk.place_weight`` found all of them, until they are ``writable``."""

    def __init__(self, disk: "Disk", weights: Sequence[Tensor], writable: bool = False) -> None:
        self.disk = disk
        known = [disk.places.get(weight.data_ptr()) for weight in weights]
        self.tensors = list(weights)
        self.places = [place for place in known if place is not None]
        if len(self.places) < len(known) or (writable and not self._in_scratch()):
            self._move(weights)
            release_mapped_pages()

    def fetch(self, slot: Sequence[Tensor], exact: bool = True) -> None:
        """Reads the weights into a slot, through page-locked memory if it is on a GPU."""
        for target, (region, start) in zip(slot, self.places, strict=True):
            as_bytes = target.as_strided((target.numel(),), (1,)).view(torch.uint8)  # a weight has no gaps
            self.disk.read_into(partial(region.read, start), as_bytes)

    def write_back(self, trained: Sequence[Tensor]) -> None:
        """Takes over the weights of a block that trained into the scratch file."""
        if self._in_scratch():
            super().write_back(trained)
        else:
            self._move(trained)
        self.refresh()

    def make_writable(self) -> None:
        """Moves weights from the model's own file into the scratch file, with what was written into their pages."""
        if not self._in_scratch():
            self._move(self.tensors)

    def refresh(self) -> None:
        """Frees the pages of the weights that are in memory because they were read."""
        release_mapped_pages()

    def _in_scratch(self) -> bool:
        return all(region.file is self.disk.scratch for region, _ in self.places)

    def _move(self, weights: Sequence[Tensor]) -> None:
        region = self.disk.extend_scratch(total_nbytes(weights))
        self.tensors = copy_into(region.memory, weights)
        self.places = [(region, start) for start in byte_offsets(weights)[:-1]]
        self.disk.places.update(zip((weight.data_ptr() for weight in self.tensors), self.places, strict=True))


class Disk:
    """The files that blocks are offloaded to.

    The scratch file is made in ``folder`` (here if None), on a disk with room for the blocks that ever train. It has no name:
    what it takes is free again when the process ends, however that comes about.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = Path(folder or ".")
        self.places: dict[int, tuple[FileRegion, int]] = {}  # by the address of a mapped weight
        self.scratch: BinaryIO | None = None
        self._files: dict[Path, FileRegion] = {}
        self._staging: list[tuple[Tensor, torch.cuda.Event]] = []

    def place_weight(self, stored: StoredWeight, dtype: torch.dtype) -> Tensor:
        """Returns a weight as it lies in a model's own file, or, if its dtype there is another one, in the scratch file."""
        if stored.path not in self._files:
            self._files[stored.path] = FileRegion(stored.path.open("rb"), writable=False)
        region, start = self._files[stored.path], stored.start
        assert stored.dtype is not None
        weight = tensor_at(torch.empty(stored.shape, dtype=stored.dtype, device="meta"), region.memory, start)
        if stored.dtype != dtype:
            region, start = self.extend_scratch(weight.numel() * dtype.itemsize), 0
            weight = tensor_at(torch.empty_like(weight, dtype=dtype, device="meta"), region.memory, 0).copy_(weight)
            release_mapped_pages()
        self.places[weight.data_ptr()] = (region, start)
        return weight

    def extend_scratch(self, length: int) -> FileRegion:
        """Makes the scratch file longer, and returns the new part; a RunError if the disk or the folder takes no more."""
        try:
            if self.scratch is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.scratch = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115  # it lives as long as the blocks
            start, length = self.scratch.seek(0, os.SEEK_END), -(-max(length, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
            if hasattr(os, "posix_fallocate"):  # now: a disk that is full while a mapping is written to ends in a signal
                os.posix_fallocate(self.scratch.fileno(), start, length)
            else:  # macOS
                self.scratch.writelines([bytes(mmap.PAGESIZE)] * (length // mmap.PAGESIZE))
                self.scratch.flush()
        except OSError as error:
            fault = f"{str(self.folder)!r} has no room for {length / 1e6:.0f} MB of blocks ({error.strerror})"
            raise RunError(f"model.frozen_in: {fault}; free space there, or set model.frozen_in: host") from error
        return FileRegion(self.scratch, writable=True, start=start, length=length)

    @torch.no_grad()
    def read_into(self, read: Callable[[Tensor], None], target: Tensor) -> None:
        """Reads bytes into a target; for a GPU through one of two page-locked buffers, while the other one is copied."""
        if target.device.type != "cuda":  # nothing else copies by itself
            part = target if target.device.type == "cpu" else torch.empty_like(target, device="cpu")
            read(part)
            target.copy_(part)
            return
        if not self._staging or self._staging[0][0].numel() < target.numel():  # freed when copies from it have ended
            self._staging = [(page_locked(target.numel(), target.device), torch.cuda.Event()) for _ in range(2)]
        buffer, copied = self._staging.pop(0)  # of one thread at a time: no fetch runs while a block is loaded to train
        copied.synchronize()
        part = buffer[: target.numel()]
        read(part)
        target.copy_(part, non_blocking=True)
        copied.record(torch.cuda.current_stream(target.device))
        self._staging.append((buffer, copied))


def load_mapped_model(name: str, num_tokens: int, disk: Disk, **options: Any) -> PreTrainedModel:
    """Loads a model as ``load_model`` does, its blocks mapped from files; embeddings get rows for ``num_tokens`` tokens.

    A block that the model's safetensors hold in the dtype asked for stays there, and one in another dtype is
    converted into the scratch file, a weight at a time. Weights that transformers makes from others (of a GGUF file, of
    experts that it fuses, of added tokens) pass through host memory once, before they are offloaded to the disk.
    """
    model = empty_model(name, num_tokens, **options)
    if not (stored := find_stored_weights(name, model)):
        return load_model(name, **options)
    names = {p: key for key, p in model.named_parameters()}
    in_blocks = set(decoder_layers(model).parameters())
    replace_parameters_(model, lambda p: (disk.place_weight if p in in_blocks else _read)(stored[names[p]], p.dtype))
    for key, buffer in persistent_buffers(model).items():
        buffer.copy_(_read(stored[key], buffer.dtype))
    check_finite(name, model)
    return model


def _read(stored: StoredWeight, dtype: torch.dtype) -> Tensor:
    with safe_open(stored.path, "pt") as file:
        return file.get_tensor(stored.key).to(dtype, copy=True)
