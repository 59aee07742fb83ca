"""Blocks that are offloaded in int8, while their exact weights lie further away."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ows_lightning.offload.offloaded import OffloadedWeights, total_nbytes, views_into


def quantize(weights: Sequence[Tensor]) -> list[Tensor]:
    """Returns weights in int8 with a float32 scale per row: two tensors for each that has rows, and the others as they are.

    A row (an output) lies along the last dimension. Its largest weight becomes 127: errors are up to half a scale.
    """
    quantized = []
    for weight in weights:
        if weight.dim() < 2:
            quantized.append(weight)
            continue
        values = weight.to(torch.float32, copy=True)
        # Not / 127, which CUDA computes as * (1 / 127): codes made there and on the host have to be the same.
        scale = torch.maximum(values.amax(-1, keepdim=True), -values.amin(-1, keepdim=True)) * (1 / 127)  # -128 is left out
        quantized += [values.div_(scale.clamp_min(torch.finfo(torch.float32).tiny)).round_().to(torch.int8), scale]
    return quantized


def dequantize(quantized: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Writes what `quantize` returned into weights, in their dtype."""
    parts = iter(quantized)
    for weight in weights:
        if weight.dim() < 2:
            weight.copy_(next(parts), non_blocking=True)
        else:
            torch.mul(next(parts), next(parts), out=weight)


class Int8Weights(OffloadedWeights):
    """A block's exact weights, which train and are saved, and their int8 copy, which is fetched.

    ``offload`` offloads the copy. If it does not lie on the device it passes through ``staging``, memory that all blocks share
    and that grows here. If it does, it is freed while the block trains, and ``staging`` is None.
    """

    def __init__(
        self, exact: OffloadedWeights, offload: Callable[[Sequence[Tensor]], OffloadedWeights], staging: Tensor | None
    ) -> None:
        self.exact, self.offload, self.staging = exact, offload, staging
        self.copy: OffloadedWeights | None = None
        self.refresh()
        if staging is not None and self.copy is not None:
            staging.resize_(max(staging.numel(), total_nbytes(self.copy.tensors)))

    @property
    def tensors(self) -> list[Tensor]:  # type: ignore[override]
        """The exact weights."""
        return self.exact.tensors

    @torch.no_grad()
    def fetch(self, slot: Sequence[Tensor], exact: bool = True) -> None:
        """Dequantises the copy into a slot, or copies the exact weights there."""
        if exact or self.copy is None:
            self.exact.fetch(slot)
            return
        quantized = self.copy.tensors
        if self.staging is not None:
            quantized = views_into(self.staging, quantized)
            self.copy.fetch(quantized)
        dequantize(quantized, slot)

    def load_for_training(self, own: Sequence[Tensor]) -> None:
        """Copies the exact weights to where they train."""
        if self.staging is None:
            self.copy = None
        self.exact.load_for_training(own)

    def write_back(self, trained: Sequence[Tensor]) -> None:
        """Takes over the weights of a block that trained."""
        self.exact.write_back(trained)
        self._quantize_again(trained)

    def make_writable(self) -> None:
        """Prepares the exact weights for other writes."""
        self.exact.make_writable()

    def refresh(self) -> None:
        """Makes a new copy of the exact weights."""
        self._quantize_again(self.tensors)
        self.exact.refresh()

    @torch.no_grad()
    def _quantize_again(self, weights: Sequence[Tensor]) -> None:
        if self.copy is None:
            self.copy = self.offload(quantize(weights))
        else:
            self.copy.write_back(quantize(weights))
