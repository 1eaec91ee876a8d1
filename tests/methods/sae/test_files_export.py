"""SAEs written for SAELens: the same function when read again, and what SAELens itself made of the same files.

SAELens read the exports of `CASES` and gave our activations (tests/oracles/record_saelens_reads_export.py); it was
shown the configurations that are written here.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from interp_jax.core.errors import InvalidInputError, UnsupportedModelError
from interp_jax.core.sites import Site
from interp_jax.methods.sae import SAE, BatchTopK, Gated, JumpReLU, MatchingPursuit, Matryoshka, ReLU, TopK
from interp_jax.methods.sae.files import export_saelens, load_sae
from interp_jax.methods.sae.normalization import Normalization
from tests.conftest import ORACLES
from tests.methods.sae.test_files import D_IN, D_OUT, example

POST, HEADS = Site(5, "resid_post"), Site(5, "z")
OUT: dict[str, Any] = {"d_out": D_OUT, "read": Site(3, "ln2"), "write": Site(3, "mlp_out")}
AS_IT_IS = Normalization()

# What is exported: a variant, and the rest of an SAE.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "relu": (ReLU(), {"read": POST, "origin": (("model_name", "gpt2"), ("context_size", 128))}),
    "relu_uncentred": (ReLU(is_centred=False), {"read": HEADS}),
    "relu_tied": (ReLU(is_tied=True), {"input_scaling": Normalization("unit_ms", 0.25)}),
    "relu_scaled": (ReLU(), {"input_scaling": Normalization("sqrt_d", 0.5)}),
    "relu_layer": (ReLU(), {"input_scaling": Normalization("layer")}),
    "relu_constant_norm": (ReLU(), {"input_scaling": Normalization("constant_norm")}),
    "gated": (Gated(), {"input_scaling": Normalization("sqrt_d", 0.5)}),
    "top_k": (TopK(3), {"read": POST}),
    "batch_top_k": (BatchTopK(3), {"input_scaling": Normalization("unit_ms", 0.5)}),
    "jump_relu": (JumpReLU(0.3, is_centred=True), {}),
    "matryoshka": (Matryoshka(3, (2, 3, 5)), {}),
    "matching_pursuit": (MatchingPursuit(3), {}),
    "transcoder": (ReLU(is_centred=False), {**OUT, "output_scaling": AS_IT_IS}),
    "transcoder_scaled": (
        JumpReLU(0.3),
        {**OUT, "input_scaling": Normalization("sqrt_d", 0.5), "output_scaling": Normalization("sqrt_d", 4.0)},
    ),
    "transcoder_layer": (
        ReLU(is_centred=False),
        {**OUT, "input_scaling": Normalization("layer"), "output_scaling": AS_IT_IS},
    ),
    "transcoder_centred": (ReLU(), {"read": POST, "write": Site(6, "resid_post"), "output_scaling": AS_IT_IS}),
    "skip": (ReLU(is_centred=False), {**OUT, "has_skip": True, "output_scaling": Normalization("unit_ms", 0.5)}),
    "jump_relu_skip": (JumpReLU(0.3), {**OUT, "has_skip": True, "output_scaling": AS_IT_IS}),
}


def exported(case: str) -> SAE:
    """The SAE of a case, the same each time."""
    variant, fields = CASES[case]
    return example(variant, seed=list(CASES).index(case), **fields)


def inputs() -> np.ndarray:
    """Activations of several sizes, [16, D_IN]."""
    rng = np.random.default_rng(1)
    return (rng.standard_normal((16, D_IN)) * np.linspace(0.5, 6, 16)[:, None]).astype(np.float32)


def scale_of_latents(sae: SAE) -> float:
    """How many times as large the latents are once a scale is folded."""
    scaling = sae.output_scaling or sae.input_scaling
    return 1 / float(scaling.scale) if scaling.rule in ("sqrt_d", "unit_ms") else 1.0


@pytest.mark.parametrize("case", CASES)
def test_what_is_exported_computes_the_same(case: str, tmp_path: Path) -> None:
    sae, x = exported(case), inputs()
    read = load_sae(export_saelens(sae, tmp_path / "sae"), format="saelens")
    latents = np.asarray(sae.encode(x)) * np.float32(scale_of_latents(sae))
    assert 0.05 < (latents != 0).mean() < 0.9
    # Relative to the largest: each latent is a sum of terms of that size.
    for ours, theirs in ((latents, read.encode(x)), (sae(x), read(x))):
        np.testing.assert_allclose(theirs, ours, rtol=1e-6, atol=1e-6 * float(np.abs(ours).max()))
    assert (read.read, read.write) == (sae.read, sae.write)
    assert read.is_transcoder == (sae.is_transcoder or "W_skip" in sae.params)
    assert dict(read.origin).items() >= dict(sae.origin).items()


@pytest.mark.parametrize("case", CASES)
def test_saelens_read_what_is_written_here(case: str, tmp_path: Path) -> None:
    recorded = json.loads((ORACLES / "saelens_reads_export.json").read_text())
    assert list(recorded["cases"]) == list(CASES)
    known = recorded["cases"][case]
    folder = export_saelens(exported(case), tmp_path / "sae")
    assert json.loads((folder / "cfg.json").read_text()) == known["config"]
    arrays = load_file(folder / "sae_weights.safetensors")
    assert {name: list(value.shape) for name, value in arrays.items()} == known["arrays"]
    # Of the largest activation; SAELens computes in float32 as well.
    assert max(known["latents"], known["reconstruction"]) < 2e-6


def test_fields_are_those_saelens_writes(tmp_path: Path) -> None:
    for case, folder in {
        "relu": "standard",
        "top_k": "topk",
        "jump_relu": "jumprelu",
        "skip": "skip_transcoder",
    }.items():
        ours = json.loads((export_saelens(exported(case), tmp_path / case) / "cfg.json").read_text())
        theirs = json.loads((ORACLES / "sae_files" / "saelens" / folder / "cfg.json").read_text())
        assert ours.keys() == theirs.keys()
        assert ours["architecture"] == theirs["architecture"] == folder


def test_a_hook_name_that_came_with_the_sae_goes_back(tmp_path: Path) -> None:
    known = load_sae(ORACLES / "sae_files" / "saelens" / "topk")
    odd = dataclasses.replace(known, read=None, origin=(("hook_name", "blocks.5.mlp.hook_pre"), ("format", "saelens")))
    for sae, hook in ((known, "blocks.5.hook_resid_post"), (odd, "blocks.5.mlp.hook_pre")):
        folder = export_saelens(sae, tmp_path / "sae", overwrite=True)
        metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
        assert metadata["hook_name"] == hook and "format" not in metadata
    moved = dataclasses.replace(known, read=Site(6, "mlp_out"))
    folder = export_saelens(moved, tmp_path / "sae", overwrite=True)
    assert json.loads((folder / "cfg.json").read_text())["metadata"]["hook_name"] == "blocks.6.hook_mlp_out"


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "negative pursuit": (MatchingPursuit(3, is_nonneg=False), {}, "coefficients below 0"),
    "pursuit to a tolerance": (MatchingPursuit(3, tolerance=0.1), {}, "matching pursuit with a tolerance"),
    "a TopK transcoder": (TopK(3), {"output_scaling": AS_IT_IS}, "a transcoder, or a skip, of the variant top_k"),
    "a gated skip": (Gated(), {"has_skip": True}, "a transcoder, or a skip, of the variant gated"),
    "a skip from a norm": (
        ReLU(),
        {"has_skip": True, "input_scaling": Normalization("layer"), "output_scaling": AS_IT_IS},
        "a skip from activations under 'layer'",
    ),
    "a scale after a norm": (
        ReLU(),
        {"input_scaling": Normalization("layer"), "output_scaling": Normalization("sqrt_d", 2.0)},
        "a transcoder that scales by 'layer' and back by 'sqrt_d'",
    ),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.replace(" ", "-"))
def test_what_saelens_has_no_word_for_is_refused(case: str, tmp_path: Path) -> None:
    variant, fields, words = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        export_saelens(example(variant, 1, **fields), tmp_path / "sae")
    assert "save it with save_sae" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_other_folders_are_not_replaced(tmp_path: Path) -> None:
    sae = exported("relu")
    export_saelens(sae, tmp_path / "sae")
    with pytest.raises(InvalidInputError, match=r"A dictionary directory is there already in export_saelens"):
        export_saelens(sae, tmp_path / "sae")


def test_a_relu_is_a_relu(tmp_path: Path) -> None:
    # Before its first batch BatchTopK lets everything through; so must the JumpReLU it becomes.
    sae = example(BatchTopK(3), 1)
    sae = dataclasses.replace(sae, params=sae.params | {"threshold": jnp.zeros(())})
    read = load_sae(export_saelens(sae, tmp_path / "sae"))
    np.testing.assert_allclose(read.encode(inputs()), sae.encode(inputs()), rtol=1e-6, atol=1e-6)
