"""Figures in README and docs are those of the studies' rows and of `plan`: who makes new ones has to write them there, too."""

from __future__ import annotations

import csv
import functools
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest

from benchmarks.evidence.ledger import COUNTED, Ledger
from benchmarks.evidence.tables import length_table, of_lengths
from ows_lightning.cli.lightning_cli import OWSCLI
from ows_lightning.memory.plan_settings import settings_from_config
from ows_lightning.memory.planner import METHODS as PLANNED
from ows_lightning.memory.prediction import predict_memory

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
METHODS = {
    "full fine-tuning": "full",
    "LoRA": "lora",
    "OWS, 20 of 30 blocks in rank 32": "thin_20",
    "OWS, five blocks, rank 16 at rest": "ows_resting",
    "OWS, five blocks in rank 128": "ows",
}
DRAWS_AND_OTHERS = {
    "GaLore, all blocks in rank 128": "galore",
    "LISA": "lisa_2",
    "five blocks, drawn uniformly": "uniform_galore",
    "five, drawn by few outliers": "outlier_reverse",
}
TASKS = ("spell_backward", "family_relationships", "cmudict", "number_filtering")


def means(key: str, task: str, method: str, steps: int = 128) -> float:
    with (ROOT / "benchmarks/results/length.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if (row["task"], row["method"]) == (f"{task}@{steps}", method)]
    assert len(rows) == {128: 5, 384: 3}[steps]
    return mean(float(row[key]) for row in rows)


def table(text: str, first: str) -> dict[str, list[str]]:
    """The cells of a Markdown table's rows by their first, of the table whose head has this cell."""
    lines = text.partition(first)[2].partition("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows[2:]}


def in_evidence(name: str, head: str = "| | `spell_backward` |") -> list[str]:
    return table((ROOT / "docs/evidence.md").read_text(), head)[name]


def figures(method: str) -> list[str]:
    """A row of the table: losses by task, and the first task's costs."""
    learned = [f"{means('test_loss', task, method):.3f}, {means('forgetting', task, method):.2f}" for task in TASKS]
    cost = [f"{means('flops', TASKS[0], method) / 1e12:.1f}", f"{means('peak_mb', TASKS[0], method):,.0f}"]
    return [*learned, *cost]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *METHODS.items(),
        ("the same, drawn uniformly", "uniform_resting"),
        ("GaLore, all blocks in rank 128", "galore"),
        ("LISA, two blocks", "lisa_2"),
    ],
)
def test_the_long_study(name: str, method: str) -> None:
    assert in_evidence(name) == figures(method)


@pytest.mark.parametrize(("name", "method"), [*METHODS.items(), *DRAWS_AND_OTHERS.items()])
def test_the_longest_runs(name: str, method: str) -> None:
    """Loss and loss on unrelated text; three seeds of each."""
    first, _, second = in_evidence(name, "| | `spell_backward` | minus LoRA |")
    for task, cell in zip(TASKS, (first, second), strict=False):
        loss, unrelated = (means(key, task, method, 384) for key in ("test_loss", "forgetting"))
        assert cell == f"{loss:.3f}, {unrelated:.2f}"


@pytest.mark.parametrize("method", METHODS.values())
def test_the_long_study_in_readme(method: str) -> None:
    *others, last = (means("test_loss", task, method) for task in TASKS)
    assert f"{', '.join(f'{loss:.2f}' for loss in others)}, {last:.3f}" in README


def test_exact_match_of_the_long_study() -> None:
    names = {"LoRA": "lora", "full": "full", "five alone": "ows", "with rest": "ows_resting", "20 blocks": "thin_20"}
    text = (ROOT / "docs/evidence.md").read_text()
    for name, method in names.items():
        second, last = (100 * means("test_metric", task, method) for task in (TASKS[1], TASKS[3]))
        assert f"{name} {second:.1f}, {last:.1f};" in text


def test_losses_at_equal_time() -> None:
    """Of those runs that had the machine to themselves; between two lengths it is interpolated."""
    lengths = of_lengths(Ledger(ROOT / "benchmarks/results/length.csv", COUNTED).rows, TASKS[0])
    text = length_table(lengths, "ows")
    heads, _, *lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    at = {line[1]: line[heads.index("Time (s) of ows with 384")] for line in lines}
    names = {"LoRA": "lora", "20 blocks": "thin_20", "full": "full", "five with rest": "ows_resting", "alone": "ows"}
    said = ", ".join(f"{name} {float(at[method]) + 1e-6:.2f}" for name, method in names.items())  # a 5 at the end rounds up
    assert said in README
    assert said.replace("full", "full fine-tuning") in (ROOT / "docs/evidence.md").read_text()


@functools.cache
def predicted(config: str, *flags: str, method: str = "ows") -> tuple[float, float]:
    """Peak on the card and bytes in host memory, in GB."""
    arguments = ["--config", str(ROOT / f"configs/{config}.yaml"), *flags]
    settings = settings_from_config(OWSCLI(arguments, run=False).config)
    needs = predict_memory(replace(settings, method=PLANNED[method](settings)))
    return needs.peak_bytes / 1e9, needs.host_bytes / 1e9


@pytest.mark.slow
def test_what_a_7b_model_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OWSCLI, "instantiate_classes", lambda cli: None)  # it is to parse alone
    rows = table(README, "| | 16 x 512 tokens a step |")
    one_row = ("--data.batch_size", "1", "--trainer.accumulate_grad_batches", "16")

    def check(name: str, *flags: str, method: str = "ows", more: str = "") -> None:
        found = [predicted("models/llama2_7b", *flags, *micro_batch, method=method) for micro_batch in ((), one_row)]
        whole, single = (f"{peak:.2f}" + (f" ({in_host:.2f})" if "host" in flags else "") for peak, in_host in found)
        assert rows.pop(name) == [whole, single + more]

    lora, host = ("--config", str(ROOT / "configs/methods/lora.yaml")), ("--model.frozen_in", "host")
    two_blocks, host_of_two = predicted("models/llama2_7b_4gb")
    check("OWS, five blocks")
    check("with rank 16 at rest", "--sampling.resting_rank", "16")
    check("LoRA", method="lora")
    check("OWS as published (states kept, embeddings trained)", method="ows_published")
    check("full AdamW", method="full")
    or_two = f"; two blocks {two_blocks:.2f} ({host_of_two:.2f})"
    check("OWS, frozen blocks in host memory (GB there)", *host, more=or_two)
    check("LoRA, the same (`--config methods/lora`)", *lora, *host)
    assert not rows
    of_lora, _ = predicted("models/llama2_7b", *lora, *host, *one_row)
    assert f"peaks of {of_lora:.2f} and {two_blocks:.2f} GB predicted" in README
    peak, in_host = predicted("models/llama2_70b_12gb")
    assert f"Llama-2-70B (`llama2_70b_12gb`): {peak:.2f} GB predicted, {in_host:.0f} in host memory" in README
