"""Models whose activations say which token they are of, for the tests of activation streams.

Source: interp_jax.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from interp_jax.data.text_streams import Packed, packed_rows
from interp_jax.forward.batch_streams import BatchStream
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import Upstream
from interp_jax.transforms.sowing import layer_scope, sow

N_CTX = 6


def _forward(params: Any, tokens: Any) -> Any:
    value = jnp.stack([tokens.astype(jnp.float32), jnp.ones(tokens.shape, jnp.float32)], axis=-1) * params
    value = sow(value, name="embed")
    with layer_scope(0):
        return sow(-value[..., :1], name="mlp_out")


# Sites: embed [token, 1], 0.mlp_out [-token].
TELLING = LanguageModel(Upstream("telling", _forward), jnp.ones((), jnp.float32), name="telling")


def numbered(n_sequences: int, n_ctx: int = N_CTX) -> Packed:
    """A text whose tokens are all different: token n is of sequence n // n_ctx."""
    return packed_rows(np.arange(n_sequences * n_ctx).reshape(n_sequences, n_ctx))


def tokens_in(batch: Mapping[str, Any]) -> np.ndarray:
    """Which tokens the rows of a batch of `TELLING` are of; the sites agree about it."""
    tokens = np.asarray(batch["embed"])[:, 0]
    if "0.mlp_out" in batch:
        assert (batch["0.mlp_out"][:, 0] == -tokens).all()
    return tokens.astype(np.int64)


def take(stream: BatchStream, n: int) -> list[dict[str, np.ndarray]]:
    """The next `n` batches."""
    return [{name: np.asarray(rows) for name, rows in stream.next_batch().items()} for _ in range(n)]


def same(left: list[dict[str, np.ndarray]], right: list[dict[str, np.ndarray]]) -> bool:
    """Whether batches are equal to the last bit."""
    return len(left) == len(right) and all(
        list(a) == list(b)
        and all(a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes() for name in a)
        for a, b in zip(left, right, strict=True)
    )
