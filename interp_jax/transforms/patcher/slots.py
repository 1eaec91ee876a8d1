"""Places in live objects that hold code: what is in them, and changing many of them at once or not at all.

A patch takes effect by writing slots: the `__code__` (and defaults, annotations) of functions, attributes of classes,
names in a module's globals. Nothing is created or rebound, so every alias sees the change, and writing the old values
back leaves nothing behind.

>>> def f():
...     return 1
>>> def g():
...     return 2
>>> slot = FunctionSlot(f, "__code__")
>>> change = Change(slot, f.__code__, g.__code__)
>>> write([change]); f()
2
>>> write([change.reversed()]); f()
1

Sharp edges: functions are referred to weakly, so that a patcher keeps no closure alive.

Source: interp_jax.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Hashable, MutableMapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from interp_jax.core.errors import PatchError, four_part

MISSING: Any = type("Missing", (), {"__repr__": lambda self: "<missing>"})()
_GONE: Any = type("Gone", (), {})()


class FunctionSlot:
    """An attribute of a function: `__code__`, `__defaults__`, `__kwdefaults__`, `__annotations__`, `__doc__`."""

    __slots__ = ("_function", "key", "name")

    def __init__(self, function: types.FunctionType, name: str) -> None:
        self._function = weakref.ref(function)
        self.name = name
        # Not the id, which another function may get once this one is gone. Hashed now, as later it may be.
        hash(self._function)
        self.key: Hashable = ("function", self._function, name)

    def function(self) -> types.FunctionType | None:
        """The function, if it still exists."""
        return self._function()

    def read(self) -> Any:
        """The present value."""
        function = self._function()
        return _GONE if function is None else getattr(function, self.name)

    def write(self, value: Any) -> None:
        """Sets the value."""
        function = self._function()
        if function is not None:
            setattr(function, self.name, value)

    def __str__(self) -> str:
        function = self._function()
        return "a function that is gone" if function is None else f"{function.__module__}.{function.__qualname__}"


class ClassSlot:
    """An attribute of a class itself, as its `__dict__` holds it; MISSING where there is none."""

    __slots__ = ("cls", "key", "name")

    def __init__(self, cls: type, name: str) -> None:
        self.cls = cls
        self.name = name
        self.key: Hashable = ("class", id(cls), name)

    def read(self) -> Any:
        """The present value."""
        return vars(self.cls).get(self.name, MISSING)

    def write(self, value: Any) -> None:
        """Sets the value, past what the metaclass has to say about it."""
        if value is not MISSING:
            type.__setattr__(self.cls, self.name, value)
        elif self.name in vars(self.cls):
            type.__delattr__(self.cls, self.name)

    def __str__(self) -> str:
        return f"{self.cls.__module__}.{self.cls.__qualname__}.{self.name}"


class GlobalSlot:
    """A name in a module's globals; MISSING where there is none."""

    __slots__ = ("key", "name", "namespace")

    def __init__(self, namespace: MutableMapping[str, Any], name: str) -> None:
        self.namespace = namespace
        self.name = name
        self.key: Hashable = ("global", id(namespace), name)

    def read(self) -> Any:
        """The present value."""
        return self.namespace.get(self.name, MISSING)

    def write(self, value: Any) -> None:
        """Sets or removes the name."""
        if value is MISSING:
            self.namespace.pop(self.name, None)
        else:
            self.namespace[self.name] = value

    def __str__(self) -> str:
        return f"the name {self.name!r} in {self.namespace.get('__name__')}"


class CacheSlot:
    """A `functools.cache` in front of a patched function: writing empties it, for what it holds was computed before."""

    __slots__ = ("_cache", "key")

    def __init__(self, cache: Any) -> None:
        self._cache = weakref.ref(cache)
        hash(self._cache)
        self.key: Hashable = ("cache", self._cache)

    def read(self) -> Any:
        """Nothing to compare."""
        return _GONE

    def write(self, value: Any) -> None:
        """Empties the cache."""
        cache = self._cache()
        if cache is not None:
            cache.cache_clear()

    def __str__(self) -> str:
        return "a functools.cache"


Slot: TypeAlias = FunctionSlot | ClassSlot | GlobalSlot | CacheSlot


class Change(NamedTuple):
    """What a slot holds before and after."""

    slot: Slot
    before: Any
    after: Any

    def reversed(self) -> Change:
        """The change back."""
        return Change(self.slot, self.after, self.before)


def strangers(changes: Sequence[Change]) -> list[Change]:
    """The changes whose slots do not hold what they should hold before: somebody else changed them."""
    out = []
    for change in changes:
        value = change.slot.read()
        if value is not change.before and value is not _GONE:
            out.append(change)
    return out


def write(changes: Sequence[Change]) -> None:
    """Makes all changes, or on any exception none.

    Args:
        changes: The changes; their slots hold the values before.
    """
    done = 0
    try:
        for slot, _, after in changes:
            done += 1
            slot.write(after)
    except BaseException:
        for slot, before, _ in reversed(changes[:done]):
            slot.write(before)
        raise


def restore(changes: Sequence[Change]) -> None:
    """Makes all changes, come what may, but leaves slots alone that somebody else wrote in the meantime.

    Args:
        changes: The changes.

    Raises:
        PatchError: Somebody else wrote to some of the slots.
    """
    foreign = strangers(changes)
    ours = [change for change in changes if change not in foreign] if foreign else changes
    try:
        for slot, _, after in ours:
            slot.write(after)
    except BaseException:  # KeyboardInterrupt, most likely: writing twice does no harm
        for slot, _, after in ours:
            slot.write(after)
        raise
    if foreign:
        raise PatchError(foreign_message(foreign))


def foreign_message(foreign: Sequence[Change]) -> str:
    """The message for slots that somebody else wrote to."""
    return four_part(
        f"Changed by somebody else while patched: {', '.join(str(change.slot) for change in foreign)}",
        where="Patcher",
        expected="code that only patchers change while a patch is in force.",
        fix="leave the patch before you reload or monkey-patch; what was changed is left as it is now.",
    )
