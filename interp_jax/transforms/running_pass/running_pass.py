"""The loop over a forward pass: `for layer, name, value in (running_pass := run(fn, *args)): ...`.

One loop, two engines with the same results. `engine="compiled"` traces the function once, cuts it at the selected
sites and runs the pieces as compiled functions. `engine="python"` runs the function's own Python in a greenlet and
stops in its sows: slower, but for code JAX cannot trace and for values that change shape.

>>> import jax.numpy as jnp
>>> from interp_jax.transforms.sowing import layer_scope, sow
>>> def model(x):
...     for i in range(3):
...         with layer_scope(i):
...             x = sow(x + 1.0, name="resid_post")
...     return x
>>> for layer, name, value in (running_pass := run(model, jnp.zeros(2))):
...     if layer == 1:
...         running_pass.modified_value = value * 0
>>> running_pass.retval
Array([1., 1.], dtype=float32)

Sharp edges: a new value keeps shape and dtype (the python engine lets shapes change). Values of a pass under jit,
grad or vmap belong to that transform, as everywhere in JAX. Leaving the loop, by `break` or an exception, abandons
the pass: the python engine unwinds the function's stack at once; the compiled engine, which holds nothing open, can
still go on in a second loop (`zip` over two passes ends before the second has). A pass of the python engine that is
stepped by `next` has to be closed, or used in `with run(...) as running_pass:`.

Source: the loop of Mishax, with its own engine.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import Any

import jax

from interp_jax.core.activations import SiteTable
from interp_jax.core.errors import InterleavingError, RunningPassError, check_choice, four_part
from interp_jax.core.interventions import describe, same_form
from interp_jax.core.sites import Selector, Site, select_sites, selector_parts
from interp_jax.transforms.running_pass.compiled import KEEP, execute, rest_of
from interp_jax.transforms.running_pass.plan import build_plan, require_reachable
from interp_jax.transforms.running_pass.python_engine import PythonSteps, run_python
from interp_jax.transforms.tracing import Remembered, sites_of, trace_program

ENGINES = ("compiled", "python")
# Passes of the python engine that no `for` or `with` will end.
_STEPPED_BY_HAND: weakref.WeakSet[PythonSteps] = weakref.WeakSet()

_SITES = Remembered()
_SELECTED = Remembered()
_PLANS = Remembered()


def run(
    fn: Callable[..., Any], *args: Any, sites: Selector = None, engine: str = "compiled", **kwargs: Any
) -> RunningPass:
    """Run a function, stopping at its sites.

    Args:
        fn: A function with sows in it, such as the forward pass of a model under a patch set.
        *args: Its arguments.
        sites: Which sites to stop at; all by default.
        engine: "compiled" or "python".
        **kwargs: Its keyword arguments.

    Returns:
        The running pass, to be iterated once.

    Raises:
        UnknownNameError: The engine is unknown, or a selector matches no site.
    """
    name = getattr(fn, "__qualname__", None) or type(fn).__name__
    for steps in list(_STEPPED_BY_HAND):
        steps.warn_if_in_the_way()
    check_choice(engine, ENGINES, what="engine", where="run")
    if engine == "compiled":
        steps, rest = _compiled_steps(fn, args, kwargs, sites, name)
        return RunningPass(steps, name=name, rest=rest)
    return RunningPass(run_python(fn, args, kwargs, sites, where=name), name=name, keeps_form=False)


def list_sites(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> SiteTable:
    """The sites `fn(*args, **kwargs)` has, with the shape, dtype and bytes of each. Nothing is computed.

    Args:
        fn: A function with sows in it.
        *args: Its arguments.
        **kwargs: Its keyword arguments.

    Returns:
        The table, in execution order.
    """
    closed = trace_program(fn, args, kwargs).closed
    return SiteTable(_SITES.get(closed, None, lambda: sites_of(closed)))


def _compiled_steps(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], selector: Selector, name: str
) -> tuple[Generator[tuple[Site, Any], Any, Any], Callable[[Any, Site | None], Any]]:
    trace = trace_program(fn, args, kwargs)
    closed = trace.closed

    def select() -> frozenset[Site]:
        sites = [row.site for row in _SITES.get(closed, None, lambda: sites_of(closed))]
        selected = frozenset(select_sites(selector, sites, where=f"run({name})"))
        require_reachable(closed, selected)
        return selected

    # A selector that can be compared selects the same sites of the same program again.
    selected = _SELECTED.get(closed, (_frozen(selector), name), select)
    names = frozenset(site.name for site in selected)
    plan = _PLANS.get(closed, names, lambda: build_plan(closed, names))
    out_tree, frames, changed = trace.out_tree, [], set()

    def rest(value: Any, until: Site | None) -> Any:
        results = rest_of(frames, value, changed, until)
        return results if until is not None else jax.tree.unflatten(out_tree, results)

    steps = execute(plan, trace.args, selected, changed=changed, frames=frames)
    return _with_structure(steps, out_tree), rest


def _frozen(selector: Selector) -> tuple[Any, ...]:
    """A selector as something that can be compared; predicates count by identity."""
    return tuple((type(part), part) for part in selector_parts(selector))


def _with_structure(steps: Generator[Any, Any, list[Any]], out_tree: Any) -> Generator[Any, Any, Any]:
    return jax.tree.unflatten(out_tree, (yield from steps))


_UNSET: Any = object()


class RunningPass:
    """A forward pass under way; iterates `(layer, name, value)`.

    Args:
        steps: A generator of `(site, value)` that takes `KEEP` or a new value and returns the function's result.
        name: The function's name.
        keeps_form: Whether a new value must have the structure, shapes and dtypes of the old one.
        rest: From a value of the current site, and a site to stop at or None, to what the pass comes to.
    """

    def __init__(
        self,
        steps: Generator[tuple[Site, Any], Any, Any],
        *,
        name: str,
        keeps_form: bool = True,
        rest: Callable[[Any, Site | None], Any] | None = None,
    ):
        self._steps = steps
        self._stack = steps if isinstance(steps, PythonSteps) else None  # The call stack it holds open, if any.
        self._ends_by_itself = False  # However a `for` or `with` is left, it ends the pass.
        self._name = name
        self._keeps_form = keeps_form
        self._rest = rest
        self._stage = "not started"
        self._site: Site | None = None
        self._value: Any = None
        self._new: Any = _UNSET
        self._result: Any = None
        self._error: BaseException | None = None
        self._n_visited = 0

    def __iter__(self) -> Iterator[tuple[int | None, str, Any]]:
        """What a `for` loop holds on to; with the python engine, leaving the loop closes the pass.

        Raises:
            RunningPassError: The pass was abandoned, or failed.
        """
        if self._state in ("abandoned", "failed"):
            raise RunningPassError(
                four_part(
                    f"A loop over a pass that was {self._described()}",
                    where=f"the running pass of {self._name}",
                    expected="a pass that has not ended before its last site.",
                    fix="call run(...) again for a new pass.",
                )
            )
        if self._stack is None:
            return self
        self._will_be_ended()
        return _Visits(self)

    def __next__(self) -> tuple[int | None, str, Any]:
        if self._stack is not None and not self._ends_by_itself:
            _STEPPED_BY_HAND.add(self._stack)
        return self._go_on()

    def _will_be_ended(self) -> None:
        self._ends_by_itself = True
        if self._stack is not None:
            _STEPPED_BY_HAND.discard(self._stack)

    def _go_on(self) -> tuple[int | None, str, Any]:
        if self._state in ("finished", "failed", "abandoned"):
            raise StopIteration
        if self._stack is not None:
            self._stack.require_turn()
            self._stack.require_trace()
        new = None if self._stage == "not started" else KEEP if self._new is _UNSET else self._new
        self._leave_site()
        self._stage = "running"
        try:
            site, value = self._steps.send(new)
        except StopIteration as stop:
            self._stage, self._result = "finished", stop.value
            raise StopIteration from None
        except BaseException as error:
            self._stage, self._error = "failed", error
            raise
        self._stage, self._site, self._value = "at a site", site, value
        self._n_visited += 1
        return site.layer, site.name, value

    @property
    def _state(self) -> str:
        """Where the pass stands. One begun before it may have closed it, and left it at its site."""
        is_closed = self._stage == "at a site" and self._stack is not None and not self._stack.gi_suspended
        return "abandoned" if is_closed else self._stage

    def _leave_site(self) -> None:
        self._value, self._new = None, _UNSET

    @property
    def site(self) -> Site | None:
        """The site the pass is at, or None between sites and after the end."""
        return self._site if self._state == "at a site" else None

    @property
    def modified_value(self) -> Any:
        """The value the pass will go on with from the current site.

        Set it to change the value: an array (or pytree) of the same structure, shapes and dtypes. It counts for
        the current site only.

        Raises:
            RunningPassError: The pass is not at a site.
            ShapeError: The new value does not have the form of the old one.
        """
        self._require_site("modified_value was read")
        return self._value if self._new is _UNSET else self._new

    @modified_value.setter
    def modified_value(self, new: Any) -> None:
        self._require_site("modified_value was set")
        if self._keeps_form:
            hint = 'engine="python" lets a value change its shape.'
            new = same_form(self._value, new, where=f"{self._site} of {self._name}", hint=hint)
        self._new = new

    @property
    def sendval(self) -> Any:
        """Mishax's name for `modified_value`; None means that the value stays."""
        return None if self._new is _UNSET else self._new

    @sendval.setter
    def sendval(self, new: Any) -> None:
        if new is None:
            self._require_site("modified_value was set")
            self._new = _UNSET
        else:
            self.modified_value = new

    def _require_site(self, what: str) -> None:
        if self._state != "at a site":
            raise RunningPassError(
                four_part(
                    f"{what} while the pass is {self._state}",
                    where=f"the running pass of {self._name}",
                    expected="a pass that has stopped at a site.",
                    fix="read and set modified_value only in the body of the loop.",
                )
            )

    @property
    def retval(self) -> Any:
        """What the function returned.

        Raises:
            RunningPassError: The pass has not come to its end. If the pass failed, its own exception is raised.
        """
        if self._error is not None:
            raise self._error
        if self._state != "finished":
            raise RunningPassError(
                four_part(
                    f"retval was read while the pass is {self._state}",
                    where=f"the running pass of {self._name}",
                    expected="a pass whose loop has come to its end.",
                    fix="read retval after the loop; a loop left by break has no result.",
                )
            )
        return self._result

    def rest(self, value: Any, *, until: Site | None = None) -> Any:
        """What the pass comes to if the value of the current site were another; the pass itself stays where it is.

        What comes before the site is not computed again, so many values cost as many suffixes of the pass:
        `jax.vmap(running_pass.rest)(values)`.

        Args:
            value: In the form of the site's own value. It may be traced, by vmap, jit or jvp; layers of a scan that
                are still to come have no reverse derivative.
            until: A site outside the layers, or the layers unstacked, at which to stop.

        Returns:
            What the function returns, or the value at `until`.

        Raises:
            RunningPassError: The pass is not at a site, its engine is not the compiled one, or it does not come to
                `until`.
            ShapeError: The value does not have the form of the site's own.
        """
        self._require_site("the rest was asked for")
        if self._rest is None:
            raise RunningPassError(
                four_part(
                    "rest was called on a pass of the python engine",
                    where=f"the running pass of {self._name}",
                    expected="a pass that holds no call stack open, of which there can be a second.",
                    fix='use engine="compiled".',
                )
            )
        value = same_form(self._value, value, where=f"{self._site} of {self._name}", hint="")
        result = self._rest(value, until)
        if until is not None and result is None:
            raise RunningPassError(
                four_part(
                    f"The rest of the pass was asked for until {until}, where it does not come by",
                    where=f"the running pass of {self._name}, at {self._site}",
                    expected="a site after this one, and not inside a scan over layers.",
                    fix="leave `until` out, or name a site such as Site(None, 'ln_final').",
                )
            )
        return result

    def close(self) -> None:
        """Abandon the pass: what it holds is freed, and with the python engine its stack is unwound.

        Raises:
            InterleavingError: The python engine was given another thread, or a pass begun later is suspended.
        """
        if self._stack is not None:
            self._stack.require_turn()
        self._leave_site()
        if self._state in ("not started", "at a site", "running"):
            self._stage = "abandoned"
        self._steps.close()

    def __enter__(self) -> RunningPass:
        self._will_be_ended()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._abandon()

    def _abandon(self) -> None:
        """Close the pass, and first those that were begun in the body of its loop."""
        if self._stack is not None:
            self._stack.close_later()
        self.close()

    def _described(self) -> str:
        """Its state, with the site at which it ended too early."""
        state = self._state
        if self._site is None or state not in ("abandoned", "failed"):
            return state
        return f"{state} {'at' if state == 'abandoned' else 'after'} {self._site}"

    def __repr__(self) -> str:
        at = ""
        if self._state == "at a site":
            leaves = jax.tree.leaves(self._value)
            at = f" {self._site} = {describe(leaves[0]) if len(leaves) == 1 else f'{len(leaves)} arrays'}"
        return f"<running pass of {self._name}: {self._described()}{at}, {self._n_visited} sites visited>"


class _Visits:
    """What a `for` loop over a pass of the python engine holds: it is dropped where the loop is left.

    Args:
        running_pass: The pass.
    """

    def __init__(self, running_pass: RunningPass):
        self._pass = running_pass

    def __iter__(self) -> Iterator[tuple[int | None, str, Any]]:
        return self

    def __next__(self) -> tuple[int | None, str, Any]:
        return self._pass._go_on()

    def __del__(self) -> None:
        if self._pass.site is not None:
            # In another thread, or out of turn, the pass waits until it is collected itself.
            with contextlib.suppress(InterleavingError):
                self._pass._abandon()
