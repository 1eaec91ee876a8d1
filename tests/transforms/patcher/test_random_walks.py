"""Random walks over entering, leaving, installing and uninstalling, against a model of what is in force.

After every step the function, and a compiled function that calls it, must give what the patches in force say.

Source: interp_jax.
"""

from __future__ import annotations

import itertools
import linecache
import types

import jax
import jax.numpy as jnp
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from interp_jax.transforms.patcher import Patcher, PatchError
from interp_jax.transforms.patcher.state import ACTIVE, EMPTY

N = 4
SOURCE: str = """
def f(x):
    a = x + 1000.0
    for i in range(1):  # a comment
        a = a + 1100.0
    def inner(y):
        return y + 1200.0
    return inner(a) + 1300.0
"""
# What the i-th patcher adds to the result.
GAIN = [1.0, 10.0, 100.0, 7.0]
_NUMBERS = itertools.count()


def patches(i: int) -> list[tuple[str, str]]:
    constant = f"1{i}00.0"
    every: list[tuple[str, str]] = [
        (f"x + {constant}", f"x + {constant} + extra"),
        ("for $i in $range: $$body", "for $i in $range:\n    $$body\n    if True:\n        a += extra"),
        ("def inner(y): return $value", "def inner(y):\n    more = extra\n    return $value + more"),
        (f"$rest + {constant}", f"$rest + ({constant} + extra)"),
    ]
    return [every[i]]


class Walk(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        name = f"<random walk {next(_NUMBERS)}>"
        lines: list[str] = SOURCE.splitlines(keepends=True)
        linecache.cache[name] = (len(SOURCE), None, lines, name)
        self.module = types.ModuleType("walked")
        exec(compile(SOURCE, name, "exec"), vars(self.module))
        self.code = self.module.f.__code__
        self.compiled = jax.jit(lambda x: self.module.f(x))
        # A constant of its own in each function: names may not have two meanings.
        self.patchers = [
            Patcher(
                self.module,
                f=[(a, b.replace("extra", f"extra_{i}")) for a, b in patches(i)],
                names={f"extra_{i}": GAIN[i]},
            )
            for i in range(N)
        ]
        self.stack: list[list] = []  # [patcher, has been left out of turn]
        self.installed: set[int] = set()

    def in_force(self) -> set[int]:
        return self.installed | {i for i, _ in self.stack}

    @rule(i=st.integers(0, N - 1))
    def enter(self, i: int) -> None:
        self.patchers[i].__enter__()
        self.stack.append([i, False])

    @precondition(lambda self: self.stack)
    @rule()
    def leave(self) -> None:
        i, _ = self.stack.pop()
        self.patchers[i].__exit__(None, None, None)
        while self.stack and self.stack[-1][1]:
            self.stack.pop()

    @precondition(lambda self: self.stack)
    @rule(i=st.integers(0, N - 1))
    def leave_out_of_turn(self, i: int) -> None:
        if self.stack[-1][0] == i:
            return
        with pytest.raises(PatchError, match="is not the innermost"):
            self.patchers[i].__exit__(None, None, None)
        for entry in reversed(self.stack):
            if entry == [i, False]:
                entry[1] = True
                break

    @rule(i=st.integers(0, N - 1))
    def install(self, i: int) -> None:
        self.patchers[i].install()
        self.installed.add(i)

    @rule(i=st.integers(0, N - 1))
    def uninstall(self, i: int) -> None:
        if i in self.installed and any(i == j for j, _ in self.stack):
            with pytest.raises(PatchError, match="inside its own `with` block"):
                self.patchers[i].uninstall()
        else:
            self.patchers[i].uninstall()
            self.installed.discard(i)

    @invariant()
    def result(self) -> None:
        expected = 4600.0 + sum(GAIN[i] for i in self.in_force())
        assert self.module.f(0.0) == expected
        assert float(self.compiled(jnp.float32(0))) == expected
        assert {name for name in vars(self.module) if name.startswith("extra")} == {
            f"extra_{i}" for i in self.in_force()
        }
        assert [patcher.is_active for patcher in self.patchers] == [i in self.in_force() for i in range(N)]

    def teardown(self) -> None:
        while self.stack:
            self.leave()
        for i in range(N):
            self.uninstall(i)
        assert ACTIVE.state is EMPTY
        assert self.module.f.__code__ is self.code
        assert self.module.f(0.0) == 4600.0


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=4, stateful_step_count=15, deadline=None)
