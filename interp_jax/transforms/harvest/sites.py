"""Harvest by site: read and change sites of a function, as a function, under any transform.

`reap_sites` reads, `intervene` changes, `harvest_sites` does both in one pass, and `site_gradients` adds the
derivative of a metric with respect to every site read. From a scan over layers only the layers asked for come out.

>>> import jax.numpy as jnp
>>> def model(x):
...     for i in range(3):
...         with layer_scope(i):
...             x = sow(x * 2.0, name="resid_post")
...     return x
>>> reap_sites(model, "1.resid_post")(jnp.ones(2))["1.resid_post"]
Array([4., 4.], dtype=float32)
>>> intervene(model, {"1.resid_post": lambda value: value * 0.0})(jnp.ones(2))
Array([0., 0.], dtype=float32)

Sharp edges: what is reaped is the value the function goes on with, after any intervention. Interventions at one site
act in the order they are given. `intervene` leaves the sites in place, so its result can itself be looped over,
reaped or intervened on. A layer may be traced, `[(Site(layer, "mlp_out"), 0 * value)]`: a sweep over layers compiles
once; a traced layer out of range hits nothing.

Source: interp_jax; zero perturbations for gradients as in Kramar et al. 2024 (AtP*), section 1.3 of our notes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.core.activations import Activations
from interp_jax.core.errors import InvalidInputError, ShapeError, four_part
from interp_jax.core.interventions import Intervention
from interp_jax.core.sites import Selector, Site, select_sites
from interp_jax.transforms.harvest.interpret import interpret
from interp_jax.transforms.harvest.keys import Place
from interp_jax.transforms.harvest.site_state import Edit, SitePolicy, Sites, resolve
from interp_jax.transforms.harvest.staging import staged
from interp_jax.transforms.harvest.state import zeros_of
from interp_jax.transforms.harvest.survey import Sown, survey
from interp_jax.transforms.sowing import layer_scope, sow
from interp_jax.transforms.tracing import Trace, sites_of, trace_program

__all__ = ["harvest_sites", "intervene", "layer_scope", "reap_sites", "site_gradients", "site_vjp", "sow"]

Pullback: TypeAlias = "Callable[[Any, Mapping[Site, Any]], Activations]"
# A mapping is invariant in its keys, so `Mapping[Selector, ...]` would refuse a dictionary with strings for keys.
Interventions: TypeAlias = "Mapping[Any, Intervention] | Iterable[tuple[Selector, Intervention]]"


def reap_sites(fn: Callable[..., Any], select: Selector) -> Callable[..., Activations]:
    """A function that returns the values of the selected sites.

    Args:
        fn: A function with sites.
        select: Which to read.

    Returns:
        A function of the same arguments.

    Raises:
        UnknownNameError: At the call: a part of the selector matches no site.
        InvalidInputError: At the call: one site in several places, or in a scan without `loop_layer`.
    """
    harvested = harvest_sites(fn, select)
    return _renamed(fn, lambda *args, **kwargs: harvested(*args, **kwargs)[1])


def intervene(fn: Callable[..., Any], interventions: Interventions) -> Callable[..., Any]:
    """The function with sites changed.

    Args:
        fn: A function with sites.
        interventions: Selector to what is done to the sites it picks: an array, a `Masked` or a function of the
            value. As pairs, the selector may be `Site(layer, name)` with a traced layer.

    Returns:
        A function of the same arguments and result.

    Raises:
        UnknownNameError: At the call: a part of a selector matches no site.
        ShapeError: At the call, before anything runs: a new value does not fit its site.
    """
    pairs = _pairs(interventions)

    def intervened(*args: Any, **kwargs: Any) -> Any:
        trace = trace_program(fn, args, kwargs)
        edits = resolve(pairs, sites_of(trace.closed), where=f"intervene({_name(fn)})")
        touched = frozenset(site for edit in edits for site in edit.sites)
        return _harvest(trace, Sites(SitePolicy(frozenset(), touched), edits, resows=True))[0]

    return _renamed(fn, intervened)


def harvest_sites(
    fn: Callable[..., Any], select: Selector, interventions: Interventions = ()
) -> Callable[..., tuple[Any, Activations]]:
    """A function that returns its result and the values of the selected sites, with sites changed if asked for.

    Args:
        fn: A function with sites.
        select: Which to read. Values are read after any intervention.
        interventions: As for `intervene`.

    Returns:
        A function of the same arguments that returns `(result, activations)`.

    Raises:
        UnknownNameError: At the call: a part of the selector matches no site.
        InvalidInputError: At the call: one site in several places, or in a scan without `loop_layer`.
        ShapeError: At the call, before anything runs: a new value does not fit its site.
    """
    pairs = _pairs(interventions)

    def harvested(*args: Any, **kwargs: Any) -> tuple[Any, Activations]:
        trace = trace_program(fn, args, kwargs)
        rows = sites_of(trace.closed)
        sites = select_sites(select, [row.site for row in rows], where=f"reap_sites({_name(fn)})")
        edits = resolve(pairs, rows, where=f"intervene({_name(fn)})") if pairs else ()
        return _harvest(trace, Sites(SitePolicy(frozenset(sites)), edits), sites)

    return _renamed(fn, harvested)


def _identity(result: Any) -> Any:
    return result


def site_gradients(
    fn: Callable[..., Any],
    select: Selector,
    metric: Callable[[Any], jax.Array] = _identity,
    *,
    interventions: Interventions = (),
) -> Callable[..., tuple[jax.Array, Activations, Activations]]:
    """A function that returns a metric, the selected sites, and the metric's derivative with respect to each.

    One forward and one backward for all sites. With a metric of one number per example the gradients are per example
    too: examples do not mix, so the gradient of the sum is each example's own.

    Args:
        fn: A function with sites.
        select: Which sites.
        metric: From the function's result to a number, or to one number per example.
        interventions: As for `intervene`; derivatives are taken at the changed values.

    Returns:
        A function of the same arguments that returns `(metric, activations, gradients)`.

    Raises:
        UnknownNameError: At the call: a part of the selector matches no site.
        InvalidInputError: At the call: a site that holds no real numbers, or is overwritten by later sows.
        ShapeError: At the call: the metric is not real numbers of rank 0 or 1.
    """
    pairs = _pairs(interventions)

    def differentiated(*args: Any, **kwargs: Any) -> tuple[jax.Array, Activations, Activations]:
        trace = trace_program(fn, args, kwargs)
        rows = sites_of(trace.closed)
        where = f"site_gradients({_name(fn)})"
        sites = select_sites(select, [row.site for row in rows], where=where)
        edits = resolve(pairs, rows, where=where) if pairs else ()
        state = Sites(SitePolicy(frozenset(sites)), edits)
        sown = survey(trace.closed.jaxpr, state.policy, Place())
        for site in sites:
            _check_differentiable(site, sown[site], where=where)

        def total(perturbations: Activations, args: Any, edits: Any) -> tuple[jax.Array, tuple[jax.Array, Activations]]:
            here = Sites(state.policy, edits, {site: perturbations[site] for site in sites})
            result, activations = _interpreted(trace, here, sites, args)
            value = metric(result)
            _check_metric(value)
            return jnp.sum(value), (value, activations)

        def with_gradients(args: Any, arrays: Any) -> tuple[jax.Array, Activations, Activations]:
            zeros = Activations({site: zeros_of(sown[site].form) for site in sites})
            edits = _with_arrays(state.edits, arrays)
            gradients, (value, activations) = jax.grad(total, has_aux=True)(zeros, args, edits)
            return value, activations, gradients

        key = ("gradients", _key(state, sites)) if metric is _identity else None
        return staged(trace.closed, key, with_gradients, trace.args, _arrays(edits))

    return _renamed(fn, differentiated)


def site_vjp(fn: Callable[..., Any], select: Selector) -> Callable[..., tuple[Any, Activations, Pullback]]:
    """A function that returns its result, the selected sites, and a pullback of cotangents of both to the sites.

    pullback(r, {s: c_s})[t] = d(<r, result> + sum_s <c_s, activation_s>) / d(activation_t)

    A cotangent at one site is what reaches the earlier ones through it. One forward serves any number of pullbacks,
    side by side under `jax.vmap` or in turn.

    Args:
        fn: A function with sites.
        select: Which sites.

    Returns:
        A function of the same arguments that returns `(result, activations, pullback)`. `pullback` takes the result's
        cotangent and a mapping of sites to cotangents (zero where there is none), and returns the `Activations` of
        derivatives. Call it in the same jitted function.

    Raises:
        UnknownNameError: At the call: a part of the selector matches no site.
        InvalidInputError: At the call: a site that holds no real numbers, or is overwritten by later sows.
    """

    def with_pullback(*args: Any, **kwargs: Any) -> tuple[Any, Activations, Pullback]:
        trace = trace_program(fn, args, kwargs)
        where = f"site_vjp({_name(fn)})"
        sites = select_sites(select, [row.site for row in sites_of(trace.closed)], where=where)
        state = Sites(SitePolicy(frozenset(sites)), ())
        sown = survey(trace.closed.jaxpr, state.policy, Place())
        for site in sites:
            _check_differentiable(site, sown[site], where=where)

        def perturbed(perturbations: Activations) -> tuple[Any, Activations]:
            here = Sites(state.policy, (), {site: perturbations[site] for site in sites})
            return _interpreted(trace, here, sites, trace.args)

        zeros_at = {site: zeros_of(sown[site].form) for site in sites}
        (result, activations), of_both = jax.vjp(perturbed, Activations(zeros_at))

        def pullback(of_result: Any, of_sites: Mapping[Site, Any]) -> Activations:
            cotangents = zeros_at | dict(of_sites)
            if len(cotangents) > len(zeros_at):
                select_sites(list(of_sites), sites, where=where)  # Names the ones that were not selected.
            return of_both((of_result, Activations(cotangents)))[0]

        return result, activations, pullback

    return _renamed(fn, with_pullback)


def _check_differentiable(site: Site, sown: Sown, *, where: str) -> None:
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(sown.form)]
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        raise InvalidInputError(
            four_part(
                f"Site {str(site)!r} holds {', '.join(map(str, dtypes))} (sown at {sown.source})",
                where=where,
                expected="sites that hold real numbers.",
                fix="select other sites, for example by name.",
            )
        )
    if sown.mode in ("clobber", "cond_clobber"):
        raise InvalidInputError(
            four_part(
                f"Site {str(site)!r} is sown with mode {sown.mode} (at {sown.source}), of which the last value is read",
                where=where,
                expected="sites sown once, or appended by a scan.",
                fix="sow it with mode='append', or in a scan over layers with layer_scope(loop_layer()).",
            )
        )


def _check_metric(value: Any) -> None:
    if jnp.ndim(value) > 1 or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ShapeError(
            four_part(
                f"A metric of {jnp.result_type(value)}{list(jnp.shape(value))} was given",
                where="site_gradients",
                expected="one real number, or one per example: shape [] or [batch].",
                fix="reduce the metric over all axes but the batch.",
            )
        )


def _harvest(trace: Trace, state: Sites, read: Sequence[Site] = ()) -> tuple[Any, Activations]:
    """The result of a program under a harvest, and the values of the sites to read."""
    survey(trace.closed.jaxpr, state.policy, Place())  # Finds mistakes before anything runs.

    def interpreted(args: Any, arrays: Any) -> tuple[Any, Activations]:
        here = Sites(state.policy, _with_arrays(state.edits, arrays), resows=state.resows)
        return _interpreted(trace, here, read, args)

    return staged(trace.closed, _key(state, read), interpreted, trace.args, _arrays(state.edits))


def _interpreted(trace: Trace, state: Sites, read: Sequence[Site], args: Sequence[Any]) -> tuple[Any, Activations]:
    outs, reaps = interpret(trace.closed, args, state, Place())
    return jax.tree.unflatten(trace.out_tree, outs), Activations({site: reaps[site].value for site in read})


def _pairs(interventions: Interventions) -> tuple[tuple[Selector, Intervention], ...]:
    pairs: Any = interventions.items() if isinstance(interventions, Mapping) else interventions
    return tuple(pairs)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray))


def _arrays(edits: Sequence[Edit]) -> list[Any]:
    """The arrays among the interventions, which are arguments of a staged harvest."""
    return [leaf for leaf in _leaves(edits) if _is_array(leaf)]


def _leaves(edits: Sequence[Edit]) -> list[Any]:
    return jax.tree.leaves([edit[1:] for edit in edits])


def _with_arrays(edits: Sequence[Edit], arrays: Sequence[Any]) -> tuple[Edit, ...]:
    """The edits with other arrays in the places of theirs."""
    leaves, tree = jax.tree.flatten([edit[1:] for edit in edits])
    rest = iter(arrays)
    new = jax.tree.unflatten(tree, [next(rest) if _is_array(leaf) else leaf for leaf in leaves])
    return tuple(Edit(edit.sites, *parts) for edit, parts in zip(edits, new, strict=True))


def _key(state: Sites, read: Sequence[Site]) -> Any:
    """What decides a harvest beside its program and arrays, or None if functions do."""
    leaves = _leaves(state.edits)
    if any(map(callable, leaves)):
        return None
    numbers = tuple((type(leaf), leaf) for leaf in leaves if not _is_array(leaf))
    tree = jax.tree.structure([edit[1:] for edit in state.edits])
    return (state.policy, tuple(read), state.resows, tuple(edit.sites for edit in state.edits), tree, numbers)


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__qualname__", None) or type(fn).__name__


def _renamed(fn: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(fn, updated=())(wrapper)
