"""Subsets of nodes patched at once: the callable that diagnostics and searches over nodes ask for.

All nodes of a subset take the value they have in the pass over other prompts, in one forward pass; many subsets run
side by side. Which nodes those are is data, so one compiled program serves every subset. Positions before the first one
that matters are read once, into the key-value cache, and of the logits only the position the metric reads is computed.

    effects = subset_patching(lm, clean, corrupted, logit_difference(mary, john), node_set(lm, clean))
    bound = bound_missed_nodes(effects, effects.nodes.n_nodes, n_subsets=500, probability=0.03)

Which positions and units of a site a subset of its nodes covers:

>>> group = NodeGroup("z", (0,), (1, 3), n_units=2)
>>> covered(group, np.array([[[[True, False], [False, False]]]]), n_pos=4)[0, 0].astype(int).tolist()
[[0, 0], [1, 0], [0, 0], [0, 0]]

Sharp edges: a node in a subset has its value from the other pass even where an earlier node of the subset was patched,
too: a patched `z` hides a patched `q` of its head. Effects are averaged over the batch, signs included, when called;
`per_pair` keeps the batch.

Source: Kramár et al., "AtP*" (2403.00745), for the patching of subsets.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part
from interp_jax.core.sites import Site
from interp_jax.forward.metrics import Metric, finite, metric_values, prepared
from interp_jax.forward.node_effects import Cut, cut_pass, first_position, pass_from
from interp_jax.forward.nodes import NodeGroup, NodeSet, check_nodes, check_pair
from interp_jax.forward.sweeps import STEP_BYTES
from interp_jax.models import passes
from interp_jax.transforms.compilations import counted_jit
from interp_jax.transforms.running_pass import run

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel


@dataclass(frozen=True, eq=False, repr=False)
class SubsetPatching:
    """From subsets of nodes to what patching each of them does: a function of masks.

    Args:
        lm: The model.
        clean: Token ids of the prompts that are patched, int32 `[batch, pos]`.
        is_same: Which rows of the batch have the same prompt twice, bool `[batch]`.
        cut: The part of the pass over them that is run.
        sources: By site, the values that are put in, over the positions of that part.
        metric: A function from logits to `[batch]`.
        nodes: The nodes.
        plain: The metric of the pass without a patch, float32 `[batch]`.
        rows_per_step: How many subsets run side by side.
    """

    lm: LanguageModel
    clean: np.ndarray
    is_same: np.ndarray
    cut: Cut
    sources: dict[Site, Any]
    metric: Any
    nodes: NodeSet
    plain: np.ndarray
    rows_per_step: int

    def __call__(self, masks: Any) -> np.ndarray:
        """The effect of each subset, averaged over the batch.

        Args:
            masks: Which nodes each subset holds, bool `[subset, node]`.

        Returns:
            float64 `[subset]`.
        """
        return self.per_pair(masks).astype(np.float64).mean(0)

    def per_pair(self, masks: Any) -> np.ndarray:
        """The effect of each subset on each prompt.

        effect = metric(logits with all nodes of the subset patched) - metric(logits)

        Args:
            masks: Which nodes each subset holds, bool `[subset, node]`.

        Returns:
            float32 `[batch, subset]`.

        Raises:
            ShapeError: The masks are not bool `[subset, node]`.
            InvalidInputError: The metric is not finite with a subset patched.
        """
        masks = np.asarray(masks)
        if masks.dtype != bool or masks.ndim != 2 or masks.shape[1] != self.nodes.n_nodes:
            raise ShapeError(
                four_part(
                    f"Masks of {masks.dtype}{list(masks.shape)} were given",
                    where="SubsetPatching",
                    expected=f"one row per subset, bool[subset, {self.nodes.n_nodes}].",
                    fix="to patch single nodes give rows of np.eye(n_nodes, dtype=bool).",
                )
            )
        effects = _metrics(self, masks) - self.plain[:, None]
        # Two programs round differently; equal prompts have equal values all the same.
        return np.where(self.is_same[:, None], np.float32(0), effects)

    def __repr__(self) -> str:
        return f"SubsetPatching({len(self.clean)} pairs of {self.clean.shape[1]} tokens, {self.nodes!r})"


def subset_patching(
    lm: LanguageModel,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    nodes: NodeSet,
    *,
    rows_per_step: int | None = None,
) -> SubsetPatching:
    """What patching any subset of nodes at once does, as a function of which.

    Args:
        lm: The model.
        clean: Token ids of the prompts that are patched, `[batch, pos]`.
        corrupted: Token ids of the prompts the new values come from, `[batch, pos]`.
        metric: A function from logits to `[batch]`.
        nodes: The nodes that may be in a subset.
        rows_per_step: How many subsets run side by side; by default as many as `STEP_BYTES` allow.

    Returns:
        The function, bool `[subset, node]` to `[subset]`.

    Raises:
        ShapeError: The prompts differ in shape, or the metric does not return one float per row of the batch.
        InvalidInputError: The prompts are padded at different places, there are no nodes or they are of other prompts,
            the metric is not finite or reads a token or a position that is not there, or `rows_per_step` is not
            positive.
    """
    where = "subset_patching"
    clean, corrupted = check_pair(lm, clean, corrupted, where=where)
    check_nodes(nodes, clean, where=where)
    metric = prepared(metric, lm, clean, where=where)
    if rows_per_step is not None and rows_per_step < 1:
        raise InvalidInputError(
            four_part(
                f"rows_per_step={rows_per_step} was given", where=where, expected="1 or more.", fix="choose a number."
            )
        )
    names = [group.name for group in nodes.groups]
    cut = cut_pass(lm, clean, metric, first_position(clean, nodes, corrupted), names=names)
    if rows_per_step is None:
        bytes_per_row = lm.sites(clean).n_bytes * cut.args[-1].shape[1] // nodes.n_pos
        rows_per_step = int(np.clip(STEP_BYTES // max(1, bytes_per_row), 1, 64))
    fn, args, _ = pass_from(lm, corrupted, cut.start)
    sources = passes.read(fn, args, nodes.sites, where=where)
    is_same, zeros = (clean == corrupted).all(1), np.zeros(len(clean), np.float32)
    patching = SubsetPatching(lm, clean, is_same, cut, sources, metric, nodes, zeros, rows_per_step)
    # The empty subset, by the same program: so what changes nothing has an effect of exactly 0.
    return dataclasses.replace(patching, plain=_metrics(patching, np.zeros((1, nodes.n_nodes), bool))[:, 0])


def covered(group: NodeGroup, chosen: np.ndarray, *, n_pos: int) -> np.ndarray:
    """The positions and units that chosen nodes stand for.

    Args:
        group: The nodes of one name.
        chosen: Which of them, bool `[..., layer, position, unit]`.
        n_pos: Length of the prompts.

    Returns:
        Bool `[..., layer, n_pos, unit]`.
    """
    places = group.position_masks(n_pos)
    return np.einsum("...pu,pt->...tu", chosen, places)


def _metrics(patching: SubsetPatching, masks: np.ndarray) -> np.ndarray:
    """The metric with each subset patched, float32 `[batch, subset]`; all steps have one shape."""
    cut, nodes, n_steps = patching.cut, patching.nodes, patching.rows_per_step
    found = [np.zeros((0, len(patching.clean)), np.float32)]
    for start in range(0, len(masks), n_steps):
        rows = np.minimum(np.arange(start, start + n_steps), len(masks) - 1)
        by_site = {}
        for group in nodes.groups:
            cover = covered(group, nodes.grid(group.name, masks[rows]), n_pos=nodes.n_pos)[..., cut.start :, :]
            by_site |= {site: cover[:, i] for i, site in enumerate(group.sites)}
        sites, values = tuple(by_site), tuple(patching.sources[site] for site in by_site)
        metric = patching.metric if cut.until is None else None
        new = _run(cut.fn, sites, cut.until, cut.args, values, tuple(by_site.values()), metric)
        if cut.until is not None:
            new = cut.metric(cut.args[0], new)
        found.append(np.asarray(new)[: len(masks) - start])
    return finite(np.concatenate(found).T, where="subset_patching")


def _patched(
    fn: Any,
    sites: tuple[Site, ...],
    until: Site | None,
    args: tuple[Any, ...],
    sources: tuple[Any, ...],
    masks: tuple[Any, ...],
    metric: Any,
) -> jax.Array:
    """For every subset of one step the value at `until`, `[subset, batch, ...]`, or the metric, `[subset, batch]`."""
    source_of = dict(zip(sites, sources, strict=True))

    def one_subset(row: tuple[Any, ...]) -> jax.Array:
        mask_of = dict(zip(sites, row, strict=True))
        stops = sites if until is None else (*sites, until)
        with run(fn, *args, sites=stops) as running_pass:
            for layer, name, value in running_pass:
                if (site := Site(layer, name)) == until:
                    return value
                # [pos, unit] against [batch, pos, unit, ...]; a site without units has one that stands for all.
                mask = mask_of[site].reshape(1, *mask_of[site].shape, *(1,) * (value.ndim - 3))
                running_pass.modified_value = jnp.where(mask, source_of[site], value)
        return metric_values(metric, running_pass.retval, where="subset_patching")

    return jax.vmap(one_subset)(masks)


_run = counted_jit(_patched, name="subset_patching", static_argnums=(0, 1, 2))
