"""Measures rows one after the other: ``python -m benchmarks.gpu.measure DEVICE < ROWS``, a line of JSON in and out for each.

Random weights of the right shapes stand for a model: neither time nor memory depends on their values.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import time
from statistics import median
from typing import Any

import torch
from accelerate import init_empty_weights
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import loss_head
from benchmarks.gpu.settings import WARM_UP, Row
from benchmarks.models import BatchShape, random_batch
from benchmarks.worker import MB, memory_of
from benchmarks.worker import measure as measure_peer
from ows_lightning.compat import own_parameters
from ows_lightning.memory.plan_settings import settings_from_config
from ows_lightning.memory.prediction import predict
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.lora import add_lora
from ows_lightning.module import DTYPES, CausalLMModule
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.sampling.callback import LayerwiseSampling
from ows_lightning.streaming.streams import CopyStream, copy_stream_for


def main() -> None:
    """Reads rows and prints what was found of each; what goes wrong is found, too."""
    device, out = torch.device(sys.argv[1]), sys.stdout
    print("ready", flush=True)
    with contextlib.redirect_stdout(sys.stderr):
        for line in sys.stdin:
            print(json.dumps(attempt(json.loads(line), device)), file=out, flush=True)


def attempt(row: Row, device: torch.device) -> dict[str, Any]:
    """Returns a row's figures, or its ``error`` in a line."""
    start = time.perf_counter()
    try:
        figures = PARTS[row["part"]](row, device)
    except torch.OutOfMemoryError:
        figures = {"error": "out of memory"}
    except Exception as error:  # whatever it is, the other rows are worth having
        figures = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    memory_of(device).release()
    return {**figures, "took_s": time.perf_counter() - start}


# ---------------------------------------------------------------------- the parts


def plan(row: Row, device: torch.device) -> dict[str, Any]:
    """The peak of three steps in Lightning's Trainer beside what ``plan`` says of the same config."""
    predicted = predict(settings_from_config(row["config"]))
    run = _Run(row["config"], device, steps=3)
    return {
        "predicted_mb": predicted.peak_bytes / MB,
        "measured_mb": run.peak_mb,
        "host_mb": predicted.host_bytes / MB,
    }


def step(row: Row, device: torch.device) -> dict[str, Any]:
    """Times of optimizer steps: of ours in Lightning's Trainer, of a peer's method in a plain loop."""
    if "method" in row:
        shape = BatchShape(*row["shape"])
        settings = {key: row[key] for key in ("model", "shape", "method", "steps", "interval")}
        found = measure_peer({**settings, "directory": "", "device": device.type, "dtype": "bfloat16", "repeat": 0})
        seconds, peak = found["seconds"], max(found["interval_peak_mb"])
        return {**_times(seconds, shape.tokens), "peak_mb": peak}
    interval, config = row["config"]["sampling"]["interval_steps"], row["config"]
    run = _Run(config, device, steps=WARM_UP + interval * row["draws"])
    tokens = config["data"]["batch_size"] * config["data"]["max_seq_length"] * config["trainer"]["accumulate_grad_batches"]
    figures = {**_times(run.seconds[WARM_UP:], tokens), "peak_mb": run.peak_mb}
    if run.copies is not None:
        figures |= {"stall": sum(run.stalls[WARM_UP:]) / sum(run.seconds[WARM_UP:]), "waits": run.copies.waits}
    return figures


def head(row: Row, device: torch.device) -> dict[str, Any]:
    """Forward and backward of one implementation of the loss head."""
    tokens, hidden, vocabulary = row["sizes"]
    args = argparse.Namespace(
        device=device.type, dtype="bfloat16", tokens=tokens, hidden=hidden, vocabulary=vocabulary, head=row["head"],
        only=row["name"],
    )  # fmt: skip
    milliseconds, peak = loss_head.measure(args)
    return {"head": row["head"], "ms": float(milliseconds), "peak_mb": float(peak)}


PARTS = {"plan": plan, "step": step, "loss head": head}


def _times(seconds: list[float], tokens: int) -> dict[str, Any]:
    # The mean, not the median: a step's time follows its lowest active block, and tokens a second are of all of them.
    mean = sum(seconds) / len(seconds)
    return {
        "steps": len(seconds),
        "mean_s": mean,
        "median_s": median(seconds),
        "worst_s": max(seconds),
        "tokens_per_second": tokens / mean,
    }


# ---------------------------------------------------------------------- a run of ours


class _Run:
    """A run of a config, with random weights and tokens."""

    def __init__(self, config: dict[str, Any], device: torch.device, steps: int) -> None:
        arguments, optimizer = dict(config["model"]), config["model"]["optimizer"]
        kind = GaLoreAdamW if optimizer["class_path"] == "GaLoreAdamW" else torch.optim.AdamW
        arguments["optimizer"] = lambda groups: kind(groups, **optimizer["init_args"])
        module = _RandomWeights(device, **arguments)
        data, trainer = config["data"], config["trainer"]
        batch = random_batch(BatchShape(data["batch_size"], data["max_seq_length"]), module.vocab_size, seed=0)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, -1] = 0  # padding somewhere, as in plan
        clock = _Clock(module)
        sampling = [LayerwiseSampling(**config["sampling"])] if config["sampling"] is not None else []
        Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, max_steps=steps, **trainer,
            callbacks=[clock, *sampling], logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=arguments["model_name_or_path"],
        ).fit(module, DataLoader([batch] * steps * trainer["accumulate_grad_batches"], batch_size=None))  # fmt: skip
        self.seconds, self.stalls, self.peak_mb, self.copies = clock.seconds, clock.stalls, clock.memory.peak(), module.copies
        module.causal_lm = None
        gc.collect()


class _Clock(Callback):
    """Times optimizer steps, and sets the peak of memory back when training begins."""

    def __init__(self, module: _RandomWeights) -> None:
        self.module = module
        self.memory = memory_of(module.where)
        self.seconds: list[float] = []
        self.stalls: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.memory.release()
        self.memory.reset_peak()
        self._begin()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step > len(self.seconds):
            self.memory.synchronize()
            self.seconds.append(time.perf_counter() - self._start)
            self.stalls.append(self.module.copies.stalled() if self.module.copies is not None else 0.0)
            self._begin()

    def _begin(self) -> None:
        self.memory.synchronize()
        self._start = time.perf_counter()


class _RandomWeights(CausalLMModule):
    """CausalLMModule without a file of weights and without a tokenizer."""

    def __init__(self, device: torch.device, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.where = device
        self.config = AutoConfig.from_pretrained(arguments["model_name_or_path"])
        self.vocab_size = self.config.vocab_size
        self.copies: _TimedCopies | None = None

    def build(self, *_: Any, **__: Any) -> torch.nn.Module:
        """Makes weights on the device, and brings those to the host that are offloaded."""
        waits = self.hparams["frozen_in"] != "device" or self.hparams["frozen_dtype"] is not None
        dtype = DTYPES.get(self._precision, torch.float32)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        blocks = set(decoder_layers(model).modules()) if waits else set()
        for module in model.modules():
            for name, weight in own_parameters(module).items():
                if weight is not None:
                    values = torch.empty_like(weight, device=self.where).normal_(std=0.02)
                    own_parameters(module)[name] = torch.nn.Parameter(values.to("cpu" if module in blocks else self.where))
        model.train()
        return add_lora(model, self.hparams["lora"]) if self.hparams["lora"] is not None else model

    def configure_model(self) -> None:
        """Puts a clock on the offloader's copies."""
        super().configure_model()
        if self.offloader is not None and self.copies is None:
            self.copies = self.offloader._given_stream = _TimedCopies(self.where, self.hparams["window_blocks"])


class _TimedCopies:
    """The device's own copies, and for how long the stream that computes waits for them."""

    def __init__(self, device: torch.device, slots: int) -> None:
        self.device, self.slots = device, slots
        self._stream: CopyStream | None = None
        self._events: list[Any] = []
        self.waits = 0

    @property
    def _inner(self) -> CopyStream:
        if self._stream is None:  # at first use, when the slots have their memory
            self._stream = copy_stream_for(self.device, self.slots)
        return self._stream

    def issue(self, slot: int, fetch: Any) -> None:
        self._inner.issue(slot, fetch)

    def wait(self, slot: int) -> None:
        self.waits += 1
        before = self._mark()
        self._inner.wait(slot)
        self._events.append((before, self._mark()))

    def release(self, slot: int) -> None:
        self._inner.release(slot)

    def after_computation(self) -> None:
        self._inner.after_computation()

    def synchronize(self) -> None:
        self._inner.synchronize()

    def stalled(self) -> float:
        """Seconds that computation waited since the last call; on a CPU nothing overlaps, so nothing waits."""
        events, self._events = self._events, []
        if self.device.type != "cuda":
            return 0.0
        torch.cuda.synchronize(self.device)
        return sum(before.elapsed_time(after) for before, after in events) / 1000

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


if __name__ == "__main__":
    main()
