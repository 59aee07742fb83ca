"""Validation, test and prediction: loss, perplexity, exact match, multiple choice, and generated answers."""

from collections.abc import Collection, Iterable
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from transformers import PreTrainedTokenizerBase

from ows_lightning.data.rendering import with_chat_template
from ows_lightning.metrics.choices import ChoiceAccuracy
from ows_lightning.metrics.exact_match import TeacherForcedAnswers, right_answers
from ows_lightning.models.causal_lm import CausalLM
from ows_lightning.models.pretrained import load_tokenizer, stop_token_ids


class EvaluationMetrics(MetricCollection):
    """Mean loss over target tokens, its exponential, and the share of generated answers that equal their reference."""

    def __init__(self) -> None:
        # A NaN stays one: "warn" leaves it out, and "disable" also the weights.
        super().__init__({"loss": MeanMetric(nan_strategy=float("nan")), "exact_match": MeanMetric()})

    def restart(self) -> None:
        """Resets all, in float32 whatever dtype the Trainer's precision gave the metrics with the rest of the module."""
        with torch.inference_mode(False):  # a state made in inference mode could not be updated by a later fit
            self.reset()
        for metric in self.values():
            metric.set_dtype(torch.float32)

    def add_answers(self, answers: Iterable[str], right: Iterable[Collection[str]]) -> None:
        """Adds generated answers, each with the correct texts; a filler row has none, and is left out."""
        hits = [float(answer.strip() in texts) for answer, texts in zip(answers, right, strict=True) if texts]
        self["exact_match"].update(torch.tensor(hits, dtype=torch.float32, device=self["loss"].device))

    def compute_by_name(self, stage: str) -> dict[str, float]:
        """Returns the metrics by their names in logs; all ranks take part."""
        loss = self["loss"].compute()
        values = {f"{stage}_loss": loss.item(), f"{stage}_perplexity": loss.exp().item()}
        if self["exact_match"].update_count > 0:
            values[f"{stage}_exact_match"] = self["exact_match"].compute().item()
        return values


class EvaluationModule(LightningModule):
    """Validation, test and prediction of a module around a causal LM."""

    def __init__(self) -> None:
        super().__init__()
        self.causal_lm: CausalLM | None = None
        self.val_metrics, self.test_metrics, self.test_choices = EvaluationMetrics(), EvaluationMetrics(), ChoiceAccuracy()
        self._greedy: TeacherForcedAnswers | None = None  # of the rows whose loss has been taken

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, loaded on first use; with a plain chat template where it has none of its own."""
        return with_chat_template(load_tokenizer(self.hparams["model_name_or_path"], self.hparams["trust_remote_code"]))

    @property
    def _loaded_causal_lm(self) -> CausalLM:
        self.configure_model()
        assert self.causal_lm is not None
        return self.causal_lm

    def on_validation_epoch_start(self) -> None:
        self.val_metrics.restart()
        self._greedy = self._start_greedy_answers()

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds up the loss of a validation batch, or compares generated answers where the batch has a ``reference``."""
        self._evaluate(batch, self.val_metrics)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.val_metrics.compute_by_name("val"), prog_bar=True)

    def on_test_epoch_start(self) -> None:
        self.test_metrics.restart()
        self.test_choices.reset()
        self._greedy = self._start_greedy_answers()

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """As ``validation_step``, on the test data, and likelihoods where the batch has choices."""
        if "right" in batch:
            self.test_choices.update(batch, self._loaded_causal_lm.log_likelihoods(batch))
        else:
            self._evaluate(batch, self.test_metrics)

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.test_metrics.compute_by_name("test"), prog_bar=True)
        if self.test_choices.update_count > 0:
            self.log_dict({f"test_{name}": value for name, value in self.test_choices.compute().items()})

    def _evaluate(self, batch: dict[str, Any], metrics: EvaluationMetrics) -> None:
        if "reference" in batch:
            metrics.add_answers(self._answers(batch), right_answers(batch))
            return
        if self._greedy is None:
            parts = self._loaded_causal_lm(**batch)
        else:
            parts, likeliest = self._loaded_causal_lm.loss_and_predictions(batch)
            self._greedy.add(batch, likeliest)
        metrics["loss"].update(parts.loss, weight=parts.num_targets)

    def _start_greedy_answers(self) -> TeacherForcedAnswers | None:
        """Starts to note answers, where some are to be compared and no other process has to take part in generating them."""
        if self.device_mesh is not None or not getattr(self.trainer.datamodule, "exact_match_rows", 0):  # type: ignore[attr-defined]
            return None
        generation = self._loaded_causal_lm.language_model.generation_config
        return TeacherForcedAnswers.of(generation, self.tokenizer, self.hparams["max_new_tokens"])

    def _answers(self, batch: dict[str, Any]) -> list[str]:
        """The greedy answers; an answer known to be wrong already is returned only as far as it is known."""
        known = [None] * len(batch["reference"]) if self._greedy is None else self._greedy.answers(batch)
        left = [row for row, answer in enumerate(known) if answer is None]
        generated = iter(self.generate({name: batch[name][left] for name in ("input_ids", "attention_mask")}) if left else ())
        return [next(generated) if answer is None else answer for answer in known]

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Returns one dict per row: what the batch knows of it (``row``, ``prompt``, ...), and the ``generated`` answer."""
        numbers = {"row": batch["row"].tolist()} if "row" in batch else {}
        facts = numbers | {key: values for key, values in batch.items() if not isinstance(values, Tensor)}
        facts["generated"] = self.generate(batch)
        rows = [dict(zip(facts, values, strict=True)) for values in zip(*facts.values(), strict=True)]
        return [row for row in rows if row.get("reference", "") is not None]  # else a filler row

    @torch.compiler.set_stance("force_eager")  # its cache recompiles each block: no recompilation would be left for training
    def generate(self, batch: dict[str, Any]) -> list[str]:
        """Returns the greedy continuation of each left-padded prompt (``input_ids``, ``attention_mask``), as text."""
        prompts = batch["input_ids"]
        generated = self._loaded_causal_lm.generate(
            input_ids=prompts, attention_mask=batch["attention_mask"], max_new_tokens=self.hparams["max_new_tokens"],
            synced_gpus=self.device_mesh is not None,  # each forward pass gathers weights: all processes have to take part
            pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        stops = stop_token_ids(self._loaded_causal_lm.language_model.generation_config)  # not all need be special
        answers = [[token for token in row if token not in stops] for row in generated[:, prompts.size(1) :].tolist()]
        return self.tokenizer.batch_decode(answers, skip_special_tokens=True)
