"""``compare``: the base model and the tuned one answer the same, side by side."""

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from ows_lightning.cli.chat import add_generation_flags, standard_input
from ows_lightning.cli.help import CommandParser
from ows_lightning.errors import UsageError


def compare(argv: list[str]) -> None:
    """Asks both models, prints a table, and writes it where the run's report looks for it."""
    parser = CommandParser("compare", "Ask the base model and the tuned one the same, and show the answers side by side.")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="Questions; by default the lines of standard input")
    parser.add_argument("--model", required=True, help="The tuned model: a directory, a run's folder or a checkpoint in it")
    parser.add_argument("--base", help="The base model; by default the one that the run of --model started from")
    parser.add_argument("--output", type=Path, help="A folder for comparison.csv; by default the run's, whose report shows it")
    add_generation_flags(parser)
    args = parser.parse_args(argv)
    from ows_lightning.cli.conversation import load_conversation
    from ows_lightning.cli.preflight import check_writable
    from ows_lightning.report.run import RunRecord, is_run_folder, newest_run, run_containing
    from ows_lightning.report.tables import key_figures, write_csv

    run_folder = run_containing(newest_run(Path(args.model)))
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
