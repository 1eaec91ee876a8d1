"""sparsify's files: one folder for each module, with `cfg.json` and `sae.safetensors`.

    f = TopK_k(ReLU((x - b_dec) W_enc + b_enc)),  x' = f W_dec + b_dec + x W_skip

A transcoder reads the module's input and subtracts nothing. `encoder.weight` is stored [latent, d_in], `W_skip` is
stored [d_out, d_in]. The folder's name is the module: `layers.5.mlp`; the run's `config.json` beside it names the
model.

>>> sorted(_REASONS)
['groupmax', 'signed']

Sharp edges: where a model's MLP output passes another norm before it is added (Gemma 2 and 3), the module's output is
none of our sites; `write` and `read` are then None.

Source: https://github.com/EleutherAI/sparsify (version 1.3).
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp

from interp_jax.core.errors import UnsupportedModelError, four_part
from interp_jax.methods.sae.files.contents import Contents, frozen, read_object
from interp_jax.methods.sae.files.hooks import sites_of_module
from interp_jax.methods.sae.normalization import Normalization
from interp_jax.methods.sae.sae import SAE
from interp_jax.methods.sae.top_k import TopK
from interp_jax.models.weights.safetensors import open_tensors

CONFIG, WEIGHTS, RUN = "cfg.json", "sae.safetensors", "config.json"
_REASONS = {
    "signed": "it keeps the largest latents by magnitude, of either sign; ours are at least 0.",
    "groupmax": "it keeps the largest of each of k groups of latents, which none of our variants does.",
}
# What the decoder is by now, and parts of the loss.
_TRAINING = ("normalize_decoder", "multi_topk")
_ABOUT = ("model", "dataset", "ctx_len", "revision")


def read(folder: Path) -> SAE:
    """The SAE or transcoder in a `folder` that sparsify wrote.

    Args:
        folder: The folder of one module.

    Returns:
        The SAE.

    Raises:
        LoadError: Files that do not fit together.
        UnsupportedModelError: Signed or group-wise latents.
    """
    contents = Contents(str(folder), read_object(folder / CONFIG), open_tensors(folder / WEIGHTS))
    contents.ignore(*_TRAINING)
    is_signed = contents.flag("signed", False)
    activation = contents.choice("activation", ("topk", "groupmax"), "topk")
    for name, is_meant in (("signed", is_signed), ("groupmax", activation == "groupmax")):
        if is_meant:
            raise UnsupportedModelError(
                four_part(
                    f"An SAE whose latents are {name}",
                    where=str(folder),
                    expected=f"TopK latents: {_REASONS[name]}",
                    fix="compute it with sparsify itself.",
                )
            )
    d_in, k = contents.integer("d_in"), contents.integer("k")
    # 0 means: as many as the factor says.
    factor, n_latents = contents.raw("expansion_factor"), contents.raw("num_latents")
    if not n_latents and isinstance(factor, int):
        n_latents = d_in * factor
    if not isinstance(n_latents, int) or n_latents < 1:
        contents.fault(f"the field num_latents = {n_latents!r:.60}: it, or expansion_factor, is expected above 0")
        n_latents = 0
    is_transcoder = contents.flag("transcode", False)
    params = {
        "W_enc": contents.array("encoder.weight", (n_latents, d_in)).T,
        "b_enc": contents.array("encoder.bias", (n_latents,)),
        "W_dec": contents.array("W_dec", (n_latents, d_in)),
        "b_dec": contents.array("b_dec", (d_in,)),
    }
    if contents.flag("skip_connection", False):
        params["W_skip"] = contents.array("W_skip", (d_in, d_in)).T
    contents.finish()
    run = read_object(folder.parent / RUN) if (folder.parent / RUN).is_file() else {}
    origin = {"format": "sparsify", "hookpoint": folder.name} | {key: frozen(run[key]) for key in _ABOUT if key in run}
    reads, writes = sites_of_module(folder.name, is_transcoder=is_transcoder, model=str(run.get("model")))
    return SAE(
        TopK(k, is_centred=not is_transcoder),
        {name: jnp.asarray(value) for name, value in sorted(params.items())},
        output_scaling=Normalization() if is_transcoder else None,
        read=reads,
        write=writes,
        origin=tuple(origin.items()),
    )
