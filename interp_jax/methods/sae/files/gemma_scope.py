"""Gemma Scope's files: `params.npz` of the first release, `params.safetensors` and `config.json` of the second.

    f = JumpReLU(x W_enc + b_enc),  x' = f W_dec + b_dec (+ x W_skip)        nothing is subtracted first

The first release has no configuration: sizes come from the arrays, the site and layer from the folder's path, which
is that of the repository (`.../gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`).

>>> _place(Path("gemma-scope-2b-pt-att/layer_3/width_16k/average_l0_7"))[0]
Site(layer=3, name='z')

Sharp edges: the SAEs called `att` read the heads side by side. The transcoders of the first release read the MLP's
norm without its gain, which no site is; `read` is None. SAEs in a folder called `embedding` read embeddings before
Gemma multiplies them by sqrt(d_in); here they read them after, as the site `embed` has them. The second release's
files were not seen by us: other loaders agree on the names used here.

Source: Lieberum et al. 2024 (2408.05147), page 18 for the sites; McDougall et al. 2025 for the second release.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from interp_jax.core.errors import LoadError, UnsupportedModelError, four_part
from interp_jax.core.sites import Site
from interp_jax.methods.sae.files.contents import Contents, frozen, read_object
from interp_jax.methods.sae.files.saelens import log_thresholds
from interp_jax.methods.sae.jump_relu import JumpReLU
from interp_jax.methods.sae.normalization import Normalization
from interp_jax.methods.sae.sae import SAE
from interp_jax.models.weights.checkpoint import Tensors
from interp_jax.models.weights.safetensors import open_tensors

NPZ, SAFETENSORS, CONFIG = "params.npz", "params.safetensors", "config.json"

_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_SKIP = "affine_skip_connection"
_AUTOENCODERS = {
    "res": "resid_post",
    "mlp": "mlp_out",
    "att": "z",
    "resid_post": "resid_post",
    "mlp_out": "mlp_out",
    "attn_out": "z",
}


def read(folder: Path) -> SAE:
    """The SAE or transcoder in a `folder` of a Gemma Scope repository.

    Args:
        folder: The folder of one SAE.

    Returns:
        The SAE.

    Raises:
        LoadError: Files that do not fit together.
        UnsupportedModelError: A transcoder across layers.
    """
    is_first = (folder / NPZ).is_file()
    tensors = _open_npz(folder / NPZ) if is_first else open_tensors(folder / SAFETENSORS)
    fields = read_object(folder / CONFIG) if not is_first and (folder / CONFIG).is_file() else {}
    contents = Contents(str(folder), fields, tensors)
    # Some files write w_enc for W_enc.
    names = {name: name if name in contents else name.replace("W_", "w_") for name in _NAMES}
    d_in, n_latents, d_out = _sizes(contents, names)
    shapes = {
        "W_enc": (d_in, n_latents),
        "b_enc": (n_latents,),
        "W_dec": (n_latents, d_out),
        "b_dec": (d_out,),
        "threshold": (n_latents,),
    }
    params = {name: contents.array(names[name], shape) for name, shape in shapes.items()}
    if _SKIP in contents:
        params["W_skip"] = contents.array(_SKIP, (d_in, d_out))
    if "scaling_factor" in contents and not np.allclose(contents.array("scaling_factor", (n_latents,)), 1):
        contents.fault("scaling_factor is not 1, and nobody says what it scales")
    if fields:
        contents.choice("architecture", ("jump_relu",))
        if contents.flag("affine_connection", False) != ("W_skip" in params):
            contents.fault(f"affine_connection and {_SKIP} contradict each other")
        contents.ignore("*")  # nobody lists them; they are kept in the origin
    reads, writes, kind = _place(folder)
    contents.finish()
    params["log_threshold"] = log_thresholds(params.pop("threshold"))
    scale = Normalization("sqrt_d", jnp.float32(d_in**-0.5)) if kind == "embedding" else Normalization()
    about = {"format": "gemma_scope", **_path_parts(folder), **fields}
    return SAE(
        JumpReLU(is_centred=False),
        {name: jnp.asarray(value) for name, value in sorted(params.items())},
        input_scaling=scale,
        output_scaling=Normalization() if kind == "transcoder" or "W_skip" in params else None,
        read=reads,
        write=writes,
        origin=tuple((name, frozen(value)) for name, value in about.items()),
    )


def _open_npz(path: Path) -> Tensors:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return Tensors.from_arrays(dict(archive))
    except Exception as error:  # damaged zips fail in many ways
        raise LoadError(
            four_part(
                f"An unreadable {path.name} ({type(error).__name__}: {error})",
                where=str(path.parent),
                expected="a whole npz file of arrays.",
                fix="download the file again.",
            )
        ) from error


def _sizes(contents: Contents, names: Mapping[str, str]) -> tuple[int, int, int]:
    """d_in, the number of latents and d_out, as the arrays say them; 0 where they do not."""
    shapes = {name: contents.shape(found) or () for name, found in names.items()}
    if len(shapes["W_dec"]) == 3:
        raise UnsupportedModelError(
            four_part(
                f"A transcoder across layers, with W_dec {list(shapes['W_dec'])}",
                where=contents.where,
                expected="a decoder of one layer, [latent, d_out].",
                fix="use the transcoders of single layers.",
            )
        )
    (n_latents,) = shapes["b_enc"] if len(shapes["b_enc"]) == 1 else (0,)
    (d_out,) = shapes["b_dec"] if len(shapes["b_dec"]) == 1 else (0,)
    rows, columns = shapes["W_enc"] if len(shapes["W_enc"]) == 2 else (0, 0)
    # Of a transposed W_enc the other axis is d_in.
    d_in = columns if columns != n_latents and rows == n_latents else rows
    return d_in, n_latents, d_out


def _path_parts(folder: Path) -> dict[str, str]:
    """The repository and the path in it, from a folder's path."""
    parts = folder.parts
    start = next((i for i, part in enumerate(parts) if "gemma-scope" in part), None)
    if start is None:
        return {"path": folder.name}
    inside = parts[start + 1 :]
    if inside[:1] == ("snapshots",):  # of the Hub's cache
        inside = inside[2:]
    return {"repository": parts[start].removeprefix("models--").replace("--", "/"), "path": "/".join(inside)}


def _place(folder: Path) -> tuple[Site | None, Site | None, str]:
    """What is read, what is written (None if it is the same), and what kind of thing it is."""
    about = _path_parts(folder)
    path = about["path"]
    match = re.search(r"layer_(\d+)", path)
    layer = None if match is None else int(match.group(1))
    kind = about.get("repository", "").rpartition("-")[2]
    first = path.partition("/")[0]
    if "transcoder" in kind or "transcoder" in first:
        # The first release: after the norm, before its gain.
        before = None if "transcoder" in kind or layer is None else Site(layer, "ln2")
        return before, None if layer is None else Site(layer, "mlp_out"), "transcoder"
    if first == "embedding":
        return Site(None, "embed"), None, "embedding"
    name = _AUTOENCODERS.get(kind) or next((name for key, name in _AUTOENCODERS.items() if first.startswith(key)), None)
    return None if layer is None or name is None else Site(layer, name), None, "autoencoder"
