"""What kind of value a key of a model's `config.json` may have, whatever the family.

A config.json is edited by hand more often than any other file of a model. A text where a number belongs would show
itself deep inside upstream's code, as a TypeError about something else, so the kinds are compared first.

>>> wrong_values({"hidden_size": "576", "num_hidden_layers": 30, "rope_theta": float("nan")})
{'hidden_size': 'a whole number from 1 to 16,777,216', 'rope_theta': 'a positive number up to 1,000,000,000'}

Sharp edges: a key without a value (null) passes here; whether it may be left out is the family's to say.

Source: the configuration classes of transformers 4.x, for the kinds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Far above any model, far below what overflows.
MOST = 1 << 24  # of anything a config counts
LARGEST = 1_000_000_000  # of any other number

# fmt: off
_COUNTS = (
    "ffn_dim", "head_dim", "hidden_size", "intermediate_size", "max_position_embeddings", "n_embd", "n_head",
    "n_inner", "n_layer", "n_positions", "num_attention_heads", "num_heads", "num_hidden_layers",
    "num_key_value_heads", "num_layers", "rotary_dim", "sliding_window", "vocab_size", "window_size",
)
_POSITIVE = (
    "layer_norm_eps", "layer_norm_epsilon", "partial_rotary_factor", "query_pre_attn_scalar", "rms_norm_eps",
    "rope_local_base_freq", "rope_theta", "rotary_emb_base", "rotary_pct",
)
_SWITCHES = (
    "attention_bias", "do_layer_norm_before", "enable_bias", "mlp_bias", "reorder_and_upcast_attn",
    "scale_attn_by_inverse_layer_idx", "scale_attn_weights", "tie_word_embeddings", "use_parallel_residual",
)
# fmt: on


def wrong_values(config: Mapping[str, Any]) -> dict[str, str]:
    """The keys whose value is of a kind it cannot be.

    Args:
        config: The keys and values of a `config.json`.

    Returns:
        Key to what is expected of it, in the order of the configuration.
    """
    return {
        key: expected
        for key, value in config.items()
        if value is not None and (expected := _expected(key, value)) is not None
    }


def _expected(key: str, value: Any) -> str | None:
    """What the value of a key ought to be, None if it is that."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in _COUNTS and not (is_number and isinstance(value, int) and 1 <= value <= MOST):
        return f"a whole number from 1 to {MOST:,}"
    if key in _POSITIVE and not (is_number and math.isfinite(value) and 0 < value <= LARGEST):
        return f"a positive number up to {LARGEST:,}"
    if key in _SWITCHES and not isinstance(value, bool):
        return "true or false"
    if key == "rope_scaling" and not (isinstance(value, Mapping) and value):
        return "an object with rope_type, or null"
    return None
