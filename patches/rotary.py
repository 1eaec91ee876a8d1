"""Rotary frequencies as transformers' torch models turn heads by them: plain, and scaled for longer contexts.

A rotary embedding turns component i of a head, together with component i + d_head/2, by position times frequency.
Models made to read further than they were trained to scale the frequencies: all alike (`linear`), by a larger base
once a text is longer than the training context (`dynamic`), or the slow ones only (`llama3`, Llama 3.1 and later).

>>> rotary_frequencies(100.0, 4)
array([1. , 0.1, 1. , 0.1], dtype=float32)
>>> scaled_frequencies(100.0, 4, {"rope_type": "linear", "factor": 2.0}, n_ctx=8)
array([0.5 , 0.05, 0.5 , 0.05], dtype=float32)

Sharp edges: under `dynamic` scaling the frequencies follow from the longest row of a batch, so what a model computes
at a position depends on what comes after it, and keys in a cache stay turned as they were when they were written.
Both are so in PyTorch.

Source: transformers.modeling_rope_utils; the NTK-aware base is u/bloc97's and u/emozilla's.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from interp_jax.core.errors import UnsupportedModelError, four_part

if TYPE_CHECKING:
    from interp_jax.models.weights.checkpoint import Checkpoint

# The kinds of scaling, and the numbers each is given by.
SCALINGS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def rotary_frequencies(theta: float, d_head: int) -> np.ndarray:
    """Radians per position by which each component of a head turns; components i and i + d_head/2 turn together.

    f_i = f_(i + d_head/2) = theta^(-2 i / d_head),    i = 0 ... d_head/2 - 1

    Args:
        theta: The rotary base, `rope_theta`.
        d_head: Size of a head.

    Returns:
        Frequencies, float32, `[d_head]`.
    """
    return _frequencies(float(theta), d_head, "{}")


def scaled_frequencies(
    theta: float, d_head: int, scaling: Mapping[str, Any] | None, *, n_ctx: int, positions: Any = None
) -> Any:
    """The frequencies under a `rope_scaling`.

    linear   f_i / factor
    dynamic  f_i with theta' = theta (factor n / n_ctx - factor + 1)^(d_head / (d_head - 2)),  n = max(length, n_ctx)
    llama3   f_i / factor if 2 pi / f_i > old / low,  f_i if it is < old / high,  between them
             (1 - s) f_i / factor + s f_i,  s = (old f_i / 2 pi - low) / (high - low)

    Args:
        theta: The rotary base.
        d_head: Size of a head.
        scaling: `rope_scaling` of a configuration; None for none.
        n_ctx: `max_position_embeddings`, the context `dynamic` scaling begins after.
        positions: The positions at hand, for `dynamic` scaling.

    Returns:
        Frequencies, float32, `[d_head]`; an array of JAX under `dynamic` scaling, of NumPy otherwise.
    """
    if kind_of(scaling) != "dynamic" or scaling is None:
        return _frequencies(float(theta), d_head, json.dumps(dict(scaling or {}), sort_keys=True))
    factor = float(scaling["factor"])
    longest = jnp.maximum(jnp.max(positions) + 1, n_ctx).astype(jnp.float32)
    base = theta * (factor * longest / n_ctx - (factor - 1)) ** (d_head / (d_head - 2))
    return jnp.tile(1.0 / base ** (np.arange(0, d_head, 2, dtype=np.float32) / np.float32(d_head)), 2)


def frequencies_of(config: Any, positions: Any) -> Any:
    """The frequencies a transformers configuration, `config`, asks for at `positions`: `[d_head]`."""
    scaling = getattr(config, "rope_scaling", None)
    n_ctx = config.max_position_embeddings
    return scaled_frequencies(config.rope_theta, head_size(config), scaling, n_ctx=n_ctx, positions=positions)


def head_size(config: Any) -> int:
    """The size of a head of a transformers configuration: what `config` says, or the width over the number of heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def n_ctx_of(config: Any) -> int:
    """The most tokens a model of this `config` of transformers can read; `dynamic` scaling is there to read more."""
    scaling = getattr(config, "rope_scaling", None)
    factor = float(scaling["factor"]) if scaling and kind_of(scaling) == "dynamic" else 1.0
    return int(factor * config.max_position_embeddings)


def kind_of(scaling: Mapping[str, Any] | None) -> str:
    """The kind of a `rope_scaling`, `scaling`; older files call it `type`."""
    return (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))


def check_scaling(checkpoint: Checkpoint) -> None:
    """Refuse a `rope_scaling` that is not understood.

    Args:
        checkpoint: The model on disk.

    Raises:
        UnsupportedModelError: Its kind is not one of `SCALINGS`, or its numbers are others than that kind's.
    """
    scaling = checkpoint.config.get("rope_scaling")
    if scaling is None:
        return
    faults = []
    kind = kind_of(scaling) if isinstance(scaling, Mapping) else ""
    if kind not in SCALINGS:
        faults.append(f"its kind is {kind!r}")
    else:
        numbers = {key: value for key, value in scaling.items() if key not in ("rope_type", "type")}
        faults += [f"{key} is missing" for key in SCALINGS[kind] if key not in numbers]
        faults += [f"{key}={value!r} is not understood" for key, value in numbers.items() if key not in SCALINGS[kind]]
        faults += [
            f"{key}={value!r} is no positive number"
            for key, value in numbers.items()
            if key in SCALINGS[kind] and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0)
        ]
        if kind == "llama3" and not faults and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
            faults.append("high_freq_factor is not above low_freq_factor")
    if faults:
        known = "; ".join(f"{name} ({', '.join(keys)})" if keys else name for name, keys in SCALINGS.items())
        raise UnsupportedModelError(
            four_part(
                f"Configuration with rope_scaling={scaling!r}: {', '.join(faults)}",
                where=checkpoint.source,
                expected=f"one of {known}.",
                fix="use another model, or teach patches/rotary.py this scaling.",
            )
        )


# One array per configuration, so that all layers refer to one constant.
@functools.lru_cache(maxsize=32)
def _frequencies(theta: float, d_head: int, scaling: str) -> np.ndarray:
    given = json.loads(scaling)
    exponents = np.arange(0, d_head, 2, dtype=np.float32) / np.float32(d_head)
    plain = np.float32(1.0) / np.float32(theta) ** exponents
    kind = kind_of(given)
    if kind == "default":
        return np.tile(plain, 2)
    slow = plain / np.float32(given["factor"])
    if kind == "linear":
        return np.tile(slow, 2)
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    # How often each component turns within the training context.
    n_turns = given["original_max_position_embeddings"] * plain / np.float32(2 * math.pi)
    share = ((n_turns - np.float32(low)) / np.float32(high - low)).astype(np.float32)
    between = (1 - share) * slow + share * plain
    return np.tile(np.where(n_turns < low, slow, np.where(n_turns > high, plain, between)), 2)
