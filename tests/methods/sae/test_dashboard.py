"""What is seen of latents, against all activations at once; effects on logits against the weights themselves."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, UnknownNameError
from interp_jax.core.results import load_result, save_result
from interp_jax.core.sites import Site
from interp_jax.data.text_streams import pack
from interp_jax.forward.site_values import Keep
from interp_jax.methods.sae import SAE, ReLU, dashboard
from interp_jax.methods.sae.dashboard import Show, interval_edges, latent_dashboard
from interp_jax.methods.sae.examples import random_scores, ranks
from interp_jax.methods.sae.logit_effects import N_BINS, logit_effects, nearest_rows
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import Upstream
from interp_jax.transforms.compilations import count_compilations
from interp_jax.transforms.sowing import layer_scope, sow

D, D_VOCAB, N_LATENTS, DEAD = 4, 9, 11, 6
SHOW = Show(n_top=3, n_intervals=3, n_per_interval=2, n_before=2, n_after=1, n_logits=2, n_neighbours=2)


def toy_forward(params, tokens):
    """What is at a position depends on its token and, half as much, on the one before."""
    x = params["W_E"][tokens]
    with layer_scope(0):
        return sow(2 * x + jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1], name="resid_post") @ params["W_U"]


def integers(rng, *shape, low=-3, high=4):
    return jnp.asarray(rng.integers(low, high, shape), jnp.float32)


@pytest.fixture
def toy(rng):
    params = {"W_E": integers(rng, D_VOCAB, D), "W_U": integers(rng, D, D_VOCAB)}
    return LanguageModel(Upstream("toy", toy_forward), params, name="toy")


@pytest.fixture
def toy_sae(rng):
    """Small integers: sums are exact in whatever order, and many activations are equal."""
    W_dec = integers(rng, N_LATENTS, D).at[3].set(0.0)
    params = {"W_enc": integers(rng, D, N_LATENTS), "b_enc": integers(rng, N_LATENTS), "W_dec": W_dec}
    params |= {"b_enc": params["b_enc"].at[DEAD].set(-1e4), "b_dec": jnp.zeros(D)}
    return SAE(ReLU(is_centred=False), params, read=Site(0, "resid_post"))


@pytest.fixture
def toy_tokens(rng):
    tokens = rng.integers(0, D_VOCAB, (7, 6)).astype(np.int32)
    tokens[2, :2] = -1
    tokens[5, 4:] = -1
    return tokens


def dense_latents(lm, sae, tokens, mask):
    """All activations `[seq, pos, latent]`, in NumPy."""
    x = np.asarray(lm.params["W_E"])[tokens]
    before = np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], axis=1)
    pre = (2 * x + before) @ np.asarray(sae.W_enc) + np.asarray(sae.params["b_enc"])
    return np.maximum(pre, 0) * mask[..., None]


def window(array, seq, pos, fill):
    """What stands at offsets -2 to 1 of a position."""
    return [array[seq, at] if 0 <= at < array.shape[1] else fill for at in range(pos - 2, pos + 2)]


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_top_examples_are_those_of_all_activations(toy, toy_sae, toy_tokens, batch_size):
    data = latent_dashboard(toy, toy_sae, toy_tokens, show=SHOW, batch_size=batch_size, progress=False)
    mask = (toy_tokens >= 0) & (np.arange(6) > 0)
    dense = dense_latents(toy, toy_sae, toy_tokens, mask)
    assert data.n_tokens == mask.sum()
    np.testing.assert_array_equal(data.n_fired, (dense > 0).sum((0, 1)))
    np.testing.assert_array_equal(data.largest, dense.max((0, 1)))
    assert data.n_fired[DEAD] == 0
    for latent in range(N_LATENTS):
        best = [(max(range(6), key=lambda t, s=s: dense[s, t, latent]), s) for s in range(7)]
        best = [(-dense[s, t, latent], s, t) for t, s in best if dense[s, t, latent] > 0]
        for place, (value, seq, pos) in enumerate(sorted(best)[:3]):
            assert (data.top.sequence[latent, place], data.top.position[latent, place]) == (seq, pos)
            assert data.top.value[latent, place] == -value
            np.testing.assert_array_equal(data.top.tokens[latent, place], window(toy_tokens, seq, pos, -1))
            np.testing.assert_array_equal(data.top.values[latent, place], window(dense[..., latent], seq, pos, 0))
        assert (data.top.sequence[latent, len(best) :] == -1).all()
        assert (data.top.value[latent, len(best) :] == 0).all()


def test_intervals_hold_what_they_say(toy, toy_sae, toy_tokens):
    data = latent_dashboard(toy, toy_sae, toy_tokens, show=SHOW, batch_size=3, progress=False)
    dense = dense_latents(toy, toy_sae, toy_tokens, (toy_tokens >= 0) & (np.arange(6) > 0))
    edges = interval_edges(data.largest, 3)
    for latent in range(N_LATENTS):
        values = dense[..., latent][dense[..., latent] > 0]
        bars = np.minimum(values * 24 // max(data.largest[latent], 1), 23)
        np.testing.assert_array_equal(data.counts[latent], np.bincount(bars.astype(int), minlength=24))
        for interval, (low, high) in enumerate(zip(edges[latent], edges[latent, 1:], strict=False)):
            is_last = interval == 2
            inside = (values >= low) & ((values < high) | is_last)
            assert data.interval_counts[latent, interval] == inside.sum()
            samples = type(data.samples)(*(column[latent, interval] for column in data.samples))
            n = min(2, int(inside.sum()))
            chosen = list(zip(samples.sequence[:n].tolist(), samples.position[:n].tolist(), strict=True))
            assert len(set(chosen)) == n
            assert (samples.sequence[n:] == -1).all()
            for place, (seq, pos) in enumerate(chosen):
                value = dense[seq, pos, latent]
                assert samples.value[place] == value > 0
                assert low <= value < high or (is_last and value == high)
                np.testing.assert_array_equal(samples.tokens[place], window(toy_tokens, seq, pos, -1))
                np.testing.assert_array_equal(samples.values[place], window(dense[..., latent], seq, pos, 0))


def test_samples_depend_on_the_seed_alone(toy, toy_sae, toy_tokens):
    def sampled(**options):
        data = latent_dashboard(toy, toy_sae, toy_tokens, show=SHOW, progress=False, **options)
        return data.latents, data.samples, data.top

    _, samples, top = sampled(batch_size=7)
    for options in ({"batch_size": 2}, {"batch_size": 1, "latents": [8, 0, 5]}):
        chosen, others, other_top = sampled(**options)
        for one, other in zip((*samples, *top), (*others, *other_top), strict=True):
            np.testing.assert_array_equal(one[chosen], other)
    different = latent_dashboard(toy, toy_sae, np.tile(toy_tokens, (20, 1)), show=SHOW, seed=1, progress=False)
    same_text = latent_dashboard(toy, toy_sae, np.tile(toy_tokens, (20, 1)), show=SHOW, seed=2, progress=False)
    np.testing.assert_array_equal(different.counts, same_text.counts)
    # Twenty copies of each token: two samples of the same token at the same place are rare.
    if (different.n_fired > 0).any():
        assert (different.samples.sequence != same_text.samples.sequence).any()


def test_what_is_held_does_not_grow_with_the_text(toy, toy_sae, toy_tokens, monkeypatch):
    held = []

    def latents(*args):
        held.append(result := compute(*args))
        return result

    compute = dashboard._latents
    monkeypatch.setattr(dashboard, "_latents", latents)
    monkeypatch.setattr(dashboard, "_LATENT_BYTES", 4 * 6 * N_LATENTS * 3)
    data = latent_dashboard(toy, toy_sae, toy_tokens, show=SHOW, progress=False)
    assert [one.shape for one in held] == [(3, 6, N_LATENTS)] * 6  # seven sequences, twice
    whole = latent_dashboard(toy, toy_sae, toy_tokens, show=SHOW, batch_size=7, progress=False)
    np.testing.assert_array_equal(data.counts, whole.counts)


def test_random_scores_are_uniform_and_independent():
    token, latent = np.divmod(np.arange(200_000), 400)
    scores = random_scores(5, token, latent)
    assert scores.min() >= 0
    assert scores.max() < 1
    assert len(np.unique(scores)) == len(scores)
    counts = np.histogram(scores, bins=20, range=(0, 1))[0]
    assert np.abs(counts - 10_000).max() < 5 * np.sqrt(10_000)
    table = scores.reshape(500, 400) - 0.5
    for one, other in (
        (table[:, 1:], table[:, :-1]),
        (table[1:], table[:-1]),
        (table, random_scores(6, token, latent).reshape(500, 400) - 0.5),
    ):
        assert abs((12 * one * other).mean()) < 5 / np.sqrt(one.size)


def test_every_token_of_an_interval_is_as_likely_to_be_sampled():
    """Of 50 tokens, the 5 with the highest random scores, for 4000 latents: each about 400 times."""
    token, latent = np.divmod(np.arange(50 * 4000), 4000)
    scores = random_scores(0, token, latent).reshape(50, 4000)
    times = np.bincount(np.argsort(-scores, axis=0)[:5].reshape(-1), minlength=50)
    assert np.abs(times - 400).max() < 5 * np.sqrt(400)


def test_ranks_count_from_the_start_of_each_run():
    assert ranks(np.array([2, 2, 5, 7, 7, 7])).tolist() == [0, 1, 0, 0, 1, 2]
    assert ranks(np.zeros(0, int)).tolist() == []


def test_special_tokens_count_only_when_asked_for(toy, toy_sae):
    texts = ["3 1 2", "4 4 1 5"]
    train, _ = pack(texts, lambda text: [int(word) for word in text.split()], n_ctx=4, separator=0, holdout=0)
    counted = latent_dashboard(toy, toy_sae, train, show=SHOW, progress=False)
    assert counted.n_tokens == int((train[:][:, 1:] != 0).sum())
    everything = latent_dashboard(toy, toy_sae, train, show=SHOW, keep=Keep(0, special_tokens=True), progress=False)
    assert everything.n_tokens == train.n_tokens
    assert everything.text == train.name


def test_one_program_reads_all_batches(toy, toy_sae, toy_tokens):
    with count_compilations() as new:
        # Sequences of a length of this test's own.
        latent_dashboard(toy, toy_sae, toy_tokens[:, :5], show=SHOW, batch_size=2, progress=False)
    names = [one.name for one in new]
    assert names.count("sae.dashboard_latents") == names.count("values of sites") == 1


def test_neighbours_have_the_largest_cosines(rng):
    rows = rng.normal(size=(23, 5)).astype(np.float32)
    rows[7] = 0
    wanted = np.array([4, 7, 22, 0])
    found = nearest_rows(rows, wanted, 3)
    norms = np.linalg.norm(rows, axis=1)
    for place, latent in enumerate(wanted):
        cosines = rows @ rows[latent] / np.maximum(norms * norms[latent], 1e-30)
        cosines[latent] = -np.inf
        np.testing.assert_allclose(found.cosine[place], np.sort(cosines)[::-1][:3], atol=1e-6)
        np.testing.assert_allclose(cosines[found.latent[place]], found.cosine[place], atol=1e-6)
        assert latent not in found.latent[place]
    assert nearest_rows(rows[:2], np.array([0, 1]), 5).latent.tolist() == [[1], [0]]


def residual_sae(key, lm, site, d):
    return SAE(ReLU(), ReLU().init(key, d_in=d, n_latents=6), read=site)


def unit(rows):
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def direct_effects(lm, rows):
    """Logits of the rows: the canonical weights, by hand."""
    rows = np.asarray(rows, np.float64)
    if lm.config.norm == "layernorm":
        rows = rows - rows.mean(1, keepdims=True)
    logits = rows * np.asarray(lm.ln_final_w, np.float64) @ np.asarray(lm.W_U, np.float64)
    return logits - logits.mean(1, keepdims=True)


def test_logit_effects_are_a_product_of_weights(tiny, key):
    d_model, latents = tiny.config.d_model, np.array([1, 5, 2])
    sae = residual_sae(key, tiny, Site(1, "resid_post"), d_model)
    found = logit_effects(tiny, sae, Site(1, "resid_post"), latents, n_tokens=4)
    assert found is not None
    direct = direct_effects(tiny, unit(sae.W_dec[latents]))
    size = np.abs(direct).max()
    ordered = np.sort(direct, axis=1)
    np.testing.assert_allclose(found.top, ordered[:, ::-1][:, :4], atol=1e-5 * size)
    np.testing.assert_allclose(found.bottom, ordered[:, :4], atol=1e-5 * size)
    np.testing.assert_allclose(np.take_along_axis(direct, found.top_ids, 1), found.top, atol=1e-5 * size)
    np.testing.assert_allclose(np.take_along_axis(direct, found.bottom_ids, 1), found.bottom, atol=1e-5 * size)
    assert (found.counts.sum(1) == direct.shape[1]).all()
    for row, low, high, counts in zip(direct, found.bottom[:, 0], found.top[:, 0], found.counts, strict=True):
        # An effect may stand at an edge, and rounding put it on either side: sums up to an edge differ by few.
        edges = np.linspace(low, high, N_BINS + 1)[1:-1]
        assert np.abs(np.cumsum(counts)[:-1] - (row[:, None] < edges).sum(0)).max() <= 1
    # Units of the latents are no part of it.
    longer = replace(sae, params=sae.params | {"W_dec": 3 * sae.W_dec})
    again = logit_effects(tiny, longer, Site(1, "resid_post"), latents, n_tokens=4)
    assert again is not None
    np.testing.assert_allclose(again.top, found.top, rtol=1e-4)


@pytest.mark.parametrize(("name", "weight"), [("mlp_post", "W_out"), ("z", "W_O")])
def test_logit_effects_go_through_output_weights(tiny_llama, key, name, weight):
    W = np.asarray(tiny_llama.weight(weight, 1)).reshape(-1, tiny_llama.config.d_model)
    sae = residual_sae(key, tiny_llama, Site(1, name), len(W))
    found = logit_effects(tiny_llama, sae, Site(1, name), np.arange(6), n_tokens=3)
    assert found is not None
    direct = direct_effects(tiny_llama, unit(sae.W_dec) @ W)
    np.testing.assert_allclose(found.top, np.sort(direct, 1)[:, ::-1][:, :3], atol=1e-5 * np.abs(direct).max())


def test_effects_are_left_out_where_the_way_is_not_known(toy, toy_sae, toy_tokens, tiny_llama, key):
    assert latent_dashboard(toy, toy_sae, toy_tokens, show=SHOW, progress=False).effects is None
    sae = residual_sae(key, tiny_llama, Site(1, "q"), 24)
    assert logit_effects(tiny_llama, sae, Site(1, "q"), np.arange(6)) is None


def test_a_real_model_has_texts_and_effects(tiny_llama, key, rng, tmp_path):
    tokens = rng.integers(0, 256, (4, 8)).astype(np.int32)
    sae = residual_sae(key, tiny_llama, Site(1, "mlp_out"), 24)
    data = latent_dashboard(tiny_llama, sae, tokens, show=SHOW, latents=[2, 4], progress=False)
    assert data.effects is not None
    shown = {*data.top.tokens.reshape(-1).tolist(), *data.effects.top_ids.reshape(-1).tolist()} - {-1}
    assert shown <= set(data.texts)
    assert all(data.texts[token] == tiny_llama.decode([token]) for token in shown)
    assert "2 latents of SAE(relu" in repr(data)
    saved = load_result(save_result(replace(data, texts={}), name="dashboard", root=tmp_path)).result
    np.testing.assert_array_equal(saved["counts"], data.counts)


def test_mistakes_are_named(toy, toy_sae, toy_tokens):
    def look(sae=toy_sae, tokens=toy_tokens, **options):
        return latent_dashboard(toy, sae, tokens, progress=False, **{"show": SHOW, **options})

    for latents in ([0, 0], [N_LATENTS], [-1], [], [0.5]):
        with pytest.raises(InvalidInputError, match=r"latents=[\s\S]*from 0 to 10[\s\S]*Fix:"):
            look(latents=latents)
    with pytest.raises(InvalidInputError, match="n_top=0"):
        look(show=SHOW._replace(n_top=0))
    with pytest.raises(InvalidInputError, match="batch_size=0"):
        look(batch_size=0)
    for wrong, words in (
        ({"keep": "all"}, "str 'all' was given for keep"),
        ({"show": {"n_top": 3}}, "dict .* was given for show"),
        ({"sae": [toy_sae]}, "list .* was given for sae"),
        ({"sae": None}, "NoneType None was given for sae"),
    ):
        with pytest.raises(InvalidInputError, match=words + r"[\s\S]*Expected:[\s\S]*Fix:"):
            look(**wrong)
    with pytest.raises(InvalidInputError, match="seed=-1"):
        look(seed=-1)
    with pytest.raises(InvalidInputError, match="No token of the text counts"):
        look(keep=Keep(first_position=6))
    with pytest.raises(InvalidInputError, match="without a site"):
        look(sae=replace(toy_sae, read=None))
    with pytest.raises(UnknownNameError, match="resid_pots"):
        look(sae=replace(toy_sae, read=Site(0, "resid_pots")))
    broken = replace(toy, params=jax.tree.map(lambda leaf: leaf.at[:].set(jnp.nan), toy.params))
    with pytest.raises(InvalidInputError, match=r"not finite, in\s+sequences 0"):
        latent_dashboard(broken, toy_sae, toy_tokens, show=SHOW, progress=False)
