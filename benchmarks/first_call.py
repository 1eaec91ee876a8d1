"""Seconds of the first forward, or of the first loop, in a process that has just loaded the model.

Run by `benchmarks.loop` in processes of their own: `python -m benchmarks.first_call forward|loop`.

Source: design page, section 4.
"""

from __future__ import annotations

import json
import sys
import time

import jax

from benchmarks.loop import TOKENS, loop
from benchmarks.models import smollm2

if __name__ == "__main__":
    lm = smollm2()
    jax.block_until_ready(lm.params)
    start = time.perf_counter()
    jax.block_until_ready(lm(TOKENS) if sys.argv[1] == "forward" else loop(lm))
    print(json.dumps({"seconds": time.perf_counter() - start}))
