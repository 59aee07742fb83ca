"""The limit that is read from a model's structure, against the model itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ows_lightning.cli.main import main
from ows_lightning.models.pretrained import exceeded_position_limit
from tests.tiny import ARCHITECTURES, tiny_model

POSITIONS = 40
_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 1,
    "is_decoder": True,
}
_DECODER = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 32, "encoder_layers": 1}
_OTHERS: dict[str, dict[str, Any]] = {
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "ctrl": {"dff": 32},
    "mpt": {"max_seq_len": POSITIONS, "d_model": 32, "n_heads": 4, "n_layers": 2},
    "xglm": {"ffn_dim": 32, "d_model": 32},
    "biogpt": {},
    "openai-gpt": {},
    "gpt_bigcode": {},
    "roberta": {},
    "bert": {},
    "electra": {"embedding_size": 32},
    "roformer": {"embedding_size": 32},
    "xlm": {},
    "bart": _DECODER,
    "pegasus": _DECODER,
    "marian": {**_DECODER, "decoder_start_token_id": 2},
    "phi": {},
}


def takes(model: torch.nn.Module, length: int) -> bool:
    ids = torch.full((1, length), 5)
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *_OTHERS])
def test_the_limit_is_that_of_the_model_itself(architecture: str) -> None:
    if architecture in _OTHERS:
        config = AutoConfig.for_model(architecture, **{**_SIZES, **_OTHERS[architecture]})
        model = AutoModelForCausalLM.from_config(config).eval()
    else:
        lengths = {} if architecture == "bloom" else {"max_position_embeddings": POSITIONS}
        model = tiny_model(architecture, **lengths).eval()
    limit = exceeded_position_limit(model.config, 2 * POSITIONS)
    if limit is None:
        assert takes(model, 2 * POSITIONS)
    else:
        assert takes(model, limit)
        assert not takes(model, limit + 1)
        assert exceeded_position_limit(model.config, limit) is None
        assert exceeded_position_limit(model.config, limit + 1) == limit


@pytest.mark.parametrize(
    ("command", "settings", "said"),
    [
        ("fit", [], "data.dataset has a row of"),
        ("fit", ["--data.packing", "true"], "packed rows have 200 tokens"),
        ("fit", ["--data.streaming", "true", "--data.val_size", "0"], "rows of a stream may have 200 tokens"),
        ("validate", [], "data.dataset has a row of"),
        ("predict", [], "a prompt has"),
    ],
)
def test_rows_beyond_the_positions_are_one_line_before_weights_are_loaded(
    model_dir: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    settings: list[str],
    said: str,
) -> None:
    directory = model_dir("gpt2", max_position_embeddings=48)
    if command != "predict":
        (directory / "model.safetensors").write_bytes(b"no weights")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(('{"prompt": "' + "who is it? " * 20 + '", "completion": "me"}\n') * 8)
    arguments = [command, "--model.model_name_or_path", str(directory), "--data.dataset", str(rows), "--data.val_size", "2"]
    arguments += [
        "--data.max_seq_length",
        "200",
        "--model.rank",
        "4",
        "--trainer.accelerator",
        "cpu",
        "--trainer.max_steps",
        "1",
    ]
    arguments += ["--trainer.default_root_dir", str(tmp_path / "runs"), "--trainer.max_steps", "1", "--sampling", "null"]
    arguments += settings
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "data.max_seq_length" in line)
    assert said in line
    assert "the model has positions for 48; set data.max_seq_length: " in line
