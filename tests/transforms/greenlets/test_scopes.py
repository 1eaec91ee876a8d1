"""Generators never interleave, what a body leaves suspended ends with it, and local contexts follow control.

Source: interp_jax.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from contextvars import ContextVar
from typing import Any

import jax
import pytest
from greenlet import greenlet

from interp_jax.core.errors import InterleavingError, InvalidInputError, RunningPassError
from interp_jax.transforms.greenlets import generator, local_context, loop, yield_, yield_from


def counting(n: int, log: list[Any] | None = None, name: str = "counting") -> str:
    """A body that yields 0..n-1 and notes its end."""
    try:
        for i in range(n):
            yield_(i)
    finally:
        if log is not None:
            log.append(f"{name} ended")
    return name


def message(error: pytest.ExceptionInfo[BaseException]) -> str:
    return str(error.value)


# --- where yield_ goes ---


def test_is_a_generator() -> None:
    gen = generator(counting, 1)
    assert isinstance(gen, Generator)
    assert iter(gen) is gen
    assert gen.__name__ == "counting"
    assert gen.__qualname__ == "counting"
    assert repr(gen) == "<GreenletGenerator counting (created)>"
    assert (next(gen), repr(gen)) == (0, "<GreenletGenerator counting (suspended)>")
    assert (list(gen), repr(gen)) == ([], "<GreenletGenerator counting (closed)>")


def test_zero_one_and_several_values() -> None:
    def body() -> None:
        yield_()
        yield_("one")
        yield_(())
        yield_("one", "two")

    assert list(generator(body)) == [None, "one", (), ("one", "two")]


@pytest.mark.parametrize(
    "through",
    [
        lambda f: [f(0), f(1)],
        lambda f: list(map(f, [0, 1])),
        lambda f: functools.reduce(lambda _, item: f(item), [0, 1], None),
        lambda f: sorted([0, 1], key=lambda item: f(item) or 0),
        lambda f: re.sub("[01]", lambda match: f(int(match[0])) or "", "01"),
        lambda f: max([0, 1], key=lambda item: f(item) or 0),
        lambda f: (lambda: (lambda: (f(0), f(1)))())(),
        lambda f: [*(f(i) for i in range(2))],
        lambda f: jax.tree.map(f, [0, 1]),
    ],
    ids=["calls", "map", "reduce", "sort key", "re.sub", "max key", "three deep", "native generators", "tree map"],
)
def test_from_below_any_call(through: Callable[[Callable[[int], Any]], Any]) -> None:
    assert list(generator(through, yield_)) == [0, 1]


def test_goes_to_the_innermost_generator() -> None:
    def outer() -> str:
        for value in generator(counting, 2):
            yield_(("outer", value))
        return yield_(("then", yield_from(generator(counting, 2))))

    assert list(generator(outer)) == [("outer", 0), ("outer", 1), 0, 1, ("then", "counting")]


def test_outside_any_generator() -> None:
    with pytest.raises(RunningPassError) as error:
        yield_(1)
    assert isinstance(error.value, RuntimeError)
    assert message(error).startswith(
        "yield_ was called outside any generator in thread 'MainThread'.\n  Expected: a call"
    )
    assert "Fix: iterate over loop(f, ...) in place of calling f(...)" in message(error)
    assert yield_(1, default=7) == 7
    assert yield_(1, default=None) is None
    untouched = iter([1])
    with pytest.raises(RunningPassError, match="yield_from was called outside any generator"):
        yield_from(untouched)
    assert list(untouched) == [1]


def test_in_a_foreign_greenlet_below_a_body_it_is_outside() -> None:
    def body() -> Any:
        return greenlet(lambda: yield_(1, default="outside")).switch()

    with pytest.raises(StopIteration) as stop:
        next(generator(body))
    assert stop.value.value == "outside"


def test_inside_a_foreign_greenlet_generators_work() -> None:
    assert greenlet(lambda: list(generator(counting, 3))).switch() == [0, 1, 2]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (3, "3 was given, which cannot be called, in generator(...)."),
        ((lambda: (yield)), "A generator function was given in generator(...)."),
    ],
)
def test_what_is_no_body(body: Any, words: str) -> None:
    for make in (generator, loop):
        with pytest.raises(InvalidInputError) as error:
            make(body)
        assert words in message(error)
        assert "Expected: a function that calls yield_(...)" in message(error)
        assert "Fix: " in message(error)


# --- interleaving ---


def test_zip_of_two_is_refused_and_both_stay_usable() -> None:
    first, second = generator(counting, 2), generator(counting, 2)
    values = zip(first, second, strict=True)
    assert next(values) == (0, 0)
    with pytest.raises(InterleavingError) as error:
        next(values)
    assert message(error) == (
        "Generator 'counting' was resumed while 'counting', started after it, is suspended in thread 'MainThread'.\n"
        "  Expected: the generator started last ends first: generators nest as calls do.\n"
        "  Fix: finish or close 'counting' first (`with loop(...)` closes at the end of its block)."
    )
    assert list(second) == [1]
    assert list(first) == [1]


@pytest.mark.parametrize(
    "call",
    [next, lambda g: g.send(1), lambda g: g.throw(KeyError), lambda g: g.close()],
    ids=["next", "send", "throw", "close"],
)
def test_every_method_is_refused_before_control_moves(call: Callable[[Any], Any]) -> None:
    log: list[Any] = []
    first, second = generator(counting, 9, log, "first"), generator(counting, 9, log, "second")
    assert (next(first), next(second)) == (0, 0)
    for _ in range(2):
        with pytest.raises(InterleavingError):
            call(first)
    assert log == []
    assert next(second) == 1
    second.close()
    assert next(first) == 1
    first.close()
    assert log == ["second ended", "first ended"]


def test_a_pass_nested_in_the_body_of_a_loop() -> None:
    seen = []
    with loop(counting, 2) as outer:
        for i in outer:
            with loop(counting, 2) as inner:
                seen += [(i, j) for j in inner]
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_one_handed_out_is_refused_elsewhere() -> None:
    def outer() -> list[Any]:
        inner = generator(counting, 3)
        next(inner)
        yield_(inner)
        return list(inner)

    gen = generator(outer)
    inner = next(gen)
    with pytest.raises(InterleavingError) as error:
        next(inner)
    assert "started in generator '" in message(error)
    assert "outer', was resumed in thread 'MainThread'." in message(error)
    assert "Expected: a generator goes on only where it was started" in message(error)
    assert "Fix: resume it there, and pass its values on with yield_from(...)." in message(error)
    with pytest.raises(StopIteration) as stop:
        next(gen)
    assert stop.value.value == [1, 2]
    assert list(inner) == []


def test_one_handed_in_is_refused_there_unless_new() -> None:
    mine = generator(counting, 3)
    next(mine)
    assert list(mine) == [1, 2]

    def body(given: Any) -> Any:
        return next(given)

    with pytest.raises(StopIteration) as stop:
        next(generator(body, generator(counting, 3)))
    assert stop.value.value == 0
    mine = generator(counting, 3)
    next(mine)
    with pytest.raises(InterleavingError, match=r"started in thread 'MainThread', was resumed in generator '.*body'"):
        next(generator(body, mine))
    assert list(mine) == [1, 2]


def test_the_rule_is_the_same_below_a_native_generator() -> None:
    def native() -> Iterator[Any]:
        yield from generator(counting, 3)

    outer = native()
    assert next(outer) == 0
    other = generator(counting, 2)
    next(other)
    with pytest.raises(InterleavingError):
        next(outer)
    other.close()


# --- what is left suspended ---


def test_a_body_that_ends_closes_what_it_left_suspended_last_first() -> None:
    log: list[Any] = []
    kept = []

    def body() -> str:
        kept.extend(generator(counting, 5, log, name) for name in ("first", "second", "third"))
        for gen in kept:
            yield_(next(gen))
        log.append("body ends")
        return "result"

    with loop(body) as outer:
        assert list(outer) == [0, 0, 0]
    assert outer.retval == "result"
    assert log == ["body ends", "third ended", "second ended", "first ended"]
    assert [list(gen) for gen in kept] == [[], [], []]


def test_they_are_closed_when_the_body_raises_and_all_even_if_one_raises() -> None:
    log: list[Any] = []
    kept = []

    def bad() -> None:
        try:
            yield_()
        finally:
            raise LookupError("bad end")

    def body() -> None:
        kept.extend([generator(counting, 5, log, "first"), generator(bad), generator(counting, 5, log, "third")])
        for gen in kept:
            next(gen)
        raise KeyError("from the body")

    with pytest.raises(LookupError, match="bad end") as error:
        next(generator(body))
    assert log == ["third ended", "first ended"]
    exit_ = error.value.__context__
    assert isinstance(exit_, GeneratorExit)
    assert repr(exit_.__context__) == "KeyError('from the body')"


def test_with_ends_what_was_started_in_its_block_last_first() -> None:
    log: list[Any] = []
    with pytest.raises(KeyboardInterrupt), loop(counting, 3, log, "outer") as outer:
        next(outer)
        first, second = (generator(counting, 3, log, name) for name in ("first", "second"))
        next(first)
        next(second)
        raise KeyboardInterrupt
    assert log == ["second ended", "first ended", "outer ended"]


def test_with_leaves_alone_what_was_started_before() -> None:
    before = generator(counting, 3)
    next(before)
    with loop(counting, 3) as inner:
        next(inner)
    with loop(counting, 3):
        pass  # never started
    assert list(before) == [1, 2]


# --- threads and context variables ---


def in_thread(fn: Callable[[], Any], name: str = "helper") -> Any:
    """The result of a function that ran in a thread of its own, or what it raised."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(fn())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=run, name=name)
    thread.start()
    thread.join()
    return result[0]


def test_another_thread_may_not_resume() -> None:
    gen = generator(counting, 3)
    next(gen)
    error = in_thread(lambda: next(gen))
    assert isinstance(error, InterleavingError)
    assert str(error) == (
        "Generator 'counting', started in thread 'MainThread', was resumed in thread 'helper'.\n"
        "  Expected: a generator stays in the thread that started it: its call stack is there.\n"
        "  Fix: iterate over it in that thread and pass the values on through a queue."
    )
    assert list(gen) == [1, 2]


def test_another_thread_may_start_it_and_run_its_own() -> None:
    gen = generator(counting, 3)
    assert in_thread(lambda: list(gen)) == [0, 1, 2]
    mine = generator(counting, 3)
    next(mine)
    assert in_thread(lambda: list(generator(counting, 3))) == [0, 1, 2]
    assert list(mine) == [1, 2]


def test_the_end_of_a_thread_drops_what_is_suspended() -> None:
    log: list[Any] = []
    holder = [generator(counting, 3, log)]
    assert in_thread(lambda: next(holder[0])) == 0
    with pytest.raises(InterleavingError) as error:
        next(holder[0])
    assert "Fix: start a new one; that thread has ended, and the suspended call with it." in message(error)
    with pytest.raises(InterleavingError):
        holder[0].close()
    ended = weakref.ref(holder[0]._driver)
    del error  # its traceback refers to the generator
    holder.clear()
    assert ended() is None
    assert log == []  # greenlet's own rule: the stack is gone
    assert list(generator(counting, 2)) == [0, 1]


def test_one_dropped_by_another_thread_is_closed_at_the_next_turn_of_its_own() -> None:
    log: list[Any] = []
    holder = [generator(counting, 3, log)]
    next(holder[0])
    in_thread(holder.clear)
    assert log == []
    assert list(generator(counting, 2, log, "next")) == [0, 1]
    assert log == ["counting ended", "next ended"]


def test_a_body_sees_a_copy_of_its_starters_context_variables() -> None:
    variable: ContextVar[str] = ContextVar("variable")
    variable.set("at making")

    def body() -> None:
        yield_(variable.get())
        variable.set("by the body")
        yield_(variable.get())
        yield_(list(generator(lambda: yield_(variable.get()))))

    gen = generator(body)
    variable.set("at start")
    assert next(gen) == "at start"
    variable.set("by the consumer")
    assert list(gen) == ["by the body", ["by the body"]]
    assert variable.get() == "by the consumer"


# --- local contexts ---


class Lamp:
    """A context manager factory that knows which of its contexts are open."""

    def __init__(self) -> None:
        self.on: list[str] = []
        self.switched = 0

    @contextlib.contextmanager
    def light(self, name: str) -> Iterator[str]:
        self.on.append(name)
        self.switched += 1
        try:
            yield f"{name} {self.switched}"
        finally:
            assert self.on.pop() == name

    def local(self, name: str) -> local_context:
        return local_context(lambda: self.light(name))


def test_a_local_context_is_open_only_while_its_body_runs() -> None:
    lamp = Lamp()

    def body() -> None:
        with lamp.local("a") as bound, lamp.local("b"):
            assert bound == "a 1"
            for _ in range(2):
                assert lamp.on == ["a", "b"]
                yield_()
            with pytest.raises(KeyError):
                yield_()
            assert lamp.on == ["a", "b"]
            yield_()

    gen = generator(body)
    for _ in range(3):
        next(gen)
        assert lamp.on == []
    gen.throw(KeyError)
    assert lamp.on == []
    gen.close()
    assert lamp.on == []
    assert lamp.switched == 10


def test_it_is_closed_while_a_generator_inside_it_runs() -> None:
    lamp = Lamp()

    def inner() -> None:
        assert lamp.on == []
        with lamp.local("inner"):
            yield_(list(lamp.on))

    def outer() -> None:
        with lamp.local("outer"):
            for value in generator(inner):
                assert lamp.on == ["outer"]
                yield_(value)
                assert lamp.on == ["outer"]

    with lamp.local("main"):
        gen = generator(outer)
        assert next(gen) == ["inner"]
        assert lamp.on == ["main"]
        gen.close()
        assert lamp.on == ["main"]
        gen = generator(outer)
        next(gen)
        del gen
        assert lamp.on == ["main"]
    assert lamp.on == []


@pytest.mark.parametrize("how", ["close", "drop", "drop in a loop", "with", "exception", "end"])
def test_it_is_closed_however_a_generator_inside_it_ends(how: str) -> None:
    lamp = Lamp()
    seen: list[list[str]] = []

    def body() -> None:
        try:
            yield_()
        finally:
            seen.append(list(lamp.on))

    with lamp.local("main"):
        if how == "with":
            with loop(counting, 2) as outer:
                next(outer)
                later = generator(body)
                next(later)
        else:
            gen = generator(body)
            next(gen)
            if how == "close":
                gen.close()
            elif how == "drop":
                del gen
            elif how == "exception":
                with pytest.raises(KeyError):
                    gen.throw(KeyError)
            elif how == "drop in a loop":
                other = generator(counting, 2)
                next(other)
                del gen
                assert list(other) == [1]
            else:
                assert list(gen) == []
        assert lamp.on == ["main"]
    assert seen == [[]]


def test_where_nothing_switches_it_is_a_plain_context() -> None:
    lamp = Lamp()
    context = lamp.local("a")
    for i in range(2):
        with context as bound:
            assert bound == f"a {i + 1}"
            assert lamp.on == ["a"]
        assert lamp.on == []
    with pytest.raises(KeyError, match="through"), lamp.local("a"):
        raise KeyError("through")
    with local_context(lambda: contextlib.suppress(KeyError)):
        raise KeyError("suppressed")


def test_what_the_context_manager_is_told() -> None:
    told: list[Any] = []

    class Telling:
        def __enter__(self) -> None:
            told.append("enter")

        def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
            told.append(kind)
            return kind is KeyError

    def body() -> str:
        with local_context(Telling):
            yield_()
        return "went on"

    gen = generator(body)
    next(gen)
    with pytest.raises(StopIteration) as stop:
        gen.throw(KeyError)
    assert stop.value.value == "went on"
    assert told == ["enter", None, "enter", KeyError]


@pytest.mark.parametrize("where", ["closing", "opening"])
def test_an_error_in_leaving_or_coming_back_is_raised_in_the_body(where: str) -> None:
    lamp = Lamp()
    fuse = [False]

    @contextlib.contextmanager
    def faulty() -> Iterator[None]:
        if fuse[0] and where == "opening":
            fuse[0] = False
            raise LookupError("cannot open")
        with lamp.light("faulty"):
            yield
        if fuse[0] and where == "closing":
            fuse[0] = False
            raise LookupError("cannot close")

    def body() -> str:
        with lamp.local("outer"):
            try:
                with local_context(faulty), lamp.local("inner"):
                    yield_("first")
                    if where == "closing":
                        fuse[0] = True
                    yield_("second")
            except LookupError as error:
                assert lamp.on == ["outer"]
                return str(error)
        return "no error"

    gen = generator(body)
    assert next(gen) == "first"
    if where == "opening":
        fuse[0] = True
    with pytest.raises(StopIteration) as stop:
        next(gen)
    assert stop.value.value == ("cannot open" if where == "opening" else "cannot close")
    assert lamp.on == []


def test_after_an_error_in_closing_all_are_open_again() -> None:
    lamp = Lamp()
    fuse = [True]

    @contextlib.contextmanager
    def faulty() -> Iterator[None]:
        with lamp.light("faulty"):
            yield
        if fuse.pop():
            raise LookupError

    with lamp.local("outer"), local_context(faulty), lamp.local("inner"):
        gen = generator(counting, 2)
        with pytest.raises(LookupError):
            next(gen)
        assert lamp.on == ["outer", "faulty", "inner"]
        assert gen.gi_suspended is False
        fuse.extend([False] * 9)
        assert list(gen) == [0, 1]
        assert lamp.on == ["outer", "faulty", "inner"]
    assert lamp.on == []


def test_misused_local_contexts() -> None:
    with pytest.raises(InvalidInputError) as invalid:
        local_context(contextlib.nullcontext())  # type: ignore[arg-type]
    assert "was given in local_context(...).\n  Expected: a function that makes a fresh context" in message(invalid)
    assert "Fix: write local_context(lambda: ...)." in message(invalid)
    with pytest.raises(InvalidInputError):
        local_context(3)  # type: ignore[arg-type]

    lamp = Lamp()
    twice = lamp.local("twice")
    with twice, pytest.raises(InterleavingError, match="A local context was entered while it was open"):
        twice.__enter__()
    first, second = lamp.local("first"), lamp.local("second")
    with first:
        with second, pytest.raises(InterleavingError) as error:
            first.__exit__(None, None, None)
        assert "A local context was left out of turn in thread 'MainThread'.\n  Expected: one `with`" in message(error)
        assert "Fix: make one local_context for each `with` block." in message(error)

        def body() -> None:
            with pytest.raises(InterleavingError, match="left out of turn in generator"):
                first.__exit__(None, None, None)

        list(generator(body))
        assert lamp.on == ["first"]
    assert lamp.on == []


def test_a_jax_configuration_does_not_leak_to_the_consumer() -> None:
    def precision() -> str | None:
        return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]

    def body(context: Callable[[Callable[[], Any]], Any]) -> None:
        with context(lambda: jax.default_matmul_precision("highest")):
            yield_(precision())
            yield_(precision())

    before = precision()
    assert [(inside, precision()) for inside in generator(body, local_context)] == [("highest", before)] * 2
    # The trap it is for: a plain context does leak.
    assert [(inside, precision()) for inside in generator(body, lambda make: make())] == [("highest", "highest")] * 2
    assert precision() == before


def test_no_trace_of_the_machinery_in_the_recursion_depth() -> None:
    """Each body has a call stack of its own; switching many times does not deepen any."""

    def body() -> None:
        for _ in range(3 * sys.getrecursionlimit()):
            yield_()

    assert sum(1 for _ in generator(body)) == 3 * sys.getrecursionlimit()
