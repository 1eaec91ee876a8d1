"""Logit lens: what a model would answer if it stopped at each layer.

The residual stream after a layer has the same shape as the one the model's final norm and unembedding read, so
those two can decode it at any depth. Each place looked at is a view. Per view and position this module keeps a few
statistics of the decoded distribution (top tokens, rank of a target, divergences, entropy) and never holds the
logits of more than one view.

    result = logit_lens(lm, tokens)
    result.top_ids[:, 0, -1, 0]     # best next token after each layer, at the last position

The arithmetic on one pair of distributions, over a vocabulary of two:

>>> import numpy as np
>>> half, nine_tenths = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
>>> [round(float(x), 4) for x in (divergence(half, nine_tenths), divergence(nine_tenths, half))]
[0.5108, 0.3681]

Sharp edges: position t of a view is about the token at t + 1. A view of a single write ("5.mlp_out") renormalises
a part of the stream's sum: it is what that write alone would say. Statistics at padded positions mean nothing; use
`mask`. The last `resid_post` is decoded by the model's own code, so that view is the model's output to the bit.

Source: nostalgebraist, "interpreting GPT: the logit lens", 2020.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.core.errors import InvalidInputError, ShapeError, UnknownNameError, UnsupportedModelError, four_part
from interp_jax.core.interventions import describe
from interp_jax.core.sites import Selector, Site
from interp_jax.forward.metrics import divergence
from interp_jax.transforms.compilations import counted_jit

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

DEFAULT_VIEWS: Selector = ("0.resid_pre", "*.resid_post")
NORMS = ("final", "unit", "none")
TARGETS = ("final", "next", "input")
TIES = ("min", "max")


@dataclass(frozen=True)
class LogitLensResult:
    """What each view says at each position. Arrays are `[view, batch, pos]` unless said otherwise.

    Args:
        tokens: Token ids, `[batch, pos]`.
        mask: False at padding, and where the target is undefined for `target="next"`, `[batch, pos]`.
        target: Ids of the token that is ranked, `[batch, pos]`; by default the model's own top-1.
        top_ids: Ids of the k most probable tokens, best first, `[view, batch, pos, k]`.
        top_probabilities: Their probabilities, same shape.
        target_probability: Probability of the target.
        rank: Rank of the target's logit, 1 is best.
        agrees: Whether the view's top-1 is the model's.
        kl: KL(model's output || view), in nats.
        kl_reverse: KL(view || model's output), in nats.
        entropy: Entropy of the view's distribution, in nats.
        views: The sites that were decoded, in execution order.
        norm: What was done before the unembedding: "final", "unit" or "none".
        target_name: What `target` holds: "final", "next", "input" or "given".
    """

    tokens: Any
    mask: Any
    target: Any
    top_ids: Any
    top_probabilities: Any
    target_probability: Any
    rank: Any
    agrees: Any
    kl: Any
    kl_reverse: Any
    entropy: Any
    views: tuple[Site, ...]
    norm: str
    target_name: str

    @property
    def top1(self) -> Any:
        """Id of the most probable token, `[view, batch, pos]`."""
        return self.top_ids[..., 0]

    @property
    def top1_probability(self) -> Any:
        """Probability of the most probable token, `[view, batch, pos]`."""
        return self.top_probabilities[..., 0]

    def __repr__(self) -> str:
        n_views, batch, pos, k = self.top_ids.shape
        views = f"{self.views[0]} ... {self.views[-1]}" if n_views > 1 else str(self.views[0])
        return (
            f"LogitLensResult({n_views} views ({views}), batch {batch}, {pos} positions, top {k}, "
            f"norm={self.norm!r}, rank of the {self.target_name} token)"
        )


_META = ["views", "norm", "target_name"]
jax.tree_util.register_dataclass(
    LogitLensResult,
    data_fields=[field.name for field in fields(LogitLensResult) if field.name not in _META],
    meta_fields=_META,
)


class _Decoder(NamedTuple):
    """What turns a residual stream into logits, apart from the parameters; hashable."""

    norm: str
    unembed: Any
    ln_final: Any = None
    kind: str = ""
    eps: float = 0.0


def rank_of(logits: jax.Array, target: jax.Array, *, ties: str = "min") -> jax.Array:
    """Rank of a token among the logits, 1 is best.

    rank = 1 + #{v : logit_v > logit_target}        (ties="min"; with "max": #{v : logit_v >= logit_target})

    Args:
        logits: `[..., d_vocab]`.
        target: Token ids, `[...]`.
        ties: Whether tokens with the same logit as the target rank behind it ("min") or before it ("max").

    Returns:
        Integers, `[...]`.
    """
    level = jnp.take_along_axis(logits, target[..., None], axis=-1)
    if ties == "min":
        return 1 + (logits > level).sum(-1)
    return (logits >= level).sum(-1)


def logit_lens(
    lm: LanguageModel,
    tokens: Any,
    *,
    views: Selector = DEFAULT_VIEWS,
    norm: str = "final",
    target: Any = "final",
    top_k: int = 5,
    ties: str = "min",
) -> LogitLensResult:
    """Decode the residual stream at each view with the model's own final norm and unembedding.

    logits_view = Unembed(FinalNorm(residual_view))

    Args:
        lm: The model.
        tokens: Token ids, `[batch, pos]`, padding is -1.
        views: Selector of the sites to decode; each must have the shape of the residual stream. By default the
            input of the first layer and the output of every layer.
        norm: "final" is the model's final norm; "unit" normalises without its learned gain and bias; "none"
            unembeds the value as it is.
        target: The token whose rank and probability are kept: "final" (the model's own top-1), "next" (the token
            that follows in the text), "input" (the token at this position), or ids of shape `[batch, pos]`.
        top_k: How many of the most probable tokens to keep, 1 to d_vocab.
        ties: "min" or "max", see `rank_of`.

    Returns:
        The statistics of every view.

    Raises:
        UnknownNameError: No site fits `views`, or `norm`, `target` or `ties` is not one of its values.
        ShapeError: A view is not a site of the residual stream, or `target` does not fit the tokens.
        UnsupportedModelError: The model does not say what its final norm or its unembedding is.
        InvalidInputError: `top_k` is out of range, or target ids are not of the vocabulary.

    Source: nostalgebraist 2020. His code ranks ties last (`ties="max"`) and clips the probabilities that enter the
    divergence; here nothing is clipped. The post reads the stream before the norm's gain: `norm="unit"`.
    """
    _check_choice("norm", norm, NORMS)
    _check_choice("ties", ties, TIES)
    decoder = _decoder(lm, norm)
    tokens = lm.check_tokens(tokens, where="logit_lens")
    residuals: dict[Site, Any] = {}
    for layer, name, value in (running_pass := lm.run(tokens, sites=views)):
        residuals[Site(layer, name)] = value
    logits = running_pass.retval
    _check_views(residuals, logits.shape, d_model=lm.config and lm.config.d_model)
    if not 1 <= top_k <= logits.shape[-1]:
        raise InvalidInputError(
            four_part(
                f"top_k={top_k} was given",
                where="logit_lens",
                expected=f"1 to {logits.shape[-1]}, the size of the vocabulary.",
                fix="choose a number in that range.",
            )
        )
    tokens = np.asarray(tokens)
    ids, is_defined, target_name = _target(target, tokens, logits.shape[-1])
    statistics = _statistics(decoder, lm.params, tuple(residuals.values()), logits, ids, top_k=top_k, ties=ties)
    return LogitLensResult(
        tokens=tokens,
        mask=(tokens >= 0) & is_defined,
        views=tuple(residuals),
        norm=norm,
        target_name=target_name,
        **statistics,
    )


def _check_choice(name: str, given: Any, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise UnknownNameError(
            four_part(
                f"{name}={given!r} was given",
                where="logit_lens",
                names=allowed,
                given=str(given),
                fix="use one of these values.",
            )
        )


def _decoder(lm: LanguageModel, norm: str) -> _Decoder:
    parts = {"final": ("ln_final", "unembed"), "unit": ("config", "unembed"), "none": ("unembed",)}[norm]
    missing = [part for part in parts if getattr(lm if part == "config" else lm.upstream, part) is None]
    if missing:
        raise UnsupportedModelError(
            four_part(
                f"A model without {' and '.join(missing)} was given",
                where=f"logit_lens(norm={norm!r})",
                expected=f"a LanguageModel that has {' and '.join(parts)}.",
                fix="give them when making the LanguageModel (config to it, the functions to its Upstream).",
            )
        )
    shape = {} if lm.config is None else {"kind": lm.config.norm, "eps": lm.config.norm_eps}
    return _Decoder(norm, lm.upstream.unembed, lm.upstream.ln_final, **shape)


def _check_views(residuals: Mapping[Site, Any], logits_shape: tuple[int, ...], *, d_model: int | None) -> None:
    """That there are views, and every one is an array of the residual stream's shape, `[batch, pos, d_model]`."""
    if not residuals:
        raise InvalidInputError(
            four_part(
                "No view was given",
                where="logit_lens",
                expected="at least one site to decode.",
                fix='leave `views` out for the default, or write for example views="resid_post".',
            )
        )
    batch, pos = logits_shape[:2]
    width = "d_model" if d_model is None else d_model
    misfits = [
        site
        for site, value in residuals.items()
        if value.ndim != 3 or value.shape[:2] != (batch, pos) or d_model not in (None, value.shape[2])
    ]
    if misfits:
        shown = ", ".join(f"{site} is {describe(residuals[site])}" for site in misfits[:4])
        raise ShapeError(
            four_part(
                f"Views that cannot be decoded were given: {shown}" + (", ..." if len(misfits) > 4 else ""),
                where="logit_lens",
                expected=f"sites of the residual stream, [{batch}, {pos}, {width}]: resid_pre, resid_mid, resid_post, "
                "or a write to it, attn_out, mlp_out.",
                fix="leave the others out of `views`.",
            )
        )


def _target(target: Any, tokens: np.ndarray, d_vocab: int) -> tuple[np.ndarray | None, np.ndarray, str]:
    """The ids to rank (None for the model's own top-1), where they are defined, and what to call them."""
    everywhere = np.ones(tokens.shape, bool)
    if isinstance(target, str):
        _check_choice("target", target, TARGETS)
        if target == "final":
            return None, everywhere, target
        if target == "input":
            return np.maximum(tokens, 0), everywhere, target
        # The last position has no next token; neither has one that padding follows.
        following = np.concatenate([tokens[:, 1:], np.full_like(tokens[:, :1], -1)], axis=1)
        return np.maximum(following, 0), following >= 0, target
    ids = np.asarray(target)
    if ids.shape != tokens.shape or not np.issubdtype(ids.dtype, np.integer):
        raise ShapeError(
            four_part(
                f"A target of {ids.dtype}{list(ids.shape)} was given",
                where="logit_lens",
                expected=f"one token id per position, integers {list(tokens.shape)}, or one of {', '.join(TARGETS)}.",
                fix="broadcast the ids to the shape of the tokens.",
            )
        )
    out_of_range = ids[(ids < 0) | (ids >= d_vocab)]
    if out_of_range.size:
        raise InvalidInputError(
            four_part(
                f"Target ids {sorted(set(out_of_range.tolist()))[:5]} were given",
                where="logit_lens",
                expected=f"ids from 0 to {d_vocab - 1}.",
                fix="take the ids from lm.tokenize.",
            )
        )
    return ids.astype(tokens.dtype), everywhere, "given"


def _decode(decoder: _Decoder, params: Any, residual: Any) -> jax.Array:
    """Logits of a residual stream; with norm="final", by the model's own code alone."""
    if decoder.norm == "final":
        residual = decoder.ln_final(params, residual)
    elif decoder.norm == "unit":
        wide = residual.astype(jnp.float32)
        if decoder.kind == "layernorm":
            wide = wide - wide.mean(-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + decoder.eps)
        residual = (wide * scale).astype(residual.dtype)
    return decoder.unembed(params, residual)


def _statistics_of_views(
    decoder: _Decoder, params: Any, residuals: tuple[Any, ...], logits: Any, target: Any, *, top_k: int, ties: str
) -> dict[str, Any]:
    """All statistics in one program; the loop over views keeps one view's logits alive at a time."""
    logits = logits.astype(jnp.float32)
    final = jax.nn.log_softmax(logits)
    final_top1 = logits.argmax(-1)
    target = final_top1 if target is None else target

    def of_view(residual: Any) -> dict[str, Any]:
        view_logits = _decode(decoder, params, residual).astype(jnp.float32)
        view = jax.nn.log_softmax(view_logits)
        top_log_p, top_ids = jax.lax.top_k(view, top_k)
        target_log_p = jnp.take_along_axis(view, target[..., None], axis=-1)[..., 0]
        return {
            "top_ids": top_ids,
            "top_probabilities": jnp.exp(top_log_p),
            "target_probability": jnp.exp(target_log_p),
            "rank": rank_of(view_logits, target, ties=ties),
            "agrees": view_logits.argmax(-1) == final_top1,
            "kl": divergence(final, view),
            "kl_reverse": divergence(view, final),
            # Over the vocabulary: sum of -p log p, with 0 log 0 = 0.
            "entropy": -jnp.where(view == -jnp.inf, 0.0, jnp.exp(view) * view).sum(-1),
        }

    return {"target": target, **jax.lax.map(of_view, jnp.stack(residuals))}


_statistics = counted_jit(_statistics_of_views, name="logit_lens", static_argnums=0, static_argnames=("top_k", "ties"))
