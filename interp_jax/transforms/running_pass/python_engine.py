"""The python engine: run the function's own Python in a greenlet, stopping in its sows.

It needs no trace, so it serves code JAX cannot trace and values that change their shape. A jit-compiled function
inside is traced afresh whenever its sows must be seen: JAX keys its traces on a user context, and the pass gives
that context a new value after each visit under a trace. Functions without sows keep their compiled form.

>>> from interp_jax.transforms.sowing import sow
>>> steps = run_python(lambda x: sow(x * 2, name="a") + 1, (3,), {}, None, where="f")
>>> site, value = next(steps)
>>> str(site), value
('a', 6)

Sharp edges: in the body of a scan, checkpoint, cond or vmap the loop sees that body's tracers, once, however often
the body runs; such a value must not leave the body. In a scan over layers, `loop_layer(index=i, length=n)` makes
the pass visit each layer by `lax.switch`. While a pass waits in such a body, JAX is inside that body's trace: all that
is computed then belongs there. Leaving a `for` loop ends that; a pass stepped by `next` has to be closed.

Source: Mishax for the idea of yielding out of model code with greenlets.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Generator
from typing import Any

import jax
from jax import lax
from jax.core import Tracer, eval_context

from interp_jax.core.errors import RunningPassError, SiteNotReachedError, UnsupportedModelError, four_part
from interp_jax.core.interventions import same_form
from interp_jax.core.sites import Selector, Site, matcher, selector_parts, unknown_site_message
from interp_jax.transforms.greenlets import GreenletGenerator, generator, local_context, yield_
from interp_jax.transforms.running_pass.compiled import KEEP
from interp_jax.transforms.sowing import LISTENER, LoopLayer, SownHere

try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:  # JAX before 0.10
    from jax.core import get_opaque_trace_state

_listening = jax.make_user_context(default_value=None)
# Grows whenever a sow is seen under a trace, so that no later visit reuses that trace.
_generation = 0
# Yielded to have the local context, and with it the generation, opened anew.
_NEXT_GENERATION: Any = object()


def run_python(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], selector: Selector, *, where: str
) -> PythonSteps:
    """Run `fn(*args, **kwargs)` in a greenlet.

    Args:
        fn: The function.
        args: Its arguments.
        kwargs: Its keyword arguments.
        selector: The sites to stop at. What it leaves unmatched is known only at the end.
        where: The function's name, for errors.

    Returns:
        A generator of `(site, value)` that takes `KEEP` or a new value and returns the function's result.
    """
    return PythonSteps(generator(_body, fn, args, kwargs, _Listener(selector, where)), where)


class PythonSteps(Generator[tuple[Site, Any], Any, Any]):
    """The steps of a pass in a greenlet.

    Args:
        steps: What `_body` yields: sites with their values, and `_NEXT_GENERATION`.
        where: The function's name, for messages.
    """

    def __init__(self, steps: GreenletGenerator, where: str):
        self._steps = steps
        self._where = where
        self._outside: Any = None  # JAX's trace where the pass was started
        self._inside: Any = None  # and where it waits now

    def send(self, value: Any, /) -> tuple[Site, Any]:
        """Goes on with a value, `KEEP` or, at the start, None, to the next site."""
        if self._outside is None:
            self._outside = get_opaque_trace_state()
        box = [value]
        del value  # Nothing here may keep a tracer beyond its trace.
        event = self._steps.send(box.pop())
        while event is _NEXT_GENERATION:
            event = self._steps.send(KEEP)
        self._inside = get_opaque_trace_state()
        return event

    def throw(self, *error: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Raises an error at the site where the pass waits."""
        return self._steps.throw(*error)

    def require_turn(self) -> None:
        """Refuse to go on or to end in another thread or greenlet, or while a pass begun later is suspended."""
        self._steps.require_turn()

    def require_trace(self) -> None:
        """Refuse to go on when JAX is in another trace than the one in which the pass stopped."""
        if self.gi_suspended and self._inside != get_opaque_trace_state():
            raise RunningPassError(
                four_part(
                    "A pass that stopped inside one JAX transformation (jit, grad, vmap, ...) was resumed outside it",
                    where=f"run({self._where}, engine='python')",
                    expected="a loop that runs to its end in the function that began it.",
                    fix="keep the whole loop in one function and read retval there; close() ends this pass.",
                )
            )

    def close(self) -> None:
        """Unwinds the function's stack from the site where the pass waits."""
        self._steps.close()

    def close_later(self) -> None:
        """Closes the passes that were begun after it by the same code, the last first."""
        self._steps.close_later()

    @property
    def gi_suspended(self) -> bool:
        """Whether the pass waits at a site."""
        return self._steps.gi_suspended

    def warn_if_in_the_way(self) -> None:
        """Say so if the pass waits in a trace that what is computed now would become part of."""
        if self.gi_suspended and self._inside == get_opaque_trace_state() != self._outside:
            warnings.warn(
                four_part(
                    f"A running pass of {self._where}, stepped by next(), waits inside a function that JAX is tracing, "
                    "and what is computed now becomes part of that trace",
                    where=f"run({self._where}, engine='python')",
                    expected="a pass that is closed, or stepped to its end, before other work goes on.",
                    fix="call its close(), or step it in a `for` loop, which ends it however the loop is left.",
                ),
                RuntimeWarning,
                stacklevel=3,
            )


def _body(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], listener: _Listener) -> Any:
    LISTENER.set(listener)  # Seen in this greenlet only: it has a context of its own.
    try:
        with listener.closers_trace, local_context(lambda: _listening(_generation)):
            result = fn(*args, **kwargs)
    except jax.errors.UnexpectedTracerError as error:
        raise RunningPassError(
            four_part(
                f"A value from inside a transformed body (jit, scan, checkpoint, cond, vmap or grad) was used outside "
                f"it; the last site was {listener.last or 'none'}",
                where=f"run({listener.where}, engine='python')",
                expected="values of a body to be used in that body only.",
                fix="use engine='compiled', whose values belong to the caller, or reap_sites.",
            )
        ) from error
    listener.require_all_matched()
    return result


class _Listener:
    """Gets every sow of a pass, and stops at those selected."""

    def __init__(self, selector: Selector, where: str):
        self._parts = selector_parts(selector)
        self.where = where
        self.last: Site | None = None
        # Left when the function's stack is unwound, see `_visit`.
        self.closers_trace = contextlib.ExitStack()
        self._reached: dict[Site, None] = {}

    def __call__(self, sown: SownHere, value: Any) -> Any:
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((value, sown.index))):
            global _generation
            _generation += 1
            yield_(_NEXT_GENERATION)
        if not isinstance(sown.layer, LoopLayer):
            return self._visit(Site(sown.layer, sown.name), value)
        if sown.index is None or sown.length is None:
            raise UnsupportedModelError(
                four_part(
                    f"Site {sown.name!r} lies in layer_scope(loop_layer()), whose loop index is not known",
                    where=f"run({self.where}, engine='python')",
                    expected="loop_layer(index=i, length=n) in the body of the scan.",
                    fix="use engine='compiled', or give loop_layer the loop's index and length.",
                )
            )
        sites = [Site(sown.layer.offset + sown.layer.stride * i, sown.name) for i in range(sown.length)]
        if not any(map(self._is_selected, sites)):
            self._reached.update(dict.fromkeys(sites))
            return value
        if not isinstance(sown.index, Tracer):
            return self._visit(sites[int(sown.index)], value)
        return lax.switch(sown.index, [self._branch(site) for site in sites], value)

    def _branch(self, site: Site) -> Callable[[Any], Any]:
        def visit(value: Any) -> Any:
            return same_form(value, self._visit(site, value), where=str(site))

        return visit

    def _visit(self, site: Site, value: Any) -> Any:
        self._reached[site] = None
        if not self._is_selected(site):
            return value
        self.last = site
        inside = get_opaque_trace_state()
        try:
            new = yield_((site, value))
        except BaseException:
            # Unwinding takes JAX back to the trace in which the pass was begun. Where whoever closes the pass is in
            # another one, because that has ended, he gets his own back once all is unwound.
            if inside != get_opaque_trace_state():
                self.closers_trace.enter_context(eval_context())
            raise
        return value if new is KEEP else new

    def _is_selected(self, site: Site) -> bool:
        is_gated = any(reached.name == "mlp_gate" for reached in self._reached)
        return any(matcher(part, is_gated=is_gated)(site) for part in self._parts)

    def require_all_matched(self) -> None:
        """Refuse a selection of which a part was never reached."""
        reached = list(self._reached)
        is_gated = any(site.name == "mlp_gate" for site in reached)
        missed = [
            part for part in self._parts if part is not None and not any(map(matcher(part, is_gated=is_gated), reached))
        ]
        if missed:
            where = f"run({self.where}, engine='python')"
            raise SiteNotReachedError(unknown_site_message(missed, reached, where=where))
