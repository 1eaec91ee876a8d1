"""ACDC: remove every edge of a model that its answer can do without, one after the other.

Receivers are visited from the output to the input. Each incoming edge is corrupted in turn, on top of all that are
corrupted already, and stays so if the metric (lower is better) rises by less than the threshold:

    remove e  iff  metric(H without e) - metric(H) < threshold;        then H := H without e

A receiver whose node nobody listens to any more loses its edges without a pass. Several decisions are prepared side by
side: each step guesses that the next decisions go like the last one, runs those passes as one batch, and drops what
came after a wrong guess, so the result is that of one edge at a time.

    result = acdc(lm, tokens, corrupted, threshold=0.01)
    result.circuit.edges

>>> float(kl_divergence(jnp.zeros((1, 2, 3)))(jnp.zeros((1, 2, 3)))[0])
0.0

Sharp edges: the comparison is strict, so a threshold of 0 keeps an edge without any effect; it has to be positive to
prune dead edges. The result depends on the order of senders. One forward pass per edge: about 70 000 for SmolLM2, so
let EAP rank them first and `start` from those.

Source: Conmy et al., Towards automated circuit discovery (2304.14997).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from interp_jax.core.errors import InvalidInputError, check_choice, four_part
from interp_jax.forward.metrics import Metric, finite, kl_divergence, metric_values, prepared
from interp_jax.forward.nodes import check_pair
from interp_jax.methods.circuits.edge_model import EdgeModel, edge_model
from interp_jax.methods.circuits.edge_passes import Mixing, checked_writes, run_edges
from interp_jax.methods.circuits.graph import Circuit, EdgeGraph
from interp_jax.transforms.compilations import counted_jit

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

ORDERS = ("default", "reverse", "random")
# Most passes of one step, and the bytes their residual streams may take.
STEP_PASSES, STEP_BYTES = 16, 2**28


class Decision(NamedTuple):
    """What was decided about one edge.

    Args:
        sender: Name of the sender.
        receiver: Name of the receiver.
        change: The metric without the edge minus the metric with it; 0 for edges into nodes nobody listens to.
        is_removed: Whether the edge was removed.
    """

    sender: str
    receiver: str
    change: float
    is_removed: bool


@dataclass(frozen=True)
class ACDCResult:
    """What ACDC left.

    Args:
        circuit: The edges kept.
        full: The metric of the whole model, mean over the batch.
        final: The metric of the circuit.
        decisions: One per edge that there was to begin with, in the order they were made.
        threshold: By how much the metric was allowed to rise per edge.
    """

    circuit: Circuit
    full: float
    final: float
    decisions: tuple[Decision, ...]
    threshold: float


def acdc(
    lm: LanguageModel,
    tokens: Any,
    corrupted: Any,
    *,
    threshold: float,
    metric: Metric | None = None,
    start: Circuit | None = None,
    order: str = "default",
    key: jax.Array | None = None,
    is_absolute: bool = False,
    progress: bool = True,
) -> ACDCResult:
    """Find the edges whose removal, on top of all removed before, raises the metric by the threshold or more.

    Args:
        lm: The model.
        tokens: Clean token ids, `[batch, pos]`.
        corrupted: Corrupted token ids, aligned with the clean ones; or "zero", to remove an edge by silence.
        threshold: How much the metric may rise when an edge is removed, in the metric's unit.
        metric: From logits to `[batch]` floats, lower is better; by default the divergence of the last position's
            prediction from the whole model's, in nats.
        start: The circuit to begin with, such as the edges that EAP ranks first; all others are removed beforehand. By
            default the whole model.
        order: Order of the senders of a receiver: "default" (first layers first), "reverse" or "random".
        key: PRNG key for the random order.
        is_absolute: Whether to compare the size of the change with the threshold, so that edges that work against
            the metric are kept too.
        progress: Whether to show a progress bar, on a terminal.

    Returns:
        The circuit, and every decision that led to it.

    Raises:
        ShapeError: Tokens of two lengths, or a metric that does not return one float per row.
        InvalidInputError: A threshold or metric that is NaN, padding at different places, a random order without key,
            a circuit of another model to start with.
        UnknownNameError: An unknown order.
        UnsupportedModelError: The model's residual stream is no sum of heads and MLPs.

    Source: Conmy et al. 2304.14997, algorithm 1.
    """
    _check_settings(threshold, order, key)
    model = edge_model(lm, where="acdc")
    if start is not None and start.graph != model.graph:
        raise InvalidInputError(
            four_part(
                f"A circuit of {start.graph} was given as start",
                where="acdc",
                expected=f"a circuit of this model's graph, {model.graph}.",
                fix="find the circuit on this model, or leave start out.",
            )
        )
    if is_silent := isinstance(corrupted, str) and corrupted == "zero":
        clean = other = np.asarray(lm.check_tokens(tokens, where="acdc"))
    else:
        clean, other = check_pair(lm, tokens, corrupted, where="acdc")
    metric = prepared(kl_divergence(lm(clean)) if metric is None else metric, lm, clean, where="acdc")
    writes = checked_writes(model, lm.params, other, where="acdc")
    if is_silent:
        writes = jnp.zeros_like(writes)
    n_passes = _passes_that_fit(writes.nbytes)

    def evaluate(masks: np.ndarray) -> np.ndarray:
        filled = np.concatenate([masks, np.repeat(masks[-1:], n_passes - len(masks), axis=0)])
        values = _metric_of_masks(model, lm.params, clean, writes, filled, metric)
        return finite(values, where="acdc")[: len(masks)]

    is_kept = model.graph.is_edge if start is None else start.is_kept
    search = _Search(model.graph, evaluate, n_passes, threshold, is_absolute, is_kept)
    hidden = None if progress else True
    with tqdm(total=int(is_kept.sum()), desc="acdc", unit="edge", disable=hidden, leave=False) as bar:
        for receiver in reversed(range(model.graph.shape[1])):
            for decision in search.visit(receiver, _ordered(is_kept, receiver, order, key)):
                search.decisions.append(decision)
                bar.update()
    final = float(evaluate(search.is_removed[None])[0])
    circuit = Circuit(model.graph, model.graph.is_edge & ~search.is_removed)
    return ACDCResult(circuit, search.full, final, tuple(search.decisions), float(threshold))


class _Search:
    """The edges removed so far and the metric without them.

    Args:
        graph: The edge graph.
        evaluate: From masks `[pass, sender, receiver]`, at most `n_passes`, to the mean metric of each.
        n_passes: How many passes a step has.
        threshold: How much the metric may rise.
        is_absolute: Whether the size of the change counts.
        is_kept: The edges to begin with, `[sender, receiver]`.
    """

    def __init__(
        self, graph: EdgeGraph, evaluate: Any, n_passes: int, threshold: float, is_absolute: bool, is_kept: np.ndarray
    ):
        self._graph, self._evaluate, self._n_passes = graph, evaluate, n_passes
        self._threshold, self._is_absolute = threshold, is_absolute
        self.is_removed = graph.is_edge & ~is_kept
        self.full = float(evaluate(np.zeros((1, *graph.shape), bool))[0])
        self.metric = float(evaluate(self.is_removed[None])[0])
        self.decisions: list[Decision] = []
        self._last_removed = True

    def visit(self, receiver: int, senders: list[int]) -> Iterator[Decision]:
        """Decide about the edges into a receiver, in the order of its senders."""
        graph, name = self._graph, self._graph.receivers[receiver].name
        fed = graph.feeds[receiver]
        is_heard = receiver == graph.shape[1] - 1 or (graph.is_edge & ~self.is_removed)[fed].any()
        if not is_heard:
            self.is_removed[senders, receiver] = True
            yield from (Decision(graph.senders[sender].name, name, 0.0, True) for sender in senders)
            return
        while senders:
            ahead, guess = senders[: self._n_passes], self._last_removed
            trials = np.repeat(self.is_removed[None], len(ahead), axis=0)
            for index, sender in enumerate(ahead):
                # If all before it are removed, they are missing here too; if they are kept, only this one is.
                trials[index:, sender, receiver] |= guess
                trials[index, sender, receiver] = True
            for sender, metric in zip(ahead, self._evaluate(trials), strict=True):
                change = float(metric) - self.metric
                self._last_removed = (abs(change) if self._is_absolute else change) < self._threshold
                senders = senders[1:]
                if self._last_removed:
                    self.is_removed[sender, receiver], self.metric = True, float(metric)
                yield Decision(graph.senders[sender].name, name, change, self._last_removed)
                if self._last_removed != guess:
                    break


def _value(model: EdgeModel, params: Any, tokens: Any, writes: jax.Array, masks: Any, metric: Any) -> jax.Array:
    def one(mask: jax.Array) -> jax.Array:
        logits = run_edges(model, params, tokens, Mixing(mask, writes))
        return metric_values(metric, logits, where="acdc").mean()

    return jax.vmap(one)(masks)


_metric_of_masks = counted_jit(_value, name="acdc", static_argnums=0)


def _passes_that_fit(n_bytes: int) -> int:
    """A power of two; each pass holds about two copies of the writes."""
    passes = STEP_PASSES
    while passes > 1 and 2 * passes * n_bytes > STEP_BYTES:
        passes //= 2
    return passes


def _ordered(is_kept: np.ndarray, receiver: int, order: str, key: jax.Array | None) -> list[int]:
    senders = np.flatnonzero(is_kept[:, receiver])
    if order == "random":
        assert key is not None
        senders = np.asarray(jax.random.permutation(jax.random.fold_in(key, receiver), senders))
    return senders[:: -1 if order == "reverse" else 1].tolist()


def _check_settings(threshold: Any, order: str, key: Any) -> None:
    check_choice(order, ORDERS, what="order", where="acdc")
    if math.isnan(threshold) or (order == "random") != (key is not None):
        raise InvalidInputError(
            four_part(
                f"threshold={threshold}, order={order!r} with {'no' if key is None else 'a'} key was given",
                where="acdc",
                expected="a threshold that is a number, and a key if and only if the order is random.",
                fix='pass order="random", key=jax.random.key(0), or neither.',
            )
        )
