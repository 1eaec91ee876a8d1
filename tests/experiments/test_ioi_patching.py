"""Patching by layer and position, and by head, at smoke size."""

from __future__ import annotations

import numpy as np
import pytest

from interp_jax.core.results import load_result, save_result
from interp_jax.data.prompts import induction_pairs
from interp_jax.experiments import ioi_patching
from interp_jax.experiments.ioi_patching import SMOKE


@pytest.fixture(scope="module")
def result(tiny_llama):
    return ioi_patching.run(SMOKE, lm=tiny_llama, progress=False)


def test_effects_are_those_of_interventions_by_hand(tiny_llama, result):
    pairs = induction_pairs(tiny_llama.config.d_vocab, 1)
    other = tiny_llama.reap(pairs.clean, ["1.resid_pre", "2.z"])

    def lead(interventions):
        logits = np.asarray(tiny_llama.intervene(pairs.corrupted, interventions))[0, -1]
        return logits[pairs.answer[0]] - logits[pairs.wrong[0]]

    plain = lead({})
    assert result.vectors.plain[0] == pytest.approx(float(plain), abs=1e-4)
    by_hand = lead({"1.resid_pre": lambda value: value.at[:, -1].set(other["1.resid_pre"][:, -1])}) - plain
    assert abs(by_hand) > 0.01
    assert result.vectors.grid("resid_pre")[1, -1, 0] == pytest.approx(float(by_hand), abs=1e-4)
    by_hand = lead({"2.z": lambda value: value.at[:, :, 3].set(other["2.z"][:, :, 3])}) - plain
    assert abs(by_hand) > 0.01
    assert result.heads.grid("z")[2, 0, 3] == pytest.approx(float(by_hand), abs=1e-4)


def test_labels_show_what_differs(tiny_llama, result):
    pairs = induction_pairs(tiny_llama.config.d_vocab, 1)
    assert len(result.labels) == pairs.clean.shape[1]
    # Eight tokens are replaced, the four that repeat are not.
    assert all(" / " not in label for label in result.labels[8:])
    assert any(" / " in label for label in result.labels[:8])


def test_the_result_is_saved_with_its_figures(result, tmp_path):
    path = save_result(result, name="ioi_patching", config=SMOKE, figures=ioi_patching.plot(result), root=tmp_path)
    np.testing.assert_array_equal(load_result(path).result["heads"]["effects"], result.heads.effects)
    figures = {file.name for file in path.rglob("*") if file.suffix in (".png", ".html")}
    assert figures == {f"{kind}.{end}" for kind in ("vectors", "heads") for end in ("png", "html")}
