"""Which patchers are in force, process-wide, and the switch from one such state to the next.

`with` blocks stack; installs do not. A state is the set of patchers in force with the slots they change together;
the switch from one state to the next is computed once and kept with the patcher that is entered, so that entering
costs one look-up and a few writes. While `with` blocks are open, a value that stands for their patches is part of the
key of every JAX cache: what was traced under a patch is found again under it, and only there.

>>> ACTIVE.state is EMPTY
True

Sharp edges: code objects belong to the whole process. A thread that enters a patcher waits until no other thread has
one entered; a thread that enters none sees whatever is in force.

Source: interp_jax; `jax.make_user_context` for the caches' key.
"""

from __future__ import annotations

import hashlib
import threading
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax

from interp_jax.core.errors import PatchError, four_part
from interp_jax.transforms.patcher.compose import compose
from interp_jax.transforms.patcher.plan import Plan
from interp_jax.transforms.patcher.slots import Change, FunctionSlot, Slot, foreign_message, restore, strangers, write

_JAX_CONTEXT = jax.make_user_context(default_value=None)
_LONGEST_WAIT_S = 60.0
_MOST_SWITCHES = 32


class Patches(Protocol):
    """What can be put in force: a patcher, as far as it is known here."""

    plan: Plan | None
    switches: dict[State, Switch]

    @property
    def key(self) -> PatchKey:
        """What stands for the patches in the keys of JAX's caches."""
        ...

    def is_current(self) -> bool:
        """Whether the plan is for the objects that the module holds now."""
        ...

    def make_plan(self, state: State) -> None:
        """Matches the patches against upstream."""
        ...


class State:
    """A set of patchers in force.

    Args:
        installed: Those that are installed.
        entered: Those whose `with` block is open, without repetition.
        changes: What they change together, starting from nothing patched.
        notes: What could not be done by exchanging code.
    """

    def __init__(
        self,
        installed: tuple[Patches, ...] = (),
        entered: tuple[Patches, ...] = (),
        changes: Sequence[Change] = (),
        notes: Sequence[str] = (),
    ) -> None:
        self.installed = installed
        self.entered = entered
        self.changes = {change.slot.key: change for change in changes}
        self.notes = notes
        # Equal for equal patches, so that re-entering finds what was traced.
        keys = sorted((patcher.key for patcher in entered if patcher not in installed), key=lambda key: key.digest)
        self.jax_key = tuple(keys) or None

    def original(self, slot: Slot) -> Any:
        """The value of a slot when nothing is patched."""
        change = self.changes.get(slot.key)
        return slot.read() if change is None else change.before

    def code_of(self, function: types.FunctionType) -> types.CodeType:
        """The code of a function when nothing is patched."""
        return self.original(FunctionSlot(function, "__code__"))

    def functions(self) -> list[types.FunctionType]:
        """The functions that are patched."""
        slots = [change.slot for change in self.changes.values() if isinstance(change.slot, FunctionSlot)]
        return [function for slot in slots if (function := slot.function()) is not None]


class PatchKey:
    """What a patcher contributes to the key of JAX's caches: its text, and the objects its code is given."""

    __slots__ = ("_hash", "digest", "values")

    def __init__(self, parts: Sequence[str], values: Sequence[Any]) -> None:
        self.digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        self.values = tuple(values)
        self._hash = hash((self.digest, tuple(map(id, self.values))))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, PatchKey)
            and self.digest == other.digest
            and len(self.values) == len(other.values)
            and all(a is b for a, b in zip(self.values, other.values, strict=True))
        )


class Switch(NamedTuple):
    """The way from one state to another."""

    before: State
    after: State
    forth: Sequence[Change]
    back: Sequence[Change]


@dataclass(eq=False)
class _Entry:
    patcher: Patches
    switch: Switch | None
    context: Any
    is_left: bool = False


class _Blocks(threading.local):
    """Open `with` blocks of a thread, innermost last."""

    def __init__(self) -> None:
        self.entries: list[_Entry] = []


class Active:
    """The patchers in force, and how to change them."""

    def __init__(self) -> None:
        self.state = EMPTY
        self._lock = threading.RLock()
        self._blocks = _Blocks()

    def enter(self, patcher: Patches) -> None:
        """Opens a `with` block."""
        self._acquire(patcher)
        before, switch, entry = self.state, None, None
        try:
            if patcher not in before.entered:
                switch = patcher.switches.get(before)
                if switch is None or not patcher.is_current() or strangers(switch.forth):
                    switch = self._prepare(patcher)
                write(switch.forth)
                self.state = switch.after
            context = _JAX_CONTEXT(self.state.jax_key)
            context.__enter__()
            entry = _Entry(patcher, switch, context)
            self._blocks.entries.append(entry)
        except BaseException:
            if entry is not None:
                entry.context.__exit__(None, None, None)
                self._blocks.entries = [item for item in self._blocks.entries if item is not entry]
            if self.state is not before and switch is not None:
                write(switch.back)
                self.state = before
            self._lock.release()
            raise

    def exit(self, patcher: Patches) -> None:
        """Closes the innermost `with` block, which must be this patcher's."""
        entries = self._blocks.entries
        if not entries or entries[-1].patcher is not patcher:
            message = _wrong_order(patcher, [entry.patcher for entry in entries])
            mine = [entry for entry in entries if entry.patcher is patcher and not entry.is_left]
            if mine:
                # It goes together with what was opened inside it, so that one mistake does not spoil the session.
                mine[-1].is_left = True
            raise PatchError(message)
        entries[-1].is_left = True
        while entries and entries[-1].is_left:
            self._close(entries.pop())

    def _close(self, entry: _Entry) -> None:
        try:
            entry.context.__exit__(None, None, None)
            switch = entry.switch
            if switch is None:
                return
            if self.state is switch.after:
                self.state = switch.before
                restore(switch.back)
            else:  # something was installed meanwhile
                entered = tuple(item for item in self.state.entered if item is not entry.patcher)
                self._go(self._make_state(self.state.installed, entered), is_removal=True)
        finally:
            self._lock.release()

    def install(self, patcher: Patches) -> None:
        """Puts a patcher in force for good."""
        with self._locked(patcher):
            if patcher not in self.state.installed:
                self._go(self._make_state((*self.state.installed, patcher), self.state.entered), is_removal=False)
                jax.clear_caches()

    def uninstall(self, patcher: Patches) -> None:
        """Takes an installed patcher out of force."""
        with self._locked(patcher):
            if patcher not in self.state.installed:
                return
            if patcher in self.state.entered:
                raise PatchError(
                    four_part(
                        f"uninstall() of {patcher} inside its own `with` block",
                        expected="uninstall() outside the block: what was traced in it counts on the patch.",
                        fix="leave the `with` block first.",
                    )
                )
            installed = tuple(item for item in self.state.installed if item is not patcher)
            try:
                self._go(self._make_state(installed, self.state.entered), is_removal=True)
            finally:
                jax.clear_caches()

    def notes(self, patcher: Patches) -> Sequence[str]:
        """What entering a patcher cannot do by exchanging code alone; entered it is not."""
        with self._locked(patcher):
            if patcher in self.state.entered or patcher in self.state.installed:
                return self.state.notes
            switch = patcher.switches.get(self.state)
            if switch is None or not patcher.is_current():
                switch = self._prepare(patcher)
            return switch.after.notes

    def _prepare(self, patcher: Patches) -> Switch:
        """The switch that entering a patcher makes, kept for the next time."""
        if patcher not in self.state.installed:
            patcher.make_plan(self.state)
        after = self._make_state(self.state.installed, (*self.state.entered, patcher))
        while len(patcher.switches) >= _MOST_SWITCHES:
            del patcher.switches[next(iter(patcher.switches))]
        switch = patcher.switches[self.state] = _switch(self.state, after)
        return switch

    def _make_state(self, installed: tuple[Patches, ...], entered: tuple[Patches, ...]) -> State:
        now = self.state
        patchers = set(installed) | set(entered)
        if not patchers:
            return EMPTY
        if patchers == {*now.installed, *now.entered}:
            return State(installed, entered, list(now.changes.values()), now.notes)
        plans = []
        for patcher in dict.fromkeys((*installed, *entered)):
            if patcher.plan is None or not patcher.is_current():
                patcher.make_plan(now)
            plans.append(patcher.plan)
        changes, notes = compose(plans, now.original)
        return State(installed, entered, changes, notes)

    def _go(self, after: State, *, is_removal: bool) -> None:
        switch = _switch(self.state, after)
        if is_removal:
            self.state = after
            restore(switch.forth)
            return
        foreign = strangers(switch.forth)
        if foreign:
            raise PatchError(foreign_message(foreign))
        write(switch.forth)
        self.state = after

    def _acquire(self, patcher: Patches) -> None:
        if not self._lock.acquire(blocking=False) and not self._lock.acquire(timeout=_LONGEST_WAIT_S):
            raise PatchError(
                four_part(
                    f"{patcher} waited {_LONGEST_WAIT_S:.0f} s for another thread to leave its patchers",
                    where=f"thread {threading.current_thread().name}",
                    expected="`with` blocks of patchers that end: patched code belongs to the whole process.",
                    fix="leave the block in the other thread, or install() the patchers both need.",
                )
            )

    def _locked(self, patcher: Patches) -> Any:
        self._acquire(patcher)
        return _Release(self._lock)


class _Release:
    def __init__(self, lock: Any) -> None:
        self._lock = lock

    def __enter__(self) -> None: ...

    def __exit__(self, *exc: object) -> None:
        self._lock.release()


def _switch(before: State, after: State) -> Switch:
    forth = []
    for key in dict.fromkeys((*before.changes, *after.changes)):
        old, new = before.changes.get(key), after.changes.get(key)
        change = new or old
        assert change is not None
        a = old.after if old is not None else change.before
        b = new.after if new is not None else change.before
        if a is not b:
            forth.append(Change(change.slot, a, b))
    return Switch(before, after, forth, [change.reversed() for change in reversed(forth)])


def _wrong_order(patcher: Patches, entered: Sequence[Patches]) -> str:
    inner = ", ".join(str(item) for item in entered[::-1]) or "none in this thread"
    return four_part(
        f"{patcher} is left while it is not the innermost patcher",
        where=f"the open patchers, innermost first: {inner}",
        expected="patchers left in the reverse of the order in which they were entered, in the same thread.",
        fix="nest `with` blocks, and finish or close a generator that is paused inside one before an outer one ends. "
        "Until the inner ones are left it stays in force.",
    )


EMPTY = State()
ACTIVE = Active()
