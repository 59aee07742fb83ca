"""Exact match: the greedy answers that the loss of the same rows has shown already, so that few have to be generated."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

_NEUTRAL_SETTINGS = {
    *("bos_token_id", "pad_token_id", "eos_token_id", "do_sample", "temperature", "top_p", "top_k", "max_length"),
    *("max_new_tokens", "use_cache", "cache_implementation", "transformers_version", "_from_model_config"),
}
"""Settings of generation that leave greedy answers as they are, or that are overruled."""


class KnownAnswers:
    """What is known of the greedy answers to prompts.

    Where a row's answer is predicted token by token, the likeliest tokens are the greedy answer up to the first that differs
    from the row's, that one included. This decides nearly always whether the two are equal.

    Args:
        tokenizer: Makes text of tokens.
        stops: Tokens that end an answer.
        limit: The most tokens of an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: set[int], limit: int) -> None:
        self._tokenizer, self._stops, self._limit = tokenizer, stops, limit
        self._beginnings: dict[bytes, list[int]] = {}  # by prompt

    @classmethod
    def of(cls, generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase, limit: int) -> KnownAnswers | None:
        """For a model's settings of generation; None where these change greedy answers, as a penalty for repetition does."""
        if {name for name, value in generation.to_diff_dict().items() if value not in (None, False)} - _NEUTRAL_SETTINGS:
            return None
        stops = generation.eos_token_id
        return cls(tokenizer, set(stops) if isinstance(stops, list) else {stops} - {None}, limit)

    def add(self, batch: dict[str, Tensor], likeliest: Tensor) -> None:
        """Notes what a batch shows of the answers that its rows end with.

        Args:
            batch: ``input_ids`` and ``labels`` (-100: no target), int64 (B, L).
            likeliest: The likeliest token at each target, (N,), row by row.
        """
        has_target = batch["labels"].cpu() != -100
        has_target[:, 0] = False
        found = iter(likeliest.tolist())
        for ids, at in zip(batch["input_ids"].cpu(), has_target, strict=True):
            positions = at.nonzero()[:, 0].tolist()
            tokens = [next(found) for _ in positions]
            if not positions:
                continue
            start = len(positions) - 1  # of the last answer
            while start and positions[start - 1] == positions[start] - 1:
                start -= 1
            self._beginnings[_key(ids[: positions[start]])] = self._beginning(ids[positions[start:]].tolist(), tokens[start:])

    def answers(self, batch: dict[str, Any]) -> list[str | None]:
        """Returns the answers to prompts that are known, or known to be wrong as far as they are known; None for the others.

        Args:
            batch: ``input_ids`` and ``attention_mask``, int64 (B, L), and the texts that are right as ``reference``.
        """
        prompts = (ids[mask.bool()] for ids, mask in zip(batch["input_ids"].cpu(), batch["attention_mask"].cpu(), strict=True))
        return [self._answer(prompt, right) for prompt, right in zip(prompts, batch["reference"], strict=True)]

    def _beginning(self, right: list[int], likeliest: list[int]) -> list[int]:
        beginning = []
        for token, expected in zip(likeliest[: self._limit], right, strict=False):
            beginning.append(token)
            if token != expected or token in self._stops:
                break
        return beginning

    def _answer(self, prompt: Tensor, right: str | None) -> str | None:
        if right is None:
            return ""  # it fills up a rank's share
        beginning = self._beginnings.get(_key(prompt))
        if beginning is None:
            return None
        text = str(self._tokenizer.decode(beginning, skip_special_tokens=True))
        ended = len(beginning) == self._limit or beginning[-1] in self._stops
        # Half a character, or a space that is cleaned up later, tells nothing.
        return text if ended or not _without_spaces(right).startswith(_without_spaces(text.rstrip("\ufffd"))) else None


def _key(prompt: Tensor) -> bytes:
    return bytes(prompt.numpy().tobytes())


def _without_spaces(text: str) -> str:
    return "".join(text.split())
