"""An induction head by hand: attention only, two layers, two heads each, every edge's weight known.

The residual stream has four parts: the token, the position, the token before (written by head 0.0) and the answer
(written by head 1.0). Heads 0.1 and 1.1 are busy with a fifth part that nobody else reads.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from interp_jax.methods.circuits.graph import EdgeGraph
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import ModelConfig
from tests.methods.circuits.toys import upstream

D_VOCAB, N_POS = 8, 5
PARTS = {"token": 0, "position": D_VOCAB, "before": D_VOCAB + N_POS, "answer": 2 * D_VOCAB + N_POS}
PARTS["junk"] = PARTS["answer"] + D_VOCAB
D_MODEL, D_HEAD = PARTS["junk"] + D_VOCAB, D_VOCAB

# "X A B C A", to be continued with B; and a text that asks for another answer.
CLEAN, CORRUPTED = np.array([[6, 1, 4, 2, 1]], np.int32), np.array([[3, 5, 0, 7, 5]], np.int32)
CIRCUIT = {
    ("input", "0.head0.v"),
    ("input", "1.head0.q"),
    ("input", "1.head0.v"),
    ("0.head0", "1.head0.k"),
    ("1.head0", "logits"),
}


def induction_model() -> LanguageModel:
    config = ModelConfig(
        "toy", 2, D_MODEL, 2, 2, D_HEAD, 0, D_VOCAB, N_POS, "full", False, False, "none", 0.0, None, "float32"
    )

    def reads(part: str, scale: float = 1.0, shift: int = 0, n: int = D_VOCAB) -> np.ndarray:
        weight = np.zeros((D_MODEL, D_HEAD), np.float32)
        for i in range(n):
            if 0 <= i + shift < D_HEAD:
                weight[PARTS[part] + i, i + shift] = scale
        return weight

    def writes(part: str) -> np.ndarray:
        return reads(part).T

    # Position t looks for t - 1; the last token looks for where it stood before.
    previous = (
        reads("position", 12.0, shift=-1, n=N_POS),
        reads("position", n=N_POS),
        reads("token"),
        writes("before"),
    )
    induction = (reads("token", 10.0), reads("before"), reads("token"), writes("answer"))
    busy = (reads("token", 3.0), reads("token"), reads("token"), writes("junk"))
    busier = (reads("junk", 3.0), reads("junk"), reads("junk"), writes("junk"))
    layers = [
        {name: jnp.asarray(np.stack(parts)) for name, *parts in zip(("W_Q", "W_K", "W_V", "W_O"), *heads, strict=True)}
        for heads in ((previous, busy), (induction, busier))
    ]
    embedding, positions, unembedding = (np.zeros(s, np.float32) for s in ((8, D_MODEL), (5, D_MODEL), (D_MODEL, 8)))
    embedding[:, :D_VOCAB] = np.eye(D_VOCAB)
    positions[:, PARTS["position"] : PARTS["before"]] = np.eye(N_POS)
    unembedding[PARTS["answer"] : PARTS["junk"]] = 8 * np.eye(D_VOCAB)
    params = {
        "W_E": jnp.asarray(embedding),
        "W_pos": jnp.asarray(positions),
        "W_U": jnp.asarray(unembedding),
        "layers": [layer | {"ln1_w": jnp.ones(D_MODEL)} for layer in layers],
        "ln_final_w": jnp.ones(D_MODEL),
    }
    return LanguageModel(upstream(config, "full"), params, config=config, name="induction")


GRAPH = EdgeGraph(2, 2, 2, has_mlps=False)
