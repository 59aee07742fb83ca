from __future__ import annotations

import base64
import csv
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from ows_lightning.cli.main import main
from ows_lightning.errors import UsageError
from ows_lightning.report import RunRecord, write_report

# The same browser under the names that its packages give it.
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page(HTMLParser):
    """Collects elements and text, and fails where tags are not closed in order."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def read_columns(path):
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.fixture(scope="module")
def one_run(tmp_path_factory, make_run):
    """A run's folder, and the path of its report."""
    folder = tmp_path_factory.mktemp("one")
    run = make_run(folder / "ows")
    return run, write_report([run], folder / "report")


@pytest.fixture(scope="module")
def compared(tmp_path_factory, make_run):
    """The path of a report of two runs, one of which samples blocks; it is given twice, and shown once."""
    folder = tmp_path_factory.mktemp("compared")
    ows, full = make_run(folder / "ows"), make_run(folder / "full", sampled=False, seed=1)
    return write_report([ows, full, ows], folder / "report")


def test_one_run(one_run):
    run, path = one_run
    assert path == run.parent / "report" / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    images = page.all("img")
    pictures = sorted(path.parent.glob("*.png"))
    assert len(images) == len(pictures) == 8
    inlined = {base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in images}
    assert inlined == {picture.read_bytes() for picture in pictures}
    assert all(image["alt"] for image in images)
    assert all(picture.with_suffix(".csv").is_file() for picture in pictures)
    for shown in ("meta-llama/Llama-2-7b-hf", "GaLoreAdamW, lr 0.0003, rank 128", "750,000", "0:14:10", "of 32: "):
        assert shown in page.text


def test_nothing_is_loaded_from_elsewhere(compared):
    source = compared.read_text(encoding="utf-8")
    assert not re.search(r"https?://|//[a-z]|url\(|@import", re.sub(r"base64,[A-Za-z0-9+/=]+", "", source))
    page = Page(source)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert all((compared.parent / link["href"]).is_file() for link in page.all("a"))


def test_the_command_compares_runs_without_a_config(tmp_path, make_run, capsys):
    runs = [str(make_run(tmp_path / name, sampled=False, seed=seed)) for seed, name in enumerate(("a", "b"))]
    main(["report", *runs, "--output", str(tmp_path / "compared")])
    assert capsys.readouterr().out.splitlines()[-1] == f"Written: {tmp_path}/compared/report.html"
    assert (tmp_path / "compared" / "loss.png").is_file()


def test_the_home_of_a_path_that_the_shell_left_as_it_was(tmp_path, make_run, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = make_run(tmp_path / "run", sampled=False)
    main(["report", str(run), "--output=~/report"])
    assert (tmp_path / "report" / "report.html").is_file()
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(SystemExit):
        main(["compare", "--model=~/run"])
    assert "no prompt is given" in capsys.readouterr().err  # the run was found, and with it the base
    for command in ("report --watch=~nosuchuser/run", "report ~/none --output=~nosuchuser/report"):
        with pytest.raises(SystemExit):
            main(command.split())
        assert "no such folder" in capsys.readouterr().err
    for command in ("chat --model=~nosuchuser/run", "apply-delta ~nosuchuser/base ~nosuchuser/delta"):
        with pytest.raises(SystemExit, match="2"):
            main(command.split())
        assert "Could not determine home" not in capsys.readouterr().err


def test_compared_runs_have_a_row_each(compared):
    page = Page(compared.read_text(encoding="utf-8"))
    assert len(page.all("tr")) == 3
    folder = compared.parent
    figures = read_columns(folder / "key_figures.csv")
    assert figures["run"] == ["ows", "full"]
    assert figures["time_s"] == ["850.0", "850.0"]
    assert set(read_columns(folder / "loss.csv")["run"]) == {"ows", "full"}
    assert (folder / "1-ows-outlier_scores.png").is_file()
    assert not (folder / "2-full-outlier_scores.png").exists()


def test_runs_of_the_same_name_are_told_apart(tmp_path, make_run):
    runs = [make_run(tmp_path / parent / "ows", steps=50, sampled=False) for parent in ("seed0", "seed1")]
    write_report(runs, tmp_path / "report")
    assert read_columns(tmp_path / "report" / "key_figures.csv")["run"] == ["seed0/ows", "seed1/ows"]


def test_csv_files_hold_the_run_s_numbers(one_run):
    folder, page = one_run
    run, report = RunRecord.read(folder), page.parent
    scores = read_columns(report / "outlier_scores.csv")
    assert [float(ratio) for ratio in scores["outlier_ratio_percent"]] == run.scores["outlier_ratios"]
    assert [float(probability) for probability in scores["probability"]] == run.scores["probabilities"]
    assert (report / "sampling_history.csv").read_text() == (folder / "sampling_history.csv").read_text()
    frequency = read_columns(report / "block_frequency.csv")
    for block, count in zip(frequency["block"], frequency["intervals"], strict=True):
        assert int(count) == sum(int(block) in draw.blocks for draw in run.history)

    logged = read_columns(folder / "metrics.csv")
    for name, x in (("loss", "step"), ("loss_by_tokens", "tokens"), ("loss_by_time", "time_s")):
        loss = read_columns(report / f"{name}.csv")
        train = [float(y) for y, split in zip(loss["loss"], loss["split"], strict=True) if split == "train"]
        validation = [float(y) for y, split in zip(loss["loss"], loss["split"], strict=True) if split == "validation"]
        assert train == [float(cell) for cell in logged["train_loss"] if cell]
        assert validation == [float(cell) for cell in logged["val_loss"] if cell]
        at = [float(cell) for cell, y in zip(logged[x], logged["train_loss"], strict=True) if y]
        assert [float(cell) for cell in loss[x]][: len(train)] == at
    for name, column in (("memory", "peak_memory_mb"), ("throughput", "tokens_per_second")):
        assert [float(y) for y in read_columns(report / f"{name}.csv")[column]] == [float(c) for c in logged[column] if c]


def test_a_report_in_the_run_s_own_folder_leaves_the_run_as_it_was(tmp_path, make_run):
    folder = make_run(tmp_path / "ows")
    before = RunRecord.read(folder)
    write_report([folder], folder)
    assert RunRecord.read(folder) == before


def test_names_and_settings_are_escaped(tmp_path, make_run):
    hostile = "<script>alert('x')</script>&\""
    folder = make_run(tmp_path / "a<b>&c", model=hostile)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "note": "</pre><img src=http://x/y.png>"}))
    page = Page(write_report([folder], tmp_path / "report").read_text(encoding="utf-8"))
    assert not page.all("script")
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    assert "Run a<b>&c" in page.text
    assert "<img src=http://x/y.png>" in page.text


def test_a_run_without_figures_is_refused(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,epoch\n0,0\n")
    with pytest.raises(UsageError, match="no figures to report yet"):
        write_report([tmp_path], tmp_path / "report")
    with pytest.raises(UsageError, match="no run given"):
        write_report([], tmp_path / "report")


def test_an_output_that_can_t_be_written_is_named(tmp_path, make_run):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UsageError, match="taken: can't write the report there"):
        write_report([make_run(tmp_path / "ows", steps=50)], tmp_path / "taken")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser is installed: apt-get install chromium")
def test_opens_in_a_browser(tmp_path, make_run):
    page = write_report([make_run(tmp_path / "ows"), make_run(tmp_path / "lisa", seed=1)], tmp_path / "report")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    screenshot = tmp_path / "page.png"
    subprocess.run(
        [
            *(BROWSER, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--hide-scrollbars"),
            *("--window-size=1200,7500", f"--screenshot={screenshot}", page.as_uri()),
        ],
        check=True,
        capture_output=True,
        timeout=600,
    )
    pixels = (imread(screenshot)[..., :3] * 255).round().astype(int)
    # All the pictures are on the page, one below the other: bars and lines in the colours that were drawn.
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x56, 0xB4, 0xE9)):
        assert np.all(pixels == colour, axis=-1).sum() > 500
    used = np.flatnonzero((pixels < 128).any(axis=(1, 2)))
    assert used.max() > 5000
