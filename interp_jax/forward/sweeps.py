"""Sweeps: many interventions on one prompt, one compiled program, one number per row.

A sweep's table says, for each site it touches, what is done there in each row. The table is an argument of the
program, not a part of it: another table of the same form, another prompt of the same length or another metric with
other token ids compiles nothing. Rows run side by side (vmap), in steps small enough for the memory.

Zero each layer's MLP in turn; row i masks layer i alone:

    alone = np.eye(n_layers, dtype=bool)
    table = {Site(i, "mlp_out"): Masked(0.0, alone[:, i]) for i in range(n_layers)}
    values = sweep(lm, tokens, table, logit_difference(mary, john))      # [row, batch]

Scale one site by ten factors: `{"5.mlp_out": scaled(np.linspace(0, 2, 10))}`. A row of it, by hand:

>>> scaled(np.float32(2.0))(jnp.ones(3))
Array([2., 2., 2.], dtype=float32)

Sharp edges: arrays in the table have the row as their first axis; numbers without axes are shared by all rows. The
metric and functions in the table are traced, so they must be JAX code, and a function made anew (a lambda) is compiled
anew. The last step is filled up with copies of the last row, so that all steps have one shape.

Source: interp_jax.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from tqdm import tqdm

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part
from interp_jax.core.interventions import apply_intervention
from interp_jax.core.sites import Selector, Site, select_sites
from interp_jax.forward.metrics import Metric, metric_values, prepared
from interp_jax.transforms.compilations import counted_jit
from interp_jax.transforms.running_pass import run

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

# What the values at all sites of the rows of one step may take together.
STEP_BYTES = 2**28


def scaled(factor: Any) -> Partial:
    """The intervention that multiplies a value; its factor is data, so a table may hold one per row.

    value -> factor * value

    Args:
        factor: A number, or `[row]` in a table.

    Returns:
        A function of the value.
    """
    return Partial(_scale, jnp.asarray(factor))


def _scale(factor: Any, value: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf * jnp.broadcast_to(factor.astype(leaf.dtype), leaf.shape), value)


def sweep(
    lm: LanguageModel,
    tokens: Any,
    table: Mapping[Any, Any],
    metric: Metric,
    *,
    rows_per_step: int | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Run the model once per row of a table of interventions and return the metric of each run.

    value[row, b] = metric(logits of the pass in which each site s of the table becomes table[s][row])[b]

    Args:
        lm: The model.
        tokens: Token ids, `[batch, pos]`.
        table: Selector to intervention: an array, a `Masked`, an `Added`, or a function that is a pytree (`scaled`, or
            a `jax.tree_util.Partial`), each array with the row as its first axis.
        metric: A function from logits to `[batch]` floats.
        rows_per_step: How many rows run side by side; by default as many as `STEP_BYTES` allow.
        progress: Whether to show a progress bar, on a terminal.

    Returns:
        float32 values, `[row, batch]`.

    Raises:
        UnknownNameError: A selector of the table matches no site.
        ShapeError: Rows disagree in number, an intervention does not fit its site, or the metric does not return
            one float per row of the batch.
        InvalidInputError: The table is empty, two selectors share a site, the metric reads a token or a position that
            is not there, or `rows_per_step` is not positive.
    """
    tokens = np.asarray(lm.check_tokens(tokens, where="sweep"))
    metric = prepared(metric, lm, tokens, where="sweep")
    rows = lm.sites(tokens)
    by_site = _by_site(table, rows.sites)
    n_rows = _n_rows(by_site)
    if rows_per_step is None:
        rows_per_step = _rows_that_fit(n_rows, rows.n_bytes)
    elif rows_per_step < 1:
        raise _refuse(f"rows_per_step={rows_per_step} was given", "a positive number.", "choose 1 or more.")
    sites, interventions = tuple(by_site), tuple(by_site.values())
    values = np.empty((n_rows, len(tokens)), np.float32)
    with tqdm(total=n_rows, desc="sweep", unit="row", disable=None if progress else True, leave=False) as bar:
        for start in range(0, n_rows, rows_per_step):
            step = _pick(interventions, np.minimum(np.arange(start, start + rows_per_step), n_rows - 1))
            new = np.asarray(_run_rows(lm.forward, sites, lm.params, tokens, step, metric))[: n_rows - start]
            values[start : start + len(new)] = new
            bar.update(len(new))
    return values


def _pick(interventions: Any, rows: np.ndarray) -> Any:
    """Some rows of a table."""
    return jax.tree.map(lambda leaf: leaf[rows] if np.ndim(leaf) else leaf, interventions)


def _rows_of(
    forward: Any, sites: tuple[Site, ...], params: Any, tokens: Any, interventions: tuple[Any, ...], metric: Any
) -> jax.Array:
    """The metric of every row of one step, the rows side by side."""

    def one_row(row: tuple[Any, ...]) -> jax.Array:
        by_site = dict(zip(sites, row, strict=True))
        for layer, name, value in (running_pass := run(forward, params, tokens, sites=sites)):
            site = Site(layer, name)
            running_pass.modified_value = apply_intervention(by_site[site], value, where=str(site))
        return metric_values(metric, running_pass.retval, where="sweep")

    has_rows = jax.tree.map(lambda leaf: 0 if jnp.ndim(leaf) else None, interventions)
    return jax.vmap(one_row, in_axes=(has_rows,))(interventions)


_run_rows = counted_jit(_rows_of, name="sweep", static_argnums=(0, 1))


def _by_site(table: Mapping[Any, Any], sites: list[Site]) -> dict[Site, Any]:
    """The table with each selector spelled out as its sites, in execution order."""
    if not table:
        raise _refuse("An empty table was given", "at least one site and what is done there.", "add an intervention.")
    chosen: dict[Site, tuple[Selector, Any]] = {}
    for selector, intervention in table.items():
        for site in select_sites(selector, sites, where="sweep"):
            if site in chosen:
                raise _refuse(
                    f"{selector!r} and {chosen[site][0]!r} both intervene on {site}",
                    "one intervention per site.",
                    "leave the site out of one of them, or combine them in one function.",
                )
            chosen[site] = selector, intervention
    return {site: chosen[site][1] for site in sites if site in chosen}


def _n_rows(by_site: Mapping[Site, Any]) -> int:
    """The number of rows, once all arrays of the table agree about it."""
    rows: dict[int, list[str]] = {}
    for site, intervention in by_site.items():
        for leaf in jax.tree.leaves(intervention):
            if np.ndim(leaf):
                rows.setdefault(np.shape(leaf)[0], []).append(str(site))
    if len(rows) != 1:
        found = "; ".join(f"{n} at {', '.join(dict.fromkeys(names))}" for n, names in rows.items()) or "none"
        raise ShapeError(
            four_part(
                f"The table's numbers of rows are: {found}",
                where="sweep",
                expected="arrays whose first axis is the row, as long everywhere.",
                fix="give every array one entry per row; numbers without axes are shared by all rows.",
            )
        )
    return next(iter(rows))


def _rows_that_fit(n_rows: int, bytes_per_row: int) -> int:
    """A power of two, so that tables of nearly the same length share one program."""
    rows = 1
    while rows < n_rows and 2 * rows * bytes_per_row <= STEP_BYTES:
        rows *= 2
    return rows


def _refuse(what: str, expected: str, fix: str) -> InvalidInputError:
    return InvalidInputError(four_part(what, where="sweep", expected=expected, fix=fix))
