"""``apply-delta BASE DELTA --output DIR``: makes a model from its base and a delta."""

from __future__ import annotations

from pathlib import Path

from ows_lightning.cli.help import CommandParser


def run(words: list[str]) -> None:
    """Writes the model, and says how much smaller the delta is."""
    parser = CommandParser("apply-delta", "Make a model from its base and a delta of `export --delta`, bit for bit.")
    parser.add_argument("base", metavar="BASE", help="The model that the run started from: hub name, directory or .gguf file")
    parser.add_argument("delta", metavar="DELTA", help="The delta's directory")
    parser.add_argument("--output", type=Path, default=Path("model"), help="The directory to write (default: model)")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run code from the base's repository")
    given = parser.parse_args(words)
    from ows_lightning.models.delta import apply_delta

    sizes = apply_delta(given.base, given.delta, given.output, given.trust_remote_code)
    print(f"Written: {given.output} (the delta has {sizes})")
