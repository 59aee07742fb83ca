"""A report as one HTML page that needs nothing beside it: no script, no network, pictures inlined."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

STYLE = """
:root { color-scheme: light dark; --line: #d5dbe1; --soft: #5b6670; --back: #fff; --text: #1b2127; --head: #f3f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a444d; --soft: #a3afb9; --back: #14181c; --text: #e4e9ed; --head: #1e252b }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  background: var(--back); color: var(--text) }
h1 { font-size: 1.6rem } h2 { font-size: 1.25rem; margin-top: 2.5rem; overflow-wrap: anywhere }
p, figcaption { color: var(--soft) }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th { background: var(--head); font-weight: 600 }
.runs { font-size: .8125rem }
.runs td:nth-child(n+5) { white-space: nowrap }
.runs td:nth-child(n+2):nth-child(-n+4) { min-width: 7rem }
.texts td { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 10rem }
figure { margin: 1.5rem 0; max-width: 56rem }
img { width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px }
figcaption { font-size: .875rem }
pre { overflow-x: auto; padding: 1rem; background: var(--head); border-radius: 6px; font-size: .8rem }
""".strip()

# The page may load nothing at all: its pictures are in it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

LABELS = {
    "run": "Run",
    "model": "Model",
    "sampling": "Sampling",
    "optimizer": "Optimizer",
    "steps": "Steps",
    "final_val_loss": "Final held-out loss",
    "best_val_loss": "Best held-out loss",
    "val_exact_match": "Held-out exact match",
    "tokens": "Training tokens",
    "time_s": "Time (h:mm:ss)",
    "median_tokens_per_second": "Tokens/s, median",
    "peak_memory_mb": "Peak memory",
    "blocks_never_trained": "Blocks never trained",
}

UNKNOWN = "n/a"


@dataclass(frozen=True)
class Shown:
    """A picture on the page: its PNG file, its caption, and its text for those who can't see it."""

    png: Path
    caption: str
    alt: str


@dataclass(frozen=True)
class Section:
    """A heading with pictures or a table of texts under it, and optionally a run's settings as text."""

    title: str
    pictures: Sequence[Shown] = ()
    settings: str | None = None
    table: Mapping[str, Sequence[str]] | None = None


def render(title: str, figures: Sequence[dict[str, Any]], sections: Sequence[Section], refresh: int | None = None) -> str:
    """The page as text.

    Args:
        title: Title and main heading.
        figures: Key figures of each run, as ``key_figures`` returns them.
        sections: What follows the table.
        refresh: Seconds after which a browser asks for the page again; None for a page that stays.
    """
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        *([] if refresh is None else [f'<meta http-equiv="refresh" content="{refresh}">']),
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{STYLE}\n</style>",
        "</head>",
        "<body>",
        "<main>",
        f"<h1>{escape(title)}</h1>",
        *([_figures(figures)] if figures else []),
        *(_section(section) for section in sections),
        "</main>",
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _figures(figures: Sequence[dict[str, Any]]) -> str:
    where = 'The numbers behind each picture lie beside this page as CSV; those of the table are in <a href="key_figures.csv">'
    return f"{_table(figures)}\n<p>{where}key_figures.csv</a>.</p>"


def _table(figures: Sequence[dict[str, Any]]) -> str:
    """One run as a list of names and values, several as a row each."""
    alone = len(figures) == 1
    rows = [{label: escape(_shown(key, run, alone)) for key, label in LABELS.items()} for run in figures]
    if alone:
        kind = "run"
        lines = [f'<tr><th scope="row">{label}</th><td>{cell}</td></tr>' for label, cell in rows[0].items() if cell != UNKNOWN]
    else:
        kind = "runs"
        columns = [label for label in LABELS.values() if any(row[label] != UNKNOWN for row in rows)]
        lines = ["<tr>" + "".join(f'<th scope="col">{label}</th>' for label in columns) + "</tr>"]
        lines += ["<tr>" + "".join(f"<td>{row[label]}</td>" for label in columns) + "</tr>" for row in rows]
    return f'<div class="wide"><table class="{kind}">\n' + "\n".join(lines) + "\n</table></div>"


def _section(section: Section) -> str:
    parts = [f"<section>\n<h2>{escape(section.title)}</h2>"]
    for picture in section.pictures:
        data = base64.b64encode(picture.png.read_bytes()).decode("ascii")
        numbers = escape(picture.png.with_suffix(".csv").name)
        parts.append(
            f'<figure>\n<img alt="{escape(picture.alt)}" src="data:image/png;base64,{data}">\n'
            f'<figcaption>{escape(picture.caption)} Numbers: <a href="{numbers}">{numbers}</a></figcaption>\n</figure>'
        )
    if section.table:
        parts.append(_texts(section.table))
    if section.settings:
        parts.append(f"<details>\n<summary>All settings</summary>\n<pre>{escape(section.settings)}</pre>\n</details>")
    return "\n".join([*parts, "</section>"])


def _texts(table: Mapping[str, Sequence[str]]) -> str:
    """Columns of texts; line breaks in them are kept."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table)
    rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in zip(*table.values(), strict=True))
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table class="texts">\n<tr>{head}</tr>\n{body}\n</table></div>'


def _shown(key: str, row: dict[str, Any], every_block: bool) -> str:
    """A key figure as a reader wants it, with its unit; ``every_block`` names the blocks and not only their number."""
    value = row[key]
    if value is None:
        return UNKNOWN
    if key == "blocks_never_trained":
        blocks = value.split()
        return f"{len(blocks)} of {row['num_layers']}" + (f": {', '.join(blocks)}" if blocks and every_block else "")
    if key == "model":
        return "/".join(value.split("/")[-2:])
    if key in ("final_val_loss", "best_val_loss"):
        return f"{value:.4f}"
    if key == "val_exact_match":
        return f"{100 * value:.1f} %"
    if key == "time_s":
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
    if key == "peak_memory_mb":
        return f"{value:,.0f} MB"
    return value if isinstance(value, str) else f"{value:,.0f}"
