"""The README: its Python runs, block after block, as a reader would type it.

Source: interp_jax.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest

from tests.source_tree import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a language: the line each starts on, and its text."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [(README.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in found]


def test_python_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "readme"}
    for line, source in blocks("python"):
        # Padded, so that a traceback shows the README's own line numbers.
        exec(compile("\n" * (line - 1) + source, str(ROOT / "README.md"), "exec"), names)
    printed = capsys.readouterr().out
    assert "hidden" in printed
    assert "+" in printed
    assert "sow(y, name='dense')" in printed


def test_the_loop_is_ten_lines() -> None:
    _, source = blocks("python")[0]
    assert len([line for line in source.splitlines() if line.strip()]) <= 10


def test_the_commands_the_readme_names_exist() -> None:
    from interp_jax import cli

    named = {shlex.split(command)[1] for command in re.findall(r"`(interp-jax [^`]+)`", README)}
    assert {"demo", "lens", "doctor"} <= named
    assert [command for command in sorted(named) if cli.main([command, "--help"]) != 0] == []
    assert cli.main(["no-such-command", "--help"]) != 0


def test_every_file_the_readme_names_exists() -> None:
    named = set(re.findall(r"`([\w./-]+/(?:[\w-]+\.\w+)?)`", README)) | set(re.findall(r"\]\(([\w.]+)\)", README))
    made_by_running = {"runs/", ".venv/bin/"}
    missing = [
        name
        for name in named - made_by_running
        if not (ROOT / name).exists() and not (ROOT / "interp_jax" / name).exists()
    ]
    assert missing == []
