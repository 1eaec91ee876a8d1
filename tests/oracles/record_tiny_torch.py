"""Write a tiny random GPT-2, Llama and Mistral as Hugging Face directories, with the logits PyTorch computes.

They are real directories, as `save_pretrained` writes them, for the tests of loading; every parameter is random, the
biases and norms too, so that none can be mistaken for another or left out unnoticed. The Llama shares keys and values
between heads, has a rotary base of 100000 and an unembedding of its own, the Mistral a sliding window as well; the
GPT-2 ties it.

Run once, in an environment that has torch; the tests read only the files it writes:

    pip install torch transformers==4.57.6
    python tests/oracles/record_tiny_torch.py

Source: interp_jax.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

N_VOCAB, N_CTX = 260, 48
MERGES = (("Ġ", "t"), ("h", "e"), ("Ġt", "he"))
END = "<|endoftext|>"


def tokenizer() -> Any:
    """Byte-level BPE of 256 bytes, three merges and one special token."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*letters, *map("".join, MERGES)])}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=list(MERGES)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([END])
    assert made.get_vocab_size() == N_VOCAB
    return made


def record(name: str, config: Any, target: Path) -> None:
    """Write one model's directory, and its logits for two texts beside it."""
    import torch
    import transformers

    generator = torch.Generator().manual_seed(sum(name.encode()))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 2 else 0.2
            values = scale * torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and parameter_name.endswith("weight")
            parameter.copy_(1 + values if is_norm else values)  # around one, as in trained models
    directory = target / name
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink()
    tokenizer().save(str(directory / "tokenizer.json"))
    # All positions there are, so that positions far from the start count as well.
    tokens = torch.randint(0, N_VOCAB, (2, N_CTX), generator=generator)
    with torch.no_grad():
        logits = model(tokens).logits
    np.savez_compressed(
        target / f"{name}_logits.npz",
        allow_pickle=False,
        tokens=tokens.numpy().astype(np.int32),
        logits=logits.numpy(),
        versions=np.array([f"torch {torch.__version__}", f"transformers {transformers.__version__}"]),
    )
    sizes = [path.stat().st_size for path in (*directory.iterdir(), target / f"{name}_logits.npz")]
    print(f"{name}: {sum(sizes) / 1e3:.0f} kB, logits between {logits.min():.1f} and {logits.max():.1f}")


def main(target: Path) -> None:
    """Write the models."""
    import transformers

    end = N_VOCAB - 1
    common: dict[str, Any] = {"vocab_size": N_VOCAB, "bos_token_id": end, "eos_token_id": end}
    gpt2 = transformers.GPT2Config(n_embd=24, n_layer=3, n_head=4, n_positions=N_CTX, **common)
    llama = transformers.LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=N_CTX,
        rope_theta=100000.0,
        tie_word_embeddings=False,
        **common,
    )
    mistral = transformers.MistralConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=N_CTX,
        sliding_window=7,
        rope_theta=100000.0,
        **common,
    )
    record("tiny_gpt2", gpt2, target)
    record("tiny_llama", llama, target)
    record("tiny_mistral", mistral, target)


if __name__ == "__main__":
    main(Path(__file__).parent)
