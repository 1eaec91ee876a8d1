"""Penzai's GPT-NeoX under its patch set: Penzai's bits, PyTorch's numbers, its own scan over layers, what is refused.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, LoadError, PatchError, UnknownNameError, UnsupportedModelError
from interp_jax.core.sites import Site
from interp_jax.models.check import stable_hlo
from interp_jax.models.contracts import ACTIVATIONS
from interp_jax.models.loading import load, read_checkpoint
from interp_jax.models.weights.checkpoint import Tensors
from interp_jax.patches import penzai_gpt_neox, penzai_layers, transformers_flax
from interp_jax.transforms.compilations import count_compilations
from interp_jax.transforms.harvest import call_and_reap
from interp_jax.transforms.running_pass import run
from interp_jax.transforms.sowing import layer_scope
from tests.conftest import ORACLES

TINY = ORACLES / "tiny_neox"
TOKENS = np.array([[5, 80, 3, 7, 200], [-1, -1, 6, 0, 9]], np.int32)
LAYOUTS = pytest.mark.parametrize("which", [0, 1], ids=["unstacked", "stacked"])


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """The tiny model unstacked and stacked, each read from its files."""
    return load(TINY), load(TINY, stacked=True)


def altered(*, without: str = "", more: dict[str, Any] | None = None, **changes: Any) -> Any:
    """The tiny model's files with another configuration; `KeyError` stands for a key that is not there."""
    checkpoint = read_checkpoint(TINY)
    config = {key: value for key, value in {**checkpoint.config, **changes}.items() if value is not KeyError}
    arrays = {name: checkpoint.tensors[name] for name in checkpoint.tensors if name != without}
    return dataclasses.replace(checkpoint, config=config, tensors=Tensors.from_arrays({**arrays, **(more or {})}))


def close(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    largest = max(float(np.abs(other).max()), 1.0)
    np.testing.assert_allclose(one, other, atol=tolerance * largest, rtol=tolerance)


def as_it_comes(lm: Any, patchers: Any = (), **changes: Any) -> Any:
    """A function of (params, tokens) that builds and runs Penzai's model under patchers, by Penzai's own calls only."""
    from penzai import pz

    config, is_stacked = dataclasses.replace(lm.config, **changes), lm.upstream.is_stacked
    model = penzai_gpt_neox.unbound_model(config, config.d_head // 2, patchers, stacked=is_stacked)

    def forward(params: Any, tokens: Any) -> Any:
        with transformers_flax.upstream_rules(patchers):
            ids, mask, positions = transformers_flax.read_tokens(tokens)
            bound = pz.bind_variables(model, penzai_gpt_neox.parameters(params, config, stacked=is_stacked))
            logits = bound(
                pz.nx.wrap(ids, "batch", "seq"),
                token_positions=pz.nx.wrap(jnp.where(mask, positions, -1), "batch", "seq"),
            )
            return logits.unwrap("batch", "seq", "vocabulary")

    return forward


@LAYOUTS
def test_logits_are_those_of_torch(models, which: int) -> None:
    lm, recorded = models[which], np.load(ORACLES / "tiny_neox_logits.npz")
    np.testing.assert_allclose(lm(recorded["tokens"]), recorded["logits"], atol=2e-5, rtol=1e-4)
    assert (lm.config.rope_theta, lm.config.is_parallel, lm.config.is_tied) == (100000, True, False)


@LAYOUTS
def test_tags_alone_change_no_byte_of_penzais_program(models, which: int) -> None:
    """On Penzai as it comes, without our mends, whose scan is unrolled."""
    lm = models[which]
    untagged = as_it_comes(lm)
    tagged = as_it_comes(lm, lm.upstream.patch_set.tags)
    assert stable_hlo(tagged, lm.params, TOKENS) == stable_hlo(untagged, lm.params, TOKENS)
    np.testing.assert_array_equal(jax.jit(tagged)(lm.params, TOKENS), jax.jit(untagged)(lm.params, TOKENS))
    n_bodies = 1 if lm.upstream.is_stacked else 3
    assert str(jax.make_jaxpr(tagged)(lm.params, TOKENS)).count("sow[") == 3 + 16 * n_bodies
    assert stable_hlo(lm.forward, lm.params, TOKENS) == stable_hlo(lm.upstream.untagged, lm.params, TOKENS)


def test_an_unrolled_scan_is_looped_over_all_the_same() -> None:
    """Penzai's own LayerStack, under the tags alone: one scan in the program, concrete layers in the loop."""
    lm = penzai_gpt_neox.from_checkpoint(altered(layer_norm_eps=1e-6), stacked=True)
    tagged = as_it_comes(lm, lm.upstream.patch_set.tags)
    expected = lm.intervene(TOKENS, {"1.mlp_out": lambda value: value * 0.0})
    for engine in ("compiled", "python"):
        seen = []
        for layer, name, value in (running_pass := run(tagged, lm.params, TOKENS, sites="mlp_out", engine=engine)):
            seen.append((layer, name))
            if layer == 1:
                running_pass.modified_value = value * 0.0
        assert seen == [(0, "mlp_out"), (1, "mlp_out"), (2, "mlp_out")]
        close(running_pass.retval, expected)


def test_the_last_norm_gets_its_epsilon(models) -> None:
    plain, _ = models
    upstream = jax.jit(as_it_comes(plain))(plain.params, TOKENS)
    assert float(jnp.abs(plain(TOKENS) - upstream).max()) > 1e-3
    # Where upstream's own epsilon is what is asked for, our program is upstream's.
    ours = penzai_gpt_neox.from_checkpoint(altered(layer_norm_eps=1e-6))
    assert stable_hlo(ours.forward, ours.params, TOKENS) == stable_hlo(as_it_comes(ours), ours.params, TOKENS)


def test_a_stack_compiles_one_layer_however_many_there_are(models) -> None:
    _, stacked = models
    sizes = {}
    for n_layers in (3, 12):
        params = {
            "transformer": {
                **stacked.params["transformer"],
                "blocks": jax.tree.map(
                    lambda leaf, n=n_layers // 3: jnp.concatenate([leaf] * n), stacked.params["transformer"]["blocks"]
                ),
            }
        }
        for name, patchers in (("as it comes", ()), ("mended", stacked.upstream.patch_set.mends)):
            forward = as_it_comes(stacked, patchers, n_layers=n_layers)
            sizes[name, n_layers] = stable_hlo(forward, params, TOKENS).count("\n")
    assert sizes["mended", 3] == sizes["mended", 12]
    assert sizes["as it comes", 12] > 1.5 * sizes["as it comes", 3]


def test_stacked_and_unstacked_agree_at_every_site(models) -> None:
    plain, stacked = models
    close(stacked(TOKENS), plain(TOKENS))
    expected, values = plain.reap(TOKENS, "*"), stacked.reap(TOKENS, "*")
    assert set(values) == set(expected)
    assert len(expected) == 3 + 3 * 16
    for site, value in expected.items():
        close(values[site], value)


@pytest.mark.slow
def test_gradients_agree(models) -> None:
    plain, stacked = models

    def gradient(lm: Any) -> Any:
        def loss(params: Any) -> Any:
            return -jax.nn.log_softmax(lm.forward(params, TOKENS[:1]))[..., 7].mean()

        return jax.jit(jax.grad(loss))(lm.params)

    expected = gradient(plain)
    jax.tree.map(lambda one, other: close(one, other, 1e-4), stacked.upstream.restack(gradient(stacked)), expected)
    assert all(
        float(jnp.abs(leaf).max()) > 1e-6 for leaf in jax.tree.leaves(expected["transformer"]["final_norm/shift.bias"])
    )


@LAYOUTS
@pytest.mark.parametrize("engine", ["compiled", "python"])
def test_the_loop_reads_what_is_reaped_and_changes_it(models, which: int, engine: Any) -> None:
    lm = models[which]
    expected = lm.reap(TOKENS, ["resid_pre", "pattern", "z"])
    seen = []
    for layer, name, value in (running_pass := lm.run(TOKENS, sites=["resid_pre", "pattern", "z"], engine=engine)):
        seen.append(Site(layer, name))
        assert value.shape == expected[layer, name].shape
        if engine == "compiled":
            assert layer > 1 or np.allclose(value, expected[layer, name], atol=1e-5)
        if (layer, name) == (1, "z"):
            running_pass.modified_value = value * 1.5
    # Within a traced scan, the python engine visits site after site, each with all its layers.
    in_order = engine == "compiled" or not lm.upstream.is_stacked
    assert seen == list(expected) if in_order else set(seen) == set(expected)
    close(running_pass.retval, models[0].intervene(TOKENS, {"1.z": lambda value: value * 1.5}))
    assert float(jnp.abs(running_pass.retval - lm(TOKENS)).max()) > 1e-2


@LAYOUTS
@pytest.mark.slow
def test_contracts(models, which: int) -> None:
    report = models[which].check(TOKENS)
    assert report.ok, report
    # resid_mid is not there, the norms and everything else are.
    assert [outcome.contract for outcome in report.outcomes if outcome.ok is None] == [
        "resid_mid = resid_pre + attn_out"
    ]


@pytest.mark.slow
def test_generation_agrees_with_and_without_penzais_cache(models) -> None:
    value = np.zeros((1, 1, 24), np.float32)
    value[..., 3] = 4.0
    changed = {"1.resid_pre": lambda x: x + value}
    plain, stacked = models
    expected = plain.generate(TOKENS[1:], max_new_tokens=3, use_cache=False, interventions=changed)
    for lm, interventions in ((stacked, changed), (plain, changed), (stacked, {})):
        generation = lm.generate(TOKENS[1:], max_new_tokens=3, interventions=interventions)
        if interventions:
            np.testing.assert_array_equal(generation.tokens, expected.tokens)
            close(generation.log_probs, expected.log_probs, 1e-4)
        else:
            assert not np.allclose(generation.log_probs, expected.log_probs, atol=1e-3)


def test_the_layout_of_the_weights(models) -> None:
    plain, stacked = models
    jax.tree.map(np.testing.assert_array_equal, plain.stacked().params, stacked.params)
    jax.tree.map(np.testing.assert_array_equal, stacked.unstacked().params, plain.params)
    assert plain.stacked().upstream is stacked.upstream
    for name in plain.upstream.weight_names:
        np.testing.assert_array_equal(stacked.weight(name), plain.weight(name))
    tensors, at = read_checkpoint(TINY).tensors, "gpt_neox.layers.1.attention"
    # Query, key and value of a head lie side by side: rows 24 to 31 of the fused tensor are the query of head 1.
    np.testing.assert_array_equal(plain.W_Q[1, 1], tensors[f"{at}.query_key_value.weight"][24:32].T)
    np.testing.assert_array_equal(plain.b_V[1, 2], tensors[f"{at}.query_key_value.bias"][64:72])
    np.testing.assert_array_equal(plain.W_O[1, 2], tensors[f"{at}.dense.weight"][:, 16:].T)


def test_moving_to_another_layer_compiles_nothing(models) -> None:
    _, stacked = models

    def passes(layer: int) -> Any:
        for _, _, value in (running_pass := stacked.run(TOKENS, sites=f"{layer}.mlp_out")):
            running_pass.modified_value = value * 0.0
        stacked.reap(TOKENS, f"{layer}.attn_scores")
        return running_pass.retval

    zeroed = [passes(0), passes(1)]
    with count_compilations() as new:
        zeroed += [passes(2), passes(1)]
    assert not new
    np.testing.assert_array_equal(zeroed[1], zeroed[3])
    assert float(jnp.abs(zeroed[2] - zeroed[1]).max()) > 1e-3


def test_there_is_no_resid_mid(models) -> None:
    for lm in models:
        with pytest.raises(UnknownNameError, match=r"(?s)'1.resid_mid'.*in parallel.*there is no resid_mid"):
            lm.reap(TOKENS, "1.resid_mid")


def test_a_tied_head_is_the_embedding() -> None:
    checkpoint = altered(without="embed_out.weight", tie_word_embeddings=True)
    lm = penzai_gpt_neox.from_checkpoint(checkpoint, stacked=True)
    assert "lm_head.weights" not in lm.params["transformer"]
    np.testing.assert_array_equal(lm.W_U, np.asarray(lm.W_E).T)
    ln_final, logits = lm.reap(TOKENS, ["ln_final", "logits"]).values()
    np.testing.assert_allclose(logits, np.asarray(ln_final) @ np.asarray(lm.W_E).T, atol=1e-4)


def test_half_precision(models) -> None:
    half = penzai_gpt_neox.from_checkpoint(read_checkpoint(TINY), dtype=jnp.bfloat16, stacked=True)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}
    logits, expected = half(TOKENS), np.asarray(models[0](TOKENS))
    assert logits.dtype == jnp.bfloat16
    assert np.abs(np.asarray(logits, np.float32) - expected)[TOKENS >= 0].max() < 0.05 * np.abs(expected).max()
    with pytest.raises(InvalidInputError, match=r"(?s)float16.*infinite in float16.*Fix: "):
        penzai_gpt_neox.from_checkpoint(read_checkpoint(TINY), dtype="float16")


def test_patch_sets_fit_what_is_installed() -> None:
    for patch_set in (penzai_gpt_neox.PATCH_SET, penzai_gpt_neox.STACKED_PATCH_SET):
        report = patch_set.check()
        assert not report.is_broken, report
        assert set(patch_set.upstream) == set(patch_set.digests())
    too_new = dataclasses.replace(penzai_gpt_neox.PATCH_SET, versions={"penzai": ">=0.3"})
    with pytest.raises(PatchError, match=r"penzai 0\.2(.|\n)*penzai >=0\.3"):
        too_new.require_version()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_parallel_residual": False}, "use_parallel_residual to be True: Penzai's GPT-NeoX does not have"),
        ({"attention_bias": False, "hidden_act": "quick_gelu"}, "attention_bias=False"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling="),
        ({"rope_theta": 10000}, "rope_theta to be 100000"),
        ({"partial_rotary_factor": 1.0}, "partial_rotary_factor to be 0.5"),
        ({"num_attention_heads": 5}, "num_attention_heads=5 and hidden_size=24"),
        ({"layer_norm_eps": KeyError}, "Configuration without layer_norm_eps"),
        ({"sliding_window": 12}, "Unknown configuration keys sliding_window=12"),
    ],
)
def test_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        penzai_gpt_neox.from_checkpoint(altered(**changes))
    assert words in str(error.value)
    assert "Fix: " in str(error.value)


@LAYOUTS
def test_weights_that_do_not_fit(which: int) -> None:
    name = "gpt_neox.layers.1.attention.query_key_value.bias"
    with pytest.raises(LoadError, match=name.replace(".", r"\.")):
        penzai_gpt_neox.from_checkpoint(altered(without=name), stacked=bool(which))
    with pytest.raises(LoadError, match=r"has shape \(40, 24\), expected \(41, 24\)"):
        penzai_gpt_neox.from_checkpoint(altered(intermediate_size=41), stacked=bool(which))


def test_buffers_of_old_files_are_left_over(models) -> None:
    at = "gpt_neox.layers.0.attention"
    buffers = {
        f"{at}.bias": np.ones((1, 1, 48, 48), bool),
        f"{at}.masked_bias": np.float32(-1e9) * np.ones(()),
        f"{at}.rotary_emb.inv_freq": np.ones(2, np.float32),
    }
    lm = penzai_gpt_neox.from_checkpoint(altered(more=buffers))
    np.testing.assert_array_equal(lm(TOKENS), models[0](TOKENS))


def test_the_nonlinearity_of_the_largest_model() -> None:
    """GPT-NeoX 20B names its gelu otherwise than Pythia does, and means its approximation."""
    lm = penzai_gpt_neox.from_checkpoint(altered(hidden_act="gelu_fast"))
    values = lm.reap(TOKENS, ["0.mlp_pre", "0.mlp_post"])
    expected = ACTIVATIONS["gelu_fast"](np.asarray(values["0.mlp_pre"], np.float64))
    np.testing.assert_allclose(values["0.mlp_post"], expected, atol=1e-6)
    assert np.abs(expected - ACTIVATIONS["gelu"](np.asarray(values["0.mlp_pre"]))).max() > 1e-5


def test_a_tag_shows_axes_in_the_order_asked_for_whatever_the_memory(rng: np.random.Generator) -> None:
    from penzai import pz

    array = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
    tag = penzai_layers.Tag("here", "a", "b", "c", "d")

    def forward(data: Any) -> Any:
        with layer_scope(4):
            return tag(pz.nx.wrap(data, "c", "a", "d", "b")).unwrap("c", "a", "d", "b")

    def untagged(data: Any) -> Any:
        return pz.nx.wrap(data, "c", "a", "d", "b").unwrap("c", "a", "d", "b")

    shown = array.transpose(1, 3, 0, 2)
    assert stable_hlo(forward, array) == stable_hlo(untagged, array)
    _, reaped = call_and_reap(forward, tag="site")(array)
    np.testing.assert_array_equal(reaped["here"], shown)
    for engine in ("compiled", "python"):
        for layer, _, value in (running_pass := run(forward, array, engine=engine)):
            assert (layer, value.shape) == (4, shown.shape)
            running_pass.modified_value = jnp.asarray(shown * np.arange(5)[:, None, None].astype(np.float32))
        np.testing.assert_allclose(running_pass.retval, array * np.arange(5, dtype=np.float32))
