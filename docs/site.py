"""What the site does to the pages: all modules on one page, and links to source files lead there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lists the package's modules on their page, and points ``[`name`](../ows_lightning/a/b.py)`` at ``name`` there."""
    if page.file.src_uri == "modules.md":
        modules = sorted(ROOT.glob("ows_lightning/**/*.py"))
        paths = (path.relative_to(ROOT).with_suffix("").parts for path in modules if path.name != "__init__.py")
        markdown += "\n".join(f"::: {'.'.join(parts)}\n    options: {{heading_level: 2}}\n" for parts in paths)
    else:  # what stands on that page, too, is linked to there
        markdown = re.sub(r"^::: .+$", r"\g<0>\n    options: {skip_local_inventory: true}\n", markdown, flags=re.MULTILINE)
    markdown = re.sub(
        r"\[`(\w+)`\]\(\.\./(ows_lightning[\w/]*)\.py\)",
        lambda found: f"[`{found[1]}`][{found[2].replace('/', '.')}.{found[1]}]",
        markdown,
    )
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", markdown)
