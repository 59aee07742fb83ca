"""From raw rows to tables and pictures: nothing but the CSV files goes in."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure
from scipy import stats

from benchmarks.evidence.ledger import COUNTED, TUNED, Ledger
from benchmarks.evidence.study import Study
from benchmarks.evidence.tasks import MULTIPLE_CHOICE
from benchmarks.report import markdown

RESAMPLES = 10_000
FEWEST_PAIRS = 5  # resampled, fewer have too few different means for a p
COSTS = {"time_s": "Time (s)", "flops": "FLOPs", "peak_mb": "Peak memory (MB)"}

Values = dict[str, dict[int, dict[str, float]]]
"""Method -> seed -> column -> value, of one task."""


def write_tables(study: Study, folder: Path) -> str:
    """Writes ``STUDY.md`` and a picture a task from the folder's rows, also of other processes, and returns the text."""
    parts = [f"# {study.name}", study.question]
    counted, tuned = Ledger(folder / f"{study.name}.csv", COUNTED), Ledger(folder / f"{study.name}_rates.csv", TUNED)
    for task in study.tasks:
        values, before = of_task(counted, task)
        parts += [f"## {task}", task_table(values, before, study.reference) if values else "No run counts yet."]
        if error := metric_error(values, study, task):
            parts.append(error)
        if rates := rates_table(tuned, task):
            parts += ["Rates, chosen on validation rows with seeds that don't count; the best of a method first:", rates]
    shorter = Ledger(folder / f"{study.shorter}.csv", COUNTED).rows if study.shorter else []
    rows = counted.rows + [{**row, "time_s": ""} for row in shorter]  # seconds of another machine, or day, are others
    for task in dict.fromkeys(name.partition("@")[0] for name in study.tasks):
        if of_lengths(counted.rows, task):
            lengths = of_lengths(rows, task)
            if len(lengths) > 1:
                parts += [f"## {task}, by length", length_table(lengths, study.reference)]
            picture = f"{study.name}_{task}.png"
            plot(lengths, folder / picture, f"{task}, {', '.join(map(str, lengths))} steps; bars: range of the seeds")
            parts.append(f"![Test loss on {task} against time, FLOPs and memory]({picture})")
    text = "\n\n".join(parts) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{study.name}.md").write_text(text)
    return text


def of_task(counted: Ledger, task: str) -> tuple[Values, dict[str, float]]:
    """Returns a task's rows by method and seed, and the row of the model before training."""
    values = _values(row for row in counted.rows if row["task"] == task)
    before = values.pop("before", {})
    return values, next(iter(before.values()), {})


def of_lengths(rows: Sequence[dict[str, str]], task: str) -> dict[int, Values]:
    """Returns a task's rows by number of steps, method and seed, for tasks named ``TASK`` and ``TASK@STEPS``."""
    trained = [row for row in rows if row["task"].partition("@")[0] == task and row["method"] != "before"]
    steps = sorted({int(row["steps"]) for row in trained})
    return {number: _values(row for row in trained if int(row["steps"]) == number) for number in steps}


def _values(rows: Iterable[dict[str, str]]) -> Values:
    values: Values = {}
    for row in rows:
        numbers = {k: float(row[k]) if row[k] else math.nan for k in row if k not in ("task", "method", "commit")}
        values.setdefault(row["method"], {})[int(row["seed"])] = numbers
    return values


def _averages(lengths: dict[int, Values], name: str, column: str) -> list[float]:
    """A column's average over seeds, for each length that a method has."""
    return [_average(values[name], column) for values in lengths.values() if name in values]


def _average(runs: dict[int, dict[str, float]], column: str) -> float:
    """A column's mean over the seeds that have it; of seconds, which a slow moment of the machine adds to, the median."""
    known = [run[column] for run in runs.values() if not math.isnan(run[column])] or [math.nan]
    return median(known) if column == "time_s" else mean(known)


def length_table(lengths: dict[int, Values], reference: str) -> str:
    """Mean test loss of each method after each number of steps, and at what the reference's runs cost.

    Between two lengths of a method the loss is interpolated over the logarithm of the cost; beyond them nothing is said.
    """
    names = list(dict.fromkeys(name for values in reversed(lengths.values()) for name in values))
    costs = [cost for cost in ("flops", "time_s") if not all(math.isnan(x) for x in _averages(lengths, reference, cost))]
    with_reference = {steps: values for steps, values in lengths.items() if reference in values}
    header = ["Method", *(f"{steps} steps" for steps in lengths)]
    header += [f"{COSTS[cost]} of {reference} with {steps}" for cost in costs for steps in with_reference]
    rows = []
    for name in names:
        cells = [name]
        for values in lengths.values():
            runs = values.get(name, {}).values()
            cells.append(f"{mean(run['test_loss'] for run in runs):.3f} ({len(runs)} seeds)" if runs else "")
        for cost in costs:
            logs, losses = np.log(_averages(lengths, name, cost)), np.array(_averages(lengths, name, "test_loss"))
            known = ~np.isnan(logs)  # not every run has its seconds
            targets = np.log(_averages(with_reference, reference, cost))
            if not known.any():
                cells += [""] * len(targets)
                continue
            found = np.interp(targets, logs[known], losses[known], left=math.nan, right=math.nan)
            cells += [_plain(float(loss)) for loss in np.where(np.isnan(targets), math.nan, found)]
        rows.append([*cells, f"{_averages(lengths, name, 'peak_mb')[-1]:,.0f}"])
    return markdown([*header, "Peak memory (MB)"], rows)


def task_table(values: Values, before: dict[str, float], reference: str) -> str:
    """A row a method, the lowest test loss first; differences from the reference are paired by seed."""
    paired = {name: differences(values, name, reference) for name in values if name != reference}
    p_values = [adjusted({name: p(pairs) for name, pairs in paired.items()}) for p in (t_test_p, bootstrap_p)]
    rows = []
    for name in sorted(values, key=lambda name: mean(run["test_loss"] for run in values[name].values())):
        runs = list(values[name].values())
        difference = ""
        if len(pairs := paired.get(name, [])) > 1:
            half = half_width(pairs)
            difference = f"{mean(pairs):+.3f} ({mean(pairs) - half:+.3f} to {mean(pairs) + half:+.3f})"
        cells = [name, f"{runs[0]['lr']:g}", str(len(runs)), interval([run["test_loss"] for run in runs]), difference]
        cells += [_plain(p_value.get(name, math.nan)) for p_value in p_values]
        cells += [interval([run[column] for run in runs]) for column in ("test_metric", "forgetting")]
        costs = [_average(values[name], cost) for cost in COSTS]
        cells += ["" if math.isnan(cost) else f"{cost:.3g}" for cost in costs]
        rows.append(cells)
    if before:
        loss, metric, forgetting = f"{before['test_loss']:.3f}", _plain(before["test_metric"]), f"{before['forgetting']:.3f}"
        rows.append(["before training", "", "", loss, "", "", "", metric, forgetting, "", "", ""])
    header = ["Method", "Rate", "Seeds", "Test loss", f"Minus {reference}, by seed", "p (t, Holm)", "p (bootstrap, Holm)"]
    return markdown([*header, "Metric", "Unrelated text", *COSTS.values()], rows)


def rates_table(tuned: Ledger, task: str) -> str:
    """Validation losses of a task by method and rate, mean over the seeds, the lowest first; empty where none was tried."""
    losses: dict[str, dict[float, list[float]]] = {}
    for row in tuned.rows:
        if row["task"] == task:
            losses.setdefault(row["method"], {}).setdefault(float(row["lr"]), []).append(float(row["validation_loss"]))
    tried = {name: sorted((mean(runs), rate) for rate, runs in by_rate.items()) for name, by_rate in losses.items()}
    rows = []
    for name, (best, *others) in sorted(tried.items(), key=lambda item: item[1]):
        rows.append([name, f"{best[1]:g}", f"{best[0]:.3f}", ", ".join(f"{loss:.3f} ({rate:g})" for loss, rate in others)])
    return markdown(["Method", "Rate", "Validation loss", "At other rates"], rows) if rows else ""


def metric_error(values: Values, study: Study, task: str) -> str:
    """Says how exact a run's metric can be: the standard error of a share of that many rows, at the mean of all runs."""
    shares = [run["test_metric"] for runs in values.values() for run in runs.values() if not math.isnan(run["test_metric"])]
    answers = study.exact_match_rows and task.partition("@")[0] not in MULTIPLE_CHOICE
    rows = study.exact_match_rows if answers else study.evaluation_rows["test"]
    if not shares or rows < 2:
        return ""
    error = math.sqrt(mean(shares) * (1 - mean(shares)) / (rows - 1))
    return f"A run's metric is a share of {rows} rows: its standard error is {error:.3f}."


def interval(values: Sequence[float]) -> str:
    """Mean, standard deviation and the 95 % interval of the mean (Student's t)."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} ± {half_width(values):.3f} (sd {stdev(values):.3f})"


def half_width(values: Sequence[float]) -> float:
    """Half the width of a mean's 95 % interval (Student's t)."""
    return float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def differences(values: Values, name: str, reference: str) -> list[float]:
    """Test loss of a method minus the reference's, for each seed that both have."""
    ours, theirs = values.get(name, {}), values.get(reference, {})
    return [ours[seed]["test_loss"] - theirs[seed]["test_loss"] for seed in sorted(ours.keys() & theirs.keys())]


def t_test_p(paired: Sequence[float]) -> float:
    """Two-sided p of the mean of paired differences by Student's t, which takes them for normal; NaN with fewer than five."""
    return math.nan if _too_few(paired) else float(stats.ttest_1samp(paired, 0.0).pvalue)


def bootstrap_p(paired: Sequence[float]) -> float:
    """Two-sided p of the mean of paired differences by studentised bootstrap; NaN with fewer than five pairs.

    It takes them for nothing but independent, and so sees less than the t test. Each resample's mean is taken in its own
    standard errors (Hall and Wilson, 1991, guideline 2): without that, one of seven means of five pairs would have a p below
    0.05 where nothing differs; with it, one of forty has.
    """
    if _too_few(paired):
        return math.nan
    centred = np.asarray(paired) - mean(paired)
    resampled = np.random.default_rng(0).choice(centred, size=(RESAMPLES, len(paired)))
    with np.errstate(divide="ignore", invalid="ignore"):  # the same pair five times has no error: further out than any
        t = np.abs(resampled.mean(axis=1)) / np.where(np.ptp(resampled, axis=1) > 0, resampled.std(axis=1), 0.0)
    return float((1 + (t >= abs(mean(paired)) / centred.std()).sum()) / (1 + RESAMPLES))


def adjusted(p_values: dict[str, float]) -> dict[str, float]:
    """Holm's correction for as many comparisons as there are."""
    known = sorted((p, name) for name, p in p_values.items() if not math.isnan(p))
    result, largest = dict.fromkeys(p_values, math.nan), 0.0
    for rank, (p, name) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        result[name] = largest
    return result


def plot(lengths: dict[int, Values], path: Path, title: str) -> None:
    """Test loss against time, FLOPs and memory, where measured; a line a method, bars over the seeds' range.

    Of several lengths, methods that were run at one alone are left to the tables.
    """
    runs_at = Counter(name for values in lengths.values() for name in values)
    names = [name for name in runs_at if runs_at[name] > 1 or len(lengths) == 1]
    shown = {cost: [name for name in names if not all(map(math.isnan, _averages(lengths, name, cost)))] for cost in COSTS}
    measured = [cost for cost in COSTS if len(shown[cost]) > (len(names) > 1)]  # one method alone compares nothing
    figure = Figure(figsize=(4 * len(measured), 4), layout="constrained")
    axes = figure.subplots(1, len(measured), sharey=True)
    for axis, cost in zip(axes, measured, strict=True):
        for number, name in enumerate(names):
            marker = "os^"[number // 10 % 3]  # colours repeat after ten
            losses = [[run["test_loss"] for run in values[name].values()] for values in lengths.values() if name in values]
            means = [mean(runs) for runs in losses]
            error = [[m - min(runs) for m, runs in zip(means, losses, strict=True)]]
            error += [[max(runs) - m for m, runs in zip(means, losses, strict=True)]]
            axis.errorbar(_averages(lengths, name, cost), means, yerr=error, marker=marker, capsize=2, label=name)
        axis.set_xlabel(COSTS[cost])
        if len(lengths) > 1 and cost != "peak_mb":
            axis.set_xscale("log")
            left, right = axis.get_xlim()
            axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if right > 10 * left else (1, 2, 3, 5, 7)))
            axis.xaxis.set_major_formatter(ticker.EngFormatter())
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    figure.suptitle(title, fontsize="medium")
    axes[0].set_ylabel("Test loss (nats a target token)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", ncols=1 + len(names) // 18)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _too_few(paired: Sequence[float]) -> bool:
    return len(paired) < FEWEST_PAIRS or np.ptp(paired) == 0  # equal pairs say nothing of how pairs differ


def _plain(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"
