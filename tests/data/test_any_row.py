"""Any row, under any chat template: a well-formed encoding, or one line that names the row.

A few dozen rows by default, always the same. ``OWS_FUZZ=5000 python -m pytest tests/data/test_any_row.py`` draws so many new
ones, and prints the blob that repeats a failure.
"""

from __future__ import annotations

import functools
import json
import os
from typing import Any

import pytest

from ows_lightning.data.encoding import Encoder
from ows_lightning.data.examples import table_row
from ows_lightning.data.rendering import with_chat_template
from ows_lightning.data.sources import DataSource
from ows_lightning.errors import UsageError
from tests.data.samples import TEMPLATES, tiny_tokenizer
from tests.data.test_rendering import FIRST_CALL, NO_SYSTEM, PHI4, QWEN, R1, ZEPHYR

pytest.importorskip("hypothesis", reason="needs the extra `test`")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DRAWS = int(os.environ.get("OWS_FUZZ", "0"))
settings.register_profile(
    "rows",
    max_examples=DRAWS or 60,
    derandomize=not DRAWS,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
ALL_TEMPLATES: dict[str, str | None] = {
    **TEMPLATES, "r1": R1, "zephyr": ZEPHYR, "phi4": PHI4, "qwen": QWEN, "first_call": FIRST_CALL, "no_system": NO_SYSTEM
}  # fmt: skip
ASKED = "\u00a4"  # stands in the middle of all that the model is not to say, and in nothing else

pieces = st.one_of(
    st.sampled_from(
        ["<|im_end|>", "</s>", "<s>", "<think>", "</think>", "\n", " ", "\x00", "🙂", "None", "{{", "a\u0301", "\ud83d"]
    ),
    st.text(st.characters(exclude_characters=ASKED), max_size=6),
)
said = st.lists(pieces, max_size=5).map("".join)
asked = st.tuples(said, said).map(ASKED.join)
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), said),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(said, inner, max_size=3)),
    max_leaves=5,
)


def mostly(usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Now and then something that is no value for this."""
    return st.integers(0, 19).flatmap(lambda number: junk if number == 0 else usual)


arguments = st.dictionaries(said, junk, max_size=2)
function = st.fixed_dictionaries({"name": mostly(said), "arguments": mostly(st.one_of(arguments, arguments.map(json.dumps)))})
call = st.fixed_dictionaries({"function": mostly(function)}, optional={"id": junk, "type": mostly(st.just("function"))})
calls = st.lists(call, max_size=2)
answer = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": mostly(st.one_of(said, st.none()))},
    optional={
        "tool_calls": mostly(calls),
        "weight": mostly(st.sampled_from([0, 1, "0", "1"])),
        "reasoning_content": mostly(said),
    },
)
question = st.fixed_dictionaries(
    {"role": mostly(st.sampled_from(["user", "user", "system", "tool", "human", "function"])), "content": mostly(asked)}
)
conversation = st.lists(st.tuples(question, answer), max_size=3).map(lambda turns: [m for turn in turns for m in turn])
messages = mostly(st.one_of(conversation, st.lists(st.one_of(question, answer), max_size=4)))
rows = st.one_of(
    st.fixed_dictionaries(
        {"messages": messages}, optional={"tools": mostly(st.lists(st.dictionaries(said, junk, max_size=2), max_size=2))}
    ),
    st.fixed_dictionaries({"conversations": messages}, optional={"system": mostly(asked)}),
    st.fixed_dictionaries({"instruction": mostly(asked), "output": mostly(said)}, optional={"input": mostly(asked)}),
    st.fixed_dictionaries({"prompt": mostly(asked), "completion": mostly(said)}),
    st.fixed_dictionaries({"prompt": messages, "completion": messages}),
    st.fixed_dictionaries({"instruction": mostly(asked), "answer": junk, "choices": junk}),
    st.fixed_dictionaries({"text": mostly(said)}),
    st.dictionaries(said, junk, max_size=3),
)


@functools.cache
def encoder(template: str, max_seq_length: int) -> Encoder:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = ALL_TEMPLATES[template]
    return Encoder(with_chat_template(tokenizer), max_seq_length)


@settings(settings.get_profile("rows"))
@given(row=rows, template=st.sampled_from(sorted(ALL_TEMPLATES)), max_seq_length=st.sampled_from([2, 3, 17, 100_000]))
def test_any_row_is_well_encoded_or_refused_by_its_name(row: dict[str, Any], template: str, max_seq_length: int) -> None:
    row = json.loads(json.dumps(row))
    made = encoder(template, max_seq_length)
    refused: UsageError | None = None
    try:
        _, entry = table_row(row, "line 7", DataSource("rows", "dataset", (), ("train",)), None, {})
        example = json.loads(entry["example"])
        encoded = made.encode(example, "line 7")
        made.unshown_parts(example)
        prompt_ids = made.encode_prompt(example, "line 7")[1]
    except UsageError as error:
        refused = error
    if refused is not None:
        assert str(refused).startswith("line 7")
        assert "\n" not in str(refused)
        return
    assert len(prompt_ids) <= max_seq_length
    for one in encoded:
        assert len(one.input_ids) == len(one.labels) <= max_seq_length
        assert one.labels[0] == -100
        assert all(label in (-100, token) for token, label in zip(one.input_ids, one.labels, strict=True))
        assert one.num_targets > 0
        if "messages" in example:
            targets = made.tokenizer.decode([label for label in one.labels if label != -100])
            assert ASKED not in targets
        if not one.truncated:
            again = made.tokenizer(made.tokenizer.decode(one.input_ids), add_special_tokens=False).input_ids
            assert made.tokenizer.decode(again) == made.tokenizer.decode(one.input_ids)
