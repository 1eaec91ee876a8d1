"""dictionary_learning's files: `config.json` and `ae.pt`, a pickled state dict.

    AutoEncoder, AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE, GatedAutoEncoder    read x - b_dec
    AutoEncoderNew, JumpReluAutoEncoder                                                     read x

Weights of its linear layers are stored [out, in], those of the newer classes [in, out]. The state dict is read
without torch and runs nothing (`torch_pickle`).

>>> sorted(_CLASSES)[:2]
['AutoEncoder', 'AutoEncoderNew']

Sharp edges: a `threshold` of -1 was never estimated. BatchTopK then lets every latent above 0 through, as the library
itself does, and the origin says so. TopK chooses by row and makes no use of its threshold. Only submodule names of
the form `resid_post_layer_5` say which site was read.

Source: https://github.com/saprmarks/dictionary_learning (version 0.1.0).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from interp_jax.core.errors import UnsupportedModelError, four_part
from interp_jax.core.sites import Site
from interp_jax.methods.sae.architecture import Architecture
from interp_jax.methods.sae.batch_top_k import BatchTopK
from interp_jax.methods.sae.files.contents import Contents, frozen, read_object
from interp_jax.methods.sae.files.saelens import log_thresholds
from interp_jax.methods.sae.files.torch_pickle import read_tensors
from interp_jax.methods.sae.gated import Gated
from interp_jax.methods.sae.jump_relu import JumpReLU
from interp_jax.methods.sae.matryoshka import Matryoshka
from interp_jax.methods.sae.relu import ReLU
from interp_jax.methods.sae.sae import SAE
from interp_jax.methods.sae.top_k import TopK

CONFIG, WEIGHTS = "config.json", "ae.pt"

# Class -> our names for the arrays in its state dict; those of linear layers are stored the other way round.
_LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight"}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_TOP_K = _LINEAR | {"b_enc": "encoder.bias", "b_dec": "b_dec"}
_CLASSES: Mapping[str, Mapping[str, str]] = {
    "AutoEncoder": _LINEAR | {"b_enc": "encoder.bias", "b_dec": "bias"},
    "AutoEncoderNew": _LINEAR | {"b_enc": "encoder.bias", "b_dec": "decoder.bias"},
    "GatedAutoEncoder": _LINEAR
    | {"b_dec": "decoder_bias", "r_mag": "r_mag", "b_gate": "gate_bias", "b_mag": "mag_bias"},
    "AutoEncoderTopK": _TOP_K,
    "BatchTopKSAE": _TOP_K,
    "MatryoshkaBatchTopKSAE": _PLAIN,
    "JumpReluAutoEncoder": _PLAIN | {"threshold": "threshold"},
}
_TRAINING = (
    "trainer_class", "lr", "l1_penalty", "warmup_steps", "resample_steps", "sparsity_*", "steps", "decay_start",
    "seed", "device", "wandb_name", "auxk_alpha", "threshold_beta", "threshold_start_step", "top_k_aux",
    "group_fractions", "group_weights", "bandwidth", "target_l0", "p_start", "p_end", "anneal_*",
    "n_sparsity_updates", "norm_factor",
)  # fmt: skip
_ABOUT = ("lm_name", "layer", "submodule_name")
_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


def read(folder: Path) -> SAE:
    """The SAE in a `folder` that dictionary_learning wrote.

    Args:
        folder: The folder.

    Returns:
        The SAE.

    Raises:
        LoadError: Files that do not fit together, or a pickle of anything but tensors.
        UnsupportedModelError: A class that is none of ours.
    """
    config = read_object(folder / CONFIG)
    trainer = config.pop("trainer", None)
    trainer = dict(trainer) if isinstance(trainer, dict) else {}
    buffer = config.pop("buffer", None)
    about = {name: trainer.pop(name) for name in _ABOUT if name in trainer}
    contents = Contents(str(folder), config | trainer, read_tensors(folder / WEIGHTS))
    contents.ignore(*_TRAINING)
    name = contents.raw("dict_class")
    if not isinstance(name, str) or name not in _CLASSES:
        raise UnsupportedModelError(
            four_part(
                f"The class {name!r:.60}",
                where=str(folder),
                expected=f"one of {', '.join(_CLASSES)}, as trainer.dict_class of {CONFIG}.",
                fix="compute it with dictionary_learning itself.",
            )
        )
    params = _params(contents, name)
    architecture, remarks = _variant(contents, name, params)
    contents.finish()
    about |= {f"buffer_{key}": value for key, value in buffer.items()} if isinstance(buffer, dict) else {}
    return SAE(
        architecture,
        {key: jnp.asarray(value) for key, value in sorted(params.items())},
        read=_site(about),
        origin=(
            ("format", "dictionary_learning"),
            *((key, frozen(value)) for key, value in sorted((about | remarks).items())),
        ),
    )


def _params(contents: Contents, name: str) -> dict[str, np.ndarray]:
    d_in, n_latents = contents.integer("activation_dim"), contents.integer("dict_size")
    shapes = {"W_enc": (d_in, n_latents), "W_dec": (n_latents, d_in), "b_dec": (d_in,)}
    params = {}
    for ours, theirs in _CLASSES[name].items():
        shape = shapes.get(ours, (n_latents,))
        is_turned = theirs in _LINEAR.values()
        values = contents.array(theirs, shape[::-1] if is_turned else shape)
        params[ours] = values.T if is_turned else values
    if "threshold" in params:
        params["log_threshold"] = log_thresholds(params.pop("threshold"))
    return params


def _variant(
    contents: Contents, name: str, params: dict[str, np.ndarray]
) -> tuple[Architecture, dict[str, float | str]]:
    """The variant, and what else is to be known about its numbers."""
    if name in ("AutoEncoder", "AutoEncoderNew"):
        return ReLU(is_centred=name == "AutoEncoder"), {}
    if name == "GatedAutoEncoder":
        return Gated(), {}
    if name == "JumpReluAutoEncoder":
        return JumpReLU(is_centred=False), {}
    k = contents.integer("k")
    if "k" in contents and (stored := int(contents.array("k", (), is_integer=True))) != k:
        contents.fault(f"the field k = {k} and the array k = {stored} contradict each other")
    if name == "AutoEncoderTopK":
        # Not in the files of its first versions.
        return TopK(k), {"threshold": float(contents.array("threshold", ()))} if "threshold" in contents else {}
    threshold = float(contents.array("threshold", ()))
    params["threshold"] = np.array(max(threshold, 0.0), np.float32)
    remarks: dict[str, Any] = {} if threshold >= 0 else {"threshold": "never estimated"}
    if name == "BatchTopKSAE":
        return BatchTopK(k), remarks
    n_groups = (contents.shape("group_sizes") or (0,))[0]
    groups = tuple(int(size) for size in contents.array("group_sizes", (n_groups,), is_integer=True))
    listed = contents.raw("group_sizes")
    if sum(groups) != params["W_dec"].shape[0] or min(groups, default=0) < 1:
        contents.fault(f"group_sizes = {groups}: sizes above 0 that add up to dict_size are expected")
    elif listed is not None and listed != list(groups):
        contents.fault(
            f"the field group_sizes = {listed!r:.60} and the array {list(groups)!r:.60} contradict each other"
        )
    return Matryoshka(k, groups), remarks


def _site(about: Mapping[str, Any]) -> Site | None:
    """The site that was read, if the submodule's name says it."""
    match = re.fullmatch(r"(\w+)_layer_(\d+)", str(about.get("submodule_name")))
    return Site(int(match.group(2)), match.group(1)) if match and match.group(1) in _SITES else None
