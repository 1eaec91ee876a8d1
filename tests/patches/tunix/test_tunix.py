"""Tunix's NNX Llama 3, Qwen 3 and Gemma 3 under their patch sets: the same laws for each, on its tiny torch model.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from interp_jax.core.errors import InvalidInputError, LoadError, UnknownNameError, UnsupportedModelError
from interp_jax.core.sites import Site
from interp_jax.models.check import stable_hlo
from interp_jax.models.loading import load, read_checkpoint
from interp_jax.models.weights.checkpoint import Tensors
from interp_jax.patches import transformers_flax, tunix_gemma3, tunix_llama3, tunix_nnx, tunix_qwen3
from interp_jax.transforms.compilations import count_compilations
from tests.conftest import ORACLES

pytestmark = [
    # Tunix says `sharding` and `.value` where Flax 0.12.8 would have `out_sharding` and `[...]`,
    pytest.mark.filterwarnings("ignore:'sharding' is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'.value' access is now deprecated:DeprecationWarning"),
    # and asks for the mesh as before JAX 0.8.2, where we do not mend it.
    pytest.mark.filterwarnings("ignore:jax.interpreters.pxla.thread_resources is deprecated:DeprecationWarning"),
]

FAMILIES = {"llama": tunix_llama3, "qwen3": tunix_qwen3, "gemma3": tunix_gemma3}
# Longer than the Gemma's window of seven.
TOKENS = np.array([[5, 80, 3, 7, 200, 9, 31, 4, 66, 2], [-1, -1, 6, 0, 9, 1, 12, 13, 14, 15]], np.int32)
# What rounding comes to in these models, whose weights are random: the recorded logits of the Gemma, which has twelve
# layers, are 2e-4 away from those of the same PyTorch model in double precision.
ROUNDING = {"llama": 2e-5, "qwen3": 2e-5, "gemma3": 1e-3}
N_INSIDE = {"llama": 18, "qwen3": 18, "gemma3": 20}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pair(family: str) -> tuple[Any, Any]:
    """A family's tiny model unstacked and stacked, each read from its files."""
    name = FAMILIES[family].PATCH_SET.name
    path = ORACLES / f"tiny_{family}"
    return load(path, upstream=name), load(path, upstream=name, stacked=True)


def altered(family: str, arrays: dict[str, Any] | None = None, without: str = "", **changes: Any) -> Any:
    """A tiny model's files with another configuration; `KeyError` stands for a key that is not there."""
    checkpoint = read_checkpoint(ORACLES / f"tiny_{family}")
    config = {key: value for key, value in {**checkpoint.config, **changes}.items() if value is not KeyError}
    tensors = {name: checkpoint.tensors[name] for name in checkpoint.tensors if name != without}
    return dataclasses.replace(checkpoint, config=config, tensors=Tensors.from_arrays({**tensors, **(arrays or {})}))


def close(one: Any, other: Any, tolerance: float) -> None:
    largest = max(float(np.abs(other).max()), 1.0)
    np.testing.assert_allclose(one, other, atol=tolerance * largest, rtol=tolerance)


def as_it_comes(lm: Any, family: str, patchers: Any = ()) -> Any:
    """A function of (params, tokens) that merges and calls Tunix's unstacked model under patchers."""
    tunix = tunix_gemma3.family_of(6, 1000.0, 2.0) if family == "gemma3" else FAMILIES[family].FAMILY
    unbound = tunix.unbound(lm.config, lm.config.n_layers)

    def forward(params: Any, tokens: Any) -> Any:
        with transformers_flax.upstream_rules(patchers):
            ids, mask, positions = transformers_flax.read_tokens(tokens)
            model = tunix_nnx.bound(unbound, params)
            return model(ids, positions, None, tunix_nnx.visible(mask, 0, ids.shape[1]))[0]

    return forward


@pytest.mark.parametrize("which", [0, 1], ids=["unstacked", "stacked"])
def test_logits_are_those_of_torch(pair, family: str, which: int) -> None:
    lm, recorded = pair[which], np.load(ORACLES / f"tiny_{family}_logits.npz")
    np.testing.assert_allclose(lm(recorded["tokens"]), recorded["logits"], atol=ROUNDING[family])


def test_tags_alone_change_no_byte_of_tunixs_program(pair, family: str) -> None:
    """On Tunix as it comes, without our mends; stacked, with the scan."""
    plain, stacked = pair
    programs = [
        stable_hlo(as_it_comes(plain, family, patchers), plain.params, TOKENS)
        for patchers in ((), plain.upstream.patch_set.tags)
    ]
    assert programs[0] == programs[1]
    tagged = as_it_comes(plain, family, plain.upstream.patch_set.tags)
    n_layers = plain.config.n_layers
    assert str(jax.make_jaxpr(tagged)(plain.params, TOKENS)).count("sow[") == 3 + N_INSIDE[family] * n_layers
    for lm in pair:
        assert stable_hlo(lm.forward, lm.params, TOKENS) == stable_hlo(lm.upstream.untagged, lm.params, TOKENS)
    assert len(stable_hlo(stacked.forward, stacked.params, TOKENS)) < 0.8 * len(programs[0])


def test_upstream_to_the_bit_where_upstream_is_right(family: str) -> None:
    """Tunix's Llama 3 and Qwen 3 know one rotary base, a million; a Gemma that is read in one piece needs no mend."""
    lm = FAMILIES[family].from_checkpoint(altered(family, rope_theta=1e6))
    upstream = jax.jit(as_it_comes(lm, family))(lm.params, TOKENS)
    is_token = TOKENS >= 0
    np.testing.assert_array_equal(np.asarray(lm(TOKENS))[is_token], np.asarray(upstream)[is_token])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_upstream_ignores_the_rotary_base_and_the_mend_does_not(family: str) -> None:
    models = [FAMILIES[family].from_checkpoint(altered(family, rope_theta=base)) for base in (1e4, 1e5)]
    upstream = [jax.jit(as_it_comes(lm, family))(lm.params, TOKENS) for lm in models]
    np.testing.assert_array_equal(*upstream)
    assert float(jnp.abs(models[0](TOKENS) - models[1](TOKENS)).max()) > 1e-3


def test_stacked_and_unstacked_agree_at_every_site(pair, family: str) -> None:
    plain, stacked = pair
    expected, values = plain.reap(TOKENS, "*"), stacked.reap(TOKENS, "*")
    assert set(values) == set(expected)
    assert len(expected) == 3 + N_INSIDE[family] * plain.config.n_layers
    for site, value in expected.items():
        close(values[site], value, ROUNDING[family])


def test_gradients_agree(pair, family: str) -> None:
    plain, stacked = pair

    def gradient(lm: Any) -> Any:
        def loss(params: Any) -> Any:
            return -jax.nn.log_softmax(lm.forward(params, TOKENS[:1]))[..., 7].mean()

        return jax.jit(jax.grad(loss))(lm.params)

    expected, gradients = gradient(plain), stacked.upstream.restack(gradient(stacked))
    assert jax.tree.structure(gradients) == jax.tree.structure(expected)
    jax.tree.map(lambda one, other: close(one, other, 10 * ROUNDING[family]), gradients, expected)
    assert all(float(jnp.abs(leaf).max()) > 1e-6 for leaf in jax.tree.leaves(expected["layers"]["1"]))


@pytest.mark.parametrize("engine", ["compiled", "python"])
def test_the_loop_reads_what_is_reaped_and_changes_it(pair, family: str, engine: Any) -> None:
    plain, stacked = pair
    names = ["resid_pre", "pattern", "mlp_post"]
    expected = plain.reap(TOKENS, names)
    # A multiple of it would be normed away in the Gemma.
    changed = plain.intervene(TOKENS, {"1.mlp_post": lambda value: value[..., ::-1]})
    for lm in pair:
        seen = {}
        for layer, name, value in (running_pass := lm.run(TOKENS, sites=names, engine=engine)):
            seen[Site(layer, name)] = value.shape
            if engine == "compiled" and layer < 2:
                close(value, expected[layer, name], ROUNDING[family])
            if (layer, name) == (1, "mlp_post"):
                running_pass.modified_value = value[..., ::-1]
        assert seen == {site: value.shape for site, value in expected.items()}
        if engine == "compiled" or lm is plain:
            assert [site.layer for site in seen] == sorted(site.layer for site in expected if site.layer is not None)
        close(running_pass.retval, changed, ROUNDING[family])
    assert float(jnp.abs(changed - stacked(TOKENS)).max()) > 1e-2


def test_contracts(pair) -> None:
    for lm in pair:
        report = lm.check(TOKENS)
        assert report.ok, report
        assert [outcome.contract for outcome in report.outcomes if outcome.ok is None] == []


def test_moving_to_another_layer_compiles_nothing(pair, family: str) -> None:
    _, stacked = pair

    def passes(layer: int) -> Any:
        for _, _, value in (running_pass := stacked.run(TOKENS, sites=f"{layer}.mlp_out")):
            running_pass.modified_value = value * 0.0
        stacked.reap(TOKENS, f"{layer}.resid_mid")
        return running_pass.retval

    zeroed = [passes(0), passes(1)]
    with count_compilations() as new:
        zeroed += [passes(stacked.config.n_layers - 1), passes(1)]
    assert not new
    np.testing.assert_array_equal(zeroed[1], zeroed[3])
    assert float(jnp.abs(zeroed[0] - zeroed[1]).max()) > 1e-3


def test_generation_agrees_with_and_without_tunixs_cache(pair) -> None:
    plain = pair[0]
    expected = plain.generate(TOKENS, max_new_tokens=5, use_cache=False)
    for lm in pair:
        generation = lm.generate(TOKENS, max_new_tokens=5)
        np.testing.assert_array_equal(generation.tokens, expected.tokens)
        close(generation.log_probs, expected.log_probs, 1e-3)
    changed = {"1.resid_mid": lambda value: value * 1.2}
    one, other = (lm.generate(TOKENS, max_new_tokens=3, interventions=changed) for lm in pair)
    np.testing.assert_array_equal(one.tokens, other.tokens)
    assert not np.allclose(one.log_probs, expected.log_probs[:, :3], atol=1e-3)


def test_a_text_read_in_pieces(pair, family: str) -> None:
    """Several tokens that follow those in the cache: for the Gemma, beyond its window."""
    plain = pair[0]
    whole = np.asarray(plain(TOKENS))
    for lm in pair:
        cache, pieces, step = lm.upstream.init_cache(2, 12), [], jax.jit(lm.upstream.step)
        for piece in (TOKENS[:, :3], TOKENS[:, 3:9], TOKENS[:, 9:]):
            logits, cache = step(lm.params, cache, jnp.asarray(piece))
            pieces.append(logits)
        close(np.concatenate(pieces, axis=1)[TOKENS >= 0], whole[TOKENS >= 0], ROUNDING[family])


def test_weights(pair, family: str) -> None:
    plain, stacked = pair
    jax.tree.map(np.testing.assert_array_equal, plain.stacked().params, stacked.params)
    jax.tree.map(np.testing.assert_array_equal, stacked.unstacked().params, plain.params)
    for name in plain.upstream.weight_names:
        np.testing.assert_array_equal(stacked.weight(name), plain.weight(name))
    tensors, at = read_checkpoint(ORACLES / f"tiny_{family}").tensors, "model.layers.1.self_attn"
    d_head = plain.config.d_head
    np.testing.assert_array_equal(plain.W_Q[1, 2], tensors[f"{at}.q_proj.weight"][2 * d_head : 3 * d_head].T)
    np.testing.assert_array_equal(plain.W_V[1, 1], tensors[f"{at}.v_proj.weight"][d_head : 2 * d_head].T)
    np.testing.assert_array_equal(plain.W_O[1, 3], tensors[f"{at}.o_proj.weight"][:, 3 * d_head : 4 * d_head].T)
    norm = tensors["model.layers.1.input_layernorm.weight"]
    np.testing.assert_array_equal(plain.ln1_w[1], 1 + norm if family == "gemma3" else norm)


def test_export_round_trip_is_exact(pair, family: str, tmp_path: Path) -> None:
    source = load_file(ORACLES / f"tiny_{family}" / "model.safetensors")
    for lm in pair:
        target = lm.export(tmp_path / ("stacked" if lm.upstream.is_stacked else "unstacked"))
        written = load_file(target / "model.safetensors")
        assert set(written) == set(source)
        for name, values in source.items():
            np.testing.assert_array_equal(written[name], values, err_msg=name)


def test_parameters_load_onto_a_mesh(pair, family: str) -> None:
    for lm in pair:
        spread = load(
            ORACLES / f"tiny_{family}",
            upstream=lm.upstream.name,
            stacked=lm.upstream.is_stacked,
            sharding=jax.make_mesh((2,), ("model",)),
        )
        jax.tree.map(np.testing.assert_array_equal, spread.params, lm.params)
        close(spread(TOKENS), lm(TOKENS), ROUNDING[family])


def test_half_precision(pair, family: str) -> None:
    checkpoint = read_checkpoint(ORACLES / f"tiny_{family}")
    half = FAMILIES[family].from_checkpoint(checkpoint, dtype=jnp.bfloat16, stacked=True)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}
    logits = half(TOKENS)
    assert logits.dtype == jnp.bfloat16
    assert bool(jnp.isfinite(logits).all())
    if family != "gemma3":  # twelve random layers amplify the rounding
        expected = np.asarray(pair[0](TOKENS))
        difference = np.abs(np.asarray(logits, np.float32) - expected)[TOKENS >= 0]
        assert difference.max() < 0.05 * np.abs(expected).max()
    with pytest.raises(InvalidInputError, match=r"(?s)float16.*infinite in float16.*Fix: "):
        FAMILIES[family].from_checkpoint(checkpoint, dtype="float16")


def test_patch_sets_fit_what_is_installed(pair) -> None:
    for lm in pair:
        report = lm.upstream.patch_set.check()
        assert not report.is_broken, report
        assert set(lm.upstream.patch_set.upstream) == set(lm.upstream.patch_set.digests())


REFUSED = [
    ("llama", {"attention_bias": True}, "attention_bias to be False: Tunix's Llama 3 does not have"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling="),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads to divide num_attention_heads"),
    ("llama", {"sliding_window": 9}, "Unknown configuration keys sliding_window=9"),
    ("qwen3", {"head_dim": KeyError}, "Configuration without head_dim"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types="),
    ("gemma3", {"rms_norm_eps": 1e-5}, "rms_norm_eps to be 1e-06"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    ("gemma3", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar to be 6"),
    ("gemma3", {"layer_types": ["full_attention"] * 12}, "layer_types="),
    ("gemma3", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling="),
    ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "{'rope_type': 'linear', 'factor': 1.0}"),
    ("gemma3", {"sliding_window": KeyError}, "Configuration without sliding_window"),
]


@pytest.mark.parametrize(("family", "changes", "words"), REFUSED)
def test_refused(family: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        FAMILIES[family].from_checkpoint(altered(family, **changes))
    assert words in str(error.value)
    assert "Fix: " in str(error.value)


@pytest.mark.parametrize("stacked", [False, True])
def test_weights_that_do_not_fit(family: str, stacked: bool) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    with pytest.raises(LoadError, match=rf"missing \(1\): {name}"):
        FAMILIES[family].from_checkpoint(altered(family, without=name), stacked=stacked)
    with pytest.raises(LoadError, match=r"mlp\.down_proj\.weight has shape"):
        FAMILIES[family].from_checkpoint(altered(family, intermediate_size=41), stacked=stacked)


# What single families have.


def test_a_tied_qwen3() -> None:
    lm = tunix_qwen3.from_checkpoint(altered("qwen3", without="lm_head.weight", tie_word_embeddings=True), stacked=True)
    assert "lm_head" not in lm.params
    np.testing.assert_array_equal(lm.W_U, np.asarray(lm.W_E).T)
    report = lm.check(TOKENS)
    assert report.ok, report


def test_q_and_k_of_a_qwen3_are_before_their_norms() -> None:
    lm = tunix_qwen3.from_checkpoint(read_checkpoint(ORACLES / "tiny_qwen3"))
    q, rot_q = (np.asarray(value) for value in lm.reap(TOKENS[:1], ["1.q", "1.rot_q"]).values())
    gain = np.asarray(lm.params["layers"]["1"]["attn"]["q_norm"]["w"])
    normed = q / np.sqrt(np.mean(np.square(q), axis=-1, keepdims=True) + 1e-5) * gain
    # A rotation leaves the length of each pair of components; at the first position it leaves all.
    np.testing.assert_allclose(rot_q[:, 0], normed[:, 0], rtol=1e-5)
    np.testing.assert_allclose(
        np.square(rot_q[..., :4]) + np.square(rot_q[..., 4:]),
        np.square(normed[..., :4]) + np.square(normed[..., 4:]),
        rtol=1e-4,
    )


def test_windows_and_post_norms_of_a_gemma3() -> None:
    lm = tunix_gemma3.from_checkpoint(read_checkpoint(ORACLES / "tiny_gemma3"), stacked=True)
    assert lm.config is not None
    assert lm.config.window == ((7,) * 5 + (None,)) * 2
    local, over = (np.asarray(lm.reap(TOKENS, f"{i}.pattern")[f"{i}.pattern"]) for i in (10, 11))
    assert (local[0, :, 9, :3] == 0).all()
    assert (local[0, :, 9, 3:] > 0).all()
    assert (over[0, :, 9] > 0).all()
    # Judged by other windows, the same patterns fail.
    for window in (None, 7, ((6,) * 5 + (None,)) * 2):
        config = dataclasses.replace(lm.config, window=window)
        assert not dataclasses.replace(lm, config=config).check(TOKENS).ok
    before, after = (np.asarray(value) for value in lm.reap(TOKENS, ["3.attn_proj", "3.attn_out"]).values())
    gain = 1 + np.asarray(lm.upstream.layer_params(lm.params, 3)["post_attention_norm"]["scale"])  # type: ignore[misc]
    normed = before / np.sqrt(np.mean(np.square(before), axis=-1, keepdims=True) + 1e-6) * gain
    np.testing.assert_allclose(after, normed, rtol=1e-4, atol=1e-5)


def test_a_gemma3_with_as_many_heads_for_keys() -> None:
    """Tunix then holds query, key and value weights as one."""
    tensors = read_checkpoint(ORACLES / "tiny_gemma3").tensors
    doubled = {
        name: np.concatenate([tensors[name]] * 2)
        for name in tensors
        if name.endswith(("k_proj.weight", "v_proj.weight"))
    }
    plain, stacked = (
        tunix_gemma3.from_checkpoint(altered("gemma3", doubled, num_key_value_heads=4), stacked=is_stacked)
        for is_stacked in (False, True)
    )
    assert plain.params["layers"]["0"]["attn"]["qkv_einsum"]["w"].shape == (3, 4, 24, 6)
    close(stacked(TOKENS), plain(TOKENS), ROUNDING["gemma3"])
    report = stacked.check(TOKENS)
    assert report.ok, report


def test_load_names_the_upstreams_of_a_family() -> None:
    with pytest.raises(UnknownNameError, match=r"Known: transformers_llama, tunix_llama3"):
        load(ORACLES / "tiny_llama", upstream="tunix")
    assert load(ORACLES / "tiny_llama").upstream.name == "transformers_llama"
    assert load(ORACLES / "tiny_qwen3").upstream.name == "tunix_qwen3"


def test_transformers_and_tunix_agree_on_smollm2() -> None:
    """The same weights through two upstreams that share no code, at every site."""
    one, other = (load("smollm2-135m", stacked=True, upstream=name) for name in ("transformers_llama", "tunix_llama3"))
    tokens = one.tokenize("The Eiffel Tower is in the city of")
    logits = one(tokens)
    np.testing.assert_allclose(other(tokens), logits, atol=2e-4 * float(jnp.abs(logits).max()))
    values, others = one.reap(tokens, "*"), other.reap(tokens, "*")
    assert set(values) == set(others)
    causal = np.tril(np.ones((tokens.shape[1], tokens.shape[1]), bool))
    for site, value in values.items():
        # Masked scores are each upstream's own large negative number.
        seen = np.where(causal, value, 0) if site.name == "attn_scores" else value
        found = np.where(causal, others[site], 0) if site.name == "attn_scores" else others[site]
        np.testing.assert_allclose(found, seen, atol=1e-3 * max(1.0, float(np.abs(seen).max())), err_msg=str(site))
