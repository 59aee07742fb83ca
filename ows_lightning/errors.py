"""The two errors that a user may cause, and how any error becomes one clear line."""

import difflib
import errno
import os
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path


class UsageError(ValueError):
    """A setting or an input is wrong: the message names the key or the row, and how to fix it. Exit code 2."""


class RunError(RuntimeError):
    """A run that started well can't go on: the message says why, and what is left to resume from. Exit code 1."""


def command_line(command: str, *paths: object) -> str:
    """Returns how to type a command of this package, for messages: ``python main.py ...`` or ``ows-lightning ...``."""
    program = "python main.py" if Path(sys.argv[0]).name == "main.py" else "ows-lightning"
    return " ".join([program, command, *(shlex.quote(str(path)) for path in paths)])


EXTRAS = {"tensorboard": "tensorboard", "lm_eval": "eval"}  # which of our extras brings a package

_REFUSALS = ("`val_check_interval` (", '")` is set but')  # what Lightning says where it refuses a setting by a ValueError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def message_and_exit_code(error: BaseException, command: str = "fit") -> tuple[str, int]:
    """Returns the line that a user sees of a command's error, and the exit code: 2 for a wrong setting, 1 for all else."""
    error = _original_error(error)
    text = " ".join(_message_without_trace(error).split()) or type(error).__name__
    if isinstance(error, (UsageError, RunError)):
        return text, 2 if isinstance(error, UsageError) else 1
    if found := re.search(r"Sharding propagation failed for (aten\.\w+)", text):
        hint = "take another model.optimizer, such as AdamW or GaLoreAdamW, or trainer.strategy: ddp_layerwise"
        return f"trainer.strategy: fsdp2 shards the weights, and torch can't do `{found[1]}` on shards; {hint}", 2
    misconfigured = _class_if_imported("lightning.fabric.utilities.exceptions", "MisconfigurationException")
    if isinstance(error, misconfigured) or any(words in text for words in _REFUSALS):
        return text, 2
    if isinstance(error, ModuleNotFoundError):
        extra = next((f'; pip install "ows_lightning[{extra}]"' for package, extra in EXTRAS.items() if package in text), "")
        return f"{text.rstrip('.')}{extra}", 2
    if "Error(s) in loading state_dict" in text:
        return "ckpt_path: it is a checkpoint of another model or method; give the config.yaml of its run", 2
    if is_out_of_memory(error):
        return _out_of_memory(text, getattr(error, "__notes__", ()), command), 1
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        named = (inner.filename for inner in _causes(error) if isinstance(inner, OSError) and inner.filename)
        where = next((f"'{name}': " for name in named), "")
        return f"{where}{error.strerror}; free space or choose another folder", 1
    if "gloo/transport" in text or isinstance(error, _class_if_imported("torch.distributed", "DistBackendError")):
        return f"another process of this run has ended or hangs, its own output says why ({text[:200]})", 1
    if any(isinstance(inner, KeyboardInterrupt) for inner in _causes(error)):
        then = [] if isinstance(error, KeyboardInterrupt) else [text]
        return "; ".join(["interrupted", *then, *getattr(error, "__notes__", ())]), 130
    return f"{type(error).__name__}: {text} (set OWS_DEBUG=1 for the stack trace)", 1


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, at most 200 characters, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")


def add_note(error: BaseException, note: str) -> None:
    """``BaseException.add_note``, which Python 3.10 lacks."""
    error.__notes__ = [*getattr(error, "__notes__", ()), note]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory, or the machine's, did not suffice."""
    if isinstance(error, _class_if_imported("torch", "OutOfMemoryError")):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "CUDA error: out of memory", "_ALLOC_FAILED"))


def not_writable(key: str, folder: Path, error: OSError) -> UsageError:
    """Returns the error of a folder that can't be made or written to, which the key names."""
    hint = "free space or choose another folder" if error.errno in DISK_FULL else "choose another folder"
    return UsageError(f"{key}: can't write to '{folder}' ({error.strerror or error}); {hint}")


def refuse_url(key: str, folder: str | os.PathLike[str]) -> None:
    """Raises a UsageError if a folder, which the key names, is an address such as ``s3://...``: it has to be a local one."""
    if re.match(r"\w{2,}:/", str(folder)):
        raise UsageError(f"{key}: '{folder}' is an address; give a local folder")


def typed_path(name: str | os.PathLike[str]) -> Path:
    """The path that a user typed, with its ~ expanded; that of an unknown user stays, where pathlib raises."""
    return Path(os.path.expanduser(name))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ``; did you mean 'X'?`` with the nearest of the known names, or nothing."""
    return f"; did you mean '{near}'?" if (near := closest_name(name, known)) else ""


def closest_name(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the known name most similar to ``name``, the first of equals; None if none reaches ``cutoff`` (0 to 1)."""
    likeness = {other: difflib.SequenceMatcher(None, other, name).ratio() for other in sorted(known)}
    return max((other for other in likeness if likeness[other] >= cutoff), key=likeness.__getitem__, default=None)


def _class_if_imported(module: str, name: str) -> tuple[type[BaseException], ...]:
    """An exception's class, in a tuple for ``isinstance``; empty if its library was not imported."""
    return (getattr(sys.modules[module], name),) if module in sys.modules else ()


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:  # it may be a circle
        chain.append(inner)
    return chain


def _original_error(error: BaseException) -> BaseException:
    """Returns the original error: jsonargparse wraps errors of classes that it instantiates in long messages."""
    chain = _causes(error)
    ours = next((inner for inner in chain if isinstance(inner, (UsageError, RunError))), None)
    return ours or (chain[-1] if "Does not validate against" in str(error) else error)


def _message_without_trace(error: BaseException) -> str:
    """The error's text, without the stack trace that a worker of a DataLoader sends with it."""
    text = str(error)
    raised = re.findall(r"^[\w.]+: (.*)", text, flags=re.MULTILINE) if "DataLoader worker process" in text else []
    return raised[-1] if raised else text


def _out_of_memory(text: str, notes: Iterable[str], command: str) -> str:
    happened = "; ".join([text.rpartition("DefaultCPUAllocator: ")[2].split(". ")[0], *notes])
    if command in ("validate", "test", "predict"):
        return f"{happened}; lower data.eval_batch_size or data.max_seq_length, or set trainer.precision: bf16-true"
    if command not in ("fit", "score"):
        return happened
    batches = "data.batch_size (and raise trainer.accumulate_grad_batches by as much)"
    lower = f"{batches}, data.max_seq_length or sampling.activated_layers"
    settings = "model.gradient_checkpointing: true, sampling.always_train: [norm], trainer.precision: bf16-true"
    frozen = f"model.frozen_in: {'disk' if 'CPUAllocator' in text else 'host'}"
    plan = f"`{command_line('plan')}` with the same config says how much each saves"
    return f"{happened}; lower {lower}, set {settings} or {frozen}; {plan}"
