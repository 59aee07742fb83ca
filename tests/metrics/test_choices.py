"""Multiple choice by likelihood, against one forward pass a choice; lm-eval on local data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from ows_lightning.cli.commands import CommandTrainer
from ows_lightning.cli.main import main
from ows_lightning.data import InstructionDataModule
from ows_lightning.data.formats import to_example
from ows_lightning.data.multiple_choice import choices_of
from ows_lightning.errors import UsageError
from ows_lightning.metrics.choices import ChoiceAccuracy
from ows_lightning.module import CausalLMModule

ROWS = [
    {"instruction": f"which colour has a {thing}?", "choices": ["red", "deep blue", "green"], "answer": answer}
    for thing, answer in [("fire", "red"), ("sea", 1), ("leaf", "C"), ("rose", 0), ("lake", "deep blue")]
]
COMMONSENSE = {
    "instruction": "is house tax and property tax are same?\n\nAnswer format: true/false",
    "output": "the correct answer is true",
    "answer": "true",
}


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def quiet_trainer(tmp_path: Path) -> Trainer:
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False)


@torch.no_grad()
def likelihood(module: CausalLMModule, question: str, choice: str) -> float:
    """Log-likelihood of the choice and its end-of-turn token, behind the rendered question."""
    tokenizer = module.tokenizer
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt + choice + "<|im_end|>", return_tensors="pt", add_special_tokens=False).input_ids
    start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    logits = module.language_model(ids).logits.double()
    return -F.cross_entropy(logits[0, start - 1 : -1], ids[0, start:], reduction="sum").item()


def test_accuracy_is_that_of_one_forward_pass_a_choice(
    model_dir: Callable[..., Path], tmp_path: Path, quiet_trainer: Trainer
) -> None:
    module = CausalLMModule(str(model_dir(num_hidden_layers=2)))
    rows = str(write(tmp_path / "test.jsonl", ROWS))
    data = InstructionDataModule(rows, test_dataset=rows, val_size=0, batch_size=2)
    (_, figures) = quiet_trainer.test(module, datamodule=data, verbose=False)

    right = [0, 1, 2, 0, 1]
    scores = [[likelihood(module, row["instruction"], choice) for choice in row["choices"]] for row in ROWS]  # type: ignore[arg-type]
    hits = [max(range(3), key=score.__getitem__) == answer for score, answer in zip(scores, right, strict=True)]
    by_length = [[s / len(c) for s, c in zip(score, ROWS[0]["choices"], strict=True)] for score in scores]  # type: ignore[arg-type]
    normalised = [max(range(3), key=score.__getitem__) == answer for score, answer in zip(by_length, right, strict=True)]
    p = sum(hits) / 5
    assert figures["test_accuracy"] == pytest.approx(p)
    assert figures["test_accuracy_norm"] == pytest.approx(sum(normalised) / 5)
    assert figures["test_accuracy_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 4))


def test_choices_in_half_precision(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    rows = str(write(tmp_path / "test.jsonl", ROWS))
    data = InstructionDataModule(rows, test_dataset=rows, val_size=0, batch_size=2)
    trainer = Trainer(accelerator="cpu", precision="bf16-true", logger=False, enable_progress_bar=False)
    (_, figures) = trainer.test(CausalLMModule(str(model_dir(num_hidden_layers=2))), datamodule=data, verbose=False)
    assert 0 <= figures["test_accuracy"] <= 1


def test_a_long_choice_counts_by_its_mean() -> None:
    metric = ChoiceAccuracy()
    right, characters = torch.tensor([0, 1] * 2), torch.tensor([1, 4, 1, 1])
    metric.update(
        {"row": torch.tensor([0, 0, 1, 1]), "right": right, "characters": characters}, torch.tensor([-2.0, -4, -2, -4])
    )
    figures = {name: value.item() for name, value in metric.compute().items()}
    assert figures == {
        "accuracy": 0.0,
        "accuracy_stderr": 0.0,
        "accuracy_norm": 0.5,
        "accuracy_norm_stderr": pytest.approx(0.5),
    }


def test_rows_of_the_commonsense_files_have_their_choices_in_the_question() -> None:
    texts, right = choices_of(to_example(COMMONSENSE, "alpaca", "row 1"), "row 1")
    assert texts == ["the correct answer is true", "the correct answer is false"]
    assert right == 0


@pytest.mark.parametrize(
    ("form", "answer", "output", "texts"),
    [
        ("true/false", True, None, ["true", "false"]),
        ("true/false", "true", "The correct answer is True.", ["The correct answer is true.", "The correct answer is false."]),
        ("yes/no", "no", "It is no, not yes", ["It is yes, not yes", "It is no, not yes"]),
        ("yes/no", "yes", "neither", ["yes", "no"]),
        ("1/2/3", 1, "1", ["1", "2", "3"]),
    ],
)
def test_the_answer_in_a_reference_is_replaced(form: str, answer: object, output: str | None, texts: list[str]) -> None:
    row = {"instruction": f"Is it?\n\nAnswer format: {form}", "answer": answer} | (
        {} if output is None else {"output": output}
    )
    found, right = choices_of(to_example(row, "alpaca", "row 1"), "row 1")
    assert found == texts
    assert form.split("/")[right] == str(answer).lower()


@pytest.mark.parametrize(
    ("form", "question", "column"), [("alpaca", "instruction", "output"), ("prompt_completion", "prompt", "completion")]
)
def test_the_right_choice_may_be_what_the_row_answers(form: str, question: str, column: str) -> None:
    row = {question: "Is 3 even?", column: "no", "choices": ["yes", "no"]}
    assert choices_of(to_example(row, form, "row 1"), "row 1") == (["yes", "no"], 1)
    assert choices_of(to_example({**row, "answer": 0}, form, "row 1"), "row 1") == (["yes", "no"], 0)
    assert choices_of(to_example({**row, column: "It isn't."}, form, "row 1"), "row 1") == ([], -1)


def test_other_rows_have_none() -> None:
    messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that"}]
    assert choices_of({"messages": messages, "answer": "that"}, "row 1") == ([], -1)
    assert choices_of({"text": "a text"}, "row 1") == ([], -1)


@pytest.mark.parametrize(
    ("choices", "answer", "message"),
    [
        (["red", "blue"], "green", "row 1: the answer 'green' is none of the choices red, blue"),
        (["red", "blue"], 2, "row 1: the answer 2 is none of the choices red, blue"),
        (["red"], 0, "row 1: 'choices' must be a list of two texts or more"),
    ],
)
def test_wrong_choices_are_named(choices: list[str], answer: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choices_of({"messages": [{"role": "user", "content": "?"}], "choices": choices, "answer": answer}, "row 1")


def test_validation_loss_is_exact_in_a_bfloat16_run(model_dir: Callable[..., Path], rows_file: Path, tmp_path: Path) -> None:
    """The sum over many batches would stand still if it were kept in the module's dtype."""
    module = CausalLMModule(str(model_dir(num_hidden_layers=2)))
    data = InstructionDataModule(str(rows_file), val_size=32, batch_size=1)
    trainer = Trainer(
        accelerator="cpu", precision="bf16-true", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    loss = trainer.validate(module, datamodule=data, verbose=False)[0]["val_loss"]
    total, targets = 0.0, 0
    with torch.no_grad():
        for batch in data.val_dataloader()[0]:
            logits = module.language_model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            total += F.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="sum").item()
            targets += int((labels != -100).sum())
    assert loss == pytest.approx(total / targets, rel=1e-4)


@pytest.mark.slow
def test_lm_eval_runs_on_the_checkpoint_and_on_the_exported_directory(
    model_dir: Callable[..., Path], rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "even.yaml").write_text(
        f"task: even\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {rows_file}}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{instruction}} "\ndoc_to_target: "{{output}}"\n'
        'doc_to_choice: ["yes", "no"]\nmetric_list:\n  - metric: acc\n'
    )
    model = model_dir(num_hidden_layers=2)
    main(
        f"test --model.model_name_or_path {model} --data.dataset {rows_file} --data.val_size 4 --trainer.accelerator cpu "
        f"--trainer.enable_progress_bar false --trainer.default_root_dir {tmp_path} "
        f"--tasks [even] --include_path {tasks}".split()
    )
    table = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("|even"))
    assert "acc" in table
    results = simple_evaluate(
        model="hf",
        model_args=f"pretrained={model}",
        tasks=["even"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
    )
    assert f"{results['results']['even']['acc,none']:.4f}".rstrip("0") in table


def test_a_module_that_lm_eval_can_not_run_is_refused_before_anything_is_evaluated() -> None:
    with pytest.raises(UsageError, match="tasks: BoringModel holds no model that lm-eval can run"):
        CommandTrainer(logger=False, accelerator="cpu").test(BoringModel(), tasks=["hellaswag"])
