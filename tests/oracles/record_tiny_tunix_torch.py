"""Write a tiny random Qwen 3 and Gemma 3 as Hugging Face directories, with the logits PyTorch computes.

As record_tiny_torch.py does for other families. The Qwen 3 unties its unembedding; the Gemma 3 has two groups of five
layers with a sliding window and one without, the last with a rotary base of its own and half the frequency.

Run once, in an environment that has torch; the tests read only the files it writes:

    pip install torch transformers==4.57.6
    python tests/oracles/record_tiny_tunix_torch.py

Source: interp_jax.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from pathlib import Path
from typing import Any

from record_tiny_torch import N_CTX, N_VOCAB, record


def main(target: Path) -> None:
    """Write the models."""
    import transformers

    common: dict[str, Any] = {
        "vocab_size": N_VOCAB,
        "bos_token_id": N_VOCAB - 1,
        "eos_token_id": N_VOCAB - 1,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": N_CTX,
    }
    qwen3 = transformers.Qwen3Config(num_hidden_layers=3, head_dim=8, rope_theta=100000.0, rms_norm_eps=1e-5, **common)
    gemma3 = transformers.Gemma3TextConfig(
        num_hidden_layers=12,
        head_dim=6,
        query_pre_attn_scalar=6,
        sliding_window=7,
        rope_theta=100000.0,
        rope_local_base_freq=1000.0,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
        **common,
    )
    record("tiny_qwen3", qwen3, target)
    record("tiny_gemma3", gemma3, target)


if __name__ == "__main__":
    main(Path(__file__).parent)
