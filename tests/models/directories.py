"""The tiny Hugging Face directories in tests/oracles, by family.

Source: interp_jax.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.conftest import ORACLES


def config_of(directory: Path) -> dict[str, Any]:
    """What its config.json says."""
    return json.loads((directory / "config.json").read_text())


DIRECTORIES: dict[str, Path] = {
    config_of(path.parent)["model_type"]: path.parent for path in sorted(ORACLES.glob("tiny_*/config.json"))
}
