"""The formats of instruction data, recognised from their columns and turned into one: a conversation or plain text."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from ows_lightning.errors import UsageError, closest_name, did_you_mean

Row = Mapping[str, Any]
Message = dict[str, Any]
#: What every format becomes: ``messages`` (OpenAI's form) or ``text``, and where the row has them ``tools`` (functions
#: shown to the chat template), ``answer`` and ``choices`` (for scoring), all plain JSON values.
Example = dict[str, Any]
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
_ROLES |= {"function_call": "assistant", "observation": "tool", "function_response": "tool", "developer": "system"}
_ROLES |= {role: role for role in ("system", "user", "assistant", "tool", "function")}
_MESSAGES_AS_TEXT = ('[{"role"', '[{"from"', '[{"content"')  # of a CSV file
_WEIGHT_VALUES = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}


def to_example(row: Row, data_format: str, row_name: str, requires_answer: bool = True) -> Example:
    """Turns a row, whose columns have the names of its format, a key of `FORMATS`, into an example.

    A UsageError names the row whose column is missing (the answer's only with `requires_answer`), empty or of a wrong type.
    """
    if missing := _first_missing(data_format, row, requires_answer):
        names = " or ".join(f"'{name}'" for name in missing)
        raise UsageError(f"{row_name} has no column {names}, which {data_format} rows need ({_names(row)})")
    choices, answer = row.get("choices"), row.get("answer")
    if isinstance(choices, str) and choices.startswith("[") and answer is not None:  # of a CSV file, where an index is text
        choices = _parsed_json(choices, f"{row_name}: 'choices'")
        answer = answer if answer in choices or not f"{answer}".isdecimal() else int(answer)
        row = {**row, "choices": choices, "answer": answer}
    example = FORMATS[data_format][1](row, row_name)
    avoided = str(row.get("label")).lower() == "false"  # of TRL's rows for KTO; text in a CSV file
    if data_format == "prompt_completion" and avoided:
        example["messages"] = split_prompt(untrained(example["messages"]))[0]
    tools, what = row.get("tools"), f"{row_name}: 'tools'"
    if tools and (tools := _parsed_json(tools, what) if isinstance(tools, str) else without_none(tools)):
        example["tools"] = _objects(tools, what)
    return example | {name: row[name] for name in ("answer", "choices") if row.get(name) is not None}


def recognise(columns: Iterable[str], row_name: str, requires_answer: bool = True, mapped: Collection[str] = ()) -> str:
    """The format of columns (the answer's only with `requires_answer`), `mapped` ones first; an error names the nearest."""
    columns = list(columns)
    fitting = [name for required in (True, requires_answer) for name in FORMATS if not _first_missing(name, columns, required)]
    if fitting:
        return max(fitting, key=lambda name: sum(c in mapped for group in FORMATS[name][0] for c in group if c != "answer"))
    names = [{column for group in needed for column in group} for needed, _ in FORMATS.values()]
    begun = [of_format for of_format in names if not of_format.isdisjoint(columns)]
    wanted = set().union(*(begun or names)) - set(columns)
    near = {column: closest_name(column, wanted) for column in columns}
    hint = next((f"; '{_shortened(column)}': did you mean '{name}'?" for column, name in near.items() if name), "")
    known = ", ".join(f"{name} ({', '.join('|'.join(group) for group in needed)})" for name, (needed, _) in FORMATS.items())
    there = ", ".join(f"'{_shortened(column)}'" for column in columns)
    raise UsageError(f"{row_name}: columns {there} fit no format; known are {known}{hint} (data.columns renames columns)")


def rename(row: Row, columns: Mapping[str, str], row_name: str, requires_answer: bool = True) -> Row:
    """Puts the user's columns under the names of the format: ``columns={"instruction": "question"}``.

    Where a row fits no format then, of each that it needs (the answer's only with `requires_answer`) one of both has to be
    there: other sources may have columns of other names.
    """
    renamed = {name: row[column] for name, column in columns.items() if column in row}
    renamed = {**{name: value for name, value in row.items() if name not in columns.values()}, **renamed}
    if all(_first_missing(data_format, renamed, requires_answer) for data_format in FORMATS):
        needed = {name for data_format in FORMATS for group in _needed_columns(data_format, requires_answer) for name in group}
        for name, own in columns.items():
            if name in needed and own not in row and name not in row:
                what = f"{row_name} has no column '{own}' ({_names(row)}){did_you_mean(own, row)}"
                raise UsageError(f"data.columns.{name}: {what}")
    return renamed


def split_prompt(messages: list[Message]) -> tuple[list[Message], str]:
    """Cuts off the answer with which a conversation ends: the messages to answer, and its text (empty without one)."""
    answered = bool(messages) and messages[-1]["role"] == "assistant"
    return (messages[:-1], messages[-1]["content"] or "") if answered else (messages, "")


def index_of_choice(answer: Any, choices: Sequence[Any]) -> int | None:
    """Which of the choices is meant by one of them, by its index from 0, or by its letter; None for anything else."""
    if isinstance(answer, bool):  # equal to 0 or 1 in Python, and not meant as an index
        answer, choices = str(answer).lower(), [str(choice).lower() for choice in choices]
    if answer in choices:
        return choices.index(answer)
    if isinstance(answer, str) and len(answer) == 1 and answer.isupper():
        answer = ord(answer) - ord("A")
    return answer if isinstance(answer, int) and 0 <= answer < len(choices) else None


def _from_messages(row: Row, row_name: str, column: str = "messages") -> Example:
    turns = row[column]
    if isinstance(turns, str):  # some parquet and CSV files hold it as text
        turns = _parsed_json(turns, f"{row_name}: '{column}'")
    if not isinstance(turns, list) or not turns:
        raise UsageError(f"{row_name}: '{column}' must be a list of messages, got {_type_text(turns)}")
    messages = [_message(turn, f"{row_name}: '{column}' entry {i}") for i, turn in enumerate(turns, start=1)]
    if column in ("messages", "conversations") and messages[-1]["role"] == "user" and row.get("answer") is not None:
        messages += _answer(row, "completion", row_name)
    return {"messages": _with_system(row, messages, row_name)}


def _from_alpaca(row: Row, row_name: str) -> Example:
    question, context = _text(row, "instruction", row_name), _text(row, "input", row_name, optional=True)
    return _one_turn(row, f"{question}\n\n{context}" if context else question, "output", row_name)


def _from_prompt_completion(row: Row, row_name: str) -> Example:
    if not isinstance(row["prompt"], list) and not str(row["prompt"]).startswith(_MESSAGES_AS_TEXT):
        return _one_turn(row, _text(row, "prompt", row_name), "completion", row_name)
    prompt = _from_messages(row, row_name, column="prompt")["messages"]
    completion = row.get("completion")
    if completion is None or (isinstance(completion, str) and not completion.startswith(_MESSAGES_AS_TEXT)):
        return {"messages": untrained(prompt) + _answer(row, "completion", row_name)}
    answer = _from_messages({"completion": completion}, row_name, column="completion")  # a system message is the prompt's
    return {"messages": untrained(prompt) + answer["messages"]}


DataFormat = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"]
#: name -> (the columns it needs, each a tuple of alternatives; the conversion). Of several the last is the answer's, which
#: prompts alone do without; `answer` is another name of it, as in test sets.
FORMATS: dict[str, tuple[tuple[tuple[str, ...], ...], Callable[[Row, str], Example]]] = {
    "messages": ((("messages",),), _from_messages),
    "sharegpt": ((("conversations",),), partial(_from_messages, column="conversations")),
    "alpaca": ((("instruction",), ("output", "answer")), _from_alpaca),
    "prompt_completion": ((("prompt",), ("completion", "answer")), _from_prompt_completion),
    "text": ((("text",),), lambda row, row_name: {"text": _text(row, "text", row_name)}),
}
NEEDED_COLUMNS = {column for needed, _ in FORMATS.values() for group in needed for column in group}
#: Every column that a format reads: what `data.columns` may rename to.
COLUMNS = sorted(NEEDED_COLUMNS | {"input", "system", "tools", "choices"})


def _one_turn(row: Row, question: str, answer_column: str, row_name: str) -> Example:
    messages = [{"role": "user", "content": question}, *_answer(row, answer_column, row_name)]
    return {"messages": _with_system(row, messages, row_name)}


def _answer(row: Row, column: str, row_name: str) -> list[Message]:
    if row.get(column) is not None:
        return [{"role": "assistant", "content": _text(row, column, row_name)}]
    answer, choices = row.get("answer"), row.get("choices")
    if isinstance(choices, list) and (index := index_of_choice(answer, choices)) is not None:
        answer = choices[index]
    elif isinstance(choices, list) and (isinstance(answer, (int, float)) or str(answer).isdigit() or len(str(answer)) == 1):
        hint = "give one, its index from 0, or its letter"
        raise UsageError(f"{row_name}: the answer {str(answer).lower()} is none of the choices; {hint}")
    if isinstance(choices, dict):
        raise UsageError(f"{row_name}: 'choices' must be a list of texts, got an object")
    if isinstance(answer, (list, dict)):
        raise UsageError(f"{row_name}: 'answer' must be text, got {_type_text(answer)}")
    return [{"role": "assistant", "content": "" if answer is None else str(answer)}]


def _with_system(row: Row, messages: list[Message], row_name: str) -> list[Message]:
    system = _text(row, "system", row_name, optional=True)
    return [{"role": "system", "content": system}, *messages] if system and messages[0]["role"] != "system" else messages


def untrained(messages: Iterable[Message]) -> list[Message]:
    """Returns the messages with weight 0 for each answer, so that none is trained."""
    return [{**message, "weight": 0} if message["role"] == "assistant" else message for message in messages]


def _message(turn: Any, row_name: str) -> Message:
    """One message in OpenAI's form from either spelling; everything else in it (tool calls, reasoning) is passed through."""
    if not isinstance(turn, dict):
        raise UsageError(f"{row_name} must be an object with role and content, got {_type_text(turn)}")
    message = without_none(turn, keep="arguments")  # an empty argument of a call is part of what the model has to write
    role = message.pop("from", None) or message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise UsageError(f"{row_name} has the role {role!r}; known are {', '.join(sorted(_ROLES))}")
    message["role"] = _ROLES[role]
    content = message.pop("value", None) if "value" in message else message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(part.get("text", "") for part in content)
    if role == "function_call" and isinstance(content, str):  # ShareGPT's role: the text is a call, or a list of calls
        called, content = _parsed_json(content, f"{row_name}: the function call"), None
        calls = _objects(called if isinstance(called, list) else [called], f"{row_name}: the function call")
        message["tool_calls"] = [call if "function" in call else {"type": "function", "function": call} for call in calls]
    if "function_call" in message:  # OpenAI's older form, of a single call
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    if not message.get("tool_calls", True):  # an empty list, which templates take for calls
        del message["tool_calls"]
    says_something_else = message["role"] == "assistant" and (message.get("tool_calls") or message.get("reasoning_content"))
    if not isinstance(content, str) and not (content is None and says_something_else):
        raise UsageError(f"{row_name}: the content must be text, got {_type_text(content)}")
    message["content"] = content
    if "reasoning_content" in message and not isinstance(message["reasoning_content"], str):
        raise UsageError(f"{row_name}: 'reasoning_content' must be text, got {_type_text(message['reasoning_content'])}")
    if "weight" in message:
        if (weight := _WEIGHT_VALUES.get(str(message["weight"]).lower())) is None:
            raise UsageError(f"{row_name}: 'weight' must be 0 (not trained) or 1, got {message['weight']!r}")
        message["weight"] = weight
    if "tool_calls" in message:
        for call in _objects(message["tool_calls"], f"{row_name}: 'tool_calls'"):
            function = call.get("function", call)
            if not isinstance(function, dict):
                found = _type_text(function)
                raise UsageError(f"{row_name}: the function of a tool call must be an object with a name, got {found}")
            arguments, what = function.get("arguments"), f"{row_name}: the arguments of a tool call"
            if isinstance(arguments, str):  # as in OpenAI's API; chat templates expect the object
                arguments = function["arguments"] = _parsed_json(arguments, what)
            if arguments is not None and not isinstance(arguments, dict):
                raise UsageError(f"{what} must be an object, got {_type_text(arguments)}")
    return message


def without_none(value: Any, keep: str | None = None) -> Any:
    """Drops the empty keys that Arrow adds so that all objects of a column have the same ones; keeps those below `keep`."""
    if isinstance(value, dict):
        return {k: v if k == keep else without_none(v, keep) for k, v in value.items() if v is not None}
    return [without_none(v, keep) for v in value] if isinstance(value, list) else value


def _objects(value: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise UsageError(f"{what} must be a list of objects, got {_type_text(value)}")
    if others := [entry for entry in value if not isinstance(entry, dict)]:
        raise UsageError(f"{what} must be a list of objects, got {_type_text(others[0])} in it")
    return value


def _parsed_json(text: str, row_name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{row_name} is not valid JSON: {error}") from None


def _text(row: Row, column: str, row_name: str, optional: bool = False) -> str:
    value = row.get(column)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise UsageError(f"{row_name}: '{column}' must be text, got {_type_text(value)}")
    return value


def _first_missing(data_format: str, columns: Iterable[str], requires_answer: bool) -> tuple[str, ...]:
    """The first column that a format needs and that is not there, with its alternatives."""
    columns = set(columns)
    return next((group for group in _needed_columns(data_format, requires_answer) if not columns.intersection(group)), ())


def _needed_columns(data_format: str, requires_answer: bool) -> tuple[tuple[str, ...], ...]:
    """The columns that a format needs, each with its alternatives; the answer's only with `requires_answer`."""
    groups, _ = FORMATS[data_format]
    return groups if requires_answer or len(groups) == 1 else groups[:-1]


def _type_text(value: Any) -> str:
    names = {type(None): "nothing", bool: "a truth value", int: "a number", float: "a number", str: "text", list: "a list"}
    if value == [] and isinstance(value, list):
        return "an empty list"
    return names.get(type(value), "an object" if isinstance(value, dict) else f"a {type(value).__name__}")


def _shortened(name: str) -> str:
    """A name from the data, shortened to fit a line, with what white space it has."""
    return repr(name[:60])[1:-1]


def _names(row: Iterable[str]) -> str:
    return f"columns: {', '.join(map(_shortened, row))}"
