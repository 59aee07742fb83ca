"""Outlier-weighed Layerwise Sampling (OWS, arXiv 2405.18380) for PyTorch Lightning."""

from ows_lightning import distributed as _strategies  # noqa: F401  registers fsdp2 and ddp_layerwise
from ows_lightning.data import InstructionDataModule
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.module import CausalLMModule
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.optim.param_groups import galore_param_groups
from ows_lightning.sampling.callback import LayerwiseSampling
from ows_lightning.sampling.distributions import sampling_probabilities
from ows_lightning.sampling.outliers import layer_outlier_ratios

__all__ = [
    "CausalLMModule",
    "GaLoreAdamW",
    "InstructionDataModule",
    "LayerwiseSampling",
    "decoder_layers",
    "galore_param_groups",
    "layer_outlier_ratios",
    "sampling_probabilities",
]
