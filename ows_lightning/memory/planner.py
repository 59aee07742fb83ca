"""``plan``: what a run needs before a GPU is rented, as a table, JSON and a picture, and what makes it fit one."""

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ows_lightning.errors import UsageError, command_line
from ows_lightning.memory.cards import CARDS, UTILISATION, Card, Speed, estimate_speed, find_card
from ows_lightning.memory.flops import FlopCount, count_flops
from ows_lightning.memory.plan_settings import PlanSettings, number_of_devices, settings_from_config
from ows_lightning.memory.prediction import CATEGORIES, CONTEXT_BYTES, METHODS, MemoryPrediction, predict_memory
from ows_lightning.report.plots import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION, figure_and_axes, style_axes

MEMORY_SIZES = (4, 8, 12, 16, 24, 40, 48, 80)
"""Sizes of GPUs in GB of 10^9 bytes."""
# Neighbours in a bar differ in lightness, too.
CATEGORY_COLOURS = dict(zip(CATEGORIES, (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION, "0.6"), strict=True))


@dataclass(frozen=True)
class Plan:
    """What methods need, each under its name; ``ows`` is the config's own."""

    title: str  # what was planned
    methods: dict[str, MemoryPrediction]
    flop_counts: dict[str, FlopCount]
    advice: list[str]  # a sentence for each card that `ows` does not fit
    notes: list[str]  # which cards fit, where the figures come from
    parameters: int  # the model's weights
    card: Card | None  # that speeds are for
    speeds: dict[str, Speed]  # none without a card

    def to_json(self) -> str:
        """Returns one JSON object: method -> what a `MemoryPrediction` has, its FLOPs and, with a card, what a `Speed` has."""
        figures: dict[str, dict[str, Any]] = {}
        for name, needs in self.methods.items():
            computed = self.flop_counts[name]
            figures[name] = {"peak_bytes": needs.peak_bytes, **vars(needs), "flops_per_token": computed.flops_per_token}
            figures[name]["probabilities"] = computed.origin
            if self.card is not None:
                figures[name] |= {"card": self.card.name, "fits": needs.fits(self.card.memory), **vars(self.speeds[name])}
        return json.dumps(figures, indent=2)

    def to_table(self) -> str:
        """Returns a table as text, in GB (10^9 bytes), and the advice below it."""
        needs, computes = list(self.methods.values()), [self.flop_counts[name] for name in self.methods]
        columns = {name.replace("_", " "): [f"{n.bytes[name] / 1e9:.2f}" for n in needs] for name in CATEGORIES}
        columns["peak"] = [f"{n.peak_bytes / 1e9:.2f}" for n in needs]
        columns["fits"] = [next((f"{card} GB" for card in MEMORY_SIZES if n.fits(card)), "none") for n in needs]
        if any(n.host_bytes for n in needs):
            columns["host"] = [f"{n.host_bytes / 1e9:.2f}" for n in needs]
        if any(n.communicated_bytes for n in needs):
            columns["sent a step"] = [f"{n.communicated_bytes / 1e9:.1f}" for n in needs]
        columns["FLOPs/token"] = [f"{one.flops_per_token / self.parameters:.2f} N" for one in computes]
        if (card := self.card) is not None:
            speeds = [f"{self.speeds[name].tokens_per_second:,.0f}" for name in self.methods]
            columns["tokens/s"] = [text if n.fits(card.memory) else "-" for n, text in zip(needs, speeds, strict=True)]
        cells = [[text.rjust(max(map(len, (name, *texts)))) for text in (name, *texts)] for name, texts in columns.items()]
        names = ["GB", *self.methods]
        first = [name.ljust(max(map(len, names))) for name in names]
        return "\n".join([self.title, *map("  ".join, zip(first, *cells, strict=True)), *self.advice, *self.notes])


def plan(settings: PlanSettings, methods: Sequence[str] | None = None, card: str | None = None) -> Plan:
    """Predicts what methods need, all by default, and what would make the settings' own fit the cards that it exceeds.

    Speeds are those on the card, and so is what checkpointing's ``auto`` stands for. It raises a UsageError if there is no
    such method or card, or the model can't be followed.
    """
    if unknown := sorted(set(methods or ()) - METHODS.keys()):
        raise UsageError(f"method: unknown {', '.join(unknown)}; choose from {', '.join(METHODS)}")
    chosen = None if card is None else find_card(card)
    advice, notes = [], []
    runs: dict[str, PlanSettings] = {}
    plans: dict[str, MemoryPrediction] = {}
    for name in methods or METHODS:
        try:
            runs[name] = _with_num_checkpointed(replace(settings, method=METHODS[name](settings)), chosen)
            plans[name] = predict_memory(runs[name])
        except UsageError as error:
            if methods or name == "ows":
                raise
            advice.append(f"{name} is left out: {error}")  # nobody asked for it, and another tool may refuse the model
    if settings.gradient_checkpointing == "auto":
        note = "stands for true; --card says how many blocks recompute on that card"
        if chosen is not None:
            numbers = ", ".join(f"{name} {runs[name].num_checkpointed}" for name in plans)
            note = f"on {chosen.name}, blocks of {settings.num_blocks} that recompute: {numbers}"
        notes.append(f"model.gradient_checkpointing: auto {note}")
    settings = runs.get("ows", settings)
    computes = {name: count_flops(runs[name]) for name in plans}
    if (own := plans.get("ows")) is not None and settings.on_gpu:
        advised = {str(size): advise(settings, size) for size in MEMORY_SIZES if not own.fits(size)}
        advice += [f"{', '.join(sizes)} GB: {words}" for words, sizes in _by_value(advised).items()]
        notes.append(f"Fits as it is: {', '.join(card.name for card in CARDS if own.fits(card.memory)) or 'no card'}")
    notes.append(f"Dimensions: {settings.dimensions}")
    parameters = sum(p.numel() for p in settings.meta_model.parameters())
    origins = _by_value({name: computed.origin for name, computed in computes.items()})
    draws = "; ".join(f"{', '.join(names)}: {origin}" for origin, names in origins.items())
    notes.append(f"FLOPs a token: in expectation over draws ({draws}), N = {parameters / 1e9:.3g}e9 weights")
    speeds = {}
    if chosen is not None:
        speeds = {name: estimate_speed(runs[name], computes[name], chosen) for name in plans}
        rate = f"{chosen.tflops:g} TFLOPS dense bfloat16 ({chosen.source}); tokens/s at {UTILISATION:.0%} of that rate"
        slower = f", and several times fewer in {settings.precision}" if settings.compute_dtype.itemsize > 2 else ""
        notes.append(f"{chosen.name}: {chosen.memory} GB, {chosen.link:g} GB/s to the host, {rate}{slower}")
        if "ows" in speeds:
            notes.append(f"ows: bound by {speeds['ows'].words()}")
    return Plan(settings.title, plans, computes, advice, notes, parameters, chosen, speeds)


def _by_value(words: dict[str, str]) -> dict[str, list[str]]:
    return {value: [key for key in words if words[key] == value] for value in words.values()}


def _with_num_checkpointed(settings: PlanSettings, card: Card | None) -> PlanSettings:
    """``auto`` as a number of blocks: the fewest for us, all or none for other tools, which know nothing between."""
    if settings.gradient_checkpointing != "auto":
        return settings
    if card is not None and settings.method.ours:
        fewest = fewest_checkpointed_blocks(settings, card.memory * 1e9 - CONTEXT_BYTES)
        return replace(settings, gradient_checkpointing=fewest)
    none = replace(settings, gradient_checkpointing=0)
    fits = card is not None and predict_memory(none).fits(card.memory)
    return none if fits else replace(settings, gradient_checkpointing=True)


def plan_from_config(config: Any, method: Sequence[str] | None = None, card: str | None = None) -> Plan:
    """Plans what a parsed config describes, a Namespace or a dict: its ``model``, ``data``, ``trainer`` and ``sampling``."""
    settings = settings_from_config(config)
    made = plan(settings, method, card)
    if number_of_devices(config["trainer"].get("devices") or 1) == 0 and settings.strategy is not None:
        made.notes.append("trainer.devices: auto counts as 1; --trainer.devices N plans what each of N holds")
    changes_or_projects = settings.method.rank is not None or settings.method.activated_layers is not None
    if settings.devices > 1 and settings.strategy is None and changes_or_projects:
        made.notes.append("trainer.strategy: `fit` refuses auto here; write ddp_layerwise or fsdp2")
    return made


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
        fewest = (predict_memory(_with_batch_size(least, 1)).peak_bytes + CONTEXT_BYTES) / 1e9
        if not settings.is_sharded:
            return f"does not fit, takes {fewest:.1f} GB at the least; use several devices with the strategy fsdp2"
        _, changes = list(_cheaper_settings(replace(settings, devices=1, strategy=None)))[-1]
        alone = ", or one and model.frozen_in host" if "model.frozen_in" in changes else ""
        return f"does not fit, takes {fewest:.1f} GB on each device at the least; use more devices{alone}"
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
        yield replace(settings, method=replace(method, activated_layers=count)), changes | {"sampling.activated_layers": count}


def write_config_for_card(config: Any, card: str, folder: Path) -> str:
    """Writes a config that differs from a parsed one by what makes it fit a card, to a file named after the card.

    Returns what was changed and how to start the run, in words; raises a UsageError if nothing makes the run fit.
    """
    chosen, settings = find_card(card, "fit"), settings_from_config(config)
    changes = changes_that_fit(settings, chosen.memory)
    if changes is None:
        raise UsageError(f"fit: on {chosen.name} ({chosen.memory} GB) the run {advise(settings, chosen.memory)}")
    parsed = config.as_dict() if hasattr(config, "as_dict") else dict(config)
    sections = ("seed_everything", "model", "data", "trainer", "sampling", "checkpoint")
    values = json.loads(json.dumps({name: parsed[name] for name in sections if name in parsed}, default=str))  # plain values
    for key, value in changes.items():
        section, name = key.split(".")
        values[section].get("init_args", values[section])[name] = value
    path = folder / f"fit_{chosen.name.lower().replace(' ', '_')}.yaml"
    changed = f"with {_in_words(changes)}" if changes else "as it is"
    written = f"# {settings.model_name} on {chosen.name}: fits {changed}\n{yaml.safe_dump(values, sort_keys=False)}"
    path.write_text(written, encoding="utf-8")
    return f"{chosen.name}: fits {changed}\nWritten: {path}\nNext: {command_line('fit --config', path)}"


def plot_plan(plan: Plan, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Stacked bars of each method's peak memory by category, with lines at the usual sizes of cards."""
    fig, ax = figure_and_axes(ax)
    names = list(plan.methods)
    below = [0.0] * len(names)
    for category in CATEGORIES:
        sizes = [method.bytes[category] / 1e9 for method in plan.methods.values()]
        ax.bar(names, sizes, bottom=below, color=CATEGORY_COLOURS[category], label=category.replace("_", " "), width=0.7)
        below = [low + size for low, size in zip(below, sizes, strict=True)]
    for name, top in zip(names, below, strict=True):
        ax.annotate(f"{top:.1f}", (name, top), xytext=(0, 2), textcoords="offset points", ha="center", fontsize="small")
    # Up to the next card's line, if it is not far off: how much is missing is what one wants to see.
    height = 1.08 * max(below)
    height = max(height, next((1.02 * card for card in MEMORY_SIZES if max(below) <= card < 1.4 * max(below)), 0.0))
    ax.set_ylim(0, height)
    for card in (card for card in MEMORY_SIZES if card < height):
        ax.axhline(card, color="0.35", linestyle=":", linewidth=1, zorder=0)
        place = ax.get_yaxis_transform()  # x in shares of the axes, y in GB
        ax.text(1.01, card, f"{card} GB", transform=place, va="center", fontsize="small", color="0.35")
    style_axes(ax, "", "", "peak memory (GB)", grid=False)
    ax.set_title(plan.title, loc="left", fontsize="medium", fontweight="bold", pad=34)
    above: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": len(CATEGORIES), "frameon": False}
    ax.legend(fontsize="small", columnspacing=1, handlelength=1, borderaxespad=0.2, **above)
    return fig, ax
