"""Values of sites for many sequences: one compiled program, which ends with the last site asked for.

The program is a running pass under jit, so what comes after the last site is not in it, whether the layers are
unrolled or stacked: a site of layer 5 of 30 costs a fifth of the layers.

>>> import jax.numpy as jnp
>>> from interp_jax.models.language_model import LanguageModel
>>> from interp_jax.models.upstream import Upstream
>>> from interp_jax.transforms.sowing import sow
>>> lm = LanguageModel(Upstream("table", lambda table, tokens: sow(table[tokens], name="embed")), jnp.eye(3))
>>> activations_of(lm, np.array([[0, 2], [1, 1], [2, 0]]), "embed", batch_size=2)["embed"].argmax(-1).tolist()
[[0, 2], [1, 1], [2, 0]]

Sharp edges: axes after the position are flattened, so `z [batch, pos, head, d_head]` comes as `[.., head * d_head]`.
Values at padding mean nothing. Attention patterns have no position axis of their own, and are refused.

Source: interp_jax.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.core.errors import InvalidInputError, UnknownNameError, four_part
from interp_jax.core.sites import Selector, Site, select_sites
from interp_jax.models import passes
from interp_jax.transforms.compilations import counted_jit

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

# [batch, head, query, key]
_WITHOUT_POSITIONS = ("attn_scores", "pattern")


class NotFiniteError(InvalidInputError):
    """Activations with NaN or infinities in them."""


@dataclass(frozen=True)
class Keep:
    """Which positions of a sequence count. Padding never does.

    Args:
        first_position: The first column that counts. What stands first in a sequence has activations of many times
            the usual norm in most models, be it a BOS or not.
        special_tokens: Whether tokens that are there by rule (separator and BOS) count.
    """

    first_position: int = 1
    special_tokens: bool = False

    def mask(self, tokens: np.ndarray, special: tuple[int, ...] = ()) -> np.ndarray:
        """Where the positions that count are, bool `[seq, pos]`.

        Args:
            tokens: Token ids, `[seq, pos]`.
            special: The tokens that are there by rule.
        """
        mask = tokens >= 0
        mask[:, : self.first_position] = False
        return mask if self.special_tokens else mask & ~np.isin(tokens, special)


class SiteReader(NamedTuple):
    """A compiled function from tokens to the values of sites.

    Args:
        read: `(params, tokens, mask) -> (values, faults)`: by site name the values `[batch, pos, d]`, and how many
            numbers are not finite where the mask is true, `[batch]`. Pure: it can be part of a larger program.
        sites: The sites, in the order of the forward pass.
        widths: Site name to the size of its last axis, d.
        dtypes: Site name to the dtype of its values.
    """

    read: Callable[[Any, Any, Any], tuple[dict[str, jax.Array], dict[str, jax.Array]]]
    sites: tuple[Site, ...]
    widths: dict[str, int]
    dtypes: dict[str, np.dtype]


def site_reader(lm: LanguageModel, select: Selector, *, n_ctx: int, where: str = "site_reader") -> SiteReader:
    """The function that reads the selected sites of a model.

    Args:
        lm: The model.
        select: Which sites.
        n_ctx: Tokens per sequence.
        where: Name of the public call, for error messages.

    Returns:
        The function, with the sites it reads. Nothing is compiled yet.

    Raises:
        UnknownNameError: A part of the selector matches no site.
        InvalidInputError: A site does not hold real numbers for each position, or the sequences are too long.
    """
    rows = {row.site: row.value for row in lm.sites(np.zeros((2, n_ctx), np.int32)).rows}
    sites = tuple(select_sites(select, list(rows), where=where))
    if not sites:
        raise UnknownNameError(
            four_part("No site was selected", where=where, expected="at least one.", fix="name one: 5.resid_post.")
        )
    unfit = [f"{site} {_form(rows[site])}" for site in sites if not _is_per_position(site, rows[site], n_ctx)]
    if unfit:
        raise InvalidInputError(
            four_part(
                f"{', '.join(unfit)} cannot be read position by position",
                where=where,
                expected="sites of real numbers [batch, pos, ...].",
                fix="select other sites; for attention take q, k, v or z.",
            )
        )
    widths = {str(site): math.prod(rows[site].shape[2:]) for site in sites}
    dtypes = {str(site): np.dtype(rows[site].dtype) for site in sites}
    return SiteReader(_program(lm.forward, sites), sites, widths, dtypes)


def activation_batches(
    lm: LanguageModel, tokens: Any, select: Selector, *, batch_size: int = 32
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Tokens and activations side by side, some sequences at a time.

    Args:
        lm: The model.
        tokens: Token ids `[seq, pos]`, such as packed sequences.
        select: Which sites.
        batch_size: Sequences per pass; all passes run one compiled program.

    Returns:
        An iterator of tokens `[batch, pos]` and, by site name, values `[batch, pos, d]`; the last may be shorter.

    Raises:
        UnknownNameError: A part of the selector matches no site.
        InvalidInputError: As for `site_reader`, or the tokens are not this model's.
    """
    tokens = np.asarray(lm.check_tokens(tokens, where="activation_batches"))
    reader = site_reader(lm, select, n_ctx=tokens.shape[1], where="activation_batches")
    batch_size = min(batch_size, len(tokens))

    def batches() -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        for start in range(0, len(tokens), batch_size):
            rows = tokens[start : start + batch_size]
            values, _ = reader.read(
                lm.params, filled_up(rows, batch_size), np.ones((batch_size, tokens.shape[1]), bool)
            )
            yield rows, {name: np.asarray(values[name])[: len(rows)] for name in reader.widths}

    return batches()


def activations_of(lm: LanguageModel, tokens: Any, select: Selector, *, batch_size: int = 32) -> dict[str, np.ndarray]:
    """The activations of sequences, aligned with their tokens.

    Args:
        lm: The model.
        tokens: Token ids `[seq, pos]`, such as packed sequences.
        select: Which sites.
        batch_size: Sequences per pass; all passes run one compiled program.

    Returns:
        Site name to values `[seq, pos, d]`.

    Raises:
        UnknownNameError: A part of the selector matches no site.
        InvalidInputError: As for `site_reader`, or the tokens are not this model's.
    """
    batches = [values for _, values in activation_batches(lm, tokens, select, batch_size=batch_size)]
    return {name: np.concatenate([values[name] for values in batches]) for name in batches[0]}


def read_rows(
    lm: LanguageModel, reader: SiteReader, tokens: np.ndarray, mask: np.ndarray, numbers: np.ndarray, *, where: str
) -> dict[str, np.ndarray]:
    """Activations where a mask is true, once they are known to be finite.

    Args:
        lm: The model.
        reader: What reads its sites.
        tokens: Token ids, `[seq, pos]`.
        mask: Which of them count.
        numbers: The sequences' numbers in their text, for the error message.
        where: The public call.

    Returns:
        Site name to `[n, d]`.

    Raises:
        NotFiniteError: A value is not finite.
    """
    tokens = np.asarray(lm.check_tokens(tokens, where=where))
    values, faults = jax.device_get(reader.read(lm.params, tokens, mask))
    bad = {name: faults[name] for name in reader.widths if faults[name].any()}
    if bad:
        widths = reader.widths
        lines = [
            f"{name} has {int(counts.sum()):,} of {int(mask.sum()) * widths[name]:,} numbers that are not finite, in "
            f"sequence{'s' * int((counts > 0).sum() > 1)} {', '.join(map(str, numbers[counts > 0][:8].tolist()))}"
            for name, counts in bad.items()
        ]
        raise NotFiniteError(
            four_part(
                "; ".join(lines),
                where=where,
                expected="finite activations.",
                fix="look at these sequences (packed[number]); load the model in float32 if its dtype overflows.",
            )
        )
    return {name: values[name][mask] for name in reader.widths}


def nothing_counts(text: str, keep: Keep, *, where: str) -> InvalidInputError:
    """The error for a `text` of which `keep` leaves nothing; `where` names the public call."""
    return InvalidInputError(
        four_part(
            f"No token of {text} counts",
            where=where,
            expected=f"tokens that are not left out by {keep}.",
            fix="keep more: Keep(first_position=0, special_tokens=True).",
        )
    )


def as_bits(array: np.ndarray) -> np.ndarray:
    """The memory of an `array` as integers: NumPy moves rows of dtypes it does not know one number at a time."""
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def rows_at(array: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """A copy of the rows of an `array` with these `numbers`."""
    return as_bits(array).take(numbers, axis=0).view(array.dtype)


def filled_up(rows: np.ndarray, n: int) -> np.ndarray:
    """The rows and then copies of the last one, `n` in all: a short batch in the shape of a full one."""
    return rows[np.minimum(np.arange(n), len(rows) - 1)]


@functools.lru_cache(maxsize=32)
def _program(forward: Callable[..., Any], sites: tuple[Site, ...]) -> Callable[..., Any]:
    def read(params: Any, tokens: Any, mask: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        found = passes.read(forward, (params, tokens), sites, where="site_reader")
        values = {str(site): value.reshape(*tokens.shape, -1) for site, value in found.items()}
        faults = {name: (~jnp.isfinite(value) & mask[..., None]).sum((1, 2)) for name, value in values.items()}
        return values, faults

    return counted_jit(read, name="values of sites")


def _is_per_position(site: Site, value: Any, n_ctx: int) -> bool:
    is_array = hasattr(value, "shape") and jnp.issubdtype(value.dtype, jnp.floating)
    return is_array and value.ndim > 2 and value.shape[:2] == (2, n_ctx) and site.name not in _WITHOUT_POSITIONS


def _form(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if hasattr(value, "shape") else type(value).__name__
