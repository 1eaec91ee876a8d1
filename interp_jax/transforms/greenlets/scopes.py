"""What belongs to one greenlet: the generators it has started and not finished, and its local contexts.

Two generators interleave when one goes on while the other, started later by the same code, is still suspended. To
forbid that it is enough that each greenlet keeps a stack of its own, and only what lies on top may go on. One stack
for the whole thread would be wrong: it would refuse `for value in inner: yield_(value)`.

>>> with local_context(lambda: contextlib.nullcontext("a plain context here")) as value:
...     print(value)
a plain context here

Sharp edges: what `as` binds comes from the first opening of a local context, not from later ones.

Source: mishax (github.com/google-deepmind/mishax), LocalContextManager and its one reachable child per greenlet.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections.abc import Callable
from types import GeneratorType, TracebackType
from typing import Any, NoReturn

from greenlet import getcurrent

from interp_jax.core.errors import InterleavingError, InvalidInputError, four_part


class Scope:
    """The generators that one greenlet started, as a stack of their drivers, and its local contexts."""

    __slots__ = ("contexts", "live", "name", "orphans", "thread")

    def __init__(self, name: str | None = None) -> None:
        self.thread = threading.current_thread()
        self.name = name or f"thread {self.thread.name!r}"
        self.live: list[GeneratorType[Any, Any, Any]] = []  # the one started last at the end
        self.orphans: set[GeneratorType[Any, Any, Any]] = set()  # those that nobody can resume any more
        self.contexts: list[local_context] = []  # outermost first

    def is_in_this_thread(self) -> bool:
        """Whether its greenlet belongs to the thread that asks."""
        return self.thread is threading.current_thread()

    def settle(self) -> None:
        """Takes what has ended off the stack, and ends the orphans on top of it.

        An orphan's last reference is dropped: so CPython closes it, and reports errors as for any generator.
        """
        while self.live:
            driver = self.live[-1]
            if driver in self.orphans:
                self.leave()
                try:
                    self.remove(driver)
                    del driver
                finally:
                    self.come_back()
            elif driver.gi_suspended or driver.gi_frame is not None:
                return
            else:
                self.remove(driver)

    def remove(self, driver: GeneratorType[Any, Any, Any]) -> None:
        """Takes a driver off the stack if it is on it: finalisers, which run anywhere, may have done so already."""
        self.orphans.discard(driver)
        with contextlib.suppress(ValueError):
            self.live.remove(driver)

    def close_live(self, above: GeneratorType[Any, Any, Any] | None = None) -> None:
        """Closes the stack, or what lies above one driver on it: the one started last first, all even if one raises."""
        if self.live and (driver := self.live[-1]) is not above:
            self.remove(driver)
            try:
                driver.close()
            finally:
                self.close_live(above)

    def leave(self) -> None:
        """Closes the local contexts, innermost first, before control leaves; opens them again if one raises."""
        try:
            for context in reversed(self.contexts):
                context._close()
        except BaseException:
            self.come_back()
            raise

    def come_back(self) -> None:
        """Opens the local contexts that are closed, outermost first."""
        for context in self.contexts:
            context._open()


def current_scope() -> Scope:
    """The scope of the greenlet that is running."""
    attributes = getcurrent().__dict__
    scope = attributes.get("interp_jax_scope")
    if scope is None:
        scope = attributes["interp_jax_scope"] = Scope()
    return scope


# Like native generators, those still suspended at the end of the program are closed: greenlet itself drops them.
atexit.register(lambda: current_scope().close_live())


class local_context:  # noqa: N801 - used like a function
    """A context that is open only while its own greenlet runs: closed when control leaves, opened afresh on return.

    Control leaves both ways: to the consumer at a `yield_`, and to a body when a generator is consumed inside the
    context. Where neither happens, in a generator or not, it is a plain context.

    Args:
        make_context_manager: Called without arguments for a fresh context manager at each opening.

    Raises:
        InvalidInputError: A context manager was given in place of a function that makes them.
        InterleavingError: It is entered while open, or left in another greenlet or order than it was entered.

    >>> from interp_jax.transforms.greenlets import generator, yield_
    >>> @contextlib.contextmanager
    ... def noisy():
    ...     print("open")
    ...     yield
    ...     print("close")
    >>> def body():
    ...     with local_context(noisy):
    ...         yield_()
    >>> for _ in generator(body):
    ...     print("outside")
    open
    close
    outside
    open
    close

    Source: mishax, LocalContextManager.
    """

    def __init__(self, make_context_manager: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        if isinstance(make_context_manager, contextlib.AbstractContextManager) or not callable(make_context_manager):
            what, expected = f"{make_context_manager!r} was given", "a function that makes a fresh context manager."
            raise InvalidInputError(
                four_part(what, where="local_context(...)", expected=expected, fix="write local_context(lambda: ...).")
            )
        self._make = make_context_manager
        self._scope: Scope | None = None
        self._manager: contextlib.AbstractContextManager[Any] | None = None  # the one that is open

    def __enter__(self) -> Any:
        if self._scope is not None:
            self._misused("entered while it was open")
        value = self._open()
        self._scope = current_scope()
        self._scope.contexts.append(self)
        return value

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        scope = current_scope()
        if self._scope is not scope or scope.contexts[-1] is not self:
            self._misused("left out of turn")
        scope.contexts.pop()
        self._scope = None
        return self._close(kind, error, traceback)

    def _open(self) -> Any:
        if self._manager is not None:
            return None
        manager = self._make()
        value = manager.__enter__()
        self._manager = manager
        return value

    def _close(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> bool | None:
        manager, self._manager = self._manager, None
        # It is closed already where it could not be opened on return.
        return None if manager is None else manager.__exit__(kind, error, traceback)

    def _misused(self, how: str) -> NoReturn:
        expected = "one `with` block at a time, left in its own greenlet and in the reverse order of entering."
        fix = "make one local_context for each `with` block."
        what = f"A local context was {how}"
        raise InterleavingError(four_part(what, where=current_scope().name, expected=expected, fix=fix))
