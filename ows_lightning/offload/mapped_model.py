"""A model whose blocks are offloaded to the disk: they stay in the model's own files where they can."""

from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ows_lightning.compat import replace_parameters_
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.pretrained import check_finite, empty_model, load_model, persistent_buffers, weights_by_name
from ows_lightning.models.safetensors_file import StoredWeight
from ows_lightning.offload.disk import Disk


def load_mapped_model(name: str, num_tokens: int, disk: Disk, **options: Any) -> PreTrainedModel:
    """Loads a model as ``load_model`` does, its blocks mapped from files; embeddings get rows for ``num_tokens`` tokens.

    A block that the model's safetensors hold in the dtype asked for stays there, and one in another dtype is
    converted into the scratch file, a weight at a time. Weights that transformers makes from others (of a GGUF file, of
    experts that it fuses, of added tokens) pass through host memory once, before they are offloaded to the disk.
    """
    model = empty_model(name, num_tokens, **options)
    if not (stored := weights_by_name(name, model)):
        return load_model(name, **options)
    names = {p: key for key, p in model.named_parameters()}
    in_blocks = set(decoder_layers(model).parameters())
    replace_parameters_(
        model, lambda p: nn.Parameter((disk.place_weight if p in in_blocks else _read)(stored[names[p]], p.dtype))
    )
    for key, buffer in persistent_buffers(model).items():
        buffer.copy_(_read(stored[key], buffer.dtype))
    check_finite(name, model)
    return model


def _read(stored: StoredWeight, dtype: torch.dtype) -> Tensor:
    with safe_open(stored.path, "pt") as file:
        return file.get_tensor(stored.key).to(dtype, copy=True)
