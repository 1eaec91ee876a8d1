"""Effects of nodes: put another value in the place of one node at a time, and see what a metric comes to.

effect(node) = metric(pass with the node's value replaced) - metric(plain pass)

Exact, and no more work than the answer needs: the plain pass is stopped at each site once, and only what comes after
the site is run, many nodes side by side (`running_pass.rest` under vmap). Positions before the first one that matters
are read once, into the key-value cache. Of the logits, only the position the metric reads is computed. A node whose
new value is its old one, or which lies behind the position the metric reads, has an effect of exactly 0 and is not
run. Which node it is, is data: the programs are those of one layer, whatever is swept.

    effects, plain = node_effects(lm, tokens, nodes, other_tokens, metric)    # [batch, node], [batch]

>>> from interp_jax.forward.nodes import node_set
>>> from interp_jax.models.language_model import LanguageModel
>>> from interp_jax.transforms.sowing import sow
>>> def forward(params, tokens):
...     return sow(params[tokens], name="embed").sum(1, keepdims=True) ** 2
>>> lm = LanguageModel(Upstream("sum", forward), jnp.eye(3), name="sum")
>>> tokens, other = np.array([[0, 1]]), np.array([[0, 0]])
>>> effects, plain = node_effects(lm, tokens, node_set(lm, tokens, ["embed"]), other, lambda logits: logits[:, 0, 0])
>>> effects.tolist(), plain.tolist()
([[0.0, 3.0]], [1.0])

Sharp edges: with a cache, sums over keys are taken in another order than without, so effects differ from those of
passes over the whole prompt in the last digits. Ctrl-C ends the sweep with what is done; what is not is NaN.

Source: interp_jax.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part
from interp_jax.core.sites import Site
from interp_jax.forward.metrics import Metric, column_read, finite, metric_values, prepared
from interp_jax.forward.nodes import NodeGroup, NodeSet
from interp_jax.models import passes
from interp_jax.models.upstream import Upstream
from interp_jax.transforms.compilations import counted_jit
from interp_jax.transforms.running_pass import RunningPass, run

if TYPE_CHECKING:
    from jax.tree_util import Partial

    from interp_jax.models.language_model import LanguageModel

# What the widest value of the rows that run side by side may take. More rows than some hundred make nothing faster.
STEP_BYTES = 2**25
LN_FINAL = Site(None, "ln_final")

Source: TypeAlias = "np.ndarray | Callable[[Site, Any], Any]"
"""Where new values come from: the tokens of another prompt, or a function of the site and its own value."""


class Cut(NamedTuple):
    """A forward pass over the positions from `start`, and how the metric follows from what it ends in.

    Args:
        fn: The pass.
        args: Its arguments.
        start: Its first position.
        last: The last position that matters.
        until: The site it ends at; None if it ends in the logits.
        metric: A function of the parameters and of ends `[row, batch, ...]`.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    start: int
    last: int
    until: Site | None
    metric: Callable[[Any, Any], Any]


def node_effects(
    lm: LanguageModel,
    tokens: np.ndarray,
    nodes: NodeSet,
    source: Source,
    metric: Metric,
    *,
    rows_per_step: int | None = None,
    done: np.ndarray | None = None,
    progress: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """The effect of replacing each node, alone.

    Args:
        lm: The model.
        tokens: Prompts, `[batch, pos]`.
        nodes: Which nodes.
        source: The tokens of other prompts, `[batch, pos]`, in whose pass each node has its new value; or a function
            from a site and its value to the new one.
        metric: A function from logits to `[batch]`.
        rows_per_step: How many nodes run side by side; by default as many as `STEP_BYTES` allow.
        done: Effects already known, NaN where not; those are not run again.
        progress: Whether to show a progress bar, on a terminal.

    Returns:
        float32 effects `[batch, node]`, NaN where Ctrl-C came first; and the metric of the plain pass, `[batch]`.

    Raises:
        ShapeError: The metric does not return one float per row of the batch, or `done` is not of these nodes.
        InvalidInputError: The metric reads a token or a position that is not there, or is NaN on the plain pass, or
            `rows_per_step` is not positive.
    """
    metric = prepared(metric, lm, tokens, where="node_effects")
    effects = _blank(done, (len(tokens), nodes.n_nodes))
    if rows_per_step is not None and rows_per_step < 1:
        raise _refuse(f"rows_per_step={rows_per_step} was given", "a positive number.", "choose 1 or more.")
    names = [group.name for group in nodes.groups]
    cut = cut_pass(lm, tokens, metric, first_position(tokens, nodes, source), names=names)
    new = _new_values(lm, source, cut.start, nodes.sites)
    by_site = {site: (group, ids) for group, ids in nodes.with_ids() for site in group.sites}
    plain: np.ndarray | None = None
    stops = names if cut.until is None else [*names, cut.until]
    bar = tqdm(total=nodes.n_nodes, desc="nodes", unit="node", disable=None if progress else True, leave=False)
    try:
        for layer, name, value in (running_pass := run(cut.fn, *cut.args, sites=stops)):
            if (site := Site(layer, name)) == cut.until:
                continue
            if plain is None:
                plain = _plain_metric(running_pass, value, cut)
            if site not in by_site:
                continue
            group, ids = by_site[site]
            per_layer = math.prod(group.shape[1:])
            ids = ids[group.layers.index(layer) * per_layer :][:per_layer]
            here = effects[:, ids.start : ids.stop]  # A view: what is written here is the result.
            replaced = new(site, value)
            differs = _differences(value, replaced, group, cut)
            here[~differs] = 0.0
            todo = np.flatnonzero(np.isnan(here).any(0))
            bar.update(len(ids) - len(todo))
            for rows in _steps(todo, rows_per_step or _rows_that_fit(value)):
                masks, units = _parts(rows, group, cut)
                ends = jax.vmap(functools.partial(running_pass.rest, until=cut.until))(
                    _placed(value, replaced, masks, units)
                )
                found = np.asarray(cut.metric(cut.args[0], ends)).T - plain[:, None]
                here[:, rows] = np.where(differs[:, rows], found, 0.0)
                bar.update(len(set(rows)))
    except KeyboardInterrupt:
        n_left = int(np.isnan(effects).any(0).sum())
        warnings.warn(f"Interrupted: {n_left} of {nodes.n_nodes} nodes are left, NaN in the result.", stacklevel=3)
    finally:
        bar.close()
    return effects, np.full(len(tokens), np.nan, np.float32) if plain is None else plain


def plain_metric(lm: LanguageModel, tokens: np.ndarray, metric: Metric) -> np.ndarray:
    """The metric of the plain pass over prompts, float32 `[batch]`.

    Args:
        lm: The model.
        tokens: Prompts, `[batch, pos]`.
        metric: A function from logits to `[batch]`.

    Returns:
        The metric.
    """
    return np.asarray(metric_values(metric, lm(tokens), where="plain_metric"))


def cut_pass(
    lm: LanguageModel, tokens: np.ndarray, metric: Partial, start: int = 0, *, names: Sequence[str] = ()
) -> Cut:
    """The part of a pass that a metric needs: the positions from `start`, and the logits it reads.

    Args:
        lm: The model.
        tokens: Prompts, `[batch, pos]`.
        metric: A metric that `prepared` let pass.
        start: The first position of interest; those before are read into a cache, if the model has one.
        names: Names of the sites of interest.

    Returns:
        The pass.
    """
    n_pos = tokens.shape[1]
    column = column_read(metric, n_pos)
    last = n_pos - 1 if column is None else column[0]
    can_unembed = lm.upstream.unembed is not None and LN_FINAL in lm.sites(tokens).sites
    if column is None or not can_unembed or LN_FINAL.name in names:
        of_logits = functools.partial(_of_logits, metric=metric)
        return Cut(lm.forward, (lm.params, tokens), 0, last, None, of_logits)
    fn, args, start = pass_from(lm, tokens, min(start, last))
    of_column = functools.partial(_of_columns, lm.upstream, column=np.int32(last - start), metric=column[1])
    return Cut(fn, args, start, last, LN_FINAL, of_column)


def pass_from(lm: LanguageModel, tokens: np.ndarray, start: int) -> tuple[Callable[..., Any], tuple[Any, ...], int]:
    """The pass over the positions from one on, those before it in a cache.

    Args:
        lm: The model.
        tokens: Prompts, `[batch, pos]`.
        start: The first position.

    Returns:
        The pass, its arguments, and its first position: 0 if the model has no cache.
    """
    upstream = lm.upstream
    if not start or upstream.step is None or upstream.init_cache is None:
        return lm.forward, (lm.params, tokens), 0
    cache = upstream.init_cache(*tokens.shape)
    _, cache = passes.edit(upstream.step, (lm.params, cache, tokens[:, :start]), {})
    return _step_logits(upstream), (lm.params, cache, tokens[:, start:]), start


def first_position(tokens: np.ndarray, nodes: NodeSet, source: Source) -> int:
    """The first position at which a node can have an effect.

    Args:
        tokens: Prompts, `[batch, pos]`.
        nodes: The nodes.
        source: Where their new values come from.

    Returns:
        The position, from 0.
    """
    first = min(min(group.positions) for group in nodes.groups)
    if callable(source):
        return first
    differing = np.flatnonzero((tokens != source).any(0))
    return max(first, int(differing[0]) if len(differing) else tokens.shape[1] - 1)


@functools.lru_cache(maxsize=64)
def _step_logits(upstream: Upstream) -> Callable[..., Any]:
    """The pass over tokens after a cache, of which the cache is not wanted back."""

    def logits(params: Any, cache: Any, tokens: Any) -> Any:
        assert upstream.step is not None
        return upstream.step(params, cache, tokens)[0]

    return logits


def _columns_fn(upstream: Upstream, params: Any, ends: Any, *, column: Any, metric: Any) -> Any:
    assert upstream.unembed is not None
    picked = jax.lax.dynamic_slice_in_dim(ends, column, 1, axis=2)
    logits = upstream.unembed(params, jax.lax.collapse(picked, 0, 2))
    return _logits_fn(params, logits.reshape(*picked.shape[:3], -1), metric=metric)


def _logits_fn(params: Any, ends: Any, *, metric: Any) -> Any:
    return jax.vmap(functools.partial(metric_values, metric, where="node_effects"))(ends)


_of_columns = counted_jit(_columns_fn, name="metric of a column", static_argnums=0)
_of_logits = counted_jit(_logits_fn, name="metric")


def _plain_metric(running_pass: RunningPass, value: Any, cut: Cut) -> np.ndarray:
    end = running_pass.rest(value, until=cut.until)
    plain = cut.metric(cut.args[0], jax.tree.map(lambda leaf: leaf[None], end))[0]
    return finite(plain, what="The metric of the plain pass", where="node_effects")


def _new_values(lm: LanguageModel, source: Source, start: int, sites: list[Site]) -> Callable[[Site, Any], Any]:
    """From a site and its value to the new value, over the positions from `start`."""
    if callable(source):
        return source
    # By the same programs as the plain pass, so that what is equal in both is equal to the bit.
    fn, args, _ = pass_from(lm, source, start)
    values = passes.read(fn, args, sites, where="node_effects")
    return lambda site, value: values[site]


def _blank(done: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
    if done is None:
        return np.full(shape, np.nan, np.float32)
    if np.shape(done) != shape:
        raise ShapeError(
            four_part(
                f"Effects of shape {list(np.shape(done))} to go on from were given",
                where="node_effects",
                expected=f"those of the same prompts and nodes, {list(shape)}.",
                fix="pass the result that was interrupted, with the same prompts and nodes.",
            )
        )
    return np.array(done, np.float32)


def _differences(value: Any, new: Any, group: NodeGroup, cut: Cut) -> np.ndarray:
    """Which nodes of one site have another value than before and can reach the metric, `[batch, node]`."""
    changed = np.asarray(_changed(value, new, 3 if group.n_units else 2))
    masks = group.position_masks(cut.start + changed.shape[1])
    masks[:, cut.last + 1 :] = False
    at = np.einsum("bp...,np->bn...", changed.astype(np.int32), masks[:, cut.start :].astype(np.int32)) > 0
    return at.reshape(len(at), -1)


@functools.partial(jax.jit, static_argnums=2)
def _changed(value: Any, new: Any, n_axes: int) -> Any:
    return (value != new).any(tuple(range(n_axes, value.ndim)))


def _steps(todo: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Equal steps of at most so many nodes; the last is filled up with copies of its last node."""
    n_steps = -(-len(todo) // most)
    size = -(-len(todo) // n_steps) if n_steps else 0
    for start in range(0, len(todo), size or 1):
        yield todo[np.minimum(np.arange(start, start + size), len(todo) - 1)]


def _rows_that_fit(value: Any) -> int:
    widest = 4 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(value))
    return max(1, min(256, STEP_BYTES // widest))


def _parts(rows: np.ndarray, group: NodeGroup, cut: Cut) -> tuple[np.ndarray, np.ndarray]:
    """The positions `[row, pos]` and the unit `[row]` (-1: all) of nodes of one site."""
    positions, units = np.unravel_index(rows, group.shape[1:])
    n_pos = cut.start + cut.args[-1].shape[1]
    masks = group.position_masks(n_pos)[positions][:, cut.start :]
    return masks, (units if group.n_units else np.full(len(rows), -1)).astype(np.int32)


@jax.jit
def _placed(value: Any, new: Any, positions: Any, units: Any) -> Any:
    """The value with each node's part replaced, `[row, batch, pos, ...]`."""

    def one(positions: Any, unit: Any) -> Any:
        mask = jnp.expand_dims(positions, (0, *range(2, value.ndim)))
        if value.ndim > 2:
            at_unit = (jnp.arange(value.shape[2], dtype=jnp.int32) == unit) | (unit < 0)
            mask = mask & jnp.expand_dims(at_unit, (0, 1, *range(3, value.ndim)))
        return jnp.where(mask, new, value)

    return jax.vmap(one)(positions, units)


def _refuse(what: str, expected: str, fix: str) -> InvalidInputError:
    return InvalidInputError(four_part(what, where="node_effects", expected=expected, fix=fix))
