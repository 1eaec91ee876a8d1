"""What a harvest by site does at each sow: which sites it is about, and what their values become.

`Sites` is a state of the interpreter (see interpret.py). It knows the interventions with their selectors resolved, the
values that derivatives are taken with respect to, and the loops it is in, so that one body of a scan over layers does
the right thing in every layer.

>>> edit = Edit(frozenset({Site(0, "a")}), None, 5.0)
>>> Sites(SitePolicy(frozenset()), (edit,)).visit(Site(0, "a"), jnp.ones(()))
(Array(5., dtype=float32), False)

Source: interp_jax.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from interp_jax.core.activations import SiteRow
from interp_jax.core.errors import UnknownNameError, four_part
from interp_jax.core.interventions import Intervention, apply_intervention
from interp_jax.core.sites import Selector, Site, select_sites
from interp_jax.transforms.harvest.keys import Dropped, Key, LoopSite, Place
from interp_jax.transforms.harvest.state import LoopIndex
from interp_jax.transforms.harvest.survey import Sown
from interp_jax.transforms.jaxprs import is_site
from interp_jax.transforms.sowing import SITE_TAG, LoopLayer


class Edit(NamedTuple):
    """An intervention and the sites it acts on: a set of them, or those of the set with one (traced) layer."""

    sites: frozenset[Site]
    traced_layer: Any
    intervention: Any


def resolve(
    interventions: Iterable[tuple[Selector, Intervention]], rows: Sequence[SiteRow], *, where: str
) -> tuple[Edit, ...]:
    """Interventions with their selectors resolved, each known to fit the sites it acts on.

    Args:
        interventions: Pairs of selector and intervention.
        rows: The sites there are.
        where: The public call, for error messages.

    Returns:
        The edits, in order.

    Raises:
        UnknownNameError: A part of a selector matches no site.
        ShapeError: A new value does not fit its site.
    """
    all_sites = [row.site for row in rows]
    edits = []
    for selector, intervention in interventions:
        layer = selector.layer if isinstance(selector, Site) else None
        if layer is None or isinstance(layer, (int, np.integer)):
            sites, layer = frozenset(select_sites(selector, all_sites, where=where)), None
        else:
            sites = _sites_of_traced_layer(selector, layer, all_sites, where=where)
            layer = jnp.asarray(layer).astype(jnp.int32)
        by_form = {_hashable(row.value): row for row in rows if row.site in sites}
        for (leaves, tree), row in by_form.items():
            place = f"{row.site} of {where} (sown at {row.source})"
            jax.eval_shape(
                lambda value, place=place, intervention=intervention: apply_intervention(
                    intervention, value, where=place
                ),
                jax.tree.unflatten(tree, leaves),
            )
        edits.append(Edit(sites, layer, intervention))
    return tuple(edits)


def _hashable(form: Any) -> tuple[tuple[Any, ...], Any]:
    leaves, tree = jax.tree.flatten(form)
    return tuple(leaves), tree


def _sites_of_traced_layer(selector: Any, layer: Any, sites: Sequence[Site], *, where: str) -> frozenset[Site]:
    named = frozenset(site for site in sites if site.name == selector.name and site.layer is not None)
    is_array = hasattr(layer, "dtype") and hasattr(layer, "shape")
    if named and is_array and layer.shape == () and jnp.issubdtype(layer.dtype, jnp.integer):
        return named
    given = f"{layer.dtype}{list(layer.shape)}" if is_array else type(layer).__name__
    raise UnknownNameError(
        four_part(
            f"Site(layer, {selector.name!r}) with a layer {given} was given",
            where=where,
            names=dict.fromkeys(site.name for site in sites if site.layer is not None),
            given=selector.name,
            fix="use one of these names, and a scalar integer as layer.",
        )
    )


@dataclass(frozen=True)
class SitePolicy:
    """Sows of sites count, those of `read` are reaped. With `only`, all but those sites are left where they are."""

    read: frozenset[Site]
    only: frozenset[Site] | None = None

    def key(self, eqn: JaxprEqn, place: Place) -> Key | None:
        """The key of a sow `eqn` at its `place`, or None if this harvest leaves it where it is."""
        if not is_site(eqn):
            return None
        layer, name = place.scope.layer, eqn.params["name"]
        key: Key = Site(layer, name) if not isinstance(layer, LoopLayer) else LoopSite(name, layer, place.scope.n_loops)
        return key if self.only is None or covers(self.only, key) else None

    def is_wanted(self, key: Key) -> bool:
        """Whether a sow of this `key` is harvested; in a loop, whether it is in any iteration."""
        return covers(self.read, key)

    @property
    def dropped(self) -> Dropped:
        """Which sows are taken out although nothing is read from them: all sites, unless only some are concerned."""
        return Dropped(SITE_TAG, of_tag=self.only is None, others=False)

    def iterations(self, key: LoopSite, length: int) -> list[int]:
        """The iterations, out of `length`, in which the site of a loop over layers, `key`, is read."""
        return [i for i in range(length) if key.site(i) in self.read]

    def reading_nothing(self) -> SitePolicy:
        """The policy that knows the same sows and harvests none of them."""
        return replace(self, read=frozenset())


def covers(sites: frozenset[Site], key: Key) -> bool:
    """Whether `key` is one of `sites`, or can be in some iteration of its loop."""
    if not isinstance(key, LoopSite):
        return key in sites
    stride, offset = key.layer
    layers = [site.layer - offset for site in sites if site.name == key.name and site.layer is not None]
    return any(distance >= 0 and distance % max(stride, 1) == 0 for distance in layers)


@dataclass(frozen=True)
class Sites:
    """The state of a harvest by site."""

    policy: SitePolicy
    edits: tuple[Edit, ...] = ()
    # Added to the value of a site: zeros, with respect to which the derivative is taken.
    perturbations: Mapping[Key, Any] = field(default_factory=dict)
    # In a loop of which not all iterations are perturbed: the slot of each iteration (-1: none), and the slots.
    tables: Mapping[LoopSite, tuple[Any, Any]] = field(default_factory=dict)
    resows: bool = False
    is_silent: bool = False
    loops: tuple[LoopIndex, ...] = ()

    def visit(self, key: Key, value: Any) -> tuple[Any, bool]:
        """The value to go on with at the sow `key` of `value`, and whether it is also to be reaped."""
        for edit in self.edits:
            if covers(edit.sites, key):
                value = self._edited(edit, key, value)
        if key in self.perturbations:
            value = jax.tree.map(jnp.add, value, self.perturbations[key])
        return value, self.policy.is_wanted(key)

    def _edited(self, edit: Edit, key: Key, value: Any) -> Any:
        def change(value: Any) -> Any:
            return apply_intervention(edit.intervention, value, where=str(key))

        hit = self._is_hit(edit, key)
        if isinstance(hit, bool):
            return change(value) if hit else value
        return lax.cond(hit, change, lambda value: value, value)

    def _is_hit(self, edit: Edit, key: Any) -> Any:
        """Whether an edit acts on a sow here: known, or a traced bool."""
        if not isinstance(key, LoopSite):
            return True if edit.traced_layer is None else edit.traced_layer == key.layer
        index, length = self.loops[key.n_loops - 1]
        layer = key.layer.offset + key.layer.stride * index
        if edit.traced_layer is not None:
            return edit.traced_layer == layer
        if length is None:  # A while loop: of its layers only the first is known to the selectors.
            return jnp.any(jnp.array([layer == site.layer for site in edit.sites if site.name == key.name]))
        here = [key.site(i) in edit.sites for i in range(length)]
        return all(here) if all(here) or not any(here) else jnp.asarray(np.array(here))[index]

    def is_planted(self, key: Key) -> bool:
        """Whether the value of `key` is given, so that it is not reaped: interventions never give it so."""
        return False

    def changes(self, key: Key) -> bool:
        """Whether the value at the sow `key` may become another."""
        return key in self.perturbations or any(covers(edit.sites, key) for edit in self.edits) or key in self.tables

    def enter_loop(self, inside: Mapping[Key, Sown], length: int | None) -> tuple[Sites, dict[Key, Any], bool]:
        """The state for a loop of `length` iterations that sows `inside`, what is added in each, and whether to count.

        What is appended is perturbed in each iteration by a row of its perturbation; so is a site of a loop over layers
        all of whose layers are perturbed. Otherwise slots hold the perturbations of those that are.
        """
        depth, rows, tables = len(self.loops) + 1, {}, {}
        for key, sown in inside.items():
            if length is None or not (isinstance(key, LoopSite) and key.n_loops == depth):
                if sown.mode == "append" and key in self.perturbations:
                    rows[key] = self.perturbations[key]
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

    def in_iteration(self, at: LoopIndex, rows: Mapping[Key, Any]) -> Sites:
        """The state for the body, in the iteration `at`, with its `rows` of what is added one per iteration."""
        from_tables = {key: _row_of(table, at.index) for key, table in self.tables.items()}
        perturbations = {**self.perturbations, **rows, **from_tables}
        return replace(self, perturbations=perturbations, tables={}, loops=(*self.loops, at))

    @property
    def arrays(self) -> Any:
        """The arrays the state holds, for code that must be given them as arguments."""
        return dict(self.perturbations)

    def with_arrays(self, arrays: Any) -> Sites:
        """The state with those `arrays` replaced."""
        return replace(self, perturbations=arrays)

    def silenced(self) -> Sites:
        """The state with `is_silent`."""
        return replace(self, is_silent=True)

    def reading_nothing(self) -> Sites:
        """The state that reaps nothing."""
        return replace(self, policy=self.policy.reading_nothing())


def _row_of(table: tuple[Any, Any], index: Any) -> Any:
    """What a table of perturbations holds for an iteration: its slot, or zeros."""
    slot_of, slots = table
    slot = slot_of[index]

    def row(leaf: Any) -> Any:
        value = lax.dynamic_index_in_dim(leaf, jnp.maximum(slot, 0), 0, keepdims=False)
        return jnp.where(slot >= 0, value, jnp.zeros_like(value))

    return jax.tree.map(row, slots)
