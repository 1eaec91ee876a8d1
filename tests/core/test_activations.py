"""Activations are a mapping: what is in them, and what is not."""

from __future__ import annotations

import numpy as np
import pytest

from interp_jax.core.activations import Activations
from interp_jax.core.errors import UnknownNameError
from interp_jax.core.sites import Site


def test_in_says_no_where_indexing_raises() -> None:
    activations = Activations({Site(0, "mlp_out"): np.zeros(2), Site(1, "mlp_out"): np.ones(2)})
    assert "0.mlp_out" in activations
    assert Site(1, "mlp_out") in activations
    for absent in ("3.mlp_out", Site(3, "mlp_out"), 5):
        assert absent not in activations
    assert activations["1.mlp_out"][0] == 1.0
    with pytest.raises(UnknownNameError, match=r"3\.mlp_out"):
        activations["3.mlp_out"]
