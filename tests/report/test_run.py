from __future__ import annotations

import json
import math
import shutil

import pytest

from ows_lightning.cli.folder_commands import report
from ows_lightning.errors import UsageError
from ows_lightning.optim import GaLoreAdamW
from ows_lightning.report import RunRecord
from ows_lightning.report.model_card import model_card
from ows_lightning.report.tables import block_frequency_table, blocks_table, key_figures, write_csv
from ows_lightning.sampling.sampler import BlockSampler
from tests.tiny import tiny_model


def test_reads_what_a_run_left(tmp_path, make_run):
    run = RunRecord.read(make_run(tmp_path / "ows", steps=100))
    assert run.name == "ows"
    assert run.scores["threshold"] == 13.0
    assert [draw[:2] for draw in run.history] == [(0, 0), (1, 50)]
    assert all(len(draw.blocks) == 5 for draw in run.history)
    assert run.config["sampling"]["activated_layers"] == 5
    # 10 rows of training and 2 of validation: each has holes where the other has values.
    assert len(run.metrics["step"]) == 12
    assert run.metrics["val_loss"].count(None) == 10
    assert run.metrics["train_loss"].count(None) == 2


def test_full_fine_tuning_has_no_scores_and_no_history(tmp_path, make_run):
    run = RunRecord.read(make_run(tmp_path / "full", sampled=False))
    assert run.scores is None
    assert run.history == []
    assert key_figures(run)["sampling"] == "none"


def test_takes_the_newest_version_by_number(tmp_path, make_run):
    for version in (2, 9, 10):
        make_run(tmp_path / "lightning_logs" / f"version_{version}", steps=50)
    (tmp_path / "lightning_logs" / "version_11").mkdir()  # a run that was stopped before it logged
    (tmp_path / "lightning_logs" / "version_latest").mkdir()
    run = RunRecord.read(tmp_path / "lightning_logs")
    assert run.path.name == "version_10"
    assert run.name == "lightning_logs/version_10"


def test_a_run_is_not_hidden_by_those_that_evaluate_it(tmp_path, make_run):
    make_run(tmp_path / "version_0", sampled=False)
    for version, metric in enumerate(("test_loss", "val_loss"), start=1):
        (tmp_path / f"version_{version}").mkdir()
        (tmp_path / f"version_{version}" / "metrics.csv").write_text(f"epoch,step,{metric}\n0,0,2.0\n")
    assert RunRecord.read(tmp_path).path.name == "version_0"
    shutil.rmtree(tmp_path / "version_0")
    assert RunRecord.read(tmp_path).path.name == "version_2"


def test_validation_rows_get_tokens_and_time_of_their_step(tmp_path, make_run):
    run = RunRecord.read(make_run(tmp_path / "ows", steps=100, seconds_per_step=2.0))
    assert run.series("val_loss", "tokens")[0] == [50 * 1500, 100 * 1500]
    assert run.series("val_loss", "time_s")[0] == [100.0, 200.0]


def test_tokens_are_interpolated_between_logged_steps(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train_loss,val_loss,tokens\n10,2,,1000\n15,,1.5,\n20,1,,2000\n")
    assert RunRecord.read(tmp_path).series("val_loss", "tokens") == ([1500.0], [1.5])


def test_a_loss_that_is_not_a_number_stays_visible(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,val_loss\n10,2.0\n20,nan\n")
    figures = key_figures(RunRecord.read(tmp_path))
    assert math.isnan(figures["final_val_loss"])
    assert figures["best_val_loss"] == 2.0


def test_a_row_that_a_kill_cut_off_is_left_out(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train_loss,val_loss\n0,2.0,\n1,1.5,\n2,1.")
    (tmp_path / "generations.csv").write_text('step,prompt,answer\r\n0,who?,"a\rb\nc"\r\n', newline="")
    run = RunRecord.read(tmp_path)
    assert run.series("train_loss") == ([0.0, 1.0], [2.0, 1.5])
    assert [table["answer"] for table in run.texts.values()] == [["a\rb\nc"]]


def test_an_interval_that_a_resumed_run_wrote_again_counts_once(tmp_path):
    (tmp_path / "sampling_history.csv").write_text("interval,step,blocks\n0,0,1 2\n1,50,0 3\n1,50,2 3\n2,100,1 3\n")
    run = RunRecord.read(tmp_path)
    assert [draw.blocks for draw in run.history] == [(1, 2), (2, 3), (1, 3)]
    assert run.never_trained == [0]
    (tmp_path / "sampling_history.csv").write_text("interval,step,blocks\n0,0,2\n1,50,4\n")
    (tmp_path / "config.yaml").write_text("sampling:\n  resting_rank: 4\n")
    assert RunRecord.read(tmp_path).never_trained == [0, 1]  # block 3 has learned at rest


def test_blocks_that_trained_at_rest_have_trained_in_any_run(tmp_path):
    """Also where no config says so, as in transformers' Trainer."""
    model = tiny_model("llama", num_hidden_layers=6)
    sampler = BlockSampler(1, 1, "uniform", resting_rank=2, seed=0)
    sampler.attach(model)
    sampler.start(0, [GaLoreAdamW(model.parameters(), lr=1e-3)], lambda: sampler.compute_scores(model, None))
    sampler.write(tmp_path)
    run = RunRecord.read(tmp_path)
    [active] = sampler.active_blocks
    assert 0 < active < 4  # else the seed shows nothing
    assert run.history == [(0, 0, (active,))]
    assert run.resting == {0: tuple(range(active + 1, 6))}
    assert run.never_trained == list(range(active))
    assert blocks_table(run)["resting"] == [" ".join(map(str, range(active + 1, 6)))]


def test_key_figures(tmp_path, make_run):
    run = RunRecord.read(make_run(tmp_path / "ows", steps=100, seconds_per_step=2.0))
    figures = key_figures(run)
    trained = {block for draw in run.history for block in draw.blocks}
    assert figures["model"] == "meta-llama/Llama-2-7b-hf"
    assert figures["sampling"] == "outlier, 5 blocks every 50 steps"
    assert figures["optimizer"] == "GaLoreAdamW, lr 0.0003, rank 128"
    assert figures["steps"] == 100
    assert figures["tokens"] == 150_000
    assert figures["time_s"] == 200.0
    assert figures["final_val_loss"] == figures["best_val_loss"] == run.metrics["val_loss"][-1]
    assert set(map(int, figures["blocks_never_trained"].split())) == set(range(32)) - trained


def test_key_figures_of_a_lora_run(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,val_loss,val_exact_match\n9,1.5,0.25\n19,1.25,0.5\n")
    (tmp_path / "config.yaml").write_text(
        "model:\n  rank: null\n  lora: {r: 16}\n"
        "  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.0005}}\nsampling: null\n"
    )
    figures = key_figures(RunRecord.read(tmp_path))
    assert figures["optimizer"] == "AdamW, lr 0.0005, LoRA r 16"
    assert figures["val_exact_match"] == 0.5
    assert figures["peak_memory_mb"] is None


def test_the_speed_of_a_run_is_the_median_of_its_steps(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,tokens_per_second\n0,10\n1,900\n2,1000\n")
    assert key_figures(RunRecord.read(tmp_path))["median_tokens_per_second"] == 900


def test_steps_are_counted_from_whatever_the_run_has_left(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,val_loss\n9,1.5\n19,1.25\n")
    assert key_figures(RunRecord.read(tmp_path))["steps"] == 20
    (tmp_path / "metrics.csv").write_text("step,train_loss\n9,1.5\n")
    (tmp_path / "sampling_history.csv").write_text("interval,step,blocks\n0,0,1\n1,30,2\n")
    run = RunRecord.read(tmp_path)
    assert run.last_step == 30
    assert run.num_layers == 3  # block 2 is the highest that is known of


def test_sampling_by_weights_of_ones_own(tmp_path):
    (tmp_path / "sampling_history.csv").write_text("interval,step,blocks\n0,0,1\n")
    (tmp_path / "config.yaml").write_text(
        "sampling: {distribution: [1, 2], activated_layers: 1, interval_steps: 9, grouping: 0.5}\n"
    )
    assert key_figures(RunRecord.read(tmp_path))["sampling"] == "own weights, 1 blocks every 9 steps, grouping 0.5"
    (tmp_path / "config.yaml").write_text(
        "sampling: {distribution: uniform, activated_layers: 1, interval_steps: 9, resting_rank: 16}"
    )
    assert key_figures(RunRecord.read(tmp_path))["sampling"] == "uniform, 1 blocks every 9 steps, resting_rank 16"


def test_expected_shares_are_means_over_draws_of_different_sizes(tmp_path):
    """A quarter of the draws are of one block. Of two, a block's share is the sum over the pairs that hold it."""
    (tmp_path / "sampling_history.csv").write_text("interval,step,blocks\n0,0,1\n1,5,0 1\n2,9,1 2\n3,12,0 1\n")
    p = [0.5, 0.3, 0.2]
    for distribution, pairs in (
        ("window", {(0, 1): 0.8 / 1.3, (1, 2): 0.5 / 1.3}),
        ("outlier", {(i, j): p[i] * p[j] / (1 - p[i]) + p[i] * p[j] / (1 - p[j]) for i, j in ((0, 1), (0, 2), (1, 2))}),
    ):
        scores = {"distribution": distribution, "outlier_ratios": [5, 3, 2], "probabilities": p}
        (tmp_path / "outlier_scores.json").write_text(json.dumps(scores))
        expected = [p[i] / 4 + 0.75 * sum(chance for pair, chance in pairs.items() if i in pair) for i in range(3)]
        assert block_frequency_table(RunRecord.read(tmp_path))["expected_share"] == pytest.approx(expected)


def damage(name: str, content: str | bytes | None):
    def apply(folder):
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif content is not None:
            (folder / name).write_text(content)
        else:
            shutil.rmtree(folder)

    return apply


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage("", None), "no such folder; give the folder"),
        (
            damage("outlier_scores.json", '{"outlier_ratios": [0.1'),
            r"scores.json: damaged .*ows-lightning score",
        ),
        (damage("outlier_scores.json", "[1, 2]"), "outlier_scores.json: damaged"),
        (damage("outlier_scores.json", '{"outlier_ratios": [1], "probabilities": [0.5, 0.5]}'), "they have 1 and 2"),
        (
            damage("sampling_history.csv", "interval,step,blocks\n0,0,1 x\n"),
            r"history.csv: damaged \(line 2: invalid",
        ),
        (
            damage("sampling_history.csv", "interval,step,blocks\n0,0,3 32\n"),
            "interval 0 has a block that is not among the 32",
        ),
        (damage("sampling_history.csv", "interval,step\n0,0\n"), "there is no 'blocks'"),
        (damage("sampling_history.csv", "interval,step,blocks\n0,0\n"), "line 2 does not have 3 cells"),
        (damage("metrics.csv", "step,train_loss\n0,1.5\n1,abc\n"), "line 3: could not convert string to float: 'abc'"),
        (damage("metrics.csv", "step,train_loss\n0,1.5,7\n"), r"metrics.csv: damaged \(line 2 does not have 2 cells"),
        (damage("metrics.csv", b"step\n\xff\xfe\n"), "metrics.csv: damaged"),
        (damage("config.yaml", "model: [1,\n"), "config.yaml: damaged"),
        (damage("config.yaml", "just text"), "config.yaml: damaged .it holds no settings"),
    ],
)
def test_damage_is_named_in_one_line(tmp_path, make_run, harm, message):
    folder = make_run(tmp_path / "ows", steps=50)
    harm(folder)
    with pytest.raises(UsageError, match=message) as error:
        RunRecord.read(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_truth_values_that_a_user_logged_are_figures(tmp_path, make_run):
    folder = make_run(tmp_path / "ows", steps=50)
    damage("metrics.csv", "step,warm\n0,True\n1,False\n")(folder)
    assert RunRecord.read(folder).series("warm") == ([0.0, 1.0], [1.0, 0.0])


def test_texts_of_models_come_back(tmp_path, make_run):
    folder = make_run(tmp_path / "ows", steps=50)
    texts = {"prompt": ["a, b"], "base": ["one\rtwo"], "tuned": ['"']}
    write_csv(texts, folder / "comparison.csv")
    assert RunRecord.read(folder).texts["Base and tuned model"] == texts


def test_a_card_claims_no_method_that_it_does_not_know(tmp_path, make_run):
    settings = {"model_name_or_path": "tiny", "rank": 8}
    assert "`tiny`, fine-tuned with ows_lightning." in model_card(settings, tmp_path)  # a checkpoint's own folder
    folder = make_run(tmp_path / "galore", steps=50, sampled=False)
    assert "`tiny`, fine-tuned with GaLore in ows_lightning." in model_card(settings, folder)


def test_a_home_folder_that_the_shell_left_is_where_the_report_goes(tmp_path, make_run, monkeypatch):
    make_run(tmp_path / "ows", steps=50)
    monkeypatch.setenv("HOME", str(tmp_path))
    report(["~/ows"])
    assert (tmp_path / "ows" / "report" / "report.html").is_file()


def test_a_card_of_a_checkpoint_says_whose_figures_it_has(tmp_path, make_run):
    settings = {"model_name_or_path": "tiny", "rank": 8}
    words = "checkpoint `step=20.ckpt`; the figures are those of the whole run"
    folder = make_run(tmp_path / "galore", steps=50, sampled=False)
    assert words in model_card(settings, folder, "step=20.ckpt")
    assert words not in model_card(settings, folder)
    assert words not in model_card(settings, tmp_path, "step=20.ckpt")  # which has no figures


@pytest.mark.parametrize(
    ("rank", "distribution", "method"),
    [
        (8, "outlier", "[OWS, Outlier-weighed Layerwise Sampling](https://arxiv.org/abs/2405.18380)"),
        (None, "outlier", "[OWS, Outlier-weighed Layerwise Sampling](https://arxiv.org/abs/2405.18380), in full rank"),
        (8, "uniform", "LISA (uniform layerwise sampling) and GaLore"),
        (None, "uniform", "LISA (uniform layerwise sampling)"),
        (8, "window", "layerwise sampling (distribution window) and GaLore"),
    ],
)
def test_a_card_names_the_method(rank, distribution, method, tmp_path, make_run):
    folder = make_run(tmp_path / "run", steps=50)
    (folder / "config.yaml").write_text(f"sampling: {{distribution: {distribution}}}\n")
    settings = {"model_name_or_path": "some/base", "rank": rank}
    card = model_card(settings, folder)
    assert f"`some/base`, fine-tuned with {method} in ows_lightning." in card
    assert "base_model: some/base" in card
    assert "fine-tuned with LoRA in" in model_card({**settings, "lora": {"r": 4}}, folder)


def test_a_card_shows_no_folders_of_the_machine(tmp_path, make_run):
    folder = make_run(tmp_path / "run", steps=50, model=str(tmp_path / "base"))
    (tmp_path / "base").mkdir()
    (folder / "config.yaml").write_text(f"data: {{dataset: [{tmp_path}/a.jsonl, ~/b.jsonl, me/c], seed: 1}}\n")
    card = model_card({"model_name_or_path": str(tmp_path / "base")}, folder)
    assert str(tmp_path) not in card
    assert "base_model" not in card
    assert "- a.jsonl\n  - b.jsonl\n  - me/c\n  seed: 1\n" in card


def test_figures_that_cannot_be_read_leave_a_model_its_card(tmp_path, make_run):
    folder = make_run(tmp_path / "ows", steps=50)
    damage("metrics.csv", "step,train_loss\n0,abc\n")(folder)
    assert "fine-tuned with" in model_card({"model_name_or_path": "tiny", "rank": 8}, folder)


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing of ours")
    with pytest.raises(UsageError, match="not a run folder, it has no metrics"):
        RunRecord.read(tmp_path)
