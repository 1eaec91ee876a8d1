"""The models steering is tested on: Llama each time, GPT-2 with the slow tests.

Source: interp_jax.
"""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session", params=["tiny_llama", pytest.param("tiny_gpt2", marks=pytest.mark.slow)])
def lm(request: pytest.FixtureRequest) -> Any:
    """A tiny random model of three layers."""
    from interp_jax.models.loading import load
    from tests.conftest import ORACLES

    return request.getfixturevalue("tiny_llama") if request.param == "tiny_llama" else load(ORACLES / request.param)
