"""Exact match without generating what the loss has shown, against generating everything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from ows_lightning.data import InstructionDataModule
from ows_lightning.metrics.exact_match import TeacherForcedAnswers
from ows_lightning.module import CausalLMModule

ModelDir = Callable[..., Path]


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False)


def test_answers_are_the_generated_ones_or_known_to_differ(
    model_dir: ModelDir, tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """References are the model's own greedy answers, whole, cut, gone on with, and another one."""
    module = CausalLMModule(str(model_dir()), max_new_tokens=5)
    letters = module.tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"))
    head = module.language_model.get_output_embeddings().weight.data
    head[[token not in letters for token in range(len(head))]] = 0  # or it says what no text says again
    rows = tmp_path / "rows.jsonl"

    def write(outputs: list[str]) -> InstructionDataModule:
        pairs = [{"instruction": f"question {i}?", "output": output} for i, output in enumerate(outputs)]
        rows.write_text("".join(json.dumps(row) + "\n" for row in pairs))
        return InstructionDataModule(str(rows), eval_dataset=str(rows), exact_match_rows=len(pairs), eval_batch_size=3)

    predicted = trainer.predict(module, write(["x"] * 8))
    said = [row["generated"].strip() for batch in predicted or [] for row in batch]
    data = write([said[0], said[1], said[2][:-2] or "x", said[3] + " and more", "wrong", "x", said[6], said[7][:1] or "x"])
    expected = sum(
        row["generated"].strip() == row["reference"].strip() for b in trainer.predict(module, data) or [] for row in b
    )
    generated = []
    generate = CausalLMModule.generate

    def noted(self: CausalLMModule, batch: dict[str, Any]) -> list[str]:
        generated.extend(batch["input_ids"])
        return generate(self, batch)

    monkeypatch.setattr(CausalLMModule, "generate", noted)
    figures = trainer.validate(module, data, verbose=False)[0]
    assert expected >= 3
    assert figures["val_exact_match"] == pytest.approx(expected / 8)
    assert len(generated) < 4
    with monkeypatch.context() as everything:
        everything.setattr(TeacherForcedAnswers, "of", lambda *_: None)
        assert trainer.validate(module, data, verbose=False)[0] == pytest.approx(figures, rel=1e-6)
    assert len(generated) >= 8


def test_a_penalty_for_repetition_leaves_all_answers_to_generation(model_dir: ModelDir) -> None:
    module = CausalLMModule(str(model_dir()))
    generation = module.language_model.generation_config
    assert TeacherForcedAnswers.of(generation, module.tokenizer, 8) is not None
    generation.num_beams, generation.repetition_penalty, generation.length_penalty = 1, 1.0, 1.0  # as if they were not set
    generation.min_length = 0
    assert TeacherForcedAnswers.of(generation, module.tokenizer, 8) is not None
    generation.repetition_penalty = 1.1
    assert TeacherForcedAnswers.of(generation, module.tokenizer, 8) is None


def test_what_is_known_ends_where_the_row_differs_or_the_answer_ends(model_dir: ModelDir) -> None:
    module = CausalLMModule(str(model_dir()))
    tokenizer = module.tokenizer
    right = tokenizer("mother", add_special_tokens=False).input_ids
    assert len(right) > 2
    end, limit = 2, 20
    prompts = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    ids = torch.cat([prompts, torch.tensor([[*right, end]] * 3)], dim=1)
    labels = ids.clone()
    labels[:, :3] = -100
    other = tokenizer("x", add_special_tokens=False).input_ids[-1]
    likeliest = torch.tensor([[*right, end], [other, *right[1:], end], [*right[:-1], end, end]])
    known = TeacherForcedAnswers(tokenizer, {end}, limit)
    known.add({"input_ids": ids, "labels": labels}, likeliest.flatten())
    batch = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts), "reference": ["mother"] * 3}
    same, wrong, shorter = known.answers(batch)
    assert same == "mother"
    assert wrong is not None
    assert wrong.strip() != "mother"
    assert shorter == tokenizer.decode(right[:-1])
    # A beginning of another reference decides nothing, and neither does a prompt that was not met.
    assert known.answers({**batch, "reference": ["mother", tokenizer.decode([other]) + "ray", None]})[1:] == [None, ""]
    assert known.answers({**batch, "input_ids": prompts + 1}) == [None] * 3


def test_an_answer_may_end_at_any_of_several_tokens(model_dir: ModelDir) -> None:
    module = CausalLMModule(str(model_dir()))
    tokenizer, generation = module.tokenizer, module.language_model.generation_config
    right = tokenizer("mother", add_special_tokens=False).input_ids
    generation.eos_token_id = [2, 4]
    known = TeacherForcedAnswers.of(generation, tokenizer, 20)
    assert known is not None
    ids = torch.tensor([[5, 6, 7, *right, 2]])
    labels = ids.clone()
    labels[:, [0, 2]] = -100  # between them stands an earlier answer, which belongs to the prompt
    known.add({"input_ids": ids, "labels": labels}, torch.tensor([6, *right[:-1], 4, 2]))
    prompt = {"input_ids": ids[:, :3], "attention_mask": torch.ones_like(ids[:, :3]), "reference": ["mother"]}
    assert known.answers(prompt) == [tokenizer.decode(right[:-1])]
