"""Our own SAE files: what is read is what was saved, and nothing else is read.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from interp_jax.core.errors import ExportError, InvalidInputError, LoadError, UnknownNameError
from interp_jax.core.sites import Site
from interp_jax.methods.sae import (
    SAE,
    VARIANTS,
    BatchTopK,
    Gated,
    JumpReLU,
    MatchingPursuit,
    Matryoshka,
    ReLU,
    TopK,
)
from interp_jax.methods.sae.files import export_saelens, load_sae, own, reference, save_sae
from interp_jax.methods.sae.normalization import Normalization
from tests.conftest import ORACLES

D_IN, N_LATENTS, D_OUT = 6, 10, 5
EXAMPLES = (
    ReLU(is_norm_weighted=True),
    Gated(is_centred=False),
    TopK(3),
    BatchTopK(3),
    JumpReLU(threshold=0.3, penalty="tanh"),
    Matryoshka(3, (2, 3, 5)),
    MatchingPursuit(3, tolerance=1e-3, is_nonneg=False),
)


def example(variant: Any, seed: int, *, d_out: int = D_IN, **fields: Any) -> SAE:
    """An SAE of a variant with random arrays; a threshold above 0."""
    has_skip = fields.pop("has_skip", False)
    begin = variant.init(
        jax.random.key(seed), d_in=D_IN, n_latents=N_LATENTS, d_out=d_out, **({"has_skip": True} if has_skip else {})
    )
    rng = np.random.default_rng(seed)
    params = {n: v + jnp.asarray(rng.standard_normal(v.shape) * 0.3, jnp.float32) for n, v in begin.items()}
    if "threshold" in params:
        params["threshold"] = jnp.asarray(0.3)
    if isinstance(variant, MatchingPursuit):
        params["W_dec"] = begin["W_dec"]
    return SAE(variant, params, **fields)


def assert_same(a: SAE, b: SAE) -> None:
    """Equal bit for bit, numbers and all that is said about them."""
    assert (a.architecture, a.read, a.write, a.origin) == (b.architecture, b.read, b.write, b.origin)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x, np.float32).tobytes() == np.asarray(y, np.float32).tobytes()


def test_there_is_an_example_of_every_variant() -> None:
    assert tuple(map(type, EXAMPLES)) == VARIANTS


@pytest.mark.parametrize("variant", EXAMPLES, ids=lambda variant: variant.name)
def test_what_is_read_is_what_was_saved(variant: Any, seed: int, tmp_path: Path) -> None:
    origin = (("model", "gpt2"), ("layers", (1, 2.5, None, True)), ("nested", (("a", 1),)))
    sae = example(variant, seed, read=Site(5, "resid_post"), origin=origin)
    assert save_sae(sae, tmp_path / "sae") == tmp_path / "sae"
    assert_same(load_sae(tmp_path / "sae"), sae)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["sae"]


CASES: dict[str, dict[str, Any]] = {
    "tied": {"variant": ReLU(is_tied=True)},
    "transcoder": {
        "variant": TopK(3, is_centred=False),
        "d_out": D_OUT,
        "read": Site(3, "ln2"),
        "write": Site(3, "mlp_out"),
        "output_scaling": Normalization("unit_ms", 0.1),
    },
    "skip": {"variant": JumpReLU(), "d_out": D_OUT, "has_skip": True, "output_scaling": Normalization()},
    "scale": {"variant": ReLU(), "input_scaling": Normalization("sqrt_d", 1 / 3), "read": Site(None, "embed")},
    "layer": {"variant": Gated(), "input_scaling": Normalization("layer")},
}


@pytest.mark.parametrize("case", CASES)
def test_scalings_skips_and_transcoders_come_back(case: str, seed: int, tmp_path: Path) -> None:
    sae = example(seed=seed, **CASES[case])
    assert_same(load_sae(save_sae(sae, tmp_path / "sae")), sae)
    if case == "scale":
        folded = sae.fold_scale()
        assert_same(load_sae(save_sae(folded, tmp_path / "folded")), folded)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved TopK SAE."""
    return save_sae(example(TopK(3), 1), tmp_path / "sae")


def rewritten(folder: Path, *, arrays: dict[str, Any] | None = None, **fields: Any) -> Path:
    """The folder with other arrays and fields (None: without), and a checksum that fits."""
    document = json.loads((folder / own.DOCUMENT).read_text()) | fields
    tensors = load_file(folder / own.WEIGHTS) | (arrays or {})
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / own.WEIGHTS)
    document["sha256"] = own._digest(folder / own.WEIGHTS)
    (folder / own.DOCUMENT).write_text(json.dumps(document))
    return folder


def test_another_function_is_refused(saved: Path) -> None:
    variant = {"name": "top_k", "k": 3, "is_centred": False}
    with pytest.raises(LoadError, match="computes something else than when it was saved") as caught:
        load_sae(rewritten(saved, variant=variant))
    assert "latents: " in str(caught.value) and "recorded" in str(caught.value)
    load_sae(rewritten(saved, variant=variant | {"is_centred": True}))


def test_a_decoder_that_is_off_is_refused(saved: Path) -> None:
    W_dec = load_file(saved / own.WEIGHTS)["params/W_dec"]
    with pytest.raises(LoadError, match=r"reconstruction: .* differ"):
        load_sae(rewritten(saved, arrays={"params/W_dec": W_dec * np.float32(1.01)}))


@pytest.mark.parametrize("variant", EXAMPLES, ids=lambda variant: variant.name)
def test_rounding_is_no_difference(variant: Any, seed: int) -> None:
    sae = example(variant, seed)
    recorded = reference.record(sae)
    rng = np.random.default_rng(seed)
    # Every number off by up to four rounding errors, as another machine's sums may come out.
    off = [jnp.asarray(1 + rng.uniform(-4, 4, np.shape(v)) * 2.0**-24, jnp.float32) for v in sae.params.values()]
    moved = {name: v * factor for (name, v), factor in zip(sae.params.items(), off, strict=True)}
    assert reference.differences(dataclasses.replace(sae, params=moved), recorded) == []
    compared = recorded["latents_tolerance"] < np.finfo(np.float32).max
    assert compared.mean() > 0.8
    assert (recorded["latents"][compared] != 0).sum() >= 3


def test_damage_is_refused(saved: Path) -> None:
    path = saved / own.WEIGHTS
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(LoadError, match="not as it was saved"):
        load_sae(saved)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown field": ({"bias": 3}, "the field bias = 3 is not known"),
    "a size": ({"d_in": "6"}, "the field d_in = '6': a whole number above 0 is expected"),
    "another size": ({"d_in": 7, "d_out": 7}, r"params/W_enc has shape \[6, 10\]: \[7, 10\] is expected"),
    "two sizes": ({"d_in": 7}, "d_in = 7 and d_out = 6: the variant reads b_dec"),
    "a rule": ({"input_scaling": "max"}, "the field input_scaling = 'max': one of none, "),
    "a site": ({"read": "5.resid_post"}, r"the field read = '5.resid_post': \[layer or null, name\]"),
    "an origin": ({"origin": [["a"]]}, r"the field origin = \[\['a'\]\]: pairs"),
    "a variant": ({"variant": {"name": "top_q"}}, "the field variant = .* a name of relu, gated"),
    "a variant's number": ({"variant": {"name": "top_k", "kk": 3}}, "other numbers than it has: is_centred, k, kk"),
    "a variant's k": (
        {"variant": {"name": "top_k", "k": 2.5, "is_centred": True}},
        "variant: k = 2.5 was given in TopK",
    ),
    "a variant's large k": (
        {"variant": {"name": "top_k", "k": 11, "is_centred": True}},
        "k = 11 was given in TopK, with 10",
    ),
    "a list for a name": ({"variant": {"name": ["top_k"]}}, "the field variant = .* a name of relu, gated"),
    "another format": ({"format": 2}, "A dictionary of format 2"),
    "two things": ({"d_out": None, "read": 3}, "(?s)the field d_out = None.*the field read = 3"),
    "a missing array": ({"arrays": {"params/b_enc": None}}, r"params/b_enc, \[10\], is missing"),
    "an unknown array": ({"arrays": {"params/c": np.ones(2, np.float32)}}, r"the array params/c, \[2\], is not known"),
    "a turned array": (
        {"arrays": {"params/W_enc": np.ones((10, 6), np.float32)}},
        r"params/W_enc has shape \[10, 6\]: transposed, \[6, 10\] is expected",
    ),
    "whole numbers": ({"arrays": {"params/b_enc": np.ones(10, np.int32)}}, "b_enc has dtype int32: a float is"),
    "NaN": ({"arrays": {"params/b_enc": np.full(10, np.nan, np.float32)}}, "b_enc has 10 values that are not finite"),
}


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.replace(" ", "-"))
def test_what_does_not_fit_is_named(case: str, saved: Path) -> None:
    changes, words = BROKEN[case]
    with pytest.raises(LoadError, match=words):
        load_sae(rewritten(saved, **changes))


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"format": ' + "[" * 100_000])
def test_a_damaged_document_is_refused(content: str, saved: Path) -> None:
    (saved / own.DOCUMENT).write_text(content)
    with pytest.raises(LoadError, match=r"An unusable dictionary.json"):
        load_sae(saved)


def test_what_stands_there_is_not_replaced_unasked(saved: Path) -> None:
    other = example(ReLU(), 2)
    with pytest.raises(InvalidInputError, match="A dictionary directory is there already in save_sae"):
        save_sae(other, saved)
    assert_same(load_sae(save_sae(other, saved, overwrite=True)), other)
    (saved.parent / "notes").mkdir()
    (saved.parent / "notes" / "a.txt").write_text("mine")
    with pytest.raises(InvalidInputError, match="A directory with other files is there already"):
        save_sae(other, saved.parent / "notes", overwrite=True)


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_full_disk_leaves_what_was_there(when: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = load_sae(saved)
    if when == "before":
        usage = shutil._ntuple_diskusage(10, 10, 0)  # type: ignore[attr-defined]
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    else:

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    for target, overwrite in ((saved, True), (saved.parent / "new", False)):
        with pytest.raises(ExportError, match="Cannot write the dictionary") as caught:
            save_sae(example(ReLU(), 2), target, overwrite=overwrite)
        assert "nothing there has changed" in str(caught.value)
    monkeypatch.undo()
    assert [entry.name for entry in saved.parent.iterdir()] == ["sae"]
    assert_same(load_sae(saved), old)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    sae = example(ReLU(), 1)
    wrong = {
        "b_enc is not finite": sae.params | {"b_enc": sae.params["b_enc"].at[2].set(jnp.inf)},
        r"c: \(2,\) given, None expected": sae.params | {"c": jnp.ones(2)},
        r"b_enc: None given, \(10,\) expected": {n: v for n, v in sae.params.items() if n != "b_enc"},
        "b_enc is bfloat16": sae.params | {"b_enc": sae.params["b_enc"].astype(jnp.bfloat16)},
        r"W_dec \[2, 10, 6\] is not known": jax.tree.map(lambda v: jnp.stack([v, v]), sae.params),
    }
    for words, params in wrong.items():
        with pytest.raises(InvalidInputError, match=words):
            save_sae(dataclasses.replace(sae, params=params), tmp_path / "sae")
    for value in (object(), float("nan")):
        with pytest.raises(InvalidInputError, match="An origin that JSON cannot hold"):
            save_sae(dataclasses.replace(sae, origin=(("a", value),)), tmp_path / "sae")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [save_sae, export_saelens])
def test_what_is_no_sae_is_not_written(write: Any, tmp_path: Path) -> None:
    sae = example(TopK(3), 1)
    for given, words in (
        ([sae], "list and .* were given"),
        (sae.params, "dict and .* were given"),
        (dataclasses.replace(sae, read="5.resid_post"), "An SAE with read = '5.resid_post' was given"),
    ):
        with pytest.raises(InvalidInputError, match=words) as caught:
            write(given, tmp_path / "sae")
        assert write.__name__ in str(caught.value) and "Expected:" in str(caught.value) and "Fix:" in str(caught.value)
    with pytest.raises(InvalidInputError, match="SAE and None were given"):
        write(sae, None)
    with pytest.raises(InvalidInputError, match="NoneType None was given in load_sae"):
        load_sae(None)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_folders_of_no_or_several_formats(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"No folder .*nowhere"):
        load_sae(tmp_path / "nowhere")
    with pytest.raises(LoadError, match=r"No folder .*\(a file\)"):
        load_sae(saved / own.DOCUMENT)
    with pytest.raises(LoadError, match="A folder with no files, and the folders sae") as caught:
        load_sae(tmp_path)
    assert "saelens: cfg.json + sae_weights.safetensors" in str(caught.value)
    with pytest.raises(UnknownNameError, match=r"Unknown format 'sae_lens'.*\n?.*Did you mean 'saelens'"):
        load_sae(saved, format="sae_lens")
    with pytest.raises(LoadError, match=r"A folder with dictionary\.json, dictionary\.safetensors"):
        load_sae(saved, format="saelens")
    with pytest.raises(InvalidInputError, match=r"input_scale = 2\.0 was given"):
        load_sae(saved, input_scale=2.0)
    for entry in (ORACLES / "sae_files" / "saelens" / "topk").iterdir():
        shutil.copy(entry, saved)
    with pytest.raises(LoadError, match="the files of several formats: interp_jax, saelens"):
        load_sae(saved)
    assert load_sae(saved, format="saelens").origin[0] == ("format", "saelens")


def test_a_name_in_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = "layer_20/width_16k/average_l0_71"
    repository = tmp_path / "models--google--gemma-scope-2b-pt-res"
    shutil.copytree(ORACLES / "sae_files" / "gemma_scope" / "gemma-scope-2b-pt-res", repository / "snapshots" / "ab12")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("ab12")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    sae = load_sae(f"google/gemma-scope-2b-pt-res/{inside}")
    assert sae.read == Site(20, "resid_post")
    assert dict(sae.origin)["repository"] == "google/gemma-scope-2b-pt-res"
    assert dict(sae.origin)["path"] == inside
    with pytest.raises(LoadError, match="hf download"):
        load_sae("google/gemma-scope-2b-pt-mlp/layer_20")
