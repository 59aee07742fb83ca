from __future__ import annotations

import logging
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer

from ows_lightning.data.encoding import Encoded, Encoder, end_of_turn_id
from ows_lightning.data.rendering import ChatTemplate, with_chat_template
from ows_lightning.errors import UsageError
from tests.data.samples import ENDLESS, TEMPLATES, tiny_tokenizer

Messages = list[dict[str, Any]]
TWO_TURNS: Messages = [
    {"role": "user", "content": "who is the third"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "the question"},
    {"role": "assistant", "content": "the answer is no"},
]
SYSTEM: Messages = [{"role": "system", "content": "be brief"}]


def encoder(template: str = "chatml", max_seq_length: int = 512, **settings: Any) -> Encoder:
    return Encoder(with_chat_template(tiny_tokenizer(template)), max_seq_length, **settings)


def encode(messages: Messages, *args: Any, **settings: Any) -> tuple[Encoder, list[Encoded]]:
    made = encoder(*args, **settings)
    return made, made.encode({"messages": messages}, "row 1")


def trained(made: Encoder, row: Encoded) -> list[str]:
    """The runs of trained tokens as text."""
    runs: list[list[int]] = []
    before = -100
    for label in row.labels:
        if label != -100:
            runs.append([]) if before == -100 else None
            runs[-1].append(label)
        before = label
    return [made.tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("template", "end"),
    {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>", "none": "</s>"}.items(),
)
def test_every_answer_is_trained_with_its_end_of_turn(template: str, end: str) -> None:
    made, (row,) = encode(TWO_TURNS, template)
    first, last = trained(made, row)
    assert first == f"yes{end}"
    assert last.startswith(f"the answer is no{end}")


@pytest.mark.parametrize(("template", "start"), [("harmony", "<|channel|>final<|message|>"), ("eos_last", "")])
def test_answers_that_only_the_last_message_ends_are_rows_of_their_own(template: str, start: str) -> None:
    made, rows = encode(TWO_TURNS, template)
    assert [trained(made, row) for row in rows] == [[f"{start}the answer is no</s>"], [f"{start}yes</s>"]]
    for row, messages in zip(rows, (TWO_TURNS, TWO_TURNS[:2]), strict=True):
        assert row.input_ids == made.tokenizer.apply_chat_template(messages).input_ids


def test_every_answer_ends_where_the_template_ends_none() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = ENDLESS
    made = Encoder(tokenizer, 512)
    rows = made.encode({"messages": TWO_TURNS}, "row 1")
    assert [trained(made, row) for row in rows] == [["the answer is no\n\n</s>"], ["yes\n\n</s>"]]


def test_a_token_that_was_added_without_being_special_ends_an_answer() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|eot|>", "yes"])
    assert tokenizer.chat_template is not None
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|eot|>")
    made = Encoder(tokenizer, 512)
    (row,) = made.encode({"messages": TWO_TURNS}, "row 1")
    assert trained(made, row) == ["yes<|eot|>", "the answer is no<|eot|>"]
    assert row.input_ids == tokenizer.apply_chat_template(TWO_TURNS).input_ids


def test_an_answer_that_begins_as_what_the_generation_prompt_opens() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.chat_template is not None
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n{%", "assistant\n<think>\n{%")
    assert tokenizer.apply_chat_template(TWO_TURNS[:1], tokenize=False, add_generation_prompt=True).endswith("<think>\n")
    made = Encoder(tokenizer, 512)
    for answer in ("<b>yes</b>", "<think>", "!", "yes"):
        (row,) = made.encode({"messages": [TWO_TURNS[0], {"role": "assistant", "content": answer}]}, "row 1")
        assert trained(made, row) == [f"{answer}<|im_end|>"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_tokens_are_those_of_the_whole_conversation(template: str) -> None:
    made, rows = encode(TWO_TURNS, template)
    assert rows[0].input_ids == made.tokenizer.apply_chat_template(TWO_TURNS).input_ids


def test_the_space_that_the_template_puts_before_an_answer_is_trained() -> None:
    made, (row,) = encode(TWO_TURNS, "mistral")
    assert trained(made, row) == [" yes</s>", " the answer is no</s>"]


def test_answers_that_the_template_rewrites_are_trained_as_rows_of_their_own() -> None:
    thinking = [
        {**m, "content": f"<think>\nhm\n</think>\n\n{m['content']}"} if m["role"] == "assistant" else m for m in TWO_TURNS
    ]
    made, rows = encode(thinking, "qwen3")
    assert [trained(made, row) for row in rows] == [
        ["<think>\nhm\n</think>\n\nthe answer is no<|im_end|>"],
        ["<think>\nhm\n</think>\n\nyes<|im_end|>"],
    ]
    assert "hm" not in made.tokenizer.decode(rows[0].input_ids).split("the question")[0]


def test_last_turn_only() -> None:
    made, (row,) = encode(TWO_TURNS, last_turn_only=True)
    assert trained(made, row) == ["the answer is no<|im_end|>"]


def test_train_on_prompt_trains_every_token() -> None:
    _, (row,) = encode(TWO_TURNS, train_on_prompt=True)
    assert row.labels == [-100, *row.input_ids[1:]]


def test_messages_of_weight_zero_are_not_trained() -> None:
    made, (row,) = encode([TWO_TURNS[0], {**TWO_TURNS[1], "weight": 0}, *TWO_TURNS[2:]])
    assert trained(made, row) == ["the answer is no<|im_end|>"]


@pytest.mark.parametrize(
    "messages",
    [
        TWO_TURNS[:1],
        [TWO_TURNS[0], {"role": "assistant", "content": "  "}],
        [{"role": "assistant", "content": "nobody asked"}],
    ],
)
def test_rows_without_a_target_are_left_out(messages: Messages) -> None:
    assert encode(messages)[1] == []


def test_tool_calls_that_the_template_leaves_out_are_no_target() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    tools = [TWO_TURNS[0], {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "3"}]
    made, (row,) = encode([*tools, *TWO_TURNS[1:2]])
    assert trained(made, row) == ["yes<|im_end|>"]


def test_a_system_message_that_the_template_refuses_joins_the_first_question() -> None:
    made, (row,) = encode(SYSTEM + TWO_TURNS, "gemma")
    assert "user\nbe brief\n\nwho is the third" in made.tokenizer.decode(row.input_ids)
    assert len(trained(made, row)) == 2


@pytest.mark.parametrize("settings", [{}, {"train_on_prompt": True}, {"last_turn_only": True}])
def test_a_system_message_that_the_template_shows_in_the_last_question_joins_the_first(settings: dict[str, bool]) -> None:
    made, (row,) = encode(SYSTEM + TWO_TURNS, "mistral_v03", **settings)
    assert made.tokenizer.decode(row.input_ids).startswith("<s>[INST] be brief\n\nwho is the third[/INST] yes</s>")
    if not settings:
        assert trained(made, row) == [" yes</s>", " the answer is no</s>"]
    _, ids = made.encode_prompt({"messages": SYSTEM + TWO_TURNS[:2]}, "row 1")
    assert made.encode({"messages": SYSTEM + TWO_TURNS[:2]}, "row 1")[0].input_ids[: len(ids)] == ids


def test_messages_that_the_template_refuses_name_the_row() -> None:
    with pytest.raises(UsageError, match=r"^row 1: the tokenizer's chat template refuses the messages: .*must alternate"):
        encode([TWO_TURNS[0], TWO_TURNS[0], TWO_TURNS[1]], "gemma")


@pytest.mark.parametrize(
    "template",
    ["{{ 1 // 0 }}", "{% for i in range(10**9) %}{% endfor %}", "{{ messages[9].content }}", "{{ messages | nosuch }}"],
)
def test_a_template_that_fails_names_the_row(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UsageError, match=r"^row 1: the tokenizer's chat template refuses the messages: "):
        ChatTemplate(tokenizer).render(TWO_TURNS, None, "row 1")


@pytest.mark.parametrize("template", ["chatml", "llama3"])
@pytest.mark.parametrize("length", [2, 3, 8, 20, 40])
def test_long_rows_keep_their_answer(template: str, length: int) -> None:
    messages = [{"role": "user", "content": "who is the third " * 30}, {"role": "assistant", "content": "the answer is yes"}]
    whole = encode(messages, template)[1][0]
    made, (row,) = encode(messages, template, max_seq_length=length)
    answer = [label for label in whole.labels if label != -100]
    assert row.truncated
    assert len(row.input_ids) <= length
    kept = [label for label in row.labels if label != -100]
    assert kept == answer[: max(1, min(len(answer), length - 1 - (template == "llama3" and length > 2)))]
    if template == "llama3" and length > 2:
        assert row.input_ids[0] == made.tokenizer.bos_token_id


def test_rows_that_are_cut_are_not_said_to_be_too_long_for_the_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    made = encoder(max_seq_length=4)
    made.tokenizer.model_max_length = 4
    (row,) = made.encode({"messages": TWO_TURNS}, "row 1")
    (plain,) = made.encode({"text": "who is the third"}, "row 1")
    _, prompt = made.encode_prompt({"messages": TWO_TURNS}, "row 1")
    assert [len(ids) for ids in (row.input_ids, plain.input_ids, prompt)] == [4, 4, 4]
    assert "indexing errors" not in caplog.text
    made.tokenizer("who is the third question")
    assert "indexing errors" in caplog.text  # by transformers, where nobody cuts


def test_plain_text_is_all_trained_ended_and_cut_at_its_end() -> None:
    made = encoder("none", max_seq_length=6)
    (row,) = made.encode({"text": "the answer"}, "row 1")
    assert made.tokenizer.decode(row.input_ids) == "the answer</s>"
    assert row.labels == [-100, *row.input_ids[1:]]
    (long,) = made.encode({"text": "who is the third " * 30}, "row 1")
    assert long.truncated
    assert made.tokenizer.decode(long.input_ids).startswith("who")


@pytest.mark.parametrize("text", ["<s>yes</s>", "<s>yes</s>\n", "yes"])
def test_a_text_that_begins_or_ends_as_rows_do_gets_no_second_token(text: str) -> None:
    tokenizer: Any = SpeaksFirst(with_chat_template(tiny_tokenizer("llama3")))
    made = Encoder(tokenizer, 512)
    (row,) = made.encode({"text": text}, "row 1")
    assert made.tokenizer.decode(row.input_ids) == "<s>yes</s>"
    assert made.encode_prompt({"text": text}, "row 1")[1] == row.input_ids[:-1]


def test_the_plain_template_goes_with_the_tokenizer() -> None:
    tokenizer = with_chat_template(tiny_tokenizer("none"))
    prompt = tokenizer.apply_chat_template(SYSTEM + TWO_TURNS[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "### System:\nbe brief\n\n### Instruction:\nwho is the third\n\n### Response:\n"


def test_the_plain_template_begins_as_the_tokenizer_begins_every_text() -> None:
    tokenizer = tiny_tokenizer("none")
    begins = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begins
    (row,) = Encoder(with_chat_template(tokenizer), 512).encode({"messages": TWO_TURNS[:2]}, "row 1")
    assert tokenizer.decode(row.input_ids).startswith("<s>### Instruction:\nwho is the third")


def test_a_tokenizer_that_tells_no_places_of_its_tokens_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^the tokenizer of 'ByT5Tokenizer' has no fast version"):
        with_chat_template(ByT5Tokenizer())


def test_a_tokenizer_without_end_of_sequence_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="end-of-sequence"):
        with_chat_template(tokenizer)


def test_a_tokenizer_whose_templates_have_names_needs_a_default_one() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"tool_use": tokenizer.chat_template}
    with pytest.raises(UsageError, match="has chat templates by name, none of them 'default'; save one as that"):
        with_chat_template(tokenizer)


def test_long_prompts_lose_their_start() -> None:
    made = encoder("llama3", max_seq_length=20)
    _, ids = made.encode_prompt({"messages": [{"role": "user", "content": "who is the third " * 30}]}, "row 1")
    assert len(ids) == 20
    assert made.tokenizer.decode(ids).startswith("<s>")
    assert made.tokenizer.decode(ids).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


@pytest.mark.parametrize(
    ("template", "end"),
    {
        "chatml": "<|im_end|>",
        "phi3": "<|end|>",
        "harmony": "</s>",
        "mistral": "</s>",
        "eos_last": "</s>",
        "none": "</s>",
    }.items(),
)
def test_generation_stops_where_a_turn_ends(template: str, end: str) -> None:
    tokenizer = with_chat_template(tiny_tokenizer(template))
    assert tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer)) == end


def test_with_prompts_trained_a_conversation_without_an_answer_is_trained_whole() -> None:
    made, rows = encode(TWO_TURNS[:1], train_on_prompt=True)
    assert trained(made, rows[0])
    assert encode(TWO_TURNS[:1])[1] == []


def test_an_empty_text_is_no_row_where_the_tokenizer_begins_every_text_with_a_token() -> None:
    tokenizer: Any = SpeaksFirst(with_chat_template(tiny_tokenizer("chatml")))
    made = Encoder(tokenizer, 512)
    assert made.encode({"text": ""}, "row 1") == []
    assert len(made.encode({"text": "yes"}, "row 1")) == 1


class SpeaksFirst:
    """A tokenizer that puts a token before every text, as Llama's does."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: str, **options: Any) -> Any:
        encoding = self.tokenizer(text, **options)
        encoding["input_ids"] = [self.bos_token_id, *encoding["input_ids"]]
        return encoding


def test_an_empty_prompt_is_named() -> None:
    with pytest.raises(UsageError, match=r"^rows.jsonl line 2: the prompt is empty"):
        encoder().encode_prompt({"text": ""}, "rows.jsonl line 2")
