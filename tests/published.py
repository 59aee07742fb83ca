"""The scores of Llama-2-7B that the paper's authors publish: in percent, block 0 first."""

from __future__ import annotations

import json
from pathlib import Path

LLAMA_2_7B: list[float] = json.loads((Path(__file__).parents[1] / "configs" / "scores" / "llama2_7b.json").read_text())[
    "outlier_ratios"
]
