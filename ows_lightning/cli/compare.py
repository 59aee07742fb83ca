"""``compare --model DIR PROMPT ...``: the same prompts, answered by the base model and by the tuned one."""

from __future__ import annotations

import csv
import shutil
import textwrap
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from ows_lightning.cli.chat import add_generation_flags, standard_input
from ows_lightning.cli.help import CommandParser
from ows_lightning.errors import UsageError


def compare(words: list[str]) -> None:
    """Asks both models, prints a table, and writes it where the run's report looks for it."""
    parser = CommandParser("compare", "Ask the base model and the tuned one the same, and show the answers side by side.")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="Questions; by default the lines of standard input")
    parser.add_argument("--model", required=True, help="The tuned model: a directory, a run's folder or a checkpoint in it")
    parser.add_argument("--base", help="The base model; by default the one that the run of --model started from")
    parser.add_argument("--output", type=Path, help="A folder for comparison.csv; by default the run's, whose report shows it")
    add_generation_flags(parser)
    given = parser.parse_args(words)
    from ows_lightning.cli.conversation import load
    from ows_lightning.cli.preflight import check_writable
    from ows_lightning.report.run import run_folder_of

    run_folder = run_folder_of(Path(given.model))
    base = given.base or _base(run_folder)
    prompts = given.prompts or [line.strip() for line in standard_input() if line.strip()]
    if not prompts:
        raise UsageError("compare: no prompt is given; write some, or send them through a pipe, a line each")
    if (output := given.output or run_folder) is not None:
        check_writable("output", output)
    answers = []
    for name in (base, given.model):
        conversation = load(name, given)
        of_this = []
        for prompt in prompts:
            conversation.reset(given.system)
            of_this.append(conversation.ask(prompt))
        answers.append(of_this)
        del conversation  # one model at a time
    rows = [("prompt", "base", "tuned"), *zip(prompts, *answers, strict=True)]
    print(_table(rows))
    if output is not None:
        with (output / "comparison.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
        print(f"Written: {output / 'comparison.csv'}")


def _base(run_folder: Path | None) -> str:
    from ows_lightning.report.run import RunRecord

    model = ((RunRecord.read(run_folder).config if run_folder else None) or {}).get("model") or {}
    if not (name := model.get("init_args", model).get("model_name_or_path")):
        raise UsageError("base: no run is known that made --model; name the model that it was made from, by --base")
    return str(name)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Three columns side by side, as wide as the terminal, with a line below each row."""
    width = max(20, (shutil.get_terminal_size((100, 24)).columns - 6) // 3)
    lines = []
    for row in rows:
        cells = [[part for line in cell.splitlines() or [""] for part in textwrap.wrap(line, width) or [""]] for cell in row]
        lines += [" | ".join(part.ljust(width) for part in parts).rstrip() for parts in zip_longest(*cells, fillvalue="")]
        lines.append("-+-".join(["-" * width] * 3))
    return "\n".join(lines)
