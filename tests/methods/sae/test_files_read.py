"""Files of other libraries: what is read computes what the library computed, and what does not fit is refused.

The files and activations were recorded with the libraries themselves, Gemma Scope's with its published formula
(tests/oracles/record_sae_files.py).

Source: interp_jax.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.flax import save_file as save_flax
from safetensors.numpy import load_file, save_file

from interp_jax.core.errors import InterpError, InvalidInputError, LoadError, UnsupportedModelError
from interp_jax.core.sites import Site, select_sites
from interp_jax.methods.sae.files import load_sae
from interp_jax.methods.sae.files.hooks import _IN_BLOCK, _OUTSIDE, hook_of_site, site_of_hook, sites_of_module
from tests.conftest import ORACLES

FILES = ORACLES / "sae_files"
# Sums of at most 16 terms, each below 16 in size: 16 * 16 * 2**-24 on either side.
TOLERANCE = 2 * 16 * 16 * 2.0**-24

POST, PRE = Site(5, "resid_post"), Site(5, "resid_pre")
TO_MLP = (Site(3, "ln2"), Site(3, "mlp_out"))
SCOPE, SCOPE_2 = "gemma_scope/gemma-scope-2b-pt", "gemma_scope/gemma-scope-2-270m-pt"
# Folder -> the variant, and the sites that are read and written.
EXPECTED: dict[str, tuple[str, Site | None, Site | None]] = {
    "saelens/standard": ("relu", POST, None),
    "saelens/standard_uncentred": ("relu", POST, None),
    "saelens/standard_layer_norm": ("relu", POST, None),
    "saelens/standard_constant_norm": ("relu", POST, None),
    "saelens/standard_heads": ("relu", Site(5, "z"), None),
    "saelens/gated": ("gated", POST, None),
    "saelens/topk": ("top_k", POST, None),
    "saelens/topk_rescaled": ("top_k", POST, None),
    "saelens/jumprelu": ("jump_relu", POST, None),
    "saelens/jumprelu_uncentred": ("jump_relu", POST, None),
    "saelens/matching_pursuit": ("matching_pursuit", POST, None),
    "saelens/transcoder": ("relu", *TO_MLP),
    "saelens/transcoder_layer_norm": ("relu", *TO_MLP),
    "saelens/skip_transcoder": ("relu", *TO_MLP),
    "saelens/jumprelu_transcoder": ("jump_relu", *TO_MLP),
    "saelens/jumprelu_skip_transcoder": ("jump_relu", *TO_MLP),
    "saelens/batchtopk_checkpoint": ("batch_top_k", None, None),
    "saelens/batchtopk_trained": ("jump_relu", None, None),
    "saelens/matryoshka_checkpoint": ("matryoshka", None, None),
    "saelens/matryoshka_trained": ("jump_relu", None, None),
    "saelens_before_6/standard": ("relu", PRE, None),
    "saelens_before_6/finetuned": ("relu", PRE, None),
    "saelens_before_6/topk": ("top_k", PRE, None),
    "saelens_before_6/gated": ("gated", PRE, None),
    "saelens_before_6/jumprelu": ("jump_relu", PRE, None),
    "saelens_before_6/heads": ("relu", Site(5, "z"), None),
    f"{SCOPE}-res/layer_20/width_16k/average_l0_71": ("jump_relu", Site(20, "resid_post"), None),
    f"{SCOPE}-att/layer_3/width_16k/average_l0_7": ("jump_relu", Site(3, "z"), None),
    f"{SCOPE}-res/embedding/width_4k/average_l0_6": ("jump_relu", Site(None, "embed"), None),
    f"{SCOPE}-transcoders/layer_4/width_16k/average_l0_7": ("jump_relu", None, Site(4, "mlp_out")),
    f"{SCOPE_2}/resid_post/layer_9_width_16k_l0_small": ("jump_relu", Site(9, "resid_post"), None),
    f"{SCOPE_2}/transcoder_all/layer_9_width_16k_l0_small_affine": (
        "jump_relu",
        Site(9, "ln2"),
        Site(9, "mlp_out"),
    ),
    "sparsify/layers.5": ("top_k", POST, None),
    "sparsify/layers.3.mlp": ("top_k", *TO_MLP),
    "sparsify/layers.4.mlp": ("top_k", Site(4, "ln2"), Site(4, "mlp_out")),
    **{
        f"dictionary_learning/{name}": (variant, Site(8, "resid_post"), None)
        for name, variant in {
            "AutoEncoder": "relu",
            "AutoEncoderNew": "relu",
            "GatedAutoEncoder": "gated",
            "JumpReluAutoEncoder": "jump_relu",
            "AutoEncoderTopK": "top_k",
            "BatchTopKSAE": "batch_top_k",
            "BatchTopKSAE_new": "batch_top_k",
            "MatryoshkaBatchTopKSAE": "matryoshka",
        }.items()
    },
}
GROUPMAX = "sparsify/layers.6"


def test_every_recorded_file_is_here() -> None:
    recorded = {str(path.parent.relative_to(FILES)) for path in FILES.rglob("activations.npz")}
    assert recorded == {*EXPECTED, GROUPMAX}


@pytest.mark.parametrize("case", EXPECTED, ids=lambda case: case.replace("/", "-"))
def test_the_function_is_the_librarys(case: str) -> None:
    sae = load_sae(FILES / case)
    variant, reads, writes = EXPECTED[case]
    assert (sae.architecture.name, sae.read, sae.write) == (variant, reads, writes)
    assert dict(sae.origin)["format"] == case.split("/")[0].removesuffix("_before_6")
    assert all(np.asarray(value).dtype == np.float32 for value in sae.params.values())
    with np.load(FILES / case / "activations.npz") as known:
        latents, reconstruction = np.asarray(sae.encode(known["x"])), np.asarray(sae(known["x"]))
        assert ((known["latents"] != 0) == (latents != 0)).all()
        assert 0.1 < (latents != 0).mean() < 0.9
        np.testing.assert_allclose(latents, known["latents"], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(reconstruction, known["reconstruction"], rtol=0, atol=TOLERANCE)


def changed(
    case: str, target: Path, *, arrays: dict[str, Any] | None = None, drop: tuple[str, ...] = (), **fields: Any
) -> Path:
    """A copy of recorded files with other fields and arrays (None: without)."""
    folder = target / case
    shutil.copytree(FILES / case, folder)
    if (FILES / case).parent.joinpath("config.json").exists():
        shutil.copy(FILES / case / ".." / "config.json", folder.parent)
    for name in ("cfg.json", "config.json"):
        if (folder / name).exists():
            config = json.loads((folder / name).read_text())
            part = config.get("trainer", config)
            part |= fields
            for field in drop:
                del part[field]
            (folder / name).write_text(json.dumps(config))
    for path in folder.glob("*.safetensors"):
        tensors = {k: v for k, v in (load_file(path) | (arrays or {})).items() if v is not None}
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
    for path in folder.glob("params.npz"):
        with np.load(path) as archive:
            tensors = dict(archive) | (arrays or {})
        np.savez(path, **{k: v for k, v in tensors.items() if v is not None})  # type: ignore[arg-type]
    return folder


def zeros(*shape: int) -> np.ndarray:
    """Zeros in float32."""
    return np.zeros(shape, np.float32)


D, N = 6, 10
RES = f"{SCOPE}-res/layer_20/width_16k/average_l0_71"
AFFINE = f"{SCOPE_2}/transcoder_all/layer_9_width_16k_l0_small_affine"
BROKEN: dict[str, tuple[str, dict[str, Any], type[InterpError], str]] = {
    # SAELens
    "an unknown field": ("saelens/topk", {"top_kk": 2}, LoadError, "the field top_kk = 2 is not known"),
    "two faults": (
        "saelens/topk",
        {"k": 0, "arrays": {"b_enc": None}},
        LoadError,
        r"(?s)b_enc, \[10\], is missing.*the field k = 0: a whole number above 0",
    ),
    "no k": ("saelens/topk", {"drop": ("k",)}, LoadError, "the field k, a whole number above 0, is missing"),
    "transposed": (
        "saelens/standard",
        {"arrays": {"W_enc": zeros(N, D)}},
        LoadError,
        r"W_enc has shape \[10, 6\]: transposed, \[6, 10\]",
    ),
    "gated with b_enc": ("saelens/gated", {"arrays": {"b_enc": zeros(N)}}, LoadError, "the array b_enc"),
    "a transposed skip": (
        "saelens/skip_transcoder",
        {"arrays": {"W_skip": zeros(6, 5)}},
        LoadError,
        r"W_skip has shape \[6, 5\]: transposed",
    ),
    "infinite": ("saelens/gated", {"arrays": {"r_mag": zeros(N) + np.inf}}, LoadError, "r_mag has 10 values"),
    "temporal": ("saelens/topk", {"architecture": "temporal"}, UnsupportedModelError, "The architecture 'temporal'"),
    "whitening": (
        "saelens/topk",
        {"normalize_activations": "covariance_whitening"},
        UnsupportedModelError,
        "whitening is folded once training has ended",
    ),
    "no scale": (
        "saelens/topk",
        {"normalize_activations": "expected_average_only_in"},
        InvalidInputError,
        "without the scale it was trained with",
    ),
    "pursuit that stops": (
        "saelens/matching_pursuit",
        {"stop_on_duplicate_support": True},
        UnsupportedModelError,
        "stop_on_duplicate_support = True",
    ),
    "a centred transcoder": (
        "saelens/transcoder",
        {"apply_b_dec_to_input": True},
        LoadError,
        "a transcoder's b_dec is of another space",
    ),
    "a skip past a norm": (
        "saelens/skip_transcoder",
        {"normalize_activations": "layer_norm"},
        UnsupportedModelError,
        "A skip past the normalization 'layer'",
    ),
    "metadata": ("saelens/topk", {"metadata": 3}, LoadError, "the field metadata = 3"),
    "widths": ("saelens/matryoshka_checkpoint", {"matryoshka_widths": [5, 2]}, LoadError, "numbers that grow"),
    "tanh": (
        "saelens_before_6/standard",
        {"activation_fn_str": "tanh-relu"},
        LoadError,
        "the field activation_fn = 'tanh-relu' is not known",
    ),
    "an odd option": (
        "saelens_before_6/topk",
        {"activation_fn_kwargs": {"k": 3, "signed": True}},
        LoadError,
        "the field signed = True is not known",
    ),
    "unexplained factors": (
        "saelens_before_6/finetuned",
        {"finetuning_scaling_factor": False},
        LoadError,
        "finetuning_scaling_factor is not 1 though",
    ),
    "too large a k": ("saelens/topk", {"k": 99}, LoadError, r"k = 99 was given in TopK, with \d+ latents"),
    "a list": ("saelens/topk", {"architecture": ["topk"]}, UnsupportedModelError, "The architecture"),
    # sparsify
    "too large a k there": ("sparsify/layers.5", {"k": 99}, LoadError, "do not fit together .k = 99 was given"),
    "groupmax": (GROUPMAX, {}, UnsupportedModelError, "An SAE whose latents are groupmax"),
    "signed": ("sparsify/layers.5", {"signed": True}, UnsupportedModelError, "latents are signed"),
    "no decoder": ("sparsify/layers.5", {"arrays": {"W_dec": None}}, LoadError, r"W_dec, \[10, 6\], is missing"),
    "a skip unsaid": ("sparsify/layers.4.mlp", {"skip_connection": False}, LoadError, "the array W_skip"),
    "no latents": ("sparsify/layers.5", {"num_latents": 0, "expansion_factor": None}, LoadError, "num_latents = 0"),
    # Gemma Scope
    "a transposed encoder": (RES, {"arrays": {"W_enc": zeros(N, D)}}, LoadError, r"W_enc .*transposed, \[6, 10\]"),
    "across layers": (RES, {"arrays": {"W_dec": zeros(N, 2, D)}}, UnsupportedModelError, "A transcoder across layers"),
    "no threshold": (RES, {"arrays": {"threshold": None}}, LoadError, r"threshold, \[10\], is missing"),
    "a scale": (RES, {"arrays": {"scaling_factor": zeros(N) + 2}}, LoadError, "nobody says what it scales"),
    "another activation": (AFFINE, {"architecture": "topk"}, LoadError, "architecture = 'topk': one of jump_relu"),
    "affine or not": (AFFINE, {"affine_connection": False}, LoadError, "contradict each other"),
    # dictionary_learning
    "another class": (
        "dictionary_learning/AutoEncoder",
        {"dict_class": "IdentityDict"},
        UnsupportedModelError,
        "The class 'IdentityDict'",
    ),
    "a list of classes": (
        "dictionary_learning/AutoEncoder",
        {"dict_class": ["AutoEncoder"]},
        UnsupportedModelError,
        "The class",
    ),
    "another k": ("dictionary_learning/BatchTopKSAE", {"k": 4}, LoadError, "k = 4 and the array k = 3 contradict"),
    "another size": ("dictionary_learning/AutoEncoder", {"dict_size": 12}, LoadError, r"encoder.weight has shape"),
    "other groups": (
        "dictionary_learning/MatryoshkaBatchTopKSAE",
        {"group_sizes": [5, 5]},
        LoadError,
        r"group_sizes = \[5, 5\] and the array \[2, 3, 5\] contradict",
    ),
    "an unknown option": ("dictionary_learning/AutoEncoder", {"tied": True}, LoadError, "the field tied = True"),
}


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.replace(" ", "-"))
def test_what_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    folder, changes, kind, words = BROKEN[case]
    with pytest.raises(kind, match=words) as caught:
        load_sae(changed(folder, tmp_path, **changes))
    assert "\n  Expected: " in str(caught.value) and "\n  Fix: " in str(caught.value)


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    arrays = {"b_enc": None, "W_dec": zeros(D, N), "bias": zeros(3)}
    folder = changed("saelens/topk", tmp_path, k="3", kk=3, arrays=arrays)
    with pytest.raises(LoadError) as caught:
        load_sae(folder)
    for words in ("k = '3'", "kk = 3", "b_enc, [10], is missing", "W_dec has shape [6, 10]: transposed", "array bias"):
        assert words in str(caught.value)


def test_a_damaged_npz_is_refused(tmp_path: Path) -> None:
    folder = changed(RES, tmp_path)
    (folder / "params.npz").write_bytes(b"PK not a zip")
    with pytest.raises(LoadError, match=r"An unreadable params.npz"):
        load_sae(folder)


def test_the_scale_of_average_norm(tmp_path: Path) -> None:
    folder = changed("saelens/standard", tmp_path, normalize_activations="expected_average_only_in")
    plain = load_sae(FILES / "saelens/standard")
    x = np.random.default_rng(0).standard_normal((4, D), np.float32)
    given = load_sae(folder, input_scale=0.5)
    np.testing.assert_allclose(given.encode(x), plain.encode(x * np.float32(0.5)), atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(given(x), plain(x * np.float32(0.5)) * 2, atol=TOLERANCE, rtol=0)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.5}')
    np.testing.assert_array_equal(load_sae(folder)(x), given(x))
    with pytest.raises(InvalidInputError, match=r"input_scale = 0\.5 was given"):
        load_sae(FILES / "saelens/standard", input_scale=0.5)
    with pytest.raises(InvalidInputError, match="without the scale"):
        load_sae(folder, input_scale=-1.0)


def test_names_of_the_versions_before_6(tmp_path: Path) -> None:
    drop = ("hook_name", "hook_layer", "hook_head_index", "architecture", "activation_fn_str")
    # The fields of the first published SAEs, whose configuration was that of the whole run.
    names = (
        "is_dataset_tokenized use_cached_activations cached_activations_path n_batches_in_buffer total_training_tokens "
        "store_batch_size seed b_dec_init_method expansion_factor from_pretrained_path l1_coefficient lr "
        "lr_scheduler_name lr_warm_up_steps train_batch_size use_ghost_grads feature_sampling_window "
        "feature_sampling_method resample_batches feature_reinit_scale dead_feature_window dead_feature_threshold "
        "log_to_wandb wandb_project wandb_entity wandb_log_frequency n_checkpoints checkpoint_path tokens_per_buffer "
        "run_name unique_id lp_norm noise_scale normalize_sae_decoder decoder_orthogonal_init adam_beta1"
    )
    old = {"hook_point": "blocks.5.hook_resid_pre", "hook_point_layer": 5, "hook_point_head_index": None}
    old |= {"dtype": "torch.float32", **dict.fromkeys(names.split(), 1)}
    folder = changed("saelens_before_6/standard", tmp_path, drop=drop, normalize_activations=False, **old)
    sae, known = load_sae(folder), load_sae(FILES / "saelens_before_6/standard")
    x = np.ones((1, D), np.float32)
    np.testing.assert_array_equal(sae(x), known(x))
    assert sae.read == PRE and dict(sae.origin)["model_name"] == "gpt2-small"
    shutil.rmtree(tmp_path / "saelens_before_6")
    folder = changed("saelens_before_6/standard", tmp_path, normalize_activations=True)
    scaling = load_sae(folder, input_scale=2.0).input_scaling
    assert (scaling.rule, float(scaling.scale)) == ("sqrt_d", 2.0)


def test_ones_of_fine_tuning_are_nothing(tmp_path: Path) -> None:
    folder = changed("saelens_before_6/standard", tmp_path, arrays={"scaling_factor": zeros(N) + 1})
    x = np.ones((1, D), np.float32)
    np.testing.assert_array_equal(load_sae(folder)(x), load_sae(FILES / "saelens_before_6/standard")(x))


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    folder = changed("saelens/standard", tmp_path)
    tensors = load_file(folder / "sae_weights.safetensors")
    halves = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    save_flax({name: jnp.asarray(value) for name, value in halves.items()}, folder / "sae_weights.safetensors")
    sae = load_sae(folder)
    for name, value in halves.items():
        assert sae.params[name].dtype == jnp.float32
        np.testing.assert_array_equal(sae.params[name], value.astype(np.float32))


def test_a_threshold_that_was_never_estimated() -> None:
    assert dict(load_sae(FILES / "dictionary_learning/BatchTopKSAE_new").origin)["threshold"] == "never estimated"
    assert "threshold" not in dict(load_sae(FILES / "dictionary_learning/BatchTopKSAE").origin)
    assert dict(load_sae(FILES / "dictionary_learning/AutoEncoderTopK").origin)["threshold"] == pytest.approx(0.3)


@pytest.mark.parametrize("hook", [*(f"blocks.7.{name}" for name in _IN_BLOCK), *_OUTSIDE])
def test_hooks_are_the_sites_our_selectors_take_them_for(hook: str) -> None:
    site = site_of_hook(hook)
    assert site is not None
    others = [Site(7, "nothing"), *([] if site.layer is None else [Site(8, site.name)])]
    assert select_sites(hook, [*others, site]) == [site]
    assert hook_of_site(site) == hook


def test_places_without_a_site() -> None:
    for hook in (None, "", "blocks.5.mlp.hook_pre", "blocks.x.hook_z", "blocks.5.hook_mlp_in", "hook_tokens"):
        assert site_of_hook(hook) is None
    assert hook_of_site(None) is None and hook_of_site(Site(2, "mlp_pre")) is None


def test_modules() -> None:
    cases: dict[tuple[str, bool, str | None], tuple[Site | None, Site | None]] = {
        ("layers.5", False, None): (POST, None),
        ("layers.5", True, None): (PRE, POST),
        ("model.layers.3.mlp", True, None): TO_MLP,
        ("transformer.h.3.mlp", False, None): (TO_MLP[1], None),
        ("layers.3.self_attn", False, None): (Site(3, "attn_out"), None),
        ("layers.3.mlp", False, "google/gemma-2-2b"): (None, None),
        ("layers.3", False, "google/gemma-2-2b"): (Site(3, "resid_post"), None),
        ("embed_tokens", False, None): (Site(None, "embed"), None),
        ("layers.3.mlp.down_proj", False, None): (None, None),
        ("lm_head", True, None): (None, None),
    }
    for (module, is_transcoder, model), sites in cases.items():
        assert sites_of_module(module, is_transcoder=is_transcoder, model=model) == sites
