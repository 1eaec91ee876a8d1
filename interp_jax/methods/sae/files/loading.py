"""One entry for the files of all SAEs: ours, SAELens's, Gemma Scope's, sparsify's, dictionary_learning's.

The format is recognised by the names of the files in the folder. Each format has a module with a `read`; what it
gives is an SAE whose encode and decode are that library's.

    sae = load_sae("google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71")     # in the Hub's local cache
    logits = lm.intervene(tokens, {sae.read: sae})

>>> list(FORMATS)
['interp_jax', 'saelens', 'gemma_scope', 'sparsify', 'dictionary_learning']

Sharp edges: nothing is downloaded. All arrays are read as float32, whatever the file holds.

Source: interp_jax; the sources of each format.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from interp_jax.core.errors import InvalidInputError, LoadError, check_choice, four_part, shorten
from interp_jax.methods.sae.files import dictionary_learning, gemma_scope, own, saelens, sparsify
from interp_jax.methods.sae.sae import SAE
from interp_jax.models.loading import in_hub_cache


@dataclass(frozen=True)
class Format:
    """A layout of files.

    Args:
        files: The files a folder of this format has; one of these sets.
        read: Reads such a folder.
    """

    files: tuple[tuple[str, ...], ...]
    read: Callable[..., SAE]


FORMATS: Mapping[str, Format] = {
    "interp_jax": Format(((own.DOCUMENT, own.WEIGHTS),), own.read),
    "saelens": Format(((saelens.CONFIG, saelens.WEIGHTS),), saelens.read),
    "gemma_scope": Format(((gemma_scope.NPZ,), (gemma_scope.SAFETENSORS,)), gemma_scope.read),
    "sparsify": Format(((sparsify.CONFIG, sparsify.WEIGHTS),), sparsify.read),
    "dictionary_learning": Format(
        ((dictionary_learning.CONFIG, dictionary_learning.WEIGHTS),), dictionary_learning.read
    ),
}


def load_sae(path: str | os.PathLike[str], *, format: str | None = None, input_scale: float | None = None) -> SAE:
    """Read an SAE or transcoder from a folder.

    Args:
        path: The folder, or `owner/repository/folder` for one in the local cache of the Hugging Face Hub.
        format: One of `FORMATS`; None to tell by the files that are there.
        input_scale: For a SAELens file under "expected_average_only_in" that lacks it: what activations were
            multiplied by in training.

    Returns:
        The SAE, with the site it reads where the files say one, and where it is from.

    Raises:
        LoadError: There is no such folder, no format's files are in it, they are damaged or do not fit together.
        UnsupportedModelError: It computes what none of our variants does.
        UnknownNameError: There is no such format.
        InvalidInputError: A scale is needed, or given though it is not.
    """
    if not isinstance(path, str | os.PathLike):
        raise InvalidInputError(
            four_part(
                f"{type(path).__name__} {path!r:.60} was given",
                where="load_sae",
                expected="the path of a folder, or owner/repository/folder of one in the Hub's local cache.",
                fix="give the folder that holds the files of one SAE.",
            )
        )
    where = f"load_sae({os.fspath(path)!r})"
    if format is not None:
        check_choice(format, FORMATS, what="format", where=where)
    folder = _folder(os.fspath(path), where)
    name = _recognised(folder, where, format)
    if input_scale is None:
        return _whole(FORMATS[name].read(folder), folder)
    if name != "saelens":
        raise InvalidInputError(
            four_part(
                f"input_scale = {input_scale} was given",
                where=where,
                expected=f"none: {name} files say all there is to know.",
                fix="leave input_scale out.",
            )
        )
    return _whole(saelens.read(folder, input_scale=input_scale), folder)


def _whole(sae: SAE, folder: Path) -> SAE:
    """The SAE, once its numbers go with its arrays, such as k with the number of latents."""
    try:
        sae.architecture.check(sae.n_latents)
    except InvalidInputError as error:
        raise LoadError(
            four_part(
                f"An SAE whose files do not fit together ({str(error).splitlines()[0].rstrip('.')})",
                where=str(folder),
                expected="a configuration and arrays of the same SAE.",
                fix="check that the files belong together and are whole.",
            )
        ) from error
    return sae


def _folder(path: str, where: str) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    parts = path.split("/")
    cached = in_hub_cache("/".join(parts[:2])) if len(parts) >= 2 and not folder.is_absolute() else None
    if cached is not None and (inside := cached.joinpath(*parts[2:])).is_dir():
        return inside
    raise LoadError(
        four_part(
            f"No folder {path!r}" + (" (a file)" if folder.exists() else ""),
            where=where,
            expected="a folder with the files of one SAE, or owner/repository/folder of one in the Hub's local cache.",
            fix="give the folder that holds the files; fetch one of the Hub with `hf download owner/repository "
            "--include 'folder/*'`.",
        )
    )


def _recognised(folder: Path, where: str, format: str | None) -> str:
    """The name of the format whose files are in the folder."""
    there = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    wanted = FORMATS if format is None else {format: FORMATS[format]}
    found = [name for name, layout in wanted.items() if any(set(files) <= set(there) for files in layout.files)]
    if len(found) == 1:
        return found[0]
    if found:
        raise LoadError(
            four_part(
                f"A folder with the files of several formats: {', '.join(found)}",
                where=where,
                names=found,
                fix="say which is meant: load_sae(path, format=...).",
            )
        )
    layouts = "; ".join(f"{name}: {' or '.join(' + '.join(f) for f in fmt.files)}" for name, fmt in wanted.items())
    below = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    raise LoadError(
        four_part(
            f"A folder with {shorten(there, limit=8) or 'no files'}"
            + (f", and the folders {shorten(below, limit=8)}" if below else ""),
            where=where,
            expected=f"{layouts}.",
            fix="give the folder of one SAE" + (", such as one of those below it." if below else "; copy what lacks."),
        )
    )
