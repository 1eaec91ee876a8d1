"""Faithfulness: how much of a model's behaviour a circuit has, when all edges outside it are corrupted.

    faithfulness(C) = (metric(C) - metric(no edges)) / (metric(all edges) - metric(no edges))

With no edges the model computes its corrupted run. Circuits are data of one compiled program: a curve over sizes
compiles once, and each circuit costs one forward pass.

    faithfulness(lm, tokens, corrupted, metric, [result.greedy(n).pruned() for n in (10, 100, 1000)]).faithfulness

>>> FaithfulnessResult(full=np.array([3.0]), empty=np.array([1.0]), kept=np.array([[2.5]]), n_edges=(7,)).faithfulness
array([0.75])

Sharp edges: it can exceed 1 (a circuit without the edges that work against the answer) and be negative. Where the
clean and the corrupted metric are the same it is NaN. Metrics are averaged over the batch before the ratio is taken.

Source: Hanna et al. (2403.17806) for the normalised form; Goldowsky-Dill et al. (2304.05969) for the unexplained part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.forward.metrics import Metric, finite, metric_values, prepared
from interp_jax.forward.nodes import check_pair
from interp_jax.methods.circuits.edge_model import EdgeModel, edge_model
from interp_jax.methods.circuits.edge_passes import Mixing, checked_writes, run_edges
from interp_jax.methods.circuits.graph import Circuit
from interp_jax.transforms.compilations import counted_jit

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

# Where clean and corrupted metrics are closer than this, their ratio means nothing.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class FaithfulnessResult:
    """The metric of some circuits, of the whole model, and of the model without edges.

    Args:
        full: The metric of the whole model, `[batch]`.
        empty: The metric with every edge corrupted, `[batch]`.
        kept: The metric of each circuit, `[circuit, batch]`.
        n_edges: Number of edges of each circuit.
    """

    full: np.ndarray
    empty: np.ndarray
    kept: np.ndarray
    n_edges: tuple[int, ...]

    @property
    def faithfulness(self) -> np.ndarray:
        """(metric(circuit) - metric(no edges)) / (metric(model) - metric(no edges)), `[circuit]`."""
        empty = self.empty.mean()
        whole = float(self.full.mean() - empty)
        part = self.kept.mean(1) - empty
        return part / whole if abs(whole) > TOLERANCE else np.full_like(part, np.nan)

    @property
    def unexplained(self) -> np.ndarray:
        """mean |metric(circuit) - metric(model)| / mean |metric(no edges) - metric(model)|, `[circuit]`.

        Differences are taken example by example, so that examples on which a circuit is wrong in opposite directions
        do not make up for each other.
        """
        whole = float(np.abs(self.empty - self.full).mean())
        part = np.abs(self.kept - self.full[None]).mean(1)
        return part / whole if whole > TOLERANCE else np.full_like(part, np.nan)


def faithfulness(
    lm: LanguageModel,
    tokens: Any,
    corrupted: Any,
    metric: Metric,
    circuits: Circuit | Sequence[Circuit],
    *,
    progress: bool = True,
) -> FaithfulnessResult:
    """Run the model with all edges outside a circuit corrupted, and compare the metric with the whole model's.

    Args:
        lm: The model.
        tokens: Clean token ids, `[batch, pos]`.
        corrupted: Corrupted token ids, aligned with the clean ones.
        metric: A function from logits to `[batch]` floats.
        circuits: One circuit or several.
        progress: Whether to show a progress bar, on a terminal.

    Returns:
        The metric of each.

    Raises:
        ShapeError: Tokens of two lengths, or a metric that does not return one float per row.
        InvalidInputError: A circuit of another model's graph, padding at different places, a metric not finite.
        UnsupportedModelError: The model's residual stream is no sum of heads and MLPs.

    Source: Hanna et al. 2403.17806.
    """
    circuits = [circuits] if isinstance(circuits, Circuit) else list(circuits)
    model = edge_model(lm, where="faithfulness")
    if strange := [circuit for circuit in circuits if circuit.graph != model.graph]:
        raise InvalidInputError(
            four_part(
                f"{len(strange)} circuits of {strange[0].graph} were given",
                where="faithfulness",
                expected=f"circuits of this model's graph, {model.graph}.",
                fix="find the circuit on this model.",
            )
        )
    clean, other = check_pair(lm, tokens, corrupted, where="faithfulness")
    metric = prepared(metric, lm, clean, where="faithfulness")
    writes = checked_writes(model, lm.params, other, where="faithfulness")
    everything = np.zeros(model.graph.shape, np.float32)
    masks = [everything, 1 - everything, *(circuit.mask for circuit in circuits)]
    bar = tqdm(masks, desc="faithfulness", unit="pass", disable=None if progress else True, leave=False)
    values = [np.asarray(_metric_of_mask(model, lm.params, clean, writes, mask, metric)) for mask in bar]
    full, empty, *kept = finite(np.stack(values), where="faithfulness")
    stacked = np.stack(kept) if kept else np.zeros((0, len(full)), np.float32)
    return FaithfulnessResult(full, empty, stacked, tuple(circuit.n_edges for circuit in circuits))


def _value(model: EdgeModel, params: Any, tokens: Any, writes: jax.Array, mask: Any, metric: Any) -> jax.Array:
    logits = run_edges(model, params, tokens, Mixing(jnp.asarray(mask), writes))
    return metric_values(metric, logits, where="faithfulness")


_metric_of_mask = counted_jit(_value, name="faithfulness", static_argnums=0)
