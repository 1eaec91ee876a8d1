"""Run Oryx's own tests of Harvest, unmodified, against our module: `python -m tests...oryx_conformance FILE`.

The file comes out of Oryx's wheel; the package itself is never imported. The modules it imports from Oryx are stand-ins
that hold ours, and the JAX names it uses that have moved since 2024 are ported by our own Patcher. Prints one JSON
object: the id of each test to "ok" or the last line of its error.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
import types
import unittest
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax.extend.core.primitives  # noqa: F401 - the ported tests name it
from absl.testing import parameterized

import interp_jax.transforms.harvest as ours
from interp_jax.transforms.patcher import Patcher

MODULE = "oryx.core.interpreters.harvest_test"

# JAX's names of 2024, and today's. `jax.extend.core.primitives` is imported above.
CHECKPOINT = ("ad_checkpoint.checkpoint", "jax.checkpoint")
MOVED: dict[str, list[tuple[Any, ...]]] = {
    "PlantTest.test_jit_should_remain_in_plant": [("pjit.pjit_p", "jax.extend.core.primitives.jit_p")],
    "ReapTest.test_reap_of_checkpoint": [CHECKPOINT],
    "ReapTest.test_reap_of_grad_of_checkpoint": [CHECKPOINT],
    "ReapTest.test_reap_of_grad_of_nested_checkpoint": [(*CHECKPOINT, 2)],
    "PlantTest.test_plant_of_checkpoint": [CHECKPOINT],
    "PlantTest.test_grad_of_plant_of_checkpoint": [CHECKPOINT],
    "PlantTest.test_grad_plant_of_nested_checkpoint": [(*CHECKPOINT, 2)],
    "ShardMapTest.setUp": [("shard_map.shard_map", "jax.shard_map", 3)],
}
MAY_BE_GONE = ("jax.ad_checkpoint", "jax._src.pjit", "jax.experimental.shard_map")


def stand_in(name: str, **members: Any) -> types.ModuleType:
    """A module of this name with these members, where `import` finds it."""
    module = types.ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], last, module)
    return module


def oryx_modules() -> None:
    """Stand-ins for what the test file imports from Oryx, with our functions. Oryx ignores unknown plants."""
    for name in ("oryx", "oryx.core", "oryx.core.interpreters", "oryx.internal"):
        stand_in(name)
    functions = {name: getattr(ours, name) for name in ours.__all__}
    for name in ("plant", "harvest"):
        functions[name] = functools.partial(functions[name], unknown="ignore")
    stand_in("oryx.core.interpreters.harvest", **functions)
    stand_in("oryx.internal.test_util", TestCase=type("TestCase", (parameterized.TestCase,), {}))
    for name in MAY_BE_GONE:
        try:
            importlib.import_module(name)
        except ImportError:
            stand_in(name)


def load(path: str) -> types.ModuleType:
    """The test file as a module."""
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    spec.loader.exec_module(module)
    return module


def run(path: str) -> dict[str, str]:
    """The outcome of each test in the file."""
    oryx_modules()
    module = load(path)
    result = unittest.TestResult()
    suite = unittest.defaultTestLoader.loadTestsFromModule(module)
    names = [test.id() for group in suite for test in group]  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]
    with Patcher(module, MOVED):
        suite.run(result)
    bad = {test.id(): text.strip().splitlines()[-1] for test, text in (*result.errors, *result.failures)}
    return {name.removeprefix(f"{MODULE}."): bad.get(name, "ok") for name in names}


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1])))
