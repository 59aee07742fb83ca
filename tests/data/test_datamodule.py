from __future__ import annotations

import dataclasses
import datetime
import inspect
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lightning
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from ows_lightning.data import InstructionDataModule, examples, masking, stream
from ows_lightning.errors import UsageError
from ows_lightning.evaluation import EvaluationMetrics
from ows_lightning.metrics.exact_match import right_answers
from ows_lightning.models.loss import token_mask
from ows_lightning.sampling.calibration import calibration_batches
from tests.data.samples import TEMPLATES, pairs, tiny_tokenizer
from tests.distributed.launch import run
from tests.tiny import tiny_model

Write = Callable[..., str]


class Recorder(lightning.LightningModule):
    """Remembers the answers of every training batch, with the optimizer step that they were part of."""

    def __init__(self, model: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.language_model = model
        self.tokenizer = tiny_tokenizer()
        self.seen: list[tuple[int, list[str]]] = []
        self.validated: list[dict[str, Any]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append((self.global_step, answers(self.tokenizer, batch)))
        return self.weight.sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validated.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches > 0  # as schedules do: Lightning makes the loader for it
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Predictor(Recorder):
    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validated.append(batch)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[str]:
        return batch["prompt"]


def answers(tokenizer: Any, batch: dict[str, Tensor]) -> list[str]:
    """The trained text of every row."""
    return [tokenizer.decode(row[row != -100]).replace("<|im_end|>", "|") for row in batch["labels"]]


def make(dataset: Any, **settings: Any) -> InstructionDataModule:
    settings = {"val_size": 0, "batch_size": 2, "tokenizer": tiny_tokenizer(), **settings}
    return InstructionDataModule(dataset, **settings)


def ready(dataset: Any, **settings: Any) -> InstructionDataModule:
    data = make(dataset, **settings)
    data.prepare_data()
    data.setup()
    return data


def epoch(data: InstructionDataModule) -> list[str]:
    return [row for batch in data.train_dataloader() for row in answers(data.tokenizer, batch)]


def fit(
    data: InstructionDataModule, ckpt_path: Path | None = None, module: Recorder | None = None, **settings: Any
) -> Recorder:
    module = module or Recorder()
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    settings = {"logger": False, "enable_checkpointing": "callbacks" in settings, **quiet, **settings}
    lightning.Trainer(**settings).fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module


def test_a_batch_and_what_is_said_of_the_data(jsonl: Write) -> None:
    data = ready(jsonl(pairs(10)), val_size=0.2)
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    summary = data.summary()
    assert (summary["rows"], summary["validation_rows"], summary["dropped_rows"]) == (8, 2, 0)
    labels = torch.cat([batch["labels"].flatten() for batch in data.train_dataloader()])
    assert summary["target_tokens"] == (labels != -100).sum()
    pieces = data.sample_row()
    assert [trained for _, trained in pieces] == [False, True, False]
    assert "<|im_start|>user\nquestion" in pieces[0][0]
    assert pieces[1][0].startswith("answer")


@pytest.mark.parametrize(("val_size", "rows"), [(0, 0), (0.01, 1), (0.25, 5), (3, 3)])
def test_val_size_splits_off_rows_by_seed(jsonl: Write, val_size: int | float, rows: int) -> None:
    file = jsonl(pairs(20))
    data = ready(file, val_size=val_size)
    validated = [row for loader in data.val_dataloader() for batch in loader for row in answers(data.tokenizer, batch)]
    assert len(validated) == rows
    assert sorted(validated + epoch(data)) == sorted(f"answer {i}|" for i in range(20))
    if rows:
        again, other = ready(file, val_size=val_size), ready(file, val_size=val_size, seed=1)
        assert again.sample_row() == data.sample_row()
        assert set(epoch(other)) != set(epoch(data))


def test_prompts_with_their_references(jsonl: Write) -> None:
    rows = [{"instruction": f"q{'?' * i}", "output": f"it is {i}", "answer": str(i), "choices": ["0", "1"]} for i in range(2)]
    data = ready(jsonl(pairs(3)), test_dataset=jsonl(rows, "test.jsonl"))
    (batch,) = data.predict_dataloader()
    assert batch["reference"] == ["it is 0", "it is 1"]
    assert batch["prompt"][1] == "<|im_start|>user\nq?<|im_end|>\n<|im_start|>assistant\n"
    assert batch["expected"] == [None, None]
    assert (batch["answer"], batch["choices"], batch["row"].tolist()) == (["0", "1"], [["0", "1"]] * 2, [0, 1])
    assert batch["attention_mask"][0, 0] == 0
    assert batch["attention_mask"][:, -1].all()
    assert data.tokenizer.decode(batch["input_ids"][1]) == batch["prompt"][1]


def test_prompts_that_lose_their_start_are_counted(jsonl: Write) -> None:
    test = jsonl([{"prompt": "q"}, {"prompt": "q" * 40}], "prompts.jsonl")
    data = make(jsonl(pairs(4)), test_dataset=test, max_seq_length=24)
    with pytest.warns(UserWarning, match="data.max_seq_length: 1 of 2 prompts have more tokens, and lose their start"):
        (batch,) = data.predict_dataloader()
    assert batch["input_ids"].shape == (2, 24)


def test_answers_that_are_too_long_to_be_generated_are_counted(jsonl: Write) -> None:
    rows = [*pairs(3), {"prompt": "q", "completion": "a" * 40}]
    data, module = make(jsonl(pairs(4)), eval_dataset=jsonl(rows, "eval.jsonl"), exact_match_rows=9), Recorder()
    module.hparams.update(max_new_tokens=9)
    trainer = lightning.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    with pytest.warns(UserWarning, match="model.max_new_tokens: 1 of 4 answers are longer, and can't match"):
        trainer.validate(module, data, verbose=False)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q"},
        {"instruction": "q"},
        {"messages": [{"role": "user", "content": "q"}]},
        {"conversations": [{"from": "human", "value": "q"}]},
    ],
)
def test_prompts_without_answers_are_for_prediction_alone(jsonl: Write, row: dict[str, Any]) -> None:
    prompts = {"test_dataset": jsonl([row], "prompts.jsonl"), "tokenizer": None}
    data = make(jsonl(pairs(4)), **prompts)
    module = Predictor()
    fit(data, module=module, max_steps=1)
    (answered,) = lightning.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False).predict(module, data) or []
    assert answered == ["<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"]
    with pytest.raises(UsageError, match=r"^data.test_dataset: none of 1 rows has a target token .*line 1; `predict` needs"):
        ready(jsonl(pairs(4)), **prompts | {"tokenizer": tiny_tokenizer()})


def test_prompts_are_no_training_rows(jsonl: Write) -> None:
    prompts = jsonl([{"prompt": "q"}], "prompts.jsonl")
    make(jsonl(pairs(4)), test_dataset=prompts).check()
    with pytest.raises(UsageError, match=r"prompts.jsonl line 1: columns 'prompt' fit no format"):
        make(prompts).check()


def test_exact_match_is_of_rows_with_an_answer_to_learn(jsonl: Write) -> None:
    said = [
        {"content": ""},
        {"content": "no", "weight": 0},
        {"content": "answer 0"},
        {"content": " "},
        {"content": "answer 1"},
    ]
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", **answer}]} for answer in said]
    data = ready(jsonl(pairs(4)), eval_dataset=jsonl(rows, "eval.jsonl"), exact_match_rows=2)
    _, prompts = data.val_dataloader()
    assert [batch["reference"] for batch in prompts] == [["answer 0", "answer 1"]]


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_expected_is_what_the_template_has_a_model_learn(template: str, jsonl: Write) -> None:
    data = ready(jsonl(pairs(2)), tokenizer=tiny_tokenizer(template), eval_dataset=jsonl(pairs(2)), exact_match_rows=2)
    (losses,), (prompts,) = data.val_dataloader()
    learned = [data.tokenizer.decode(row[row != -100], skip_special_tokens=True).strip() for row in losses["labels"]]
    pairs_ = zip(prompts["expected"], prompts["reference"], strict=True)
    assert [expected or reference for expected, reference in pairs_] == learned
    metrics = EvaluationMetrics()
    for texts, share in ((learned, 1.0), (prompts["reference"], 1.0), ([learned[0], "no"], 0.5)):
        metrics.restart()
        metrics.add_answers(texts, right_answers(prompts))
        assert metrics["exact_match"].compute() == share


def test_a_tokenizer_unlike_the_models_is_refused(jsonl: Write) -> None:
    module = Recorder()
    module.tokenizer = tiny_tokenizer("llama3")
    with pytest.raises(UsageError, match=r"^data.tokenizer: the model has another tokenizer or chat template; leave it out"):
        fit(make(jsonl(pairs(4))), module=module, max_steps=1)
    fit(make(jsonl(pairs(4)), tokenizer=tiny_tokenizer("llama3")), module=module, max_steps=1)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_needs_no_training_rows(stage: str, jsonl: Write) -> None:
    rows = jsonl(pairs(3), "rows.jsonl")
    data = make("nowhere.jsonl", eval_dataset=rows, test_dataset=rows, columns={"instruction": "question"})
    module = Predictor()
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    answered = getattr(trainer, stage)(module, datamodule=data)
    assert module.validated or answered


def test_sources_may_have_columns_of_different_names(jsonl: Write) -> None:
    chats = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "of a chat"}]}]
    own = jsonl([{"question": "q", "reply": "of a file"}], "own.jsonl")
    data = ready([own, jsonl(chats, "chats.jsonl")], columns={"instruction": "question", "output": "reply"})
    assert sorted(epoch(data)) == ["of a chat|", "of a file|"]


def test_named_columns_are_read_from_rows_that_have_messages_too(jsonl: Write) -> None:
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "chat"}], "q": "x", "r": "own"}]
    assert epoch(ready(jsonl(rows), columns={"instruction": "q", "output": "r"})) == ["own|"]


def test_an_evaluation_warns_of_an_optional_column_that_no_row_has(jsonl: Write) -> None:
    data = make("nowhere.jsonl", test_dataset=jsonl(pairs(3)), columns={"input": "contxt", "output": "reply"})
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.warns(UserWarning, match="data.columns.input: no row has a column 'contxt'; correct the name"):
        trainer.predict(Predictor(), datamodule=data)


def test_exact_match_rows_come_as_a_second_loader(jsonl: Write) -> None:
    module = fit(make(jsonl(pairs(6)), val_size=3, exact_match_rows=2, tokenizer=None), max_epochs=1)
    assert ["labels" in batch for batch in module.validated] == [True, True, False]
    assert len(module.validated[-1]["reference"]) == 2


def test_tokens_are_cached_by_content_tokenizer_and_settings(jsonl: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    encode = examples.Encoder.encode
    monkeypatch.setattr(examples.Encoder, "encode", lambda self, *args: encoded.append(args) or encode(self, *args))
    file = jsonl(pairs(5))

    def encodings(file: str, **settings: Any) -> int:
        encoded.clear()
        ready(file, **settings)
        return len(encoded)

    assert encodings(file) == 5
    assert encodings(file) == encodings(jsonl(pairs(5)), batch_size=1, seed=5) == 0
    assert encodings(file, max_seq_length=20) == encodings(file, train_on_prompt=True) == 5
    assert encodings(file, tokenizer=tiny_tokenizer("llama3")) == 5
    assert encodings(jsonl(pairs(6))) == 6
    for library in ("transformers", "tokenizers", "jinja2"):
        monkeypatch.setattr(getattr(examples, library), "__version__", "0.0")
        assert encodings(jsonl(pairs(6))) == 6
    source = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda of: source(of) + "# changed" * (of is masking))
    assert encodings(jsonl(pairs(6))) == 6


def test_a_cache_that_cannot_be_written_is_named(jsonl: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Path(jsonl(pairs(3)))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", rows / "cache")  # below a file
    with pytest.raises(UsageError, match=r"^HF_DATASETS_CACHE: can't write to '.*'.*; choose another folder$"):
        InstructionDataModule(str(rows), tokenizer=tiny_tokenizer(), val_size=0).check()


def test_many_rows_are_tokenised_by_several_processes_alike(jsonl: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = jsonl(pairs(100))
    alone = ready(file)
    monkeypatch.setattr(examples, "_ROWS_PER_PROCESS", 50)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    data = ready(file, max_seq_length=511)
    assert data.summary() == alone.summary()
    assert epoch(data) == epoch(alone)


def test_sources_are_joined_or_mixed_by_weight(jsonl: Write) -> None:
    many = jsonl(pairs(30), "many.jsonl")
    few = jsonl([{"instruction": "q", "output": f"other {i}"} for i in range(4)], "few.jsonl")
    assert len(epoch(ready([many, few]))) == 34
    mixed = epoch(ready({many: 3, few: 1}))
    assert len(mixed) == 40
    assert sorted(mixed.count(f"other {i}|") for i in range(4)) == [2, 2, 3, 3]
    of_seeds = [epoch(ready({many: 3, few: 1}, seed=seed)) for seed in range(1, 5)]
    assert len({tuple(rows.count(f"other {i}|") for i in range(4)) for rows in (mixed, *of_seeds)}) > 1
    mixture = ready({many: 3, few: 1}, val_size=10)
    (loader,) = mixture.val_dataloader()
    validated = {row for batch in loader for row in answers(mixture.tokenizer, batch)}
    assert len(validated) == 10
    assert not validated & set(epoch(mixture))


def test_a_mixture_that_repeats_rows_without_end_is_refused(jsonl: Write) -> None:
    many, few = jsonl(pairs(30), "many.jsonl"), jsonl(pairs(4), "few.jsonl")
    with pytest.raises(
        UsageError, match=r"^data.dataset: by these weights .* '.*many.jsonl' 1.33e\+03 times, .*'.*few.jsonl'"
    ):
        ready({many: 1, few: 1e-4})
    assert len(epoch(ready({many: 1, few: 1e-3}))) == 4004


@pytest.mark.parametrize(
    ("stage", "what", "mend"),
    [
        ("validate", "evaluate", "an eval_dataset or"),
        ("test", "evaluate", "a test_dataset, an eval_dataset or"),
        ("predict", "answer", "a test_dataset, an eval_dataset or"),
    ],
)
def test_evaluating_without_rows_is_refused_before_the_model_is_made(jsonl: Write, stage: str, what: str, mend: str) -> None:
    class NeverMade(Predictor):
        def configure_model(self) -> None:
            raise AssertionError("the model is made")

    trainer = lightning.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(UsageError, match=rf"^data\.\w+_dataset: no rows to {what}; give {mend} a val_size$"):
        getattr(trainer, stage)(NeverMade(), make(jsonl(pairs(3)), tokenizer=None))
    with pytest.raises(UsageError, match=r"^data\.eval_dataset: no file matches 'missing.jsonl'"):
        getattr(trainer, stage)(NeverMade(), make(jsonl(pairs(3)), tokenizer=None, eval_dataset="missing.jsonl"))


def test_rows_without_an_answer_are_named(jsonl: Write, recwarn: pytest.WarningsRecorder) -> None:
    rows = [*pairs(3), {"prompt": "q", "completion": ""}, {"prompt": "q", "completion": None}]
    data = ready(jsonl(rows))
    assert data.summary()["dropped_rows"] == 2
    assert len(epoch(data)) == 3
    assert any(
        "data.dataset: 2 of 5 rows have no answer to train on and are left out: rows.jsonl line 4, rows.jsonl line 5"
        in str(warning.message)
        for warning in recwarn
    )


def test_packing_makes_full_rows_of_documents_that_start_anew(jsonl: Write) -> None:
    data = ready(jsonl(pairs(50)), packing=True, max_seq_length=128, batch_size=4)
    summary = data.summary()
    assert summary["documents"] == 50
    assert summary["tokens"] / (summary["rows"] * 128) > 0.8
    batches = list(data.train_dataloader())
    assert all(set(batch) == {"input_ids", "labels", "position_ids"} for batch in batches)
    starts = torch.cat([batch["labels"][batch["position_ids"] == 0] for batch in batches])
    assert (starts == -100).all()
    labels = torch.cat([batch["labels"].flatten() for batch in batches])
    assert (labels != -100).sum() == summary["target_tokens"]
    assert sum(token_mask(batch).sum() for batch in batches) == summary["tokens"] < labels.numel()


def test_packing_is_refused_for_a_model_that_would_mix_documents(jsonl: Write) -> None:
    file = jsonl(pairs(5))
    fit(make(file, packing=True), module=Recorder(tiny_model("llama", vocab_size=320)), max_steps=1)
    with pytest.raises(UsageError, match=r"^data\.packing: OPTModel would mix"):
        fit(make(file, packing=True), module=Recorder(tiny_model("opt", vocab_size=320)), max_steps=1)


STREAM = {"streaming": True, "val_size": 2}
RUNS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_epochs": 3}, {}),
    ({"max_epochs": 3, "accumulate_grad_batches": 2, "val_check_interval": 2}, {"val_size": 2}),
    ({"max_steps": 12, "max_epochs": -1}, {"group_by_length": True}),
    ({"max_steps": 8, "max_epochs": -1, "limit_train_batches": 3}, {"val_size": 2}),
    ({"max_epochs": 2}, {"num_workers": 1, "packing": True, "max_seq_length": 40}),
    ({"max_steps": 8, "max_epochs": -1, "overfit_batches": 3}, {}),
    ({"max_steps": 9}, STREAM),
    ({"max_steps": 5, "accumulate_grad_batches": 2}, {**STREAM, "packing": True, "max_seq_length": 64}),
    ({"max_steps": 6}, {**STREAM, "num_workers": 1}),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "settings", "every"),
    [*((*case, "every_n_train_steps") for case in RUNS), *((*case, "every_n_epochs") for case in RUNS[:2])],
)
def test_a_resumed_run_sees_the_remaining_batches(
    jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: dict[str, Any], settings: dict[str, Any], every: str
) -> None:
    monkeypatch.setattr(stream, "BUFFER_SIZE", 4)
    file = jsonl(pairs(10))
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True, **{every: 1})
    whole = fit(make(file, tokenizer=None, **settings), callbacks=[checkpoints], **run).seen
    saved = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    assert saved
    for checkpoint in saved[:: max(1, len(saved) // 3)]:
        step = int(checkpoint.stem.removeprefix("step="))
        rest = fit(make(file, tokenizer=None, **settings), ckpt_path=checkpoint, **run).seen
        assert rest == [batch for batch in whole if batch[0] >= step], checkpoint.name


def test_a_run_resumed_from_a_checkpoint_of_a_validation_sees_the_remaining_batches(jsonl: Write, tmp_path: Path) -> None:
    file = jsonl(pairs(18))
    run: dict[str, Any] = {"max_epochs": 2, "val_check_interval": 0.25}
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    whole = fit(make(file, tokenizer=None, val_size=2), callbacks=[checkpoints], **run).seen
    saved = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    assert [path.stem for path in saved] == [f"step={step}" for step in range(2, 17, 2)]
    for checkpoint in saved:
        rest = fit(make(file, tokenizer=None, val_size=2), ckpt_path=checkpoint, **run).seen
        assert rest == [batch for batch in whole if batch[0] >= int(checkpoint.stem.removeprefix("step="))], checkpoint.name


def test_epochs_have_different_orders_and_all_rows(jsonl: Write) -> None:
    seen = [row for _, rows in fit(make(jsonl(pairs(9))), max_epochs=2).seen for row in rows]
    first, second = seen[:9], seen[9:]
    assert first != second
    assert sorted(first) == sorted(second)


def test_overfitting_a_batch(jsonl: Write) -> None:
    seen = fit(make(jsonl(pairs(9))), max_epochs=2, overfit_batches=1).seen
    assert seen[0][1] == seen[1][1]


class Shares(Recorder):
    """Writes what its rank saw to a file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self) -> None:
        torch.save((self.seen, [len(b["input_ids"]) for b in self.validated]), self.folder / f"rank{self.global_rank}.pt")


SHARED: dict[str, Any] = {"max_steps": 4, "val_check_interval": 4}


def share(arguments: list[str]) -> None:
    file, folder, streaming = arguments
    data = make(file, batch_size=2, streaming=streaming == "True", val_size=3, tokenizer=None)
    fit(data, module=Shares(Path(folder)), devices=2, strategy="ddp", **SHARED)


@pytest.mark.parametrize("streaming", [False, True])
def test_two_processes_share_the_batches_of_one(jsonl: Write, tmp_path: Path, streaming: bool) -> None:
    file = jsonl(pairs(18))
    whole = fit(make(file, batch_size=4, streaming=streaming, val_size=3, tokenizer=None), **SHARED)
    run([file, str(tmp_path), str(streaming)], tmp_path / "output", ranks=2, target=share)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for (step, batch), (_, one), (_, two) in zip(whole.seen, ranks[0][0], ranks[1][0], strict=True):
        parts = [row for row in itertools.chain(*zip(one, two, strict=True)) if row]
        assert parts == batch, step
    assert [sum(sizes) for _, sizes in ranks] == [2, 2]


def test_a_stream_goes_on_from_any_row_on_any_number_of_processes(jsonl: Write) -> None:
    rows = fit(make(jsonl(pairs(40)), streaming=True, val_size=3), max_steps=1).trainer.train_dataloader.dataset
    state, seen = dataclasses.replace(rows).state, []

    def take(state: Any, rank: int, num_replicas: int, count: int) -> list[Any]:
        share = dataclasses.replace(rows, rank=rank, num_replicas=num_replicas)
        share.state = state
        return [*itertools.islice(share, count)]

    everything = [item for item, _ in take(state, 0, 1, 22)]
    for processes, count in ((1, 3), (2, 2), (3, 3), (1, 2), (2, 2)):
        shares = [take(state, rank, processes, count) for rank in range(processes)]
        seen += [item for batch in zip(*shares, strict=True) for item, _ in batch]
        state, *others = (share[-1][1] for share in shares)
        assert others == [state] * (processes - 1)
    assert seen == everything


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"seed": 1}, "seed from 0 to 1"),
        ({"packing": True}, "packing from False to True"),
        ({"max_seq_length": 99}, "length fr"),
    ],
)
def test_a_resumed_stream_of_other_rows_says_so(
    setting: dict[str, Any], said: str, jsonl: Write, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def warnings_of(**settings: Any) -> str:
        recwarn.clear()
        data = make(jsonl(pairs(40)), **{"streaming": True, "max_seq_length": 100, "tokenizer": None, **settings})
        fit(data, ckpt_path=tmp_path / "half.ckpt", max_steps=4)
        return " ".join(str(warning.message) for warning in recwarn)

    half = ModelCheckpoint(tmp_path, "half", every_n_train_steps=2)
    data = make(jsonl(pairs(40)), streaming=True, max_seq_length=100, tokenizer=None)
    fit(data, max_steps=2, callbacks=[half])
    assert "other rows" not in warnings_of()
    assert f"The resumed stream gives other rows ({said}" in warnings_of(**setting)


def test_a_position_in_a_stream_of_other_sources_is_refused(jsonl: Write, tmp_path: Path) -> None:
    one, other = jsonl(pairs(40)), jsonl(pairs(8), "other.jsonl")
    half = ModelCheckpoint(tmp_path, "half", every_n_train_steps=2)
    fit(make(one, streaming=True, tokenizer=None), max_steps=2, callbacks=[half])
    for sources in (other, [one, other], {one: 1.0, other: 2.0}):
        with pytest.raises(
            UsageError, match=r"^data.dataset: the checkpoint is of a stream of \['rows.jsonl'\], and these are"
        ):
            fit(make(sources, streaming=True, tokenizer=None), ckpt_path=tmp_path / "half.ckpt", max_steps=4)
    moved = tmp_path / "elsewhere" / "rows.jsonl"
    moved.parent.mkdir()
    Path(one).rename(moved)
    fit(make([str(moved)], streaming=True, tokenizer=None), ckpt_path=tmp_path / "half.ckpt", max_steps=4)


def test_every_process_scores_blocks_on_the_same_rows_of_a_stream(jsonl: Write) -> None:
    module = fit(make(jsonl(pairs(18)), streaming=True, val_size=3), max_steps=1)
    loader: Any = module.trainer.train_dataloader

    def scored_on(**share: int) -> list[list[str]]:
        rows = dataclasses.replace(loader.dataset, **share)
        batches = calibration_batches(stream.StreamLoader(rows, batch_size=2, collate_fn=loader.collate_fn), 6, seed=0)
        return [answers(module.tokenizer, batch) for batch in batches]

    alone = scored_on()
    assert sum(map(len, alone)) == 6
    for rank in range(2):
        assert scored_on(rank=rank, num_replicas=2) == alone


def test_streams_validate_on_their_first_rows_and_repeat(jsonl: Write) -> None:
    data = make(jsonl(pairs(7)), streaming=True, val_size=2, tokenizer=None)
    module = fit(data, max_steps=5, limit_val_batches=10, val_check_interval=5)
    seen = [row for _, rows in module.seen for row in rows]
    assert {row for batch in module.validated for row in answers(module.tokenizer, batch)} == {"answer 0|", "answer 1|"}
    assert sorted(set(seen)) == [f"answer {i}|" for i in range(2, 7)]
    assert seen.count("answer 3|") == 2
    assert data.summary() == {"validation_rows": 2}


def test_a_stream_says_how_many_of_its_first_rows_are_cut(jsonl: Write, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(make(jsonl(pairs(7)), streaming=True, max_seq_length=8), max_steps=2)
    assert "data.dataset: 1000 of the first 1000 rows were cut to max_seq_length=8 tokens." in caplog.messages


@pytest.mark.parametrize("saved", [False, True])
def test_columns_of_a_stream_are_renamed(jsonl: Write, tmp_path: Path, saved: bool) -> None:
    """Of files, and of a data set that `Dataset.save_to_disk` wrote."""
    own = [{"frage": row["prompt"], "antwort": row["completion"], "prompt": "another"} for row in pairs(7)]
    if saved:
        datasets.Dataset.from_list(own).save_to_disk(str(tmp_path / "saved"))
    data = make(
        str(tmp_path / "saved") if saved else jsonl(own),
        columns={"prompt": "frage", "completion": "antwort"}, streaming=True, val_size=2, tokenizer=None,
    )  # fmt: skip
    data.check()
    module = fit(data, max_steps=5, limit_val_batches=10, val_check_interval=5)
    assert {row for batch in module.validated for row in answers(module.tokenizer, batch)} == {"answer 0|", "answer 1|"}
    assert {row for _, rows in module.seen for row in rows} == {f"answer {i}|" for i in range(2, 7)}
    assert "another" not in "".join(text for text, _ in data.sample_row())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "data.batch_size must be a whole number from 1 to 8192, got 0"),
        ({"eval_batch_size": 0}, "data.eval_batch_size must be a whole number from 1 to 8192, got 0"),
        ({"max_seq_length": 1}, "data.max_seq_length must be a whole number from 2 to 1048576, got 1"),
        ({"batch_size": 2.5}, "data.batch_size must be a whole number from 1 to 8192, got 2.5"),
        ({"data_format": "alpca"}, "data.data_format: unknown 'alpca'; did you mean 'alpaca'?"),
        ({"num_workers": -1}, "data.num_workers must be a whole number from 0 to 512, got -1"),
        ({"batch_size": 10**9}, "data.batch_size must be a whole number from 1 to 8192, got 1000000000"),
        ({"eval_batch_size": 10**9}, "data.eval_batch_size must be a whole number from 1 to 8192"),
        ({"max_seq_length": 10**12}, "data.max_seq_length must be a whole number from 2 to 1048576"),
        ({"exact_match_rows": 10**12}, "data.exact_match_rows must be a whole number from 0 to 1000000"),
        ({"num_workers": 10**6}, "data.num_workers must be a whole number from 0 to 512"),
        ({"seed": 2**64}, "data.seed must be a whole number from 0 to 4294967295"),
        ({"seed": -1}, "data.seed must be a whole number from 0 to 4294967295"),
        ({"val_size": float("nan")}, "data.val_size must be a fraction below 1 or a number of rows, got nan"),
        ({"val_size": float("inf")}, "data.val_size must be a fraction below 1 or a number of rows, got inf"),
        (
            {"dataset": {"a.jsonl": float("nan")}},
            "data.dataset: the weight of 'a.jsonl' must be from 1e-06 to 1e\\+06, got nan",
        ),
        ({"dataset": {"a.jsonl": float("inf")}}, "data.dataset: the weight of 'a.jsonl' must be from 1e-06 to 1e"),
        ({"dataset": {"a.jsonl": 1, "b.jsonl": 1e-9}}, "data.dataset: the weight of 'b.jsonl' must be from 1e-06 to 1e"),
        ({"val_size": 1.0}, "data.val_size must be a fraction below 1 or a number of rows, got 1.0"),
        ({"val_size": -1}, "data.val_size must be a fraction below 1 or a number of rows, got -1"),
        ({"dataset": ""}, "data.dataset names no source"),
        ({"dataset": {"a.jsonl": 0}}, "data.dataset: the weight of 'a.jsonl' must be from 1e-06 to 1e\\+06, got 0"),
        ({"columns": {"instructions": "x"}}, "data.columns: 'instructions' is no column of a format; those are answer, "),
        (
            {"streaming": True, "dataset": {"a.jsonl": 1.0, "b.jsonl": 2.0}, "val_size": 4},
            "data.val_size: a mixture repeats rows, also those for validation; give an eval_dataset, or 0",
        ),
        ({"streaming": True, "val_size": 0.1}, "data.val_size: 0.1 of a stream is not known; give a number of rows, or 0"),
        ({"streaming": True, "group_by_length": True}, "data.group_by_length: the rows of a stream"),
        ({"packing": True, "group_by_length": True}, "data.group_by_length does nothing for packed rows"),
        ({"train_on_prompt": True, "last_turn_only": True}, "data.last_turn_only: train_on_prompt trains all tokens"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(**{"dataset": "rows.jsonl", **settings})


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([], {}, "data.dataset: .*rows.jsonl has no rows"),
        (pairs(3), {"val_size": 3}, "data.val_size: 3 of 3 rows leaves none to train on; set val_size: 0"),
        (pairs(1), {"val_size": 0.1}, "data.val_size: 0.1 of 1 rows leaves none to train on"),
        (pairs(3), {"val_size": 3, "streaming": True}, "data.val_size: 3 of 3 rows leaves none to train on; lower it, or set"),
        (pairs(3), {"val_size": 9, "streaming": True}, "data.val_size: 9 of 3 rows leaves none to train on"),
        ([{"text": "a \ud83d b"}], {}, r"rows.jsonl line 1 can't be read as text: UnicodeEncodeError: .* '\\ud83d'"),
        ([{"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}], {}, "rows.jsonl line 1 .* TypeError"),
        (pairs(3), {"batch_size": 300}, "data.batch_size: 300 is more than the 3 rows there are; set it to 3"),
        (pairs(3), {"columns": {"prompt": "question"}}, "data.columns.prompt: no row has a column 'question'"),
        (pairs(3), {"columns": {"output": "complition"}}, "data.columns.output: no row has a column 'complition'"),
        ([{"prompt": "q", "answr": "a"}], {"columns": {"completion": "answer"}}, "line 1 has no column 'answer' .*'answr'"),
        ([*pairs(2), {"prompt": "q"}], {}, "rows.jsonl line 3 has no column 'completion' or 'answer'"),
        ([{"prompt": "q", "ouput": "a"}], {}, "rows.jsonl line 1: columns 'prompt', 'ouput' fit no format"),
        (pairs(2), {"data_format": "alpaca"}, "rows.jsonl line 1 has no column 'instruction', which alpaca rows need"),
        (pairs(2), {"eval_dataset": "nowhere.jsonl"}, "data.eval_dataset: no file matches 'nowhere.jsonl'"),
        (pairs(2), {"streaming": True, "dataset": "nowhere.jsonl"}, "data.dataset: no file matches 'nowhere.jsonl'"),
        ([{"prompt": "q"}], {"streaming": True}, "rows.jsonl line 1: columns 'prompt' fit no format"),
        (
            pairs(3),
            {"streaming": True, "columns": {"prompt": "question"}},
            "data.columns.prompt: no row has a column 'question'",
        ),
        (
            pairs(3),
            {"streaming": True, "columns": {"output": "complition"}},
            "columns.output: no row has a column 'complition'",
        ),
    ],
)
def test_check_finds_what_is_wrong_without_a_tokenizer(
    jsonl: Write, rows: list[dict[str, Any]], settings: dict[str, Any], message: str
) -> None:
    data = make(**{"dataset": jsonl(rows), "tokenizer": None, **settings})
    with pytest.raises(UsageError, match=message) as caught:
        data.check()
    assert "\n" not in str(caught.value)


def test_a_data_set_without_any_target_is_an_error(jsonl: Write) -> None:
    rows = [{"prompt": "q", "completion": ""}] * 2
    with pytest.raises(
        UsageError, match=r"^data.dataset: none of 2 rows has a target token .*special.*: rows.jsonl line 1, rows"
    ):
        ready(jsonl(rows))
    with pytest.raises(UsageError, match=r"^data.dataset: none of the first 2 rows has an answer to train on: rows"):
        ready(jsonl(rows), streaming=True).sample_row()
    sources = [jsonl([{"prompt": folder, "completion": ""}], f"{folder}/rows.jsonl") for folder in ("a", "b")]
    with pytest.raises(UsageError, match=r"^data.dataset: none of the first 2 rows has an answer to train on: rows"):
        ready(sources, streaming=True).sample_row()


def test_an_answer_that_is_none_of_the_choices_is_found_by_check(jsonl: Write) -> None:
    rows = [{"prompt": "q", "choices": ["yes", "no"], "answer": answer} for answer in ("no", "maybe")]
    with pytest.raises(UsageError, match=r"^test.jsonl line 2: the answer 'maybe' is none of the choices yes, no"):
        make(jsonl(pairs(3)), test_dataset=jsonl(rows, "test.jsonl"), tokenizer=None).check()


def test_no_limit_of_batches_cuts_the_choices_of_a_row_apart(jsonl: Write) -> None:
    rows = [{"prompt": "q", "choices": ["a", "b", "c", "d"][:n], "answer": 0} for n in (2, 4, 3, 4, 2)]
    for size, batches in ((1, 5), (4, 5), (8, 3), (100, 1)):
        data = ready(jsonl(pairs(3)), test_dataset=jsonl(rows, "test.jsonl"), eval_batch_size=size)
        seen = [batch["row"].tolist() for batch in data.test_dataloader()[-1]]
        assert len(seen) == batches
        assert list(itertools.chain(*seen)) == [row for row, n in enumerate((2, 4, 3, 4, 2)) for _ in range(n)]
        assert all(set(one).isdisjoint(other) for i, one in enumerate(seen) for other in seen[:i])


def test_values_that_json_does_not_know_are_passed_through(tmp_path: Path) -> None:
    day = datetime.datetime(2026, 11, 1)
    messages = [{"role": "user", "content": "q", "at": day}, {"role": "assistant", "content": "a", "at": None}]
    pq.write_table(pa.Table.from_pylist([{"messages": messages}]), tmp_path / "rows.parquet")
    assert epoch(ready(str(tmp_path / "rows.parquet"))) == ["a|"]


def test_streams_need_an_end(jsonl: Write) -> None:
    with pytest.raises(UsageError, match=r"^data.streaming: a stream has no end; set trainer.max_steps"):
        fit(make(jsonl(pairs(3)), streaming=True), max_epochs=1)


def test_a_tokenizer_that_is_not_there(jsonl: Write) -> None:
    with pytest.raises(UsageError, match=r"^data.tokenizer: no such directory '\./no/where'"):
        ready(jsonl(pairs(3)), tokenizer="./no/where")


def test_a_directory_with_a_tokenizer_alone(jsonl: Write, tmp_path: Path) -> None:
    data = ready(jsonl(pairs(3)))
    data.tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert epoch(ready(jsonl(pairs(3)), tokenizer=str(tmp_path / "tokenizer"))) == epoch(data)


def test_without_a_tokenizer(jsonl: Write) -> None:
    with pytest.raises(UsageError, match=r"^data.tokenizer: name a tokenizer"):
        ready(jsonl(pairs(3)), tokenizer=None)


def test_another_model_trains_on_the_tokens_of_its_own_tokenizer(jsonl: Write) -> None:
    file = jsonl(pairs(4))
    data, second, alone = make(file, tokenizer=None), Recorder(), Recorder()
    second.tokenizer = alone.tokenizer = tiny_tokenizer("llama3")
    fit(data, module=Recorder(), max_epochs=1)
    fit(data, module=second, max_epochs=1)
    fit(make(file, tokenizer=None), module=alone, max_epochs=1)
    assert second.seen == alone.seen


def test_a_resume_that_failed_leaves_no_position_to_the_next_run(jsonl: Write, tmp_path: Path) -> None:
    class Fails(Recorder):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            raise RuntimeError

    data, checkpoints = make(jsonl(pairs(8))), ModelCheckpoint(tmp_path, "half", every_n_train_steps=1)
    first = fit(data, max_steps=2, callbacks=[checkpoints]).seen
    with pytest.raises(RuntimeError):
        fit(data, tmp_path / "half.ckpt", Fails(), max_steps=4)
    assert fit(data, max_steps=2).seen == first


def test_without_a_trainer_the_sampler_knows_the_epoch(jsonl: Write) -> None:
    data = ready(jsonl(pairs(8)))
    loader, orders = data.train_dataloader(), []
    for number in (0, 1, 0):
        loader.sampler.set_epoch(number)
        orders.append([row for batch in loader for row in answers(data.tokenizer, batch)])
    assert orders[0] == orders[2] != orders[1]


def test_a_source_may_be_a_path(jsonl: Write) -> None:
    file = Path(jsonl(pairs(3)))
    for source in (file, [file], {file: 1.0}):
        assert len(epoch(ready(source))) == 3


def test_tokens_of_the_last_turn_are_kept_apart(jsonl: Write) -> None:
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")]
    file = jsonl([{"messages": turns}])
    every, last = (ready(file, last_turn_only=only).summary()["target_tokens"] for only in (False, True))
    assert last < every


def test_other_columns_of_a_file_are_read_anew(jsonl: Write) -> None:
    file = jsonl([{"prompt": "q", "a": f"one {i}", "b": f"two {i}"} for i in range(3)])
    for column, start in (("a", "one"), ("b", "two")):
        assert {row[:3] for row in epoch(ready(file, columns={"completion": column}))} == {start}


def test_a_stream_mixes_by_weight(jsonl: Write) -> None:
    many = jsonl(pairs(200), "many.jsonl")
    other = jsonl([{"instruction": "q", "output": f"other {i}"} for i in range(200)], "other.jsonl")
    data = make({many: 9, other: 1}, streaming=True, tokenizer=None, batch_size=10)
    seen = [row for _, rows in fit(data, max_steps=10).seen for row in rows]
    assert 0 < sum(row.startswith("other") for row in seen) / len(seen) < 0.25


def test_a_streamed_mixture_repeats_each_source_as_a_whole(jsonl: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BUFFER_SIZE", 10)  # within which rows are shuffled
    few, many = (
        jsonl(pairs(10), "few.jsonl"),
        jsonl([{"instruction": "q", "output": f"other {i}"} for i in range(25)], "many.jsonl"),
    )
    data = make({few: 1, many: 3}, streaming=True, tokenizer=None, batch_size=10)
    seen = Counter(row for _, rows in fit(data, max_steps=20).seen for row in rows if row.startswith("other"))
    assert len(seen) == 25
    assert max(seen.values()) - min(seen.values()) <= 1


def test_a_stream_is_shuffled_by_seed(jsonl: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BUFFER_SIZE", 12)
    file, in_file = jsonl(pairs(12)), [f"answer {i}|" for i in range(12)]

    def order(seed: int) -> list[str]:
        run = fit(make(file, streaming=True, tokenizer=None, seed=seed), max_steps=6)
        return [row for _, rows in run.seen for row in rows]

    one, again, other = order(0), order(0), order(1)
    assert one == again
    assert sorted(one) == sorted(other) == sorted(in_file)
    assert one != other
    assert in_file not in (one, other)


def test_a_stream_has_one_worker_at_most(jsonl: Write) -> None:
    data = make(jsonl(pairs(12)), streaming=True, tokenizer=None, num_workers=2)
    fit(data, max_steps=1)
    assert data.trainer.train_dataloader.num_workers == 1  # type: ignore[union-attr]
