"""The examples run as they stand, with a tiny model."""

from __future__ import annotations

import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from tests.data.samples import tiny_tokenizer
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TINY = [
    "--model.model_name_or_path=my-model", "--model.rank=4", "--model.max_new_tokens=2", "--sampling.threshold=2",
    "--sampling.activated_layers=5", "--data.exact_match_rows=2", "--data.eval_dataset=few.jsonl", "--trainer.max_steps=2",
    "--trainer.val_check_interval=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
]  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the configs, the examples, some rows, and a model of a few kilobytes."""
    for entry in ("configs", "examples"):
        (tmp_path / entry).symlink_to(ROOT / entry)
    rows = (EXAMPLES / "family_relationships" / "test.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(rows[:8]))
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), num_hidden_layers=6, hidden_size=16, intermediate_size=32)
    model.save_pretrained(tmp_path / "my-model")
    tokenizer.save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def test_a_module_of_ones_own(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("own_module.py", ["--model", "my-model", "--threshold", "2"], monkeypatch)
    assert capsys.readouterr().out.count("interval ") == 3


def test_a_plain_loop(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("plain_loop.py", ["--model", "my-model", "--rank", "4", "--threshold", "2"], monkeypatch)
    assert "step 5: loss" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("bare_runs")
def test_two_methods_compared(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = runpy.run_path(str(EXAMPLES / "compare_methods.py"))["main"](["ows", "galore"], *TINY)
    assert "galore" in Path(page).read_text()


def execute(notebook: Any, folder: Path) -> None:
    """Runs all cells; a kernel may take longer to start than the minute that it is given by default."""
    NotebookClient(notebook, timeout=900, startup_timeout=900, resources={"metadata": {"path": str(folder)}}).execute()


@pytest.mark.slow
def test_the_notebook(project: Path) -> None:
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    cell = next(cell for cell in notebook.cells if cell.source.startswith("flags = []"))
    cell.source = f"flags = {TINY!r}"
    execute(notebook, project)
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "interval 0, from step 0: blocks" in printed


@pytest.mark.slow
@pytest.mark.parametrize("in_clone", [True, False])
def test_the_notebook_for_a_gpu(in_clone: bool, tmp_path: Path) -> None:
    if not in_clone and not (ROOT / ".git").exists():
        pytest.skip("there is no repository to clone")
    notebook = nbformat.read(EXAMPLES / "gpu_check.ipynb", as_version=4)
    (folder := tmp_path / "content").mkdir()
    flags = ["--device=cpu", "--parts=loss head", "--only=whole", *([] if in_clone else ["--minutes=0"])]
    for cell in notebook.cells:
        cell.source = cell.source.replace("flags = []", f"flags = {flags}")
        cell.source = cell.source.replace('Path("runs/gpu")', f"Path({str(tmp_path)!r})")
        cell.source = cell.source.replace('repository = ""', f"repository = {str(ROOT)!r}")
        cell.source = cell.source.replace('"install", "-q", *packages', '"--version"')  # all is there
    execute(notebook, EXAMPLES if in_clone else folder)
    assert (folder / "ows_lightning" / "benchmarks" / "gpu").exists() != in_clone
    shown = [
        output.data.get("text/markdown", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "data" in output
    ]
    assert "these figures mean nothing" in shown[0]
    assert ("no time was left" in shown[0]) != in_clone
    template = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "gpu.yml").read_text())
    assert f"template *{template['name']}*" in notebook.cells[-1].source


def test_the_slurm_script_names_files_that_are_there() -> None:
    words = shlex.split((EXAMPLES / "slurm.sh").read_text().splitlines()[-1])
    assert all((ROOT / word).is_file() for word in words if word.endswith((".py", ".yaml")))
