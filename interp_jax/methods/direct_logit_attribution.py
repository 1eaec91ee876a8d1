"""Direct logit attribution: what each write to the residual stream adds to a logit, as it stands at the end.

The last residual is a sum: embeddings, what each attention and each MLP wrote. The final norm, with its scale held at
the value it has in this pass, and the unembedding are linear, so the logit is a sum over the same parts:

    contribution_i = (gain * (c_i - mean(c_i)) / scale) . u          (RMSNorm: without the mean)
    sum_i contribution_i + remainder = logit                         (remainder: the norm's bias . u + b_U)

    result = direct_logit_attribution(lm, tokens, mary, john)        # u = W_U[:, mary] - W_U[:, john]
    result.heads                                                     # [layer, head, batch]

Two writes, 3 and -1 along a direction that reads them twice as large:

>>> result = DirectLogitAttributionResult(contributions=np.array([[6.0], [-2.0]]), remainder=np.array([0.5]),
...     total=np.array([4.5]), mask=np.array([True]), sites=(Site(0, "attn_out"), Site(0, "mlp_out")))
>>> result.sum_error.tolist(), [(str(site), value) for site, value in result.strongest(1)]
([0.0], [('0.attn_out', 6.0)])

Sharp edges: direct effects only: a write that later layers read and answer counts for nothing of what they answer. The
scale is that of the whole stream, so contributions compare within one position of one prompt. Gain, bias and scale are
read off the model's own norm, whatever form its parameters have, and the sum is checked on each call.

Source: Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021; the name is TransformerLens's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.core.errors import InvalidInputError, UnknownNameError, UnsupportedModelError, four_part
from interp_jax.core.sites import Site, select_sites
from interp_jax.forward.readout import Readout, at_least_float32, logit_readout, norm_readout, probe_readout, tolerance
from interp_jax.transforms.compilations import counted_jit

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

WRITES = ("embed", "pos_embed", "attn_out", "mlp_out")
_WHERE = "direct_logit_attribution"


@dataclass(frozen=True)
class DirectLogitAttributionResult:
    """The parts a logit is the sum of. With all positions, each array has a last axis `pos` more.

    Args:
        contributions: What each write adds, `[site, batch]`.
        remainder: What no write adds: the norm's bias and the unembedding's, `[batch]`.
        total: The model's own logit, or difference of logits, `[batch]`.
        mask: False at padding, where the numbers are 0, `[batch]`.
        sites: The writes, in execution order.
        heads: What each head adds through W_O, `[layer, head, batch]`; None if heads were not asked for.
        attn_biases: What each layer's b_O adds, `[layer, batch]`; None if heads were not asked for.
        layers: The layers of `heads` and `attn_biases`.
        at: The site the direction reads: the last residual through the final norm, unless said otherwise.
    """

    contributions: np.ndarray
    remainder: np.ndarray
    total: np.ndarray
    mask: np.ndarray
    sites: tuple[Site, ...]
    heads: np.ndarray | None = None
    attn_biases: np.ndarray | None = None
    layers: tuple[int, ...] = ()
    at: Site | None = None

    @property
    def sum_error(self) -> np.ndarray:
        """What the sum identity is off by, rounding alone: total - (sum of contributions + remainder), `[batch]`."""
        return np.where(self.mask, self.total - (self.contributions.sum(0) + self.remainder), 0.0)

    def table(self, name: str) -> np.ndarray:
        """The contributions of the sites of one name, `[layer, batch]`, in order of layers.

        Args:
            name: Name of the sites, such as "mlp_out".

        Returns:
            The contributions.

        Raises:
            UnknownNameError: There is no such site in the result.
        """
        picked = select_sites(name, self.sites, where="DirectLogitAttributionResult.table")
        return self.contributions[[self.sites.index(site) for site in picked]]

    def strongest(self, n: int, *, row: int = 0) -> list[tuple[Site, float]]:
        """The writes with the largest contributions, whatever their sign, largest first.

        Args:
            n: How many.
            row: Which row of the batch; with all positions, its last position is looked at.

        Returns:
            Pairs of site and contribution.
        """
        values = self.contributions[:, row].reshape(len(self.sites), -1)[:, -1]
        order = np.argsort(-np.abs(values), kind="stable")[:n]
        return [(self.sites[index], float(values[index])) for index in order]

    def strongest_heads(self, n: int, *, row: int = 0) -> list[tuple[int, int, float]]:
        """The heads with the largest contributions, whatever their sign, largest first.

        Args:
            n: How many.
            row: Which row of the batch; with all positions, its last position is looked at.

        Returns:
            Triples of layer, head and contribution.

        Raises:
            UnknownNameError: The result has no heads.
        """
        if self.heads is None:
            raise UnknownNameError(
                four_part(
                    "Heads were asked for",
                    where="a result without heads",
                    expected="a result that was made with heads=True.",
                    fix="call direct_logit_attribution(..., heads=True).",
                )
            )
        values = self.heads[:, :, row].reshape(*self.heads.shape[:2], -1)[..., -1]
        order = np.argsort(-np.abs(values), axis=None, kind="stable")[:n]
        places = zip(*np.unravel_index(order, values.shape), strict=True)
        return [(self.layers[i], int(head), float(values[i, head])) for i, head in places]

    def __repr__(self) -> str:
        strongest = ", ".join(f"{site} {value:+.2f}" for site, value in self.strongest(3))
        heads = "" if self.heads is None else f", {self.heads.shape[0]} x {self.heads.shape[1]} heads"
        return (
            f"DirectLogitAttributionResult({len(self.sites)} writes{heads}, batch {len(self.total)}; strongest: "
            f"{strongest}; sum off by {np.abs(self.sum_error).max():.1e})"
        )


def direct_logit_attribution(
    lm: LanguageModel,
    tokens: Any,
    answer: Any = None,
    wrong: Any = None,
    *,
    direction: Any = None,
    at: Site | str | None = None,
    position: int | None = -1,
    heads: bool = True,
) -> DirectLogitAttributionResult:
    """Split a logit, a difference of logits, or the value of a probe, into what each write adds to it.

    contribution_i = (gain * (c_i - mean(c_i)) / scale) . u

    Args:
        lm: The model.
        tokens: Token ids, `[batch, pos]`, padding is -1.
        answer: Id of the token whose logit is split; one for all rows, or one per row.
        wrong: Id of a token whose logit is taken off; or "mean", the mean logit of all tokens. None: nothing is.
        direction: Instead of `answer`: the u to read with, float `[d_model]` or `[batch, d_model]`.
        at: With `direction`: a site of the residual stream that is read as it is, without a norm, as a linear probe
            does. By default the last residual, through the final norm.
        position: Which position; None for all.
        heads: Whether to split each attn_out into its heads, too.

    Returns:
        The contributions.

    Raises:
        InvalidInputError: Not exactly one of `answer` and `direction`, an id outside the vocabulary, or a position that
            is not there or is padding.
        ShapeError: Ids or a direction of the wrong shape.
        UnknownNameError: `at` is no site of the model, or `wrong` is an unknown word.
        UnsupportedModelError: The writes do not add up to the residual, the final norm is no LayerNorm or RMSNorm, the
            logits are not linear after it, or the model does not say what these, or W_O, are.

    Source: Elhage et al. 2021. The scale is that of the actual pass; nothing is folded, centred or recomputed.
    """
    tokens = lm.check_tokens(tokens, where=_WHERE)
    columns, mask = _positions(np.asarray(tokens), position)
    sites = lm.sites(tokens).sites
    target = _target_site(lm, sites, at, is_probe=direction is not None)
    _check_choice(lm, answer, wrong, direction, at, heads)
    before = sites[: sites.index(target)]
    writes = [site for site in before if site.name in WRITES]
    in_heads = [site for site in before if heads and site.name == "z"]
    if not writes:
        raise _without_writes(target, before)

    values: dict[Site, Any] = {}
    for layer, name, value in (running_pass := lm.run(tokens, sites=[*writes, *in_heads, target])):
        site = Site(layer, name)
        # Only the positions asked for are kept.
        values[site] = (value if value.ndim > 2 else value[None])[:, columns]
        if site == target and at is not None:
            break
    logits = None if at is not None else running_pass.retval[:, columns]

    residual = values.pop(target)
    if at is not None:
        readout = probe_readout(residual, direction, where=_WHERE)
    elif direction is not None:
        readout = norm_readout(lm, residual, direction, mask, where=_WHERE)
    else:
        readout = logit_readout(lm, residual, logits, answer, wrong, mask, where=_WHERE)
    product = _Products(jnp.asarray(readout.direction, at_least_float32(residual.dtype)), readout.scale)
    contributions = np.stack([product(values[site]) for site in writes])
    split = _split_heads(lm, product, values, in_heads) if heads else {}
    result = _result(contributions, split, readout, mask, tuple(writes), target, position is None)
    _check_sum(lm, result, np.where(mask, readout.size, 0.0).max(), residual.dtype)
    return result


def _positions(tokens: np.ndarray, position: int | None) -> tuple[Any, np.ndarray]:
    """The columns to read, and where there are tokens among them, `[batch, column]`."""
    n_pos = tokens.shape[1]
    if position is None:
        return slice(None), tokens >= 0
    if isinstance(position, bool) or not -n_pos <= position < n_pos:
        raise InvalidInputError(
            four_part(
                f"position={position!r} was given",
                where=_WHERE,
                expected=f"a position from {-n_pos} to {n_pos - 1}, or None for all.",
                fix="use -1 for the last token of every row.",
            )
        )
    column = position % n_pos
    padded = np.flatnonzero(tokens[:, column] < 0)
    if padded.size:
        raise InvalidInputError(
            four_part(
                f"position={position} was given, which is padding in row {padded[0]}",
                where=_WHERE,
                expected="a position at which every row has a token.",
                fix="pad on the left, as lm.tokenize does, and read position -1; or take all positions with None.",
            )
        )
    return slice(column, column + 1), tokens[:, column : column + 1] >= 0


def _target_site(lm: LanguageModel, sites: Sequence[Site], at: Site | str | None, *, is_probe: bool) -> Site:
    if at is not None:
        picked = select_sites(at, sites, where=_WHERE)
        if len(picked) > 1 or not picked[0].name.startswith("resid_") or not is_probe:
            raise InvalidInputError(
                four_part(
                    f"at={str(at)!r} was given" + ("" if is_probe else " without a direction"),
                    where=_WHERE,
                    expected='one site of the residual stream, such as "5.resid_post", with a direction to read it by.',
                    fix="name the layer and give direction=..., or leave `at` out to read the model's logits.",
                )
            )
        return picked[0]
    residuals = [site for site in sites if site.name == "resid_post"]
    if not residuals:
        raise UnsupportedModelError(
            four_part(
                "A model without a site resid_post was given",
                where=_WHERE,
                expected="the residual stream after the last layer under that name.",
                fix=f'tag it: sow(x, name="resid_post"). Its sites: {", ".join(sorted({s.name for s in sites}))}.',
            )
        )
    return residuals[-1]


def _without_writes(target: Site, before: Sequence[Site]) -> UnsupportedModelError:
    return UnsupportedModelError(
        four_part(
            f"A model without a write before {target} was given",
            where=_WHERE,
            expected=f"sites of these names: {', '.join(WRITES)}.",
            fix=f"tag what is added to the stream. Sites before it: {', '.join(map(str, before)) or 'none'}.",
        )
    )


def _check_choice(lm: LanguageModel, answer: Any, wrong: Any, direction: Any, at: Any, heads: bool) -> None:
    if (answer is None) == (direction is None) or (wrong is not None and answer is None):
        given = {"answer": answer, "wrong": wrong, "direction": direction}
        names = " and ".join(name for name, value in given.items() if value is not None) or "neither"
        raise InvalidInputError(
            four_part(
                f"{names} was given",
                where=_WHERE,
                expected="answer (and perhaps wrong), token ids; or direction, a vector.",
                fix="for a difference of logits give two ids; for a probe give direction=probe alone.",
            )
        )
    missing = [part for part in ("ln_final", "unembed") if at is None and getattr(lm.upstream, part) is None]
    missing += ["W_O"] if heads and "W_O" not in lm.upstream.weight_names else []
    if missing:
        raise UnsupportedModelError(
            four_part(
                f"A model without {' and '.join(missing)} was given",
                where=_WHERE,
                expected="a LanguageModel that has them.",
                fix="give them to its Upstream; heads=False needs no W_O, and a site to read (`at`) no final norm.",
            )
        )


def _read_values(values: jax.Array, direction: jax.Array) -> jax.Array:
    """values . direction, `[batch or 1, pos, ...] -> [batch, pos, ...]`, at least float32."""
    values = values.astype(direction.dtype)
    values = jnp.broadcast_to(values, (direction.shape[0], *values.shape[1:]))
    formula = "bpm,bm->bp" if values.ndim == 3 else "bphd,bhd->bph"
    return jnp.einsum(formula, values, direction, precision=jax.lax.Precision.HIGHEST)


def _read_through_heads(w_o: jax.Array, direction: jax.Array) -> jax.Array:
    w_o = w_o.astype(direction.dtype)
    return jnp.einsum("hdm,bm->bhd", w_o, direction, precision=jax.lax.Precision.HIGHEST)


_compiled_values = counted_jit(_read_values, name=f"{_WHERE}.values")
_compiled_heads = counted_jit(_read_through_heads, name=f"{_WHERE}.heads")


class _Products(NamedTuple):
    """From a part of the residual to what it adds, `[batch, pos]`."""

    direction: jax.Array
    scale: np.ndarray

    def __call__(self, values: Any) -> np.ndarray:
        return np.asarray(_compiled_values(values, self.direction), np.float64) / self.scale

    def of_heads(self, z: Any, w_o: Any) -> np.ndarray:
        """What each head adds, `[head, batch, pos]`."""
        products = np.asarray(_compiled_values(z, _compiled_heads(w_o, self.direction)), np.float64)
        return np.moveaxis(products / self.scale[..., None], -1, 0)


def _split_heads(lm: LanguageModel, product: _Products, values: dict[Site, Any], sites: list[Site]) -> dict[str, Any]:
    heads, biases = [], []
    for site in sites:
        heads.append(product.of_heads(values[site], lm.weight("W_O", site.layer)))
        has_bias = "b_O" in lm.upstream.weight_names
        bias = lm.weight("b_O", site.layer) if has_bias else jnp.zeros_like(product.direction[0])
        biases.append(product(bias[None, None]))
    if not heads:
        return {}
    return {
        "heads": np.stack(heads),
        "attn_biases": np.stack(biases),
        "layers": tuple(site.layer for site in sites if site.layer is not None),
    }


def _result(
    contributions: np.ndarray,
    split: dict[str, Any],
    readout: Readout,
    mask: np.ndarray,
    writes: tuple[Site, ...],
    target: Site,
    has_positions: bool,
) -> DirectLogitAttributionResult:
    def shaped(values: np.ndarray) -> np.ndarray:
        values = np.where(mask, values, 0.0)
        return values if has_positions else values[..., 0]

    return DirectLogitAttributionResult(
        contributions=shaped(contributions),
        remainder=shaped(np.broadcast_to(readout.remainder[:, None], mask.shape)),
        total=shaped(readout.total),
        mask=mask if has_positions else mask[:, 0],
        sites=writes,
        heads=shaped(split["heads"]) if split else None,
        attn_biases=shaped(split["attn_biases"]) if split else None,
        layers=split.get("layers", ()),
        at=target,
    )


def _check_sum(lm: LanguageModel, result: DirectLogitAttributionResult, size: float, dtype: Any) -> None:
    """That the writes add up to what is read, and the heads to their attn_out."""
    sizes = np.abs(result.contributions).sum(0) + np.abs(result.remainder)
    allowed = tolerance(dtype) * (sizes.max() + size)
    if np.abs(result.sum_error).max() > allowed:
        raise UnsupportedModelError(
            four_part(
                f"Writes that do not add up to {result.at} were given (off by {np.abs(result.sum_error).max():.1e})",
                where=f"{_WHERE}({lm.name or lm.upstream.name})",
                expected=f"the residual as the sum of {', '.join(dict.fromkeys(site.name for site in result.sites))}.",
                fix="tag whatever else is added to the residual stream; lm.check() says which identity fails.",
            )
        )
    if result.heads is None or result.attn_biases is None:
        return
    attn_out = [result.contributions[result.sites.index(Site(layer, "attn_out"))] for layer in result.layers]
    error = np.abs(result.heads.sum(1) + result.attn_biases - np.stack(attn_out)).max()
    if error > tolerance(dtype) * max(np.abs(result.heads).sum(1).max(), sizes.max()):
        raise UnsupportedModelError(
            four_part(
                f"Heads that do not add up to their attn_out were given (off by {error:.1e})",
                where=f"{_WHERE}({lm.name or lm.upstream.name})",
                expected="attn_out = sum over heads of z W_O, and b_O; a norm in between is none.",
                fix="use heads=False, which needs attn_out alone.",
            )
        )
