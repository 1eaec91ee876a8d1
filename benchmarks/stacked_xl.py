"""Promises of stacked layers at the shapes of GPT-2 XL: 48 layers of width 1600.

`python -m benchmarks stacked_xl` needs 16 GB of memory: both forms of the model are held, to be run in turn.

Source: design page, section 3.5.
"""

from __future__ import annotations

from benchmarks.models import gpt2_xl
from benchmarks.stacked import compiling, running


def main() -> bool:
    """Measure and report."""
    lm = gpt2_xl()
    stacked = lm.stacked()
    holds = compiling("GPT-2 XL's shapes", lm, stacked)
    return running("GPT-2 XL's shapes", lm, stacked, rounds=3) and holds
