"""Promises of the loop: as fast as the plain forward, a handful of programs, nothing compiled when it moves.

SmolLM2-135M, 32 tokens, batch 1, all 30 `resid_post`, float32.

Source: design page, section 4.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.common import compare, in_new_process, report
from benchmarks.models import smollm2
from interp_jax.transforms.compilations import count_compilations

TOKENS = np.arange(1000, 1032, dtype=np.int32)[None]


def loop(lm: Any, engine: str = "compiled") -> Any:
    """One pass over all `resid_post`, changing nothing."""
    with lm.run(TOKENS, sites="resid_post", engine=engine) as running_pass:
        for _ in running_pass:
            pass
    return running_pass.retval


def zeroed(lm: Any, at: int) -> Any:
    """One pass that sets the MLP of a layer to zero."""
    for _, _, value in (running_pass := lm.run(TOKENS, sites=f"{at}.mlp_out")):
        running_pass.modified_value = value * 0.0
    return running_pass.retval


def main() -> bool:
    """Measure and report."""
    lm = smollm2()
    with count_compilations() as new:
        loop(lm)
    seconds = compare({"forward": lambda: lm(TOKENS), "loop": lambda: loop(lm)}, rounds=31)
    slow = compare({"loop": lambda: loop(lm), "python": lambda: loop(lm, "python")}, rounds=5)
    ratio = seconds["loop"] / seconds["forward"]
    holds = report(
        "loop over 30 resid_post / plain forward", ratio, must="<= 1.1", holds=ratio <= 1.1, **_named(seconds)
    )
    faster = slow["python"] / slow["loop"]
    holds &= report("python engine / compiled engine", faster, must=">= 4", holds=faster >= 4, **_named(slow))
    holds &= report("distinct programs of that loop", len(new), must="<= 5", holds=len(new) <= 5)
    zeroed(lm, 5)
    with count_compilations() as moved:
        zeroed(lm, 17)
    holds &= report("programs compiled when an intervention moves", len(moved), must="0", holds=not moved)
    first = {what: in_new_process("benchmarks.first_call", what)["seconds"] for what in ("forward", "loop", "loop")}
    ratio = first["loop"] / first["forward"]
    holds &= report("first loop after load / first forward", ratio, must="<= 2", holds=ratio <= 2.0, **_named(first))
    return holds


def _named(seconds: dict[str, float]) -> dict[str, float]:
    return {f"{name}_s": value for name, value in seconds.items()}
