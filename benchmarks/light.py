"""Promises of what every session pays: importing the package, and one switch pair of a generator.

Source: design page, section 4.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from benchmarks.common import report
from interp_jax import greenlets


def import_seconds(statement: str) -> float:
    """Seconds a new process takes for a statement."""
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def switch_pair_us(n: int = 100_000) -> float:
    """Microseconds from one `next` to the next, through `yield_` and back."""

    def body() -> None:
        for i in range(n):
            greenlets.yield_(i)

    start = time.perf_counter()
    for _ in greenlets.generator(body):
        pass
    return (time.perf_counter() - start) / n * 1e6


def main() -> bool:
    """Measure and report."""
    rounds = [(import_seconds("import jax"), import_seconds("import interp_jax")) for _ in range(7)]
    jax_s, own_s = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = own_s / jax_s
    holds = report(
        "import interp_jax / import jax", ratio, must="<= 1.5", holds=ratio <= 1.5, jax_s=jax_s, interp_jax_s=own_s
    )
    pair = min(switch_pair_us() for _ in range(3))
    return report("greenlet switch pair, microseconds", pair, must="<= 5", holds=pair <= 5) and holds
