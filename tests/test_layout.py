"""Which folder of the package may import which, and which modules stand beside the folders."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ows_lightning"
# A folder or module imports from layers above its own here, and of its own layer only what comes before it.
LAYERS = [
    ["errors", "atomic_files", "compat"],
    ["models"],
    ["optim", "offload", "fit"],
    ["checkpoints", "metrics", "data", "sampling", "report"],
    ["distributed"],
    ["step", "evaluation", "module"],
    ["memory"],
    ["callbacks", "integrations"],
    ["trainer"],
    ["cli"],
]
ORDER = {name: number for number, name in enumerate(name for layer in LAYERS for name in layer)}


def imports(path: Path) -> Iterator[str]:
    """What a file imports of the package, also within functions: the first name below `ows_lightning`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "ows_lightning":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ows_lightning."):
            yield str(node.module).split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("ows_lightning."))


def test_imports_follow_the_layers() -> None:
    paths = [*PACKAGE.glob("*/**/*.py"), *PACKAGE.glob("[!_]*.py")]
    assert len(paths) > 80
    for path in paths:
        folder = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        later = {other for other in imports(path) if ORDER[other] > ORDER[folder]}
        assert not later, f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(later))}, which comes later"


def test_few_modules_stand_beside_the_folders() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules <= {"module", "evaluation", "step", "trainer", "errors", "atomic_files", "compat"}
