"""The models people study load as they are published: their config.json is understood, and implies all their weights.

Nothing is read and no array made: the layout says how large each parameter is.

Source: interp_jax.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from interp_jax.models.loading import FAMILIES, from_checkpoint
from interp_jax.models.weights import layout
from interp_jax.models.weights.checkpoint import Checkpoint, Tensors
from tests.models.published import PUBLISHED


def shapes_only(stored: Any, intake: Any, *, dtype: Any, sharding: Any = None) -> Any:
    """What `layout.read` would return, without values."""
    return jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.param_shape, np.dtype(dtype)), stored)


def test_every_family_is_there() -> None:
    assert {config["model_type"] for config, _ in PUBLISHED.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_implies_its_parameters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "read", shapes_only)
    config, n_params = PUBLISHED[name]
    checkpoint = Checkpoint(config["model_type"], config, Tensors({}), tokenizer=None, source=name)
    for stacked in (False, True):
        lm = from_checkpoint(checkpoint, stacked=stacked)
        assert lm.upstream.is_stacked == stacked
        assert lm.n_params == n_params
