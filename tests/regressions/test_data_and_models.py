"""What people report of losses, data, exports and planning elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from ows_lightning.cli.main import main
from ows_lightning.data import InstructionDataModule
from ows_lightning.data.rows import collate, join_documents
from ows_lightning.errors import UsageError
from ows_lightning.models.export import save_huggingface
from ows_lightning.models.pretrained import load_model, load_tokenizer
from ows_lightning.module import CausalLMModule
from tests.data.samples import tiny_tokenizer
from tests.regressions.runs import fit, rows
from tests.tiny import tiny_batch, tiny_model

ModelDir = Callable[..., Path]


def test_lightning_20350(model_dir: ModelDir, tmp_path: Path) -> None:
    """Lightning 20350: under accumulation the loss is the mean of micro-batches, whatever their number of targets.

    Here it is the mean over the step's targets: micro-batches of 1 to 8 targets give the loss of one batch.
    """
    directory, losses = str(model_dir(num_hidden_layers=2)), []

    class Losses(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            losses.append(trainer.callback_metrics["train_loss"].item())

    def adamw(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=1e-3)

    for batch_size, accumulated in ((8, 1), (1, 8)):
        module = CausalLMModule(directory, rank=None, optimizer=adamw)
        settings: dict[str, Any] = {"uneven": True, "max_steps": 1, "accumulate_grad_batches": accumulated}
        fit(module, tmp_path, Losses(), batch_size=batch_size, **settings)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    model = load_model(directory).eval()
    per_row = [model(**{k: v[None] for k, v in row.items()}).loss.item() for row in rows(uneven=True)]
    assert losses[0] != pytest.approx(sum(per_row) / len(per_row), rel=1e-3)


def test_trl_3927(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """TRL 3927: all labels of a row are masked, and the loss is 0.

    Here a cut row keeps its answer, rows without a target are left out by name, and data without any is refused.
    """
    tokenizer, file = tiny_tokenizer(), tmp_path / "rows.jsonl"
    rows = [{"prompt": "who is the third? " * 50, "completion": "yes"}, {"prompt": "who?", "completion": ""}]

    def data() -> InstructionDataModule:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        made = InstructionDataModule(str(file), val_size=0, max_seq_length=16, batch_size=1, tokenizer=tokenizer)
        made.prepare_data()
        made.setup("fit")
        return made

    (batch,) = data().train_dataloader()
    assert "yes" in tokenizer.decode(batch["labels"][batch["labels"] != -100])
    assert any("left out: rows.jsonl line 2" in str(warning.message) for warning in recwarn)
    del rows[0]
    with pytest.raises(UsageError, match=r"none of 1 rows has a target token .*: rows.jsonl line 1"):
        data()


def test_trl_1230() -> None:
    """TRL 1230: packing lets the documents of a row see one another.

    Here a packed document has the logits that it has alone.
    """
    model = tiny_model("llama").eval()
    documents = [batch.tolist() for batch in tiny_batch(rows=3, length=9)["input_ids"]]
    packed = collate([join_documents([(ids, ids) for ids in documents], packed=True)], pad_token_id=0)
    packed.pop("labels")
    with torch.no_grad():
        together = model(**packed, use_cache=False).logits.view(3, 9, -1)
        alone = torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in documents])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def exported(model_dir: ModelDir, tmp_path: Path) -> tuple[Any, Path]:
    source = str(model_dir(template="llama3"))
    model = load_model(source)
    with torch.no_grad():
        next(model.parameters()).add_(0.01)
    save_huggingface(model, load_tokenizer(source), tmp_path / "exported")
    return model.eval(), tmp_path / "exported"


def test_litgpt_1359(model_dir: ModelDir, tmp_path: Path) -> None:
    """litgpt 1359: what was trained can't be loaded by other tools.

    Here the run's export is a plain Hugging Face directory that computes the same.
    """
    model, directory = exported(model_dir, tmp_path)
    ids = tiny_batch()["input_ids"]
    with torch.no_grad():
        expected, found = model(ids).logits, AutoModelForCausalLM.from_pretrained(directory)(ids).logits
    assert torch.equal(found, expected)


def test_llama_factory_10396(model_dir: ModelDir, tmp_path: Path) -> None:
    """LLaMA-Factory 10396: the exported model has lost its chat template.

    Here it is exported with the tokenizer, as it was trained.
    """
    _, directory = exported(model_dir, tmp_path)
    messages = [{"role": "user", "content": "who?"}]
    trained = tiny_tokenizer("llama3").apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    again = AutoTokenizer.from_pretrained(directory).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert again == trained


@pytest.mark.slow
def test_axolotl_848(model_dir: ModelDir, capsys: pytest.CaptureFixture[str]) -> None:
    """axolotl 848: nobody knows what memory a run needs before a GPU is rented.

    Here `plan` says it from the config, without weights.
    """
    directory = model_dir()
    (directory / "model.safetensors").write_bytes(b"no weights")
    model = ["--model.model_name_or_path", str(directory), "--model.rank", "4"]
    main(["plan", "--method", "ows", *model, "--data.dataset", "rows.jsonl"])
    said = capsys.readouterr().out
    assert "activations" in said
    assert "GB" in said
