"""liger-kernel's kernels: refused where they can't run, and the same result where they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ows_lightning.cli.main import main
from ows_lightning.errors import UsageError
from ows_lightning.models.execution import liger_for
from ows_lightning.models.pretrained import load_config

INSTALLED = find_spec("liger_kernel") is not None


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs the extra liger")
def test_a_model_computes_the_same_with_fused_kernels() -> None:
    if tuple(map(int, version("liger-kernel").split(".")[:2])) != (0, 7):
        pytest.skip("of liger-kernel, 0.7 runs in Triton's interpreter")
    run = [sys.executable, "-m", "tests.models.interpreted"]
    done = subprocess.run(run, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["losses"][0] == pytest.approx(found["losses"][1], abs=1e-5)
    assert found["gradients"] < 1e-5
    assert all("Liger" in name for name in found["fused"])
    assert found["same_weights"]
    assert not found["head"]
    assert found["later"] == ["LlamaRMSNorm", "LlamaMLP"]
    assert found["launched"] == [1, 0]  # none by a prediction, whose tensors have no memory


@pytest.mark.skipif(INSTALLED, reason="the extra liger is there")
def test_the_missing_extra_is_named(
    model_dir: Callable[..., Path], rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", f"--model.model_name_or_path={model_dir()}", "--model.kernels=liger", f"--data.dataset={rows_file}"])
    assert 'model.kernels: needs liger-kernel; pip install "ows_lightning[liger]"' in capsys.readouterr().err


@pytest.mark.skipif(not INSTALLED or torch.accelerator.is_available(), reason="needs the extra liger and no GPU")
def test_no_gpu_and_unknown_architectures_are_one_line(model_dir: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=r"^model.kernels: liger-kernel's kernels need a GPU"):
        liger_for(load_config(str(model_dir())))
    with pytest.raises(UsageError, match=r"^model.kernels: liger-kernel has none for gpt2; set it to null$"):
        liger_for(load_config(str(model_dir("gpt2"))))
