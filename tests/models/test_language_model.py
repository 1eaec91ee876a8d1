"""`LanguageModel` on the tiny GPT-2 and Llama: calls, passes, interventions, weights, text, and bad input.

Source: interp_jax.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError, UnknownNameError, UnsupportedModelError
from interp_jax.core.interventions import Masked
from interp_jax.core.sites import Site
from interp_jax.models.language_model import PAD, LanguageModel
from interp_jax.models.upstream import Upstream
from interp_jax.transforms.compilations import count_compilations
from tests.conftest import ORACLES

TOKENS = np.array([[5, 80, 3, 7, 200, 1], [9, 9, 41, 6, 0, 259]], np.int32)


def test_torch_says_the_same(tiny) -> None:
    """The logits of Hugging Face's own PyTorch model, at every position there is."""
    oracle = np.load(ORACLES / f"tiny_{tiny.config.family}_logits.npz")
    np.testing.assert_allclose(tiny(oracle["tokens"]), oracle["logits"], atol=1e-4)


def test_padding_leaves_each_row_what_it_is_alone(tiny) -> None:
    rows = [[5, 80, 3, 7, 200, 1], [41, 6]]
    width = max(map(len, rows))
    left = np.array([[PAD] * (width - len(row)) + row for row in rows])
    right = np.array([row + [PAD] * (width - len(row)) for row in rows])
    from_left, from_right = np.asarray(tiny(left)), np.asarray(tiny(right))
    assert np.isfinite(from_left).all()
    assert np.isfinite(from_right).all()
    for i, row in enumerate(rows):
        alone = np.asarray(tiny(np.array([row])))[0]
        np.testing.assert_allclose(from_left[i, width - len(row) :], alone, atol=2e-5)
        np.testing.assert_allclose(from_right[i, : len(row)], alone, atol=2e-5)


def test_the_same_function_object_each_time(tiny) -> None:
    assert tiny.forward is tiny.forward


def test_calls_compile_once_per_shape(tiny_llama) -> None:
    tiny_llama(TOKENS)
    with count_compilations() as new:
        tiny_llama(TOKENS)
        tiny_llama(TOKENS[:, ::-1])
    assert new == []
    with count_compilations() as new:
        tiny_llama(TOKENS[:1, :5])
        tiny_llama(TOKENS[1:, 1:])
    assert len(new) == 1


def test_loop_without_changes_is_the_model(tiny) -> None:
    seen = []
    for layer, name, _value in (running_pass := tiny.run(TOKENS)):
        seen.append(Site(layer, name))
    assert seen == tiny.sites(TOKENS).sites
    np.testing.assert_allclose(running_pass.retval, tiny(TOKENS), atol=2e-5)


def test_both_engines_visit_and_change_the_same(tiny) -> None:
    results, visits = [], []
    for engine in ("compiled", "python"):
        seen = []
        for layer, name, value in (running_pass := tiny.run(TOKENS, engine=engine)):
            seen.append((layer, name, value.shape))
            if layer == 1 and name in ("mlp_out", "pattern"):
                running_pass.modified_value = value * 0 if name == "mlp_out" else value[:, ::-1]
        results.append(np.asarray(running_pass.retval))
        visits.append(seen)
    assert visits[0] == visits[1]
    np.testing.assert_allclose(results[0], results[1], atol=2e-5)
    assert np.abs(results[0] - np.asarray(tiny(TOKENS))).max() > 0.1


@pytest.mark.parametrize("engine", ["compiled", "python"])
def test_a_pass_inside_another(tiny_llama, engine: str) -> None:
    """Patch the clean residual stream into a corrupted pass: from there on it is the clean pass."""
    corrupted = TOKENS.copy()
    corrupted[:, 1] = 17
    clean = tiny_llama.run(TOKENS, sites="1.resid_post", engine=engine)
    patched = tiny_llama.run(corrupted, sites="1.resid_post", engine=engine)
    for _, _, clean_value in clean:
        for _ in patched:
            patched.modified_value = clean_value
    np.testing.assert_allclose(patched.retval, clean.retval, atol=2e-5)
    assert np.abs(np.asarray(tiny_llama(corrupted)) - np.asarray(clean.retval)).max() > 0.01


def test_reap_reads_what_the_loop_reads(tiny) -> None:
    by_loop = {Site(layer, name): value for layer, name, value in tiny.run(TOKENS)}
    for select in ("resid_post", "2.mlp_out", ["blocks.0.attn.hook_pattern", "logits"], None):
        activations = tiny.reap(TOKENS, select)
        for site, value in activations.items():
            np.testing.assert_allclose(value, by_loop[site], atol=2e-5)
    assert list(activations) == list(by_loop)
    assert tiny.reap(TOKENS, "resid_post").stack("resid_post").shape == (3, 2, 6, 24)


def test_reaping_again_compiles_nothing(tiny_llama) -> None:
    tiny_llama.reap(TOKENS, ["1.z", "2.z"])
    tiny_llama.reap(TOKENS, "0.z")
    with count_compilations() as new:
        tiny_llama.reap(TOKENS, ["1.z", "2.z"])
        tiny_llama.reap(TOKENS[::-1], "2.z")
    assert new == []


def test_intervene_with_each_kind(tiny) -> None:
    site, other = "1.mlp_out", Site(2, "attn_out")
    shape = (2, 6, 24)
    mask = np.zeros((*shape[:2], 1), bool)
    mask[1, 3:] = True
    by_loop = {}
    for layer, name, value in (running_pass := tiny.run(TOKENS, sites=[site, other])):
        by_loop[name] = value
        running_pass.modified_value = jnp.zeros(shape) if layer == 1 else jnp.where(mask, 2.5, value)
    interventions = {site: np.zeros(shape, np.float32), other: Masked(2.5, mask)}
    np.testing.assert_allclose(tiny.intervene(TOKENS, interventions), running_pass.retval, atol=2e-5)
    functions = {site: lambda value: value * 0, other: lambda value: jnp.where(mask, 2.5, value)}
    np.testing.assert_allclose(tiny.intervene(TOKENS, functions), running_pass.retval, atol=2e-5)


def test_interventions_on_one_site_follow_each_other(tiny) -> None:
    changed = tiny.intervene(TOKENS, {"1.mlp_out": lambda value: value + 1, "mlp_out": lambda value: value * 2})
    once = tiny.intervene(TOKENS, {
        "0.mlp_out": lambda value: value * 2,
        "1.mlp_out": lambda value: (value + 1) * 2,
        "2.mlp_out": lambda value: value * 2,
    })  # fmt: skip
    np.testing.assert_allclose(changed, once, atol=2e-5)


def test_moving_an_intervention_compiles_nothing(tiny_llama) -> None:
    for layer in (0, 1, 2):
        tiny_llama.intervene(TOKENS, {f"{layer}.attn_out": np.zeros((2, 6, 24), np.float32)})
    with count_compilations() as new:
        for layer in (2, 0, 1):
            tiny_llama.intervene(TOKENS, {f"{layer}.attn_out": np.ones((2, 6, 24), np.float32)})
    assert new == []


def test_gradient_through_the_loop(tiny_llama) -> None:
    """d logit / d scale of one layer's write, against finite differences."""

    def logit(scale):
        with tiny_llama.run(TOKENS, sites="1.attn_out") as running_pass:
            for _, _, value in running_pass:
                running_pass.modified_value = value * scale
        return running_pass.retval[0, -1, 3]

    slope = (logit(1.01) - logit(0.99)) / 0.02
    np.testing.assert_allclose(jax.jit(jax.grad(logit))(1.0), slope, rtol=2e-2)


def test_vmap_over_forward(tiny_llama) -> None:
    batched = jax.vmap(lambda row: tiny_llama.forward(tiny_llama.params, row[None])[0])(TOKENS)
    np.testing.assert_allclose(batched, tiny_llama(TOKENS), atol=2e-5)


def test_under_jit_tokens_may_be_traced(tiny_llama) -> None:
    np.testing.assert_allclose(jax.jit(tiny_llama)(TOKENS), tiny_llama(TOKENS), atol=2e-5)


def test_final_norm_and_unembedding(tiny) -> None:
    activations = tiny.reap(TOKENS, ["2.resid_post", "ln_final", "logits"])
    normalised = tiny.ln_final(activations["2.resid_post"])
    np.testing.assert_allclose(normalised, activations["ln_final"], atol=1e-5)
    np.testing.assert_allclose(tiny.unembed(normalised), activations["logits"], atol=1e-5)


def test_site_table(tiny) -> None:
    config = tiny.config
    table = tiny.sites()
    printed = repr(table)
    assert "resid_post   0-2     [1, 8, 24]" in printed
    shapes = {row.site.name: row.value.shape for row in table}
    assert shapes["q"] == (1, 8, config.n_heads, config.d_head)
    assert shapes["k"] == shapes["v"] == (1, 8, config.n_kv_heads, config.d_head)
    assert shapes["pattern"] == (1, config.n_heads, 8, 8)
    assert shapes["mlp_post"] == (1, 8, config.d_mlp)
    extra = {"gpt2": {"pos_embed"}, "llama": {"rot_q", "rot_k", "mlp_gate"}}[config.family]
    common = {
        *("embed", "resid_pre", "ln1", "q", "k", "v", "attn_scores", "pattern", "z", "attn_out", "resid_mid"),
        *("ln2", "mlp_pre", "mlp_post", "mlp_out", "resid_post", "ln_final", "logits"),
    }
    assert set(shapes) == common | extra


SHAPES = {
    "W_E": "d_vocab d_model",
    "W_U": "d_model d_vocab",
    "W_Q": "n_layers n_heads d_model d_head",
    "W_K": "n_layers n_kv_heads d_model d_head",
    "W_V": "n_layers n_kv_heads d_model d_head",
    "W_O": "n_layers n_heads d_head d_model",
    "W_in": "n_layers d_model d_mlp",
    "W_out": "n_layers d_mlp d_model",
    "ln1_w": "n_layers d_model",
    "ln2_w": "n_layers d_model",
    "ln_final_w": "d_model",
}
GPT2_SHAPES = {
    "W_pos": "n_ctx d_model",
    "b_Q": "n_layers n_heads d_head",
    "b_K": "n_layers n_kv_heads d_head",
    "b_V": "n_layers n_kv_heads d_head",
    "b_O": "n_layers d_model",
    "b_in": "n_layers d_mlp",
    "b_out": "n_layers d_model",
    "ln1_b": "n_layers d_model",
    "ln2_b": "n_layers d_model",
    "ln_final_b": "d_model",
}
LLAMA_SHAPES = {"W_gate": "n_layers d_model d_mlp"}


def test_weights_have_the_declared_shapes(tiny) -> None:
    shapes = SHAPES | (GPT2_SHAPES if tiny.config.family == "gpt2" else LLAMA_SHAPES)
    assert set(tiny.upstream.weight_names) == set(shapes)
    for name, axes in shapes.items():
        weight = getattr(tiny, name)
        assert weight.shape == tuple(getattr(tiny.config, axis) for axis in axes.split()), name
        if axes.startswith("n_layers"):
            np.testing.assert_array_equal(tiny.weight(name, 2), weight[2])


def test_weights_account_for_every_parameter(tiny) -> None:
    """No parameter is left without a canonical name, and none counts twice (but for a tied unembedding)."""
    names = [name for name in tiny.upstream.weight_names if not (tiny.config.is_tied and name == "W_U")]
    n_named = sum(getattr(tiny, name).size for name in names)
    assert n_named == tiny.n_params


def test_weights_reproduce_the_model(tiny) -> None:
    """The forward pass written out once more, from the canonical weights alone: an independent route to the logits."""
    logits = _by_hand(tiny, TOKENS)
    np.testing.assert_allclose(tiny(TOKENS), logits, atol=1e-4)


def _by_hand(lm: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    config = lm.config
    assert config is not None
    is_gpt2 = config.family == "gpt2"

    def w(name: str, layer: int | None = None) -> np.ndarray:
        return np.asarray(lm.weight(name, layer), np.float64)

    def norm(x: np.ndarray, name: str, layer: int | None = None) -> np.ndarray:
        if is_gpt2:
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * w(f"{name}_w", layer)
        return x + w(f"{name}_b", layer) if is_gpt2 else x

    def rotate(x: np.ndarray) -> np.ndarray:
        half = config.d_head // 2
        turns = np.arange(x.shape[1])[:, None] * float(config.rope_theta or 0) ** (-np.arange(half) / half)
        pairs = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * turns)[:, None, :]
        return np.concatenate([pairs.real, pairs.imag], -1)

    x = w("W_E")[tokens]
    x = x + w("W_pos")[: tokens.shape[1]] if is_gpt2 else x
    for i in range(config.n_layers):
        normed = norm(x, "ln1", i)
        q, k, v = (np.einsum("bpm,hmd->bphd", normed, w(f"W_{name}", i)) for name in "QKV")
        if is_gpt2:
            q, k, v = q + w("b_Q", i), k + w("b_K", i), v + w("b_V", i)
        else:
            q, k = rotate(q), rotate(k)
        groups = config.n_heads // config.n_kv_heads
        k, v = np.repeat(k, groups, 2), np.repeat(v, groups, 2)
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(config.d_head)
        scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
        pattern = np.exp(scores - scores.max(-1, keepdims=True))
        pattern /= pattern.sum(-1, keepdims=True)
        x = x + np.einsum("bhqk,bkhd,hdm->bqm", pattern, v, w("W_O", i)) + (w("b_O", i) if is_gpt2 else 0)
        normed = norm(x, "ln2", i)
        if is_gpt2:
            pre = normed @ w("W_in", i) + w("b_in", i)
            post = 0.5 * pre * (1 + np.tanh(np.sqrt(2 / np.pi) * (pre + 0.044715 * pre**3)))
            x = x + post @ w("W_out", i) + w("b_out", i)
        else:
            gate = normed @ w("W_gate", i)
            x = x + (gate / (1 + np.exp(-gate)) * (normed @ w("W_in", i))) @ w("W_out", i)
    return norm(x, "ln_final") @ w("W_U")


def test_unknown_weights(tiny) -> None:
    with pytest.raises(UnknownNameError, match=r"'W_Qs' was asked for(.|\n)*Did you mean 'W_Q'"):
        tiny.weight("W_Qs")
    with pytest.raises(UnknownNameError, match=r"Layer 3 was given(.|\n)*0 to 2"):
        tiny.weight("W_Q", 3)
    with pytest.raises(UnknownNameError, match="Layer -1"):
        tiny.weight("W_Q", -1)
    with pytest.raises(UnknownNameError, match="'W_E' of layer 0"):
        tiny.weight("W_E", 0)


def test_text(tiny) -> None:
    text = "the cat, thé"
    tokens = tiny.tokenize(text)
    assert tokens.dtype == np.int32
    assert tiny.decode(tokens) == [text]
    assert tiny.decode(tokens[0]) == text
    assert "".join(tiny.to_str_tokens("the cat")) == "the cat"
    assert tiny.to_str_tokens(tokens[0, :3]) == tiny.to_str_tokens(text)[:3]
    batch = tiny.tokenize([text, "a"])
    assert batch.shape == (2, tokens.shape[1])
    assert (batch[1, :-1] == PAD).all()
    assert tiny.decode(batch) == [text, "a"]
    assert tiny.to_str_tokens(batch)[1] == [""] * (tokens.shape[1] - 1) + ["a"]
    assert tiny.to_str_tokens(["a", "b"]) == [["a"], ["b"]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Empty text (number 0)"),
        (["a", ""], "Empty text (number 1)"),
        ([], "No text was given"),
        ("a" * 49, "49 tokens a row"),
        ([3], "Not a text"),
    ],
)
def test_text_that_is_refused(tiny, text, words: str) -> None:
    with pytest.raises(InvalidInputError) as error:
        tiny.tokenize(text)
    assert words in str(error.value)
    assert "Fix: " in str(error.value)


CALLS = {
    "call": lambda lm, tokens: lm(tokens),
    "run": lambda lm, tokens: lm.run(tokens),
    "reap": lambda lm, tokens: lm.reap(tokens, "mlp_out"),
    "intervene": lambda lm, tokens: lm.intervene(tokens, {}),
    "sites": lambda lm, tokens: lm.sites(tokens),
    "check": lambda lm, tokens: lm.check(tokens),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_checks_its_tokens(tiny_llama, call: str) -> None:
    with pytest.raises(InvalidInputError, match=r"Text was given(.|\n)*lm.tokenize"):
        CALLS[call](tiny_llama, "the cat")
    with pytest.raises(InvalidInputError, match="Token ids 260 were given, the first at row 0, position 1"):
        CALLS[call](tiny_llama, [[0, 260]])
    with pytest.raises(ShapeError, match="dtype float32"):
        CALLS[call](tiny_llama, np.ones((1, 2), np.float32))
    with pytest.raises(InvalidInputError, match=r"49 tokens a row(.|\n)*n_ctx = 48"):
        CALLS[call](tiny_llama, np.zeros((1, 49), int))


def test_sites_that_do_not_exist(tiny_llama) -> None:
    calls = (
        lambda: tiny_llama.run(TOKENS, sites="mlp_outs"),
        lambda: tiny_llama.reap(TOKENS, "mlp_outs"),
        lambda: tiny_llama.intervene(TOKENS, {"mlp_outs": 0.0}),
        lambda: tiny_llama.generate(TOKENS, interventions={"mlp_outs": 0.0}),
    )
    for call in calls:
        with pytest.raises(UnknownNameError, match=r"Unknown site 'mlp_outs'(.|\n)*Did you mean 'mlp_out'"):
            call()
    with pytest.raises(UnknownNameError, match=r"3\.mlp_out"):
        tiny_llama.reap(TOKENS, "3.mlp_out")


def test_values_that_do_not_fit(tiny_llama) -> None:
    with pytest.raises(ShapeError, match=r"1.mlp_out"):
        tiny_llama.intervene(TOKENS, {"1.mlp_out": np.zeros((2, 6, 23), np.float32)})
    with pytest.raises(ShapeError, match=r"int32\[2, 6, 24\]"):
        tiny_llama.intervene(TOKENS, {"1.mlp_out": lambda value: np.zeros(value.shape, np.int32)})


def test_printing(tiny) -> None:
    printed = repr(tiny)
    assert f"{tiny.n_params:,} (float32" in printed
    assert "3, d_model 24" in printed
    assert f"transformers_{tiny.config.family}" in printed
    assert f"d_vocab {tiny.config.d_vocab}" in printed
    assert tiny._repr_html_().startswith("<table>")


def test_a_function_of_ones_own(rng: np.random.Generator) -> None:
    params = {"W": rng.standard_normal((5, 5), np.float32)}
    lm = LanguageModel(Upstream("mine", lambda params, tokens: params["W"][tokens]), params)
    np.testing.assert_array_equal(lm([[1, 4]]), params["W"][[[1, 4]]])
    for call, part in ((lambda: lm.ln_final(1.0), "ln_final"), (lambda: lm.unembed(1.0), "unembed")):
        with pytest.raises(UnsupportedModelError, match=f"mine does not say what its {part} is"):
            call()
    with pytest.raises(UnsupportedModelError, match="mine has no tokenizer"):
        lm.tokenize("text")
    with pytest.raises(UnknownNameError, match="'W_E' was asked for"):
        lm.W_E  # noqa: B018
    assert "the model's own tags" in repr(lm)


def test_loading_twice_compiles_once() -> None:
    from interp_jax.models.loading import load

    load(ORACLES / "tiny_gpt2")(TOKENS)
    with count_compilations() as new:
        load(ORACLES / "tiny_gpt2")(TOKENS)
    assert new == []
