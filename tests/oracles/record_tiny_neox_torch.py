"""Write a tiny random GPT-NeoX as a Hugging Face directory, with the logits PyTorch computes.

As record_tiny_torch.py does for other families. Half of each head is turned by position, and the norms' epsilon is
large enough to be seen.

Run once, in an environment that has torch; the tests read only the files it writes:

    pip install torch transformers==4.57.6
    python tests/oracles/record_tiny_neox_torch.py

Source: interp_jax.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from pathlib import Path

from record_tiny_torch import N_CTX, N_VOCAB, record


def main(target: Path) -> None:
    """Write the model."""
    import transformers

    neox = transformers.GPTNeoXConfig(
        vocab_size=N_VOCAB,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        rotary_pct=0.5,
        rotary_emb_base=100000,
        max_position_embeddings=N_CTX,
        layer_norm_eps=1e-2,
        bos_token_id=N_VOCAB - 1,
        eos_token_id=N_VOCAB - 1,
    )
    record("tiny_neox", neox, target)


if __name__ == "__main__":
    main(Path(__file__).parent)
