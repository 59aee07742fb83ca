from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from ows_lightning.data.formats import FORMATS, DataFormat, recognise, rename, split_prompt, to_example
from ows_lightning.errors import UsageError

QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def example(row: dict[str, Any]) -> dict[str, Any]:
    return to_example(row, recognise(row, "row 1"), "row 1")


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, [QUESTION, ANSWER]),
        ({"instruction": "q", "input": "x", "output": "a"}, [{"role": "user", "content": "q\n\nx"}, ANSWER]),
        ({"instruction": "q", "output": "a", "system": "s"}, [{"role": "system", "content": "s"}, QUESTION, ANSWER]),
        ({"prompt": "q", "completion": "a"}, [QUESTION, ANSWER]),
        ({"prompt": [QUESTION], "completion": [ANSWER]}, [QUESTION, ANSWER]),
        (  # of a CSV file
            {"prompt": '[{"role": "user", "content": "q"}]', "completion": '[{"role": "assistant", "content": "a"}]'},
            [QUESTION, ANSWER],
        ),
        ({"prompt": [QUESTION, ANSWER, QUESTION], "completion": "a"}, [QUESTION, {**ANSWER, "weight": 0}, QUESTION, ANSWER]),
        ({"messages": [QUESTION, ANSWER]}, [QUESTION, ANSWER]),
        ({"messages": '[{"role": "user", "content": "q"}]'}, [QUESTION]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}], "name": None}]}, [QUESTION]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [QUESTION, ANSWER]),
        ({"messages": [QUESTION, {**ANSWER, "tool_calls": []}]}, [QUESTION, ANSWER]),
        ({"messages": [{"role": "developer", "content": "s"}, QUESTION, ANSWER]}, [SYSTEM, QUESTION, ANSWER]),
        ({"conversations": [{"from": "function_response", "value": "3"}]}, [{"role": "tool", "content": "3"}]),
        ({"prompt": "q", "choices": ["x", "a"], "answer": 1}, [QUESTION, ANSWER]),
        ({"prompt": "q", "choices": ["x", "a"], "answer": "B"}, [QUESTION, ANSWER]),
        ({"prompt": "q", "choices": ["a", "B"], "answer": "B"}, [QUESTION, {**ANSWER, "content": "B"}]),
        ({"prompt": "q", "choices": '["x", "a"]', "answer": "1"}, [QUESTION, ANSWER]),  # of a CSV file
        ({"prompt": "q", "choices": '["1", "a"]', "answer": "1"}, [QUESTION, {**ANSWER, "content": "1"}]),
        ({"prompt": "q", "choices": ["True", "False"], "answer": True}, [QUESTION, {**ANSWER, "content": "True"}]),
        ({"prompt": "q", "choices": ["true", "false"], "answer": False}, [QUESTION, {**ANSWER, "content": "false"}]),
        ({"instruction": "q", "answer": "a"}, [QUESTION, ANSWER]),
        ({"messages": [QUESTION], "choices": ["x", "a"], "answer": 1}, [QUESTION, ANSWER]),
        ({"conversations": [{"from": "human", "value": "q"}], "answer": "a"}, [QUESTION, ANSWER]),
        ({"messages": [QUESTION, ANSWER], "answer": "b"}, [QUESTION, ANSWER]),
        ({"prompt": [QUESTION], "choices": ["x", "a"], "answer": "B"}, [QUESTION, ANSWER]),
        ({"prompt": [QUESTION], "completion": [ANSWER], "system": "s"}, [SYSTEM, QUESTION, ANSWER]),
        ({"prompt": [SYSTEM, QUESTION], "completion": [ANSWER], "system": "t"}, [SYSTEM, QUESTION, ANSWER]),
    ],
)
def test_every_format_becomes_a_conversation(row: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    assert example(row)["messages"] == messages


def test_every_format_can_be_asked_for() -> None:
    assert get_args(DataFormat) == tuple(FORMATS)


def test_plain_text() -> None:
    assert example({"text": "t"}) == {"text": "t"}


def test_tools_and_their_calls_reach_the_chat_template() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": '[{"type": "function"}]',
    }
    made = example(row)
    assert made["tools"] == [{"type": "function"}]
    assert made["messages"][1]["content"] is None
    assert made["messages"][1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize("tools", ["[]", "null", "", [], None])
def test_no_tools_are_none_however_they_are_written(tools: Any) -> None:
    """A list, even an empty one, has some templates write what introduces functions."""
    assert "tools" not in example({"messages": [QUESTION, ANSWER], "tools": tools})


@pytest.mark.parametrize("several", [False, True])
def test_a_call_under_sharegpts_role_is_one(several: bool) -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    openais = {"type": "function", "function": call}
    value = json.dumps([call, openais] if several else call)
    made = example({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": value}]})
    calls = [openais] * (1 + several)
    assert made["messages"][1] == {"role": "assistant", "content": None, "tool_calls": calls}


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"prompt": "q"}, [QUESTION]),
        ({"prompt": [QUESTION]}, [QUESTION]),
        ({"instruction": "q", "system": "s"}, [{"role": "system", "content": "s"}, QUESTION]),
        ({"messages": [QUESTION, ANSWER, QUESTION]}, [QUESTION, ANSWER, QUESTION]),
        ({"conversations": [{"from": "human", "value": "q"}]}, [QUESTION]),
    ],
)
def test_prompts_need_no_answer(row: dict[str, Any], question: list[dict[str, Any]]) -> None:
    made = to_example(row, recognise(row, "row 1", requires_answer=False), "row 1", requires_answer=False)
    messages, reference = split_prompt(made["messages"])
    assert ([{k: v for k, v in m.items() if k != "weight"} for m in messages], reference) == (question, "")


def test_empty_arguments_of_a_call_are_kept() -> None:
    call = {"id": None, "function": {"name": "f", "arguments": {"x": None}}}
    made = example({"messages": [QUESTION, {"role": "assistant", "tool_calls": [call]}]})
    assert made["messages"][1]["tool_calls"] == [{"function": {"name": "f", "arguments": {"x": None}}}]


def test_reasoning_alone_is_an_answer() -> None:
    thinking = {"role": "assistant", "reasoning_content": "hm", "content": None}
    assert example({"messages": [QUESTION, thinking]})["messages"][1] == thinking


def test_what_arrow_adds_to_functions_is_left_out() -> None:
    """It gives all of a column the same keys, which a chat template would write down as null."""
    tools = [{"type": "function", "function": {"name": "f", "strict": None}}]
    made = example({"messages": [QUESTION, ANSWER], "tools": tools})
    assert made["tools"] == [{"type": "function", "function": {"name": "f"}}]


def test_answer_and_choices_are_kept() -> None:
    made = example({"instruction": "q", "output": "the answer is b", "answer": "b", "choices": ["a", "b"]})
    assert (made["answer"], made["choices"]) == ("b", ["a", "b"])


def test_split_prompt_cuts_off_the_answer_at_the_end() -> None:
    assert split_prompt([QUESTION, ANSWER, QUESTION, ANSWER]) == ([QUESTION, ANSWER, QUESTION], "a")
    assert split_prompt([QUESTION]) == ([QUESTION], "")
    assert split_prompt([QUESTION, ANSWER, QUESTION]) == ([QUESTION, ANSWER, QUESTION], "")


@pytest.mark.parametrize(("label", "trained"), [(True, True), (False, False), ("False", False), (0, True)])
def test_an_answer_to_avoid_is_not_trained(label: object, trained: bool) -> None:
    """TRL's rows for KTO, whose label a CSV file has as text; a number is a label of something else."""
    messages = example({"prompt": "q", "completion": "a", "label": label})["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"][: 1 + trained]


def test_columns_are_renamed() -> None:
    assert rename({"question": "q", "reply": "a"}, {"instruction": "question", "output": "reply"}, "row 1") == {
        "instruction": "q",
        "output": "a",
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"instruction": "q", "ouput": "a"},
            "columns 'instruction', 'ouput' fit no format; .* 'ouput': did you mean 'output'",
        ),
        (
            {"instruction": "q", " output": "a"},
            "' output': did you mean 'output'",
        ),  # of a CSV file with a space after its comma
        (  # Dolly's: a hint at the format of plain text would train contexts
            {"instruction": "q", "context": "c", "response": "a"},
            r"'response' fit no format; known are .* \(text\) \(data.columns renames columns\)$",
        ),
        ({"messages": []}, "row 1: 'messages' must be a list of messages, got an empty list"),
        ({"messages": [{"role": "usr", "content": "q"}]}, "row 1: 'messages' entry 1 has the role 'usr'; known are .*user"),
        ({"messages": [{"role": "user"}]}, "row 1: 'messages' entry 1: the content must be text, got nothing"),
        ({"messages": ["q"]}, "row 1: 'messages' entry 1 must be an object with role and content, got text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "entry 1: the content must be text, got a list"),
        ({"prompt": "q", "completion": 4}, "row 1: 'completion' must be text, got a number"),
        ({"instruction": ["q"], "output": "a"}, "row 1: 'instruction' must be text, got a list"),
        ({"instruction": "q", "answer": ["a", "b"]}, "row 1: 'answer' must be text, got a list"),
        ({"messages": [QUESTION], "tools": "{"}, "row 1: 'tools' is not valid JSON"),
        ({"messages": [QUESTION], "tools": ["f"]}, "row 1: 'tools' must be a list of objects, got text in it"),
        ({"conversations": [{"from": "function_call", "value": "f(1)"}]}, "entry 1: the function call is not valid JSON"),
        (
            {"conversations": [{"from": "function_call", "value": "1"}]},
            "entry 1: the function call must be a list of objects, got a num",
        ),
        ({"messages": [{"role": ["user"], "content": "q"}]}, r"entry 1 has the role \['user'\]; known are"),
        ({"messages": [{**ANSWER, "reasoning_content": ["hm"]}]}, "entry 1: 'reasoning_content' must be text, got a list"),
        ({"messages": [{**ANSWER, "tool_calls": "f"}]}, "entry 1: 'tool_calls' must be a list of objects, got text"),
        (
            {"messages": [{**ANSWER, "tool_calls": [{"function": "f"}]}]},
            "row 1: 'messages' entry 1: the function of a tool call must be an object with a name, got text",
        ),
        (
            {"messages": [{**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": '"Paris"'}}]}]},
            "row 1: 'messages' entry 1: the arguments of a tool call must be an object, got text",
        ),
        (
            {"messages": [{**ANSWER, "tool_calls": [{"name": "f", "arguments": "oops"}]}]},
            "row 1: 'messages' entry 1: the arguments of a tool call is not valid JSON",
        ),
    ],
)
def test_wrong_rows_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        example(row)


def test_a_row_that_lacks_a_column_of_the_others() -> None:
    with pytest.raises(
        UsageError, match=r"row 7 has no column 'output' or 'answer', which alpaca rows need \(columns: instruction\)"
    ):
        to_example({"instruction": "q"}, "alpaca", "row 7")


def test_a_renamed_column_that_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"data.columns.output: row 1 has no column 'respones' .*did you mean 'response'"):
        rename({"instruction": "q", "response": "a"}, {"output": "respones"}, "row 1")


def test_a_renamed_column_that_a_row_may_lack() -> None:
    columns = {"instruction": "question", "input": "context", "output": "reply"}
    assert rename({"question": "q", "reply": "a"}, columns, "row 1") == {"instruction": "q", "output": "a"}
    assert rename({"question": "q"}, columns, "row 1", requires_answer=False) == {"instruction": "q"}  # of a test set


def test_the_format_whose_columns_the_user_named_comes_before_others_that_fit() -> None:
    columns = {"instruction": "question", "output": "reply"}
    row = rename({"messages": [QUESTION, ANSWER], "question": "x", "reply": "y"}, columns, "row 1")
    assert recognise(row, "row 1", mapped=columns) == "alpaca"
    assert recognise(row, "row 1") == recognise(row, "row 1", mapped={"answer": "reply"}) == "messages"


def test_choices_of_another_form_are_refused() -> None:
    row = {"instruction": "q", "choices": {"text": ["yes", "no"], "label": ["A", "B"]}, "answer": "B"}
    with pytest.raises(UsageError, match="row 1: 'choices' must be a list of texts, got an object"):
        example(row)


# An index from 1, one that pandas made a float, one as text, a letter of none, and a small one.
@pytest.mark.parametrize("answer", [True, 2, -1, 1.0, "1", "E", "b"])
def test_a_number_or_truth_that_is_none_of_the_choices_is_refused(answer: object) -> None:
    expected = f"row 1: the answer {str(answer).lower()} is none of the choices; give one, its index from 0, or its letter"
    with pytest.raises(UsageError, match=expected):
        example({"prompt": "q", "choices": ["yes", "no"], "answer": answer})
