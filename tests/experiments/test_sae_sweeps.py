"""The experiments that compare ways to train SAEs, at smoke size: every way is trained and told from the others."""

from __future__ import annotations

import dataclasses
import io
from types import ModuleType

import numpy as np
import pytest

from interp_jax.core.results import load_result, save_result
from interp_jax.experiment_files import parse_flags, read_config
from interp_jax.experiments import sae_beta1, sae_decoder_norm, sae_ghost_grads, sae_pre_encoder_bias
from interp_jax.methods.sae import GhostGrads, Redraw, Resample
from interp_jax.models.loading import load
from tests.conftest import ORACLES

EXPERIMENTS = {
    "sae_ghost_grads": sae_ghost_grads,
    "sae_beta1": sae_beta1,
    "sae_decoder_norm": sae_decoder_norm,
    "sae_pre_encoder_bias": sae_pre_encoder_bias,
}
EACH = pytest.mark.parametrize("name", EXPERIMENTS)


@EACH
def test_the_ways_differ_in_the_question_only(name) -> None:
    config = EXPERIMENTS[name].Config()
    ways = EXPERIMENTS[name].ways(config)
    assert len(set(ways.values())) == len(ways)
    for way in ways.values():
        assert way.coefficients == config.setup.coefficients and way.sites == (config.setup.site,)
        assert (way.n_latents, way.rule.n_steps) == (config.setup.n_latents, config.setup.n_steps)
        assert way.rule.learning_rate == config.setup.learning_rate


@EACH
def test_flags_and_saved_configurations(name, tmp_path) -> None:
    experiment: ModuleType = EXPERIMENTS[name]
    flags = ["--setup.coefficients", "0.1", "0.3", "--setup.seeds", "4"]
    config = parse_flags(experiment, flags, experiment.SMOKE, prog=name)
    assert config.setup.coefficients == (0.1, 0.3) and config.setup.seeds == (4,)
    path = save_result({}, name=name, config=config, root=tmp_path)
    assert read_config(experiment.Config, path) == config


def test_the_recipes_of_ghost_grads() -> None:
    ways = sae_ghost_grads.ways(sae_ghost_grads.Config())
    terms = {name: way.rule.dead_term for name, way in ways.items()}
    assert terms["ghosts"] == GhostGrads("original") and terms["plain"] is None
    assert terms["ghosts, all dead at first"] == GhostGrads("original", n_first_steps=100)
    renewed = {name: type(way.resampling) for name, way in ways.items() if way.resampling}
    assert renewed == {"resampling": Resample, "redrawing": Redraw}
    # Every renewal has a whole window before it.
    recipe = ways["resampling"].resampling
    assert isinstance(recipe, Resample) and recipe.at_steps == (100, 200, 300, 400) and recipe.window_steps == 50


@pytest.mark.slow
@EACH
def test_from_the_model_to_the_figure(name, tmp_path) -> None:
    experiment = EXPERIMENTS[name]
    smoke = experiment.SMOKE
    # A learning rate so large that latents stop firing, and a wait so short that they count as dead.
    setup = dataclasses.replace(
        smoke.setup, directory=str(tmp_path / "kept"), dead_after_steps=1, learning_rate=0.1, n_latents=64
    )
    config = dataclasses.replace(smoke, setup=setup)
    lm = load(ORACLES / "tiny_llama")
    result = experiment.run(config, lm=lm, progress=False)
    ways = experiment.ways(config)
    assert result.names == tuple(ways) and len(result.rows) == len(ways) * 2
    fvu = {way: values.ravel() for way, values in result.table("fvu").items()}
    first = next(iter(ways))
    same = [way for way in ways if np.abs(fvu[way] - fvu[first]).max() < 1e-5]
    assert np.isfinite(list(fvu.values())).all() and same == [first], fvu
    # Again: nothing is trained anew, and the numbers are the same.
    n_states = len(list((tmp_path / "kept").glob("states_*/*")))
    again = experiment.run(config, lm=lm, progress=False)
    assert repr(again) == repr(result) and len(list((tmp_path / "kept").glob("states_*/*"))) == n_states == len(ways)
    figures = experiment.plot(result)
    figures["frontier.png"].savefig(io.BytesIO(), format="png")
    path = save_result(result, name=name, config=config, figures=figures, root=tmp_path)
    saved = load_result(path).result
    assert [row["name"] for row in saved["rows"]][::2] == list(ways)
    assert (path / "frontier.png").stat().st_size > 10_000
