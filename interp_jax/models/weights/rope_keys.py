"""The rotary embedding in a `config.json` of transformers 5, in the keys of the versions before.

Version 5 gathers what was said by several keys in one, `rope_parameters`, for each kind of layer where there are two.
Patch sets read the older keys, which every published model has had.

>>> config = {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
>>> with_older_rope_keys(config)
{'model_type': 'llama', 'rope_theta': 500000.0}

Sharp edges: what cannot be said by the older keys, or contradicts one that is there too, is left as it is, so that it
is refused like any key that nobody handles.

Source: the configuration classes of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The older names of the base and of the rotated share of each head, where a family has its own.
_BASE = {"gpt_neox": "rotary_emb_base"}
_SHARE = {"gpt_neox": "rotary_pct"}


def with_older_rope_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without `rope_parameters`, where older keys say the same.

    Args:
        config: The keys of a `config.json`.

    Returns:
        The keys, with others for `rope_parameters`.
    """
    rest = {key: value for key, value in config.items() if key != "rope_parameters"}
    given, family = config.get("rope_parameters"), config.get("model_type")
    if not isinstance(given, Mapping):
        return dict(config)
    local: Any = {}
    if "full_attention" in given:
        local = given.get("sliding_attention") or {}
        if set(given) - {"full_attention", "sliding_attention"}:
            return dict(config)
        given = given["full_attention"]
    if not isinstance(given, Mapping) or not isinstance(local, Mapping):
        return dict(config)

    scaling = dict(given)
    older = {
        _BASE.get(str(family), "rope_theta"): scaling.pop("rope_theta", None),
        _SHARE.get(str(family), "partial_rotary_factor"): scaling.pop("partial_rotary_factor", None),
        "rope_local_base_freq": local.get("rope_theta"),
        "rope_scaling": None if scaling in ({}, {"rope_type": "default"}) else scaling,
    }
    older = {key: value for key, value in older.items() if value is not None}
    contradicts = any(rest.get(key) not in (None, value) for key, value in older.items())
    is_local_plain = set(local) <= {"rope_type", "rope_theta"} and local.get("rope_type", "default") == "default"
    if contradicts or not is_local_plain:
        return dict(config)
    return rest | older
