"""Trains several methods on the same data by the command line, and writes a report that compares them.

Run it with ``python examples/compare_methods.py ows lisa``. Rates are those of the configs: tune each before you conclude.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ows_lightning.cli.main import main as command
from ows_lightning.report import write_report


def main(methods: list[str], *flags: str) -> Path:
    """Runs the quickstart with each method, and returns the page that compares them."""
    for method in methods:
        folder = f"--trainer.default_root_dir=runs/compare/{method}"
        configs = ["--config", "configs/quickstart.yaml", "--config", f"configs/methods/{method}.yaml"]
        command(["fit", *configs, folder, *flags])
    return write_report([f"runs/compare/{method}" for method in methods], Path("runs/compare/report"))


if __name__ == "__main__":
    print("Written:", main(sys.argv[1:] or ["ows", "lisa"]))
