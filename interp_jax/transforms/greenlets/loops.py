"""`loop`: a plain `for` over what a function yields, with attributes in place of `send` and StopIteration.

The replies to a generator go through `send`, which a `for` loop does not call, and its result is hidden in the
StopIteration that ends the loop. A Loop keeps both where the loop can reach them.

>>> from interp_jax.transforms.greenlets import yield_
>>> with loop(lambda: yield_("a") + yield_("b")) as adding:
...     for name in adding:
...         adding.modified_value = {"a": 1, "b": 2}[name]
>>> adding.retval
3

Sharp edges: `break` leaves the body suspended until the loop is closed or collected; `with` closes it at once. After an
exception the loop keeps it, and with it the frames of its traceback, for `retval` to raise.

Source: mishax (github.com/google-deepmind/mishax), EasyGenerator; unlike there, a result read too early is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any, Self

from interp_jax.core.errors import RunningPassError, four_part
from interp_jax.transforms.greenlets.generators import Box, GreenletGenerator, generator


class Loop(Iterator[Any]):
    """A generator in the shape of a plain `for` loop. Made by `loop`; the argument may be any generator.

    Args:
        generator: The generator to iterate over.
        unset: What is sent where `modified_value` was not set. With a private object here, None can be told from it.
    """

    def __init__(self, generator: Generator[Any, Any, Any], *, unset: Any = None) -> None:
        self._generator = generator
        self._unset = unset
        self._box: Box | None = None  # what will be sent: a box at a site, None elsewhere
        self._state = "open"
        self._end: Any = None  # what the body returned or raised

    def __next__(self) -> Any:
        """Runs to the next site and returns what is yielded there."""
        generator, box = self._generator, self._box
        self._box = None
        try:
            if box is None:
                item = next(generator)
            elif isinstance(generator, GreenletGenerator):
                item = generator.send_box(box)
            else:
                item = generator.send(box.pop())
        except BaseException as error:
            if getattr(generator, "gi_suspended", False):  # refused, and so still at its site
                self._box = box or [self._unset]
            elif self._state == "open" and not getattr(generator, "gi_running", False):
                returned = isinstance(error, StopIteration)
                self._state, self._end = ("returned", error.value) if returned else ("raised", error)
            raise
        self._box = [self._unset]
        return item

    @property
    def modified_value(self) -> Any:
        """What the body gets back from the site it waits at."""
        return self._box_here("read")[0]

    @modified_value.setter
    def modified_value(self, value: Any) -> None:
        self._box_here("set")[0] = value

    def _box_here(self, verb: str) -> Box:
        if self._box is None:
            what, where = f"modified_value was {verb} when the loop was at no site", f"a loop that is {self._state}"
            expected = "it belongs to one site and exists from there to the next."
            raise RunningPassError(
                four_part(what, where=where, expected=expected, fix=f"{verb} it in the body of the for loop.")
            )
        return self._box

    @property
    def retval(self) -> Any:
        """What the body returned. Raises what it raised, and RunningPassError if it did not come to its end."""
        if self._state == "returned":
            return self._end
        if self._state == "raised":
            raise self._end
        message, expected = "retval was read before the body came to its end", "a loop that ran through all its sites."
        fix = "read it after the for loop, and do not leave that by break."
        raise RunningPassError(four_part(message, where=f"a loop that is {self._state}", expected=expected, fix=fix))

    def close(self) -> None:
        """Ends the body at the site it waits at: its `finally` and `with` blocks run now."""
        self._generator.close()
        self._box = None
        if self._state == "open":
            self._state = "closed"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if isinstance(self._generator, GreenletGenerator):
                self._generator.close_later()
        finally:
            self.close()


def loop(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Loop:
    """A loop over what `fn(*args, **kwargs)` yields, in which replies and the result need no `send`.

    Set `.modified_value` in the body of the loop to reply to the site at hand (otherwise `yield_` returns None), read
    `.retval` after it. `break` leaves the body suspended until the loop is dropped or closed, so `with loop(...)` is
    the safe form.

    Args:
        fn: The body.
        args: Positional arguments of `fn`.
        kwargs: Keyword arguments of `fn`.

    Returns:
        The loop: an iterator and a context manager that closes.

    Raises:
        InvalidInputError: `fn` cannot be called, or is a generator function.
    """
    return Loop(generator(fn, *args, **kwargs))
