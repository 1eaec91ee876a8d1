"""Passes of the python engine that do not come to their end: JAX and the session stay as they were."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer

from interp_jax.core.errors import InterleavingError, RunningPassError
from interp_jax.transforms.running_pass import RunningPass, run
from interp_jax.transforms.sowing import layer_scope, sow

X = np.arange(3, dtype=np.float32)


@jax.jit
def inner(x: Any) -> Any:
    return sow(jnp.sin(x), name="a")


def model(x: Any) -> Any:
    """Every site lies inside a jit of the model's own, so a pass that waits there holds that trace open."""
    for layer in range(3):
        with layer_scope(layer):
            x = inner(x)
    return x


def python_pass(x: Any = X) -> RunningPass:
    return run(model, x, engine="python")


@pytest.fixture(autouse=True)
def jax_is_as_before() -> Iterator[None]:
    """After each test JAX computes: in a trace left open, a sum would be a tracer."""
    yield
    assert not isinstance(jnp.ones(2) + 1.0, Tracer)
    running_pass = python_pass()
    assert [layer for layer, _, _ in running_pass] == [0, 1, 2]
    np.testing.assert_allclose(running_pass.retval, np.sin(np.sin(np.sin(X))), rtol=1e-6)


def leave_by_break(running_pass: RunningPass) -> None:
    for layer, _, _value in running_pass:
        if layer == 1:
            break


def leave_by_exception(running_pass: RunningPass) -> None:
    with pytest.raises(KeyError):
        for layer, _, _value in running_pass:
            if layer == 1:
                raise KeyError


def leave_by_return(running_pass: RunningPass) -> Any:
    for layer, _, value in running_pass:
        if layer == 1:
            return value.shape
    raise AssertionError


def leave_by_islice(running_pass: RunningPass) -> None:
    assert len(list(itertools.islice(running_pass, 2))) == 2


WAYS = [leave_by_break, leave_by_exception, leave_by_return, leave_by_islice]


@pytest.mark.parametrize("leave", WAYS)
def test_a_loop_that_is_left_is_unwound_at_once(leave: Callable[[RunningPass], Any]) -> None:
    unwound = []

    def noisy(x: Any) -> Any:
        try:
            return model(x)
        finally:
            unwound.append(isinstance(jnp.ones(2) + 1.0, Tracer))

    running_pass = run(noisy, X, engine="python")
    leave(running_pass)
    assert unwound == [False]
    assert "abandoned at 1.a" in repr(running_pass)
    assert not isinstance(jnp.ones(2) + 1.0, Tracer)


TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "jit": jax.jit,
    "grad": jax.grad,
    "vmap": lambda f: lambda x: jax.vmap(f)(x[None])[0],
    "checkpoint": jax.checkpoint,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("leave", WAYS[:2])
def test_under_a_transform(transform: str, leave: Callable[[RunningPass], Any]) -> None:
    kept = []

    def f(x: Any) -> Any:
        kept.append(python_pass(x))
        leave(kept[-1])
        return jnp.sum(x * 2.0)

    result = TRANSFORMS[transform](f)(X)
    np.testing.assert_allclose(result, [2.0] * 3 if transform == "grad" else 6.0)
    with pytest.raises(RunningPassError, match="retval was read while the pass is abandoned"):
        _ = kept[0].retval


def test_a_second_loop_over_an_abandoned_pass_is_refused() -> None:
    running_pass = python_pass()
    leave_by_break(running_pass)
    with pytest.raises(RunningPassError) as error:
        list(running_pass)
    message = str(error.value)
    assert "A loop over a pass that was abandoned at 1.a in the running pass of model" in message
    assert "Expected: a pass that has not ended" in message and "Fix: call run(...) again" in message


def test_the_compiled_engine_goes_on_in_a_second_loop() -> None:
    running_pass = run(model, X)
    leave_by_break(running_pass)
    assert [layer for layer, _, _ in running_pass] == [2]
    np.testing.assert_allclose(running_pass.retval, np.sin(np.sin(np.sin(X))), rtol=1e-6)


def test_leaving_the_outer_loop_closes_the_passes_begun_in_it() -> None:
    inner_passes = []
    for _ in (outer := python_pass()):
        inner_passes.append(python_pass())
        next(inner_passes[0])
        break
    assert "abandoned at 0.a" in repr(outer)
    assert "abandoned at 0.a" in repr(inner_passes[0])
    with pytest.raises(StopIteration):
        next(inner_passes[0])
    with pytest.raises(RunningPassError, match="while the pass is abandoned"):
        _ = inner_passes[0].retval


def test_a_context_closes_the_passes_begun_in_it() -> None:
    with python_pass() as outer:
        next(outer)
        later = python_pass()
        next(later)
    assert "abandoned" in repr(outer) and "abandoned" in repr(later)


def test_close_says_which_pass_goes_first() -> None:
    first, second = python_pass(), python_pass()
    next(first)
    with pytest.warns(RuntimeWarning, match="waits inside a function that JAX is tracing"):
        run(model, X)
    next(second)
    with pytest.raises(InterleavingError, match="started after it, is suspended"):
        first.close()
    assert "at a site 0.a" in repr(first)
    second.close()
    first.close()
    assert "abandoned at 0.a" in repr(first)


def test_a_pass_stepped_by_hand_that_is_in_the_way_is_reported_at_the_next_run() -> None:
    running_pass = python_pass()
    next(running_pass)
    with pytest.warns(RuntimeWarning) as warnings:
        run(model, X)
    message = str(warnings[0].message)
    assert "A running pass of model, stepped by next(), waits inside a function that JAX is tracing" in message
    assert "Expected: a pass that is closed" in message and "Fix: call its close()" in message
    assert warnings[0].filename == __file__
    running_pass.close()
    run(model, X)  # Nothing is said: warnings are errors here.


def test_nested_loops_are_not_reported() -> None:
    for _, _, value in python_pass():
        assert [layer for layer, _, _ in run(model, value)] == [0, 1, 2]
        assert [layer for layer, _, _ in python_pass(value)] == [0, 1, 2]
        del value


def step_under_jit() -> RunningPass:
    """A pass left waiting in a trace that has ended: JAX itself complains about what was computed after it."""
    kept = []

    @jax.jit
    def f(x: Any) -> Any:
        kept.append(python_pass(x))
        next(kept[0])
        return x * 2.0

    with pytest.raises(jax.errors.UnexpectedTracerError):
        f(X)
    return kept.pop()


def test_a_pass_of_a_trace_that_has_ended_is_not_resumed() -> None:
    running_pass = step_under_jit()
    with pytest.raises(RunningPassError) as error:
        next(running_pass)
    message = str(error.value)
    assert "stopped inside one JAX transformation" in message and "was resumed outside it" in message
    assert "Expected: a loop that runs to its end" in message and "close() ends this pass" in message
    running_pass.close()
    assert "abandoned at 0.a" in repr(running_pass)


@pytest.mark.parametrize("end", ["close", "collect", "leave"])
def test_its_end_does_not_bring_the_dead_trace_back(end: str) -> None:
    running_pass = step_under_jit()
    if end == "close":
        running_pass.close()
    elif end == "collect":
        gone = weakref.ref(running_pass)
        del running_pass
        gc.collect()
        assert gone() is None
    else:
        with running_pass:
            pass
    assert not isinstance(jnp.ones(2) + 1.0, Tracer)
    assert jax.jit(lambda x: x + 1.0)(X).shape == (3,)


def test_a_pass_stays_usable_when_another_thread_tries() -> None:
    running_pass = run(lambda x: sow(x, name="b") + sow(x, name="c"), X, engine="python")
    next(running_pass)
    errors: list[BaseException] = []

    def other() -> None:
        for attempt in (lambda: next(running_pass), running_pass.close, lambda: list(running_pass)):
            try:
                attempt()
            except InterleavingError as error:
                errors.append(error)

    thread = threading.Thread(target=other, name="other")
    thread.start()
    thread.join()
    assert len(errors) == 3
    assert all("started in thread 'MainThread', was resumed in thread 'other'" in str(error) for error in errors)
    assert "at a site b" in repr(running_pass)
    running_pass.modified_value = X * 0.0
    assert [name for _, name, _ in running_pass] == ["c"]
    np.testing.assert_array_equal(running_pass.retval, X)


def test_a_loop_whose_body_closes_the_pass_ends() -> None:
    visits = 0
    for _ in (running_pass := python_pass()):
        visits += 1
        running_pass.close()
    assert visits == 1
