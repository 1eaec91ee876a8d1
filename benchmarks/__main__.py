"""Run the benchmarks: `python -m benchmarks [name ...]`. JSON lines on stdout; exit status 1 if a promise is not kept.

Source: interp_jax.
"""

from __future__ import annotations

import importlib
import sys

ALL = (
    "light",
    "unlistened",
    "loop",
    "harvest",
    "patching",
    "stacked",
    "stacked_xl",
    "loading",
    "activation_stream",
    "sae",
    "pursuit",
    "ito",
)


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all."""
    unknown = [name for name in names if name not in ALL]
    if unknown:
        print(f"Unknown benchmark {', '.join(unknown)}. Known: {', '.join(ALL)}", file=sys.stderr)
        return 2
    results = [importlib.import_module(f"benchmarks.{name}").main() for name in names or ALL]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
