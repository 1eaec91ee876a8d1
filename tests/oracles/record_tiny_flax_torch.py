"""Write a tiny random GPT-Neo, GPT-J and OPT as Hugging Face directories, with the logits PyTorch computes.

As record_tiny_torch.py does for other families. The GPT-Neo has four layers, every other one with a window of five; the
GPT-J rotates four of the six components of a head; the OPT has an MLP of its own width.

Run once, in an environment that has torch; the tests read only the files it writes:

    pip install torch transformers==4.57.6
    python tests/oracles/record_tiny_flax_torch.py

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

    end = N_VOCAB - 1
    common: dict[str, Any] = {"vocab_size": N_VOCAB, "bos_token_id": end, "eos_token_id": end}
    neo = transformers.GPTNeoConfig(
        hidden_size=24,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=5,
        max_position_embeddings=N_CTX,
        **common,
    )
    gptj = transformers.GPTJConfig(n_embd=24, n_layer=3, n_head=4, n_positions=N_CTX, rotary_dim=4, **common)
    opt = transformers.OPTConfig(
        hidden_size=24,
        ffn_dim=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=N_CTX,
        pad_token_id=1,
        **common,
    )
    record("tiny_gpt_neo", neo, target)
    record("tiny_gptj", gptj, target)
    record("tiny_opt", opt, target)


if __name__ == "__main__":
    main(Path(__file__).parent)
