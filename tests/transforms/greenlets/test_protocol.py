"""Generators over greenlets do what native ones do: every short sequence of calls on many bodies, compared.

Source: PEP 342, 380 and 479, by way of the interpreter that runs the tests.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from greenlet import GreenletExit

from interp_jax.transforms import greenlets
from tests.transforms.greenlets.pairs import Pair, build_pair

# Some of the bodies, native ones too, do not want to end: "Exception ignored: generator ignored GeneratorExit".
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

MACHINERY = str(Path(greenlets.__file__).parent)


class Bare:
    """An iterator with nothing but `__next__`."""

    def __init__(self) -> None:
        self.left = [1, 2]

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if not self.left:
            raise StopIteration("bare value")
        return self.left.pop()


class Full(Bare):
    """An iterator that answers to everything and is not a generator."""

    def send(self, value: Any) -> Any:
        return ("sent", value)

    def throw(self, error: Any, *rest: Any) -> Any:
        name = getattr(error, "__name__", type(error).__name__)  # native generators pass a class on as it is
        if name == "StopIteration":
            raise StopIteration("thrown away")
        return ("thrown", name)

    def close(self) -> None:
        if not self.left:
            raise LookupError("closed too late")


class NoClose(Full):
    """The same without `close`, as far as attribute look-up can tell."""

    close = property(lambda self: getattr(self, "there is no close"))  # type: ignore[assignment]


def numbers(log: list[Any]) -> Generator[Any, Any, Any]:
    """A native generator to delegate to."""
    try:
        log.append((yield "n1"))
        log.append((yield "n2"))
    except KeyError as error:
        log.append(repr(error))
        yield "n3"
    finally:
        log.append("numbers ended")
    return "numbers returned"


def stubborn() -> Generator[Any, Any, Any]:
    """A native generator that does not want to end."""
    while True:
        with contextlib.suppress(GeneratorExit):
            yield "still here"


BODIES = {
    "empty": "",
    "returns": "return 'r'",
    "yields_nothing": "return (YIELD(), YIELD())",
    "two_values": "a = YIELD(1); LOG.append(a); b = YIELD((2, a)); LOG.append(b); return a, b",
    "returns_a_tuple": "YIELD(1); return (1, 2)",
    "returns_an_exception": "YIELD(1); return ValueError('a result')",
    "raises": "LOG.append(YIELD(1)); raise KeyError('k')",
    "raises_at_once": "raise KeyError('k')",
    "raises_from": """
        try:
            YIELD(1)
        except ValueError as error:
            raise KeyError('k') from error
    """,
    "raises_while_handling": """
        try:
            YIELD(1)
        except ValueError:
            LOG.append('handling')
            raise KeyError('k')
    """,
    "stops": "YIELD(1); raise StopIteration('s')",
    "stops_at_once": "raise StopIteration('s')",
    "next_of_empty": "YIELD(1); return next(iter(()))",
    "raises_generator_exit": "YIELD(1); raise GeneratorExit('g')",
    "raises_greenlet_exit": "YIELD(1); raise GREENLET_EXIT('e')",
    "catches": """
        for i in range(3):
            try:
                LOG.append(YIELD(i))
            except ValueError as error:
                LOG.append(repr(error))
    """,
    "catches_everything": """
        for i in range(5):
            try:
                LOG.append(YIELD(i))
            except BaseException as error:
                LOG.append(repr(error))
        return 'tired'
    """,
    "returns_on_exit": """
        try:
            YIELD(1)
        except GeneratorExit:
            return 'closed'
    """,
    "raises_on_exit": """
        try:
            YIELD(1)
        except GeneratorExit:
            raise LookupError('not like this')
    """,
    "blocks": """
        with CONTEXT('outer'), CONTEXT('inner'):
            try:
                LOG.append(YIELD(1))
                LOG.append(YIELD(2))
            finally:
                LOG.append('finally')
    """,
    "yields_at_the_end": """
        try:
            YIELD(1)
        finally:
            LOG.append(YIELD('in finally'))
    """,
    "yields_while_handling": """
        try:
            raise KeyError('being handled')
        except KeyError:
            LOG.append(YIELD(1))
            LOG.append(YIELD(2))
        YIELD(3)
    """,
    "yields_while_handling_and_raises_again": """
        try:
            raise KeyError('being handled')
        except KeyError:
            LOG.append(YIELD(1))
            raise
    """,
    "wraps_what_is_thrown": """
        while True:
            try:
                YIELD(1)
            except ValueError as error:
                try:
                    YIELD(repr(error))
                except Exception as second:
                    LOG.append(repr(second.__context__))
                    raise
    """,
    "enters_itself": """
        for call in (lambda: next(ME[0]), lambda: ME[0].send(3), lambda: ME[0].throw(KeyError), ME[0].close):
            try:
                call()
            except ValueError as error:
                YIELD(str(error))
        next(ME[0])
    """,
    "delegates_to_list": "YIELD(0); LOG.append(YIELD_FROM([1, 2])); YIELD(3)",
    "delegates_to_nothing": "LOG.append(YIELD_FROM(())); return YIELD_FROM(iter([]))",
    "delegates_to_a_number": "YIELD(0); YIELD_FROM(3)",
    "delegates_to_native": "return ('then', YIELD_FROM(NUMBERS(LOG)))",
    "delegates_to_stubborn": "YIELD_FROM(STUBBORN())",
    "delegates_to_bare": "LOG.append(YIELD_FROM(BARE())); return YIELD('after')",
    "delegates_to_full": "LOG.append(YIELD_FROM(FULL())); return YIELD('after')",
    "delegates_without_close": "LOG.append(YIELD_FROM(NO_CLOSE())); return YIELD('after')",
    "delegates_and_catches": """
        try:
            YIELD_FROM([1, 2])
        except (StopIteration, ValueError) as error:
            LOG.append(repr(error))
            YIELD('caught')
    """,
    "delegates_twice_over": "return YIELD_FROM(DELEGATING(LOG))",
    "loops_over_native": """
        for value in NUMBERS(LOG):
            LOG.append(YIELD(('outer', value)))
    """,
}

# From CPython 3.12 on, a StopIteration thrown at the `yield from` of an iterator without `throw` ends the generator.
# PEP 380 says that it is raised there, as CPython 3.11 does: a test of its own below.
TO_PLAIN_ITERATORS = ("delegates_to_list", "delegates_to_bare", "delegates_and_catches")

CALLS: dict[str, Callable[[Any], Any]] = {
    "next": next,
    "send(None)": lambda g: g.send(None),
    "send(0)": lambda g: g.send(0),
    "throw(ValueError('x'))": lambda g: g.throw(ValueError("x")),
    "throw(ValueError)": lambda g: g.throw(ValueError),
    "throw(KeyError('y'))": lambda g: g.throw(KeyError("y")),
    "throw(StopIteration(4))": lambda g: g.throw(StopIteration(4)),
    "throw(GeneratorExit)": lambda g: g.throw(GeneratorExit),
    "throw(KeyboardInterrupt())": lambda g: g.throw(KeyboardInterrupt()),
    "close": lambda g: g.close(),
}
ODD_CALLS: dict[str, Callable[[Any], Any]] = {
    "throw(3)": lambda g: g.throw(3),
    "throw()": lambda g: g.throw(),
    "throw(ValueError, 'text', None)": lambda g: g.throw(ValueError, "text", None),
    "throw(ValueError, ValueError('v'))": lambda g: g.throw(ValueError, ValueError("v")),
    "throw(ValueError(), 'text')": lambda g: g.throw(ValueError(), "text"),
    "throw(ValueError, None, 'no traceback')": lambda g: g.throw(ValueError, None, "no traceback"),
    "iter": lambda g: iter(g) is g,
    "iterate": lambda g: [value for value, _ in zip(g, range(9), strict=False)],
}


class Noted:
    """A context that notes when it opens and closes."""

    def __init__(self, log: list[Any], name: str) -> None:
        self.log, self.name = log, name

    def __enter__(self) -> None:
        self.log.append(f"enter {self.name}")

    def __exit__(self, kind: Any, *rest: object) -> None:
        self.log.append(f"exit {self.name} by {kind and kind.__name__}")


def delegating(log: list[Any]) -> Generator[Any, Any, Any]:
    """A native generator that delegates to another."""
    return ("delegated", (yield from numbers(log)))


def pair_of(name: str) -> Pair:
    return build_pair(
        name,
        BODIES[name],
        GREENLET_EXIT=GreenletExit,
        NUMBERS=numbers,
        STUBBORN=stubborn,
        DELEGATING=delegating,
        BARE=Bare,
        FULL=Full,
        NO_CLOSE=NoClose,
    )


def chain(error: BaseException | None) -> list[Any]:
    """What an error says, and what it says of its causes and contexts."""
    if error is None:
        return []
    parts: list[Any] = [type(error), str(error), repr(getattr(error, "value", None)), error.__suppress_context__]
    return [*parts, chain(error.__cause__), chain(error.__context__)]


def frames(error: BaseException) -> list[tuple[str, int]]:
    """Functions and lines of a traceback, without the frames of the machinery itself.

    Nor the `def` line of a body: there a native generator raises what is thrown before its start.
    """
    found = [entry for entry in traceback.extract_tb(error.__traceback__) if not entry.filename.startswith(MACHINERY)]
    return [(entry.name, entry.lineno or 0) for entry in found if (entry.filename[0], entry.lineno) != ("<", 1)]


def outcome(call: Callable[[Any], Any], gen: Generator[Any, Any, Any]) -> list[Any]:
    """All that a caller can see of one call."""
    try:
        result = ["returns", call(gen)]
    except BaseException as error:
        result = ["raises", chain(error), frames(error)]
    return [*result, inspect.getgeneratorstate(gen), gen.gi_running]  # type: ignore[arg-type]


def story(make: Callable[..., Generator[Any, Any, Any]], calls: tuple[Callable[[Any], Any], ...]) -> list[Any]:
    """The outcomes of several calls on one new generator, and what its body noted meanwhile."""
    log: list[Any] = []
    me: list[Any] = []
    gen = make(LOG=log, ME=me, CONTEXT=functools.partial(Noted, log))
    me.append(gen)
    told = [[outcome(call, gen), list(log)] for call in calls]
    me.clear()
    return told


def assert_same_story(pair: Pair, names: tuple[str, ...]) -> None:
    calls = tuple((CALLS | ODD_CALLS)[name] for name in names)
    assert story(pair.ours, calls) == story(pair.native, calls), names


@pytest.mark.parametrize("body", BODIES)
def test_every_short_sequence_of_calls_as_native(body: str) -> None:
    pair = pair_of(body)
    for names in itertools.product(CALLS, repeat=3):
        if not (body in TO_PLAIN_ITERATORS and "throw(StopIteration(4))" in names and sys.version_info >= (3, 12)):
            assert_same_story(pair, names)


# Without delegating bodies: a native one hands what is no exception to its iterator unseen.
@pytest.mark.parametrize("body", [body for body in BODIES if not body.startswith("delegates")])
def test_odd_calls_in_each_state_as_native(body: str) -> None:
    pair = pair_of(body)
    for odd in ODD_CALLS:
        for before in [(), ("next",), ("next", "next"), ("next", "close"), ("close",)]:
            assert_same_story(pair, (*before, odd, "next"))


def test_the_bodies_reach_every_outcome_of_the_protocol() -> None:
    """Else the comparison would prove less than it seems to."""
    seen: set[Any] = set()
    for body in BODIES:
        for names in itertools.product(("next", "send(0)", "throw(KeyError('y'))", "close"), repeat=3):
            for told in story(pair_of(body).ours, tuple(CALLS[name] for name in names)):
                kind, value = told[0][:2]
                seen.add(value[1] if kind == "raises" else value)
    assert {
        1,
        "can't send non-None value to a just-started generator",
        "generator already executing",
        "generator ignored GeneratorExit",
        "generator raised StopIteration",
        "'list_iterator' object has no attribute 'send'",
        "'int' object is not iterable",
    } <= seen


@pytest.mark.parametrize("call", ["throw(KeyError)", "close()"])
def test_entering_itself_again_and_again_does_not_crash(call: str) -> None:
    """CPython 3.11 may take an inline cache for an instruction in `throw` and `close` on a running generator.

    It depends on how warm the code is, so this runs in a fresh interpreter.
    """
    script = f"""
        from interp_jax.transforms.greenlets import generator

        def body():
            try:
                gen.{call}
            except ValueError as error:
                assert str(error) == "generator already executing"

        for _ in range(500):
            gen = generator(body)
            assert list(gen) == []
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


def test_a_stop_iteration_thrown_at_a_plain_iterator_is_raised_at_yield_from() -> None:
    told = story(pair_of("delegates_and_catches").ours, (next, CALLS["throw(StopIteration(4))"]))
    assert [outcome[:2] for outcome, _ in told] == [["returns", 1], ["returns", "caught"]]
    assert told[1][1] == ["StopIteration(4)"]
