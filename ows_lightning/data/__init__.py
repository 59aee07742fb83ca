"""Instruction data: formats, target masks, packing and loaders."""

from __future__ import annotations

from ows_lightning.data.datamodule import InstructionDataModule

__all__ = ["InstructionDataModule"]
