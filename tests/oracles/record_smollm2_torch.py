"""Record what Hugging Face's PyTorch Llama computes for SmolLM2-135M: the oracle of `ij.load("smollm2-135m")`.

The route shares no code with ours: transformers reads the GGUF file itself (dequantisation, order of the rows of q and
k, tokenizer), and torch runs its own Llama in float32 with eager attention.

Run once, in an environment that has torch, with the path of the GGUF file; the tests read only the file it writes:

    pip install torch transformers==4.57.6 gguf accelerate
    python tests/oracles/record_smollm2_torch.py SmolLM2-135M-Instruct.Q4_1.gguf

All logits of ten prompts would be 50 MB. Kept are, at the last position of each prompt, 4096 of the 49152 logits drawn
once at random and the top 5; at every position 256 of them, and the mean, standard deviation, maximum and logsumexp
over the whole vocabulary, which no error anywhere in a row leaves unchanged. Of each weight, its name and the CRC-32
of its float32 bytes.

Source: interp_jax.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import numpy as np

LONG = (
    "The history of computing is longer than the history of computers. People counted with pebbles, with knots, with "
    "marks on bone, and later with beads on wires; each of these devices stored a number so that a person did not "
    "have to remember it. In 1642 Blaise Pascal built a machine of wheels that could add and subtract, and thirty "
    "years later Leibniz made one that could multiply. Charles Babbage went further and designed, but never finished, "
    "an engine that could be told what to do by a row of punched cards. Ada Lovelace, who wrote the first program for "
    "it, saw that such a machine might work on things other than numbers, provided that their relations could be "
    "expressed by rules. A century passed before anybody built a machine that could do what she had described. When "
    "Mary and John went to the store, John gave a drink to"
)
PROMPTS = (
    "When Mary and John went to the store, John gave a drink to",
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "In 2023, 15 people paid $3.50 each, so together they paid $",
    "<|im_start|>user\nWhat is the opposite of hot?<|im_end|>\n<|im_start|>assistant\n",
    "Hello",
    "Der schnelle braune Fuchs springt über den faulen",
    "1, 2, 3, 4, 5, 6, 7,",
    "naïve café — 日本語 🙂   \n\n\tThe",
    LONG,
)
N_LAST, N_EVERY, N_TOP = 4096, 256, 5
TOLERANCE = 2e-3  # what the test allows; the top 6 must lie further apart than twice that


def main(gguf: Path, target: Path) -> None:
    """Run the ten prompts and write the file."""
    import torch
    import transformers

    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert type(model).__name__ == "LlamaForCausalLM"
    rng = np.random.default_rng(0)
    n_vocab = model.config.vocab_size
    last_ids, every_ids = (np.sort(rng.choice(n_vocab, n, replace=False)) for n in (N_LAST, N_EVERY))
    recorded: dict[str, np.ndarray] = {"prompts": np.array(PROMPTS), "last_ids": last_ids, "every_ids": every_ids}
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids).logits[0]
        order = torch.argsort(logits[-1], descending=True, stable=True)[: N_TOP + 1]
        gaps = -torch.diff(logits[-1][order])
        assert gaps.min() > 2 * TOLERANCE, f"the top {N_TOP} of prompt {i} is not decided: {gaps}"
        recorded |= {
            f"tokens_{i}": ids[0].numpy().astype(np.int32),
            f"top_{i}": order[:N_TOP].numpy().astype(np.int32),
            f"top_logits_{i}": logits[-1][order[:N_TOP]].numpy(),
            f"last_{i}": logits[-1].numpy()[last_ids],
            f"every_{i}": logits.numpy()[:, every_ids],
            f"summary_{i}": torch.stack(
                [logits.mean(-1), logits.std(-1, correction=0), logits.amax(-1), logits.logsumexp(-1)], dim=-1
            ).numpy(),
        }
        print(f"{ids.shape[1]:4d} tokens, {tokenizer.convert_ids_to_tokens(recorded[f'top_{i}'].tolist())}")
    weights = {name: value.numpy() for name, value in model.state_dict().items() if name != "lm_head.weight"}  # tied
    recorded["weight_names"] = np.array(list(weights))
    recorded["weight_crc32"] = np.array([zlib.crc32(value.tobytes()) for value in weights.values()], np.uint32)
    recorded["versions"] = np.array([f"torch {torch.__version__}", f"transformers {transformers.__version__}"])
    np.savez_compressed(target, allow_pickle=False, **recorded)
    print(f"{target.name}: {target.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).with_name("smollm2_torch.npz"))
