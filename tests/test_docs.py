"""The pages of docs/: their Python runs as a reader would type it, and what they quote stands in the file they name.

A block of Python without a name runs. One with the name of a file of this repository is a quotation, "..." between
pieces; one with another name is a file that the blocks after it import.

Source: interp_jax.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.source_tree import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
# Their code takes minutes: a model with its real weights writes and reads text.
SLOW = ("steering",)
RUNNABLE = [pytest.param(page, marks=[pytest.mark.slow] * (page.stem in SLOW)) for page in PAGES]


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """The Python blocks of a page: the line each starts on, its name, and its text."""
    text = page.read_text()
    found = re.finditer(r"^```python ?(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(2)) + 1, match[1], match[2]) for match in found]


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, Any] = {"__name__": page.stem}
    written = []
    for line, name, source in blocks(page):
        if not name:
            # Padded, so that a traceback shows the page's own line numbers.
            exec(compile("\n" * (line - 1) + source, str(page), "exec"), names)
        elif not (ROOT / name).exists():
            written.append(Path(name).stem)
            (tmp_path / name).write_text(source)
    for module in written:
        del sys.modules[module]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_quotations_are_true(page: Path) -> None:
    for line, name, source in blocks(page):
        if name and (ROOT / name).exists():
            text = (ROOT / name).read_text()
            wrong = [piece for piece in source.split("...\n") if piece not in text]
            assert wrong == [], f"{page.name}, line {line}: not in {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    named = set(re.findall(r"`([\w./-]+/(?:[\w-]+\.\w+)?)`", text)) | set(re.findall(r"\]\(([\w./]+)\)", text))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    titles = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= titles


def test_a_model_of_ones_own_takes_twenty_lines() -> None:
    runnable = [source for _, name, source in blocks(ROOT / "docs" / "adding_a_family.md") if not name]
    assert "PATCHER = ij.Patcher(" in runnable[0]
    assert len([line for line in runnable[0].splitlines() if line.strip()]) <= 20
