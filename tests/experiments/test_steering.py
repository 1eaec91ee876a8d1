"""Steering by latents and by the raw difference, at smoke size: each method's vector is what it is said to be."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, UnknownNameError
from interp_jax.core.results import load_result, save_result
from interp_jax.experiments import steering
from interp_jax.experiments.steering import SMOKE, STUDIES
from interp_jax.methods.sae import SAE, TopK
from interp_jax.methods.sae.files import save_sae
from interp_jax.methods.steering import prompt_pair


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"the cat sat on mat {number} and the rat ran to the tree. " * 6)
    return dataclasses.replace(SMOKE, text=str(folder))


@pytest.fixture(scope="module")
def trained(config, tiny_llama):
    """A dictionary, and how often its latents fire, both from a text."""
    packed = steering.pack(config.text, tiny_llama, n_ctx=config.n_ctx, bos="sequence")
    return steering.dictionary(config, tiny_llama, packed, progress=False)


def test_the_vectors_are_what_they_are_said_to_be(config, tiny_llama, key, rng) -> None:
    sae = SAE(TopK(k=4), TopK(k=4).init(key, d_in=24, n_latents=48))
    frequencies = rng.random(48)
    pair = prompt_pair(tiny_llama, "the cat", "a tree", config.sae_layer)
    latents = pair.latents(sae.encode, sae.W_dec, frequencies=frequencies)
    reconstruction, top, projected = steering.latent_vectors(config, pair, latents)
    np.testing.assert_allclose(
        reconstruction.values, np.asarray(sae(pair.positive)) - np.asarray(sae(pair.negative)), atol=1e-3
    )
    np.testing.assert_array_equal(top.values, latents.top(3, include_negative=True))
    frequent = np.argsort(-frequencies, kind="stable")[:5]
    assert abs(projected.values @ np.asarray(sae.W_dec)[frequent].T).max() < 1e-3 * abs(pair.difference).max()
    # What was taken away lies in the span of what was projected out.
    rows = np.asarray(sae.W_dec)[frequent].astype(np.float64)
    removed = (pair.difference - projected.values).astype(np.float64)
    left = removed - removed @ np.linalg.pinv(rows) @ rows
    assert abs(left).max() < 1e-3 * abs(pair.difference).max()


@pytest.mark.slow
def test_a_study_from_text_to_figures(config, tiny_llama, trained, tmp_path) -> None:
    assert trained[1].shape == (48,) and trained[1].mean() == pytest.approx(config.k / 48, rel=1e-3)
    # From a saved SAE.
    save_sae(trained[0], tmp_path / "sae")
    config = dataclasses.replace(config, sae=str(tmp_path / "sae"))
    result = steering.run(config, lm=tiny_llama, progress=False)
    (found,) = result.studies.values()
    methods = [(sweep.method, sweep.sites) for sweep in found.sweeps]
    at = ("1.resid_pre",)
    assert methods == [
        ("raw difference", at),
        ("raw difference", ("2.resid_pre",)),
        ("SAE reconstruction", at),
        ("top 3 latents", at),
        ("frequent latents out", at),
    ]
    # Unsteered, all are the same model on the same text.
    assert len({sweep.loss[0] for sweep in found.sweeps}) <= 2
    assert len({sweep.completions[0] for sweep in found.sweeps}) == 1
    assert all(abs(sweep.loss[1] - sweep.baseline) > 1e-3 for sweep in found.sweeps)
    pair = prompt_pair(tiny_llama, STUDIES["anger"].positive, STUDIES["anger"].negative, 1)
    latents = pair.latents(trained[0].encode, trained[0].W_dec)
    left = np.square(pair.difference - latents.reconstruction).sum() / np.square(pair.difference).sum()
    assert found.fvu == pytest.approx(left, rel=1e-3)
    figures: dict[str, Any] = steering.plot(result)
    path = save_result(result, name="steering", config=config, figures=figures, root=tmp_path)
    assert {file.name for file in path.glob("*.png")} == {"anger_pareto.png", "anger_coefficients.png"}
    assert load_result(path).result["studies"]["anger"]["fvu"] == found.fvu
    assert "The SAE leaves" in repr(result)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"studies": ("wedding",)}, UnknownNameError, ["Unknown study 'wedding'", "Did you mean 'weddings'?"]),
        ({"sae_layer": 0}, InvalidInputError, ["sae_layer=0 and layers=(1, 2)", "add it to the layers"]),
    ],
    ids=str,
)
def test_what_cannot_be_run(config, tiny_llama, change, error, words) -> None:
    with pytest.raises(error) as raised:
        steering.run(dataclasses.replace(config, **change), lm=tiny_llama, progress=False)
    for word in [*words, "Fix:"]:
        assert word in str(raised.value)
