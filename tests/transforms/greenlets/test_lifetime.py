"""Nothing is kept alive that should not be, and whatever happens, a body is unwound once and innermost first.

Source: interp_jax.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from greenlet import GreenletExit, greenlet

from interp_jax.core.errors import InterleavingError
from interp_jax.transforms import greenlets
from interp_jax.transforms.greenlets import GreenletGenerator, generator, local_context, loop, yield_, yield_from
from interp_jax.transforms.greenlets.scopes import current_scope

MACHINERY = str(Path(greenlets.__file__).parent)


class Token:
    """Something whose death can be seen."""


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Reference counts alone must do: a cycle would keep arrays alive until the collector comes by."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(autouse=True)
def _nothing_left_suspended() -> Iterator[None]:
    gc.freeze()  # what was there before need not be looked through, here and in the tests
    yield
    gc.collect()
    gc.unfreeze()
    scope = current_scope()
    scope.settle()
    assert scope.live == []
    assert not scope.orphans
    assert scope.contexts == []


def nested(log: list[str], depth: int = 2) -> str:
    """A body with `finally` and `with` blocks at each of several depths."""
    try:
        with local_context(lambda: Logged(log, depth)):
            if depth:
                nested(log, depth - 1)
            yield_(depth)
            yield_(depth)
    finally:
        log.append(f"finally {depth}")
    return "done"


class Logged:
    """A context that logs that an exception closed it."""

    def __init__(self, log: list[str], depth: int) -> None:
        self.log, self.depth = log, depth

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, *rest: object) -> None:
        if kind is not None:
            self.log.append(f"with {self.depth}")


UNWOUND = ["with 0", "finally 0", "with 1", "finally 1", "with 2", "finally 2"]


# --- references ---


def take(alive: list[bool]) -> None:
    """Takes what is sent, drops it, and notes whether anything else still holds it."""
    token = yield_()
    ref = weakref.ref(token)
    del token
    alive.append(ref() is not None)


def take_in_local_context(alive: list[bool]) -> None:
    with local_context(contextlib.nullcontext):
        take(alive)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    "body",
    [
        take,
        take_in_local_context,
        lambda alive: list(map(take, [alive])),
        lambda alive: yield_from(generator(take, alive)),
        lambda alive: yield_from(generator(yield_from, generator(take, alive))),
    ],
    ids=["plain", "local context", "deep", "yield_from", "yield_from twice"],
)
def test_what_is_sent_belongs_to_the_body_alone(body: Callable[[list[bool]], Any]) -> None:
    alive: list[bool] = []
    gen = generator(body, alive)
    next(gen)
    with pytest.raises(StopIteration):
        gen.send(Token())
    assert alive == [False]


@pytest.mark.usefixtures("no_collector")
def test_yield_from_keeps_nothing_while_suspended() -> None:
    def native() -> Iterator[None]:
        while True:
            yield

    gen = generator(yield_from, native())
    next(gen)
    for _ in range(2):
        ref = weakref.ref(token := Token())
        gen.send(token)
        del token
        assert ref() is None
    gen.close()


@pytest.mark.usefixtures("no_collector")
def test_what_is_yielded_belongs_to_the_consumer_alone() -> None:
    def body() -> None:
        yield_(Token())
        yield_(1, Token())
        yield_from(Token() for _ in range(1))

    gen = generator(body)
    first = weakref.ref(next(gen))
    assert first() is None
    pair = next(gen)
    second = weakref.ref(pair[1])
    del pair
    assert second() is None
    third = weakref.ref(next(gen))
    assert third() is None
    gen.close()


@pytest.mark.usefixtures("no_collector")
def test_a_loop_keeps_neither_what_it_sends_nor_what_it_gets() -> None:
    alive: list[bool] = []

    def body() -> None:
        for _ in range(2):
            ref = weakref.ref(yield_(Token()))
            alive.append(ref() is not None)

    with loop(body) as tokens:
        for token in tokens:
            ref = weakref.ref(token)
            del token
            assert ref() is None
            tokens.modified_value = Token()
    assert alive == [False, False]


@pytest.mark.usefixtures("no_collector")
def test_results_and_arguments_are_not_kept() -> None:
    gen = generator(lambda token: (yield_(), Token())[1], token := Token())
    argument = weakref.ref(token)
    del token
    next(gen)
    with pytest.raises(StopIteration) as stop:
        next(gen)
    result = weakref.ref(stop.value.value)
    del stop
    assert argument() is None
    assert result() is None
    assert list(gen) == []


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    "how",
    [
        "raised",
        "thrown",
        "thrown with context",
        "thrown below yield_from",
        "closed",
        "closed below yield_from",
        "refused",
    ],
)
def test_exceptions_make_no_cycles(how: str) -> None:
    """Else a failed pass would hold its arrays until the collector runs."""

    def body() -> None:
        kept = Token()
        refs.append(weakref.ref(kept))
        if how == "thrown with context":
            with local_context(contextlib.nullcontext):
                yield_()
        elif how.endswith("below yield_from"):
            yield_from(generator(yield_))
        else:
            yield_()
        raise KeyError

    refs: list[weakref.ref[Token]] = []

    def consume() -> None:
        gen = generator(body)
        next(gen)
        if how == "refused":
            other = generator(body)
            next(other)
            with pytest.raises(InterleavingError):
                next(gen)
            other.close()
            gen.close()
            return
        if how.startswith("closed"):
            gen.close()
            return
        with pytest.raises(KeyError):
            next(gen) if how == "raised" else gen.throw(KeyError())

    consume()
    assert refs
    assert [ref() for ref in refs] == [None] * len(refs)


def test_neither_pickled_nor_copied() -> None:
    gen = generator(yield_)
    for act in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot pickle 'GreenletGenerator' object"):
            act(gen)


# --- the end of a suspended body ---


@pytest.mark.usefixtures("no_collector")
def test_dropped_it_is_closed_at_once_innermost_first() -> None:
    log: list[str] = []
    gen = generator(nested, log)
    next(gen)
    del gen
    assert log == UNWOUND


@pytest.mark.usefixtures("no_collector")
def test_a_loop_left_by_break_is_closed_when_dropped() -> None:
    log: list[str] = []
    for _ in (passing := loop(nested, log)):
        break
    assert log == []
    del passing
    assert log == UNWOUND
    for _ in generator(nested, log):
        break
    assert log == UNWOUND * 2


def test_in_a_cycle_it_is_closed_by_the_collector() -> None:
    log: list[str] = []
    gen = generator(nested, log)
    next(gen)
    cycle: list[Any] = [gen]
    cycle.append(cycle)
    del gen, cycle
    gc.collect()
    assert log == UNWOUND


def test_in_a_cycle_while_another_runs_it_waits_for_its_turn() -> None:
    """Collected from within a generator that was started after it, it is closed when that one has ended."""
    log: list[str] = []
    gen = generator(nested, log)
    next(gen)
    cycle: list[Any] = [gen]
    cycle.append(cycle)
    del gen, cycle

    def body() -> None:
        gc.collect()
        assert log == []
        yield_()

    with loop(body) as passing:
        for _ in passing:
            assert log == []
    assert log == UNWOUND


@pytest.mark.usefixtures("no_collector")
def test_dropped_out_of_turn_it_waits_for_its_turn() -> None:
    log: list[str] = []
    first, second, third = generator(nested, log), generator(yield_), generator(yield_)
    for gen in (first, second, third):
        next(gen)
    del gen, first, second
    assert log == []
    third.close()
    assert log == UNWOUND


@pytest.mark.usefixtures("no_collector")
def test_one_never_started_is_just_dropped() -> None:
    log: list[str] = []
    gen = generator(nested, log)
    ref = weakref.ref(gen)
    del gen
    assert ref() is None
    assert log == []


def test_a_body_that_holds_its_own_generator() -> None:
    """It is never collected, as documented; the end of the body that started it closes it, and so does `close`."""
    log: list[str] = []

    def selfish() -> None:
        me: list[Any] = []
        me.append(generator(lambda: (me, nested(log))))
        next(me[0])

    def outer() -> None:
        selfish()
        gc.collect()
        assert log == []

    list(generator(outer))
    assert log == UNWOUND
    selfish()
    assert current_scope().live
    current_scope().close_live()
    assert log == UNWOUND * 2


@pytest.mark.usefixtures("no_collector")
def test_the_machinery_holds_no_reference_to_the_generator() -> None:
    gen = generator(nested, [])
    next(gen)
    assert sys.getrefcount(gen) == 2
    next(gen)
    assert sys.getrefcount(gen) == 2


def test_one_that_would_not_end_with_its_starter_does_not_take_control_astray() -> None:
    """Dropped within another body, it comes back there, though the greenlet that started it is gone."""
    log: list[str] = []

    def stubborn() -> None:
        for _ in range(2):
            with contextlib.suppress(GeneratorExit):
                yield_()
        log.append("ended")

    holder = [generator(stubborn)]
    with pytest.raises(RuntimeError, match="generator ignored GeneratorExit"):
        next(generator(lambda: next(holder[0])))
    with pytest.raises(InterleavingError, match="and before what started it ends"):
        next(holder[0])

    def body() -> None:
        yield_("before")
        holder.clear()
        yield_("after")

    assert list(generator(body)) == ["before", "after"]
    assert log == ["ended"]


def test_generators_used_by_a_finaliser_anywhere_in_the_machinery_disturb_nothing() -> None:
    """A finaliser can run at any allocation. Here a profile function does, at each call to C."""

    def intrude(frame: Any, event: str, argument: Any) -> None:
        if event.startswith("c_") and frame.f_code.co_filename.startswith(MACHINERY):
            intruders.append(list(generator(lambda: yield_("intruder"))))

    def body() -> str:
        yield_(1)
        for value in generator(lambda: yield_(2)):
            yield_(value)
        yield_from(generator(yield_, 3))
        return "result"

    intruders: list[list[str]] = []
    with loop(body) as passing:
        try:
            sys.setprofile(intrude)
            values = list(passing)
        finally:
            sys.setprofile(None)
    assert (values, passing.retval) == ([1, 2, 3], "result")
    assert len(intruders) > 50
    assert all(intruder == ["intruder"] for intruder in intruders)


def test_errors_in_a_finaliser_are_reported_as_for_native_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda report: reports.append((repr(report.exc_value), report.object)))

    def stubborn() -> None:
        try:
            yield_()
        except GeneratorExit:
            yield_()

    def bad() -> None:
        try:
            yield_()
        finally:
            raise KeyError("in the end")

    def native_bad() -> Iterator[None]:
        try:
            yield
        finally:
            raise KeyError("in the end")

    for make in (native_bad, lambda: generator(bad), lambda: generator(stubborn)):
        gen = make()
        next(gen)
        del gen
    errors = [error for error, _ in reports]
    assert errors == [*["KeyError('in the end')"] * 2, "RuntimeError('generator ignored GeneratorExit')"]
    names = [getattr(subject, "__name__", None) for _, subject in reports]
    assert [type(subject) for _, subject in reports[:2]] == [type(native_bad())] * 2, names


def test_at_the_end_of_the_program() -> None:
    script = """
        from interp_jax.transforms.greenlets import generator, yield_

        def body(name):
            try:
                yield_()
            finally:
                print(name, "ended")

        kept = generator(body, "kept")
        next(kept)
        new = generator(body, "new")
        later = generator(body, "later")
        next(later)
        cycle = [generator(body, "in a cycle")]
        cycle.append(cycle)
        next(cycle[0])
        del cycle
        print("the end")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["the end", "in a cycle ended", "later ended", "kept ended"]
    assert done.stderr == ""


# --- exceptions and interrupts ---


def test_a_traceback_shows_the_body_and_the_machinery_only_between() -> None:
    def inner() -> None:
        yield_()
        raise KeyError("deep")

    def body() -> None:
        inner()

    gen = generator(body)
    next(gen)
    with pytest.raises(KeyError) as error:
        next(gen)
    entries = traceback.extract_tb(error.value.__traceback__)
    assert [entry.name for entry in entries if not entry.filename.startswith(MACHINERY)] == [
        "test_a_traceback_shows_the_body_and_the_machinery_only_between",
        "body",
        "inner",
    ]
    assert [entry.name for entry in entries[1:5]] == ["__next__", "_resume", "_drive", "_run"]
    assert error.value.__context__ is None
    assert error.value.__cause__ is None


def test_an_exception_that_is_thrown_keeps_its_own_traceback() -> None:
    def origin() -> None:
        raise KeyError

    gen = generator(yield_)
    next(gen)
    with pytest.raises(KeyError) as first:
        origin()
    thrown = first.value
    own = [entry.name for entry in traceback.extract_tb(thrown.__traceback__)]
    with pytest.raises(KeyError) as raised:
        gen.throw(thrown)
    assert raised.value is thrown
    assert thrown.__context__ is None
    names = [entry.name for entry in traceback.extract_tb(thrown.__traceback__)]
    assert names[-len(own) :] == own
    assert names[-len(own) - 1] == "yield_"
    assert names.count("yield_") == 1


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_an_interrupt_in_the_body() -> None:
    log: list[str] = []

    def body() -> None:
        try:
            nested(log)
        finally:
            log.append("body")

    class Interrupting(list[str]):
        def append(self, line: str) -> None:
            super().append(line)
            if line == "finally 1":
                interrupt()

    log = Interrupting()
    gen = generator(body)
    with pytest.raises(KeyboardInterrupt):
        list(gen)
    assert log == ["finally 0", "finally 1", "with 2", "finally 2", "body"]
    assert list(gen) == []


def test_an_interrupt_in_the_consumer() -> None:
    log: list[str] = []
    with pytest.raises(KeyboardInterrupt), loop(nested, log) as passing:
        for _ in passing:
            interrupt()
    assert log == UNWOUND


def test_an_interrupt_two_generators_deep_unwinds_the_inner_first() -> None:
    log: list[str] = []

    def outer() -> None:
        try:
            for _ in generator(nested, log):
                yield_()
        finally:
            log.append("outer")

    with pytest.raises(KeyboardInterrupt), loop(outer) as passing:
        for _ in passing:
            interrupt()
    assert log == [*UNWOUND, "outer"]


def test_interrupted_anywhere_in_the_machinery_everything_is_unwound() -> None:
    """A signal is raised at every point of the machinery where Python can notice one, one point at a time."""
    opened: list[str] = []

    class Tracked:
        def __enter__(self) -> None:
            opened.append("")

        def __exit__(self, *error: object) -> None:
            opened.pop()

    def inner() -> None:
        with Tracked(), local_context(contextlib.nullcontext):
            yield_("inner")

    def outer() -> None:
        with Tracked():
            yield_(1)
            for value in loop(inner):
                yield_(value)
        generator(yield_).close()

    def once() -> None:
        with loop(outer) as passing:
            for _ in passing:
                passing.modified_value = 0

    class Fuse:
        """A profile function that raises at one event within the machinery."""

        def __init__(self, at: int) -> None:
            self.left = at

        def __call__(self, frame: Any, event: str, argument: Any) -> None:
            # After the return of a C function, a switch above all, is where the interpreter looks for signals.
            if event == "c_return" and frame.f_code.co_filename.startswith(MACHINERY):
                self.left -= 1
                if self.left == 0:
                    raise KeyboardInterrupt

    interrupted = 0
    while True:
        fuse = Fuse(interrupted + 1)
        try:
            sys.setprofile(fuse)
            once()
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.setprofile(None)
        gc.collect()
        assert opened == [], f"left open after an interrupt at point {interrupted}"
        current_scope().settle()
        assert current_scope().live == []
        if fuse.left > 0:
            break
    assert interrupted > 50


def test_greenlet_exit_is_an_exception_like_others() -> None:
    def raising() -> None:
        yield_()
        raise GreenletExit("raised")

    def returning() -> GreenletExit:
        yield_()
        return GreenletExit("returned")

    gen = generator(raising)
    next(gen)
    with pytest.raises(GreenletExit, match="raised") as error:
        next(gen)
    assert traceback.extract_tb(error.value.__traceback__)[-1].name == "raising"
    with loop(returning) as passing:
        assert list(passing) == [None]
    assert isinstance(passing.retval, GreenletExit)


def test_killed_by_greenlet_itself_a_body_can_neither_linger_nor_be_resumed() -> None:
    """A raw GreenletExit that the body swallows is no result and no yield."""
    log: list[str] = []

    def body() -> str:
        try:
            yield_()
        except BaseException as error:
            log.append(type(error).__name__)
        return "swallowed"

    gen = generator(body)
    next(gen)
    with pytest.raises(StopIteration) as stop:
        gen.throw(GreenletExit)
    assert stop.value.value == "swallowed"
    assert log == ["GreenletExit"]
    with pytest.raises(StopIteration) as stop:
        next(gen)
    assert stop.value.value is None


# --- JAX ---


def jitted_consumer(consume: Callable[[Any], Any]) -> Any:
    """Traces a loop over a body that yields a tracer of an inner trace, with JAX's leak checker on."""

    def body(x: jax.Array) -> jax.Array:
        return jax.jit(lambda y: yield_(y * 2.0) + 1.0)(x)

    @jax.jit
    def outer(x: jax.Array) -> jax.Array:
        return consume(loop(body, x))

    with jax.checking_leaks():
        return outer(jnp.float32(3.0))


def test_no_tracer_leaks_through_a_loop() -> None:
    def consume(passing: greenlets.Loop) -> Any:
        with passing:
            for value in passing:
                passing.modified_value = value * 10.0
                del value  # the consumer's own reference
        return passing.retval

    assert jitted_consumer(consume) == 61.0


def test_no_tracer_leaks_through_send_and_yield_from() -> None:
    def consume(passing: greenlets.Loop) -> Any:
        passing.close()
        gen = generator(yield_from, passing._generator)
        assert list(gen) == []

        def body(x: jax.Array) -> jax.Array:
            return jax.grad(lambda y: yield_from(generator(lambda: yield_(y * y))))(x)

        gen = generator(body, jnp.float32(3.0))
        with pytest.raises(StopIteration) as stop:
            gen.send(next(gen) * 2.0)
        return stop.value.value

    assert jitted_consumer(consume) == 12.0


def test_the_leak_checker_would_notice() -> None:
    """The same loop with a consumer that keeps what it got does leak: the tests above can fail."""
    kept = []

    def consume(passing: greenlets.Loop) -> Any:
        with passing:
            for value in passing:
                kept.append(value)
                passing.modified_value = value
                del value
        return passing.retval

    with pytest.raises(Exception, match=r"(?i)leaked"):
        jitted_consumer(consume)


@pytest.mark.parametrize("how", ["break", "raise"])
def test_left_early_with_closes_and_jax_is_clean(how: str) -> None:
    def body(x: jax.Array) -> jax.Array:
        return jax.jit(lambda y: yield_(y * 2.0) + 1.0)(x)

    def outer(x: jax.Array) -> jax.Array:
        try:
            with loop(body, x) as passing:
                for _ in passing:
                    if how == "break":
                        break
                    raise KeyError
        except KeyError:
            pass
        return x + 1.0

    assert jax.jit(outer)(jnp.float32(1.0)) == 2.0
    assert float(jnp.float32(1.0) + 1.0) == 2.0  # a tracer here would mean that the inner trace is still open


def test_the_loop_gives_the_same_under_transformations() -> None:
    def body(x: jax.Array) -> jax.Array:
        for _ in range(3):
            x = yield_(jnp.sin(x))
        return x

    def through_loop(x: jax.Array) -> jax.Array:
        with loop(body, x) as passing:
            for value in passing:
                passing.modified_value = 2.0 * value
        return passing.retval

    def direct(x: jax.Array) -> jax.Array:
        for _ in range(3):
            x = 2.0 * jnp.sin(x)
        return x

    x = jnp.linspace(0.0, 1.0, 4, dtype=jnp.float32)
    transforms: list[Callable[[Any], Any]] = [lambda f: f, jax.jit, lambda f: jax.jit(jax.vmap(jax.grad(f))), jax.vmap]
    for transform in transforms:
        assert jnp.allclose(transform(through_loop)(x), transform(direct)(x), atol=1e-6)


def test_greenlets_of_others_are_left_alone() -> None:
    """A greenlet that is not ours neither has a scope until it starts a generator nor is it changed by one."""
    other = greenlet(lambda: 3)
    assert other.switch() == 3
    assert vars(other) == {}
    assert isinstance(generator(yield_), GreenletGenerator)
    assert threading.current_thread() is current_scope().thread
