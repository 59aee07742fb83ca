"""The parser's errors as one line: the key, what is wrong with it, and the nearest right one."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer

from ows_lightning.cli.config_files import BASE
from ows_lightning.data import InstructionDataModule
from ows_lightning.errors import UsageError, closest, nearest
from ows_lightning.module import CausalLMModule
from ows_lightning.sampling.callback import LayerwiseSampling

SECTIONS = {"model": CausalLMModule, "data": InstructionDataModule, "sampling": LayerwiseSampling}
"""The sections that describe a class, and the class that they describe by default."""

_KINDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list",
    "dict": "a mapping of keys to values", "NoneType": "null", "collections.abc.Iterable": "a list",
}  # fmt: skip
_NOTHING = "{}: nothing is given below it; write its keys there, or delete the line"
_NAMEABLE = (LightningModule, LightningDataModule, Callback, Logger, Optimizer)


class OneLineParser(LightningArgumentParser):
    """Lightning's parser, whose errors are UsageErrors of one line, without the usage of all two hundred options.

    Attributes:
        foreign_keys: Keys that a config file may have, because `fit` writes them, though this parser does not have them.
    """

    foreign_keys: Collection[str] = ()

    def parse_string(self, *args: Any, **kwargs: Any) -> Namespace:
        """Parses the text of a config file."""
        config = super().parse_string(*args, **kwargs)
        for key in (*self.foreign_keys, BASE):
            config.pop(key, None)
        return config

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises the error.

        Raises:
            UsageError: With the message in one line.
        """
        if not self.exit_on_error:  # a parser within the parser, whose error becomes a part of the outer one's
            super().error(message, ex)
        raise UsageError(one_line(message, self)) from ex


def one_line(message: str, parser: argparse.ArgumentParser) -> str:
    """Turns one of jsonargparse's messages, of many lines and nested as the keys are, into one line."""
    keys: list[str] = []
    expected: list[str] = []
    owner: Any = None
    for line in map(str.strip, message.removeprefix("- ").splitlines()):
        line = line.removeprefix("- ")
        while found := re.search(r'Parser key "(?P<key>[^"]+)":\s*', line):
            keys.append(found["key"])
            expected, line = [], line[found.end() :]
            owner = SECTIONS.get(".".join(keys), owner)
        key = ".".join(keys)
        if found := re.match(r"Problem with given class_path '(.+)':", line):
            owner = import_class(found[1])
        if found := re.search(r"Option '(.+?)' is not accepted", line):
            if named := re.search(r"class_path='(.+?)'", line):
                owner = import_class(named[1])
            return _unknown(f"{key}.{found[1]}", [f"{key}.{name}" for name in _arguments(owner)], parser)
        if found := re.search(r"does not accept option '(.+?)'", line):
            return _unknown(found[1].replace(".init_args.", "."), (), parser)
        if found := re.match(r"unrecognized arguments: (\S+)", line):
            return _unknown(found[1].lstrip("-").split("=")[0], (), parser, as_typed=found[1])
        if found := re.search(r"the following arguments are required: (.+)", line):
            name = found[1].split(",")[0].partition(".")
            name = f"{key}.{found[1]}" if key else name[2] or name[0]
            if name in SECTIONS:  # they have defaults: only null can have taken them away
                return _NOTHING.format(name)
            return f"{name}: not given, and it has no default; put it into the YAML file or write --{name}"
        if found := re.match(r"Unexpected config: (\w+):\s*$", message):
            return _NOTHING.format(found[1])
        if found := re.match(r"argument (?:-c/)?--(\S+?)(?:/\S+)?: expected one argument", line):
            return f"{found[1]}: no value is given; write --{found[1]} VALUE"
        if found := re.search(r"Expected '(.+?)' to be a subclass of <class '(.+?)'>", line):
            return f"{key}: '{found[1]}' is no {found[2].rpartition('.')[2]}; name a class that is one"
        if found := re.search(
            r"dot import path string: (\S+)|has no attribute '.+'\. Got value: (\S+)|has no attribute '(.+)'", line
        ):
            return _no_class(key, next(filter(None, found.groups())))
        if not set(expected) - {"<class 'NoneType'>"} and (
            found := re.match(r"Given value: NestedArg\(key='(.+)', val=(.*)\)$", line)
        ):
            return f"{key.partition('.')[0]}.{found[1]}: {found[2]} does not fit; `{_help(parser)}` says of which type it is"
        if found := re.match(r"Expected an? (.+?)(?:\. Got value: .*)?$", line):
            expected.append(found[1])
        value = re.match(r"Given value: (.*)|.*?Got value: (.*?)(?:\. Got value: .*)?$", line)
        if value and expected:
            return _wrong_type(key, value[1] or value[2], expected)
    return " ".join(message.split())


def _unknown(key: str, known: Iterable[str], parser: argparse.ArgumentParser, as_typed: str | None = None) -> str:
    subject = f"{as_typed}: there is no such option" if as_typed else f"{key}: there is no such key"
    near = _nearest_key(key, {*known, *_known_keys(parser)})
    return subject + (f"; did you mean '{near}'?" if near else f"; `{_help(parser)}` lists all")


def _nearest_key(key: str, known: Iterable[str]) -> str | None:
    """The key that is meant: it has the same last name or one like it, as `max_steps` and `trainer.max_steps` have."""
    by_name: dict[str, list[str]] = {}
    for other in known:
        by_name.setdefault(other.rpartition(".")[2], []).append(other)
    name = closest(key.rpartition(".")[2], by_name)
    return closest(key, known) if name is None else closest(key, by_name[name], cutoff=0)


def _help(parser: argparse.ArgumentParser) -> str:
    return f"{parser.prog.replace(' [options]', '')} --help"


def _wrong_type(key: str, value: str, expected: list[str]) -> str:
    choices = [choice for text in expected for choice in re.findall(r"'([^']+)'", text) if "Literal" in text]
    kinds = [re.sub(r"<class '(.+)'>", r"\1", text) for text in expected if text.startswith(("<class '", "tuple with"))]
    wanted = [_KINDS.get(kind, kind.rpartition(".")[2]) for kind in kinds if not (choices and kind == "int")]
    wanted = ["one of " + ", ".join(choices)] * bool(choices) + [kind for kind in wanted if kind != "null"] or ["null"]
    return f"{key}: '{value}' is not {' or '.join(dict.fromkeys(wanted))}{nearest(value, choices) if choices else ''}"


def _no_class(key: str, name: str) -> str:
    if key == "sampling":
        return f"sampling: '{name}' is no mapping of keys, such as sampling.distribution; null trains all blocks"
    mend = nearest(name.rpartition(".")[2], (kind.__name__ for base in _NAMEABLE for kind in _subclasses(base)))
    return f"{key}: there is no class '{name}'" + (mend or "; give its full path, as in my_package.my_module.MyClass")


def _known_keys(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from _known_keys(subparser)
        else:
            yield action.dest
    yield from (f"{section}.{name}" for section, kind in SECTIONS.items() for name in _arguments(kind))


def _arguments(kind: Any) -> list[str]:
    return [] if kind is None else [name for name in inspect.signature(kind).parameters if name not in ("args", "kwargs")]


def import_class(path: str) -> Any:
    """Returns what a full path names, or None."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return None


def _subclasses(kind: type) -> Iterator[type]:
    subclass: type
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
