"""Record the logits of PyTorch for the tiny Llama under each scaling of its rotary embedding, and with wider heads.

Run once, in an environment that has torch; the tests read only the file it writes:

    pip install torch transformers==4.57.6
    python tests/oracles/record_rotary_torch.py

Source: interp_jax.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
EVERY = 5  # of 48 positions recorded

# What is changed in the configuration of `tiny_llama`.
CASES: dict[str, dict[str, Any]] = {
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 3.0}, "max_position_embeddings": 16},
    "llama3": {
        "rope_theta": 1000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 160,
        },
    },
    "wide_heads": {"head_dim": 10},
}


def weights(tensors: dict[str, np.ndarray], case: str) -> dict[str, np.ndarray]:
    """The weights of a case: those of `tiny_llama`, the four of attention repeated where heads are wider."""
    if case != "wide_heads":
        return tensors
    wide = {}
    for name, values in tensors.items():
        parts = name.split(".")
        if parts[-2] in ("q_proj", "k_proj", "v_proj"):
            heads = values.reshape(-1, 6, 24)
            values = np.concatenate([heads, 0.7 * heads[:, :4]], axis=1).astype(np.float32).reshape(-1, 24)
        elif parts[-2] == "o_proj":
            heads = values.reshape(24, -1, 6)
            values = np.concatenate([heads, -0.5 * heads[..., 2:]], axis=-1).astype(np.float32).reshape(24, -1)
        wide[name] = values
    return wide


def main() -> None:
    """Write the file."""
    import torch
    import transformers
    from safetensors.numpy import load_file

    tensors = load_file(HERE / "tiny_llama" / "model.safetensors")
    tokens = np.load(HERE / "tiny_llama_logits.npz")["tokens"]
    recorded = {"tokens": tokens}
    for case, changes in CASES.items():
        config = json.loads((HERE / "tiny_llama" / "config.json").read_text()) | changes
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**config), attn_implementation="eager"
        ).eval()
        model.load_state_dict({name: torch.tensor(values) for name, values in weights(tensors, case).items()})
        with torch.no_grad():
            recorded[case] = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()[:, ::EVERY]
    np.savez_compressed(HERE / "rotary_torch.npz", allow_pickle=False, **recorded)


if __name__ == "__main__":
    main()
