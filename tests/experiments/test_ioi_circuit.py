"""From a prompt to a circuit, at smoke size: each step takes up what the one before it found."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError
from interp_jax.core.results import load_result, save_result
from interp_jax.data.prompts import induction_pairs
from interp_jax.experiments import ioi_circuit
from interp_jax.experiments.ioi_circuit import SMOKE
from interp_jax.forward.metrics import logit_difference
from interp_jax.methods.circuits.edge_passes import patched_edges, sender_writes


@pytest.fixture(scope="module")
def result(tiny_llama):
    return ioi_circuit.run(SMOKE, lm=tiny_llama, progress=False)


def test_the_circuit_is_faithful_by_definition(tiny_llama, result):
    pairs = induction_pairs(tiny_llama.config.d_vocab, 1)
    metric, writes = logit_difference(pairs.answer, pairs.wrong), sender_writes(tiny_llama, pairs.corrupted)

    @jax.jit
    def logits(mask):
        return patched_edges(tiny_llama, tiny_llama.params, pairs.clean, writes, mask)

    def value(mask):
        return float(metric(logits(mask))[0])

    graph = result.circuit.graph
    full, empty = value(np.zeros(graph.shape, np.float32)), value(np.ones(graph.shape, np.float32))
    assert full == pytest.approx(float(result.nodes.plain[0]), abs=1e-4)
    for circuit, measured in zip((result.start, result.circuit), result.faithful.faithfulness, strict=True):
        assert measured == pytest.approx((value(circuit.mask) - empty) / (full - empty), abs=1e-3)
    assert 0.5 <= result.faithful.faithfulness[0] <= 1.5


def test_each_step_goes_on_from_the_last(result):
    graph = result.circuit.graph
    # The start is EAP-IG's smallest circuit that is faithful enough, and ACDC takes edges from it.
    sizes = [n for n, at in zip(SMOKE.sizes, result.curves["eap_ig"].faithfulness, strict=True) if 0.5 <= at <= 1.5]
    expected = result.edges["eap_ig"].top(sizes[0]).pruned()
    np.testing.assert_array_equal(result.start.is_kept, expected.is_kept)
    assert 0 < result.circuit.n_edges <= result.pruned.circuit.n_edges < result.start.n_edges < graph.n_edges
    assert not (result.circuit.is_kept & ~result.start.is_kept).any()
    assert len(result.pruned.decisions) == result.start.n_edges
    # EAP and EAP-IG are two estimates.
    eap, integrated = (result.edges[name].scores[graph.is_edge] for name in ("eap", "eap_ig"))
    assert np.abs(eap - integrated).max() > 1e-4
    # Who is asked: the circuit's own nodes; the movers are the heads that reach the logits directly, strongest first.
    nodes = [(node.name,) for node in result.circuit.senders]
    assert list(result.direct.senders) == list(result.informants.senders) == nodes
    heads = [name for name, _ in ioi_circuit.strongest(result.direct, len(nodes)) if "head" in name]
    assert result.movers == tuple(heads[:1])
    assert np.abs(result.direct.effects).max() > 1e-3


def test_the_result_is_saved_with_its_figures(result, tmp_path):
    path = save_result(result, name="ioi_circuit", config=SMOKE, figures=ioi_circuit.plot(result), root=tmp_path)
    saved = load_result(path)
    np.testing.assert_array_equal(saved.result["circuit"]["is_kept"], result.circuit.is_kept)
    np.testing.assert_array_equal(saved.result["edges"]["eap_ig"]["scores"], result.edges["eap_ig"].scores)
    figures = {file.name for file in path.rglob("*") if file.suffix in (".png", ".html")}
    pages = {f"{kind}.{end}" for kind in ("nodes", "circuit") for end in ("png", "html")}
    assert figures == pages | {"faithfulness_eap.png", "faithfulness_eap_ig.png"}
    assert f"after ACDC: {result.circuit.n_edges} edges, faithfulness" in repr(result)


def test_no_circuit_is_faithful_enough(result):
    strict = dataclasses.replace(SMOKE, enough=1.0)
    circuits = [result.edges["eap_ig"].top(n).pruned() for n in SMOKE.sizes]
    with pytest.raises(InvalidInputError, match=r"No circuit of EAP-IG is faithful enough: [\s\S]*Fix: ask for larger"):
        ioi_circuit._first_faithful(strict, circuits, result.curves["eap_ig"])
