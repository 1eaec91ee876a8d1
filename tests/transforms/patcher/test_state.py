"""What is in force: nesting, order, repetition, threads, JAX's caches, names, and what entering costs.

Source: interp_jax.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import textwrap
import threading
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from interp_jax.transforms.patcher import Patcher, PatchError
from interp_jax.transforms.patcher import state as state_module
from interp_jax.transforms.patcher.state import ACTIVE, EMPTY
from interp_jax.transforms.patcher.upstream import read_upstream

UPSTREAM = """
import jax
TRACES = []

def f(x, y):
    a = x + 1
    b = y + 2
    return a, b

def g(x):
    TRACES.append("g")
    return x * 2.0

jitted = jax.jit(g)
"""


@pytest.fixture
def module(make_module):
    return make_module(UPSTREAM)


@pytest.fixture
def p(module) -> Patcher:
    return Patcher(module, f=["x + 1", "x + 10"])


@pytest.fixture
def q(module) -> Patcher:
    return Patcher(module, f=["y + 2", "y + 20"])


# --- composition ---------------------------------------------------------------------------------------------------


def test_patchers_of_one_function_compose_on_the_original_text(module, p, q) -> None:
    code = module.f.__code__
    for outer, inner, first in ((p, q, (10, 2)), (q, p, (1, 20))):
        with outer:
            assert module.f(0, 0) == first
            with inner:
                assert module.f(0, 0) == (10, 20)
            assert module.f(0, 0) == first
        assert module.f.__code__ is code


def test_the_second_patcher_matches_upstream_and_not_the_first_patch(module) -> None:
    with Patcher(module, f=["x + 1", "y + 2 + x"]), Patcher(module, f=["y + 2", "0"]):
        assert module.f(1, 2) == (5, 0)


def test_overlapping_patchers_are_refused_and_leave_the_first_in_force(module, p) -> None:
    other = Patcher(module, f=["a = x + $n", "a = 0"])
    with p:
        with pytest.raises(PatchError, match="change the same code in upstream_") as caught:
            other.__enter__()
        assert "`x + 1` (line 6)" in str(caught.value)
        assert module.f(0, 0) == (10, 2)
    with other:
        assert module.f(0, 0) == (0, 2)


def test_the_same_patcher_again(module, p) -> None:
    with p, p:
        with p:
            assert module.f(0, 0) == (10, 2)
        assert module.f(0, 0) == (10, 2)
        assert p.is_active
    assert module.f(0, 0) == (1, 2)
    assert not p.is_active


def test_wrong_order_is_an_error_and_does_not_spoil_the_session(module, p, q) -> None:
    p.__enter__()
    q.__enter__()
    with pytest.raises(PatchError) as caught:
        p.__exit__(None, None, None)
    head, expected, fix = str(caught.value).splitlines()
    assert head == f"{p} is left while it is not the innermost patcher in the open patchers, innermost first: {q}, {p}."
    assert "reverse of the order in which they were entered" in expected
    assert "Until the inner ones are left it stays in force" in fix
    assert module.f(0, 0) == (10, 20)
    q.__exit__(None, None, None)
    assert module.f(0, 0) == (1, 2)
    with pytest.raises(PatchError, match="innermost first: none in this thread"):
        p.__exit__(None, None, None)


def test_a_paused_generator_closed_in_the_wrong_order(module, p, q) -> None:
    def paused():
        with p:
            yield

    generator = paused()
    next(generator)
    with q:
        with pytest.raises(PatchError, match="is left while it is not the innermost"):
            generator.close()
        assert module.f(0, 0) == (10, 20)
    assert ACTIVE.state is EMPTY


def test_exceptions_in_the_block_restore(module, p) -> None:
    code = module.f.__code__
    for error in (ValueError, KeyboardInterrupt, GeneratorExit):
        with pytest.raises(error), p:
            raise error
        assert module.f.__code__ is code


# --- install -------------------------------------------------------------------------------------------------------


def test_install_in_any_order_with_blocks_between(module, p, q) -> None:
    p.install()
    p.install()
    q.install()
    assert module.f(0, 0) == (10, 20)
    p.uninstall()
    assert module.f(0, 0) == (1, 20)
    with p:
        assert module.f(0, 0) == (10, 20)
        q.uninstall()
        assert module.f(0, 0) == (10, 2)
        q.install()
    assert module.f(0, 0) == (1, 20)
    with q:
        assert module.f(0, 0) == (1, 20)
    assert module.f(0, 0) == (1, 20)
    q.uninstall()
    q.uninstall()
    assert module.f(0, 0) == (1, 2)


def test_install_inside_its_own_block_outlives_it_and_uninstall_there_is_refused(module, p) -> None:
    with p:
        p.install()
        with pytest.raises(PatchError, match="inside its own `with` block"):
            p.uninstall()
    assert module.f(0, 0) == (10, 2)
    p.uninstall()
    assert module.f(0, 0) == (1, 2)


# --- JAX's caches --------------------------------------------------------------------------------------------------


def test_traces_belong_to_their_patches(module) -> None:
    x = jnp.float32(1)
    patcher = Patcher(module, g=["x * 2.0", "x * 5.0"])
    assert float(module.jitted(x)) == 2
    assert len(module.TRACES) == 1
    for _ in range(3):
        with patcher:
            assert float(module.jitted(x)) == 5
        assert float(module.jitted(x)) == 2
    assert len(module.TRACES) == 2
    with Patcher(module, g=["x * 2.0", "x * 5.0"]):  # another patcher with the same patch
        assert float(module.jitted(x)) == 5
    assert len(module.TRACES) == 2
    with Patcher(module, g=["x * 2.0", "x * 6.0"]):
        assert float(module.jitted(x)) == 6
    assert len(module.TRACES) == 3


def test_traces_of_nested_patchers_do_not_depend_on_the_order(module) -> None:
    a = Patcher(module, g=["x * 2.0", "x * 5.0"])
    b = Patcher(module, f=["x + 1", "x"])
    x = jnp.float32(1)
    with a, b:
        assert float(module.jitted(x)) == 5
    n = len(module.TRACES)
    with b, a, b:
        assert float(module.jitted(x)) == 5
    assert len(module.TRACES) == n
    with b:
        assert float(module.jitted(x)) == 2


def test_names_are_part_of_the_caches_key(module) -> None:
    x = jnp.float32(1)
    for factor in (3.0, 4.0):
        with Patcher(module, {"g": ["x * 2.0", "x * factor"]}, names={"factor": factor}):
            assert float(module.jitted(x)) == factor


def test_entering_inside_a_trace(module) -> None:
    x = jnp.float32(1)
    patcher = Patcher(module, g=["x * 2.0", "x * 5.0"])

    @jax.jit
    def both(x):
        with patcher:
            inside = module.jitted(x)
        return inside, module.jitted(x)

    assert list(map(float, both(x))) == [5, 2]
    assert list(map(float, jax.grad(lambda x: both(x)[0])(x)[None])) == [5]


def test_install_clears_caches_both_ways(module) -> None:
    x = jnp.float32(1)
    patcher = Patcher(module, g=["x * 2.0", "x * 5.0"])
    assert float(module.jitted(x)) == 2
    patcher.install()
    assert float(module.jitted(x)) == 5
    with patcher:
        assert float(module.jitted(x)) == 5
    patcher.uninstall()
    assert float(module.jitted(x)) == 2


def test_installed_beside_entered(module) -> None:
    x = jnp.float32(1)
    a, b = Patcher(module, g=["x * 2.0", "x * 5.0"]), Patcher(module, f=["x + 1", "x"])
    with b:
        a.install()
        assert float(module.jitted(x)) == 5
    assert float(module.jitted(x)) == 5
    a.uninstall()
    with b:
        assert float(module.jitted(x)) == 2


# --- names ---------------------------------------------------------------------------------------------------------


def test_names_come_and_go(module) -> None:
    patcher = Patcher(module, {"f": ["x + 1", "add(x)"]}, names={"add": lambda x: x + 100, "jax": jax})
    with patcher, patcher:
        assert module.f(0, 0) == (100, 2)
        assert module.jax is jax
    assert not hasattr(module, "add")
    assert module.jax is jax


def test_a_name_that_is_taken(module) -> None:
    patcher = Patcher(module, {"f": ["x + 1", "g(x)"]}, names={"g": min})
    with pytest.raises(PatchError) as caught:
        patcher.install()
    head, expected, fix = str(caught.value).splitlines()
    assert head.startswith(
        f"Name 'g' (`<built-in function min>`) is taken in {module.__name__}, where it is `<function g"
    )
    assert "upstream's module does not use itself" in expected
    assert "names={'my_g': ...}" in fix
    assert module.f(0, 0) == (1, 2)


def test_a_name_with_two_meanings(module) -> None:
    a = Patcher(module, {"f": ["x + 1", "n"]}, names={"n": 5})
    b = Patcher(module, {"f": ["y + 2", "n"]}, names={"n": 6})
    c = Patcher(module, {"f": ["y + 2", "n"]}, names={"n": 5})
    with a:
        with pytest.raises(PatchError, match="Name 'n' is `5` for one patcher and `6` for another"):
            b.__enter__()
        with c:
            assert module.f(0, 0) == (5, 5)
        assert module.n == 5
    assert not hasattr(module, "n")


def test_a_misspelt_name(module) -> None:
    with pytest.raises(PatchError) as caught:
        Patcher(module, {"f": ["x + 1", "scale_up(x)"]}, names={"scaleup": abs}).install()
    head, *_ = str(caught.value).splitlines()
    assert head == (
        f"A replacement uses 'scale_up', which means nothing there in {module.__name__}:f ({module.__name__}.py:5). "
        "Did you mean 'scaleup'?"
    )
    # A new local variable is no such name.
    with Patcher(module, f=["a = x + 1", "fresh = x + 1\na = fresh + len('abc')"]):
        assert module.f(0, 0) == (4, 2)


# --- others ---------------------------------------------------------------------------------------------------------


def test_code_that_somebody_else_changed(module, p) -> None:
    original = module.f.__code__
    other = types.FunctionType(compile("def f(x, y): return 'theirs'", "<theirs>", "exec").co_consts[0], {})
    with pytest.raises(PatchError, match=f"Changed by somebody else while patched: {module.__name__}.f"), p:
        module.f.__code__ = other.__code__
    assert module.f(0, 0) == "theirs"
    with pytest.raises(PatchError, match=r"No source code|is not what"):
        p.__enter__()
    module.f.__code__ = original
    with p:
        assert module.f(0, 0) == (10, 2)


def test_a_reloaded_module_is_matched_again(module, p) -> None:
    import importlib

    with p:
        assert module.f(0, 0) == (10, 2)
    path = module.__file__
    with open(path, "a") as file:
        file.write("\n# longer\n")
    importlib.reload(module)
    with p:
        assert module.f(0, 0) == (10, 2)
    assert module.f(0, 0) == (1, 2)


def test_threads_wait_for_each_other(module, p, q) -> None:
    entered, leave = threading.Event(), threading.Event()
    seen = []

    def first() -> None:
        with p:
            entered.set()
            assert leave.wait(10)
            seen.append(module.f(0, 0))

    def second() -> None:
        assert entered.wait(10)
        threading.Timer(0.05, leave.set).start()
        with q:
            seen.append(module.f(0, 0))

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == [(10, 2), (1, 20)]
    assert module.f(0, 0) == (1, 2)


def test_a_thread_that_waits_in_vain(module, p, monkeypatch) -> None:
    monkeypatch.setattr(state_module, "_LONGEST_WAIT_S", 0.05)
    caught = []

    def other() -> None:
        try:
            p.__enter__()
        except PatchError as error:
            caught.append(str(error))

    with p:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(10)
    assert "waited 0 s for another thread to leave its patchers" in caught[0]
    assert "Fix: leave the block in the other thread" in caught[0]


def test_an_interrupted_switch_changes_nothing(module, monkeypatch) -> None:
    from interp_jax.transforms.patcher.slots import FunctionSlot

    patcher = Patcher(module, f=["x + 1", "x"], g=["x * 2.0", "x"])
    codes = module.f.__code__, module.g.__code__
    with patcher:
        pass
    real, calls = FunctionSlot.write, []

    def interrupted(self, value) -> None:
        real(self, value)
        calls.append(value)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FunctionSlot, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            patcher.__enter__()
    assert (module.f.__code__, module.g.__code__) == codes
    assert ACTIVE.state is EMPTY
    # And on the way out it is finished all the same.
    calls.clear()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), patcher:
        patch.setattr(FunctionSlot, "write", interrupted)
    assert (module.f.__code__, module.g.__code__) == codes


def test_patchers_are_collected(make_module) -> None:
    import weakref

    module = make_module(UPSTREAM)
    patcher = Patcher(module, f=["x + 1", "x"])
    with patcher:
        pass
    reference = weakref.ref(patcher)
    del patcher
    gc.collect()
    assert reference() is None


def test_entering_is_cheap(module) -> None:
    patcher = Patcher(module, f=["x + 1", "x", "y + 2", "y"], g=["x * 2.0", "x"])
    with patcher:
        pass
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(50):
            with patcher:
                pass
        best = min(best, (time.perf_counter() - start) / 50)
    assert best < 50e-6


def test_patchers_of_one_file_meet_however_many_files_were_read_in_between() -> None:
    first = Patcher(textwrap, shorten=["' '.join($x)", "'+'.join($x)"])
    second = Patcher(textwrap, shorten=["TextWrapper(width=width, max_lines=1, **kwargs)", "TextWrapper(width=99)"])
    with first:
        pass
    for module in list(sys.modules.values())[:300]:
        # Empty files and extensions have no source to read.
        with contextlib.suppress(PatchError):
            read_upstream(str(getattr(module, "__file__", None)), vars(module), where=module.__name__)
    with first, second:
        assert textwrap.shorten("one two three", 5) == "one+two+three"
    assert textwrap.shorten("one two three", 5) == "[...]"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None,), ["None (NoneType) was given as the module", "Fix: write Patcher(module, {name: [before, after]})."]),
        ((json.JSONDecoder, {"decode": ["1", "2"]}), ["as the module", 'Patcher("json.decoder", {"JSONDecoder": ']),
        (("json", ["1", "2"]), ["['1', '2'] (list) was given as the members", "a dict from the names"]),
    ],
    ids=["nothing", "a class", "a list"],
)
def test_what_cannot_be_patched(arguments: tuple[Any, ...], words: list[str]) -> None:
    with pytest.raises(PatchError) as error:
        Patcher(*arguments)
    assert all(word in str(error.value) for word in (*words, " in Patcher(...)", "Expected: a module or its name"))
