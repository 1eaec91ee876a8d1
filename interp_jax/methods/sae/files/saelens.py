"""SAELens's files: `cfg.json` and `sae_weights.safetensors`, of version 6 and of the versions before it.

Version 6 keeps what is known about the model in `metadata`; before it everything lay flat in one object under names
that changed over time, and TopK was an activation function of the "standard" architecture.

    f = act((n(x) - b_dec) W_enc + b_enc),  x' = n^-1(f W_dec + b_dec)       b_dec only if apply_b_dec_to_input

A TopK SAE with `rescale_acts_by_decoder_norm` chooses among latents times their rows' norms: read as the same
function with rows of norm 1. Training checkpoints of BatchTopK and Matryoshka are read as such; what SAELens saves
after training is a JumpReLU.

>>> sorted(_ARCHITECTURES)[:3]
['batchtopk', 'gated', 'jumprelu']

Sharp edges: under "expected_average_only_in" the file lacks the scale, unless `activation_scaler.json` lies beside it:
`load_sae` then needs it as `input_scale`. `sparsity.safetensors` (how often latents fire) is not read. `hook_z` means
the heads side by side.

Source: https://github.com/decoderesearch/SAELens (versions 2.1, 3.23, 5.10, 6.54).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from interp_jax.core.errors import InvalidInputError, UnsupportedModelError, four_part
from interp_jax.methods.sae.architecture import Architecture
from interp_jax.methods.sae.batch_top_k import BatchTopK
from interp_jax.methods.sae.files.contents import Contents, frozen, read_object
from interp_jax.methods.sae.files.hooks import site_of_hook
from interp_jax.methods.sae.gated import Gated
from interp_jax.methods.sae.jump_relu import JumpReLU
from interp_jax.methods.sae.matching_pursuit import MatchingPursuit
from interp_jax.methods.sae.matryoshka import Matryoshka
from interp_jax.methods.sae.normalization import Normalization
from interp_jax.methods.sae.relu import ReLU
from interp_jax.methods.sae.sae import SAE
from interp_jax.methods.sae.top_k import TopK
from interp_jax.models.weights.safetensors import open_tensors

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"

# Architecture -> the arrays it has beside W_enc, W_dec and b_dec.
_ARCHITECTURES: Mapping[str, tuple[str, ...]] = {
    "standard": ("b_enc",),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "batchtopk": ("b_enc",),
    "matryoshka_batchtopk": ("b_enc",),
    "matching_pursuit": (),
    "transcoder": ("b_enc",),
    "skip_transcoder": ("b_enc",),
    "jumprelu_transcoder": ("b_enc", "threshold"),
    "jumprelu_skip_transcoder": ("b_enc", "threshold"),
}
_RULES = {"none": "none", "layer_norm": "layer", "constant_norm_rescale": "constant_norm"}
_AVERAGE = "expected_average_only_in"

# Names of the versions before 6, and what they became.
_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
# What says where an SAE is from, kept in its origin.
_ABOUT = (
    "model_name", "model_class_name", "hook_name", "hook_layer", "hook_head_index", "hook_name_out",
    "hook_head_index_out", "hf_hook_name", "hf_hook_name_out", "prepend_bos", "context_size", "dataset_path",
    "neuronpedia_id", "sae_lens_version", "sae_lens_training_version", "seqpos_slice", "exclude_special_tokens",
    "model_from_pretrained_kwargs",
)  # fmt: skip
# Fields that leave the function as it is: of training, and of how arrays are held in memory.
_TRAINING = (
    "dtype", "device", "decoder_init_norm", "l1_coefficient", "lp_norm", "l1_warm_up_steps", "jumprelu_*",
    "l0_coefficient", "l0_warm_up_steps", "pre_act_loss_coefficient", "target_l0", "use_sparse_activations",
    "aux_loss_coefficient", "topk_threshold_lr", "use_matryoshka_aux_loss",
)  # fmt: skip
_TRAINING_BEFORE_6 = (
    "act_store_device", "adam_beta*", "autocast*", "b_dec_init_method", "cached_activations_path", "checkpoint_path",
    "compile_*", "dataset_trust_remote_code", "dead_feature_*", "decoder_heuristic_init*", "decoder_orthogonal_init",
    "eval_*", "expansion_factor", "feature_reinit_scale", "feature_sampling_*", "finetuning_method",
    "finetuning_tokens", "from_pretrained_path", "hook_eval", "hook_point_eval", "init_encoder_as_decoder_transpose",
    "is_dataset_tokenized", "llm_compilation_mode", "log_*", "lr", "lr_*", "model_kwargs", "mse_loss_normalization",
    "n_batches_in_buffer", "n_checkpoints", "n_eval_batches", "n_restart_cycles", "noise_scale",
    "normalize_sae_decoder", "resample_batches", "resume", "run_name", "sae_compilation_mode",
    "scale_sparsity_penalty_by_decoder_norm", "seed", "store_batch_size*", "streaming", "tokens_per_buffer",
    "total_training_tokens", "train_batch_size*", "training_tokens", "unique_id", "use_cached_activations",
    "use_ghost_grads", "verbose", "wandb_*",
)  # fmt: skip


def read(folder: Path, *, input_scale: float | None = None) -> SAE:
    """The SAE in a folder that SAELens wrote.

    Args:
        folder: The folder.
        input_scale: What activations were multiplied by in training, where the files do not say.

    Returns:
        The SAE.

    Raises:
        LoadError: Files that do not fit together.
        UnsupportedModelError: An architecture or normalization that is none of ours.
        InvalidInputError: The scale is needed, or is given though it is not.
    """
    fields = read_object(folder / CONFIG)
    is_flat = "metadata" not in fields
    if is_flat:
        fields = _as_of_6(fields)
    about = {name: fields.pop(name) for name in _ABOUT if is_flat and name in fields}
    contents = Contents(str(folder), fields, open_tensors(folder / WEIGHTS))
    metadata = contents.raw("metadata", {})
    if not isinstance(metadata, dict):
        contents.fault(f"the field metadata = {metadata!r:.60}: an object is expected")
        metadata = {}
    about |= metadata
    contents.ignore(*_TRAINING, *(_TRAINING_BEFORE_6 if is_flat else ()))
    name = contents.raw("architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise _unsupported(contents, f"The architecture {name!r:.60}", f"one of {', '.join(_ARCHITECTURES)}.")
    is_transcoder = "transcoder" in name
    contents.choice("reshape_activations", ("none", "hook_z"), "none")
    scaling = _scaling(contents, folder, input_scale)
    architecture, params = _function(contents, name, is_transcoder)
    if "W_skip" in params and scaling.rule != "none":
        raise _unsupported(contents, f"A skip past the normalization {scaling.rule!r}", '"none" for a skip transcoder.')
    contents.finish()
    return SAE(
        architecture,
        {key: jnp.asarray(value) for key, value in sorted(params.items())},
        input_scaling=scaling,
        # A transcoder's output is not scaled back, but for a scale that is to be folded into its weights.
        output_scaling=None if not is_transcoder else scaling if scaling.rule == "sqrt_d" else Normalization(),
        read=site_of_hook(about.get("hook_name")),
        write=site_of_hook(about.get("hook_name_out")) if is_transcoder else None,
        origin=(("format", "saelens"), *((key, frozen(value)) for key, value in sorted(about.items()))),
    )


def _as_of_6(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a file from before version 6 as that version names them."""
    fields = {_RENAMED.get(name, name): value for name, value in flat.items()}
    options = fields.pop("activation_fn_kwargs", None) or {}
    activation = fields.pop("activation_fn", None) or "relu"
    fields.setdefault("architecture", "standard")
    if activation == "topk" and fields["architecture"] in ("standard", "topk"):
        fields |= {"architecture": "topk", **options}
    elif activation != "relu" or options:
        fields["activation_fn"] = f"{activation} {options or ''}".strip()
    rule = fields.get("normalize_activations")
    if rule is None or isinstance(rule, bool):
        fields["normalize_activations"] = _AVERAGE if rule else "none"
    return {"apply_b_dec_to_input": True, **fields}


def _scaling(contents: Contents, folder: Path, input_scale: float | None) -> Normalization:
    rule = contents.raw("normalize_activations", "none")
    if rule in _RULES:
        if input_scale is not None:
            raise InvalidInputError(
                four_part(
                    f"input_scale = {input_scale} was given",
                    where=contents.where,
                    expected=f"none: its normalization is {rule!r}.",
                    fix="leave input_scale out.",
                )
            )
        return Normalization(_RULES[rule])
    if rule != _AVERAGE:
        expected = f"one of {', '.join(_RULES)}, {_AVERAGE}; whitening is folded once training has ended."
        raise _unsupported(contents, f"The normalization {rule!r:.60}", expected)
    scale = input_scale
    if scale is None and (folder / SCALER).is_file():
        scale = read_object(folder / SCALER).get("scaling_factor")
    if not isinstance(scale, int | float) or not 0 < scale < float("inf"):
        raise InvalidInputError(
            four_part(
                f"An SAE under {_AVERAGE!r} without the scale it was trained with",
                where=contents.where,
                expected=f"a positive number, from {SCALER} or as input_scale: sqrt(d_in) over the mean norm of the "
                "activations it was trained on.",
                fix="call load_sae(..., input_scale=...), or normalization.estimate('sqrt_d', activations).scale.",
            )
        )
    return Normalization("sqrt_d", jnp.asarray(scale, jnp.float32))


def _function(contents: Contents, name: str, is_transcoder: bool) -> tuple[Architecture, dict[str, np.ndarray]]:
    """The variant and its arrays."""
    d_in, n_latents = contents.integer("d_in"), contents.integer("d_sae")
    d_out = contents.integer("d_out") if is_transcoder else d_in
    is_centred = contents.flag("apply_b_dec_to_input", not is_transcoder)
    if is_transcoder and is_centred:
        contents.fault("the field apply_b_dec_to_input = True: a transcoder's b_dec is of another space")
    shapes = {"W_dec": (n_latents, d_out), "b_dec": (d_out,)}
    shapes |= {"W_enc": (d_in, n_latents)} if name != "matching_pursuit" else {}
    shapes |= dict.fromkeys(_ARCHITECTURES[name], (n_latents,))
    if "threshold" in shapes and "threshold" not in contents and "log_threshold" in contents:
        shapes["log_threshold"] = shapes.pop("threshold")  # a checkpoint of training
    params = {key: contents.array(key, shape) for key, shape in shapes.items()}
    if "skip" in name:
        params["W_skip"] = contents.array("W_skip", (d_out, d_in)).T
    if "threshold" in params:
        params["log_threshold"] = log_thresholds(params.pop("threshold"))
    _scale_rows(contents, params, n_latents)
    return _variant(contents, name, params, is_centred), params


def _variant(contents: Contents, name: str, params: dict[str, np.ndarray], is_centred: bool) -> Architecture:
    if name == "gated":
        return Gated(is_centred=is_centred)
    if "jumprelu" in name:
        return JumpReLU(is_centred=is_centred)
    if name == "matching_pursuit":
        return _pursuit(contents, is_centred)
    if name not in ("topk", "batchtopk", "matryoshka_batchtopk"):
        return ReLU(is_centred=is_centred)
    k = contents.integer("k")
    # While it is trained, the default is to rescale; afterwards it is not to.
    if contents.flag("rescale_acts_by_decoder_norm", name != "topk"):
        norms = np.linalg.norm(params["W_dec"], axis=-1)
        params |= {"W_enc": params["W_enc"] * norms, "b_enc": params["b_enc"] * norms}
        params["W_dec"] = params["W_dec"] / np.where(norms > 0, norms, 1)[:, None]
    if name == "topk":
        return TopK(k, is_centred=is_centred)
    params["threshold"] = contents.array("topk_threshold", ())
    if name == "batchtopk":
        return BatchTopK(k, is_centred=is_centred)
    widths = contents.raw("matryoshka_widths")
    if not isinstance(widths, list) or not all(isinstance(width, int) for width in widths):
        contents.fault(f"the field matryoshka_widths = {widths!r:.60}: whole numbers are expected")
        widths = []
    groups = tuple(int(size) for size in np.diff([0, *widths]))
    if min(groups, default=0) < 1 or sum(groups) != len(params["W_dec"]):
        contents.fault(f"the field matryoshka_widths = {widths!r:.60}: numbers that grow up to d_sae are expected")
    return Matryoshka(k, groups, is_centred=is_centred)


def _pursuit(contents: Contents, is_centred: bool) -> MatchingPursuit:
    k = contents.raw("max_iterations")
    threshold, stops = contents.raw("residual_threshold", 1e-2), contents.flag("stop_on_duplicate_support", True)
    if threshold or stops or not isinstance(k, int) or not is_centred:
        given = f"residual_threshold = {threshold}, stop_on_duplicate_support = {stops}, max_iterations = {k}"
        raise _unsupported(
            contents,
            f"Matching pursuit with {given}, apply_b_dec_to_input = {is_centred}",
            "residual_threshold = 0, stop_on_duplicate_support = False, max_iterations a number and "
            "apply_b_dec_to_input = True: our pursuit takes a set number of steps.",
        )
    return MatchingPursuit(k)


def _scale_rows(contents: Contents, params: dict[str, np.ndarray], n_latents: int) -> None:
    """Take in the factor of each latent that fine-tuning learned before version 6, which the decoder's rows get."""
    is_used = contents.flag("finetuning_scaling_factor", False)
    for name in ("finetuning_scaling_factor", "scaling_factor"):
        if name not in contents:
            continue
        factors = contents.array(name, (n_latents,))
        if is_used:
            params["W_dec"] = params["W_dec"] * factors[:, None]
        elif not np.allclose(factors, 1):
            contents.fault(f"{name} is not 1 though the field finetuning_scaling_factor is false")


def log_thresholds(thresholds: np.ndarray) -> np.ndarray:
    """The logarithms of `thresholds`; those that are not above 0, which a ReLU's are, become the least there is."""
    return np.log(np.maximum(thresholds, np.finfo(np.float32).tiny))


def _unsupported(contents: Contents, what: str, expected: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        four_part(what, where=contents.where, expected=expected, fix="compute it with SAELens itself.")
    )
