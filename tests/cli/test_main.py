"""The entry: what a command loads, and what its help says."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ows_lightning.cli.main import CONFIG_COMMANDS, OTHER_COMMANDS, main, usage
from tests.tiny import tiny_model

HEAVY = {"torch", "lightning", "transformers", "datasets", "peft", "matplotlib", "scipy", "pyarrow"}
MAIN = f"""
import sys
from ows_lightning.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print("loaded:", *sorted({HEAVY} & {{*sys.modules}}))
"""
MODEL = "--model.model_name_or_path=x"
DATA = "--data.dataset=y"


def loaded(*words: str) -> tuple[str, set[str]]:
    """What a command prints in a new interpreter, and the heavy libraries that it loaded."""
    ended = subprocess.run([sys.executable, "-c", MAIN, *words], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    said, _, names = ended.stdout.rpartition("loaded:")
    return said, {*names.split()}


@pytest.mark.parametrize("command", [*CONFIG_COMMANDS, *OTHER_COMMANDS])
def test_help_loads_no_library(command: str) -> None:
    said, libraries = loaded(command, "--help")
    assert said.startswith(f"usage: ows-lightning {command}")
    assert libraries == set()


@pytest.mark.parametrize(("started", "program"), [("main.py", "python main.py"), ("/usr/bin/ows-lightning", "ows-lightning")])
def test_the_program_that_was_called_is_named(started: str, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [started])
    assert usage().startswith(f"usage: {program} COMMAND")
    assert f"`{program} COMMAND --help`" in usage()


@pytest.mark.parametrize("words", ["--help", "configs"])
def test_what_needs_no_library_loads_none(words: str) -> None:
    said, libraries = loaded(words)
    assert said.count("\n") > 3
    assert libraries == set()


@pytest.mark.parametrize(
    "text", ["`is_gradient_checkpointing` is deprecated", "`isinstance(treespec, LeafSpec)` is deprecated"]
)
def test_deprecated_calls_of_libraries_are_not_shown(text: str) -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        main(["configs"])
        warnings.warn(text, FutureWarning, stacklevel=1)
        warnings.warn("something else is deprecated", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["something else is deprecated"]


def test_output_whose_reader_has_left_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tiny_model("llama", num_hidden_layers=6).config.save_pretrained(tmp_path)
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as nobody_reads:
        monkeypatch.setattr("sys.stdout", nobody_reads)
        with pytest.raises(SystemExit) as ended:
            main(["plan", "--config", "llama2_7b", "--method", "ows", "--model.model_name_or_path", str(tmp_path)])
    assert ended.value.code == 1
    assert "error" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_plan_loads_neither_datasets_nor_peft() -> None:
    said, libraries = loaded("plan", "--config", "quickstart", "--method", "ows")
    assert "Fits as it is: " in said
    assert not libraries & {"datasets", "peft"}


def keys(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The options of a config, where it has sections that describe a class their arguments."""
    for name, value in config.items():
        if prefix.count(".") < 2 and isinstance(value, dict):
            yield from keys(value.get("init_args", value), f"{prefix}{name}.")
        elif name != "class_path":
            yield f"--{prefix}{name}"


@pytest.mark.parametrize("command", ["fit", "plan", "export"])
def test_help_names_every_key(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    needed = ["--ckpt_path=z"] if command == "export" else []
    with pytest.raises(SystemExit, match="0"):
        main([command, MODEL, DATA, "--sampling.seed=1", *needed, "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(every := {*keys(config)}) > 90
    assert every <= {line.split()[0] for line in lines if line}


def test_help_names_the_defaults_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", MODEL, DATA, "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    main(["fit", "--help"])
    said = capsys.readouterr().out
    assert f"--model.optimizer.lr float (default: {config['model']['init_args']['optimizer']['init_args']['lr']})" in said
    assert f"(default: {config['checkpoint']['save_last']})" in said.partition("--checkpoint.save_last")[2].splitlines()[0]


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "export"])
def test_help_offers_only_checkpoints_that_the_command_takes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([command, "--help"])  # Lightning's own words offer `best`, which is refused
    said = capsys.readouterr().out.partition("--ckpt_path ")[2].partition("\n--")[0]
    assert "last" in said
    assert "best" not in said


def test_help_says_that_checkpoints_are_always_read_safely(capsys: pytest.CaptureFixture[str]) -> None:
    main(["test", "--help"])  # Lightning's own words say nothing but the default
    assert capsys.readouterr().out.partition("--weights_only ")[2].splitlines()[1].startswith("  Changes nothing: ")
