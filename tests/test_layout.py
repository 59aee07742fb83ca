"""The house: which folder may import which, and what stands loose beside them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ows_lightning"
# A folder or module imports from floors below its own; of its own floor only what comes before it.
FLOORS = [
    ["errors", "compat"],
    ["models"],
    ["optim", "offload"],
    ["checkpoints", "metrics", "data", "sampling", "report"],
    ["distributed"],
    ["step", "evaluation", "module"],
    ["memory"],
    ["callbacks", "integrations"],
    ["trainer"],
    ["cli"],
]
ORDER = {name: number for number, name in enumerate(name for floor in FLOORS for name in floor)}


def imports(path: Path) -> Iterator[str]:
    """What a file imports of the package, also within functions: the first name below `ows_lightning`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "ows_lightning":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ows_lightning."):
            yield str(node.module).split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("ows_lightning."))


def test_imports_run_downwards() -> None:
    paths = [*PACKAGE.glob("*/**/*.py"), *PACKAGE.glob("[!_]*.py")]
    assert len(paths) > 80
    for path in paths:
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        above = {other for other in imports(path) if ORDER[other] > ORDER[room]}
        assert not above, f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(above))}, which is above it"


def test_few_modules_stand_loose() -> None:
    loose = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert loose <= {"module", "evaluation", "step", "trainer", "errors", "compat"}
