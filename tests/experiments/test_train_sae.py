"""Training a dictionary from one command: at smoke size on a tiny model, from text to evaluation, and taken up."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from interp_jax.core.errors import InterpError, LoadError, UnknownNameError
from interp_jax.experiments import train_sae
from interp_jax.experiments.train_sae import SMOKE, Config
from interp_jax.methods.sae import MatchingPursuit, Matryoshka, ReLU
from interp_jax.methods.sae.files import load_sae
from interp_jax.models.loading import load
from tests.conftest import ORACLES


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    animals = ("cat", "dog", "hen", "rat", "cow", "fox", "ape", "owl")
    for first in animals:
        for second in animals:
            line = f"the {first} sat on the mat and the {second} ran to the {first}. "
            (folder / f"{first}_{second}.txt").write_text(line * 3)
    return str(folder)


def test_from_text_to_a_dictionary(text, tmp_path) -> None:
    lm = load(ORACLES / "tiny_llama")
    config = dataclasses.replace(SMOKE, text=text, directory=str(tmp_path))
    result = train_sae.run(config, lm=lm, progress=False)
    numbers = result.evaluation.reconstruction
    assert 0 < numbers.l0 <= config.k and numbers.n_latents == config.n_latents
    assert result.log[-1]["step"] == config.n_steps and result.directory in repr(result)
    assert {name.rpartition(".")[2] for name in train_sae.plot(result)} == {"png", "html"}
    assert result.dashboard == str(tmp_path / "dashboard" / "index.html") and result.dashboard in repr(result)
    assert len(list((tmp_path / "dashboard" / "data").iterdir())) == 1 + config.n_latents // 32
    sae = load_sae(tmp_path / "sae")
    assert str(sae.read) == config.site and dict(sae.origin)["text"] == text
    # Again: the run is there, and nothing is trained anew.
    again = train_sae.run(config, lm=lm, progress=False)
    assert again.evaluation.losses == result.evaluation.losses
    np.testing.assert_array_equal(load_sae(tmp_path / "sae").W_dec, sae.W_dec)
    assert len(list(tmp_path.glob("activations_*"))) == 1
    with pytest.raises(LoadError, match="seed: 1, there 0"):
        train_sae.run(dataclasses.replace(config, seed=1), lm=lm, progress=False)


@pytest.mark.parametrize("activations", ["buffer", "direct"])
def test_activations_computed_as_they_are_needed(activations, text, tmp_path) -> None:
    config = dataclasses.replace(
        SMOKE,
        text=text,
        directory=str(tmp_path),
        activations=activations,
        n_buffer_tokens=2048,
        n_steps=4,
        n_dashboard=0,
    )
    result = train_sae.run(config, lm=load(ORACLES / "tiny_llama"), progress=False)
    assert result.log[-1]["step"] == 4 and not list(tmp_path.glob("activations_*"))
    with pytest.raises(UnknownNameError, match="Did you mean 'direct'"):
        train_sae.run(dataclasses.replace(config, activations="Direct"), lm=load(ORACLES / "tiny_llama"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variant": "topk"}, "Did you mean 'top_k'"),
        ({"k": 65}, "k = 65 was given in TopK, with 64 latents"),
        ({"n_steps": -1}, "n_steps = -1"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0"),
        ({"coefficient": -1.0}, "coefficient = -1.0"),
        ({"variant": "relu"}, "'relu' without a coefficient"),
        ({"n_held_out": 0}, "n_held_out = 0"),
        ({"n_dashboard": -1}, "n_dashboard = -1"),
        ({"save_every": 0}, "save_every = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
    ],
    ids=lambda part: "" if isinstance(part, str) else next(iter(part)),
)
def test_a_run_that_cannot_be_is_refused_before_the_model_is_loaded(changes, words, tmp_path) -> None:
    config = dataclasses.replace(SMOKE, model="no such model", directory=str(tmp_path), **changes)
    with pytest.raises(InterpError) as info:
        train_sae.run(config, progress=False)
    assert words in str(info.value) and "Fix:" in str(info.value) and not list(tmp_path.iterdir())


def test_variants_by_name() -> None:
    assert Config(variant="relu").architecture() == ReLU()
    assert Config(variant="matching_pursuit", k=5).architecture() == MatchingPursuit(k=5)
    assert Config(variant="matryoshka", k=5, n_latents=100).architecture() == Matryoshka(k=5, groups=(25, 75))
    with pytest.raises(UnknownNameError, match="Did you mean 'top_k'"):
        Config(variant="topk").architecture()
