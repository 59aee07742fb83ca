"""``plan``: what a run needs before it is started, and before a GPU is rented."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ows_lightning.errors import UsageError
from ows_lightning.memory.advice import advise
from ows_lightning.memory.prediction import CATEGORIES, METHODS, MethodPlan, predict
from ows_lightning.memory.settings import PlanSettings, settings_from_config

CARDS = (12, 16, 24, 40, 48, 80)
"""Sizes of GPUs in GB of 10^9 bytes. A 24 GB card has some 7 % more; CUDA's own context and fragmentation take that."""


@dataclass(frozen=True)
class Plan:
    """What methods need, and what would make the first one fit where it does not.

    Attributes:
        title: What was planned.
        methods: Method -> what it needs; ``ows`` is the config's own.
        advice: A sentence for each card that ``ows`` does not fit.
        dimensions: Where the model's dimensions come from.
    """

    title: str
    methods: dict[str, MethodPlan]
    advice: list[str]
    dimensions: str = ""

    def to_json(self) -> str:
        """Returns one JSON object: method -> ``peak_bytes``, ``bytes`` by category, and ``communicated_bytes``."""
        return json.dumps(
            {
                name: {"peak_bytes": plan.peak_bytes, "bytes": plan.bytes, "communicated_bytes": plan.communicated_bytes}
                for name, plan in self.methods.items()
            },
            indent=2,
        )

    def to_table(self) -> str:
        """Returns a table as text, in GB (10^9 bytes), and the advice below it."""
        communicates = any(plan.communicated_bytes for plan in self.methods.values())
        columns = [*(name.replace("_", " ") for name in CATEGORIES), "peak", "fits"] + ["sent a step"] * communicates
        lines = [["GB", *columns]]
        for name, plan in self.methods.items():
            sizes = [f"{plan.bytes[category] / 1e9:.2f}" for category in CATEGORIES]
            smallest = next((f"{card} GB" for card in CARDS if plan.fits(card)), "none")
            sent = [f"{plan.communicated_bytes / 1e9:.1f}"] * communicates
            lines.append([name, *sizes, f"{plan.peak_bytes / 1e9:.2f}", smallest, *sent])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = [
            "  ".join(
                [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
            )
            for line in lines
        ]
        return "\n".join([self.title, *rows, *self.advice, f"Dimensions: {self.dimensions}"])


def plan(settings: PlanSettings, methods: Sequence[str] | None = None) -> Plan:
    """Predicts what methods need, and what would make the settings' own fit the cards that it does not.

    Args:
        settings: The model, what it is trained on, and how.
        methods: Names out of `METHODS`; all by default.

    Raises:
        UsageError: There is no such method, or the model can't be followed.
    """
    if unknown := sorted(set(methods or ()) - METHODS.keys()):
        raise UsageError(f"method: unknown {', '.join(unknown)}; choose from {', '.join(METHODS)}")
    advice = []
    if methods is None:
        methods = list(METHODS)
        if find_spec("peft") is None:
            methods.remove("lora")
            advice.append('LoRA is left out: it needs peft (pip install "ows_lightning[lora]")')
    plans = {name: predict(settings, METHODS[name](settings)) for name in methods}
    if (own := plans.get("ows")) is not None and settings.on_gpu:
        known = {settings: own}

        def remembered(changed: PlanSettings) -> MethodPlan:
            if changed not in known:
                known[changed] = predict(changed)
            return known[changed]

        cards: dict[str, list[str]] = {}
        for card in CARDS:
            if not own.fits(card):
                cards.setdefault(advise(settings, card, remembered), []).append(str(card))
        advice += [f"{', '.join(sizes)} GB: {sentence}" for sentence, sizes in cards.items()]
    return Plan(settings.title, plans, advice, settings.dimensions)


def plan_from_config(config: Any, method: Sequence[str] | None = None) -> Plan:
    """Plans what a parsed config of the command line describes.

    Args:
        config: A jsonargparse Namespace or a dict with the keys ``model``, ``data``, ``trainer`` and ``sampling``.
        method: Names of methods; all by default.

    Raises:
        UsageError: A setting can't be planned with.
    """
    return plan(settings_from_config(config), method)
