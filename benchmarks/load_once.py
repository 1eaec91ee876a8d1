"""Peak memory and seconds of loading one model, in a process of its own.

Run by `benchmarks.loading`: `python -m benchmarks.load_once DIRECTORY [stacked] [bfloat16] [sharded] [restacked]`.
What is counted is resident memory above what the process holds once a small model of the family is loaded.

Source: interp_jax.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__" and "sharded" in sys.argv:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"

import jax
import numpy as np

import interp_jax as ij
from interp_jax.models.weights.checkpoint import LazyTensor, Tensors
from interp_jax.models.weights.writing import write_directory


def write_model(directory: Path, *, n_layers: int, d_model: int = 512, d_mlp: int = 1536, d_vocab: int = 16384) -> Path:
    """Write a Llama with random weights, float32, as a Hugging Face directory of several files.

    Args:
        directory: Where.
        n_layers: How many layers it has.
        d_model: Their width.
        d_mlp: The width of their MLPs.
        d_vocab: How many tokens it knows.

    Returns:
        The directory.
    """
    config = {
        "model_type": "llama",
        "vocab_size": d_vocab,
        "hidden_size": d_model,
        "intermediate_size": d_mlp,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (d_vocab, d_model),
        "model.norm.weight": (d_model,),
    }
    shapes["lm_head.weight"] = (d_vocab, d_model)
    for i in range(n_layers):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.{name}.weight": (d_model,) for name in ("input_layernorm", "post_attention_layernorm")}
        for name, d_out in (("q", d_model), ("k", d_model // 2), ("v", d_model // 2), ("o", d_model)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (d_out, d_model)
        for name, d_out, d_in in (("gate", d_mlp, d_model), ("up", d_mlp, d_model), ("down", d_model, d_mlp)):
            shapes[f"{at}.mlp.{name}_proj.weight"] = (d_out, d_in)
    rng = np.random.default_rng(0)

    def tensor(shape: tuple[int, ...]) -> LazyTensor:
        return LazyTensor(shape, np.dtype(np.float32), lambda: rng.standard_normal(shape, np.float32))

    tensors = Tensors({name: tensor(shape) for name, shape in shapes.items()})
    return write_directory(directory, {"config.json": json.dumps(config).encode()}, tensors, max_file_bytes=100_000_000)


def resident_bytes(key: str) -> int:
    """What the system says of this process: `VmRSS`, resident now, or `VmHWM`, the most so far."""
    # Not getrusage: its peak counts the process this one was started from.
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def measure(directory: str, options: set[str]) -> dict[str, Any]:
    """Load a model; seconds, and resident bytes at the peak and in the end.

    Args:
        directory: Where it is.
        options: "stacked", "bfloat16", "sharded"; with "restacked", it is loaded unstacked and then stacked in place.

    Returns:
        The figures.
    """
    load = {
        "stacked": "stacked" in options,
        "dtype": "bfloat16" if "bfloat16" in options else "float32",
        "sharding": jax.make_mesh((2,), ("model",)) if "sharded" in options else None,
    }
    with tempfile.TemporaryDirectory() as small:
        small_lm = ij.load(write_model(Path(small, "m"), n_layers=2, d_model=16, d_mlp=32, d_vocab=64), **load)
        jax.block_until_ready(small_lm.params)
    before = resident_bytes("VmRSS")
    start = time.perf_counter()
    lm = ij.load(directory, **load)
    if "restacked" in options:
        lm = lm.stacked(donate=True)
    jax.block_until_ready(lm.params)
    return {
        "seconds": time.perf_counter() - start,
        "model_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params)),
        "peak_bytes": resident_bytes("VmHWM") - before,
        "end_bytes": resident_bytes("VmRSS") - before,
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], set(sys.argv[2:]))))
