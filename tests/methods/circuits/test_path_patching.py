"""Path patching against its identities, against edges, and against NumPy pass by pass."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, UnknownNameError
from interp_jax.forward.metrics import logit_difference
from interp_jax.methods.circuits.edge_model import edge_graph
from interp_jax.methods.circuits.edge_passes import patched_edges, sender_writes
from interp_jax.methods.circuits.path_patching import path_patching
from interp_jax.transforms.compilations import count_compilations
from tests.methods.circuits.toys import Plain, toy

METRIC = logit_difference(3, 7)


def effects(lm, pair, receivers, senders=None, **options):
    return path_patching(lm, pair[0], pair[1], METRIC, receivers=receivers, senders=senders, progress=False, **options)


def metric_of(logits):
    return logits[:, -1, 3] - logits[:, -1, 7]


@pytest.mark.parametrize("shape", [{}, {"n_heads": 4, "n_kv_heads": 2, "is_parallel": True}], ids=["plain", "parallel"])
def test_every_set_of_paths_is_what_numpy_computes_pass_by_pass(rng, pair, shape):
    lm = toy(rng, **shape)
    plain, graph = Plain(lm), edge_graph(lm)
    kv = "kv_head" if shape else "head"
    cases = [
        (("0.head0", "0.mlp"), ("1.head1.q", f"1.{kv}0.v", "1.mlp")),
        (("input",), (f"1.{kv}1.k", "0.mlp")),
        (("0.head1", "1.head0"), ("logits", "1.head0.q")),
    ]
    for freeze_mlps in (False, True):
        for senders, receivers in cases:
            result = effects(lm, pair, receivers, [senders], freeze_mlps=freeze_mlps)
            indices = {graph.sender(name) for name in senders}, {graph.receiver(name) for name in receivers}
            expected = metric_of(plain.paths(pair[0], pair[1], *indices, freeze_mlps=freeze_mlps))
            np.testing.assert_allclose(result.patched[0], expected, rtol=1e-3, atol=1e-4)


def test_identities(tiny):
    pair = np.array([[5, 80, 3, 7], [9, 2, 7, 1]], np.int32), np.array([[5, 81, 3, 9], [9, 1, 7, 2]], np.int32)
    graph = edge_graph(tiny)
    everyone, everywhere = ([node.name for node in nodes] for nodes in (graph.senders, graph.receivers))
    result = effects(tiny, pair, everywhere, [(), everyone])
    assert (result.effects[0] == 0).all()
    np.testing.assert_allclose(result.clean, metric_of(tiny(pair[0])), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.patched[1], metric_of(tiny(pair[1])), rtol=1e-4, atol=1e-4)

    with count_compilations() as new:
        direct = effects(tiny, pair, "logits", freeze_mlps=True)
    assert new == []
    # With all else frozen only the final norm is left: the model's own, on a residual that has changed by the write.
    difference = sender_writes(tiny, pair[1]) - sender_writes(tiny, pair[0])
    last = tiny.reap(pair[0], f"{graph.n_layers - 1}.resid_post")[f"{graph.n_layers - 1}.resid_post"]
    for row in (0, 1, len(everyone) - 1):
        expected = metric_of(tiny.unembed(tiny.ln_final(last + difference[row])))
        np.testing.assert_allclose(direct.patched[row], expected, rtol=1e-3, atol=1e-4)
    assert direct.senders == tuple((name,) for name in everyone)


def test_with_frozen_mlps_the_paths_to_one_receiver_are_edges(rng, pair):
    lm = toy(rng)
    graph, writes = edge_graph(lm), sender_writes(lm, pair[1])
    patch = jax.jit(lambda mask: patched_edges(lm, lm.params, pair[0], writes, mask))
    for receiver, senders in (("1.head1.k", ("input", "0.head0", "0.mlp")), ("1.mlp", ("0.head1", "1.head0"))):
        mask = np.zeros(graph.shape, np.float32)
        mask[[graph.sender(name) for name in senders], graph.receiver(receiver)] = 1
        result = effects(lm, pair, receiver, [senders], freeze_mlps=True)
        np.testing.assert_allclose(result.patched[0], metric_of(patch(mask)), rtol=1e-4, atol=1e-5)
        assert np.abs(result.effects).max() > 1e-4


def test_on_a_linear_model_the_direct_effect_is_the_logit_attribution(rng, pair):
    lm = toy(rng, "linear")
    difference = np.asarray(sender_writes(lm, pair[1]) - sender_writes(lm, pair[0]))[:, :, -1]
    direction = np.asarray(lm.params["W_U"][:, 3] - lm.params["W_U"][:, 7])
    result = effects(lm, pair, "logits", freeze_mlps=True)
    np.testing.assert_allclose(result.effects, difference @ direction, rtol=1e-3, atol=1e-5)


def test_mistakes_are_named(rng, pair):
    lm = toy(rng, n_layers=1)
    with pytest.raises(InvalidInputError, match=r"No receivers were given in path_patching[\s\S]*Fix:"):
        effects(lm, pair, [])
    with pytest.raises(UnknownNameError, match=r"Unknown receiver 'logit'.*Did you mean 'logits'"):
        effects(lm, pair, "logit")
    with pytest.raises(UnknownNameError, match=r"Unknown sender '0\.head2'"):
        effects(lm, pair, "logits", ["0.head2"])
