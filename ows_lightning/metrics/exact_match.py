"""Exact match: greedy answers as far as the loss of the same rows shows them, so that only the others are generated."""

from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ows_lightning.models.loss import IGNORE_INDEX
from ows_lightning.models.pretrained import stop_token_ids

_NEUTRAL_SETTINGS = {  # of generation: they leave greedy answers as they are, or are overruled
    "bos_token_id", "pad_token_id", "eos_token_id", "do_sample", "temperature", "top_p", "top_k", "max_length",
    "max_new_tokens", "use_cache", "cache_implementation", "transformers_version", "_from_model_config",
}  # fmt: skip
_NEUTRAL_VALUES = {"num_beams": 1, "num_beam_groups": 1, "repetition_penalty": 1.0, "length_penalty": 1.0, "min_length": 0}


def right_answers(batch: dict[str, Any]) -> list[set[str]]:
    """Returns the texts that count as right for each prompt (see `PromptRows`), stripped; none for a filler row."""
    pairs = zip(batch["reference"], batch.get("expected", batch["reference"]), strict=True)
    return [set() if right is None else {right.strip(), (trained or right).strip()} for right, trained in pairs]


class TeacherForcedAnswers:
    """What is known of the greedy answers to prompts, which end at one of the ``stops`` or after ``limit`` tokens.

    Where a row's answer is predicted token by token, the likeliest tokens are the greedy answer up to the first that differs
    from the row's, that one included. This decides nearly always whether the two are equal.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: set[int], limit: int) -> None:
        self._tokenizer, self._stops, self._limit = tokenizer, stops, limit
        self._prefixes: dict[bytes, list[int]] = {}  # by prompt

    @classmethod
    def of(cls, generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase, limit: int) -> "TeacherForcedAnswers | None":
        """For a model's settings of generation; None where these change greedy answers, as a penalty for repetition does."""
        settings = generation.to_diff_dict().items()
        if {name for name, value in settings if value not in (None, False, _NEUTRAL_VALUES.get(name))} - _NEUTRAL_SETTINGS:
            return None
        return cls(tokenizer, set(stop_token_ids(generation)), limit)

    def add(self, batch: dict[str, Tensor], likeliest: Tensor) -> None:
        """Notes what the likeliest tokens at a batch's targets, (N,), row by row, show of the answers at its rows' ends."""
        has_target = batch["labels"].cpu() != IGNORE_INDEX
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
            prompt = ids[: positions[start]].numpy().tobytes()
            self._prefixes[prompt] = self._prefix(ids[positions[start:]].tolist(), tokens[start:])

    def answers(self, batch: dict[str, Any]) -> list[str | None]:
        """Returns each prompt's answer, or the known start of a wrong one; None where it must be generated."""
        prompts = (ids[mask.bool()] for ids, mask in zip(batch["input_ids"].cpu(), batch["attention_mask"].cpu(), strict=True))
        return [self._answer(prompt, right) for prompt, right in zip(prompts, right_answers(batch), strict=True)]

    def _prefix(self, right: list[int], likeliest: list[int]) -> list[int]:
        pairs = enumerate(zip(likeliest, right, strict=True), start=1)
        ends = (number for number, (token, expected) in pairs if token != expected or token in self._stops)
        return likeliest[: min(next(ends, len(right)), self._limit)]

    def _answer(self, prompt: Tensor, right: set[str]) -> str | None:
        if not right:
            return ""  # a filler row
        if (prefix := self._prefixes.get(prompt.numpy().tobytes())) is None:
            return None
        text = str(self._tokenizer.decode(prefix, skip_special_tokens=True))
        ended = len(prefix) == self._limit or prefix[-1] in self._stops
        # Half a character, or a space that is cleaned up later, tells nothing.
        begins_one = any(_without_spaces(one).startswith(_without_spaces(text.rstrip("\ufffd"))) for one in right)
        return text if ended or not begins_one else None


def _without_spaces(text: str) -> str:
    return "".join(text.split())
