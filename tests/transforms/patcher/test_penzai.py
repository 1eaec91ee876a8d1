"""Patches of Penzai: layers that are registered pytrees and dataclasses, and methods that are fields' neighbours.

Source: interp_jax.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from penzai import pz

from interp_jax.transforms.patcher import Patcher


def test_layers_stay_pytrees(key: jax.Array) -> None:
    affine = pz.nn.Affine.from_config("a", key, {"i": 3}, {"o": 2})
    layer = pz.freeze_params(pz.nn.Sequential([affine, pz.nn.Elementwise(jax.nn.tanh)]))
    x = pz.nx.wrap(jnp.ones(3)).tag("i")
    call = jax.jit(lambda layer, x: layer(x).untag("o").unwrap())
    n_leaves = len(jax.tree.leaves(layer))
    before = call(layer, x)
    patcher = Patcher("penzai.nn.basic_ops", {"Elementwise.__call__": [("return $value", "return -$value", 2)]})
    with patcher:
        np.testing.assert_array_equal(call(layer, x), -before)
        assert len(jax.tree.leaves(layer)) == n_leaves
        assert isinstance(layer.sublayers[1], pz.nn.Elementwise)
    np.testing.assert_array_equal(call(layer, x), before)
    assert "b/penzai/nn/basic_ops.py" in patcher.diff()
