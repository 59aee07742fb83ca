"""Outlier-weighed Layerwise Sampling (OWS, arXiv 2405.18380) for PyTorch Lightning."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ows_lightning.data import InstructionDataModule
    from ows_lightning.models.decoder import decoder_layers
    from ows_lightning.module import CausalLMModule
    from ows_lightning.optim import GaLoreAdamW, galore_param_groups
    from ows_lightning.sampling.callback import LayerwiseSampling
    from ows_lightning.sampling.distributions import sampling_probabilities
    from ows_lightning.sampling.outliers import layer_outlier_ratios
    from ows_lightning.trainer import OWSTrainer

__all__ = [
    "CausalLMModule", "GaLoreAdamW", "InstructionDataModule", "LayerwiseSampling", "OWSTrainer", "decoder_layers",
    "galore_param_groups", "layer_outlier_ratios", "sampling_probabilities",
]  # fmt: skip

_MODULES = {
    "CausalLMModule": "module", "GaLoreAdamW": "optim", "InstructionDataModule": "data", "OWSTrainer": "trainer",
    "LayerwiseSampling": "sampling.callback", "decoder_layers": "models.decoder", "galore_param_groups": "optim",
    "layer_outlier_ratios": "sampling.outliers", "sampling_probabilities": "sampling.distributions",
}  # fmt: skip
_FOR_LIGHTNING = ("CausalLMModule", "InstructionDataModule", "LayerwiseSampling", "OWSTrainer")


def __getattr__(name: str) -> Any:
    """Imports a name when it is first asked for: the optimizer needs torch alone, Lightning takes seconds."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _FOR_LIGHTNING:  # whoever uses Lightning may ask its Trainer for our strategies
        importlib.import_module("ows_lightning.distributed")
    value = getattr(importlib.import_module(f"ows_lightning.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
