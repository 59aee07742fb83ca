"""Time and memory of the LM head's loss, forward and backward, by implementation: ``python -m benchmarks.loss_head``.

Each implementation runs in a process of its own. The sizes are SmolLM2-135M's by default.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.memory import memory_of
from benchmarks.report import markdown
from ows_lightning.models.loss import summed_cross_entropy

ROOT = Path(__file__).parents[1]
CHUNK = 256  # tokens
REPEATS = 5


def whole(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """The logits of all tokens at once, in float32, as transformers has it."""
    return F.cross_entropy(model.lm_head(hidden).float(), targets, reduction="sum")


def checkpointed(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Chunks whose logits are computed again in backward."""
    parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.stack([checkpoint(whole, model, h, t, use_reentrant=False) for h, t in parts]).sum()


def torchs(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """In chunks, by torch itself, from 2.13 on."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, model.lm_head.weight, targets, reduction="sum", options=options)


def ligers(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Liger's kernels (``pip install liger-kernel``), on a GPU alone."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, model.lm_head.weight, targets, reduction="sum")


IMPLEMENTATIONS: dict[str, tuple[str, Callable[[Any, Tensor, Tensor], Tensor]]] = {
    "ours": ("Ours", summed_cross_entropy),
    "whole": ("All logits at once", whole),
    "checkpointed": (f"Checkpointed chunks of {CHUNK}", checkpointed),
    "torch": ("F.linear_cross_entropy", torchs),
    "liger": ("Liger", ligers),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures one implementation, or all of them in turns, and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss_head", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--head", choices=("frozen", "trains"), help="whether the head's weight needs a gradient; both")
    parser.add_argument("--only", choices=list(IMPLEMENTATIONS), help="measure this one, in this process")
    args = parser.parse_args(arguments)
    if args.only:
        print(*measure(args))
        return
    rows = []
    there = {"torch": hasattr(F, "linear_cross_entropy"), "liger": args.device == "cuda" and find_spec("liger_kernel")}
    given = sys.argv[1:] if arguments is None else list(arguments)
    for head in [args.head] if args.head else ["frozen", "trains"]:
        for key in (key for key in IMPLEMENTATIONS if there.get(key, True)):
            command = [sys.executable, "-m", "benchmarks.loss_head", *given, "--head", head, "--only", key]
            process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            figures = process.stdout.split() if process.returncode == 0 else ["failed", process.stderr.splitlines()[-1][:60]]
            rows.append([IMPLEMENTATIONS[key][0], head, *figures])
    print(f"{args.tokens} tokens, hidden size {args.hidden}, vocabulary {args.vocabulary}, {args.dtype}, {args.device}\n")
    print(markdown(["Implementation", "Head", "Median (ms)", "Peak (MB)"], rows))


def measure(args: argparse.Namespace) -> tuple[str, str]:
    """Returns the median time of forward and backward in ms, and their peak memory in MB."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    sizes = {"hidden_size": args.hidden, "vocab_size": args.vocabulary, "num_hidden_layers": 0, "num_attention_heads": 1}
    with device:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes), dtype=dtype)
        hidden = torch.randn(args.tokens, args.hidden, dtype=dtype, requires_grad=True)
        targets = torch.randint(args.vocabulary, (args.tokens,))
    model.lm_head.requires_grad_(args.head == "trains")
    loss = partial(IMPLEMENTATIONS[args.only][1], model, hidden, targets)
    memory, seconds = memory_of(device), []
    for step in range(REPEATS + 1):
        model.zero_grad()
        hidden.grad = None
        if step == 1:  # after one of warm-up
            memory.release()
            held = memory.held()
            memory.reset_peak()
        memory.synchronize()
        start = time.perf_counter()
        loss().backward()
        memory.synchronize()
        seconds.append(time.perf_counter() - start)
    return f"{1000 * median(seconds[1:]):.4g}", f"{memory.peak() - held:.0f}"


if __name__ == "__main__":
    main()
