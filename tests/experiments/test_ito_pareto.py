"""Dictionaries under pursuits, at smoke size: from text to figures, and dictionaries that are there already."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError
from interp_jax.core.results import load_result, save_result
from interp_jax.experiments import ito_pareto
from interp_jax.experiments.ito_pareto import PURSUITS, SMOKE
from interp_jax.methods.sae import load_sae
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


@pytest.mark.slow
def test_from_text_to_figures(text, tmp_path):
    lm, state = load(ORACLES / "tiny_llama"), tmp_path / "state"
    config = dataclasses.replace(SMOKE, text=text, directory=str(state))
    result = ito_pareto.run(config, lm=lm, progress=False)
    names = [f"trained at {k}" for k in SMOKE.trained_ks]
    assert list(result.sweep.curves) == [*names, "random"]
    for name, k in zip(names, SMOKE.trained_ks, strict=True):
        several = result.sweep.curves[name]
        assert list(several) == ["encoder", "top-k", *PURSUITS]
        assert several["encoder"].l0[0] <= k
        for by in PURSUITS:
            assert (several[by].l0 <= SMOKE.l0s).all() and (np.diff(several[by].fvu) < 0).all()
        # The most that is to be had from so many atoms is what orthogonal pursuit comes near to.
        assert (several["OMP"].fvu <= several["MP"].fvu + 0.02).all()
    for by, winners in result.best.items():
        for at, winner in enumerate(winners):
            assert result.sweep.curve(winner, by).losses[at] == min(
                result.sweep.curve(name, by).losses[at] for name in names
            )
    assert list(result.agreements) == names and "Lowest loss by GP" in repr(result)
    path = save_result(
        result, name="ito_pareto", config=config, figures=ito_pareto.plot(result), root=tmp_path / "runs"
    )
    figures = {file.name for file in path.rglob("*.png")}
    assert figures == {
        "by_dictionary.png",
        "by_encoder.png",
        "agreement_trained_at_2.png",
        "agreement_trained_at_8.png",
    }
    saved = load_result(path).result["sweep"]["curves"]["random"]["GP"]["losses"]
    np.testing.assert_array_equal(saved, result.sweep.curve("random", "GP").losses)

    # The same dictionaries, by their folders: nothing is trained.
    (folder,) = state.iterdir()
    found = ito_pareto.dictionaries(dataclasses.replace(config, saes=(str(folder / "k_8"),)), lm, None)  # type: ignore[arg-type]
    sae, k = found["1: trained at 8"]
    assert k == 8
    np.testing.assert_array_equal(sae.W_dec, load_sae(folder / "k_8").W_dec)
    elsewhere = dataclasses.replace(config, saes=(str(folder / "k_8"),), site="0.resid_post")
    with pytest.raises(InvalidInputError, match=r"was found in .*k_8 in ito_pareto[\s\S]*a TopK SAE of 0\.resid_post"):
        ito_pareto.run(elsewhere, lm=lm, progress=False)
    with pytest.raises(InvalidInputError, match=r"held-out sequences of 32 tokens[\s\S]*9999, by n_held_out"):
        ito_pareto.run(dataclasses.replace(config, n_held_out=9999), lm=lm, progress=False)
