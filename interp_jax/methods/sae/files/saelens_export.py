"""SAEs written as SAELens 6 reads them.

What SAELens has no word for is brought to what it has, if that is the same function: one scale for all tokens is
folded into the weights, BatchTopK and Matryoshka become JumpReLU, tied weights are written out. What has no equal
there is refused.

    export_saelens(sae, "my-sae")
    sae_lens.SAE.load_from_disk("my-sae")

>>> import jax, tempfile
>>> from interp_jax.core.sites import Site
>>> from interp_jax.methods.sae.files.saelens import read
>>> variant = ReLU()
>>> sae = SAE(variant, variant.init(jax.random.key(0), d_in=3, n_latents=5), read=Site(5, "resid_post"))
>>> with tempfile.TemporaryDirectory() as folder:
...     read(export_saelens(sae, Path(folder, "sae")))
SAE(relu, 3 -> 5 latents -> 3 at 5.resid_post)

Sharp edges: folding changes the units of the latents. A site without one TransformerLens name for all models is left
out. Latents of thresholds near 0 count as firing from the least normal number on.

Source: https://github.com/decoderesearch/SAELens (version 6.54).
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from interp_jax.core.errors import UnsupportedModelError, four_part
from interp_jax.methods.sae.batch_top_k import BatchTopK, as_jump_relu
from interp_jax.methods.sae.files.hooks import hook_of_site, site_of_hook
from interp_jax.methods.sae.files.own import check_call
from interp_jax.methods.sae.files.saelens import CONFIG, WEIGHTS
from interp_jax.methods.sae.gated import Gated
from interp_jax.methods.sae.jump_relu import JumpReLU, thresholds
from interp_jax.methods.sae.matching_pursuit import MatchingPursuit
from interp_jax.methods.sae.matryoshka import Matryoshka
from interp_jax.methods.sae.normalization import FOLDABLE
from interp_jax.methods.sae.relu import ReLU
from interp_jax.methods.sae.sae import SAE
from interp_jax.methods.sae.top_k import TopK
from interp_jax.models.weights.checkpoint import Tensors
from interp_jax.models.weights.writing import write_file, write_whole

_NAMES = {ReLU: "standard", Gated: "gated", TopK: "topk", JumpReLU: "jumprelu", MatchingPursuit: "matching_pursuit"}
_TRANSCODERS = {ReLU: "", JumpReLU: "jumprelu_"}
_RULES = {"none": "none", "layer": "layer_norm", "constant_norm": "constant_norm_rescale"}
# What tells SAELens that the file is of version 6 and not of the flat ones before.
_VERSION = "6.0.0"
_OWN = ("format", "hook_name", "hook_name_out", "sae_lens_version")


def export_saelens(sae: SAE, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write an SAE as SAELens 6 does.

    Args:
        sae: The SAE.
        directory: Where; it must not exist, or be empty, unless `overwrite`.
        overwrite: Whether to replace a SAELens SAE that is there.

    Returns:
        The directory.

    Raises:
        UnsupportedModelError: SAELens cannot compute this function.
        InvalidInputError: What is given is no SAE, or something is there that is not to be replaced.
        ExportError: It could not be written; nothing has changed.
    """
    check_call(sae, directory, where="export_saelens")
    sae = _in_their_words(sae)
    config, arrays = _config(sae), _arrays(sae)
    text = (json.dumps(config, indent=1) + "\n").encode()

    def write(part: Path) -> None:
        write_file(part / WEIGHTS, Tensors.from_arrays(arrays))
        write_file(part / CONFIG, text)

    n_bytes = sum(array.nbytes for array in arrays.values())
    return write_whole(
        Path(directory),
        write,
        n_bytes=n_bytes,
        verb="export_saelens",
        mark=CONFIG,
        noun="dictionary",
        overwrite=overwrite,
    )


def _in_their_words(sae: SAE) -> SAE:
    """The same function of a variant and under a scaling that SAELens has."""
    if isinstance(sae.architecture, BatchTopK | Matryoshka):
        architecture, params = as_jump_relu(sae.architecture, sae.params)
        sae = dataclasses.replace(sae, architecture=architecture, params=params)
    faults = _faults(sae)
    if faults:
        raise UnsupportedModelError(
            four_part(
                f"{sae!r} with what SAELens has no word for: {'; '.join(faults)}",
                where="export_saelens",
                expected="ReLU, gated, TopK, JumpReLU and matching-pursuit SAEs, ReLU and JumpReLU transcoders.",
                fix="save it with save_sae.",
            )
        )
    rules = {scaling.rule for scaling in (sae.input_scaling, sae.output_scaling) if scaling is not None}
    if rules & set(FOLDABLE) - {"none"}:
        sae = sae.fold_scale()
    if "W_enc" not in sae.params and not isinstance(sae.architecture, MatchingPursuit):
        sae = dataclasses.replace(sae, params=sae.params | {"W_enc": sae.W_enc})
    if _is_theirs_transcoder(sae) and sae.architecture.is_centred:  # type: ignore[attr-defined]
        # Their transcoders subtract nothing first; the product with what was subtracted is a bias.
        b_enc = sae.params["b_enc"] - sae.params["b_dec"] @ sae.W_enc
        architecture = dataclasses.replace(sae.architecture, is_centred=False)  # type: ignore[type-var]
        sae = dataclasses.replace(sae, architecture=architecture, params=sae.params | {"b_enc": b_enc})
    return sae


def _faults(sae: SAE) -> list[str]:
    """What of an SAE SAELens cannot say."""
    variant, faults = sae.architecture, []
    rules = (sae.input_scaling.rule, sae.input_scaling.rule if sae.output_scaling is None else sae.output_scaling.rule)
    if _is_theirs_transcoder(sae):
        if type(variant) not in _TRANSCODERS:
            faults.append(f"a transcoder, or a skip, of the variant {variant.name}")
        if rules[1] not in FOLDABLE or (rules[0] not in FOLDABLE and rules[1] != "none"):
            faults.append(f"a transcoder that scales by {rules[0]!r} and back by {rules[1]!r}")
        if "W_skip" in sae.params and rules[0] not in FOLDABLE:
            faults.append(f"a skip from activations under {rules[0]!r}")
    elif type(variant) not in _NAMES:
        faults.append(f"the variant {variant.name}")
    if isinstance(variant, MatchingPursuit) and (variant.tolerance or not variant.is_nonneg):
        faults.append(
            "matching pursuit with a tolerance (it checks it after the first step only) or with coefficients below 0"
        )
    return faults


def _is_theirs_transcoder(sae: SAE) -> bool:
    return sae.is_transcoder or "W_skip" in sae.params


def _arrays(sae: SAE) -> dict[str, np.ndarray]:
    params: dict[str, Any] = dict(sae.params)
    if isinstance(sae.architecture, JumpReLU):
        params["threshold"] = thresholds(sae.params)
        del params["log_threshold"]
    if "W_skip" in params:
        params["W_skip"] = params["W_skip"].T
    return {name: np.ascontiguousarray(value, np.float32) for name, value in params.items()}


def _config(sae: SAE) -> dict[str, Any]:
    variant, is_transcoder = sae.architecture, _is_theirs_transcoder(sae)
    skip = "skip_" if "W_skip" in sae.params else ""
    name = f"{_TRANSCODERS[type(variant)]}{skip}transcoder" if is_transcoder else _NAMES[type(variant)]
    is_heads = sae.read is not None and sae.read.name == "z" and not is_transcoder
    config: dict[str, Any] = {
        "architecture": name,
        "d_in": sae.d_in,
        "d_sae": sae.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not is_transcoder and getattr(variant, "is_centred", True),
        "normalize_activations": _RULES[sae.input_scaling.rule],
        "reshape_activations": "hook_z" if is_heads else "none",
        "metadata": _metadata(sae),
    }
    if is_transcoder:
        config["d_out"] = sae.d_out
    if isinstance(variant, TopK):
        config |= {"k": variant.k, "rescale_acts_by_decoder_norm": False}
    if isinstance(variant, MatchingPursuit):
        config |= {"max_iterations": variant.k, "residual_threshold": 0.0, "stop_on_duplicate_support": False}
    return config


def _metadata(sae: SAE) -> dict[str, Any]:
    """The origin and the names of the sites."""
    origin = dict(sae.origin)
    metadata = {name: value for name, value in origin.items() if name not in _OWN}
    for name, site in (("hook_name", sae.read), ("hook_name_out", sae.write)):
        known = origin.get(name)
        if hook := known if known and site in (None, site_of_hook(known)) else hook_of_site(site):
            metadata[name] = hook
    return metadata | {"sae_lens_version": _VERSION}
