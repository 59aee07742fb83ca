"""Writes a model as a directory that transformers, and every tool that reads its format, can load."""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import CHAT_TEMPLATE_DIR, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, cached_file

from ows_lightning.atomic_files import partial_path, replace_atomically
from ows_lightning.compat import own_parameters, persistent_buffer_names
from ows_lightning.errors import RunError, UsageError, refuse_url, typed_path
from ows_lightning.models.decoder import end_offloaded_pass, language_model_of
from ows_lightning.models.large_tensors import release_mapped_pages
from ows_lightning.models.pretrained import nonfinite_weights
from ows_lightning.models.safetensors_file import SafetensorsFile
from ows_lightning.models.source import DELTA_FILE

log = logging.getLogger(__name__)

SHARD_BYTES = 2 * 10**9
_WEIGHTS = "model.safetensors"
# Names of files in a Hugging Face model directory; nothing else is ever replaced or removed.
MODEL_FILES = (
    DELTA_FILE, "README.md", "LICENSE*", ".gitattributes", "*.safetensors", "*.safetensors.index.json", "*config.json",
    "*token*.json", "*.jinja", "vocab.json", "vocab.txt", "merges.txt", "*.model", CHAT_TEMPLATE_DIR,
)  # fmt: skip


class _PlainWeight(NamedTuple):
    """A weight or buffer of the plain model: where it is now, and the adapter layers to merge into it."""

    name: str
    module: nn.Module
    attribute: str
    adapters: tuple[Any, ...]

    @property
    def tensor(self) -> Tensor:
        """The weight itself, without adapters."""
        return getattr(self.module, self.attribute)


@torch.no_grad()
def save_huggingface(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, directory: str | os.PathLike[str], card: str | None = None
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
    _check_finite(model)
    base: Any = language_model_of(model)
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    writes = not distributed.is_initialized() or distributed.get_rank() == 0
    with atomic_directory(target, "model") if writes else contextlib.nullcontext(target) as partial:
        if writes:
            tokenizer.save_pretrained(partial)
            if type(base.config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
                for name in (IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, PROCESSOR_NAME):
                    with contextlib.suppress(OSError):  # the model has no such file, or the hub can't be reached
                        shutil.copy(str(cached_file(str(base.name_or_path), name)), partial)
            if card is not None:
                (partial / "README.md").write_text(card, encoding="utf-8")
            base.generation_config = _valid_generation_config(base.generation_config)
        if writes or sharded:
            _save_one_by_one(base, partial, writes)
    if sharded:
        distributed.barrier()


def _check_finite(model: nn.Module) -> None:
    """Refuses weights with NaN or Inf, on all ranks if one holds such a part."""
    broken = nonfinite_weights(model)
    if any(isinstance(p, DTensor) for p in model.parameters()):
        everywhere: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(everywhere, broken)
        broken = list(dict.fromkeys(name for rank in everywhere for name in rank))
    if broken:
        which = f"{len(broken)} of its {len(list(model.parameters()))} weights hold NaN or Inf ({broken[0]})"
        raise RunError(f"the model is not written: {which}; export an earlier checkpoint, and train at a lower learning rate")


def check_replaceable(directory: str | os.PathLike[str], *sources: str | os.PathLike[str]) -> Path:
    """Returns the resolved path if a model or a delta may replace what is there: nothing, or a model, and no source."""
    refuse_url("output", directory)
    target = typed_path(directory).resolve()
    if not target.exists():
        return target
    if target == Path.cwd() or target.is_mount():
        what = "the current folder or a mount point, which"
        raise UsageError(f"'{directory}' is {what} can't be replaced; give a new directory in it")
    if target in (typed_path(source).resolve() for source in sources):
        raise UsageError(f"{str(target)!r} is what the result is made from, and would be replaced; give another directory")
    if not target.is_dir():
        raise UsageError(f"{str(target)!r} is a file; give a directory to write the model to")
    foreign = [p.name for p in target.iterdir() if not is_of_model(p) or (p.is_dir() and p.name != CHAT_TEMPLATE_DIR)]
    if foreign or (any(target.iterdir()) and not (target / "config.json").is_file()):
        what = f"holds {foreign[0]!r}, which is no part of a model" if foreign else "holds something else than a model"
        raise UsageError(f"{str(target)!r} {what}, and would be replaced; give a new directory")
    return target


def is_of_model(path: Path) -> bool:
    """Whether a file or folder is one that model directories have; Python files where the config names code."""
    if path.suffix != ".py":
        return any(map(path.match, MODEL_FILES))
    config = path.with_name("config.json")
    return config.is_file() and "auto_map" in config.read_text(encoding="utf-8")


@contextlib.contextmanager
def atomic_directory(target: Path, what: str) -> Iterator[Path]:
    """Yields an empty folder that replaces the target in the end, or is removed after an error; a full disk is a RunError."""
    partial = partial_path(target)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for file in partial.glob("*.safetensors"):  # safetensors gives them to their owner alone
            file.chmod((partial / "config.json").stat().st_mode)
        replace_atomically(partial, target)
    except (OSError, SafetensorError) as error:
        raise RunError(f"can't write the {what} to {str(target)!r} ({error}); free space or choose another") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _valid_generation_config(generation: GenerationConfig) -> GenerationConfig:
    """Keeps only the token ids if the rest contradicts itself (a temperature without sampling), which can't be saved."""
    try:
        generation.validate(strict=True)
    except ValueError as error:
        log.warning("The generation config contradicts itself; its token ids alone are written. %s", error)
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        return GenerationConfig(**{name: getattr(generation, name) for name in ids})
    return generation


def _save_one_by_one(model: PreTrainedModel, directory: Path, writes: bool) -> None:
    """Writes what ``save_pretrained`` would, but with a weight of a sharded, adapted or mapped model in memory at a time."""
    weights = unique_weights(model)
    kept_apart = {weight.name for weight in weights} & model.all_tied_weights_keys.keys()
    if writes:
        model.save_pretrained(directory, state_dict={})  # all but the weights
        (directory / _WEIGHTS).unlink(missing_ok=True)
        if kept_apart:  # trained apart, e.g. an adapter on the embeddings alone
            path = directory / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": False}, indent=2) + "\n")
    layout = _file_layout(model, weights)
    split = split_torch_state_dict_into_shards(layout, max_shard_size=SHARD_BYTES)
    with contextlib.ExitStack() as stack:
        files: dict[str, SafetensorsFile] = {}
        if writes:
            for file, names in split.filename_to_tensors.items():
                files[file] = stack.enter_context(SafetensorsFile(directory / file, {name: layout[name] for name in names}))
        for group in group_by_file_tensors(model, weights):
            with contextlib.ExitStack() as merged:
                tensors = {weight.name: merged.enter_context(_merged_weight(weight)).detach() for weight in group}
                if writes:
                    for name, value in revert_weight_conversion(model, tensors).items():
                        files[split.tensor_to_filename[name]].write(name, value)
                elif torch.cuda.is_available():
                    torch.cuda.synchronize()  # or the next gathers' timeouts begin while rank 0 still writes
            release_mapped_pages()
    if writes and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / f"{_WEIGHTS}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def group_by_file_tensors(model: PreTrainedModel, weights: list[_PlainWeight]) -> list[list[_PlainWeight]]:
    """Sorts weights by the tensors of the files that they make: most by themselves, others joined into one."""
    shapes = {name: tensor.shape for name, tensor in _file_layout(model, weights).items()}
    groups: list[list[_PlainWeight]] = []
    joined: list[_PlainWeight] = []
    for weight in weights:
        alone = all(tensor.shape == shapes.get(name) for name, tensor in _file_layout(model, [weight]).items())
        groups.append([weight]) if alone else joined.append(weight)
    return [*groups, joined] if joined else groups


def _file_layout(model: PreTrainedModel, weights: list[_PlainWeight]) -> dict[str, Tensor]:
    """The tensors, without values, that weights make in files as on the hub: all experts may be one here, and many there."""
    empty = {w.name: torch.empty(w.tensor.shape, dtype=w.tensor.dtype, device="meta") for w in weights}
    return revert_weight_conversion(model, empty)


def weights_without_peft(module: Any, prefix: str = "", adapters: tuple[Any, ...] = ()) -> Iterator[_PlainWeight]:
    """Yields the weights under the names that they have without peft, in the same order on every rank."""
    if hasattr(module, "base_layer"):  # a layer with an adapter; with several, one lies in the other
        yield from weights_without_peft(module.base_layer, prefix, (*adapters, module))
    elif hasattr(module, "token_adapter"):  # embeddings with a few trained rows
        yield from weights_without_peft(module.token_adapter, prefix)
    elif hasattr(module, "modules_to_save"):  # a module that is trained as a whole
        active = module.modules_to_save[module.active_adapters[0]] if module.active_adapters else module.original_module
        yield from weights_without_peft(active, prefix)
    else:
        attributes = [*own_parameters(module), *persistent_buffer_names(module)]
        yield from (_PlainWeight(prefix + a, module, a, adapters) for a in attributes if getattr(module, a) is not None)
        for name, child in module.named_children():
            yield from weights_without_peft(child, f"{prefix}{name}.")


def unique_weights(model: nn.Module) -> list[_PlainWeight]:
    """Returns the weights as ``weights_without_peft`` does, but a tied one only once, under its name in files."""
    tied: Mapping[str, str] = model.all_tied_weights_keys  # type: ignore[assignment]
    weights, known = [], set()
    for weight in sorted(weights_without_peft(model), key=lambda weight: weight.name in tied):
        identity = (id(weight.tensor), *map(id, weight.adapters))
        if weight.name not in tied or identity not in known:
            weights.append(weight)
        known.add(identity)
    return weights


@contextlib.contextmanager
def _merged_weight(weight: _PlainWeight) -> Iterator[Tensor]:
    """Yields the weight as one whole tensor with its adapters merged in; all ranks have to enter.

    The merge happens in copies that take the parameters' places for as long as it takes.
    """
    adapters = [adapter for adapter in weight.adapters if not adapter.merged]
    if not adapters:
        yield full_tensor(weight.tensor)
        return
    parameters = {module: dict(own_parameters(module)) for module in adapters[0].modules()}
    device = [*adapters[0].parameters()][-1].device  # the adapter's: what it is merged into may be offloaded
    try:
        for module, named in parameters.items():
            for name, parameter in named.items():
                if parameter is not None:
                    whole = full_tensor(parameter).to(device, copy=True)
                    own_parameters(module)[name] = nn.Parameter(whole, requires_grad=False)
        for adapter in adapters:
            type(adapter).merge(adapter)  # not that of an offloaded layer, which would prepare it for writes
        yield weight.tensor
    finally:
        for adapter in adapters:
            adapter.merged_adapters.clear()
        for module, named in parameters.items():
            own_parameters(module).update(named)


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns a sharded tensor as a whole, for which all ranks have to call it; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
