"""Measures rows one after the other: ``python -m benchmarks.gpu.measure DEVICE < ROWS``, a line of JSON in and out for each.

Random weights of the right shapes stand for a model: neither time nor memory depends on their values.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any
from unittest import mock

import torch
from accelerate import init_empty_weights
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import loss_head
from benchmarks.gpu.settings import ASLEEP, WARM_UP, Row
from benchmarks.memory import MB, memory_of
from benchmarks.models import BatchShape, random_batch
from benchmarks.worker import measure as measure_peer
from ows_lightning.compat import own_parameters
from ows_lightning.memory.plan_settings import settings_from_config
from ows_lightning.memory.prediction import predict_memory
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.lora import add_lora
from ows_lightning.module import DTYPES, CausalLMModule
from ows_lightning.offload import int8, offloader
from ows_lightning.offload.streams import CopyStream, copy_stream_for
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.sampling.callback import LayerwiseSampling


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
    predicted = predict_memory(settings_from_config(row["config"]))
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
    run = _Run(config, device, WARM_UP + interval * row["draws"], seconds=row["limit"] / 2)
    tokens = config["data"]["batch_size"] * config["data"]["max_seq_length"] * config["trainer"]["accumulate_grad_batches"]
    seconds, stalled, copied = (each[WARM_UP:] for each in (run.clock.seconds, run.clock.stalls, run.clock.copying))
    figures = {**_times(seconds, tokens), "peak_mb": run.peak_mb, "watts": run.watts}
    if run.copies is not None:
        figures |= {"stall": sum(stalled) / sum(seconds), "waits": run.copies.waits}
        figures["hidden"] = 1 - sum(stalled) / sum(copied) if sum(copied) else None
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


def waits(row: Row, device: torch.device) -> dict[str, Any]:
    """How often the process waits for the device in a micro-batch, a step, and a step with a draw; never for a CPU."""
    interval = row["config"]["sampling"]["interval_steps"]
    counted = _CountedWaits(device, interval)
    _Run(row["config"], device, WARM_UP + 3 * interval, callbacks=[counted])
    return {kind: max(counts, default=None) for kind, counts in counted.counts.items()}


def adversarial(row: Row, device: torch.device) -> dict[str, Any]:
    """Whether a run ends with the same weights, to the bit, where one side of the streams sleeps before it does its part."""
    first, *others = (_Run(row["config"], device, steps=9, asleep=asleep).checksums for asleep in ("nothing", *ASLEEP))
    return {asleep: weights == first for asleep, weights in zip(ASLEEP, others, strict=True)}


PARTS = {"plan": plan, "step": step, "loss head": head, "waits": waits, "adversarial": adversarial}
SLEEP = 20_000_000  # cycles: more than 10 ms


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
    """A run of a config, with random weights and tokens, the same ones each time.

    Args:
        config: As the command line parses it.
        device: Where it runs.
        steps: Optimizer steps.
        seconds: No further interval is begun after these: a slow card has fewer draws, not none.
        asleep: What sleeps, one of `ASLEEP`; the weights' checksums are taken.
        callbacks: Further ones.
    """

    def __init__(
        self,
        config: dict[str, Any],
        device: torch.device,
        steps: int,
        seconds: float = 1e9,
        asleep: str | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        torch.manual_seed(0)
        arguments, optimizer = dict(config["model"]), config["model"]["optimizer"]
        kind = GaLoreAdamW if optimizer["class_path"] == "GaLoreAdamW" else torch.optim.AdamW
        arguments["optimizer"] = lambda groups: kind(groups, **optimizer["init_args"])
        module = _RandomWeights(device, asleep, **arguments)
        data, trainer = config["data"], config["trainer"]
        batch = random_batch(BatchShape(data["batch_size"], data["max_seq_length"]), module.vocab_size, seed=0)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, -1] = 0  # padding somewhere, as in plan
        self.clock = _Clock(module, seconds)
        sampling = [LayerwiseSampling(**config["sampling"])] if config["sampling"] is not None else []
        runs = Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, max_steps=steps, **trainer,
            callbacks=[self.clock, *callbacks, *sampling], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            default_root_dir=arguments["model_name_or_path"],
        )  # fmt: skip
        pack = after_sleep(int8.quantize, device) if asleep == "packing" else int8.quantize
        with _Power(device) as power, mock.patch.object(int8, "quantize", pack):
            runs.fit(module, DataLoader([batch] * steps * trainer["accumulate_grad_batches"], batch_size=None))
        self.peak_mb, self.copies = self.clock.memory.peak(), module.copies
        self.watts = power.mean(since=self.clock.warm_at)
        if asleep is not None:
            weights = (p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for p in module.parameters())
            self.checksums = [zlib.crc32(weight) for weight in weights]
        module.causal_lm = None
        gc.collect()


def after_sleep(act: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Lets the device sleep on the stream that is current before something is launched there; a CPU has nothing to let."""

    def slowly(*args: Any) -> Any:
        if device.type == "cuda":
            torch.cuda._sleep(SLEEP)
        return act(*args)

    return slowly


class _Clock(Callback):
    """Times optimizer steps, and sets the peak of memory back when training begins."""

    def __init__(self, module: _RandomWeights, limit: float) -> None:
        self.module, self.limit = module, limit
        self.memory = memory_of(module.where)
        self.seconds: list[float] = []
        self.stalls: list[float] = []
        self.copying: list[float] = []
        self.warm_at = float("inf")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.memory.release()
        self.memory.reset_peak()
        self._begin()
        self._began = self._start

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step > len(self.seconds):
            self.memory.synchronize()
            self.seconds.append(time.perf_counter() - self._start)
            stalled, copied = self.module.copies.seconds() if self.module.copies is not None else (0.0, 0.0)
            self.stalls.append(stalled)
            self.copying.append(copied)
            self._begin()
            if len(self.seconds) == WARM_UP:
                self.warm_at = self._start
            whole = len(self.seconds) > WARM_UP and len(self.seconds) % WARM_UP == 0  # an interval has as many steps
            trainer.should_stop |= whole and self._start - self._began > self.limit

    def _begin(self) -> None:
        self.memory.synchronize()
        self._start = time.perf_counter()


class _CountedWaits(Callback):
    """Counts how often the process waits for the device, where torch's debug mode sees it.

    Attributes:
        counts: By what a batch is: ``micro-batch`` (no step ends it), ``step``, or ``draw`` (the first step of an interval).
    """

    def __init__(self, device: torch.device, interval: int) -> None:
        self.device, self.interval = device, interval
        self.counts: dict[str, list[int]] = {"micro-batch": [], "step": [], "draw": []}
        self._seen = contextlib.ExitStack()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._step = trainer.global_step
        self._messages = self._seen.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        self._seen.close()
        kind = "step" if self._step % self.interval else "draw"
        kind = "micro-batch" if trainer.global_step == self._step else kind
        if self._step >= WARM_UP:
            self.counts[kind].append(sum("synchronizing CUDA operation" in str(each.message) for each in self._messages))


class _Power:
    """Reads the card's power every fifth of a second, if the driver tells it."""

    def __init__(self, device: torch.device) -> None:
        self.readings: list[tuple[float, float]] = []  # when (`perf_counter`), watts
        self._process: subprocess.Popen[str] | None = None
        if device.type == "cuda":
            card = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            query = ["nvidia-smi", "-i", card, "--query-gpu=power.draw", "--format=csv,noheader,nounits", "-lms", "200"]
            with contextlib.suppress(OSError):
                self._process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def __enter__(self) -> _Power:
        if self._process is not None:
            threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _read(self, lines: Iterable[str]) -> None:
        for line in lines:
            with contextlib.suppress(ValueError):  # such as "[N/A]"
                self.readings.append((time.perf_counter(), float(line)))

    def mean(self, since: float) -> float | None:
        """The mean in watts from some time on, None if nothing was told."""
        watts = [watts for when, watts in self.readings if when >= since]
        return sum(watts) / len(watts) if watts else None


class _RandomWeights(CausalLMModule):
    """CausalLMModule without a file of weights and without a tokenizer."""

    def __init__(self, device: torch.device, asleep: str | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.where, self.asleep = device, asleep
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
        """Puts a clock on the offloader's copies, and sleep where it is asked for."""
        super().configure_model()
        if self.offloader is not None and self.copies is None:
            self.copies = _TimedCopies(self.where, self.asleep)
            offloader.copy_stream_for = self.copies.around


class _TimedCopies(CopyStream):
    """The device's own copies, how long they take, and for how long the stream that computes waits for them."""

    def __init__(self, device: torch.device, asleep: str | None) -> None:
        self.device, self.asleep = device, asleep
        self._waited: list[Any] = []
        self._copied: list[Any] = []
        self.waits = 0

    def around(self, device: torch.device, num_slots: int, reads_files: bool = False) -> CopyStream:
        """Takes the place of ``copy_stream_for``."""
        self._inner = copy_stream_for(device, num_slots, reads_files)
        return self

    def issue(self, slot: int, fetch: Callable[[], None]) -> None:
        def timed() -> None:
            before = self._mark()
            fetch()
            self._copied.append((before, self._mark()))

        self._inner.issue(slot, after_sleep(timed, self.device) if self.asleep == "fetch" else timed)

    def wait(self, slot: int) -> None:
        self.waits += 1
        before = self._mark()
        self._inner.wait(slot)
        self._waited.append((before, self._mark()))
        if self.asleep == "computation":
            after_sleep(len, self.device)("")

    def release(self, slot: int) -> None:
        self._inner.release(slot)

    def wait_for_computation(self) -> None:
        self._inner.wait_for_computation()

    def synchronize(self) -> None:
        self._inner.synchronize()

    def seconds(self) -> tuple[float, float]:
        """Seconds that computation waited, and that copies took, since the last call; both 0 on a CPU."""
        if self.device.type == "cuda":
            self._inner.synchronize()  # a thread that reads files has noted its copies by then
            torch.cuda.synchronize(self.device)
        waited, self._waited, copied, self._copied = self._waited, [], self._copied, []
        if self.device.type != "cuda":
            return 0.0, 0.0
        stalled, copying = (sum(a.elapsed_time(b) for a, b in events) / 1000 for events in (waited, copied))
        return stalled, copying

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


if __name__ == "__main__":
    main()
