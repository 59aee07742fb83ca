"""``report`` and ``apply-delta``, which need no config: they read folders and write one."""

from pathlib import Path

from ows_lightning.cli.help import CommandParser
from ows_lightning.errors import typed_path


def report(argv: list[str]) -> None:
    """``report RUN [RUN ...]``: draws runs, or serves the page of one that is running."""
    parser = CommandParser("report", "Draw one run or compare several, from their folders alone.")
    parser.add_argument("runs", type=typed_path, nargs="*", metavar="RUN", help="A folder that `fit` or `score` wrote")
    parser.add_argument("--output", type=typed_path, help="Where to write; by default the folder of a single run, or `report`")
    parser.add_argument("--watch", metavar="RUN", help="Serve this run's page on 127.0.0.1 until the run ends or Ctrl-C")
    parser.add_argument("--port", type=int, default=0, help="The port of --watch; by default a free one")
    args = parser.parse_args(argv)
    if args.watch is not None:
        if args.runs or args.output:
            parser.error("--watch takes one run, and writes nothing")
        from ows_lightning.report.watch import watch

        watch(typed_path(args.watch), args.port)
        return
    if args.port:
        parser.error("--port is the port of --watch")
    from ows_lightning.report.write import write_report

    output = args.output or (args.runs[0] / "report" if len(args.runs) == 1 else Path("report"))
    print(f"Written: {write_report(args.runs, output)}")


def apply_delta(argv: list[str]) -> None:
    """``apply-delta BASE DELTA``: writes the model, and says how much smaller the delta is."""
    parser = CommandParser("apply-delta", "Make a model from its base and a delta of `export --delta`, bit for bit.")
    parser.add_argument("base", metavar="BASE", help="The model that the run started from: hub name, directory or .gguf file")
    parser.add_argument("delta", type=typed_path, metavar="DELTA", help="The delta's directory")
    parser.add_argument("--output", type=typed_path, help="The directory to write; by default DELTA-model")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run code from the base's repository")
    args = parser.parse_args(argv)
    from ows_lightning.models import delta

    output = args.output or Path(f"{args.delta.absolute()}-model")
    sizes = delta.apply_delta(args.base, args.delta, output, args.trust_remote_code)
    print(f"Written: {output} (the delta has {sizes})")
