"""What a study is: a model, tasks, methods, rates, seeds and a budget, read from ``benchmarks/studies/NAME.yaml``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "benchmarks" / "studies"
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Method:
    """A method: overlays of a config, in order, and keys that are set on top of them."""

    name: str
    configs: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Round:
    """Runs that are made before those of the next round: methods on tasks, the seeds by turns."""

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        name: The file's name.
        question: What it asks.
        model: The model that all runs start from.
        precision: The Trainer's.
        tasks: Task -> target tokens of a run: the budget, equal for all methods. A task ``NAME@STEPS`` is NAME for that many
            optimizer steps, and has a budget of its own, so that it has rates of its own, too.
        batch_size: Rows in an optimizer step.
        methods: What is compared.
        reference: The method that the others are compared with.
        rates: The grid of learning rates, for methods without their own; widened while the best lies at an edge; or the one
            that all of them get.
        tune_seeds: Seeds of the runs that choose the rate, on the validation split.
        tune_on: The methods that choose one rate for all; empty where each method has its own.
        seeds: Seeds of the runs that count, on the test split; none of them is in ``tune_seeds``.
        settings: Keys that are set in all runs.
        evaluation_rows: Rows of the validation and of the test split.
        exact_match_rows: How many of the test rows are answered in generated text, where the task is scored so.
        forgetting: Whether the loss on unrelated text is measured after each run.
        rounds: The order of the runs, so that a study that is stopped has finished what comes first. A task without rounds
            has one of all methods.
        shorter: A study of the same tasks in shorter runs, whose rows stand beside these by length; empty for none.
    """

    name: str
    question: str
    model: str
    precision: str
    tasks: dict[str, int | None]
    batch_size: int
    methods: tuple[Method, ...]
    reference: str
    rates: tuple[float, ...]
    tune_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    tune_on: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    evaluation_rows: dict[str, int] = field(default_factory=lambda: {"validation": 128, "test": 256})
    exact_match_rows: int = 128
    forgetting: bool = True
    rounds: tuple[Round, ...] = ()
    shorter: str = ""

    def __post_init__(self) -> None:
        if shared := set(self.seeds) & set(self.tune_seeds):
            raise ValueError(f"{self.name}: seeds {sorted(shared)} choose a rate and count, too; give others")
        names = [method.name for method in self.methods]
        in_rounds = {name for each in self.rounds for name in each.methods}
        if missing := {self.reference, *self.tune_on, *in_rounds} - set(names):
            raise ValueError(f"{self.name}: no method is called {sorted(missing)[0]!r}; methods: {', '.join(names)}")
        for rates in (self.rates, *(method.rates for method in self.methods if method.rates)):
            if len(rates) in (0, 2) or list(rates) != sorted(set(rates)):
                raise ValueError(f"{self.name}: rates {list(rates)} must be three or more, ascending, or one that is given")

    def method(self, name: str) -> Method:
        """Returns a method by its name."""
        return next(method for method in self.methods if method.name == name)

    def order(self) -> list[Round]:
        """Returns the rounds, each of one of the study's tasks."""
        without = self.tasks.keys() - {task for each in self.rounds for task in each.tasks}
        everything = Round(
            tuple(task for task in self.tasks if task in without), tuple(m.name for m in self.methods), self.seeds
        )
        rounds = (*self.rounds, everything)
        return [Round((task,), each.methods, each.seeds) for each in rounds for task in each.tasks if task in self.tasks]


def load(name: str) -> Study:
    """Reads a study by its name, or from a file.

    ``each_block: {count: N, ...}`` among the methods stands for N methods ``block_00``, ``block_01``, ..., each of which
    trains that block alone.

    Raises:
        FileNotFoundError: There is no such study; names those that there are.
        ValueError: A seed both chooses and counts, a method is missing, or a grid has two rates or none.
    """
    path = Path(name) if name.endswith(".yaml") else STUDIES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in STUDIES.glob("*.yaml") if file.stem != "base"))
        raise FileNotFoundError(f"no study '{name}'; studies: {known}")
    content = yaml.safe_load(path.read_text())
    content["methods"] = tuple(_methods(content["methods"]))
    for key in ("rates", "tune_seeds", "tune_on", "seeds"):
        content[key] = tuple(content.get(key, ()))
    content["rounds"] = tuple(_round(described, content["seeds"]) for described in content.get("rounds", ()))
    if missing := {task for each in content["rounds"] for task in each.tasks} - content["tasks"].keys():
        raise ValueError(f"{path.stem}: a round has the task {sorted(missing)[0]!r}, which is not among the tasks")
    return Study(name=path.stem, **content)


def model_directory(name: str, folder: Path) -> Path:
    """Converts a GGUF file once into a directory that loads fast; returns that directory, or another model's name as it is."""
    if not name.endswith(".gguf"):
        return Path(name)
    import torch

    from ows_lightning.models.export import save_huggingface
    from ows_lightning.models.pretrained import load_model, load_tokenizer

    directory = folder / name.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    if not (directory / "config.json").is_file():
        save_huggingface(load_model(name, torch.float32), load_tokenizer(name), directory)
    return directory


def _round(described: dict[str, list[Any]], seeds: tuple[int, ...]) -> Round:
    return Round(tuple(described["tasks"]), tuple(described["methods"]), tuple(described.get("seeds", seeds)))


def _methods(described: dict[str, dict[str, Any]]) -> list[Method]:
    methods = []
    for name, keys in described.items():
        configs, settings, rates = tuple(keys.get("configs", ())), keys.get("set", {}), tuple(keys.get("rates", ()))
        if name != "each_block":
            methods.append(Method(name, configs, settings, rates))
            continue
        for block in range(keys["count"]):
            alone = {"sampling.distribution": [float(other == block) for other in range(keys["count"])]}
            methods.append(Method(f"block_{block:02d}", configs, {**settings, **alone}, rates))
    return methods
