"""The entry point: finds the command and ends it. A command's imports happen only when it is chosen."""

import importlib
import io
import logging
import os
import sys
import warnings
from typing import NoReturn

from ows_lightning.cli import peer_watchdog
from ows_lightning.cli.exit_codes import message_and_exit_code
from ows_lightning.errors import UsageError, command_line, did_you_mean

log = logging.getLogger(__name__)
CONFIG_COMMANDS = {
    "fit": "Train",
    "validate": "Evaluate on the validation rows: loss, perplexity, exact match",
    "test": "Evaluate on the test rows",
    "predict": "Write the model's answers to rows",
    "score": "Compute the blocks' outlier scores alone",
    "plan": "Predict the memory that a config needs, and what other methods would",
    "export": "Write a checkpoint's model as a Hugging Face directory",
}
"""The commands that take ``--config``; methods of CommandTrainer, which LightningCLI runs."""

OTHER_COMMANDS = {
    "chat": ("chat", "Talk to a model, in the terminal or through a pipe"),
    "compare": ("chat", "Show the answers of the base and the tuned model side by side"),
    "apply-delta": ("folder_commands", "Make a model from a base and a delta of `export --delta`"),
    "report": ("folder_commands", "Draw one run or compare several, from their folders; --watch shows a running one"),
    "configs": ("config_files", "List the config files that come with this package"),
}
"""The other commands: the module of this folder with a function of that name, which takes the arguments, and the help."""

_IGNORED_WARNINGS = (
    "does not have many workers",  # rows are tokenised beforehand, so workers have nothing to do
    r"isinstance\(treespec, LeafSpec\)|skip_none parameter was deprecated|is_gradient_checkpointing",  # deprecated calls
    "Total length of `list` across ranks is zero",  # data.val_size: 0
    "GPU available but not used",
    "The dirpath has changed from",  # the folder of a resumed run, or of an evaluation, is a new one
)
_IGNORED_LOGS = {
    "lightning.pytorch.utilities.rank_zero": ("litlogger", "GPU available:", "TPU available:", "HPU available:"),
    "torch._subclasses.fake_tensor": ("failed while attempting to run meta for",),  # a stack trace; it raises, too
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
}
"""Messages that libraries print at every start, by who logs them, and that a user can do nothing about."""


def main(args: list[str] | None = None) -> None:
    """Runs one command, by default that of the program's arguments; an error ends it with one line, and exit code 2 or 1."""
    argv = sys.argv[1:] if args is None else args
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # answers may have letters that the terminal lacks
    for message in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", f".*(?:{message})")
    for name, messages in _IGNORED_LOGS.items():
        logging.getLogger(name).addFilter(lambda r, m=messages: not any(text in r.getMessage() for text in m))  # type: ignore
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("ows_lightning").setLevel(logging.INFO)
    try:
        _run(argv)
        peer_watchdog.stop(program_ends=args is None)
    except (Exception, KeyboardInterrupt) as error:
        exit_with(error, argv)
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):  # Lightning turns an interrupt into SystemExit
            raise
        exit_with(error.__context__, argv)


def _run(argv: list[str]) -> None:
    names = (*CONFIG_COMMANDS, *OTHER_COMMANDS)
    listed = f"; commands: {', '.join(names)}"
    if not argv:
        raise UsageError(f"no command is given{listed}")
    command = argv[0]
    asks_help = command in CONFIG_COMMANDS and bool({"-h", "--help"} & {*argv})
    if command in ("-h", "--help"):
        print(usage())
    elif command.startswith("-"):
        raise UsageError(f"{command}: the command comes first, before its options")
    elif command not in names:
        raise UsageError(f"there is no command '{command}'{did_you_mean(command, names) or listed}")
    elif command in CONFIG_COMMANDS and command != "plan" and not asks_help:
        _run_lightning(command, argv)
    else:
        try:
            if asks_help:
                from ows_lightning.cli.help import help_text

                print(help_text(command, CONFIG_COMMANDS[command]))
            elif command in OTHER_COMMANDS:
                module = importlib.import_module(f"ows_lightning.cli.{OTHER_COMMANDS[command][0]}")
                getattr(module, command.replace("-", "_"))(argv[1:])
            else:
                _run_lightning(command, argv)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader of our output, such as `head`, has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)


def _run_lightning(command: str, argv: list[str]) -> None:
    if command != "plan":
        peer_watchdog.start()
        if os.environ.get("LOCAL_RANK", "0") == "0":
            log.info("%s: loading libraries", command)  # which takes seconds
    from ows_lightning.cli.lightning_cli import OWSCLI
    from ows_lightning.distributed import destroy_process_group

    logging.getLogger("lightning").handlers.clear()  # the root logger prints its messages already
    OWSCLI(argv)
    destroy_process_group()


def usage() -> str:
    """Returns the general help: a line for each command."""
    lines = [f"usage: {command_line('COMMAND')} [--config FILE ...] [--KEY VALUE ...]", "", "Commands that take a config:"]
    lines += [f"  {name:<12} {description}" for name, description in CONFIG_COMMANDS.items()]
    lines += ["", "Others:"]
    lines += [f"  {name:<12} {description}" for name, (_, description) in OTHER_COMMANDS.items()]
    return "\n".join([*lines, "", f"`{command_line('COMMAND --help')}` lists a command's options."])


def exit_with(error: BaseException, argv: list[str]) -> NoReturn:
    """Ends the program with one line about an error of a command, or with its stack trace if OWS_DEBUG is 1."""
    line, code = message_and_exit_code(error, argv[0] if argv else "fit")
    peer_watchdog.abort(code)
    if os.environ.get("OWS_DEBUG") == "1":
        raise error
    print(f"error: {line}", file=sys.stderr)
    raise SystemExit(code) from None
