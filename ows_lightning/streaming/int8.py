"""Blocks that wait in int8, while their exact weights, the masters, wait further away."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ows_lightning.streaming.homes import HostHome, lay_out, nbytes_of

_LARGEST = 127  # symmetric: -128 is left out


def pack(weights: Sequence[Tensor]) -> list[Tensor]:
    """Returns weights in int8 with a float32 scale a row: two tensors for each that has rows, and the others as they are.

    A row's largest weight becomes 127, and every weight is off by half a scale at the most.

    Args:
        weights: Tensors of any floating dtype; a row is what the last dimension counts, an output of a linear layer.
    """
    packed = []
    for weight in weights:
        if weight.dim() < 2:
            packed.append(weight)
            continue
        values = weight.float()
        scale = values.abs().amax(-1, keepdim=True) / _LARGEST
        codes = values / scale.clamp_min(torch.finfo(torch.float32).tiny)
        packed += [codes.round_().to(torch.int8), scale]
    return packed


def unpack(packed: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Writes what `pack` returned into weights, in their dtype."""
    parts = iter(packed)
    for weight in weights:
        if weight.dim() < 2:
            weight.copy_(next(parts), non_blocking=True)
        else:
            torch.mul(next(parts), next(parts), out=weight)


class Transit:
    """Memory on the device that int8 copies which wait elsewhere pass through, one at a time: fetches follow each other.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)

    def reserve(self, nbytes: int) -> None:
        """Makes it as large as the largest copy."""
        if nbytes > self.memory.numel():
            self.memory = torch.empty(nbytes, dtype=torch.uint8, device=self.memory.device)


class Int8Home(HostHome):
    """A block's masters, which train and are saved, and their int8 copy, which is fetched.

    Args:
        masters: Where the exact weights wait.
        keep: Makes the home of the int8 copy.
        transit: What a copy passes through that does not wait on the device; None if it does: then it is freed while the
            block trains.
    """

    def __init__(self, masters: HostHome, keep: Callable[[Sequence[Tensor]], HostHome], transit: Transit | None) -> None:
        self.masters, self.keep, self.transit = masters, keep, transit
        self.exact = False  # fetch the masters
        self.copy: HostHome | None = None
        self.tensors = masters.tensors
        self.written()
        if transit is not None and self.copy is not None:
            transit.reserve(nbytes_of(self.copy.tensors))

    @torch.no_grad()
    def fetch(self, slot: Sequence[Tensor]) -> None:
        """Dequantises the copy into a slot."""
        if self.exact or self.copy is None:
            self.masters.fetch(slot)
            return
        packed = self.copy.tensors
        if self.transit is not None:
            packed = lay_out(self.transit.memory, packed)
            self.copy.fetch(packed)
        unpack(packed, slot)

    def lend(self, own: Sequence[Tensor]) -> None:
        """Copies the masters to where they train."""
        if self.transit is None:
            self.copy = None
        self.masters.lend(own)

    def write_back(self, trained: Sequence[Tensor]) -> None:
        """Takes over the weights of a block that trained."""
        self.masters.write_back(trained)
        self.tensors = self.masters.tensors
        self._renew(trained)

    def make_writable(self) -> None:
        """Prepares the masters for other writes."""
        self.masters.make_writable()
        self.tensors = self.masters.tensors

    def written(self) -> None:
        """Makes a new copy of the masters."""
        self._renew(self.tensors)
        self.masters.written()

    @torch.no_grad()
    def _renew(self, weights: Sequence[Tensor]) -> None:
        if self.copy is None:
            self.copy = self.keep(pack(weights))
        else:
            self.copy.write_back(pack(weights))
