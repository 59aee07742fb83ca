"""Loads a causal LM, its config and its tokenizer from the hub, a directory or a GGUF file, whose weights are dequantised.

Only safetensors and GGUF are read, never a pickle, and no code of a model runs unless ``trust_remote_code`` is set.
"""

import contextlib
import copy
import functools
import logging
import os
import re
import struct
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ows_lightning.compat import faster_gguf_loading, keep_in_float32_, replace_parameters_
from ows_lightning.errors import UsageError, closest_name
from ows_lightning.models.large_tensors import all_finite, release_mapped_pages
from ows_lightning.models.safetensors_file import StoredWeight, stored_weights
from ows_lightning.models.source import MODEL_KEY, ModelSource, check_model_name, locate_model

log = logging.getLogger(__name__)

# What transformers raises over a damaged or odd model; the last one is a GGUF file that ends too early.
_LOADING_ERRORS = (
    OSError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, ImportError,
    SafetensorError, StrictDataclassError, struct.error,
)  # fmt: skip
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")


def load_config(name: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """Loads a model's config; a UsageError says that there is no such model, or no causal LM that can be trained."""
    check_model_name(name)
    source = locate_model(name)
    with loading_errors(name):
        if source.gguf_file is None:
            config = AutoConfig.from_pretrained(**source.arguments, trust_remote_code=trust_remote_code)
        else:
            config = copy.deepcopy(_gguf_config(source, os.path.getmtime(Path(source.path, source.gguf_file))))
    check_trainable(name, config)
    return config


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads a model's tokenizer, with a pad token; a UsageError says that there is none.

    A tokenizer without a pad token pads with its end-of-sequence or unknown token, so that the vocabulary does not
    grow; only if it has neither is a new token `<pad>` added (see `resize_embeddings`).
    """
    source = locate_model(name)
    if not Path(source.path, "tokenizer_config.json").is_file():  # a directory may hold a tokenizer alone
        check_model_name(name)
    with loading_errors(name, what="the tokenizer of "):
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source.arguments, trust_remote_code=trust_remote_code)
    # Without tokenizer files, some classes build a tokenizer of their special tokens alone.
    if tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys():
        raise _no_tokenizer_error(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            tokenizer.add_special_tokens({"pad_token": "<pad>"})
        log.info("The tokenizer has no pad token; it pads with %s.", tokenizer.pad_token)
    return tokenizer


def load_model(
    name: str, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Loads a causal LM on the default device, in training mode, its weights in this dtype, whatever they were saved in.

    ``attn_implementation`` is one of transformers' (`sdpa`, `eager`, `flash_attention_2`, ...). A UsageError says that the
    model can't be loaded or trained, or that the attention is unknown, missing or not supported by it.
    """
    config = load_config(name, trust_remote_code)
    if attn_implementation is not None:
        _check_attention(config, attn_implementation, trust_remote_code)
    source = locate_model(name)
    arguments = source.arguments
    if source.gguf_file is None:
        arguments["use_safetensors"] = True
        # Without this, transformers asks a web service to convert a pickle and loads what that uploads.
        os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    else:
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    arguments |= {"config": config, "attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    arguments["use_kernels"] = False  # transformers 5.25 takes the hub's kernels by default, others in training than in eval
    if (device := torch.get_default_device()).type != "cpu":
        arguments["device_map"] = {"": device}
    # Computed buffers come from the CPU, as offloaded models' do: a GPU rounds RoPE's frequencies differently.
    with torch.device("cpu"), loading_errors(name):  # sizes that do not match are reported below, in one line
        options: Any = {"dtype": dtype, "ignore_mismatched_sizes": True, "output_loading_info": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(**arguments, **options)
    model, report = loaded
    for key, saved, expected in sorted(report["mismatched_keys"]):
        sizes = f"shape {tuple(saved)} where its config says {tuple(expected)}"
        raise UsageError(f"{MODEL_KEY}: {name!r} has {key} of {sizes}; its config.json belongs to another model")
    check_surplus_blocks(name, model, report["unexpected_keys"])
    if missing := sorted(report["missing_keys"]):
        which = f"{missing[0]} ({len(missing)} missing in all) and would start at random there"
        raise UsageError(f"{MODEL_KEY}: {name!r} has no weights for {which}; give a complete causal LM")
    if apart := sorted(model.get_expanded_tied_weights_keys(all_submodels=True).keys() - model.all_tied_weights_keys.keys()):
        hint = "set tie_word_embeddings: false in its config.json, or take one of the two out of its files"
        raise UsageError(f"{MODEL_KEY}: {name!r} has another {apart[0]} than the weight that its config ties it to; {hint}")
    check_finite(name, model)
    return model.train()


def empty_model(name: str, num_tokens: int, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """Builds what ``load_model`` loads, for ``num_tokens`` tokens, with weights on the meta device and buffers in memory."""
    config = load_config(name, options.get("trust_remote_code", False))
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
        if num_tokens > next(model.get_input_embeddings().parameters()).size(0):
            model.resize_token_embeddings(num_tokens, mean_resizing=False)
    keep_in_float32_(model, dtype)
    model.tie_weights()  # accelerate makes a parameter of its own for every place
    with contextlib.suppress(OSError):  # it has none of its own
        model.generation_config = transformers.GenerationConfig.from_pretrained(locate_model(name).path)
    return model.train()


def allocate(model: nn.Module) -> nn.Module:
    """Gives the weights of an ``empty_model`` memory, without values, in place; tied ones stay tied."""
    replace_parameters_(model, lambda p: torch.empty_like(p, device="cpu") if p.is_meta else p)
    return model


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Returns the buffers that belong to a model's state, in an order that is the same on all ranks."""
    buffers = dict(model.named_buffers())
    return {key: buffers[key] for key in model.state_dict() if key in buffers}


def find_stored_weights(name: str, model: PreTrainedModel) -> dict[str, StoredWeight]:
    """Returns where the files store an empty model's tensors; {} unless they name all as it does. Checks its blocks."""
    stored, tied = stored_weights(name), model.all_tied_weights_keys.keys()
    tensors = {**dict(model.named_parameters()), **persistent_buffers(model)}
    if tied & stored.keys() or not all(key in stored and stored[key].fits(tensor) for key, tensor in tensors.items()):
        return {}
    check_surplus_blocks(name, model, stored.keys() - tensors.keys())
    return stored


def check_surplus_blocks(name: str, model: PreTrainedModel, unexpected: Iterable[str]) -> None:
    """Raises a UsageError if the files have weights for more blocks than the model."""
    forms = {re.sub(r"\.\d+\.", ".#.", key) for key in model.state_dict()}
    surplus = sorted(key for key in unexpected if "#" in (form := re.sub(r"\.\d+\.", ".#.", key)) and form in forms)
    if surplus:
        which = f"({surplus[0]}, {len(surplus)} in all), which would be dropped; fix num_hidden_layers, or delete the weights"
        raise UsageError(f"{MODEL_KEY}: {name!r} has weights for more blocks than its config.json says {which}")


def nonfinite_weights(model: nn.Module) -> list[str]:
    """Returns the names of a model's weights that hold NaN or Inf; of sharded ones, this process's parts are looked at."""
    broken = []
    for name, weight in model.named_parameters():
        if not all_finite((weight.to_local() if isinstance(weight, DTensor) else weight).detach()):
            broken.append(name)
        release_mapped_pages()
    return broken


def check_finite(name: str, model: PreTrainedModel) -> None:
    """Raises a UsageError if weights are not finite."""
    if broken := nonfinite_weights(model):
        which = f"({broken[0]}, {len(broken)} tensors in all)"
        raise UsageError(f"{MODEL_KEY}: {name!r} has weights that are not finite {which}; give the model as it was before")


def resize_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds rows to the embeddings and the LM head for tokens that the model lacks, drawn around the mean of the others."""
    rows = next(model.get_input_embeddings().parameters()).size(0)
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer))
        log.info("Resized the embeddings from %d to %d tokens, for the tokenizer's new ones.", rows, len(tokenizer))


def add_eos_token_id(model: PreTrainedModel, token: int) -> None:
    """Adds a token that ends generation, also in the exported model."""
    if token not in (stops := stop_token_ids(model.generation_config)):
        model.generation_config.eos_token_id = [*stops, token]


def stop_token_ids(generation: transformers.GenerationConfig) -> list[int]:
    """Returns the tokens that end generation."""
    stops = generation.eos_token_id
    return [stops] if isinstance(stops, int) else list(stops or ())


@functools.lru_cache(maxsize=1)
def _gguf_config(source: ModelSource, modified: float) -> PretrainedConfig:
    """Parses a GGUF file's header, which takes seconds (its vocabulary is in it), once for each state of the file."""
    return AutoConfig.from_pretrained(**source.arguments)


def check_trainable(name: str, config: PretrainedConfig) -> None:
    """Raises a UsageError unless a config is that of a decoder-only causal LM whose weights can be trained."""
    if fault := _why_untrainable(config):
        raise UsageError(f"{MODEL_KEY}: {name!r} {fault}")


def _why_untrainable(config: PretrainedConfig) -> str | None:
    kind = config.model_type
    if config.is_encoder_decoder:
        return f"is an encoder-decoder ({kind}); give a decoder-only causal LM"
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not has_own_code:
        if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return f"({kind}) is in transformers only as AutoModelForImageTextToText; give one that AutoModelForCausalLM loads"
        return f"is no causal LM ({kind}); give a decoder-only language model"
    if hasattr(config, "lsh_attn_chunk_length"):  # Reformer
        return f"({kind}) trains on rows of whole chunks alone; give a model without chunks"
    # Of some types transformers has the causal LM alone with the config of a part, under which it can't be loaded again.
    of_model = None if has_own_code else getattr(transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "config_class", None)
    if of_model is not None and of_model not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        why = "which transformers can't load as a causal LM; give a text-only causal LM"
        return f"({kind}) would be exported as {of_model.model_type}, {why}"
    # transformers would load BERT and its kin as a causal LM too, with attention to both sides.
    if type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        return f"is an encoder ({kind}); give a decoder-only causal LM"
    for quantisation in (getattr(one, "quantization_config", None) for one in (config, config.get_text_config())):
        if quantisation is not None:
            values = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
            method = values.get("quant_method") or "unknown method"
            why = "and quantised weights can't be trained; give the model that it was made from"
            return f"is quantised ({getattr(method, 'value', method)}), {why}"
    return None


def exceeded_position_limit(config: PretrainedConfig, length: int, trust_remote_code: bool = False) -> int | None:
    """The most tokens that the model has positions for, where `length` tokens are more; else None.

    A config's ``max_position_embeddings`` is no limit by itself: rotary models compute further positions. So a model without
    memory is made from the config, and asked for tables of this length: embeddings (GPT-2, OPT), or tensors of sines
    (GPT-J, CTRL). MPT builds its biases for this length without a table.
    """
    config = config.get_text_config()
    named = {value for name in _LENGTH_KEYS if isinstance(value := getattr(config, name, None), int)}
    in_front = 1 + (getattr(config, "pad_token_id", None) or 0)  # positions that RoBERTa's kin count off
    if not named or length + in_front <= min(named):
        return None
    small = copy.deepcopy(config)
    if not getattr(config, "layer_types", None):
        small.num_hidden_layers = 1
    with loading_errors(str(config.name_or_path)):
        model = meta_model(small, trust_remote_code=trust_remote_code)
    limits = {config.max_seq_len} if config.model_type == "mpt" else set()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not model.get_input_embeddings():
            rows = module.num_embeddings - int(getattr(module, "offset", 0))
            if rows in named:
                limits.add(rows if module.padding_idx is None else rows - module.padding_idx - 1)
        for tensor in [*module.buffers(recurse=False), *(value for value in vars(module).values() if torch.is_tensor(value))]:
            if tensor.dim() == 2 and tensor.shape[0] in named:
                limits.add(tensor.shape[0])
    limit = min(limits, default=length)
    return limit if length > limit else None


def meta_model(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """Returns a causal LM on the meta device, in training mode; made of a copy of the config, which transformers changes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), **options).train()


def _check_attention(config: PretrainedConfig, attention: str, trust_remote_code: bool) -> None:
    """Refuses an attention that is unknown, not installed or not supported, before any weights are fetched."""
    known = sorted({"eager", *(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if not key.startswith("paged|"))})
    if attention not in known and "/" not in attention:  # with a slash it is a kernel on the hub
        hint = f"did you mean '{closest_name(attention, known, cutoff=0)}'? Known: {', '.join(known)}"
        raise UsageError(f"model.attn_implementation: unknown attention {attention!r}; {hint}")
    options = {"attn_implementation": attention, "trust_remote_code": trust_remote_code}
    try:
        meta_model(config, **options)
    except (ImportError, ValueError) as error:
        why = f"{_shortened(error)}; leave it out for transformers' own choice"
        raise UsageError(f"model.attn_implementation: {attention!r} can't be used here: {why}") from error


@contextlib.contextmanager
def loading_errors(name: str, what: str = "") -> Iterator[None]:
    """Turns transformers' long errors about a model's files (``what`` is loaded of it) into a UsageError of one line."""
    try:
        with faster_gguf_loading() if name.endswith(".gguf") else contextlib.nullcontext():
            yield
    except UsageError:
        raise
    except _LOADING_ERRORS as error:
        text, known = str(error), f"that transformers {transformers.__version__} does not know"
        fault = f"can't load {what}{name!r} ({_shortened(error)}); check that its files are whole"
        if "trust_remote_code" in text:
            hint = "read that code, then set model.trust_remote_code: true, or give another model"
            fault = f"{name!r} needs Python code that comes with it; {hint}"
        elif "does not recognize this architecture" in text or "Unrecognized model" in text:
            fault = f"{name!r} has a model_type {known}; upgrade transformers or correct config.json"
        elif "instantiate the backend tokenizer" in text:
            raise _no_tokenizer_error(name) from error
        elif isinstance(error, ImportError):
            fault = f"{what}{name!r} needs a package that is not installed: {_shortened(error)}"
        raise UsageError(f"{MODEL_KEY}: {fault}") from error


def _no_tokenizer_error(name: str) -> UsageError:
    return UsageError(f"{MODEL_KEY}: {name!r} has no tokenizer; copy tokenizer.json and tokenizer_config.json into it")


def _shortened(error: Exception) -> str:
    return textwrap.shorten(str(error), width=240, placeholder=" ...").rstrip(".") or type(error).__name__
