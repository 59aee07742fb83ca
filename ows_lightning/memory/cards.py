"""GPUs: what they hold, how fast they compute and are fed; and what makes a run fit one."""

import csv
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import yaml
from torch import Tensor

from ows_lightning.errors import UsageError, command_line, did_you_mean
from ows_lightning.memory.plan_settings import PlanSettings, settings_from_config
from ows_lightning.memory.prediction import CONTEXT_BYTES, predict_memory

LINK_SHARE = 0.8
"""Share of its link's rate that a large copy from page-locked memory reaches: usually 25 of PCIe 4.0 x16's 31.5 GB/s."""


class Card(NamedTuple):
    """A GPU."""

    name: str  # as people call it
    memory: int  # GB, of 10^9 bytes
    link: float  # GB/s to the host, each way, by the link's specification: PCIe 4.0 has 1.97 a lane, 5.0 has 3.94
    tflops: float  # dense bfloat16 matrix products that are summed up in float32, in 10^12 FLOPs a second
    source: str  # of the last figure


_, *_rows = csv.reader(Path(__file__).with_name("cards.csv").read_text(encoding="utf-8").splitlines())
CARDS = tuple(Card(name, int(memory), float(link), float(tflops), source) for name, memory, link, tflops, source in _rows)
"""By memory. A card's nominal GB are counted as 10^9 bytes; most give 5 % more, an L4, A10 or L40S up to 2 % less."""

_SECTIONS = ("seed_everything", "model", "data", "trainer", "sampling", "checkpoint")
_MAKERS = {"nvidia", "geforce", "tesla", "rtx", "gpu", "generation"}
_FORM_FACTORS = {"sxm", "sxm2", "sxm4", "sxm5", "pcie", "nvl", "hbm2", "hbm2e", "hbm3", "hbm3e"}


def find_card(name: str, key: str = "card") -> Card:
    """Returns the card of a name as people, shops or ``nvidia-smi`` write it: ``rtx4090``, ``NVIDIA A100-SXM4-80GB``.

    It raises a UsageError, which begins with the key that gave the name, if there is none in `CARDS` or there are several.
    """
    whole, memory = _name_and_memory(name)
    model, _ = _name_and_memory(name, _MAKERS | _FORM_FACTORS)
    names = {card: _name_and_memory(card.name)[0] for card in CARDS}
    # The form counts if there is such a card: it tells an H100 PCIe from the others.
    found = [card for card in CARDS if names[card] == (whole if whole in names.values() else model)]
    fitting = [card for card in found if memory in (None, card.memory)]
    if len(fitting) == 1:
        return fitting[0]
    if candidates := [f"'{card.name}' ({card.memory} GB)" for card in fitting or found]:
        raise UsageError(f"{key}: '{name}' is no card that is known; did you mean {' or '.join(candidates)}?")
    known = [card.name for card in CARDS]
    raise UsageError(f"{key}: unknown card '{name}'{did_you_mean(name.upper(), known) or ';'} Known: {', '.join(known)}")


def _name_and_memory(name: str, left_out: set[str] = _MAKERS) -> tuple[str, int | None]:
    """A name in small letters, joined, without some words; and the memory that it says, in GB."""
    text = name.lower().replace("rtx", "rtx ")
    memory = re.search(r"(?<![^\W_])(\d+)\s*gi?b?\b", text)
    rest = text if memory is None else text[: memory.start()] + text[memory.end() :]
    return "".join(word for word in re.findall(r"[a-z0-9]+", rest) if word not in left_out), memory and int(memory[1])


def available_bytes(device: torch.device, weights: Iterable[Tensor] = (), processes: int = 1) -> int:
    """Bytes that are free on a GPU or reserved by torch; on a CPU a process's share, with the ``weights`` there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available // processes + sum(p.nbytes for p in weights if p.device.type == device.type)


def fewest_checkpointed_blocks(settings: PlanSettings, budget: float) -> int:
    """Returns the fewest blocks, from the lowest up, that must recompute for a run to fit ``budget`` bytes; all if none do."""

    def fits(number: int) -> bool:
        return predict_memory(replace(settings, gradient_checkpointing=number)).peak_bytes <= budget

    return 0 if fits(0) else bisect_left(range(settings.num_blocks), True, lo=1, key=fits)


def advise(settings: PlanSettings, gigabytes: int) -> str:
    """Says in a sentence what would make a run fit a card of so many ``gigabytes``, or that nothing does."""
    changes = changes_that_fit(settings, gigabytes)
    if changes is None:
        least, _ = list(_cheaper_settings(settings))[-1]
        more = "more devices" if settings.is_sharded else "several devices with the strategy fsdp2"
        fewest = (predict_memory(_with_batch_size(least, 1)).peak_bytes + CONTEXT_BYTES) / 1e9
        return f"does not fit, takes {fewest:.1f} GB at the least; use {more}"
    return f"fits with {_in_words(changes)}" if changes else "fits"


def changes_that_fit(settings: PlanSettings, gigabytes: int) -> dict[str, Any] | None:
    """Returns the keys of a config, dotted, whose new values make a run fit: the mildest change, with the largest batches."""
    milder = list(_cheaper_settings(settings))
    if not predict_memory(_with_batch_size(milder[-1][0], 1)).fits(gigabytes):
        return None
    sizes = [size for size in range(settings.batch_size, 0, -1) if settings.batch_size % size == 0]

    def fitting(changed: PlanSettings) -> list[int]:
        whole = not changed.offloads and changed.devices == 1
        if whole and sum(p.nbytes for p in changed.meta_model.parameters()) > gigabytes * 1e9:  # no step is to be followed
            return []
        smallest = bisect_left(sizes, True, key=lambda size: predict_memory(_with_batch_size(changed, size)).fits(gigabytes))
        return sizes[smallest:]

    best, changes = next((_with_batch_size(changed, size), keys) for changed, keys in milder for size in fitting(changed))
    if best.batch_size == settings.batch_size:
        return changes
    return {"data.batch_size": best.batch_size, "trainer.accumulate_grad_batches": best.accumulate_grad_batches, **changes}


def _in_words(changes: dict[str, Any]) -> str:
    *others, last = [f"{key} {json.dumps(value)}".replace('"', "") for key, value in changes.items()]
    return f"{', '.join(others)} and {last}" if others else last


def _with_batch_size(settings: PlanSettings, size: int) -> PlanSettings:
    """The same rows in a step, in smaller micro-batches."""
    times = settings.batch_size // size
    return replace(settings, batch_size=size, accumulate_grad_batches=settings.accumulate_grad_batches * times)


def _cheaper_settings(settings: PlanSettings) -> Iterator[tuple[PlanSettings, dict[str, Any]]]:
    """Yields settings that need less and less, each with the keys that differ."""
    method, count = settings.method, settings.method.activated_layers
    alone = settings.devices == 1 and settings.strategy is None  # others are refused with offloaded blocks
    offload = alone and (count is not None or method.lora is not None) and settings.frozen_in == "device"
    recompute = settings.num_checkpointed < settings.num_blocks and bool(settings.meta_model.supports_gradient_checkpointing)
    changes: dict[str, Any] = {}
    yield settings, {}
    milder: list[tuple[bool, str, Any]] = [
        (recompute, "model.gradient_checkpointing", True),
        (settings.dtype == torch.float32, "trainer.precision", "bf16-true"),
        (offload, "model.frozen_in", "host"),
    ]
    for needed, key, value in milder:
        if needed:
            settings = replace(settings, **{key.partition(".")[2]: value})
            changes[key] = value
            yield settings, dict(changes)
    if count is None:
        return
    if set(method.always_train) - {"norm"}:
        method = replace(method, always_train=("norm",))
        changes["sampling.always_train"] = ["norm"]
        yield replace(settings, method=method), dict(changes)
    while (count := count // 2) > 0:
        fewer = replace(settings, method=replace(method, activated_layers=count))
        yield fewer, {**changes, "sampling.activated_layers": count}


def write_config_for_card(config: Any, card: str, folder: Path) -> str:
    """Writes a config that differs from a parsed one by what makes it fit a card, to a file named after the card.

    Returns what was changed and how to start the run, in words; raises a UsageError if nothing makes the run fit.
    """
    chosen, settings = find_card(card, "fit"), settings_from_config(config)
    changes = changes_that_fit(settings, chosen.memory)
    if changes is None:
        raise UsageError(f"fit: on {chosen.name} ({chosen.memory} GB) the run {advise(settings, chosen.memory)}")
    parsed = config.as_dict() if hasattr(config, "as_dict") else dict(config)
    values = json.loads(json.dumps({name: parsed[name] for name in _SECTIONS if name in parsed}, default=str))  # plain values
    for key, value in changes.items():
        section, name = key.split(".")
        values[section].get("init_args", values[section])[name] = value
    path = folder / f"fit_{chosen.name.lower().replace(' ', '_')}.yaml"
    changed = f"with {_in_words(changes)}" if changes else "as it is"
    written = f"# {settings.model_name} on {chosen.name}: fits {changed}\n{yaml.safe_dump(values, sort_keys=False)}"
    path.write_text(written, encoding="utf-8")
    return f"{chosen.name}: fits {changed}\nWritten: {path}\nNext: {command_line('fit --config', path)}"
