from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from ows_lightning.errors import UsageError
from ows_lightning.report import RunRecord, plots, write_pictures
from ows_lightning.report.tables import block_frequency_table
from ows_lightning.sampling.distributions import SCORE_NAMES

ALL = [
    plots.plot_scores,
    plots.plot_blocks,
    plots.plot_block_frequency,
    plots.plot_loss,
    plots.plot_memory,
    plots.plot_throughput,
]


@pytest.fixture
def run(tmp_path, make_run):
    return RunRecord.read(make_run(tmp_path / "ows"))


@pytest.mark.parametrize("plot", ALL, ids=lambda plot: plot.__name__)
def test_returns_a_figure_of_its_own_or_draws_on_given_axes(run, plot):
    fig, ax = plot(run)
    assert isinstance(fig, Figure)
    assert ax in fig.axes
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    mine = Figure()
    left, _ = mine.subplots(1, 2)
    assert plot(run, ax=left) == (mine, left)


@pytest.mark.parametrize("plot", ALL, ids=lambda plot: plot.__name__)
def test_nothing_to_draw_is_said(tmp_path, plot):
    (tmp_path / "metrics.csv").write_text("step,epoch\n0,0\n")
    with pytest.raises(UsageError, match="nothing to draw"):
        plot(RunRecord.read(tmp_path))


def test_leaves_pyplot_alone(run):
    plots.plot_loss(run)
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_scores_are_bars_and_probabilities_dots_on_them(run):
    fig, ax = plots.plot_scores(run)
    assert [bar.get_height() for bar in ax.patches] == run.scores["outlier_ratios"]
    right = next(other for other in fig.axes if other is not ax)
    dots = right.lines[0].get_ydata()
    np.testing.assert_allclose(dots, np.multiply(run.scores["probabilities"], 100))
    assert list(right.lines[1].get_ydata()) == [100 / 32] * 2
    # p is proportional to the ratio, so both stand at the same height of the picture.
    np.testing.assert_allclose(dots / right.get_ylim()[1], np.divide(run.scores["outlier_ratios"], ax.get_ylim()[1]))


@pytest.mark.parametrize("distribution", SCORE_NAMES)
def test_every_kind_of_score_is_drawn_under_its_name(distribution, run):
    _, ax = plots.plot_scores(replace(run, scores={**run.scores, "distribution": distribution}))
    assert ax.get_ylabel() == plots.SCORE_LABELS[SCORE_NAMES[distribution]][1]


def test_uniform_sampling_draws_no_empty_scores(tmp_path, make_run):
    folder = make_run(tmp_path / "lisa")
    scores = json.loads((folder / "outlier_scores.json").read_text())
    scores.update(distribution="uniform", outlier_ratios=[0.0] * 32, probabilities=[1 / 32] * 32)
    (folder / "outlier_scores.json").write_text(json.dumps(scores))
    fig, ax = plots.plot_scores(RunRecord.read(folder))
    assert len(fig.axes) == 1
    assert ax.get_ylabel() == "sampling probability (%)"
    assert {bar.get_height() for bar in ax.patches} == {100 / 32}


def test_heat_map_shows_each_draw_over_its_steps(run):
    _, ax = plots.plot_blocks(run)
    mesh = ax.collections[0]
    active = np.asarray(mesh.get_array())
    assert active.shape == (32, 10)
    for column, draw in enumerate(run.history):
        assert tuple(np.flatnonzero(active[:, column])) == draw.blocks
    edges = mesh.get_coordinates()[0, :, 0]
    assert list(edges) == [*range(0, 500, 50), 500]


def test_heat_map_tells_blocks_at_rest_from_those_that_train(run):
    first = run.history[0]
    resting = tuple(block for block in range(min(first.blocks), 32) if block not in first.blocks)
    _, ax = plots.plot_blocks(replace(run, resting={first.interval: resting}))
    shown = np.asarray(ax.collections[0].get_array())
    assert tuple(np.flatnonzero(shown[:, 0] == 2)) == first.blocks
    assert tuple(np.flatnonzero(shown[:, 0] == 1)) == resting
    assert set(shown[:, 1:].flat) == {0, 2}
    assert "trains at rest" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_the_heat_map_ends_where_the_run_did(tmp_path, make_run):
    run = RunRecord.read(make_run(tmp_path / "stopped", steps=480))
    for record, end in ((run, 480), (replace(run, metrics={}), 500)):
        _, ax = plots.plot_blocks(record)
        assert ax.collections[0].get_coordinates()[0, -1, 0] == end


@pytest.mark.parametrize(("x", "label"), [("step", "step"), ("tokens", "thousands"), ("time_s", "minutes")])
def test_loss_of_several_runs(run, tmp_path, make_run, x, label):
    other = RunRecord.read(make_run(tmp_path / "full", sampled=False, seed=1))
    _, ax = plots.plot_loss([run, other], x=x)
    assert label in ax.get_xlabel()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["ows", "full", "training", "validation"]
    train, validation, *_ = ax.lines
    assert list(train.get_ydata()) == run.series("train_loss")[1]
    assert list(validation.get_ydata()) == run.series("val_loss")[1]
    assert len({line.get_color() for line in ax.lines}) == 2


@pytest.mark.parametrize(
    ("x", "seconds", "label", "end"),
    [
        ("tokens", 1.0, "training tokens (thousands)", 750), ("time_s", 0.5, "time (seconds)", 250),
        ("time_s", 6.0, "time (minutes)", 50), ("time_s", 36.0, "time (hours)", 5),
    ],
)  # fmt: skip
def test_the_units_of_an_axis(x, seconds, label, end, tmp_path, make_run):
    _, ax = plots.plot_loss(RunRecord.read(make_run(tmp_path / "run", seconds_per_step=seconds)), x=x)
    assert ax.get_xlabel() == label
    assert ax.lines[0].get_xdata()[-1] == pytest.approx(end)


def test_whiskers_are_two_standard_deviations_of_chance(run):
    _, ax = plots.plot_block_frequency(run)
    (dots,) = (container for container in ax.containers if isinstance(container, ErrorbarContainer))
    expected = np.array(block_frequency_table(run)["expected_share"])
    spread = 2 * np.sqrt(expected * (1 - expected) / 10)
    ends = np.array(dots.lines[2][0].get_segments())[:, :, 1]
    np.testing.assert_allclose(ends, 100 * np.stack([expected - spread, expected + spread], 1).clip(0, 1))


def test_a_run_may_have_a_name_that_would_be_a_formula(run, tmp_path, make_run):
    other = RunRecord.read(make_run(tmp_path / "$x^$ y", sampled=False))
    figure, _ = plots.plot_loss([run, other])
    figure.savefig(tmp_path / "loss.png")


def test_many_runs_stay_distinguishable(run):
    styles = [plots._style(number) for number in range(20)]
    assert len({(style["color"], style["linestyle"]) for style in styles}) == 20


def test_realised_frequency_follows_the_expected_one(tmp_path, make_run):
    run = RunRecord.read(make_run(tmp_path / "long", steps=6000, interval_steps=3))
    table = block_frequency_table(run)
    assert sum(table["realised_share"]) == pytest.approx(5)
    np.testing.assert_allclose(table["realised_share"], table["expected_share"], atol=4 * 0.5 / 2000**0.5)


def test_no_share_is_expected_where_probabilities_changed(run, tmp_path, make_run):
    _, ax = plots.plot_block_frequency(run)
    assert any("expected" in text.get_text() for text in ax.get_legend().get_texts())
    folder = make_run(tmp_path / "rescored")
    (folder / "config.yaml").write_text("sampling: {rescore_every: 2}\n")
    by_norm = make_run(tmp_path / "by_norm")
    scores = by_norm / "outlier_scores.json"
    scores.write_text(scores.read_text().replace('"distribution": "outlier"', '"distribution": "gradient_norm"'))
    for changing in (folder, by_norm):
        _, ax = plots.plot_block_frequency(RunRecord.read(changing))
        assert not any("expected" in text.get_text() for text in ax.get_legend().get_texts())


def test_write_pictures_skips_what_there_is_no_data_for(tmp_path, make_run):
    ows = make_run(tmp_path / "ows")
    names = ["loss", "loss_by_tokens", "loss_by_time", "memory", "throughput"]
    sampled = ["outlier_scores", "sampling_history", "block_frequency"]
    assert write_pictures(ows) == [ows / f"{name}.png" for name in sampled + names]
    full = make_run(tmp_path / "full", sampled=False)
    assert write_pictures(full) == [full / f"{name}.png" for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in ows.glob("*.png"))
    (tmp_path / "empty").mkdir()
    assert write_pictures(tmp_path / "empty") == []
