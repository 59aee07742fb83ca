"""Every model type of transformers trains, exports and reloads to equal logits, or is refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tests.models.architectures import PAGE, generalised, model_types, try_out

_TEXT = PAGE.read_text()
_SAME_VERSION = f"transformers {transformers.__version__} " in _TEXT


@pytest.mark.parametrize(
    "kind",
    [kind if kind in ("llama4_text", "mamba", "modernbert-decoder") else pytest.param(kind, marks=pytest.mark.slow)
     for kind in model_types()],
)  # fmt: skip
def test_trains_and_exports_or_is_refused_as_the_docs_say(kind: str, tmp_path: Path) -> None:
    outcome, reason = try_out(kind, tmp_path)  # anything but a UsageError is raised
    if _SAME_VERSION:
        (line,) = (line for line in _TEXT.splitlines() if f"`{kind}`" in line)
        assert line.endswith(f"| {generalised(kind, reason)} |") if outcome == "refused" else not line.startswith("|")
