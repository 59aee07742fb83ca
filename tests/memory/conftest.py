"""The model that memory and compute are predicted of."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.samples import tiny_tokenizer
from tests.memory.test_plan import SHAPE
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama", **SHAPE).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
