"""Promise: tags nobody listens to change nothing. StableHLO with and without them is equal, byte for byte.

Both SmolLM2-135M (real weights) and a GPT-2 of published size with random weights.

Source: design page, section 4.
"""

from __future__ import annotations

import time

import jax
import numpy as np

from benchmarks.common import report
from benchmarks.models import gpt2_small, smollm2


def main() -> bool:
    """Measure and report."""
    holds = True
    for lm in (smollm2(), gpt2_small()):
        tokens = np.arange(32, dtype=np.int32)[None]
        texts, seconds = {}, {}
        for name in ("untagged", "forward"):
            start = time.perf_counter()
            texts[name] = jax.jit(getattr(lm.upstream, name)).lower(lm.params, tokens).as_text()
            seconds[name] = time.perf_counter() - start
        same = texts["untagged"] == texts["forward"]
        holds &= report(
            f"unlistened tags, StableHLO of {lm.name}",
            float(same),
            must="identical",
            holds=same,
            n_sites=len(lm.sites(tokens)),
            n_characters=len(texts["forward"]),
            trace_and_lower_s=seconds["forward"],
            trace_and_lower_untagged_s=seconds["untagged"],
        )
    return holds
