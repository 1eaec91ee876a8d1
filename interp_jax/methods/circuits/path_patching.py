"""Path patching: the effect of some senders through their direct paths to some receivers.

Three passes. The corrupted run gives what the senders write there. A clean run in which the senders write that, all
other heads are frozen to their clean output (and MLPs too, if asked) gives what the receivers then read. A last clean
run in which the receivers, and they alone, read that gives the metric:

    effect = metric(receivers read what the senders' direct paths bring) - metric(clean)

    result = path_patching(lm, tokens, corrupted, metric, receivers="logits")          # each sender alone
    result.effects                                                                     # [senders, batch]

>>> result = PathPatchingResult(np.array([2.0]), np.array([[0.5], [3.0]]), (("0.head1",), ("1.mlp",)))
>>> result.effects[:, 0].tolist()
[-1.5, 1.0]

Sharp edges: MLPs are recomputed by default, so that a path may lead through them, as in the work on indirect object
identification; with `freeze_mlps` only edges count. A kv_head receiver is read by all heads of its group.

Source: Wang et al., Interpretability in the wild (2211.00593), and Goldowsky-Dill et al. (2304.05969).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
from interp_jax.methods.circuits.edge_passes import checked_writes, run_edges
from interp_jax.transforms.compilations import counted_jit
from interp_jax.transforms.running_pass import run

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel


@dataclass(frozen=True)
class PathPatchingResult:
    """The metric when receivers read what some senders' direct paths bring.

    Args:
        clean: The metric of the clean run, `[batch]`.
        patched: The metric for each group of senders, `[group, batch]`.
        senders: Names of the senders of each group.
    """

    clean: np.ndarray
    patched: np.ndarray
    senders: tuple[tuple[str, ...], ...]

    @property
    def effects(self) -> np.ndarray:
        """The change of the metric, `patched - clean`, `[group, batch]`."""
        return self.patched - self.clean[None]


def path_patching(
    lm: LanguageModel,
    tokens: Any,
    corrupted: Any,
    metric: Metric,
    *,
    receivers: str | Iterable[str],
    senders: Sequence[str | Iterable[str]] | None = None,
    freeze_mlps: bool = False,
    progress: bool = True,
) -> PathPatchingResult:
    """Measure the effect of senders on the metric through their direct paths to receivers.

    Args:
        lm: The model.
        tokens: Clean token ids, `[batch, pos]`.
        corrupted: Corrupted token ids, aligned with the clean ones.
        metric: A function from logits to `[batch]` floats.
        receivers: Names of receivers, such as "logits" or ["9.head6.q", "9.head9.q"]; `edge_graph(lm).receivers`.
        senders: Groups of senders to corrupt together, a name or several each; by default every sender alone.
        freeze_mlps: Whether MLPs between senders and receivers keep their clean output.
        progress: Whether to show a progress bar, on a terminal.

    Returns:
        The metric for each group.

    Raises:
        UnknownNameError: There is no such sender or receiver.
        ShapeError: Tokens of two lengths, or a metric that does not return one float per row.
        InvalidInputError: No receivers, padding at different places, or a metric that is not finite.
        UnsupportedModelError: The model's residual stream is no sum of heads and MLPs.

    Source: Wang et al. 2211.00593, section 3.1; Goldowsky-Dill et al. 2304.05969.
    """
    model = edge_model(lm, where="path_patching")
    graph = model.graph
    read = [graph.receiver(name) for name in ([receivers] if isinstance(receivers, str) else receivers)]
    if not read:
        raise InvalidInputError(
            four_part(
                "No receivers were given",
                where="path_patching",
                expected='at least one, such as "logits".',
                fix="choose among edge_graph(lm).receivers.",
            )
        )
    if senders is None:
        senders = [node.name for node in graph.senders]
    groups = tuple((group,) if isinstance(group, str) else tuple(group) for group in senders)
    is_sender = np.zeros((len(groups), graph.shape[0]), bool)
    for row, group in enumerate(groups):
        is_sender[row, [graph.sender(name) for name in group]] = True
    is_receiver = np.zeros(graph.shape[1], bool)
    is_receiver[read] = True

    clean, other = check_pair(lm, tokens, corrupted, where="path_patching")
    metric = prepared(metric, lm, clean, where="path_patching")
    writes = [checked_writes(model, lm.params, part, where="path_patching") for part in (clean, other)]
    no_one = np.zeros(graph.shape[0], bool)
    values = []
    for who in tqdm([no_one, *is_sender], desc="path patching", disable=None if progress else True, leave=False):
        value = _metric_of_paths(model, lm.params, clean, *writes, who, is_receiver, np.bool_(freeze_mlps), metric)
        values.append(finite(value, where="path_patching"))
    return PathPatchingResult(values[0], np.array(values[1:]).reshape(len(groups), len(clean)), groups)


class _Recorded:
    """The policy that has some receivers read what was recorded in another pass.

    Args:
        is_receiver: Which receivers, bool `[receiver]`.
        resids: What was recorded: the residual every receiver of these rows reads, by their first row.
    """

    def __init__(self, is_receiver: jax.Array, resids: dict[int, jax.Array]):
        self._is_receiver, self._resids = is_receiver, resids

    def reads(self, rows: slice, resid: jax.Array) -> jax.Array:
        """See `Policy`."""
        shape = (rows.stop - rows.start, *resid.shape)
        is_read = jnp.broadcast_to(self._is_receiver[rows].reshape(-1, *[1] * resid.ndim), shape)
        recorded = jnp.broadcast_to(self._resids[rows.start], shape)
        return jnp.where(is_read, recorded, jnp.broadcast_to(resid, shape))

    def writes(self, values: jax.Array) -> None:
        """See `Policy`."""


def _frozen_resids(
    model: EdgeModel,
    params: Any,
    tokens: Any,
    writes: tuple[jax.Array, jax.Array],
    is_sender: jax.Array,
    freeze_mlps: jax.Array,
) -> dict[int, jax.Array]:
    """The residual stream where receivers read it, when senders write their corrupted values and others are frozen."""
    graph, last = model.graph, model.graph.n_layers - 1
    clean, corrupted = writes
    written, resids = 0, {}

    def wanted(n: int) -> jax.Array:
        rows = slice(written, written + n)
        is_corrupted = jnp.broadcast_to(is_sender[rows].reshape(-1, 1, 1, 1), clean[rows].shape)
        return jnp.where(is_corrupted, corrupted[rows], clean[rows])

    for layer, name, value in (steps := run(model.upstream.forward, params, tokens, sites=(*model.stops, "attn_out"))):
        assert layer is not None
        own, new = value.astype(jnp.float32), None
        if name == "resid_pre":
            if layer == 0:
                new = own = wanted(1)[0]
                written += 1
            resids[model.attention_rows(layer).start] = own
            if graph.is_parallel and graph.has_mlps:
                resids[model.rows(layer, "mlp").start] = own
        elif name == "attn_out":
            # All heads write what is wanted of them; what else is in here (a bias) is the same in every run.
            written_here = wanted(graph.n_heads).sum(0)
            new = written_here + _constant(model, params, layer, written_here)
            written += graph.n_heads
        elif name == "resid_mid":
            resids[model.rows(layer, "mlp").start] = own
        elif name == "mlp_out":
            is_given = jnp.broadcast_to(freeze_mlps | is_sender[written], own.shape)
            new = jnp.where(is_given, wanted(1)[0], own)
            written += 1
        elif name == "resid_post" and layer == last:
            resids[graph.shape[1] - 1] = own
        if new is not None:
            steps.modified_value = new.astype(value.dtype)
    return resids


def _constant(model: EdgeModel, params: Any, layer: int, like: jax.Array) -> jax.Array:
    """Attention's output bias, broadcast."""
    if "b_O" not in model.upstream.layer_weights:
        return jnp.zeros_like(like)
    return jnp.broadcast_to(model.weight(params, "b_O", layer), like.shape)


def _value(
    model: EdgeModel,
    params: Any,
    tokens: Any,
    clean: jax.Array,
    corrupted: jax.Array,
    is_sender: Any,
    is_receiver: Any,
    freeze_mlps: Any,
    metric: Any,
) -> jax.Array:
    resids = _frozen_resids(model, params, tokens, (clean, corrupted), jnp.asarray(is_sender), jnp.asarray(freeze_mlps))
    logits = run_edges(model, params, tokens, _Recorded(jnp.asarray(is_receiver), resids))
    return metric_values(metric, logits, where="path_patching")


_metric_of_paths = counted_jit(_value, name="path patching", static_argnums=0)
