"""Offloaded weights: where those of a block lie while it does not train."""

import contextlib
import mmap
import weakref
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ows_lightning.errors import RunError

ALIGNMENT = 512  # bytes: that of the CUDA allocator, so that kernels see in a slot what they see elsewhere


def byte_offsets(tensors: Sequence[Tensor]) -> list[int]:
    """Where in one piece of memory each of the tensors begins, aligned, and where the last one ends, in bytes."""
    return list(accumulate((-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors), initial=0))


def total_nbytes(tensors: Sequence[Tensor]) -> int:
    """What tensors take in one piece of memory, in bytes."""
    return byte_offsets(tensors)[-1]


def views_into(memory: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views memory (uint8, one-dimensional, `total_nbytes(tensors)`) with the dtypes, shapes and strides of tensors."""
    return [
        memory[start : start + tensor.nbytes]
        .view(tensor.dtype)
        .as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride())
        for start, tensor in zip(byte_offsets(tensors), tensors, strict=False)
    ]


def tensor_at(weight: Tensor, memory: Any, start: int) -> Tensor:
    """Views a buffer from byte ``start`` on as a tensor with the dtype, shape and strides of a gapless weight.

    It has its own storage: code that saves models takes views of one storage for tied weights.
    """
    if not weight.numel():
        return torch.empty_like(weight, device="cpu")
    values = torch.frombuffer(memory, dtype=weight.dtype, count=weight.numel(), offset=start)
    return values.as_strided(weight.shape, torch.empty_like(weight, device="meta").stride())


@torch.no_grad()
def copy_into(memory: Any, weights: Sequence[Tensor]) -> list[Tensor]:
    """Copies weights into memory that has the buffer protocol, one at a time, to where `byte_offsets` says."""
    places = zip(weights, byte_offsets(weights), strict=False)
    return [tensor_at(weight, memory, start).copy_(weight) for weight, start in places]


class OffloadedWeights:
    """A block's offloaded weights, a tensor each; a given weight that lies on the ``device`` already is not copied."""

    memory: Tensor | None = None  # page-locked, around the weights; unlocked when this reference goes

    def __init__(self, weights: Sequence[Tensor], device: torch.device | str = "cpu") -> None:
        self.tensors = [weight.to(device) for weight in weights]

    @torch.no_grad()
    def fetch(self, slot: Sequence[Tensor], exact: bool = True) -> None:
        """Copies the weights into a slot; unless ``exact``, their copy in int8 will do."""
        for target, weight in zip(slot, self.tensors, strict=True):
            target.copy_(weight, non_blocking=True)

    @torch.no_grad()
    def write_back(self, trained: Sequence[Tensor]) -> None:
        """Takes over the weights of a block that trained, and waits until they are there."""
        for number, (weight, source) in enumerate(zip(self.tensors, trained, strict=True), start=1):
            weight.copy_(source, non_blocking=number < len(trained))  # the last one waits for all

    def load_for_training(self, own: Sequence[Tensor]) -> None:
        """Copies the weights to where they train."""
        self.fetch(own)

    def make_writable(self) -> None:
        """Prepares the ``tensors`` for writes other than ``write_back``."""

    def refresh(self) -> None:
        """After other code read or wrote the ``tensors``: subclasses free pages or requantise."""


def page_locked(nbytes: int, device: torch.device) -> Tensor:
    """Returns host memory, uint8, that a GPU reads by itself: page-aligned, page-locked, and no larger than it has to be.

    torch's own pinned memory comes in powers of two. The memory is a mapping of its own, shared, because that of a process
    which forks (a data loader's workers) would move away from under the GPU at the next write. A RunError says that the system
    does not lock that many pages.
    """
    memory = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE))
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    address, cudart = whole.data_ptr(), torch.cuda.cudart()
    if error := int(cudart.cudaHostRegister(address, len(memory), 1)):  # for all devices, whichever is the current one
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device)  # takes the error, which the next kernel would raise
        fault = f"{len(memory) / 1e6:.0f} MB of host memory could not be page-locked (CUDA error {error})"
        raise RunError(f"model.frozen_in: {fault}; free host memory, or raise the limit that `ulimit -l` shows")
    weakref.finalize(whole, _unlock, address, device).atexit = False
    return whole


def _unlock(address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a copy may still read the memory, which is freed next
    torch.cuda.cudart().cudaHostUnregister(address)


def offload_to_host(weights: Sequence[Tensor], device: torch.device) -> OffloadedWeights:
    """Offloads weights to host memory, one at a time, that a device can fetch from: a GPU does so by itself."""
    if device.type != "cuda":
        return OffloadedWeights(weights)
    memory = page_locked(total_nbytes(weights), device)
    offloaded = OffloadedWeights(copy_into(memory.numpy(), weights))
    offloaded.memory = memory
    return offloaded
