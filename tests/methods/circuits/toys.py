"""Small transformers in plain JAX, and the same arithmetic once more in NumPy, with every edge written out."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.methods.circuits.graph import EdgeGraph
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import ModelConfig, Upstream
from interp_jax.transforms.sowing import layer_scope, sow

WEIGHTS = ("W_Q", "W_K", "W_V", "W_O", "W_in", "b_in", "W_out", "b_out", "ln1_w", "ln2_w")


def rms(x: Any, w: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * jnp.broadcast_to(w, x.shape)


def forward(config: ModelConfig, form: str, params: Any, tokens: Any) -> Any:
    """`form`: "linear" (uniform attention, no activation), "full" (softmax, tanh), "relu" (uniform, relu)."""
    n_pos, group = tokens.shape[1], config.n_heads // config.n_kv_heads
    causal = jnp.tril(jnp.ones((n_pos, n_pos)))
    uniform = causal / causal.sum(1, keepdims=True)
    act = {"linear": lambda x: x, "full": jnp.tanh, "relu": jax.nn.relu}[form]

    def norm(x: Any, w: Any) -> Any:
        return rms(x, w) if config.norm == "rmsnorm" else x

    def mlp(layer: Any, x: Any) -> Any:
        hidden = act(x @ layer["W_in"] + jnp.broadcast_to(layer["b_in"], (*x.shape[:-1], config.d_mlp)))
        return sow(hidden @ layer["W_out"] + jnp.broadcast_to(layer["b_out"], x.shape), name="mlp_out")

    pos = jnp.broadcast_to(params["W_pos"][:n_pos], (*tokens.shape, config.d_model))
    x = params["W_E"][tokens] + pos
    for i, layer in enumerate(params["layers"]):
        with layer_scope(i):
            resid = sow(x, name="resid_pre")
            normed = sow(norm(resid, layer["ln1_w"]), name="ln1")
            q, k, v = (
                sow(jnp.einsum("btm,hmd->bthd", normed, layer[f"W_{name.upper()}"]), name=name) for name in "qkv"
            )
            k, v = (jnp.repeat(part, group, axis=2) for part in (k, v))
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(float(config.d_head))
            hidden = jnp.where(jnp.broadcast_to(causal, scores.shape) > 0, scores, -jnp.inf)
            pattern = jax.nn.softmax(hidden) if form == "full" else jnp.broadcast_to(uniform, scores.shape)
            z = sow(jnp.einsum("bhqk,bkhd->bqhd", pattern, v), name="z")
            attn = sow(jnp.einsum("bthd,hdm->btm", z, layer["W_O"]), name="attn_out")
            if "W_in" not in layer:
                x = sow(resid + attn, name="resid_post")
            elif config.is_parallel:
                x = sow(resid + attn + mlp(layer, normed), name="resid_post")
            else:
                mid = sow(resid + attn, name="resid_mid")
                x = sow(mid + mlp(layer, sow(norm(mid, layer["ln2_w"]), name="ln2")), name="resid_post")
    return norm(x, params["ln_final_w"]) @ params["W_U"]


@functools.lru_cache
def upstream(config: ModelConfig, form: str) -> Upstream:
    names = [n for n in WEIGHTS if config.d_mlp or n not in ("W_in", "b_in", "W_out", "b_out", "ln2_w")]
    return Upstream(
        f"toy {form}",
        functools.partial(forward, config, form),
        layer_weights={name: functools.partial(lambda name, layer: layer[name], name) for name in names},
        layer_params=lambda params, i: params["layers"][i],
    )


def toy(
    rng: np.random.Generator,
    form: str = "full",
    *,
    n_layers: int = 2,
    n_heads: int = 2,
    n_kv_heads: int | None = None,
    d_model: int = 8,
    d_head: int = 3,
    d_mlp: int = 6,
    d_vocab: int = 11,
    n_ctx: int = 6,
    is_parallel: bool = False,
    norm: str = "rmsnorm",
) -> LanguageModel:
    """A random toy; linear ones have no norm."""
    norm = "none" if form != "full" else norm
    n_kv = n_kv_heads or n_heads
    config = ModelConfig(
        "toy", n_layers, d_model, n_heads, n_kv, d_head, d_mlp, d_vocab, n_ctx, form, False, False, norm, 1e-6, None,
        "float32", is_parallel=is_parallel,
    )  # fmt: skip

    def draw(*shape: int, mean: float = 0.0) -> Any:
        return jnp.asarray(mean + rng.normal(size=shape) / np.sqrt(shape[-2] if len(shape) > 1 else 4), jnp.float32)

    def layer() -> dict[str, Any]:
        heads = {name: draw(n, d_model, d_head) for name, n in (("W_Q", n_heads), ("W_K", n_kv), ("W_V", n_kv))}
        mlp = {"W_in": draw(d_model, d_mlp), "b_in": draw(d_mlp), "W_out": draw(d_mlp, d_model), "b_out": draw(d_model)}
        norms = {"ln1_w": draw(d_model, mean=1.0), "ln2_w": draw(d_model, mean=1.0)}
        return {**heads, "W_O": draw(n_heads, d_head, d_model), **norms, **(mlp if d_mlp else {})}

    params = {
        "W_E": draw(d_vocab, d_model) * 2,
        "W_pos": draw(n_ctx, d_model),
        "layers": [layer() for _ in range(n_layers)],
        "W_U": draw(d_model, d_vocab),
        "ln_final_w": draw(d_model, mean=1.0),
    }
    return LanguageModel(upstream(config, form), params, config=config, name=f"toy {form}")


class Plain:
    """A model's edges in NumPy and double precision, from canonical weights: GPT-2, and the "full" toy.

    Args:
        lm: The model.
    """

    def __init__(self, lm: LanguageModel):
        self.lm, self.config = lm, lm.config
        assert lm.config is not None
        c = lm.config
        self.graph = EdgeGraph(c.n_layers, c.n_heads, c.n_kv_heads, c.is_parallel, c.d_mlp > 0)
        self.is_toy = c.family == "toy"

    def w(self, name: str, layer: int | None = None) -> Any:
        if layer is not None and name not in self.lm.upstream.layer_weights:
            return 0.0
        if self.is_toy and layer is None:
            return np.asarray(self.lm.params.get(name, 0.0), np.float64)
        return np.asarray(self.lm.weight(name, layer), np.float64)

    def norm(self, x: np.ndarray, name: str, layer: int | None) -> np.ndarray:
        assert self.config is not None
        if self.config.norm == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.norm_eps)
        bias = 0.0 if self.is_toy else self.w(f"{name}_b", layer)
        return x * self.w(f"{name}_w", layer) + bias

    def act(self, x: np.ndarray) -> np.ndarray:
        return np.tanh(x) if self.is_toy else 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def start(self, tokens: np.ndarray) -> np.ndarray:
        return self.w("W_E")[tokens] + self.w("W_pos")[: tokens.shape[1]]

    def head(self, layer: int, head: int, q_in: np.ndarray, k_in: np.ndarray, v_in: np.ndarray) -> np.ndarray:
        """What a head writes, from the inputs of its own three receivers."""
        assert self.config is not None
        kv = head // (self.config.n_heads // self.config.n_kv_heads)
        parts = []
        for part, x, i in (("Q", q_in, head), ("K", k_in, kv), ("V", v_in, kv)):
            bias = self.w(f"b_{part}", layer)
            parts.append(
                self.norm(x, "ln1", layer) @ self.w(f"W_{part}", layer)[i] + (bias[i] if np.ndim(bias) else 0.0)
            )
        q, k, v = parts
        scores = np.einsum("bqd,bkd->bqk", q, k) / np.sqrt(q.shape[-1])
        scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True) @ v @ self.w("W_O", layer)[head]

    def mlp(self, layer: int, x: np.ndarray) -> np.ndarray:
        name = "ln1" if self.graph.is_parallel else "ln2"
        hidden = self.act(self.norm(x, name, layer) @ self.w("W_in", layer) + self.w("b_in", layer))
        return hidden @ self.w("W_out", layer) + self.w("b_out", layer)

    def logits(self, x: np.ndarray) -> np.ndarray:
        return self.norm(x, "ln_final", None) @ self.w("W_U")

    def run(self, tokens: np.ndarray, heard: Any, given: Any = None) -> tuple[np.ndarray, list[np.ndarray], list[Any]]:
        """Logits, all writes and all inputs, receiver by receiver.

        Args:
            tokens: Token ids.
            heard: `(u, v, write) -> what v hears of u`.
            given: `(u, write) -> what u writes`, by default its own; `(v, input) -> input` under "input".
        """
        graph, writes, inputs = self.graph, [], []
        given = given or (lambda u, write: write)
        names = {node.name: v for v, node in enumerate(graph.receivers)}

        def hears(name: str) -> Any:
            v = names[name]
            layers = graph.n_layers if name == "logits" else int(name.split(".")[0]) + (".mlp" in name)
            layers -= graph.is_parallel and ".mlp" in name
            biases = sum(self.w("b_O", i) for i in range(layers))
            total = sum(heard(u, v, writes[u]) for u in np.flatnonzero(graph.is_edge[:, v])) + biases
            inputs.append((v, total))
            return total

        kv = "head" if graph.n_heads == graph.n_kv_heads else "kv_head"
        writes.append(given(0, self.start(tokens)))
        for i in range(graph.n_layers):
            of_layer = []
            for h in range(graph.n_heads):
                g = h // (graph.n_heads // graph.n_kv_heads)
                own = self.head(i, h, hears(f"{i}.head{h}.q"), hears(f"{i}.{kv}{g}.k"), hears(f"{i}.{kv}{g}.v"))
                of_layer.append(given(len(writes) + h, own))
            if not graph.has_mlps:
                writes += of_layer
            elif graph.is_parallel:
                mlp = self.mlp(i, hears(f"{i}.mlp"))
                writes += [*of_layer, given(len(writes) + len(of_layer), mlp)]
            else:
                writes += of_layer
                writes.append(given(len(writes), self.mlp(i, hears(f"{i}.mlp"))))
        return self.logits(hears("logits")), writes, inputs

    def patched(self, tokens: np.ndarray, corrupted: Any, mask: np.ndarray) -> np.ndarray:
        """Logits when receivers hear mixtures."""
        return self.run(tokens, lambda u, v, write: write + mask[u, v] * (corrupted[u] - write))[0]

    def paths(
        self, tokens: np.ndarray, corrupted: np.ndarray, senders: set[int], receivers: set[int], *, freeze_mlps: bool
    ) -> np.ndarray:
        """Logits of path patching, each pass written out."""

        def own(u: int, v: int, write: np.ndarray) -> np.ndarray:
            return write

        _, clean, _ = self.run(tokens, own)
        _, other, _ = self.run(corrupted, own)

        def given(u: int, write: np.ndarray) -> np.ndarray:
            is_mlp = self.graph.senders[u].part == "mlp"
            return other[u] if u in senders else write if is_mlp and not freeze_mlps else clean[u]

        _, frozen, _ = self.run(tokens, own, given)
        return self.run(tokens, lambda u, v, write: frozen[u] if v in receivers else write)[0]
