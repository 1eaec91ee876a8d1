"""Oryx's own test file passes against our module, but for what JAX itself has removed.

Source: the test file in the wheel of oryx 0.2.9, fetched and checked, never committed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from interp_jax.models.weights.fetching import WheelFile, fetched

ROOT = Path(__file__).parents[3]

FILE = WheelFile(
    distribution="oryx",
    version="0.2.9",
    wheel="oryx-0.2.9-py3-none-any.whl",
    wheel_sha256="04f1ee0f50df4b2cac928ec28d7cc8c46065f3d6d8daf6d2d06cec75262b2822",
    member="oryx/core/interpreters/harvest_test.py",
    member_sha256="8213f32ed2a0b5dd376d32ed64444e93f0a79d925a18f85416892ee1fe5779c7",
    n_bytes=206_812,
)

PMAP = "jax.pmap is a shard_map today, in which Oryx itself refuses sows; its tests expect the pmap of 2024"
EXCEPTIONS = {
    "ReapTest.test_should_reap_pmapped_function": PMAP,
    "PlantTest.test_should_plant_in_pmap": PMAP,
}


def test_oryxs_own_tests_pass() -> None:
    command = [sys.executable, "-m", "tests.transforms.harvest.oryx_conformance", str(fetched(FILE))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(outcomes) == 80
    assert {name: outcome for name, outcome in outcomes.items() if outcome != "ok"}.keys() == EXCEPTIONS.keys()
