"""``plan``: what a run needs before it is started, and before a GPU is rented; as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ows_lightning.errors import UsageError
from ows_lightning.memory.cards import CARDS, Card, advise, fewest_checkpointed_blocks, find_card
from ows_lightning.memory.flops import UTILISATION, FlopCount, Speed, count_flops, estimate_speed
from ows_lightning.memory.plan_settings import PlanSettings, number_of_devices, settings_from_config
from ows_lightning.memory.prediction import CATEGORIES, CONTEXT_BYTES, METHODS, MemoryPrediction, predict_memory
from ows_lightning.report.plots import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION, figure_and_axes, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MEMORY_SIZES = (4, 8, 12, 16, 24, 40, 48, 80)
"""Sizes of GPUs in GB of 10^9 bytes."""


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
            figures[name]["probabilities"] = computed.probabilities
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
    origins = _by_value({name: computed.probabilities for name, computed in computes.items()})
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


# Neighbours in a bar differ in lightness, too.
COLOURS = dict(zip(CATEGORIES, (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION, "0.6"), strict=True))


def plot_plan(plan: Plan, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Stacked bars of each method's peak memory by category, with lines at the usual sizes of cards."""
    fig, ax = figure_and_axes(ax)
    names = list(plan.methods)
    below = [0.0] * len(names)
    for category in CATEGORIES:
        sizes = [method.bytes[category] / 1e9 for method in plan.methods.values()]
        ax.bar(names, sizes, bottom=below, color=COLOURS[category], label=category.replace("_", " "), width=0.7)
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
    style_axes(ax, plan.title, "", "peak memory (GB)", grid=False)
    ax.set_title(plan.title, loc="left", fontsize="medium", fontweight="bold", pad=34)
    above: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": len(CATEGORIES), "frameon": False}
    ax.legend(fontsize="small", columnspacing=1, handlelength=1, borderaxespad=0.2, **above)
    return fig, ax
