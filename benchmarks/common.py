"""How every benchmark here measures and reports.

Machines are shared and noisy, so what counts is a ratio within one run: `compare` calls its candidates in turn, round
after round, and takes medians. `report` prints one JSON line per promise, with what was promised beside it.

Source: interp_jax.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def compare(candidates: Mapping[str, Callable[[], Any]], *, rounds: int = 15, warm_up: int = 2) -> dict[str, float]:
    """Median seconds per call of each candidate, called in turn.

    Args:
        candidates: Functions by name. What they return is waited for.
        rounds: How often each is measured.
        warm_up: How often each is called before.

    Returns:
        Seconds by name.
    """
    for _ in range(warm_up):
        for candidate in candidates.values():
            jax.block_until_ready(candidate())
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            jax.block_until_ready(candidate())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def in_new_process(module: str, *args: str) -> dict[str, Any]:
    """What `python -m module args...` prints last, read as JSON."""
    out = subprocess.run([sys.executable, "-m", module, *args], check=True, capture_output=True, text=True).stdout
    return json.loads(out.strip().splitlines()[-1])


def report(promise: str, value: float, *, must: str, holds: bool, **details: Any) -> bool:
    """Print one result as a JSON line.

    Args:
        promise: What is measured.
        value: The figure.
        must: What it must reach, in words.
        holds: Whether it does.
        **details: Further figures.

    Returns:
        `holds`.
    """
    line = {
        "promise": promise,
        "value": round(value, 4),
        "must": must,
        "holds": holds,
        **{key: round(detail, 6) if isinstance(detail, float) else detail for key, detail in details.items()},
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
    }
    print(json.dumps(line), flush=True)
    return holds
