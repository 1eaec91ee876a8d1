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
the pass visit each layer by `lax.switch`.

Source: Mishax for the idea of yielding out of model code with greenlets.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import jax
from jax import lax
from jax.core import Tracer

from interp_jax.core.errors import RunningPassError, SiteNotReachedError, UnsupportedModelError, four_part
from interp_jax.core.interventions import same_form
from interp_jax.core.sites import Selector, Site, matcher, selector_parts, unknown_site_message
from interp_jax.transforms.greenlets import generator, local_context, yield_
from interp_jax.transforms.running_pass.compiled import KEEP
from interp_jax.transforms.sowing import LISTENER, LoopLayer, SownHere

_listening = jax.make_user_context(default_value=None)
# Grows whenever a sow is seen under a trace, so that no later visit reuses that trace.
_generation = 0
# Yielded to have the local context, and with it the generation, opened anew.
_NEXT_GENERATION: Any = object()


def run_python(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], selector: Selector, *, where: str
) -> Generator[tuple[Site, Any], Any, Any]:
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
    steps = generator(_body, fn, args, kwargs, _Listener(selector, where))
    try:
        event = next(steps)
        while True:
            event = steps.send(KEEP if event is _NEXT_GENERATION else (yield event))
    except StopIteration as stop:
        return stop.value
    finally:
        steps.close()


def _body(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], listener: _Listener) -> Any:
    LISTENER.set(listener)  # Seen in this greenlet only: it has a context of its own.
    try:
        with local_context(lambda: _listening(_generation)):
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
        new = yield_((site, value))
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
