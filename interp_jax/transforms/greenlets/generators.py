"""`generator` and `yield_`: the generator protocol for functions that yield from deep inside other calls.

A native generator, the driver, stands on the consumer's side and switches to a greenlet, the body. Being a generator,
the driver gives the whole protocol exactly: states, messages, StopIteration, what `close` and garbage collection do.
Around it GreenletGenerator adds the rule of `scopes`, checked before control moves.

>>> def twice(x):
...     return 2 * yield_(x)
>>> doubling = generator(twice, 5)
>>> next(doubling)
5
>>> doubling.send(7)
Traceback (most recent call last):
StopIteration: 14

Sharp edges: those of the package. A generator handed to other code can be resumed only by what started it.

Source: PEP 342, 380 and 479; the documentation of greenlet.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
from collections.abc import Callable, Generator, Iterable
from functools import partial
from types import FrameType
from typing import Any, NoReturn, cast

from greenlet import GreenletExit, getcurrent, greenlet

from interp_jax.core.errors import InterleavingError, InvalidInputError, RunningPassError, four_part
from interp_jax.transforms.greenlets.scopes import Scope, current_scope

# A box is a list of one value. Values cross between greenlets in boxes that the receiver empties, so that no frame on
# the way keeps them alive: JAX's leak checker would take such a reference for a leaked tracer.
Box = list[Any]
_NOTHING = object()


class _Body(greenlet):
    """The greenlet in which the function of a generator runs; its parent is the greenlet that resumes it."""

    interp_jax_scope: Scope


def _run(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Box:
    """The outermost frame of a body. A result is boxed: a GreenletExit that escapes is returned as it is."""
    try:
        return [fn(*args, **kwargs)]
    finally:
        current_scope().close_live()


def _drive(
    name: str, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Generator[Any, Box | None, Any]:
    """The native generator that stands for a body: what is done to it, it does to the body."""
    body = _Body(_run)
    body.gr_context = contextvars.copy_context()  # a fresh greenlet has an empty one
    body.interp_jax_scope = scope = Scope(name)
    try:
        box = body.switch(fn, args, kwargs)
        while not body.dead:
            try:
                reply = yield box.pop()
            except BaseException as error:
                if not scope.is_in_this_thread():  # the body's has ended, and the body with it
                    raise
                thrown = error
            else:
                box = body.switch(reply)
                continue
            body.parent = getcurrent()  # garbage collection may have brought us here from anywhere
            try:  # outside the handler, so that what the body raises does not get `thrown` as its context
                box = body.throw(type(thrown), thrown, _without_top_frame(thrown))
            finally:
                del thrown  # its traceback refers to this frame
    finally:
        if not body.dead and scope.is_in_this_thread():  # interrupted on this side of the switch
            with contextlib.suppress(GeneratorExit):
                body.throw(GeneratorExit)
    if isinstance(box, GreenletExit):
        raise box
    return box.pop()


def _without_top_frame(error: BaseException) -> Any:
    return error.__traceback__ and error.__traceback__.tb_next


class GreenletGenerator(Generator[Any, Any, Any]):
    """A generator whose body is `fn(*args, **kwargs)`, any function that calls `yield_`. Made by `generator`."""

    __slots__ = ("__name__", "__qualname__", "__weakref__", "_driver", "_home")

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._home: Scope | None = None  # of the greenlet that started it
        self.__name__ = getattr(fn, "__name__", type(fn).__name__)
        self.__qualname__ = getattr(fn, "__qualname__", self.__name__)
        self._driver: Any = _drive(f"generator {self.__qualname__!r}", fn, args, kwargs)
        self._driver.__qualname__ = self.__qualname__

    def __next__(self) -> Any:
        """Runs to the next `yield_` and returns what it yields."""
        return self._resume(self._driver.__next__)

    def send(self, value: Any, /) -> Any:
        """Does the same, and the `yield_` that the body waits at returns `value`."""
        box = None if value is None else [value]
        del value
        return self._resume(self._driver.send, box)

    def send_box(self, box: Box) -> Any:
        """Sends what is in `box`, which the body empties; it stays full if the generator may not be resumed."""
        return self._resume(self._driver.send, box)

    def throw(self, *error: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Raises an error at the `yield_` that the body waits at; then like `next`."""
        try:
            return self._resume(self._driver.throw, *error)
        finally:
            del error  # its traceback refers to this frame

    def close(self) -> Any:
        """Raises GeneratorExit at the `yield_` that the body waits at, and expects it to end."""
        return self._resume(self._driver.close)

    def require_turn(self) -> None:
        """Raises the InterleavingError that resuming it here and now would raise; moves no control."""
        scope = current_scope()
        scope.settle()
        if self._driver.gi_suspended and (not scope.live or scope.live[-1] is not self._driver):
            self._refuse(scope)

    def close_later(self) -> None:
        """Closes the generators that were started after it by the same code, the last first."""
        scope = current_scope()
        if self._driver in scope.live:
            scope.leave()
            try:
                scope.close_live(above=self._driver)
            finally:
                scope.come_back()

    def _resume(self, method: Callable[..., Any], *args: Any) -> Any:
        """Calls a method of the driver if this generator is on top of the running greenlet's stack."""
        scope = current_scope()
        driver = self._driver
        if not scope.live or scope.live[-1] is not driver:
            self._admit(scope)
        try:
            if not scope.contexts:
                return method(*args)
            scope.leave()
            try:
                return method(*args)
            finally:
                scope.come_back()
        finally:
            del args  # may hold what was thrown
            if not driver.gi_suspended:
                scope.remove(driver)
                scope.settle()

    def _admit(self, scope: Scope) -> None:
        """Puts a generator that is about to start on top of the stack; refuses one that may not be resumed here."""
        scope.settle()
        state = inspect.getgeneratorstate(self._driver)
        if state == inspect.GEN_CREATED:
            self._home = scope
            scope.live.append(self._driver)
        elif state == inspect.GEN_SUSPENDED and (not scope.live or scope.live[-1] is not self._driver):
            self._refuse(scope)
        elif state == inspect.GEN_RUNNING:  # said here: CPython 3.11 may crash in throw and close of a running one
            raise ValueError("generator already executing")
        # To one that has ended, the driver does what any generator does.

    def _refuse(self, scope: Scope) -> NoReturn:
        name, home = repr(self.__qualname__), cast(Scope, self._home)
        if home.thread is not scope.thread:
            what = f"Generator {name}, started in thread {home.thread.name!r}, was resumed"
            where = f"thread {scope.thread.name!r}"
            expected = "a generator stays in the thread that started it: its call stack is there."
            fix = "iterate over it in that thread and pass the values on through a queue."
            if not home.thread.is_alive():
                fix = "start a new one; that thread has ended, and the suspended call with it."
        elif home is scope and scope.live:
            later = repr(scope.live[-1].__qualname__)
            what = f"Generator {name} was resumed while {later}, started after it, is suspended"
            where = scope.name
            expected = "the generator started last ends first: generators nest as calls do."
            fix = f"finish or close {later} first (`with loop(...)` closes at the end of its block)."
        else:
            what, where = f"Generator {name}, started in {home.name}, was resumed", scope.name
            expected = "a generator goes on only where it was started, and before what started it ends."
            fix = "resume it there, and pass its values on with yield_from(...)."
        raise InterleavingError(four_part(what, where=where, expected=expected, fix=fix))

    def __del__(self) -> None:
        home = self._home
        if home is None or self._driver not in home.live:
            return  # CPython ends the driver now
        if not home.thread.is_alive():
            home.remove(self._driver)
            return
        home.orphans.add(self._driver)
        del self._driver
        if home is current_scope():  # elsewhere, and where it is not on top, it has to wait for its turn
            home.settle()

    @property
    def gi_running(self) -> bool:
        """Whether the body is running, or consuming a generator that is."""
        return self._driver.gi_running

    @property
    def gi_suspended(self) -> bool:
        """Whether the body waits at a `yield_`."""
        return self._driver.gi_suspended

    @property
    def gi_frame(self) -> FrameType | None:
        """The frame on the consumer's side, None when the body has ended."""
        return self._driver.gi_frame

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"cannot pickle {type(self).__name__!r} object")

    def __repr__(self) -> str:
        state = inspect.getgeneratorstate(self._driver).removeprefix("GEN_").lower()
        return f"<{type(self).__name__} {self.__qualname__} ({state})>"


def generator(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> GreenletGenerator:
    """A generator that runs `fn(*args, **kwargs)` and yields what is given to `yield_` below it.

    Args:
        fn: The body. It starts at the first `next`; its result is the value of the final StopIteration.
        args: Positional arguments of `fn`.
        kwargs: Keyword arguments of `fn`.

    Returns:
        A `collections.abc.Generator` that behaves as a native one. To resume it when it is not the last one started
        there, or from elsewhere, raises InterleavingError before control moves; both generators stay usable.

    Raises:
        InvalidInputError: `fn` cannot be called, or is a generator function (its `yield` would go unseen).
    """
    if not callable(fn) or inspect.isgeneratorfunction(fn):
        what = "A generator function was given" if callable(fn) else f"{fn!r} was given, which cannot be called,"
        expected = "a function that calls yield_(...), followed by its arguments."
        fix = "iterate over it directly, or use generator(yield_from, f(x))." if callable(fn) else "generator(f, x)."
        raise InvalidInputError(four_part(what, where="generator(...)", expected=expected, fix=fix))
    return GreenletGenerator(fn, args, kwargs)


def yield_(*values: Any, default: Any = _NOTHING) -> Any:
    """Hands values to whoever iterates over the innermost generator that is running, and waits for the reply.

    Args:
        values: Nothing yields None, one value itself, several a tuple.
        default: What to return outside any generator, where it is otherwise an error.

    Returns:
        What the consumer sends, None for a plain `next`. An exception that it throws is raised here.

    Raises:
        RunningPassError: Outside any generator and no default. It is a RuntimeError.
    """
    body = getcurrent()
    if not isinstance(body, _Body):
        if default is not _NOTHING:
            return default
        _outside("yield_", "iterate over loop(f, ...) in place of calling f(...), or give yield_ a default.")
    box: Any = [values[0] if len(values) == 1 else values or None]
    del values
    scope = body.interp_jax_scope
    consumer: Any = body.parent
    try:
        if not scope.contexts:
            box = consumer.switch(box)
        else:
            scope.leave()
            try:
                box = consumer.switch(box)
            finally:
                scope.come_back()
    except BaseException as error:
        thrown = error
    else:
        return box.pop() if box else None
    try:  # outside the handler: its context is then what the body is handling, as in any generator
        raise thrown.with_traceback(_without_top_frame(thrown))
    finally:
        del thrown


def _outside(name: str, fix: str) -> NoReturn:
    what, where = f"{name} was called outside any generator", current_scope().name
    expected = "a call below the function given to generator(...) or loop(...), in the same greenlet."
    raise RunningPassError(four_part(what, where=where, expected=expected, fix=fix))


def yield_from(iterable: Iterable[Any], /) -> Any:
    """Does what `yield from iterable` does, below a generator's body.

    Args:
        iterable: Its items are yielded. What is sent or thrown goes to its iterator, and so does `close`.

    Returns:
        The value of its StopIteration: what a generator returned, else None.

    Raises:
        RunningPassError: Outside any generator.

    Source: PEP 380.
    """
    if not isinstance(getcurrent(), _Body):
        _outside("yield_from", "iterate over loop(f, ...) in place of calling f(...).")
    iterator: Any = iter(iterable)
    resume: Callable[[], Any] = partial(next, iterator)
    while True:
        try:
            item = [resume()]
        except StopIteration as stop:
            return stop.value
        finally:
            del resume  # and with it what was sent or thrown
        try:
            reply = [yield_(item.pop())]
        except GeneratorExit as error:
            resume = partial(_close_and_raise, iterator, error)
        except BaseException as error:
            if (throw := getattr(iterator, "throw", None)) is None:
                raise
            resume = partial(throw, error)
        else:
            if reply[0] is None:
                resume = partial(next, iterator)
            elif isinstance(iterator, GreenletGenerator):
                resume = partial(iterator.send_box, reply)
            else:
                resume = partial(iterator.send, reply.pop())


def _close_and_raise(iterator: Any, error: GeneratorExit) -> NoReturn:
    try:
        if (close := getattr(iterator, "close", None)) is not None:
            close()
        raise error
    finally:
        del error
