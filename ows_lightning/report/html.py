"""A report as one HTML page, made of ``page.html``, that needs nothing beside it: no script, no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment

from ows_lightning.report.tables import LABELS, UNKNOWN, formatted

# The page may load nothing at all: its pictures are in it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class ShownPicture:
    """A picture on the page: its PNG file, its caption, and its text for those who can't see it."""

    png: Path
    caption: str
    alt: str


@dataclass(frozen=True)
class Section:
    """A heading with pictures or a table of texts under it, and optionally a run's settings as text."""

    title: str
    pictures: Sequence[ShownPicture] = ()
    settings: str | None = None
    table: Mapping[str, Sequence[str]] | None = None


def render(
    title: str,
    figures: Sequence[dict[str, Any]] = (),
    sections: Sequence[Section] = (),
    refresh: int | None = None,
    note: str | None = None,
) -> str:
    """The page as text.

    Args:
        title: Title and main heading.
        figures: Key figures of each run, as ``key_figures`` returns them: one run as a list, several as a row each.
        sections: What follows the table.
        refresh: Seconds after which a browser asks for the page again; None for a page that stays.
        note: A sentence below the heading.
    """
    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters |= {
        "base64": lambda content: base64.b64encode(content).decode(),
        "transpose": lambda columns: zip(*columns, strict=True),
    }
    rows = [{label: formatted(key, run, len(figures) == 1) for key, label in LABELS.items()} for run in figures]
    labels = [label for label in LABELS.values() if any(row[label] != UNKNOWN for row in rows)]
    values = {"title": title, "figures": rows, "labels": labels, "sections": sections, "refresh": refresh, "note": note}
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(values, policy=POLICY)
