"""How any error of a command becomes one clear line, and the program's exit code."""

import re
import sys
from collections.abc import Iterable

from ows_lightning.errors import DISK_FULL, RunError, UsageError, command_line, is_out_of_memory

EXTRAS = {"tensorboard": "tensorboard", "lm_eval": "eval"}  # which of our extras brings a package
_REFUSALS = ("`val_check_interval` (", '")` is set but')  # what Lightning says where it refuses a setting by a ValueError


def message_and_exit_code(error: BaseException, command: str = "fit") -> tuple[str, int]:
    """Returns the line that a user sees of a command's error, and the exit code: 2 for a wrong setting, 1 for all else."""
    error = _original_error(error)
    text = " ".join(_message_without_trace(error).split()) or type(error).__name__
    if isinstance(error, (UsageError, RunError)):
        return text, 2 if isinstance(error, UsageError) else 1
    if found := re.search(r"Sharding propagation failed for (aten\.\w+)", text):
        hint = "take another model.optimizer, such as AdamW or GaLoreAdamW, or trainer.strategy: ddp_layerwise"
        return f"trainer.strategy: fsdp2 shards the weights, and torch can't do `{found[1]}` on shards; {hint}", 2
    exceptions = sys.modules.get("lightning.fabric.utilities.exceptions")  # if it is imported
    if isinstance(error, getattr(exceptions, "MisconfigurationException", ())) or any(words in text for words in _REFUSALS):
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
    if "gloo/transport" in text or isinstance(error, getattr(sys.modules.get("torch.distributed"), "DistBackendError", ())):
        return f"another process of this run has ended or hangs, its own output says why ({text[:200]})", 1
    if any(isinstance(inner, KeyboardInterrupt) for inner in _causes(error)):
        then = [] if isinstance(error, KeyboardInterrupt) else [text]
        return "; ".join(["interrupted", *then, *getattr(error, "__notes__", ())]), 130
    return f"{type(error).__name__}: {text} (set OWS_DEBUG=1 for the stack trace)", 1


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
