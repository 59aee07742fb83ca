"""Talking to a model, and comparing two."""

from __future__ import annotations

import argparse
import csv
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from ows_lightning.cli.chat import add_generation_flags
from ows_lightning.cli.conversation import load_conversation
from ows_lightning.cli.main import main
from tests.cli.test_cli import config, run, whole_config  # noqa: F401
from tests.data.samples import tiny_tokenizer
from tests.distributed.launch import Launch
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Sends lines to `chat`, and returns what it wrote to standard output."""

    def chat(model: Path, *lines: str, flags: str = "") -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        main(["chat", str(model), "--max_new_tokens", "4", *flags.split()])
        return capsys.readouterr().out

    return chat


def test_the_conversation_is_kept_until_it_is_reset(model_dir: Callable[..., Path], say: Callable[..., str]) -> None:
    model = model_dir(max_position_embeddings=512)
    once, twice = say(model, "who are you?"), say(model, "who are you?", "who are you?")
    assert twice.startswith(once)
    assert twice != once + once  # the second answer knows of the first
    assert say(model, "who are you?", "/reset", "who are you?") == once + once
    with_system = say(model, "/system be kind", "who are you?")
    assert with_system == say(model, "who are you?", flags="--system kind") or with_system != once
    assert say(model, "who are you?", "/exit", "who are you?") == once
    assert say(model, "", "/nonsense", "who are you?") == once


def test_draws_follow_the_seed(model_dir: Callable[..., Path], say: Callable[..., str]) -> None:
    model = model_dir()
    drawn = [say(model, "who?", flags=f"--temperature 2.0 --top_k 50 --seed {seed}") for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_long_conversation_loses_its_oldest_turns(model_dir: Callable[..., Path], say: Callable[..., str]) -> None:
    model = model_dir(max_position_embeddings=128)
    assert len(say(model, *["who are you?"] * 12).splitlines()) >= 12


def test_a_template_without_system_messages_gets_them_in_the_question(
    model_dir: Callable[..., Path], say: Callable[..., str]
) -> None:
    model = model_dir(template="gemma")
    assert len(say(model, "who?", "/system be kind", "who are you?").splitlines()) == 2


def test_a_conversation_that_the_template_refuses_goes_on(
    model_dir: Callable[..., Path], say: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_dir()
    template = "{% if messages[-1]['content'] == 'no' %}{{ raise_exception('not that') }}{% endif %}"
    file = model / "chat_template.jinja"
    file.write_text(template + file.read_text())
    once = say(model, "who are you?")
    assert say(model, "no", "who are you?") == once


def test_answers_end_with_the_turn_where_the_model_does_not_say_so(model_dir: Callable[..., Path]) -> None:
    model = model_dir(template="phi3")
    parser = argparse.ArgumentParser()
    add_generation_flags(parser)
    conversation = load_conversation(str(model), parser.parse_args([]))
    ends = conversation.model.generation_config.eos_token_id
    assert conversation.tokenizer.convert_tokens_to_ids("<|end|>") in (ends if isinstance(ends, list) else [ends])


def test_a_stop_that_the_tokenizer_lacks_is_none_of_its_tokens(model_dir: Callable[..., Path]) -> None:
    directory = model_dir()
    GenerationConfig(eos_token_id=[2, 10**6]).save_pretrained(directory)
    parser = argparse.ArgumentParser()
    add_generation_flags(parser)
    conversation = load_conversation(str(directory), parser.parse_args(["--max_new_tokens", "2", "--device", "cpu"]))
    assert 10**6 in conversation.model.generation_config.eos_token_id
    assert isinstance(conversation.ask("no?"), str)


def test_a_turns_end_is_no_part_of_it_where_its_token_is_not_special(model_dir: Callable[..., Path]) -> None:
    """The template writes one behind each turn that it is given again."""
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|eot|>")
    tokenizer.add_tokens(["<|eot|>"])
    directory = model_dir()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    parser = argparse.ArgumentParser()
    add_generation_flags(parser)
    conversation = load_conversation(str(directory), parser.parse_args(["--max_new_tokens", "4", "--device", "cpu"]))
    answer = torch.tensor([tokenizer("yes<|eot|>", add_special_tokens=False).input_ids])
    conversation.model.generate = lambda input_ids, **_: torch.cat([input_ids, answer], 1)  # as if it were a good model
    assert conversation.ask("no?") == "yes"
    assert conversation.turns[-1] == {"role": "assistant", "content": "yes"}


@pytest.mark.slow
def test_a_pipe_may_bring_anything(model_dir: Callable[..., Path], say: Callable[..., str], tmp_path: Path) -> None:
    model = model_dir()
    command = [sys.executable, str(ROOT / "main.py"), "chat", "--model", str(model), "--max_new_tokens", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    messages = b"who?\n\xff\xfe\x80\n" + "hé ☃\r\n".encode() + b"a" * 5000 + b"\nwho?"
    done = subprocess.run(command, input=messages, capture_output=True, env=environment, check=True)
    assert done.stdout.startswith(say(model, "who?").encode("ascii", "replace"))
    assert done.stdout.count(b"\n") == 4  # all but the longest are answered
    assert b"error: max_new_tokens: the message has " in done.stderr
    launch = Launch(command[2:], tmp_path / "closed", target=into_a_closed_pipe)
    assert launch.wait() == [1]
    assert "rror" not in launch.output


def into_a_closed_pipe(arguments: list[str]) -> None:
    """Runs a command whose output nobody reads any more, as with `| head`."""
    reading, writing = os.pipe()
    os.close(reading)
    sys.stdout = open(writing, "w")  # noqa: SIM115
    sys.stdin = io.StringIO("who?\n" * 3)
    main(arguments)


def test_a_run_what_is_in_it_and_the_folder_of_runs_are_one_model(
    config: Path,  # noqa: F811
    say: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("fit", config, "--trainer.max_steps", "2")
    answers = {
        say(Path("runs") / part, "is 3 odd?").splitlines()[-1]
        for part in ("", "version_0", "version_0/model", "version_0/checkpoints/last.ckpt")
    }
    shutil.rmtree("runs/version_0/model")  # as of a run that was interrupted: its newest checkpoint has the model
    assert answers == {say(Path("runs"), "is 3 odd?").splitlines()[-1]}
    main(["chat", "runs", "--max_new_tokens", "4"])
    assert "Written" not in capsys.readouterr().err  # of the model that it made of the checkpoint, and that is gone


def test_code_that_comes_with_a_model_runs_if_asked_for(
    model_dir: Callable[..., Path], say: Callable[..., str], add_own_code: Callable[[Path], None]
) -> None:
    model = model_dir()
    said = say(model, "who are you?")
    add_own_code(model)
    assert say(model, "who are you?", flags="--trust_remote_code") == said
    with pytest.raises(SystemExit, match="2"):
        say(model, "who are you?")


def test_compare_shows_both_and_the_report_too(config: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    run("fit", config, "--trainer.max_steps", "2")
    main(["compare", "--model", "runs", "--max_new_tokens", "4", "is 3 odd?", "is 4 odd?"])
    said = capsys.readouterr().out
    assert "tuned" in said
    with Path("runs/version_0/comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == ["is 3 odd?", "is 4 odd?"]
    assert all(row["base"] is not None and row["tuned"] is not None for row in rows)
    main(["report", "runs/version_0"])
    assert "Base and tuned model" in Path("runs/version_0/report/report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("chat", "--model"),
        ("chat x --model y", "give one model, as MODEL or as --model MODEL"),
        ("chat nothing.ckpt", "model: no such checkpoint"),
        ("chat --model x --temperature nan", "temperature: nan"),
        ("chat --model x --top_p 2", "top_p: 2.0"),
        ("chat --model x --top_k 5", "temperature: --top_k and --top_p matter"),
        ("chat --model x --top_p 0.9", "temperature: --top_k and --top_p matter"),
        ("compare --model x --base y --top_k 5 hello", "temperature: --top_k and --top_p matter"),
        ("report --port 8000 y", "--port is the port of --watch"),
        ("chat --model x --max_new_tokens 0", "max_new_tokens: 0"),
        ("chat --model x --device cuda:99", "device: 'cuda:99'"),
        ("chat --model ./no/such/model", "model.model_name_or_path: "),
        ("compare --model x hello", "base: "),
        ("compare --model y/z hello", "base: no run is known"),  # though y has a config.yaml
        ("compare --model x --base y", "compare: no prompt"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("y/z").mkdir(parents=True)
    Path("y/config.yaml").write_text("a: 1")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(SystemExit, match="2"):
        main(arguments.split())
    assert error in capsys.readouterr().err
