"""The same random harvests through Oryx 0.2.9 and through ours: the same values, and the same mistakes refused.

Oryx's last release imports on JAX 0.4.38 only, so it runs in a virtual environment of its own. Where it is known to be
wrong (`WRONG` below) the programs drawn leave that out; each such case is stated once, with what Oryx does and with
what plain Python says.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import interp_jax.transforms.harvest as ours
from interp_jax.core.errors import four_part
from tests.transforms.harvest.random_harvests import Case, draw_case, kinds_in, perform, to_json, truth
from tests.transforms.harvest.random_programs import KINDS, Block

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-oryx" / "bin" / "python"
SEEDS = range(48)
CARELESS_SEEDS = range(24)


def sow(name: str, mode: str) -> Block:
    return Block("sow", name=name, mode=mode)


def block(kind: str, *inner: Block, number: float = 1.0, name: str = "") -> Block:
    return Block(kind, (inner, inner) if kind == "cond" else (inner,), number=number, name=name)


def program(*blocks: Block) -> Block:
    return Block("jit", (blocks,))


A, B = sow("a", "clobber"), sow("b", "append")
IF_A, IF_B = sow("a", "cond_clobber"), sow("b", "cond_clobber")
DIFFERS = "other values"
# What Oryx 0.2.9 does, by case; ours does as plain Python.
WRONG = {
    "a loop with modes mixed treats all sows by the mode of one": (
        Case(program(block("scan", IF_A, B, number=3.0))),
        DIFFERS,
    ),
    "the same, in the other order": (Case(program(block("scan", A, IF_B, number=3.0))), "cond predicate is None"),
    "a nest forgets predicates": (Case(program(block("nest", sow("c", "cond_clobber"), name="s"))), DIFFERS),
    "a conditional sow under vmap": (Case(program(block("vmap", IF_A))), "select `which` must be scalar"),
    "what a loop clobbers cannot be planted": (
        Case(program(block("scan", A, number=3.0)), plants={"a": [1.0, 2.0, 3.0]}),
        "safe_zip",
    ),
    "an allowlist drops scopes": (Case(program(block("nest", A, B, name="s")), allowlist=["a"]), DIFFERS),
    "custom_vjp inside jit": (Case(program(block("jit", block("custom_vjp", A)))), "Effects not supported"),
    "while inside scan": (Case(program(block("scan", block("while", A, number=2.0), number=2.0))), "safe_zip"),
    "scan inside two gradients": (
        Case(program(block("grad", block("grad", block("scan", B, number=2.0))))),
        "safe_zip",
    ),
    "nest inside cond": (Case(program(block("cond", block("nest", B, name="s")))), "'dict' object has no attribute"),
}

pytestmark = pytest.mark.slow


def oryxs(cases: list[Case], folder: Path) -> list[dict[str, Any]]:
    """What Oryx makes of cases: arrays by path, or "error"."""
    if not PYTHON.exists():
        raise FileNotFoundError(
            four_part(
                f"No {PYTHON.relative_to(ROOT)} was found",
                where="the differential test against Oryx",
                expected="a virtual environment with oryx 0.2.9 and JAX 0.4.38 (constraints-oryx.txt).",
                fix="run `make venv-oryx`, or `make test-slow`, which does.",
            )
        )
    given, results = folder / "cases.json", folder / "results.json"
    given.write_text(to_json(cases))
    command = [PYTHON, "-m", "tests.transforms.harvest.random_harvests", given, results]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(results.read_text())
    assert len(outcomes) == len(cases)
    return [
        one if "error" in one else {path: np.reshape(v, shape) for path, (shape, v) in one.items()} for one in outcomes
    ]


def ours_of(case: Case) -> dict[str, Any]:
    """What our module makes of a case: arrays by path, or "error"."""
    try:
        return perform(case, ours)
    except ValueError as error:
        return {"error": str(error)}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The paths at which two outcomes differ."""
    assert "error" not in one and "error" not in other, (one.get("error"), other.get("error"))
    return [
        path
        for path in sorted(one.keys() | other.keys())
        if path not in one
        or path not in other
        or np.shape(one[path]) != np.shape(other[path])
        or not np.allclose(one[path], other[path], rtol=1e-5, atol=1e-5)
    ]


@pytest.fixture(autouse=True)
def _quick_to_compile() -> Any:
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def test_the_same_values(tmp_path: Path) -> None:
    cases = [draw_case(seed, for_oryx=True) for seed in SEEDS]
    # Every construct, every mode and every option is among them.
    kinds = set().union(*(kinds_in(case.program) for case in cases))
    assert kinds == set(KINDS) | {"jit"}
    assert {case.around for case in cases} == {"eager", "jit", "vmap", "grad"}
    for option in ("plants", "allowlist", "blocklist", "exclusive"):
        assert sum(bool(getattr(case, option)) for case in cases) >= 3, option
    for seed, case, theirs in zip(SEEDS, cases, oryxs(cases, tmp_path), strict=True):
        assert differences(perform(case, ours), theirs) == [], (seed, case, str(case.program))


def test_the_same_mistakes(tmp_path: Path) -> None:
    cases = [draw_case(seed, for_oryx=True, careless=True) for seed in CARELESS_SEEDS]
    refused = 0
    for seed, case, theirs in zip(CARELESS_SEEDS, cases, oryxs(cases, tmp_path), strict=True):
        mine = ours_of(case)
        about = (seed, mine.get("error"), theirs.get("error"), str(case.program))
        assert ("error" in mine) == ("error" in theirs), about
        if "error" not in mine:
            assert differences(mine, theirs) == [], about
            continue
        refused += 1
        # Our messages say what Oryx's say, and more; a mismatch of modes it finds by accident.
        words = theirs["error"].removeprefix("ValueError: ").rstrip(".")
        assert re.sub(r"[^:]*/", "", mine["error"]).startswith(words.split(":")[0]) or "safe_map" in words, about
    assert 6 <= refused <= len(cases) - 6


def test_where_oryx_is_wrong_ours_is_right(tmp_path: Path) -> None:
    for (name, (case, what)), theirs in zip(
        WRONG.items(), oryxs([case for case, _ in WRONG.values()], tmp_path), strict=True
    ):
        right = truth(case)
        assert differences(perform(case, ours), right) == [], name
        if what == DIFFERS:
            assert differences(theirs, right) != [], name
        else:
            assert what in theirs["error"], (name, theirs)
