"""``COMMAND --help``: read from the sources of commands that take a config, since imports take seconds; else argparse's."""

import argparse
import ast
import shutil
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import docstring_parser

from ows_lightning.errors import UsageError, command_line

DEFAULTS: dict[str, Any] = {"model.optimizer.lr": 3e-4, "checkpoint.save_last": True}  # other ones than the classes'
_OURS = {  # instead of what Lightning says
    "ckpt_path": "A checkpoint, or `last` for the newest run's; without it `fit` starts anew, the others take the base model",
    "weights_only": "Changes nothing: checkpoints are always read as tensors and plain values, which can run no code",
    "trainer.default_root_dir": "The folder above those of the runs; `runs` if it is not given",
}
_PACKAGE = Path(__file__).parents[1]
_NO_OPTIONS = {"self", "config", "model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders", "params"}
_GENERAL_OPTIONS = """\
--config FILE
  A YAML file, or the name of a shipped one (see `configs`); several are laid over one another
--print_config
  Print the resulting config, and exit
--seed_everything int (default: 0)
  Seed of dropout and of new weights; data.seed orders the rows, sampling.seed draws the blocks
"""
_CLASS_HELP = """\
Without any key of sampling every block trains.
Another model or optimizer is named by its class: --model my_package.MyModule, --model.optimizer torch.optim.AdamW.
Its arguments follow: --model.optimizer.lr 1e-4; in YAML they stand below class_path and init_args.
`{} --model.help CLASS` lists them."""


class CommandParser(argparse.ArgumentParser):
    """argparse's, for the commands that take no config: no abbreviated options, and errors are UsageErrors."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=command_line(command), description=description, allow_abbrev=False)
        self.command = command

    def error(self, message: str) -> NoReturn:
        """Raises argparse's message as a UsageError."""
        raise UsageError(f"{self.command}: {message}; `{self.prog} --help` lists the options")


def help_text(command: str, description: str) -> str:
    """Returns the help of a command: its description, its own options, and the keys of each section of a config."""
    (package,) = find_spec("lightning").submodule_search_locations  # type: ignore[union-attr, misc]
    lightning = Path(package) / "pytorch"
    trainer, ours = lightning / "trainer" / "trainer.py", _PACKAGE / "cli" / "commands.py"
    sections = {
        "model": (_PACKAGE / "module.py", "CausalLMModule"),
        "model.optimizer": (_PACKAGE / "optim" / "galore.py", "GaLoreAdamW"),
        "data": (_PACKAGE / "data" / "datamodule.py", "InstructionDataModule"),
        "sampling": (_PACKAGE / "sampling" / "sampler.py", "BlockSampler"),
        "checkpoint": (lightning / "callbacks" / "model_checkpoint.py", "ModelCheckpoint"),
        "trainer": (trainer, "Trainer"),
    }
    own = options(trainer, "Trainer", command) | options(ours, "CommandTrainer", command)
    usage = f"usage: {command_line(command)} [--config FILE ...] [--KEY VALUE ...]\n\n{description}.\n"
    parts = [usage, _GENERAL_OPTIONS, *own.values()]
    for key, (file, name) in sections.items():
        parts += ["", f"{key}: {name}", *options(file, name, "__init__", f"{key}.").values()]
    return "\n".join([*parts, "", _CLASS_HELP.format(command_line(command))])


def options(file: Path, owner: str, function: str, prefix: str = "") -> dict[str, str]:
    """Returns the options that a method of a class in a source file has as arguments, if there is one: each with its help."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    kind = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == owner)
    methods = (node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name == function)
    if (method := next(methods, None)) is None:
        return {}
    described = {}
    for node in (kind, method):
        for entry in docstring_parser.parse(ast.get_docstring(node) or "").params:
            described[entry.arg_name] = " ".join((entry.description or "").split())
    width = min(shutil.get_terminal_size().columns, 120)
    plain, named = method.args.args, method.args.kwonlyargs
    defaults = [*[None] * (len(plain) - len(method.args.defaults)), *method.args.defaults, *method.args.kw_defaults]
    found = {}
    for argument, default in zip([*plain, *named], defaults, strict=True):
        if argument.arg in _NO_OPTIONS:
            continue
        name, description = f"{prefix}{argument.arg}", described.get(argument.arg, "")
        if not file.is_relative_to(_PACKAGE):
            description = _OURS.get(name, description.split(". ")[0])  # Lightning's documentation has the rest
        type_ = "" if argument.annotation is None else f" {ast.unparse(argument.annotation)}"
        shown = DEFAULTS.get(name, "" if default is None else ast.unparse(default).replace("None", "null"))
        lines = textwrap.wrap(description, width, initial_indent="  ", subsequent_indent="  ")
        found[name] = "\n".join([f"--{name}{type_}{f' (default: {shown})' if shown != '' else ''}", *lines])
    return found
