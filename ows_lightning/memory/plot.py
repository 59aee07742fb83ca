"""A plan as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ows_lightning.memory.planner import CARDS, Plan
from ows_lightning.memory.prediction import CATEGORIES
from ows_lightning.report.plots import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Neighbours in a bar differ in lightness, too.
COLOURS = dict(zip(CATEGORIES, (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION, "0.6"), strict=True))


def plot_plan(plan: Plan, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Stacked bars of each method's peak memory by category, with lines at the usual sizes of cards.

    Args:
        plan: What methods need.
        ax: Axes to draw on; new ones by default.
    """
    if ax is None:
        # Not pyplot: it keeps every figure, and picks a window system where there is one.
        from matplotlib.figure import Figure

        fig = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
        ax = fig.add_subplot()
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
    height = next((1.02 * card for card in CARDS if max(below) <= card < 1.4 * max(below)), height)
    ax.set_ylim(0, max(height, 1.08 * max(below)))
    for card in (card for card in CARDS if card < height):
        ax.axhline(card, color="0.35", linestyle=":", linewidth=1, zorder=0)
        ax.annotate(
            f"{card} GB",
            (1, card),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
            color="0.35",
        )
    ax.set_title(plan.title, loc="left", fontsize="medium", fontweight="bold", pad=34)
    ax.set_ylabel("peak memory (GB)")
    ax.tick_params(labelsize="small")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(
        fontsize="small",
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(CATEGORIES),
        frameon=False,
        columnspacing=1,
        handlelength=1,
        borderaxespad=0.2,
    )
    return ax.get_figure(root=True), ax  # type: ignore[return-value]
