"""Turns the parser's errors into one line: the key, what is wrong with it, and the nearest right one."""

import argparse
import inspect
import re
from collections.abc import Collection, Iterable, Iterator
from pydoc import locate
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer

from ows_lightning.cli.config_files import BASE
from ows_lightning.data import InstructionDataModule
from ows_lightning.errors import UsageError, closest_name, command_line, did_you_mean
from ows_lightning.module import CausalLMModule
from ows_lightning.sampling.callback import LayerwiseSampling

# The sections that describe a class, and the class that they describe by default.
SECTIONS = {"model": CausalLMModule, "data": InstructionDataModule, "sampling": LayerwiseSampling}
_TYPE_NAMES = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list",
    "dict": "a mapping of keys to values", "collections.abc.Iterable": "a list", "tuple": "a list",
    "collections.abc.Sequence": "a list", "tuple with 2 elements": "a list of two values",
}  # fmt: skip
_OTHERS_NAMES = {  # what transformers and TRL call our keys
    "learning_rate": "model.optimizer.lr", "lr": "model.optimizer.lr", "num_train_epochs": "trainer.max_epochs",
    "per_device_train_batch_size": "data.batch_size", "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "max_grad_norm": "trainer.gradient_clip_val", "output_dir": "trainer.default_root_dir", "bf16": "trainer.precision",
    "save_steps": "checkpoint.every_n_train_steps", "resume_from_checkpoint": "ckpt_path", "fp16": "trainer.precision",
    "eval_steps": "trainer.val_check_interval", "logging_steps": "trainer.log_every_n_steps",
}  # fmt: skip
_NONE = "<class 'NoneType'>"
_EMPTY_SECTION_ERROR = "{}: nothing is given below it; write its keys there, or delete the line"
_NAMEABLE = (LightningModule, LightningDataModule, Callback, Logger, Optimizer)

# What jsonargparse says of a mistyped key, class or value.
_KEY = re.compile(r'Parser key "([^"]+)":\s*')
_EMPTY_SECTION = re.compile(r"Unexpected config: (\w+):\s*$")
_CLASS_PATH = re.compile(r"class_path[ =]'(.+?)'")
_UNKNOWN = re.compile(r"Option '(.+?)' is not accepted|does not accept option '(.+?)'|unrecognized arguments: (\S+)")
_REQUIRED = re.compile(r"the following arguments are required: ([^,\s]+)")
_NO_MAPPING = re.compile(r"Not a valid subclass of LayerwiseSampling.*Given value: (.*?)\s*$", re.DOTALL)
# The name of a model, or of rows, for the class: that of a class has a capital in its last part.
_NAME = re.compile(r'Parser key "(model|data)":(?!.*Parser key).*<class .(?:str|list).>\s+Given value: (.*?)\s*$', re.DOTALL)
_CLASS_OR_YAML = re.compile(r"[\w.]*[A-Z]\w*|.*\.ya?ml")
_NO_CLASS = re.compile(r"(?:dot import path string: |has no attribute ')([\w.]+)")
_EXPECTED = re.compile(r"Expected an? (<class .+?>|typing\.Literal\[.+?\]|tuple with \d+ elements)(?:\.|$)")
_VALUE = re.compile(r"G(?:iven|ot) value: (.*?)(?:\. Got value: .*)?$")
_FRAME = ("Does not validate", "Subtypes: ", "Errors:", "Problem with given", "Given value", "Expected a", "Subclass types")


class OneLineParser(LightningArgumentParser):
    """Lightning's parser, whose errors are UsageErrors of one line, without a list of all two hundred options."""

    foreign_keys: Collection[tuple[str, Any]] = ()  # which another command writes: with this value, or any (...)

    def parse_string(self, *args: Any, **kwargs: Any) -> Namespace:
        """Parses the text of a config file."""
        config = super().parse_string(*args, **kwargs)
        for key, value in ((BASE, ...), *self.foreign_keys):
            if value is ... or config.get(key) in (value, str(value)):  # a path is text there
                config.pop(key, None)
        return config

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises the error as a UsageError, with the message in one line."""
        if not self.exit_on_error:  # a nested parser, whose error becomes part of the outer one's
            super().error(message, ex)
        raise UsageError(one_line(message, self)) from ex


def one_line(message: str, parser: argparse.ArgumentParser) -> str:
    """Turns one of jsonargparse's messages, of many lines and nested as the keys are, into one line."""
    keys: list[str] = []
    expected: list[str] = []  # of the innermost key
    reason = ""  # jsonargparse's own words
    owner: Any = None
    if found := _EMPTY_SECTION.match(message):
        return _EMPTY_SECTION_ERROR.format(found[1])
    if found := _NO_MAPPING.search(message):
        return _no_class_message("sampling", found[1])
    if (found := _NAME.match(message)) and not _CLASS_OR_YAML.fullmatch(found[2]):
        return f"{found[1]}: '{found[2][:80]}' is no class; did you mean '{found[1]}.{_arguments(SECTIONS[found[1]])[0]}'?"
    for line in message.splitlines():
        line = line.strip().removeprefix("- ")
        while not reason and (found := _KEY.search(line)):
            keys.append(found[1])
            expected, line = [], line[found.end() :]
            owner = SECTIONS.get(".".join(keys), owner)
        key = ".".join(keys)
        if found := _CLASS_PATH.search(line):
            owner = locate(found[1])
        if found := _UNKNOWN.search(line):
            return _unknown_key_message(key, found, owner, parser)
        if found := _REQUIRED.search(line):
            return _missing_key_message(key, found[1])
        if found := _NO_CLASS.search(line):
            return _no_class_message(key, found[1])
        if found := _EXPECTED.match(line):
            expected.append(found[1])
        elif not line.startswith(_FRAME):
            reason = reason or line.rpartition("callable class: ")[2].partition(". Got value: ")[0]
        if found := _VALUE.search(line):
            if reason or not set(expected) - {_NONE}:
                break
            return _wrong_type_message(key, found[1], expected)
    reason = reason or f"the value does not fit; `{_help_command(parser)}` says which type it has"
    return f"{key}: {reason}" if key else reason


def _unknown_key_message(key: str, found: re.Match[str], owner: Any, parser: argparse.ArgumentParser) -> str:
    of_class, of_command, as_typed = found.groups()
    if of_class:
        wrong, known = f"{key}.{of_class}", [f"{key}.{name}" for name in _arguments(owner)]
    else:
        wrong, known = (of_command or as_typed.lstrip("-").partition("=")[0]).replace(".init_args.", "."), []
    near = _nearest_key(wrong, {*known, *_known_keys(parser)} - {wrong})
    subject = f"{as_typed}: there is no such option" if as_typed else f"{wrong}: there is no such key"
    return subject + (f"; did you mean '{near}'?" if near else f"; `{_help_command(parser)}` lists all")


def _missing_key_message(key: str, name: str) -> str:
    command, _, rest = name.partition(".")
    name = f"{key}.{name}" if key else rest or command
    if name in SECTIONS:  # both have defaults, so the user has set them to null
        return _EMPTY_SECTION_ERROR.format(name)
    return f"{name}: not given, and it has no default; put it into the YAML file or write --{name}"


def _nearest_key(key: str, known: Iterable[str]) -> str | None:
    """The key that is meant: it has the same last name or one like it, as `max_steps` and `trainer.max_steps` have."""
    if (meant := _OTHERS_NAMES.get(key.rpartition(".")[2])) is not None:
        return meant
    section, _, last = key.rpartition(".")
    names = {other: other.rpartition(".")[2] for other in known}
    beside = [names[other] for other in names if other.rpartition(".")[0] == section]  # else any section's
    name = last if last in names.values() else closest_name(last, beside) or closest_name(last, names.values())
    alike = [other for other in names if names[other] == name]
    return closest_name(key, alike, cutoff=0) or (_nearest_key(section, names) if "." in section else None)


def _help_command(parser: argparse.ArgumentParser) -> str:
    _, *command = parser.prog.replace(" [options]", "").split(maxsplit=1)
    return command_line(" ".join([*(command or ["COMMAND"]), "--help"]))


def _wrong_type_message(key: str, value: str, expected: list[str]) -> str:
    choices = [choice for text in expected if "Literal" in text for choice in re.findall(r"'([^']+)'", text)]
    kinds = [text.removeprefix("<class '").removesuffix("'>") for text in expected if "Literal" not in text and text != _NONE]
    listed = ["one of " + ", ".join(choices)] if len(choices) > 1 else choices
    wanted = [_TYPE_NAMES.get(kind, kind) for kind in kinds] + listed
    return f"{key}: '{value}' is not {' or '.join(dict.fromkeys(wanted))}{did_you_mean(value, choices)}"


def _no_class_message(key: str, name: str) -> str:
    if key == "sampling":
        return f"sampling: '{name}' is no mapping of keys, as in sampling.threshold; null trains all blocks (methods/full)"
    short, known = name.rpartition(".")[2], set().union(*map(_subclasses, _NAMEABLE))
    hint = did_you_mean(short, known) if short not in known else ""  # it may be a class, but of another kind
    return f"{key}: '{name}' is no class that fits here" + (hint or "; give its full path, as in my_package.my_module.MyClass")


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


def _subclasses(kind: type) -> set[str]:
    return {kind.__name__}.union(*map(_subclasses, kind.__subclasses__()))
