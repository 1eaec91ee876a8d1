"""Our own files: a folder of one JSON document and one safetensors file.

    dictionary.json          variant, sites, scaling rules, origin, checksum of the weights
    dictionary.safetensors   params/<name>, input_scaling, output_scaling, reference/<name>

What is read back is what was saved, bit for bit: every variant, tied or not, with a skip, scaling kept or folded.
The folder appears under its name when all of it is on disk.

>>> import tempfile
>>> from interp_jax.methods.sae.relu import ReLU
>>> sae = SAE(ReLU(), ReLU().init(jax.random.key(0), d_in=3, n_latents=5), read=Site(5, "resid_post"))
>>> with tempfile.TemporaryDirectory() as folder:
...     read(save_sae(sae, Path(folder, "sae")))
SAE(relu, 3 -> 5 latents -> 3 at 5.resid_post)

Sharp edges: values of `origin` come back as JSON has them, lists as tuples.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.core.errors import InvalidInputError, LoadError, four_part
from interp_jax.core.sites import Site
from interp_jax.methods.sae.files import reference as references
from interp_jax.methods.sae.files.contents import Contents, frozen, read_object
from interp_jax.methods.sae.normalization import RULES, Normalization
from interp_jax.methods.sae.sae import SAE
from interp_jax.methods.sae.variants import VARIANTS
from interp_jax.models.weights.checkpoint import Tensors
from interp_jax.models.weights.safetensors import open_tensors
from interp_jax.models.weights.writing import write_file, write_whole

DOCUMENT, WEIGHTS = "dictionary.json", "dictionary.safetensors"
FORMAT = 1
_BY_NAME = {variant.name: variant for variant in VARIANTS}


def save_sae(sae: SAE, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write an SAE with reference activations.

    Args:
        sae: The SAE.
        directory: Where; it must not exist, or be empty, unless `overwrite`.
        overwrite: Whether to replace an SAE that is there.

    Returns:
        The directory.

    Raises:
        InvalidInputError: Arrays that are not finite or not this variant's, an origin that JSON cannot hold, or
            something is there that is not to be replaced.
        ExportError: It could not be written; nothing has changed.
    """
    check_call(sae, directory, where="save_sae")
    _check(sae)
    arrays = {f"params/{name}": np.asarray(value) for name, value in sae.params.items()}
    scalings = {"input_scaling": sae.input_scaling, "output_scaling": sae.output_scaling}
    arrays |= {name: np.asarray(s.scale, np.float32) for name, s in scalings.items() if s is not None}
    arrays |= {f"reference/{name}": value for name, value in references.record(sae).items()}
    document = {
        "format": FORMAT,
        "variant": {"name": sae.architecture.name, **dataclasses.asdict(sae.architecture)},  # type: ignore[call-overload]
        "d_in": sae.d_in,
        "n_latents": sae.n_latents,
        "d_out": sae.d_out,
        **{name: None if scaling is None else scaling.rule for name, scaling in scalings.items()},
        "read": None if sae.read is None else list(sae.read),
        "write": None if sae.write is None else list(sae.write),
        "origin": [list(pair) for pair in sae.origin],
    }

    def write(part: Path) -> None:
        write_file(part / WEIGHTS, Tensors.from_arrays(arrays))
        full = document | {"sha256": _digest(part / WEIGHTS)}
        write_file(part / DOCUMENT, (json.dumps(full, indent=1, allow_nan=False) + "\n").encode())

    _check_origin(document)
    n_bytes = sum(array.nbytes for array in arrays.values())
    return write_whole(
        Path(directory), write, n_bytes=n_bytes, verb="save_sae", mark=DOCUMENT, noun="dictionary", overwrite=overwrite
    )


def read(folder: Path) -> SAE:
    """The SAE in a `folder` that `save_sae` wrote.

    Args:
        folder: The folder.

    Returns:
        The SAE.

    Raises:
        LoadError: A file is damaged, or the outputs are not those recorded with it.
    """
    fields, where = read_object(folder / DOCUMENT), str(folder)
    _check_format(fields, where)
    if fields.get("sha256") != _digest(folder / WEIGHTS):
        raise LoadError(
            four_part(
                f"A {WEIGHTS} that is not as it was saved",
                where=where,
                expected=f"the file with the SHA-256 checksum that {DOCUMENT} names.",
                fix="copy both files again from where they were saved.",
            )
        )
    contents = Contents(where, fields, open_tensors(folder / WEIGHTS))
    contents.ignore("format", "sha256")
    sae = _sae(contents, fields)
    recorded = {name: contents.array(f"reference/{name}", shape) for name, shape in _reference_shapes(sae).items()}
    contents.finish()
    if found := references.differences(sae, recorded):
        raise LoadError(
            four_part(
                "An SAE that computes something else than when it was saved",
                where=where + "".join(f"\n    {line}" for line in found),
                expected="the recorded latents and reconstruction, up to rounding.",
                fix="read it with the version of interp-jax that wrote it, and tell us what differs.",
            )
        )
    return sae


def _sae(contents: Contents, fields: dict[str, Any]) -> SAE:
    d_in, n_latents, d_out = (contents.integer(name) for name in ("d_in", "n_latents", "d_out"))
    variant = _variant(contents, n_latents)
    rules = {name: contents.raw(name) for name in ("input_scaling", "output_scaling")}
    sites = {name: contents.raw(name) for name in ("read", "write")}
    origin = contents.raw("origin", [])
    for name, rule in rules.items():
        if rule not in RULES and (name == "input_scaling" or rule is not None):
            contents.fault(f"the field {name} = {rule!r:.60}: one of {', '.join(RULES)} is expected")
    for name, site in sites.items():
        is_site = isinstance(site, list) and len(site) == 2 and isinstance(site[1], str)
        if site is not None and not (is_site and isinstance(site[0], int | None)):
            contents.fault(f"the field {name} = {site!r:.60}: [layer or null, name], or null, is expected")
    if not isinstance(origin, list) or not all(isinstance(p, list) and len(p) == 2 for p in origin):
        contents.fault(f"the field origin = {origin!r:.60}: pairs of name and value are expected")
    if d_in != d_out and variant is not None and variant.reads_b_dec:
        contents.fault(f"d_in = {d_in} and d_out = {d_out}: the variant reads b_dec, so the same are expected")
    if not (d_in and n_latents and d_out) or variant is None or contents.has_faults:
        contents.finish()
        raise AssertionError("a fault was noted")
    has_skip = "params/W_skip" in contents
    expected = _expected_shapes(variant, d_in, n_latents, d_out, has_skip=has_skip)
    params = {name: jnp.asarray(contents.array(f"params/{name}", shape)) for name, shape in expected.items()}
    scalings = {
        name: None if rule is None else Normalization(rule, jnp.asarray(contents.array(name, ())))
        for name, rule in rules.items()
    }
    return SAE(
        variant,
        params,
        read=None if sites["read"] is None else Site(*sites["read"]),
        write=None if sites["write"] is None else Site(*sites["write"]),
        origin=tuple((str(name), frozen(value)) for name, value in origin),
        **scalings,  # type: ignore[arg-type]
    )


def _variant(contents: Contents, n_latents: int) -> Any:
    """The variant of an SAE with so many latents, None where its description does not fit."""
    described = contents.raw("variant")
    name = described.get("name") if isinstance(described, dict) else None
    if not isinstance(name, str) or name not in _BY_NAME:
        contents.fault(f"the field variant = {described!r:.60}: a name of {', '.join(_BY_NAME)} is expected")
        return None
    numbers = {field: frozen(value) for field, value in described.items() if field != "name"}
    known = {field.name for field in dataclasses.fields(_BY_NAME[name])}
    if numbers.keys() != known:
        odd = ", ".join(sorted(numbers.keys() ^ known))
        contents.fault(f"the variant {name} with other numbers than it has: {odd}")
        return None
    try:
        variant = _BY_NAME[name](**numbers)
        variant.check(n_latents)
    except InvalidInputError as error:  # Numbers that no such variant has.
        contents.fault(f"the field variant: {str(error).splitlines()[0]}")
        return None
    return variant


def _expected_shapes(variant: Any, d_in: int, n_latents: int, d_out: int, *, has_skip: bool) -> dict[str, Any]:
    """The shapes of the variant's arrays, by name."""
    begin = jax.eval_shape(
        lambda: variant.init(jax.random.key(0), d_in=d_in, n_latents=n_latents, d_out=d_out, **_skip(has_skip))
    )
    return {name: value.shape for name, value in begin.items()}


def _skip(has_skip: bool) -> dict[str, bool]:
    return {"has_skip": True} if has_skip else {}


def _reference_shapes(sae: SAE) -> dict[str, tuple[int, ...]]:
    n = references.N_ROWS
    return {
        "x": (n, sae.d_in),
        "latents": (n, sae.n_latents),
        "latents_tolerance": (n, sae.n_latents),
        "reconstruction": (n, sae.d_out),
        "reconstruction_tolerance": (n, 1),
    }


def check_call(sae: Any, directory: Any, *, where: str) -> None:
    """Refuse what is no SAE, has sites that are none, or is to go where there is no path.

    Args:
        sae: What is to be written.
        directory: Where.
        where: The public call, for error messages.

    Raises:
        InvalidInputError: One of the two is of another kind.
    """
    if not isinstance(sae, SAE) or not isinstance(directory, str | os.PathLike):
        raise InvalidInputError(
            four_part(
                f"{type(sae).__name__} and {directory!r:.60} were given",
                where=where,
                expected="one SAE, and the path of a folder.",
                fix=f'of what train returns, give one: {where}(trained.saes[0], "my-sae").',
            )
        )
    for name, site in (("read", sae.read), ("write", sae.write)):
        if site is not None and not isinstance(site, Site):
            raise InvalidInputError(
                four_part(
                    f"An SAE with {name} = {site!r:.60} was given",
                    where=where,
                    expected="a Site, or None.",
                    fix=f'give it one: dataclasses.replace(sae, {name}=Site(5, "resid_post")).',
                )
            )


def _check(sae: SAE) -> None:
    """Refuse arrays that are not those of the variant, naming all of them."""
    shapes = {name: np.shape(value) for name, value in sae.params.items()}
    faults = [f"{name} {list(shape)} is not known" for name, shape in shapes.items()]
    if "W_dec" in shapes and len(shapes["W_dec"]) == 2 and len(shapes.get("W_enc", shapes["W_dec"])) == 2:
        has_skip = "W_skip" in shapes
        expected = _expected_shapes(sae.architecture, sae.d_in, sae.n_latents, sae.d_out, has_skip=has_skip)
        odd = {name: (shapes.get(name), expected.get(name)) for name in shapes.keys() | expected.keys()}
        faults = [f"{n}: {have} given, {want} expected" for n, (have, want) in sorted(odd.items()) if have != want]
        faults += [f"{name} is {value.dtype}" for name, value in sae.params.items() if value.dtype != jnp.float32]
        faults += [f"{name} is not finite" for name, v in sae.params.items() if not bool(jnp.isfinite(v).all())]
    if faults:
        raise InvalidInputError(
            four_part(
                "An SAE with arrays that are not its variant's",
                where="save_sae" + "".join(f"\n    {fault}" for fault in faults),
                expected=f"finite float32 arrays of one {sae.architecture.name} SAE.",
                fix="save SAEs that were trained together one by one; look at what made the values infinite.",
            )
        )


def _check_origin(document: dict[str, Any]) -> None:
    try:
        json.dumps(document, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            four_part(
                f"An origin that JSON cannot hold ({error})",
                where="save_sae",
                expected="pairs of a name and a string, finite number, boolean, None or tuple of these.",
                fix="leave it out, or give it as a string.",
            )
        ) from error


def _check_format(fields: dict[str, Any], where: str) -> None:
    if fields.get("format") != FORMAT:
        raise LoadError(
            four_part(
                f"A dictionary of format {fields.get('format')!r:.60}",
                where=where,
                expected=f"format {FORMAT}.",
                fix="read it with the version of interp-jax that wrote it.",
            )
        )


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
