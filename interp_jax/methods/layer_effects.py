"""Layer effects: how much an answer depends on what each layer's attention and MLP write.

Each write to the residual stream is replaced by zeros, one at a time, and a metric of the logits (such as the
difference of two answers' logits) is compared with that of the clean pass. Two routes give the same numbers: a
plain loop over running passes, one pass per site, and a sweep, one compiled program for all of them.

    effects = layer_effects(lm, tokens, logit_difference(mary, john))
    effects.table("attn_out")        # [layer, batch]; negative: the answer loses without it

>>> result = LayerEffectsResult(np.array([2.0]), np.array([[0.5], [3.0]]), (Site(0, "attn_out"), Site(1, "attn_out")))
>>> result.effects[:, 0].tolist(), [str(site) for site, _ in result.strongest(1)]
([-1.5, 1.0], ['0.attn_out'])

Sharp edges: zero is not a value the model meets in training; where a site's mean is large, zeroing it also breaks
what the site does for every prompt. Effects of single sites do not add up.

Source: interp_jax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from interp_jax.core.errors import check_choice
from interp_jax.core.interventions import Masked
from interp_jax.core.sites import Selector, Site, select_sites
from interp_jax.forward.metrics import Metric, metric_values, prepared
from interp_jax.forward.sweeps import sweep

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

ROUTES = ("sweep", "loop")


@dataclass(frozen=True)
class LayerEffectsResult:
    """The metric with one site at a time zeroed.

    Args:
        clean: The metric of the untouched pass, `[batch]`.
        zeroed: The metric with the site zeroed, `[site, batch]`.
        sites: The sites, in execution order.
    """

    clean: np.ndarray
    zeroed: np.ndarray
    sites: tuple[Site, ...]

    @property
    def effects(self) -> np.ndarray:
        """The change zeroing makes, `zeroed - clean`, `[site, batch]`."""
        return self.zeroed - self.clean[None]

    def table(self, name: str) -> np.ndarray:
        """The effects of the sites of one name, `[layer, batch]`, in order of layers.

        Args:
            name: Name of the sites, such as "attn_out".

        Returns:
            The effects.

        Raises:
            UnknownNameError: There is no such site in the result.
        """
        picked = select_sites(name, self.sites, where="LayerEffectsResult.table")
        return self.effects[[self.sites.index(site) for site in picked]]

    def strongest(self, n: int, *, row: int = 0) -> list[tuple[Site, float]]:
        """The sites with the largest effects, whatever their sign, largest first.

        Args:
            n: How many.
            row: Which row of the batch.

        Returns:
            Pairs of site and effect.
        """
        order = np.argsort(-np.abs(self.effects[:, row]), kind="stable")[:n]
        return [(self.sites[index], float(self.effects[index, row])) for index in order]

    def __repr__(self) -> str:
        strongest = ", ".join(f"{site} {effect:+.2f}" for site, effect in self.strongest(3))
        return f"LayerEffectsResult({len(self.sites)} sites, batch {len(self.clean)}; strongest: {strongest})"


def layer_effects(
    lm: LanguageModel,
    tokens: Any,
    metric: Metric,
    *,
    sites: Selector = ("attn_out", "mlp_out"),
    route: str = "sweep",
    progress: bool = True,
) -> LayerEffectsResult:
    """Zero each site in turn and measure what the metric becomes.

    effect[site] = metric(logits with site := 0) - metric(logits)

    Args:
        lm: The model.
        tokens: Token ids, `[batch, pos]`.
        metric: A function from logits to `[batch]` floats.
        sites: Which sites, each zeroed alone.
        route: "sweep" (one compiled program for all sites) or "loop" (one running pass per site).
        progress: Whether to show a progress bar, on a terminal.

    Returns:
        The metric with each site zeroed.

    Raises:
        UnknownNameError: A selector matches no site, or the route is unknown.
        ShapeError: The metric does not return one float per row of the batch.
        InvalidInputError: The metric reads a token or a position that is not there.
    """
    check_choice(route, ROUTES, what="route", where="layer_effects")
    tokens = np.asarray(lm.check_tokens(tokens, where="layer_effects"))
    metric = prepared(metric, lm, tokens, where="layer_effects")
    chosen = tuple(select_sites(sites, lm.sites(tokens).sites, where="layer_effects"))
    by_route = _by_sweep if route == "sweep" else _by_loop
    clean, *zeroed = by_route(lm, tokens, metric, chosen, progress)
    return LayerEffectsResult(np.asarray(clean), np.asarray(zeroed).reshape(len(chosen), len(clean)), chosen)


def _by_sweep(lm: LanguageModel, tokens: Any, metric: Metric, sites: tuple[Site, ...], progress: bool) -> np.ndarray:
    """Row 0 is the clean pass; row i + 1 zeroes site i."""
    is_zeroed = np.eye(len(sites) + 1, dtype=bool)[:, 1:]
    table = {site: Masked(0.0, is_zeroed[:, index]) for index, site in enumerate(sites)}
    return sweep(lm, tokens, table, metric, progress=progress)


def _by_loop(
    lm: LanguageModel, tokens: Any, metric: Metric, sites: tuple[Site, ...], progress: bool
) -> list[np.ndarray]:
    values = []
    passes = tqdm([None, *sites], desc="loop", unit="pass", disable=None if progress else True, leave=False)
    for zeroed in passes:
        for layer, name, value in (running_pass := lm.run(tokens, sites=sites)):
            if Site(layer, name) == zeroed:
                running_pass.modified_value = jnp.zeros_like(value)
        values.append(np.asarray(metric_values(metric, running_pass.retval, where="layer_effects")))
    return values
