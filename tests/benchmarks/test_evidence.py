"""The studies: rates are chosen fairly, finished runs are kept, and tables come from the rows alone."""

import csv
import json
import math

import pytest
import yaml

from benchmarks.evidence import importance, ledger, tables, tasks
from benchmarks.evidence.__main__ import main
from benchmarks.evidence.runs import Run, _value
from benchmarks.evidence.schedule import choose_rate
from benchmarks.evidence.study import STUDIES, load
from ows_lightning.cli.lightning_cli import OWSCLI
from tests.data.samples import tiny_tokenizer
from tests.tiny import tiny_model

NAMES = sorted(path.stem for path in STUDIES.glob("*.yaml") if path.stem != "base")


class ParsingCLI(OWSCLI):
    def instantiate_classes(self):
        pass

    def _run_subcommand(self, subcommand):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_settings_of_every_method_are_known_to_the_command_line(name, monkeypatch, tmp_path):
    study = load(name)
    given = []
    monkeypatch.setattr("benchmarks.evidence.runs.main", lambda command, arguments, folder, threads: given.append(arguments))
    task = tasks.Task(tmp_path / "train.jsonl", tmp_path / "validation.jsonl", tmp_path / "test.jsonl", "accuracy")
    distinct = {m.configs + tuple(m.settings): m for m in study.methods}.values()  # thirty blocks are one case
    for method in distinct:
        Run(study, task, method, 1e-3, 7, 5, tmp_path, tmp_path / "run", 1)._fit(task.validation, 0)
        config = ParsingCLI(["fit", *given[-1]]).config.fit
        assert config.model.init_args.optimizer.init_args.lr == 1e-3
        assert config.seed_everything == 7
        assert config.trainer.max_steps == 5


@pytest.mark.parametrize("name", NAMES)
def test_seeds_that_choose_never_count(name):
    study = load(name)
    assert not set(study.seeds) & set(study.tune_seeds)
    assert all(b / a <= 4 for a, b in zip(study.rates, study.rates[1:], strict=False))


def test_a_seed_that_chooses_and_counts_is_refused(tmp_path):
    content = yaml.safe_load((STUDIES / "methods.yaml").read_text())
    content["tune_seeds"] = content["seeds"][:1]
    (tmp_path / "unfair.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="choose a rate and count"):
        load(str(tmp_path / "unfair.yaml"))


@pytest.mark.parametrize("best", [1e-5, 3e-4, 1e-2])
def test_the_grid_grows_until_the_best_rate_lies_within(best):
    tried = []

    def loss(rate):
        tried.append(rate)
        return abs(math.log(rate / best))

    chosen = choose_rate((1e-4, 3e-4, 1e-3), loss)
    assert abs(math.log(chosen / best)) < math.log(3) / 2 + 0.2
    assert min(tried) < chosen < max(tried)


def test_a_rate_at_the_edge_of_every_grid_is_refused():
    with pytest.raises(RuntimeError, match="edge"):
        choose_rate((1e-4, 3e-4, 1e-3), lambda rate: -rate)
    with pytest.raises(RuntimeError, match="breaks down"):
        choose_rate((1e-4, 3e-4, 1e-3), lambda rate: math.inf)


@pytest.mark.parametrize("name", tasks.GENERATED)
def test_splits_of_a_task_share_no_question(name, tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(tasks, "TRAIN_ROWS", 300)
    task = tasks.make(name, tmp_path, {"validation": 128, "test": 256}, None)
    splits = [{json.loads(line)["instruction"] for line in path.read_text().splitlines()} for path in task[:3]]
    assert [len(split) for split in splits] == [300, 128, 256]
    assert len(set.union(*splits)) == sum(map(len, splits))


def rows(path, losses):
    counted = ledger.Ledger(path, ledger.COUNTED)
    for method, by_seed in losses.items():
        for seed, loss in enumerate(by_seed):
            figures = dict.fromkeys(ledger.COUNTED, 1.0) | {"task": "t", "method": method, "seed": seed, "test_loss": loss}
            counted.add({**figures, "commit": "c"})
    return counted


def test_tables_are_made_from_the_rows_alone(tmp_path):
    rows(tmp_path / "s.csv", {"ows": [0.5, 0.6, 0.7], "full": [0.9, 1.0, 1.1], "lora": [0.5, 0.7, 0.6], "before": [3.0]})
    values, before = tables.of_task(ledger.Ledger(tmp_path / "s.csv", ledger.COUNTED), "t")
    assert before["test_loss"] == 3.0
    table = tables.task_table(values, before, "ows")
    assert "0.600 ± 0.248 (sd 0.100)" in table  # t(0.975, 2) = 4.303, times 0.1 / sqrt(3)
    assert "+0.400 (+0.400 to +0.400)" in table
    order = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert order == ["ows", "lora", "full", "before training"]


def test_holm_multiplies_the_smallest_by_most_and_keeps_the_order():
    adjusted = tables.adjusted({"a": 0.01, "b": 0.04, "c": 0.03, "d": math.nan})
    assert adjusted["a"] == pytest.approx(0.03)
    assert adjusted["c"] == pytest.approx(0.06)
    assert adjusted["b"] == pytest.approx(0.06)  # not below that of the smaller p
    assert math.isnan(adjusted["d"])


def test_scores_that_rank_as_the_gains_correlate_fully(tmp_path):
    importance.write_scores(tmp_path / "scores.csv", {"good": [1.0, 2.0, 3.0, 4.0], "bad": [2.0, 1.0, 4.0, 3.0]})
    table = importance.correlations([0.1, 0.2, 0.4, 0.8], [0, 1, 2, 3], importance.read_scores(tmp_path / "scores.csv"))
    assert "| good | +1.00 |" in table


@pytest.mark.slow
def test_a_study_runs_and_goes_on_from_its_rows(tmp_path, monkeypatch, capsys):
    pytest.importorskip("reasoning_gym")
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), num_hidden_layers=2, hidden_size=16, intermediate_size=32)
    model.save_pretrained(tmp_path / "my-model")
    tokenizer.save_pretrained(tmp_path / "my-model")
    content = yaml.safe_load((STUDIES / "sensitivity.yaml").read_text())
    content |= {"rates": [1e-3, 1e-2, 1e-1], "seeds": [0], "reference": "small", "batch_size": 2}
    content["methods"] = {"small": {"configs": ["methods/ows"], "set": {"sampling.activated_layers": 1, "model.rank": 4}}}
    content |= {"settings": {"sampling.threshold": 2.0}, "held_out_rows": {"validation": 8, "test": 8}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(tasks, "TRAIN_ROWS", 40)
    arguments = [str(tmp_path / "tiny.yaml"), "--model", str(tmp_path / "my-model"), "--budget", "40"]
    arguments += ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work"), "--jobs", "2"]
    chosen = ledger.Ledger(tmp_path / "results" / "tiny_rates.csv", ledger.TUNED)  # rates that another machine has tried
    for rate, loss in ((1e-3, 3.0), (1e-2, 2.0), (1e-1, 2.5)):
        row = {"task": "family_relationships", "method": "small", "lr": rate, "seed": 101, "steps": 7}
        chosen.add({**row, "validation_loss": loss, "commit": ""})
    main(arguments)
    table = capsys.readouterr().out
    assert "| small |" in table
    with (tmp_path / "results" / "tiny.csv").open() as file:
        before, after = csv.DictReader(file)
    assert before["method"] == "before"
    assert float(after["test_loss"]) < float(before["test_loss"])
    assert float(after["flops"]) > 0
    assert float(after["lr"]) == 1e-2

    files = {path: path.read_text() for path in (tmp_path / "results").glob("*.csv")}
    main(arguments)
    assert {path: path.read_text() for path in (tmp_path / "results").glob("*.csv")} == files


def test_values_stand_as_yaml_has_them():
    assert [_value(value) for value in (None, True, 0.5, [])] == ["null", "true", "0.5", "[]"]
