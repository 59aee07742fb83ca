"""``apply-delta BASE DELTA``: makes a model of its base and a delta."""

from pathlib import Path

from ows_lightning.cli.help import CommandParser


def apply_delta(argv: list[str]) -> None:
    """Writes the model, and says how much smaller the delta is."""
    parser = CommandParser("apply-delta", "Make a model from its base and a delta of `export --delta`, bit for bit.")
    parser.add_argument("base", metavar="BASE", help="The model that the run started from: hub name, directory or .gguf file")
    parser.add_argument("delta", metavar="DELTA", help="The delta's directory")
    parser.add_argument("--output", type=Path, help="The directory to write; by default DELTA-model")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run code from the base's repository")
    args = parser.parse_args(argv)
    from ows_lightning.models import delta

    output = args.output or Path(f"{Path(args.delta).absolute()}-model")
    sizes = delta.apply_delta(args.base, args.delta, output, args.trust_remote_code)
    print(f"Written: {output} (the delta has {sizes})")
