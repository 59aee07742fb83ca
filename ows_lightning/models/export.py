"""Writes a model as a directory that transformers, and every tool that reads its format, can load."""

import contextlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE, SAFETENSORS_SINGLE_FILE
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, cached_file

from ows_lightning.errors import RunError, StrPath
from ows_lightning.models.decoder import end_offloaded_pass, language_model_of
from ows_lightning.models.large_tensors import release_mapped_pages
from ows_lightning.models.model_directory import atomic_directory, check_replaceable
from ows_lightning.models.plain_weights import PlainWeight, file_layout, group_by_file_tensors, merged_weight, unique_weights
from ows_lightning.models.pretrained import nonfinite_weights
from ows_lightning.models.safetensors_file import SafetensorsFile

log = logging.getLogger(__name__)
SHARD_BYTES = 2 * 10**9


@torch.no_grad()
def save_huggingface(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, directory: StrPath, card: str | None = None
) -> None:
    """Writes a model directory: safetensors, config, generation config, tokenizer, chat template and model card.

    `AutoModelForCausalLM.from_pretrained(directory)` loads it without a warning. Tied weights are stored once, all in their
    dtype. A model inside peft is written merged, and itself left as it was. Weights are gathered (FSDP2), merged or read one
    at a time. Shards have about 2 GB. A vision-language model also gets the processor's files of the model it was made from.

    The directory appears as a whole when everything in it is written. One that holds anything but a model is not replaced
    (UsageError). A RunError says that the files can't be written, or that weights are NaN or Inf. With several processes
    rank 0 writes; the others may call this too, and have to if the model is sharded.
    """
    target = check_replaceable(directory)
    for module in model.modules():
        end_offloaded_pass(module)  # an interrupted one may have left a block computing, from a copy in int8
        if isinstance(module, FSDPModule):
            module.reshard()  # the outermost one stays gathered after a forward pass
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    _check_finite(model, sharded)
    base: Any = language_model_of(model)
    weights = unique_weights(base)
    writes = not distributed.is_initialized() or distributed.get_rank() == 0
    with atomic_directory(target, "model") if writes else contextlib.nullcontext(target) as partial:
        if writes:
            tokenizer.save_pretrained(partial)
            if card is not None:
                (partial / "README.md").write_text(card, encoding="utf-8")
            _save_all_but_weights(base, weights, partial)
        if writes or sharded:
            _save_weights(base, weights, partial, writes)
    if sharded:
        distributed.barrier()


def _check_finite(model: nn.Module, sharded: bool) -> None:
    """Refuses weights with NaN or Inf, on all ranks if one holds such a part."""
    broken = nonfinite_weights(model)
    if sharded:
        everywhere: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(everywhere, broken)
        broken = list(dict.fromkeys(name for rank in everywhere for name in rank))
    if broken:
        which = f"{len(broken)} of its {len(list(model.parameters()))} weights hold NaN or Inf ({broken[0]})"
        raise RunError(f"the model is not written: {which}; export an earlier checkpoint, and train at a lower learning rate")


def _save_all_but_weights(model: PreTrainedModel, weights: list[PlainWeight], directory: Path) -> None:
    if type(model.config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        for name in (IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, PROCESSOR_NAME):
            with contextlib.suppress(OSError):  # the model has no such file, or the hub can't be reached
                shutil.copy(str(cached_file(str(model.name_or_path), name)), directory)
    model.generation_config = _valid_generation_config(model.generation_config)
    model.save_pretrained(directory, state_dict={})
    (directory / SAFETENSORS_SINGLE_FILE).unlink(missing_ok=True)
    if model.all_tied_weights_keys.keys() & {weight.name for weight in weights}:
        # Trained apart, e.g. an adapter on the embeddings alone.
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": False}, indent=2) + "\n")


def _valid_generation_config(generation: GenerationConfig) -> GenerationConfig:
    """Keeps only the token ids if the rest contradicts itself (a temperature without sampling), which can't be saved."""
    try:
        generation.validate(strict=True)
    except ValueError as error:
        log.warning("The generation config contradicts itself; its token ids alone are written. %s", error)
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        return GenerationConfig(**{name: getattr(generation, name) for name in ids})
    return generation


def _save_weights(model: PreTrainedModel, weights: list[PlainWeight], directory: Path, writes: bool) -> None:
    """Writes weights as ``save_pretrained`` would, but with one of a sharded, adapted or mapped model in memory at a time."""
    layout = file_layout(model, weights)
    split = split_torch_state_dict_into_shards(layout, max_shard_size=SHARD_BYTES)
    with contextlib.ExitStack() as stack:
        files: dict[str, SafetensorsFile] = {}
        for file, names in split.filename_to_tensors.items() if writes else ():
            files[file] = stack.enter_context(SafetensorsFile(directory / file, {name: layout[name] for name in names}))
        for group in group_by_file_tensors(model, weights):
            with contextlib.ExitStack() as merged:
                tensors = {weight.name: merged.enter_context(merged_weight(weight)).detach() for weight in group}
                for name, value in revert_weight_conversion(model, tensors).items() if writes else ():
                    files[split.tensor_to_filename[name]].write(name, value)
                if not writes and torch.cuda.is_available():
                    torch.cuda.synchronize()  # or the next gathers' timeouts begin while rank 0 still writes
            release_mapped_pages()
    if writes and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / SAFETENSORS_INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
