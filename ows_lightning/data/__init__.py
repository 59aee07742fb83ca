"""Instruction data: formats, target masks, packing and loaders."""

from ows_lightning.data.datamodule import InstructionDataModule

__all__ = ["InstructionDataModule"]
