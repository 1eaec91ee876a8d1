"""Sites in random scans over layers, against Python loops: nested scans, groups of layers, sites in some layers only.

A model runs groups of layers: a scan over groups, in which every layer of a group has a body of its own (operations,
sites, an inner scan that sows in append or clobber mode), perhaps around it a scan over chunks of the input. The truth
is the same model with Python loops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax

from interp_jax.core.interventions import Masked
from interp_jax.core.sites import Site
from interp_jax.transforms.harvest import harvest_sites, layer_scope, loop_layer, site_gradients, sow

N_CHUNKS, SIZE = 2, 3
X = jnp.linspace(-1.0, 1.0, N_CHUNKS * SIZE).reshape(N_CHUNKS, SIZE)


class Item(NamedTuple):
    """A step of a layer; with `n` > 0 in a scan of its own. Its site is `name`, if it has one."""

    number: float
    name: str
    n: int
    mode: str


class Model(NamedTuple):
    """Groups of layers: the items of each layer of a group, how many groups, and what is around and inside."""

    group: tuple[tuple[Item, ...], ...]
    n_groups: int
    is_chunked: bool
    is_checkpointed: bool
    is_reversed: bool


@st.composite
def models(draw: Callable[..., Any]) -> Model:
    names = st.sampled_from(["a", "b", "c", ""])
    items = st.builds(Item, st.sampled_from([0.5, 0.75, 1.25]), names, st.sampled_from([0, 0, 2]), st.just(""))
    is_chunked = draw(st.booleans())

    def layer() -> tuple[Item, ...]:
        unique = {item.name or i: item for i, item in enumerate(draw(st.lists(items, min_size=1, max_size=3)))}
        inside = st.sampled_from(["append", "clobber"])
        # In loops that are no loops over layers, the mode says what is read.
        return tuple(
            item._replace(mode=draw(inside) if item.n else "append" if is_chunked else "strict")
            for item in unique.values()
        )

    group = tuple(layer() for _ in range(draw(st.integers(1, 2))))
    if not any(item.name for items in group for item in items):
        group = ((Item(0.5, "a", 0, "append"),), *group[1:])
    return Model(group, draw(st.integers(1, 3)), is_chunked, draw(st.booleans()), draw(st.booleans()))


def step(x: Any, number: Any) -> Any:
    return jnp.tanh(x * number) + 0.25 * x


def in_jax(model: Model) -> Callable[[Any], Any]:
    """The model with scans."""

    def layer(items: tuple[Item, ...], x: Any, scale: Any) -> Any:
        for item in items:

            def once(x: Any, item: Item = item) -> Any:
                x = step(x, item.number * scale)
                return sow(x, name=item.name, mode=item.mode) if item.name else x

            x = lax.scan(lambda x, _, once=once: (once(x), None), x, None, length=item.n)[0] if item.n else once(x)
        return x

    def layers(x: Any) -> Any:
        def body(x: Any, scale: Any) -> Any:
            for offset, items in enumerate(model.group):
                fn = lambda x, scale, items=items: layer(items, x, scale)  # noqa: E731
                with layer_scope(loop_layer(stride=len(model.group), offset=offset)):
                    x = (jax.checkpoint(fn) if model.is_checkpointed else fn)(x, scale)
            return x, None

        return lax.scan(body, x, scales(model), reverse=model.is_reversed)[0]

    if not model.is_chunked:
        return layers
    return lambda xs: lax.scan(lambda _, x: (None, layers(x)), None, xs)[1]


def scales(model: Model) -> Any:
    return jnp.linspace(0.5, 1.5, model.n_groups)


Edit = Callable[[Any], Any]


def in_python(model: Model, x: Any, edit: Callable[[Site, tuple[int, ...], Any], Any]) -> tuple[Any, dict[Site, Any]]:
    """The result, and what harvest must find: by site, the value of a visit, or of all (append), or of the last."""
    visits: dict[Site, list[tuple[Item, int, Any]]] = {}

    def layers(x: Any, chunk: int) -> Any:
        order = range(model.n_groups)
        for group in reversed(order) if model.is_reversed else order:
            for offset, items in enumerate(model.group):
                site_layer = group * len(model.group) + offset
                for item in items:
                    for i in range(item.n or 1):
                        x = step(x, item.number * scales(model)[group])
                        if item.name:
                            site = Site(site_layer, item.name)
                            x = edit(site, (*([chunk] if model.is_chunked else []), *([i] if item.n else [])), x)
                            visits.setdefault(site, []).append((item, chunk, x))
        return x

    out = jnp.stack([layers(row, chunk) for chunk, row in enumerate(x)]) if model.is_chunked else layers(x, 0)
    found = {}
    for site, seen in visits.items():
        item = seen[0][0]
        values = jnp.stack([value for _, _, value in seen])
        if item.mode == "clobber":
            found[site] = values[-1]
        elif item.mode == "strict":
            found[site] = values[0]
        else:
            n_chunks = (N_CHUNKS,) if model.is_chunked else ()
            found[site] = values.reshape(*n_chunks, *([item.n] if item.n else []), *values.shape[1:])
    return out, found


def unchanged(site: Site, index: tuple[int, ...], value: Any) -> Any:
    return value


def assert_close(ours: Any, truth: Any, about: Any) -> None:
    assert np.shape(ours) == np.shape(truth), about
    np.testing.assert_allclose(ours, truth, rtol=1e-5, atol=1e-6, err_msg=str(about))


def check(model: Model, chosen: Any, edits: list[tuple[Any, int]]) -> None:
    """Reads, changes and gradients at random sites are those of Python loops.

    Args:
        model: The model.
        chosen: From the sites there are, those to read.
        edits: Per intervention, what draws a site out of those there are, and its kind; in the order they act.
    """
    fn = in_jax(model)
    out, found = in_python(model, X, unchanged)
    select = sorted(chosen(sorted(found, key=str)), key=str)
    result, activations = jax.jit(harvest_sites(fn, select))(X)
    assert_close(result, out, model)
    assert set(activations) == set(select)
    for site in select:
        assert_close(activations[site], found[site], (site, model))

    value = jnp.linspace(0.5, 1.0, X[0].size if model.is_chunked else X.size).reshape(X.shape[int(model.is_chunked) :])
    kinds = (lambda v: v * 0.5, lambda v: v + 0.25, value, Masked(2.0, value > 0.7))
    there = sorted(found, key=str)
    acting = [(there[at % len(there)], kinds[kind]) for at, kind in edits]

    def edited(site: Site, index: tuple[int, ...], x: Any) -> Any:
        for where, what in acting:
            if where == site and isinstance(what, Masked):
                x = jnp.where(what.mask, what.value, x)
            elif where == site:
                x = what(x) if callable(what) else what
        return x

    truth, found_edited = in_python(model, X, edited)
    result, activations = jax.jit(harvest_sites(fn, select, acting))(X)
    assert_close(result, truth, (acting, model))
    for site in select:
        assert_close(activations[site], found_edited[site], (site, acting, model))

    smooth = [site for site in select if "clobber" not in _modes_of(model, site)]
    if not smooth:
        return
    _, _, gradients = jax.jit(site_gradients(fn, smooth, jnp.sum))(X)
    for site in smooth:
        at = lambda added, site=site: in_python(  # noqa: E731
            model, X, lambda where, index, x: x + added[index] if where == site else x
        )[0].sum()
        assert_close(gradients[site], jax.grad(at)(jnp.zeros_like(found[site])), (site, model))


def _modes_of(model: Model, site: Site) -> set[str]:
    assert site.layer is not None
    return {item.mode for item in model.group[site.layer % len(model.group)] if item.name == site.name}


CHOICES = st.sampled_from([lambda sites: sites, lambda sites: sites[:1], lambda sites: sites[1::2] or sites])
EDITS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 3)), min_size=1, max_size=4)


# Groups of two layers, of which each has a site that the other lacks.
ALTERNATING = Model(
    ((Item(0.5, "a", 0, "strict"),), (Item(0.75, "", 0, "strict"), Item(1.25, "b", 2, "append"))),
    n_groups=3,
    is_chunked=False,
    is_checkpointed=True,
    is_reversed=True,
)


@settings(max_examples=3)
@given(models(), CHOICES, EDITS)
@example(ALTERNATING, lambda sites: sites[1::2], [(1, 0), (1, 1), (4, 3)])
def test_a_few(model: Model, chosen: Any, edits: list[tuple[int, int]]) -> None:
    check(model, chosen, edits)


@pytest.mark.slow
@settings(max_examples=40)
@given(models(), CHOICES, EDITS)
def test_many(model: Model, chosen: Any, edits: list[tuple[int, int]]) -> None:
    check(model, chosen, edits)
