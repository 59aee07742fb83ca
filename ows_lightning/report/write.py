"""Draws runs: pictures into a run's own folder, or a report of one or several, whose page needs nothing beside it."""

import base64
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import Environment

from ows_lightning.errors import UsageError, refuse_url
from ows_lightning.report import plots, tables
from ows_lightning.report.run import CONFIG_FILE, RunRecord, is_run_folder
from ows_lightning.report.tables import LABELS, UNKNOWN, formatted, key_figures

Dicts: TypeAlias = Sequence[dict[str, Any]]
# The page may load nothing at all: its pictures are in it, and there is no script.
CONTENT_SECURITY_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Picture:
    """A picture and the table behind it: of one run, or of a list of runs for those of ``COMPARISONS``."""

    name: str
    caption: str
    plot: Callable[[Any], Any]
    table: Callable[[Any], tables.Table]

    def draw(self, subject: RunRecord | list[RunRecord], path: Path) -> Path | None:
        """Draws it, or nothing where the runs have no data for it."""
        if not any(self.table(subject).values()):
            return None
        figure, _ = self.plot(subject)
        figure.savefig(path, metadata={"Software": None})
        return path


def _loss(name: str, by: str, x: tables.XAxis) -> Picture:
    return Picture(name, f"Loss by {by}.", partial(plots.plot_loss, x=x), partial(tables.loss_table, x=x))


_MEMORY_CAPTION = "Most memory held up to each optimizer step."
_SPEED_CAPTION = "Tokens per second by optimizer step."
COMPARISONS = (
    _loss("loss", "optimizer step", "step"),
    _loss("loss_by_tokens", "training tokens seen", "tokens"),
    _loss("loss_by_time", "time since the start", "time_s"),
    Picture("memory", _MEMORY_CAPTION, plots.plot_memory, partial(tables.metric_table, metric="peak_memory_mb")),
    Picture("throughput", _SPEED_CAPTION, plots.plot_throughput, partial(tables.metric_table, metric="tokens_per_second")),
)
_SCORES_CAPTION = "Score of each block, and the probability with which it is drawn."
_FREQUENCY_CAPTION = "Share of the intervals in which each block trained, and the share that its probability makes expect."
PICTURES_OF_ONE_RUN = (
    Picture("outlier_scores", _SCORES_CAPTION, plots.plot_scores, tables.scores_table),
    Picture("sampling_history", "Blocks that trained in each interval.", plots.plot_blocks, tables.blocks_table),
    Picture("block_frequency", _FREQUENCY_CAPTION, plots.plot_block_frequency, tables.block_frequency_table),
)


def write_pictures(run_dir: str | Path) -> list[Path]:
    """Draws a run into its own folder, and returns the PNG files; what it has no data for (scores, say) is left out."""
    if not is_run_folder(Path(run_dir)):
        return []
    run = RunRecord.read(run_dir)
    shown: list[tuple[Picture, Any]] = [*((one, run) for one in PICTURES_OF_ONE_RUN), *((one, [run]) for one in COMPARISONS)]
    return [png for picture, subject in shown if (png := picture.draw(subject, run.path / f"{picture.name}.png"))]


def write_report(runs: Sequence[str | Path], output: str | Path, refresh: int | None = None) -> Path:
    """Draws one run or compares several: PNG pictures, a CSV file with the numbers beside each, and ``report.html``.

    Of a folder with ``version_N`` folders the newest that trained counts. The page, whose path is returned, holds the
    pictures; a browser asks for it again after ``refresh`` seconds. A UsageError says what of the folders is wrong.
    """
    records = _unique_runs([RunRecord.read(run) for run in runs])
    if not records:
        raise UsageError("report: no run given; give one or more run folders")
    output = Path(output)
    try:
        refuse_url("output", output)
        output.mkdir(parents=True, exist_ok=True)
        return _write_report(records, output, refresh)
    except OSError as error:
        raise UsageError(f"{output}: can't write the report there ({error.strerror}); give another folder") from error


def _write_report(runs: list[RunRecord], output: Path, refresh: int | None) -> Path:
    several, names = len(runs) > 1, ", ".join(run.name for run in runs)
    pictures = _pictures(COMPARISONS, runs, output, names)
    sections: list[dict[str, Any]] = [{"title": "Comparison" if several else "Training", "pictures": pictures}]
    for number, run in enumerate(runs, start=1):
        prefix = f"{number}-{re.sub(r'[^a-zA-Z0-9_.-]+', '-', run.name)}-" if several else ""
        pictures = _pictures(PICTURES_OF_ONE_RUN, run, output, run.name, prefix)
        settings = (run.path / CONFIG_FILE).read_text(encoding="utf-8") if run.config else None
        sections.append({"title": run.name if several else "Blocks", "pictures": pictures, "settings": settings})
        for title, table in run.texts.items():
            rows = list(zip(*table.values(), strict=True))
            sections.append({"title": f"{title}, {run.name}" if several else title, "columns": list(table), "rows": rows})
    if not any(section.get("pictures") or section.get("rows") for section in sections):
        raise UsageError(f"{names}: no figures to report yet; let the run log some steps first")
    figures = [key_figures(run) for run in runs]
    tables.write_csv({column: [row[column] for row in figures] for column in figures[0]}, output / "key_figures.csv")
    title = f"Comparison of {len(runs)} runs" if several else f"Run {names}"
    path = output / "report.html"
    path.write_text(render(title, figures, sections, refresh), encoding="utf-8")
    return path


def _pictures(
    pictures: Sequence[Picture], subject: RunRecord | list[RunRecord], output: Path, names: str, prefix: str = ""
) -> list[dict[str, Any]]:
    """Draws pictures and writes their numbers; returns the files, with captions, and texts for those who can't see them."""
    shown = []
    for picture in pictures:
        if png := picture.draw(subject, output / f"{prefix}{picture.name}.png"):
            tables.write_csv(picture.table(subject), png.with_suffix(".csv"))
            about = {"caption": picture.caption, "alt": f"{names}: {picture.caption}", "numbers": f"{png.stem}.csv"}
            shown.append({"png": base64.b64encode(png.read_bytes()).decode(), **about})
    return shown


def _unique_runs(runs: list[RunRecord]) -> list[RunRecord]:
    """Runs once each, by names that tell them apart: where folders are called the same, their parents' names lead."""
    runs = list({run.path.resolve(): run for run in runs}.values())
    depth = 1
    while len({run.name for run in runs}) < len(runs):
        depth += 1
        runs = [replace(run, name="/".join(run.path.resolve().parts[-depth:])) for run in runs]
    return runs


def render(title: str, figures: Dicts = (), sections: Dicts = (), refresh: int | None = None, note: str | None = None) -> str:
    """The page as text, made of ``page.html``: key figures of one run as a list, of several as a row each, and sections."""
    rows = [{label: formatted(key, run, len(figures) == 1) for key, label in LABELS.items()} for run in figures]
    labels = [label for label in LABELS.values() if any(row[label] != UNKNOWN for row in rows)]
    shown = [section for section in sections if any(value for key, value in section.items() if key != "title")]
    values = {"title": title, "figures": rows, "labels": labels, "sections": shown, "refresh": refresh, "note": note}
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True).from_string(template).render(values, policy=CONTENT_SECURITY_POLICY)
