"""Sparse coders in a forward pass: reconstructions in the place of activations, at one site or at several at once.

Each coder (an SAE, a pursuit over a dictionary, ...) reads its site in the pass as it is by then, other coders'
reconstructions before it included, and writes its site at all positions but those left untouched. With the error kept,
what the coder does not explain is added back, so that a pass changes by nothing but what is done to the latents:

    error dropped   y becomes decode(edit(f))
    error kept      y becomes y + decode(edit(f)) - decode(f)

    logits = spliced_logits(lm, sae, tokens)
    logits = spliced_logits(lm, [sae_3, sae_7], tokens, keep_error=True, edits={1: lambda f: f.at[..., 12].set(0.0)})

What runs of a pass with one site is what comes after it (`running_pass.rest`), as often as there are values to try.
Under `jit` tokens and coders may be traced.

>>> untouched(np.array([[-1, 7, 5, 7, 2]]), tokens=[7], n_first=1)
array([[ True,  True, False,  True, False]])

Sharp edges: a coder reads before it writes; one that reads a site which another coder writes reads what that one wrote.
Sites with heads are read and written as one vector, heads side by side. Padding is never touched.

Source: interp_jax; Marks et al. 2024 (2403.19647) for the kept error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from interp_jax.core.errors import InvalidInputError, ShapeError, UnknownNameError, four_part
from interp_jax.core.sites import Site, select_sites
from interp_jax.forward.sparse_coder import SparseCoder
from interp_jax.transforms.compilations import counted_jit

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

# From the number of a coder, what it reads and what is at the site it writes, to what is there instead.
Replacement = Callable[[int, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Splice:
    """Sparse coders and the sites of a model they read and write.

    Args:
        coders: The coders.
        reads: The site each of them reads.
        writes: The site each of them writes.
    """

    coders: tuple[SparseCoder, ...]
    reads: tuple[Site, ...]
    writes: tuple[Site, ...]

    @property
    def sites(self) -> list[Site]:
        """All sites at which a pass has to stop."""
        return list(dict.fromkeys((*self.reads, *self.writes)))


def checked_splice(
    lm: LanguageModel, coders: SparseCoder | Sequence[SparseCoder], tokens: Any, *, where: str
) -> Splice:
    """Coders with their sites, once it is known that these are in the model and fit.

    Args:
        lm: The model.
        coders: One coder or several.
        tokens: Tokens of the shape in question, `[batch, pos]`.
        where: The public call, for error messages.

    Returns:
        The splice.

    Raises:
        InvalidInputError: No coder, one without a site or that writes before it reads, or two that write one site.
        UnknownNameError: The model has no such site.
        ShapeError: A site has another width.
    """
    coders = tuple(coders) if isinstance(coders, Iterable) else (coders,)
    if wrong := [coder for coder in coders if not isinstance(coder, SparseCoder)]:
        allowed = "an SAE, or another sparse coder, or several."
        raise _refuse(f"{wrong[0]!r:.60} was given", where, allowed, "load or train one.")
    homeless = [coder for coder in coders if coder.read is None]
    if not coders or homeless:
        given = f"{homeless[0]} without a site" if coders else "No SAE"
        raise _refuse(
            f"{given} was given",
            where,
            "SAEs, or other sparse coders, that say where they read.",
            'use replace(sae, read=Site(5, "mlp_out")).',
        )
    rows = {row.site: row.value for row in lm.sites(np.zeros(np.shape(tokens), np.int32)).rows}
    reads, writes = [], []
    for coder in coders:
        read, write = (_one_site(site, list(rows), where) for site in (coder.read, coder.write or coder.read))
        _check_width(coder, "reads", read, rows[read], coder.d_in, tokens, where)
        _check_width(coder, "writes", write, rows[write], coder.d_out, tokens, where)
        if list(rows).index(read) > list(rows).index(write):
            raise _refuse(
                f"{coder}, which writes {write} before {read} is there to be read, was given",
                where,
                "a read site no later than the write site.",
                "choose sites in the order of the forward pass.",
            )
        reads.append(read)
        writes.append(write)
    if twice := sorted({str(site) for site in writes if writes.count(site) > 1}):
        raise _refuse(
            f"{len(coders)} SAEs were given, of which several write {', '.join(twice)}",
            where,
            "one SAE for each site that is written.",
            "evaluate them one after the other.",
        )
    return Splice(coders, tuple(reads), tuple(writes))


def _one_site(site: Any, sites: list[Site], where: str) -> Site:
    picked = select_sites(site, sites, where=where)
    if len(picked) != 1:
        raise UnknownNameError(
            four_part(
                f"{str(site)!r} is {len(picked)} sites ({picked[0]} to {picked[-1]})",
                where=where,
                expected='one site, such as Site(5, "mlp_out").',
                fix="name the layer.",
            )
        )
    return picked[0]


def _check_width(coder: SparseCoder, does: str, site: Site, value: Any, width: int, tokens: Any, where: str) -> None:
    shape = value.shape if hasattr(value, "shape") else ()
    if shape[:2] != np.shape(tokens) or int(np.prod(shape[2:])) != width or len(shape) < 3:
        raise ShapeError(
            four_part(
                f"{coder}, which {does} vectors of {width}, was given for {site} {list(shape)}",
                where=where,
                expected=f"a site [batch, pos, ...] with {width} numbers at each position.",
                fix="use the SAE with the model and the site it was trained on.",
            )
        )


def untouched(rows: Any, *, tokens: Iterable[int] = (), n_first: int = 0) -> Any:
    """Where nothing is replaced: at padding, at some tokens, and at the first ones of each row.

    Args:
        rows: Token ids, `[batch, pos]`.
        tokens: Ids of tokens such as BOS.
        n_first: How many tokens at the start of each row, padding not counted.

    Returns:
        bool `[batch, pos]`, of NumPy unless the rows are traced.

    Raises:
        InvalidInputError: Not token ids, or not a number of tokens.
    """
    ids = np.asarray(list(tokens) if isinstance(tokens, Iterable) else [tokens])
    is_count = isinstance(n_first, int | np.integer) and not isinstance(n_first, bool) and n_first >= 0
    if (ids.size and ids.dtype.kind not in "iu") or not is_count:
        raise _refuse(
            f"untouched_tokens={tokens!r:.60} and n_untouched={n_first!r} were given",
            "what is left untouched",
            "token ids, and a whole number from 0.",
            "give untouched_tokens=(lm.tokenizer.bos_id,), n_untouched=1, say.",
        )
    lib = jnp if isinstance(rows, Tracer) else np
    number = lib.cumsum(rows >= 0, axis=1)
    return (rows < 0) | (number <= n_first) | lib.isin(rows, ids.astype(np.int64))


def spliced_passes(
    lm: LanguageModel, splice: Splice, tokens: Any, replacements: Sequence[Replacement]
) -> Iterator[jax.Array]:
    """The logits of one pass for each of some ways to replace what the coders write.

    Args:
        lm: The model.
        splice: The coders and their sites.
        tokens: Token ids, `[batch, pos]`.
        replacements: The ways.

    Returns:
        Logits, `[batch, pos, d_vocab]`, one after the other.
    """
    if len(splice.coders) > 1:
        yield from (looped_pass(lm, splice, tokens, replace) for replace in replacements)
        return
    read = None
    with lm.run(tokens, sites=splice.sites) as running_pass:
        for layer, name, value in running_pass:
            read = _flat(value) if Site(layer, name) == splice.reads[0] else read
            if Site(layer, name) == splice.writes[0]:
                for replace in replacements:
                    yield running_pass.rest(_replaced(replace, 0, read, value))
                return


def looped_pass(lm: LanguageModel, splice: Splice, tokens: Any, replace: Replacement) -> jax.Array:
    """The logits of a pass in which what every coder writes is replaced.

    Args:
        lm: The model.
        splice: The coders and their sites.
        tokens: Token ids, `[batch, pos]`.
        replace: What is there instead.

    Returns:
        Logits, `[batch, pos, d_vocab]`.
    """
    seen: dict[Site, Any] = {}
    for layer, name, value in (running_pass := lm.run(tokens, sites=splice.sites)):
        site = Site(layer, name)
        if site in splice.writes:
            number = splice.writes.index(site)
            read = _flat(value) if splice.reads[number] == site else seen[splice.reads[number]]
            running_pass.modified_value = _replaced(replace, number, read, value)
        if site in splice.reads:
            seen[site] = _flat(running_pass.modified_value)
    return running_pass.retval


def _replaced(replace: Replacement, number: int, read: Any, value: Any) -> jax.Array:
    return replace(number, read, _flat(value)).reshape(value.shape)


def _flat(value: Any) -> Any:
    """Heads side by side: `[batch, pos, d]`."""
    return value if value.ndim == 3 else value.reshape(*value.shape[:2], -1)


def _edited(edit: Callable[[jax.Array], jax.Array], latents: jax.Array) -> jax.Array:
    edited = edit(latents)
    if np.shape(edited) != latents.shape:
        raise ShapeError(
            four_part(
                f"An edit gave {list(np.shape(edited))}",
                where="spliced_logits",
                expected=f"all latents of all positions, {list(latents.shape)}.",
                fix="return the latents with a part changed, such as f.at[:, -1].set(0.0).",
            )
        )
    return edited


def _blend(value: Any, new: Any, explained: Any, is_touched: Any) -> jax.Array:
    """`new` where it is touched, with what `explained` (None: all) leaves of `value` added to it."""
    if explained is not None:
        new = value.astype(jnp.float32) + (new - explained)
    new = jnp.broadcast_to(new, value.shape).astype(value.dtype)
    return jnp.where(is_touched[..., None], new, value)


blend = counted_jit(_blend, name="splicing.blend")


def spliced_logits(
    lm: LanguageModel,
    coders: SparseCoder | Sequence[SparseCoder],
    tokens: Any,
    *,
    keep_error: bool = False,
    edits: Mapping[int, Callable[[jax.Array], jax.Array]] | None = None,
    untouched_tokens: Iterable[int] = (),
    n_untouched: int = 0,
) -> jax.Array:
    """The logits when sites hold what sparse coders make of them.

    Args:
        lm: The model.
        coders: One SAE (or other sparse coder) or several, each with its site.
        tokens: Token ids, `[batch, pos]`.
        keep_error: Whether what a coder does not explain is added back.
        edits: Number of a coder among `coders` (0 if there is one) to a function of its latents `[batch, pos, latent]`.
        untouched_tokens: Ids of tokens, such as BOS, at whose positions nothing is replaced.
        n_untouched: At how many tokens at the start of each row nothing is replaced.

    Returns:
        Logits, `[batch, pos, d_vocab]`.

    Raises:
        InvalidInputError: A coder without a site, or two that write one site, or an edit of one that is not there.
        UnknownNameError: The model has no such site.
        ShapeError: A site has another width.
    """
    rows = lm.check_tokens(tokens, where="spliced_logits")
    rows = rows if isinstance(rows, Tracer) else np.asarray(rows)
    splice = checked_splice(lm, coders, rows, where="spliced_logits")
    edits = dict(edits or {})
    if strange := [number for number in edits if number not in range(len(splice.coders))]:
        raise _refuse(
            f"An edit of SAE number {strange[0]!r} was given",
            "spliced_logits",
            f"numbers from 0 to {len(splice.coders) - 1}.",
            "number the edits by the SAEs' places in the sequence.",
        )
    is_touched = ~untouched(rows, tokens=untouched_tokens, n_first=n_untouched)

    def replace(number: int, x: jax.Array, y: jax.Array) -> jax.Array:
        coder = splice.coders[number]
        if number not in edits:
            explained = new = coder.reconstruct(x)
        else:
            latents = coder.encode(x)
            explained, new = coder.decode(latents, x), coder.decode(_edited(edits[number], latents), x)
        return blend(y, new, explained if keep_error else None, is_touched)

    return next(spliced_passes(lm, splice, rows, [replace]))


def _refuse(what: str, where: str, expected: str, fix: str) -> InvalidInputError:
    return InvalidInputError(four_part(what, where=where, expected=expected, fix=fix))
