"""Where config files are found, how they stand on one another, and what is wrong with one."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ows_lightning import CausalLMModule, InstructionDataModule
from ows_lightning.cli.config_files import SHIPPED_FOLDER, config_and_bases, find_config, shipped_configs, shipped_data
from ows_lightning.cli.main import main
from ows_lightning.errors import UsageError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["main.py"])


@pytest.mark.parametrize(
    "name", ["models/llama2_7b", "llama2_7b", "configs/models/llama2_7b.yaml", "configs/llama2_7b.yaml", "llama2_7b.yaml"]
)
def test_a_shipped_config_has_a_name(name: str) -> None:
    assert find_config(name) == dict(shipped_configs())["models/llama2_7b"]


def test_a_file_here_comes_before_a_shipped_one() -> None:
    Path("quickstart.yaml").write_text("seed_everything: 1\n")
    assert find_config("quickstart.yaml") == Path("quickstart.yaml")
    assert find_config("quickstart") == dict(shipped_configs())["quickstart"]


def test_a_folder_does_not_hide_a_shipped_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart").mkdir()
    Path("mine").mkdir()
    assert find_config("quickstart") == dict(shipped_configs())["quickstart"]
    for name, said in (("mine", "is a folder"), ("~nobody-of-that-name/x.yaml", "no such file"), ("x" * 300, "no such file")):
        with pytest.raises(UsageError, match=said):
            find_config(name)


def test_a_config_stands_on_another() -> None:
    Path("mine").mkdir()
    Path("mine/first.yaml").write_text("base: llama2_7b\nseed_everything: 1\n")
    Path("mine/second.yaml").write_text("base: first.yaml\nseed_everything: 2\n")
    assert [path.stem for path in config_and_bases("mine/second.yaml")] == ["base", "llama2_7b", "first", "second"]


def test_shipped_rows_are_found_in_lists_and_mappings() -> None:
    name, mine = "examples/family_relationships/test.jsonl", "mine.jsonl"
    shipped = str(SHIPPED_FOLDER / name)
    assert shipped_data(name) == shipped
    assert shipped_data([mine, name]) == [mine, shipped]
    assert shipped_data({name: 2.0, mine: 1.0}) == {shipped: 2.0, mine: 1.0}


def test_configs_lists_each_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [name for name, _ in shipped_configs()]
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("seed_everything: 1\ndata: {val_size: 1}\nseed_everything: 2\n", "'seed_everything' on line 1 and again on line 3"),
        ("data:\n  val_size: 1\n  batch_size: 2\n  val_size: 3\n", "'val_size' on line 2 and again on line 4"),
        ("trainer: {callbacks: [{class_path: A, class_path: B}]}\n", "'class_path' on line 1"),
        ("- 1\n", "keys and values"),
        ("base: mine.yaml\n", "is its own base"),
        ("base: 3\n", "no such file '3'"),
        ("base: nothing.yaml\n", "no such file 'nothing.yaml'"),
    ],
)
def test_a_file_that_would_be_misread_is_refused(text: str, error: str) -> None:
    Path("mine.yaml").write_text(text)
    with pytest.raises(UsageError, match=error):
        config_and_bases("mine.yaml")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("/dev/null", "is empty"),
        ("http://127.0.0.1/mine.yaml", "nothing is downloaded"),
        ("s3://bucket/mine.yaml", "nothing is downloaded"),
        ("llama2_7", "did you mean 'models/llama2_7b'"),
        ("llama3", "did you mean 'llama3_8b'"),
        ("", "is a folder"),
    ],
)
def test_what_is_no_config_file(name: str, error: str) -> None:
    with pytest.raises(UsageError, match=error):
        config_and_bases(name)


def test_another_optimizer_has_its_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    def settings(*words: str) -> dict[str, float]:
        with pytest.raises(SystemExit) as exit:
            main(["fit", "--model.model_name_or_path=x", "--data.dataset=y", *words, "--print_config"])
        assert exit.value.code == 0
        optimizer = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["optimizer"]
        return {key: optimizer["init_args"][key] for key in ("lr", "weight_decay")}

    own = {name: parameter.default for name, parameter in inspect.signature(torch.optim.NAdam).parameters.items()}
    nadam = {key: own[key] for key in ("lr", "weight_decay")}
    assert settings() == {"lr": 3e-4, "weight_decay": 0.0}
    assert settings("--model.optimizer.lr=1e-2") == {"lr": 1e-2, "weight_decay": 0.0}
    assert settings("--model.optimizer=torch.optim.NAdam") == nadam
    assert settings("--model.optimizer=NAdam", "--model.optimizer.lr=1e-5") == {**nadam, "lr": 1e-5}


class OwnData(InstructionDataModule):
    def __init__(self, dataset: str, batch_size: int = 3, seed: int = 5) -> None:
        super().__init__(dataset, batch_size=batch_size, seed=seed)


class OwnModule(CausalLMModule):
    def __init__(self, model_name_or_path: str, rank: int = 9, optimizer: Any = None) -> None:
        super().__init__(model_name_or_path, rank=rank, optimizer=optimizer)


def test_classes_of_the_users_have_their_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    classes = [f"--model={__name__}.OwnModule", f"--data={__name__}.OwnData"]
    with pytest.raises(SystemExit):
        main(["fit", *classes, "--model.model_name_or_path=x", "--data.dataset=y", "--print_config"])
    made = yaml.safe_load(capsys.readouterr().out)
    assert made["data"]["init_args"] == {"dataset": "y", "batch_size": 3, "seed": 5}
    assert made["model"]["init_args"]["rank"] == 9


def test_a_pipe_which_is_read_only_once_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match=r"is a folder, or a pipe, which is read once only; give the path of a YAML file"):
        config_and_bases(str(tmp_path / "pipe"))


@pytest.mark.parametrize(
    ("command", "of_another"),
    [
        ("plan", "verbose: true\ntasks: null\npush_to_hub: null"),
        ("validate", "tasks: null\nreturn_predictions: true\noutput: ."),
        ("fit", "verbose: false\nmethod: null\ncard: null\ndelta: false"),
    ],
)
def test_a_command_takes_the_config_that_another_one_wrote(
    command: str, of_another: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"base: quickstart\n{of_another}\nckpt_path: null\n")
    with pytest.raises(SystemExit) as ended:
        main([command, "--config", str(file), "--print_config"])
    assert not ended.value.code
    assert "activated_layers: 5" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["method: lora", "output: folder", "fit: {trainer: {max_steps: 7}}"])
def test_a_key_of_another_command_that_says_something_is_refused(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"base: quickstart\n{key}\n")
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", str(file), "--print_config"])
    assert "there is no such key" in capsys.readouterr().err


def test_a_base_of_two_files_is_laid_once(capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.yaml").write_text("base: quickstart\ndata: {dataset: mine.jsonl}\n")
    Path("fast.yaml").write_text("base: quickstart\nmodel: {optimizer: {init_args: {lr: 1.0}}}\n")
    for first, second in (("rows", "fast"), ("fast", "rows")):
        with pytest.raises(SystemExit):
            main(["fit", "--config", f"{first}.yaml", "--config", f"{second}.yaml", "--print_config"])
        made = yaml.safe_load(capsys.readouterr().out)
        assert made["data"]["init_args"]["dataset"] == "mine.jsonl"
        assert made["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1.0


def test_a_base_that_leads_back_by_another_path_is_refused() -> None:
    Path("cfg").mkdir()
    Path("cfg/mine.yaml").write_text("base: ../cfg/mine.yaml\n")
    with pytest.raises(UsageError, match="is its own base"):
        config_and_bases("cfg/mine.yaml")
