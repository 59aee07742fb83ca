"""``chat MODEL``: a conversation in the terminal, or with lines from a pipe; ``compare``: two models answer the same."""

import argparse
import io
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import TextIO

from ows_lightning.cli.help import CommandParser
from ows_lightning.errors import UsageError, typed_path

_HELP = "/reset forgets the conversation, /system TEXT also sets the system message, /exit ends"


def chat(argv: list[str]) -> None:
    """Loads the model, and answers each line."""
    parser = CommandParser("chat", f"Talk to a model. A line is a message; {_HELP}.")
    parser.add_argument("path", nargs="?", metavar="MODEL", help="The same as --model")
    parser.add_argument("--model", help="A directory, hub name, .gguf file, delta, run's folder or checkpoint")
    add_generation_flags(parser)
    args = parser.parse_args(argv)
    if (args.path is None) == (args.model is None):
        parser.error("give one model, as MODEL or as --model MODEL")
    from ows_lightning.cli.conversation import load_conversation

    conversation = load_conversation(args.model or args.path, args)
    lines = standard_input()
    typed = lines.isatty()
    if typed:
        print(_HELP)
    try:
        while True:
            if typed:
                print("> ", end="", flush=True)
            line = lines.readline()
            message = line.strip()
            command, _, rest = message.partition(" ")
            if not line or message == "/exit":
                return
            if command == "/reset":
                conversation.reset(conversation.system)
            elif command == "/system":
                conversation.reset(rest.strip() or None)
            elif command.startswith("/") and command[1:].isalpha():
                print(f"there is no {command}; {_HELP}", file=sys.stderr)
            elif message:
                try:
                    conversation.ask(message, stream=True)
                except UsageError as error:  # of this message; the next one may be shorter
                    print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:  # as /exit
        print()


def compare(argv: list[str]) -> None:
    """Asks both models, prints a table, and writes it where the run's report looks for it."""
    parser = CommandParser("compare", "Ask the base model and the tuned one the same, and show the answers side by side.")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="Questions; by default the lines of standard input")
    parser.add_argument("--model", required=True, help="The tuned model: a directory, a run's folder or a checkpoint in it")
    parser.add_argument("--base", help="The base model; by default the one that the run of --model started from")
    parser.add_argument("--output", type=typed_path, help="A folder for comparison.csv; by default the run's, for its report")
    add_generation_flags(parser)
    args = parser.parse_args(argv)
    from ows_lightning.cli.conversation import load_conversation
    from ows_lightning.cli.preflight import check_writable
    from ows_lightning.report.run import RunRecord, is_run_folder, newest_run, run_containing
    from ows_lightning.report.tables import key_figures, write_csv

    run_folder = run_containing(newest_run(typed_path(args.model)))
    run_folder = run_folder if run_folder and is_run_folder(run_folder) else None  # a config.yaml may be of something else
    base = args.base or (run_folder and key_figures(RunRecord.read(run_folder))["model"])
    if not base:
        raise UsageError("base: no run is known that made --model; name the model that it was made from, by --base")
    prompts = args.prompts or [line.strip() for line in standard_input() if line.strip()]
    if not prompts:
        raise UsageError("compare: no prompt is given; write some, or send them through a pipe, a line each")
    if (output := args.output or run_folder) is not None:
        check_writable("output", output)

    def answers(name: str) -> Iterator[str]:
        conversation = load_conversation(name, args)
        for prompt in prompts:
            conversation.reset(args.system)
            yield conversation.ask(prompt)

    table = {"prompt": prompts, "base": [*answers(base)], "tuned": [*answers(args.model)]}  # one model at a time
    print(_table([[*table], *zip(*table.values(), strict=True)]))
    if output is not None:
        write_csv(table, output / "comparison.csv")
        print(f"Written: {output / 'comparison.csv'}")


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Three columns side by side, as wide as the terminal, with a line below each row."""
    width = max(20, (shutil.get_terminal_size((100, 24)).columns - 6) // 3)
    lines = []
    for row in rows:
        cells = [[part for line in cell.splitlines() or [""] for part in textwrap.wrap(line, width) or [""]] for cell in row]
        lines += [" | ".join(part.ljust(width) for part in parts).rstrip() for parts in zip_longest(*cells, fillvalue="")]
        lines.append("-+-".join(["-" * width] * 3))
    return "\n".join(lines)


def standard_input() -> TextIO:
    """Returns standard input, as UTF-8 in any locale, with replacement characters for other bytes; empty if it is closed."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    return sys.stdin or io.StringIO()


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for loading a model to talk to, and for generating its answers; `compare` has them, too."""
    flag = parser.add_argument
    flag("--max_new_tokens", type=_number(1, int), default=256, help="Most tokens of an answer (default: 256)")
    flag("--temperature", type=_number(0, float), default=0.0, help="0, the default, always takes the likeliest token")
    flag("--top_p", type=_number(0, float, 1), default=1.0, help="Draw from the likeliest of this share; needs a temperature")
    flag("--top_k", type=_number(0, int), default=0, help="Draw from this many likeliest (0: all); needs a temperature")
    flag("--seed", type=_number(0, int), default=0, help="Seed of the draws (default: 0)")
    flag("--system", help="The system message")
    flag("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is a GPU)")
    flag("--trust_remote_code", action="store_true", help="Run code that the model's repository brings along")
    flag("--dtype", choices=("float32", "bfloat16", "float16"), help="Of the weights; bfloat16 on a GPU, else float32")


def _number(least: int, kind: Callable[[str], float], most: int = 2**63 - 1) -> Callable[[str], float]:
    def number(text: str) -> float:
        if not least <= (value := kind(text)) <= most:  # nor is NaN
            raise argparse.ArgumentTypeError(f"{value} is out of range; give a number from {least} to {most}")
        return value

    return number
