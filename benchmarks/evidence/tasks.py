"""The tasks: rows to train on, rows to choose by, and rows that no choice has seen."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

UNRELATED = Path(__file__).with_name("unrelated.jsonl")
"""Text that has nothing to do with any task: what a run forgets shows in its loss."""

Row = dict[str, Any]


class Task(NamedTuple):
    """Where a task's rows lie, and how its answers are scored: ``exact_match`` or ``accuracy`` (by likelihood)."""

    train: Path
    validation: Path
    test: Path
    metric: str


GENERATED: dict[str, dict[str, Any]] = {
    "family_relationships": {},
    "number_filtering": {"min_numbers": 3, "max_numbers": 6},
    "spell_backward": {},
}
"""Tasks of reasoning-gym (Apache-2.0), and their settings. Seeds make the splits."""

MULTIPLE_CHOICE = ("arc_easy", "arc_challenge", "boolq", "openbookqa")
"""Tasks of LLM-Adapters: ``NAME_train.jsonl`` and ``NAME_test.jsonl`` in the folder that ``--data-root`` names."""

SEEDS = {"test": 3_000_000, "validation": 2_000_000, "train": 1_000_000}
"""Split -> the seed that generates or picks its rows; reasoning-gym's row i is that of seed + i."""

TRAIN_ROWS = 4000

SYSTEM = "Answer."
"""The system message of generated tasks: chat templates put a longer one in the place of none, into each row."""


def make(name: str, folder: Path, held_out_rows: dict[str, int], data_root: Path | None) -> Task:
    """Writes a task's files, where they are not there yet.

    Args:
        name: One of ``GENERATED`` or ``MULTIPLE_CHOICE``.
        folder: Where to write; a folder ``name`` is made in it.
        held_out_rows: How many rows ``validation`` and ``test`` have.
        data_root: Where the files of ``MULTIPLE_CHOICE`` lie.

    Raises:
        ValueError: There is no such task, or its files are nowhere.
    """
    metric = "accuracy" if name in MULTIPLE_CHOICE else "exact_match"
    sizes = {"train": TRAIN_ROWS, **held_out_rows}
    files = {split: folder / name / f"{split}_{sizes[split]}.jsonl" for split in SEEDS}
    task = Task(files["train"], files["validation"], files["test"], metric)
    if all(file.is_file() for file in files.values()):
        return task
    if name in GENERATED:
        rows = _generated(name, sizes)
    elif name in MULTIPLE_CHOICE and data_root is not None:
        rows = _multiple_choice(name, sizes, data_root)
    elif name in MULTIPLE_CHOICE:
        raise ValueError(f"{name}: name the folder of {name}_train.jsonl and {name}_test.jsonl with --data-root")
    else:
        raise ValueError(f"no task '{name}'; tasks: {', '.join([*GENERATED, *MULTIPLE_CHOICE])}")
    (folder / name).mkdir(parents=True, exist_ok=True)
    for split, file in files.items():
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[split]), encoding="utf-8")
    return task


def _generated(name: str, sizes: dict[str, int]) -> dict[str, list[Row]]:
    """Rows of reasoning-gym. A question of one split is never one of another."""
    from reasoning_gym import create_dataset

    seen: set[str] = set()
    rows: dict[str, list[Row]] = {}
    for split, seed in SEEDS.items():
        made = (row for row in create_dataset(name, size=3 * sizes[split], seed=seed, **GENERATED[name]))
        new = {row["question"]: row["answer"] for row in made if row["question"] not in seen}
        seen.update(new)
        kept = list(new.items())[: sizes[split]]
        rows[split] = [{"system": SYSTEM, "instruction": question, "output": answer} for question, answer in kept]
    return rows


def _multiple_choice(name: str, sizes: dict[str, int], data_root: Path) -> dict[str, list[Row]]:
    """Rows of a file; validation rows are taken out of the training file."""

    def read(split: str) -> list[Row]:
        return [json.loads(line) for line in (data_root / f"{name}_{split}.jsonl").read_text(encoding="utf-8").splitlines()]

    def pick(rows: list[Row], split: str) -> list[Row]:
        return random.Random(SEEDS[split]).sample(rows, min(len(rows), sizes[split]))

    train = read("train")
    validation = pick(train, "validation")
    held_out = {row["instruction"] for row in validation}
    return {
        "train": [row for row in train if row["instruction"] not in held_out],
        "validation": validation,
        "test": pick(read("test"), "test"),
    }
