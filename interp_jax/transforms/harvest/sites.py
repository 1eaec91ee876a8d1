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
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from interp_jax.core.activations import Activations, SiteRow
from interp_jax.core.errors import ShapeError, UnknownNameError, four_part
from interp_jax.core.interventions import Intervention, apply_intervention
from interp_jax.core.sites import Selector, Site, select_sites
from interp_jax.transforms.harvest.interpret import LoopIndex, interpret
from interp_jax.transforms.harvest.survey import Key, LoopSite, Place, Sown, survey
from interp_jax.transforms.jaxprs import is_site
from interp_jax.transforms.sowing import LoopLayer, layer_scope, sow
from interp_jax.transforms.tracing import Trace, sites_of, trace_program

__all__ = ["harvest_sites", "intervene", "layer_scope", "reap_sites", "site_gradients", "sow"]

Interventions: TypeAlias = "Mapping[Selector, Intervention] | Iterable[tuple[Selector, Intervention]]"


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

    def intervened(*args: Any, **kwargs: Any) -> Any:
        trace = trace_program(fn, args, kwargs)
        return _harvest(fn, trace, [], interventions, resows=True)[0]

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
        UnknownNameError: At the call: a part of a selector matches no site.
        ShapeError: At the call, before anything runs: a new value does not fit its site.
    """

    def harvested(*args: Any, **kwargs: Any) -> tuple[Any, Activations]:
        trace = trace_program(fn, args, kwargs)
        sites = select_sites(select, [row.site for row in sites_of(trace.closed)], where=f"reap_sites({_name(fn)})")
        return _harvest(fn, trace, sites, interventions)

    return _renamed(fn, harvested)


def site_gradients(
    fn: Callable[..., Any],
    select: Selector,
    metric: Callable[[Any], jax.Array] = lambda result: result,
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
        ShapeError: At the call: the metric is not real numbers of rank 0 or 1.
    """

    def differentiated(*args: Any, **kwargs: Any) -> tuple[jax.Array, Activations, Activations]:
        trace = trace_program(fn, args, kwargs)
        rows = sites_of(trace.closed)
        sites = select_sites(select, [row.site for row in rows], where=f"site_gradients({_name(fn)})")
        forms = {row.site: row.value for row in rows}

        def total(perturbations: dict[Site, Any]) -> tuple[jax.Array, tuple[jax.Array, Activations]]:
            result, activations = _harvest(fn, trace, sites, interventions, perturbations=perturbations)
            value = metric(result)
            _check_metric(value)
            return jnp.sum(value), (value, activations)

        zeros = Activations({s: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), forms[s]) for s in sites})
        gradients, (value, activations) = jax.grad(lambda p: total(dict(p)), has_aux=True)(zeros)
        return value, activations, gradients

    return _renamed(fn, differentiated)


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


class _Edit(NamedTuple):
    """An intervention and the sites it acts on: a set of them, or all of a name with one (traced) layer."""

    sites: frozenset[Site]
    traced_layer: Any
    intervention: Any


@dataclass(frozen=True)
class _SitePolicy:
    """Sows of sites count, those of `read` are reaped. With `only`, all but those sites are left where they are."""

    read: frozenset[Site]
    only: frozenset[Site] | None = None

    def key(self, eqn: JaxprEqn, place: Place) -> Key | None:
        if not is_site(eqn):
            return None
        layer, name = place.scope.layer, eqn.params["name"]
        if isinstance(layer, LoopLayer):
            key, is_left = LoopSite(name, layer, place.scope.n_loops), name not in {site.name for site in self.only or ()}
        else:
            key, is_left = Site(layer, name), Site(layer, name) not in (self.only or ())
        return None if self.only is not None and is_left else key

    def is_wanted(self, key: Key) -> bool:
        if not isinstance(key, LoopSite):
            return key in self.read
        stride, offset = key.layer
        layers = [site.layer - offset for site in self.read if site.name == key.name and site.layer is not None]
        return any(distance >= 0 and distance % max(stride, 1) == 0 for distance in layers)

    def is_dropped(self, eqn: JaxprEqn) -> bool:
        return False

    def iterations(self, key: LoopSite, length: int) -> list[int]:
        return [i for i in range(length) if key.site(i) in self.read]


@dataclass(frozen=True)
class _Sites:
    """The state of a harvest by site."""

    policy: _SitePolicy
    edits: tuple[_Edit, ...] = ()
    # Added to the value of a site: zeros, with respect to which the derivative is taken.
    perturbations: Mapping[Key, Any] = field(default_factory=dict)
    # The same for a site of a loop of which not all iterations are perturbed: slot of each iteration, and values.
    tables: Mapping[Key, tuple[Any, Any]] = field(default_factory=dict)
    resows: bool = False
    loops: tuple[LoopIndex, ...] = ()

    def visit(self, key: Key, value: Any) -> tuple[Any, bool]:
        for edit in self.edits:
            value = self._edited(edit, key, value)
        if key in self.perturbations:
            value = jax.tree.map(jnp.add, value, self.perturbations[key])
        elif key in self.tables:
            value = self._perturbed_from_table(key, value)
        return value, self.policy.is_wanted(key)

    def _edited(self, edit: _Edit, key: Key, value: Any) -> Any:
        def change(value: Any) -> Any:
            return apply_intervention(edit.intervention, value, where=str(key))

        if not isinstance(key, LoopSite):
            if key not in edit.sites:
                return value
            if edit.traced_layer is None:
                return change(value)
            return lax.cond(edit.traced_layer == key.layer, change, lambda value: value, value)
        layers = [site.layer for site in edit.sites if site.name == key.name]
        if not layers:
            return value
        index, length = self.loops[key.n_loops - 1]
        layer = key.layer.offset + key.layer.stride * index
        if edit.traced_layer is not None:
            hit = edit.traced_layer == layer
        else:
            here = [key.site(i).layer in layers for i in range(length or 0)]
            if all(here):
                return change(value)
            if not any(here):
                return value
            hit = jnp.asarray(np.array(here))[index]
        return lax.cond(hit, change, lambda value: value, value)

    def _perturbed_from_table(self, key: Any, value: Any) -> Any:
        slot_of, rows = self.tables[key]
        slot = slot_of[self.loops[key.n_loops - 1].index]
        row = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, jnp.maximum(slot, 0), 0, keepdims=False), rows)
        return jax.tree.map(lambda a, b: jnp.where(slot >= 0, a + b, a), value, row)

    def is_planted(self, key: Key) -> bool:
        return False

    def changes(self, key: Any) -> bool:
        sites = [site for edit in self.edits for site in edit.sites]
        is_edited = key.name in {site.name for site in sites} if isinstance(key, LoopSite) else key in sites
        return is_edited or key in self.perturbations or key in self.tables

    def enter_loop(self, inside: Mapping[Key, Sown], length: int | None) -> tuple[_Sites, dict[Key, Any], bool]:
        depth, rows, tables = len(self.loops) + 1, {}, dict(self.tables)
        for key in inside:
            if length is None or not isinstance(key, LoopSite) or key.n_loops != depth:
                continue
            iterations = [i for i in range(length) if key.site(i) in self.perturbations]
            if not iterations:
                continue
            values = [self.perturbations[key.site(i)] for i in iterations]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *values)
            if len(iterations) == length:
                rows[key] = stacked
            else:
                slot_of = np.full(length, -1, np.int32)
                slot_of[iterations] = np.arange(len(iterations))
                tables[key] = (jnp.asarray(slot_of), stacked)
        return replace(self, tables=tables), rows, bool(self.edits or tables)

    def in_iteration(self, at: LoopIndex, rows: Mapping[Key, Any]) -> _Sites:
        return replace(self, perturbations={**self.perturbations, **rows}, loops=(*self.loops, at))

    @property
    def arrays(self) -> Any:
        return dict(self.perturbations)

    def with_arrays(self, arrays: Any) -> _Sites:
        return replace(self, perturbations=arrays)


def _harvest(
    fn: Callable[..., Any],
    trace: Trace,
    read: Sequence[Site],
    interventions: Interventions,
    *,
    perturbations: Mapping[Site, Any] | None = None,
    resows: bool = False,
) -> tuple[Any, Activations]:
    edits = _edits(interventions, sites_of(trace.closed), where=f"intervene({_name(fn)})")
    touched = frozenset(site for edit in edits for site in edit.sites)
    policy = _SitePolicy(frozenset(read), touched if resows else None)
    survey(trace.closed.jaxpr, policy, Place())
    state = _Sites(policy, edits, dict(perturbations or {}), resows=resows)
    outs, reaps = interpret(trace.closed, trace.args, state, Place())
    values = Activations({site: reaps[site].value for site in read})
    return jax.tree.unflatten(trace.out_tree, outs), values


def _edits(interventions: Interventions, rows: Sequence[SiteRow], *, where: str) -> tuple[_Edit, ...]:
    """The interventions with their selectors resolved, each known to fit the sites it acts on."""
    pairs = interventions.items() if isinstance(interventions, Mapping) else interventions
    all_sites = [row.site for row in rows]
    edits = []
    for selector, intervention in pairs:
        layer = selector.layer if isinstance(selector, Site) else None
        if layer is not None and not isinstance(layer, (int, np.integer)):
            sites = _sites_of_traced_layer(selector, layer, all_sites, where=where)
        else:
            sites, layer = frozenset(select_sites(selector, all_sites, where=where)), None
        for form, site in {_hashable(row.value): row.site for row in rows if row.site in sites}.items():
            value = jax.tree.unflatten(form[1], form[0])
            jax.eval_shape(lambda v, i=intervention, s=site: apply_intervention(i, v, where=f"{s} of {where}"), value)
        edits.append(_Edit(sites, layer, intervention))
    return tuple(edits)


def _hashable(form: Any) -> tuple[tuple[Any, ...], Any]:
    leaves, tree = jax.tree.flatten(form)
    return tuple(leaves), tree


def _sites_of_traced_layer(selector: Site, layer: Any, sites: Sequence[Site], *, where: str) -> frozenset[Site]:
    named = frozenset(site for site in sites if site.name == selector.name and site.layer is not None)
    is_index = jnp.shape(layer) == () and jnp.issubdtype(jnp.result_type(layer), jnp.integer)
    if named and is_index:
        return named
    raise UnknownNameError(
        four_part(
            f"Site(layer, {selector.name!r}) with a layer {jnp.result_type(layer)}{list(jnp.shape(layer))} was given",
            where=where,
            names=dict.fromkeys(site.name for site in sites if site.layer is not None),
            given=selector.name,
            fix="use one of these names, and a scalar integer as layer.",
        )
    )


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__qualname__", None) or type(fn).__name__


def _renamed(fn: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(fn, updated=())(wrapper)
