"""ACDC: its rule, its order, and that decisions made side by side are those made one at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, UnknownNameError
from interp_jax.forward.metrics import kl_divergence, logit_difference
from interp_jax.methods.circuits import acdc as module
from interp_jax.methods.circuits.acdc import acdc
from interp_jax.methods.circuits.edge_passes import patched_edges, sender_writes
from interp_jax.methods.circuits.graph import Circuit, EdgeGraph
from interp_jax.transforms.compilations import count_compilations
from tests.methods.circuits.induction import CIRCUIT, CLEAN, CORRUPTED, induction_model
from tests.methods.circuits.toys import toy


def find(lm, pair, threshold, **options):
    return acdc(lm, pair[0], pair[1], threshold=threshold, progress=False, **options)


@pytest.fixture
def lm(rng):
    return toy(rng)


def one_at_a_time(lm, pair, threshold, metric, order, start=None):
    """ACDC as it is written down: one pass per edge."""
    writes, tokens = sender_writes(lm, pair[1]), pair[0]
    value = jax.jit(lambda mask, metric: metric(patched_edges(lm, lm.params, tokens, writes, mask)).mean())
    graph = module.edge_model(lm, where="").graph
    mask = np.zeros(graph.shape, np.float32) if start is None else start.mask
    current = float(value(mask, metric))
    for v in reversed(range(graph.shape[1])):
        listeners = (graph.is_edge & (mask == 0))[graph.feeds[v]]
        for u in np.flatnonzero((graph.is_edge & (mask == 0))[:, v])[:: -1 if order == "reverse" else 1]:
            if v < graph.shape[1] - 1 and not listeners.any():
                mask[u, v] = 1
                continue
            trial = mask.copy()
            trial[u, v] = 1
            if (new := float(value(trial, metric))) - current < threshold:
                mask, current = trial, new
    return graph.is_edge & (mask == 0)


@pytest.mark.parametrize("order", ["default", "reverse"])
def test_decisions_are_those_made_one_at_a_time(lm, pair, order):
    metric = kl_divergence(lm(pair[0]))
    # So low that removing all 46 edges cannot stay below it at every step.
    threshold = float(metric(lm(pair[1])).mean()) / 100
    result = find(lm, pair, threshold, order=order)
    np.testing.assert_array_equal(result.circuit.is_kept, one_at_a_time(lm, pair, threshold, metric, order))
    assert 0 < result.circuit.n_edges < result.circuit.graph.n_edges == len(result.decisions)
    removed = [decision for decision in result.decisions if decision.is_removed]
    assert len(removed) == result.circuit.graph.n_edges - result.circuit.n_edges
    # Every step was below the threshold, so their sum is.
    assert result.final - result.full < threshold * len(removed)
    assert sum(decision.change for decision in removed) == pytest.approx(result.final - result.full, abs=1e-5)
    assert result.full == pytest.approx(0, abs=1e-6)


def test_a_circuit_to_start_with_is_all_there_is(lm, pair, rng):
    metric = kl_divergence(lm(pair[0]))
    graph = module.edge_model(lm, where="").graph
    start = Circuit(graph, graph.is_edge & (rng.random(graph.shape) < 0.7))
    threshold = float(metric(lm(pair[1])).mean()) / 100
    result = find(lm, pair, threshold, start=start)
    np.testing.assert_array_equal(result.circuit.is_kept, one_at_a_time(lm, pair, threshold, metric, "default", start))
    assert len(result.decisions) == start.n_edges
    # The whole model is still what it is compared with.
    assert result.full == pytest.approx(0, abs=1e-6)
    everything = find(lm, pair, threshold, start=Circuit(graph, graph.is_edge)).circuit
    np.testing.assert_array_equal(everything.is_kept, find(lm, pair, threshold).circuit.is_kept)


def test_thresholds_of_all_and_nothing(lm, pair):
    everything, nothing = (find(lm, pair, threshold).circuit for threshold in (-np.inf, np.inf))
    assert everything.n_edges == everything.graph.n_edges
    assert nothing.n_edges == 0


def test_all_runs_share_one_program(rng, pair):
    lm = toy(rng, n_layers=1, d_model=9)
    find(lm, pair, 0.1, metric=logit_difference(1, 2))
    with count_compilations() as new:
        find(
            lm, pair[::-1], 0.01, metric=logit_difference(4, 0), order="random", key=jax.random.key(3), is_absolute=True
        )
    assert new == []


def test_edges_without_weight_are_removed_and_no_others(rng, pair):
    lm = toy(rng, "linear")
    first, second = ({**layer} for layer in lm.params["layers"])
    first["W_O"] = first["W_O"].at[1].set(0)  # Head 0.1 writes nothing.
    second["W_V"] = second["W_V"].at[0].set(0)  # Head 1.0 reads nothing.
    second["W_in"] = 0 * second["W_in"]  # MLP 1 neither.
    object.__setattr__(lm, "params", lm.params | {"layers": [first, second]})
    # The last position's own token is to differ too, so that the input has a direct effect.
    pair = pair[0], np.where(np.arange(5) == 4, 10, pair[1]).astype(np.int32)
    # With a fixed pattern queries and keys have no say either.
    heard = {"0.head0": "0.head0.v", "0.mlp": "0.mlp", "1.head1": "1.head1.v", "logits": "logits"}
    graph = module.edge_model(lm, where="").graph
    expected = {
        (u, heard[v])
        for u in ("input", "0.head0", "0.mlp", "1.head1")
        for v in heard
        if graph.is_edge[graph.sender(u), graph.receiver(heard[v])]
    }
    result = find(lm, pair, 1e-9, metric=logit_difference(3, 7), is_absolute=True)
    assert set(result.circuit.edges) == expected
    # Strictly less: at a threshold of 0 an edge without effect stays.
    assert find(lm, pair, 0.0, metric=logit_difference(3, 7), is_absolute=True).circuit.n_edges == graph.n_edges


def gate(kind):
    """Two heads write 1 on token 1 and 0 on token 0; an MLP says whether either does, or how many do."""
    rng = np.random.default_rng(0)
    lm = toy(rng, "relu", n_layers=1, n_heads=2, d_model=4, d_head=1, d_mlp=2, d_vocab=2, n_ctx=1)
    zeros = {name: 0 * weight for name, weight in lm.params["layers"][0].items()}
    layer = zeros | {
        "W_V": zeros["W_V"].at[:, 0, 0].set(1.0),
        "W_O": zeros["W_O"].at[0, 0, 1].set(1.0).at[1, 0, 2].set(1.0),
    }
    if kind == "or":  # min(1, x + y) = 1 - relu(1 - x - y)
        layer["W_in"] = zeros["W_in"].at[1, 0].set(-1.0).at[2, 0].set(-1.0)
        layer["b_in"], layer["W_out"] = zeros["b_in"].at[0].set(1.0), zeros["W_out"].at[0, 3].set(-1.0)
        layer["b_out"] = zeros["b_out"].at[3].set(1.0)
    else:  # x + y
        layer["W_in"] = zeros["W_in"].at[1, 0].set(1.0).at[2, 0].set(1.0)
        layer["W_out"] = zeros["W_out"].at[0, 3].set(1.0)
    params = {
        "W_E": jnp.zeros((2, 4)).at[1, 0].set(1.0),
        "W_pos": jnp.zeros((1, 4)),
        "W_U": jnp.zeros((4, 2)).at[3, 0].set(-1.0),  # The metric is low when the MLP says yes.
        "ln_final_w": jnp.ones(4),
        "layers": [layer],
    }
    object.__setattr__(lm, "params", params)
    return lm


def first_logit(logits):
    return logits[:, -1, 0]


@pytest.mark.parametrize(("kind", "order", "heads"), [
    ("or", "default", {"0.head1"}),
    ("or", "reverse", {"0.head0"}),
    ("sum", "default", {"0.head0", "0.head1"}),
    ("sum", "reverse", {"0.head0", "0.head1"}),
])  # fmt: skip
def test_of_two_senders_that_do_the_same_one_stays_and_the_order_decides_which(kind, order, heads):
    pair = np.array([[1]], np.int32), np.array([[0]], np.int32)
    result = find(gate(kind), pair, 0.1, metric=first_logit, order=order)
    expected = {("0.mlp", "logits")} | {edge for h in heads for edge in ((h, "0.mlp"), ("input", f"{h}.v"))}
    assert set(result.circuit.edges) == expected


@pytest.mark.parametrize("options", [{}, {"order": "reverse"}, {"order": "random", "key": jax.random.key(0)}], ids=str)
def test_the_induction_circuit_is_recovered(options):
    lm = induction_model()
    result = find(lm, (CLEAN, CORRUPTED), 0.01, **options)
    assert set(result.circuit.edges) == CIRCUIT
    assert result.final < 0.1
    assert result.circuit.pruned().n_edges == 5


def test_silence_instead_of_another_prompt():
    lm = induction_model()
    result = find(lm, (CLEAN, "zero"), 0.01)
    assert ("1.head0", "logits") in result.circuit.edges
    assert ("0.head0", "1.head0.k") in result.circuit.edges
    assert all("head1" not in name for edge in result.circuit.edges for name in edge)


def test_mistakes_are_named(lm, pair):
    with pytest.raises(UnknownNameError, match=r"Unknown order 'reversed'[\s\S]*Did you mean 'reverse'"):
        find(lm, pair, 0.1, order="reversed")
    for threshold, options in ((np.nan, {}), (0.1, {"order": "random"}), (0.1, {"key": jax.random.key(0)})):
        with pytest.raises(InvalidInputError, match=r"threshold=[\s\S]*was given in acdc[\s\S]*Fix:"):
            find(lm, pair, threshold, **options)
    start = Circuit(EdgeGraph(n_layers=1, n_heads=1, n_kv_heads=1), np.zeros((3, 5), bool))
    with pytest.raises(InvalidInputError, match=r"A circuit of [\s\S]* was given as start in acdc[\s\S]*Fix:"):
        find(lm, pair, 0.1, start=start)
    with pytest.raises(InvalidInputError, match=r"7 \(int\) was given as the metric in acdc"):
        find(lm, pair, 0.1, metric=7)
