"""Inference-time optimisation in a model: a pursuit spliced into one layer against the plain forward pass.

SmolLM2-135M, one sequence of 512 tokens, gradient pursuit of k = 32 over 16384 atoms at `15.resid_post`; both passes
are one compiled program. The promise is about GPUs: there the pass of a small model waits for its many small kernels,
where a pursuit is k large products. On a CPU the figure is information: the products alone are more than twice the
model's arithmetic.

`python -m benchmarks.ito [n_tokens n_atoms k]`

Source: interp_jax.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from benchmarks.common import compare, report
from benchmarks.models import smollm2
from interp_jax.core.sites import Site
from interp_jax.forward.splicing import spliced_logits
from interp_jax.methods.pursuit import GradientPursuit, encoder, random_dictionary


def main(n_tokens: int = 512, n_atoms: int = 16384, k: int = 32) -> bool:
    """Print the line; return whether the promise was kept, or was none on this device."""
    lm = smollm2()
    assert lm.config is not None
    tokens = np.random.default_rng(0).integers(0, lm.config.d_vocab, (1, n_tokens)).astype(np.int32)
    dictionary = random_dictionary(jax.random.key(0), n_atoms=n_atoms, d=lm.config.d_model)
    ito = encoder(GradientPursuit(), dictionary, k=k, read=Site(15, "resid_post"))

    @jax.jit
    def plain(params: Any, tokens: Any) -> Any:
        return lm.forward(params, tokens)

    @jax.jit
    def spliced(params: Any, coder: Any, tokens: Any) -> Any:
        return spliced_logits(replace(lm, params=params), coder, tokens)

    is_cpu = jax.default_backend() == "cpu"
    seconds = compare(
        {
            "forward": lambda: plain(lm.params, tokens),
            "spliced": lambda: spliced(lm.params, ito, tokens),
        },
        rounds=3 if is_cpu else 15,
        warm_up=1 if is_cpu else 3,
    )
    ratio = seconds["spliced"] / seconds["forward"]
    return report(
        "ITO spliced into SmolLM2-135M: time over the plain forward pass's",
        ratio,
        must="<= 2 on a GPU" + (" (here, on a CPU, for information)" if is_cpu else ""),
        holds=ratio <= 2 or is_cpu,
        forward_s=seconds["forward"],
        spliced_s=seconds["spliced"],
        tokens=n_tokens,
        n_atoms=n_atoms,
        k=k,
    )


if __name__ == "__main__":
    sys.exit(0 if main(*map(int, sys.argv[1:])) else 1)
