"""Promise of loading: what the host holds at the peak is hardly more than the model, whatever form it is loaded in.

Source: interp_jax.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.common import in_new_process, report
from benchmarks.load_once import write_model

CASES = ("unstacked", "stacked", "stacked bfloat16", "stacked sharded")


def main() -> bool:
    """Measure and report."""
    holds = True
    with tempfile.TemporaryDirectory() as parent:
        directory = write_model(Path(parent, "model"), n_layers=28)
        for case in (*CASES, "restacked"):
            found = in_new_process("benchmarks.load_once", str(directory), *case.split())
            ratio = found["peak_bytes"] / found["model_bytes"]
            # Stacking in place holds the model and one stacked array, here a quarter of the layers.
            most = 1.4 if case == "restacked" else 1.2
            details = {key: value for key, value in found.items() if key.endswith("_bytes")}
            holds &= report(
                f"peak host memory of loading / model, {case}",
                ratio,
                must=f"<= {most}",
                holds=ratio <= most,
                seconds=found["seconds"],
                gb_per_s=found["model_bytes"] / 1e9 / found["seconds"],
                **details,
            )
    return holds
