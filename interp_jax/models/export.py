"""Models written back as Hugging Face directories, with Hugging Face's names: the inverse of `load`.

A family says once, as a layout, which tensor each of its parameters is (`interp_jax.models.weights.layout`); loading
goes through it one way, export the other. What was loaded and not changed comes out as it was, bit for bit, whether
its layers are stacked or not.

    lm = ij.load("smollm2-135m")
    lm.export("smollm2-edited")

>>> from interp_jax.models.weights.layout import Stored, turned
>>> layout = {"kernel": Stored("h.{}.w", (2, 3), layers=range(2), view=turned)}
>>> params = {"kernel": np.arange(12, dtype=np.float32).reshape(2, 3, 2)}
>>> tensors_of(layout, params)["h.1.w"]
array([[ 6.,  8., 10.],
       [ 7.,  9., 11.]], dtype=float32)

Sharp edges: names are the full ones ("transformer.h.0..."), also where the published file lacks the prefix; buffers
of old files, such as masks, and an unembedding that is tied are not written.

Source: interp_jax.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from interp_jax.core.errors import InvalidInputError, ShapeError, UnsupportedModelError, four_part
from interp_jax.models.weights.checkpoint import Checkpoint, LazyTensor, Tensors
from interp_jax.models.weights.layout import Stored
from interp_jax.models.weights.safetensors import DTYPES
from interp_jax.models.weights.writing import MAX_FILE_BYTES, write_directory

if TYPE_CHECKING:
    from interp_jax.models.tokenizers import Tokenizer
    from interp_jax.models.upstream import Upstream

# What else a model directory holds that is not weights.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_OTHER_FILES = ("generation_config.json",)


def export(
    checkpoint: Checkpoint,
    directory: str | os.PathLike[str],
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint as a Hugging Face directory: config.json, safetensors, tokenizer.

    Args:
        checkpoint: What to write; its tensors are read one by one.
        directory: Where; it must not exist, or be empty, unless `overwrite`.
        max_file_bytes: Weights beyond this are cut into several files with an index.
        overwrite: Whether to replace a model directory that is there.

    Returns:
        The directory.

    Raises:
        InvalidInputError: `directory` holds something that is not to be replaced, or `max_file_bytes` is not positive.
        ExportError: It could not be written; nothing has changed.
    """
    if isinstance(max_file_bytes, bool) or not isinstance(max_file_bytes, int) or max_file_bytes < 1:
        raise InvalidInputError(
            four_part(
                f"max_file_bytes={max_file_bytes!r} was given",
                where="export",
                expected="a positive number of bytes.",
                fix=f"leave it out ({MAX_FILE_BYTES:,}).",
            )
        )
    files = {"config.json": _json(checkpoint.config), **_other_files(checkpoint)}
    return write_directory(
        Path(directory), files, checkpoint.tensors, max_file_bytes=max_file_bytes, overwrite=overwrite
    )


def checkpoint_of(
    upstream: Upstream,
    params: Any,
    *,
    config_json: Mapping[str, Any] | None,
    tokenizer: Tokenizer | None,
    source: str,
    name: str,
) -> Checkpoint:
    """A model in the Hugging Face convention: the checkpoint that loads as it.

    Args:
        upstream: The model's code, with the layout of its parameters.
        params: The parameters.
        config_json: The keys of the `config.json` it was loaded with.
        tokenizer: Its tokenizer.
        source: Where it came from.
        name: What to call it in messages.

    Returns:
        The checkpoint; its tensors are fetched from the parameters when they are read.

    Raises:
        UnsupportedModelError: Nobody says what its parameters are called, or it was not loaded from files.
        ShapeError: Parameters that are not those of its configuration.
    """
    if upstream.layout is None or config_json is None:
        lacking = "layout of its parameters" if upstream.layout is None else "config.json"
        raise UnsupportedModelError(
            four_part(
                f"{name} has no {lacking}",
                where="export",
                expected="a model that `load` made of files, of a family with a layout.",
                fix="load the model with `load`, and change its parameters with dataclasses.replace(lm, params=...).",
            )
        )
    tensors = tensors_of(upstream.layout(), params)
    return Checkpoint(config_json["model_type"], _config(config_json, tensors), tensors, tokenizer, source)


def tensors_of(layout: Any, params: Any) -> Tensors:
    """The tensors of a Hugging Face directory that parameters are.

    Args:
        layout: A pytree of `Stored`.
        params: The parameters, in the form of the layout.

    Returns:
        The tensors by name; their values are fetched from the parameters when asked for.

    Raises:
        ShapeError: Parameters that do not fit the layout.
    """
    leaves, tree = jax.tree.flatten(layout)
    _check_params(layout, params)
    parts: dict[str, list[tuple[Stored, tuple[int, ...], Any]]] = {}
    for stored, param in zip(leaves, tree.flatten_up_to(params), strict=True):
        for i, name in enumerate(stored.names):
            at = tuple(map(int, np.unravel_index(i, stored.lead))) if stored.lead else ()
            parts.setdefault(name, []).append((stored, at, param))
    entries = {}
    for name, of_name in parts.items():
        dtype = np.dtype(of_name[0][2].dtype)
        entries[name] = LazyTensor(of_name[0][0].shape, dtype, lambda of_name=of_name: _assembled(of_name))
    return Tensors(entries)


def _assembled(parts: list[tuple[Stored, tuple[int, ...], Any]]) -> np.ndarray:
    """A tensor of the file, from the parameters that are parts of it."""
    first, at, param = parts[0]
    if first.view is None and len(parts) == 1:
        return _on_host(param, at)
    tensor = np.empty(first.shape, param.dtype)
    n_written = 0
    for stored, at, param in parts:
        part = tensor if stored.view is None else stored.view(tensor)
        if not np.may_share_memory(part, tensor):
            raise UnsupportedModelError(
                four_part(
                    f"The view of {stored.name!r} makes a copy",
                    where="export",
                    expected="a view made by reshaping, indexing and transposing only.",
                    fix="mend the layout of this family.",
                )
            )
        part[...] = _on_host(param, at)
        n_written += part.size
    if n_written != math.prod(first.shape):
        raise UnsupportedModelError(
            four_part(
                f"Parameters that make up {n_written:,} of the {math.prod(first.shape):,} values of {first.name!r}",
                where="export",
                expected="layouts whose views cover each tensor once.",
                fix="mend the layout of this family.",
            )
        )
    return tensor


def _on_host(param: Any, at: tuple[int, ...]) -> np.ndarray:
    """The values of a parameter, or of what lies in it at an index of its leading axes."""
    if not isinstance(param, jax.Array) or [device.platform for device in param.devices()] == ["cpu"]:
        return np.asarray(param)[at]
    # Of a copy, since JAX keeps on an array the values that were fetched from it.
    one = param if at else param.copy()
    for i in at:
        one = jax.lax.dynamic_index_in_dim(one, np.int32(i), keepdims=False)
    return np.asarray(one)


def _check_params(layout: Any, params: Any) -> None:
    """Refuse parameters that are not those of the layout, naming all that differ."""
    expected = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(layout)}
    given = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    offenders = [f"    {name} is missing" for name in expected if name not in given]
    offenders += [f"    {name} is not known" for name in given if name not in expected]
    for name in expected.keys() & given.keys():
        shape, param = expected[name].param_shape, given[name]
        if np.shape(param) != shape:
            offenders.append(f"    {name} has shape {list(np.shape(param))}, expected {list(shape)}")
        elif np.dtype(param.dtype) not in DTYPES.values():
            offenders.append(f"    {name} has dtype {param.dtype}")
        elif isinstance(param, jax.Array) and param.is_deleted():
            offenders.append(f"    {name} was deleted")
        elif isinstance(param, jax.Array) and not param.is_fully_addressable:
            offenders.append(f"    {name} is partly on other machines")
    if offenders:
        raise ShapeError(
            four_part(
                "Parameters that do not fit the model:\n" + "\n".join(sorted(offenders)) + "\n ",
                where="export",
                expected="the parameters its configuration implies, all on this machine.",
                fix="give back the names and shapes `load` gave; what is folded or cut is another model.",
            )
        )


def _config(config: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """The config.json it was loaded with, but for the dtype the weights have now."""
    dtypes = [tensors.dtype(name).name for name in tensors]
    dtype = max(set(dtypes), key=dtypes.count)
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    return {**config, key: dtype}


def _other_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The files of the tokenizer and of generation: those it was loaded from, else new ones."""
    source, tokenizer = Path(checkpoint.source), checkpoint.tokenizer
    if not checkpoint.source or not source.is_dir():
        return {} if tokenizer is None else _tokenizer_files(tokenizer)
    names = _OTHER_FILES if tokenizer is None else (*_OTHER_FILES, *_TOKENIZER_FILES)
    return {name: (source / name).read_bytes() for name in names if (source / name).is_file()}


def _tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    named = {role: tokenizer.backend.id_to_token(token) for role, token in ends.items() if token is not None}
    return {
        "tokenizer.json": tokenizer.backend.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json({"tokenizer_class": "PreTrainedTokenizerFast", **named}),
    }


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(document), indent=2, ensure_ascii=False) + "\n").encode()
