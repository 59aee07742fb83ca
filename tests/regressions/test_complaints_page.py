"""docs/complaints.md lists what is tested here, and no more."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "complaints.md"
_CITED = re.compile(r"(?:LMFlow|GaLore|LLaMA-Factory|transformers|axolotl|ms-swift|TRL|litgpt|Lightning) \d+")


def cited_in_tests() -> list[str]:
    """The complaints that first lines of tests cite."""
    functions = [
        node
        for file in Path(__file__).parent.glob("test_*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and file.name != Path(__file__).name
    ]
    assert all(ast.get_docstring(function) for function in functions)
    return [complaint for f in functions for complaint in _CITED.findall(str(ast.get_docstring(f)).splitlines()[0])]


def test_the_page_and_the_tests_cite_the_same() -> None:
    tested = cited_in_tests()
    assert len(tested) == len(set(tested)) >= 14
    assert sorted(tested) == sorted(re.findall(r"\[([\w-]+ \d+)\]", PAGE.read_text()))


def test_links_lead_to_the_issue_that_is_named() -> None:
    links = re.findall(r"\[[\w-]+ (\d+)\]\(https://github\.com/[\w-]+/[\w-]+/issues/(\d+)\)", PAGE.read_text())
    assert len(links) == len(cited_in_tests())
    assert all(named == linked for named, linked in links)
