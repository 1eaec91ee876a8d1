"""A loop sends what is assigned, keeps the result, and says so when it is used out of turn.

Source: interp_jax.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest

from interp_jax.core.errors import InterleavingError, RunningPassError
from interp_jax.transforms.greenlets import Loop, generator, loop, yield_


def collecting(n: int) -> list[Any]:
    """Returns the replies to n sites."""
    return [yield_(i) for i in range(n)]


def native_collecting(n: int) -> Generator[int, Any, list[Any]]:
    """The same as a native generator."""
    replies = [None] * n
    for i in range(n):
        replies[i] = yield i
    return replies


def ours(n: int, **options: Any) -> Loop:
    return Loop(generator(collecting, n), **options)


def native(n: int, **options: Any) -> Loop:
    return Loop(native_collecting(n), **options)


both = pytest.mark.parametrize("make", [ours, native])


@both
def test_replies_and_result(make: Callable[..., Loop]) -> None:
    passing = make(4)
    assert iter(passing) is passing
    for i in passing:
        if i == 1:
            passing.modified_value = "one"
        if i == 2:
            passing.modified_value = "overwritten"
            passing.modified_value = None
    assert passing.retval == [None, "one", None, None]
    assert list(passing) == []
    assert passing.retval == [None, "one", None, None]


@both
def test_none_can_be_told_from_unset(make: Callable[..., Loop]) -> None:
    unset = object()
    passing = make(3, unset=unset)
    for i in passing:
        assert passing.modified_value is unset
        if i == 1:
            passing.modified_value = None
            assert passing.modified_value is None
    assert passing.retval == [unset, None, unset]


@both
def test_modified_value_belongs_to_a_site(make: Callable[..., Loop]) -> None:
    passing = make(1)
    with pytest.raises(RunningPassError) as error:
        passing.modified_value = 1
    assert str(error.value) == (
        "modified_value was set when the loop was at no site in a loop that is open.\n"
        "  Expected: it belongs to one site and exists from there to the next.\n"
        "  Fix: set it in the body of the for loop."
    )
    with pytest.raises(RunningPassError, match="modified_value was read when the loop was at no site"):
        _ = passing.modified_value
    next(passing)
    passing.modified_value = 1
    assert list(passing) == []
    with pytest.raises(RunningPassError, match="was set when the loop was at no site in a loop that is returned"):
        passing.modified_value = 2
    assert passing.retval == [1]


def test_it_cannot_be_set_from_within_the_body() -> None:
    def body() -> None:
        yield_()
        with pytest.raises(RunningPassError, match="modified_value was set when the loop was at no site"):
            passing.modified_value = 1
        with pytest.raises(ValueError, match="generator already executing"):
            next(passing)
        yield_()

    passing = loop(body)
    assert list(passing) == [None, None]
    assert passing.retval is None


@both
def test_retval_before_the_end(make: Callable[..., Loop]) -> None:
    with make(2) as passing:
        for wait in (lambda: None, lambda: next(passing)):
            wait()
            with pytest.raises(RunningPassError) as error:
                _ = passing.retval
            assert str(error.value) == (
                "retval was read before the body came to its end in a loop that is open.\n"
                "  Expected: a loop that ran through all its sites.\n"
                "  Fix: read it after the for loop, and do not leave that by break."
            )
    with pytest.raises(RunningPassError, match="in a loop that is closed"):
        _ = passing.retval
    assert list(passing) == []
    with pytest.raises(RunningPassError, match="in a loop that is closed"):
        _ = passing.retval


def test_retval_after_an_exception_raises_it_again() -> None:
    def body() -> None:
        yield_()
        raise KeyError("body")

    passing = loop(body)
    with pytest.raises(KeyError, match="body") as first:
        list(passing)
    assert list(passing) == []
    for _ in range(2):
        with pytest.raises(KeyError, match="body") as again:
            _ = passing.retval
        assert again.value is first.value


@both
def test_close_and_with(make: Callable[..., Loop]) -> None:
    with make(2) as passing:
        next(passing)
    assert list(passing) == []
    passing.close()
    finished = make(1)
    assert list(finished) == [0]
    finished.close()
    assert finished.retval == [None]
    with pytest.raises(KeyError), make(2) as passing:
        next(passing)
        raise KeyError
    assert list(passing) == []


def test_an_error_in_the_body_of_a_with_loop_is_not_swallowed_by_its_end() -> None:
    def body() -> None:
        try:
            yield_()
        finally:
            raise LookupError("in the end")

    with pytest.raises(LookupError, match="in the end") as error, loop(body) as passing:
        next(passing)
        raise KeyError("first")
    chain, step = [], error.value.__context__
    while step is not None:
        chain.append(repr(step))
        step = step.__context__
    assert "KeyError('first')" in chain


def test_a_refused_loop_stays_at_its_site_with_what_was_set() -> None:
    passing = loop(collecting, 2)
    next(passing)
    passing.modified_value = "set"
    other = generator(collecting, 1)
    next(other)
    for act in (lambda: next(passing), passing.close):
        with pytest.raises(InterleavingError):
            act()
        assert passing.modified_value == "set"
    other.close()
    assert list(passing) == [1]
    assert passing.retval == ["set", None]


def test_keyword_arguments_go_to_the_body() -> None:
    with loop(lambda *, fn, unset: yield_(fn, unset), fn=1, unset=2) as passing:
        assert list(passing) == [(1, 2)]
