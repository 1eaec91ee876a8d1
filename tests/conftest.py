"""The strict session every test runs in, and the fixtures `key` and `rng`.

Two CPU devices, no silent promotion of dtypes or ranks, warnings are errors (pyproject.toml), and random keys that
differ from session to session and print their seed: `INTERP_TEST_SEED=<seed>` repeats a session.

Source: interp_jax.
"""

from __future__ import annotations

import gc
import os
import secrets
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before JAX is imported: it reads these once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2".strip()
# A persistent cache would hide what compiles, and compile counts are under test.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ["MPLBACKEND"] = "agg"
# No test may fetch a model from a hub by accident.
os.environ["HF_HUB_OFFLINE"] = "1"
# Worker processes of pytest-xdist inherit it, so all of a session's tests share one seed.
SESSION_SEED = int(os.environ.setdefault("INTERP_TEST_SEED", str(secrets.randbelow(2**31))))

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# The first example of a property test may compile; a time limit per example would measure that. CI draws the same
# examples each time: what it says depends on the contents alone.
hypothesis.settings.register_profile("house", deadline=None, print_blob=True, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("house")


def pytest_report_header() -> list[str]:
    """The versions and the seed, so that a failure can be repeated."""
    devices = f"jax {jax.__version__}, {jax.device_count()} CPU devices"
    return [f"{devices}; repeat this session with INTERP_TEST_SEED={SESSION_SEED}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The README's blocks first, then files by their number of tests: none is left with a long file at the end."""
    n_tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name != "test_readme.py", -n_tests[item.path], str(item.path)))


# Traces are millions of objects that stay: with the usual thresholds a twentieth of the time went into walking them.
gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def dropped_programs() -> Iterator[None]:
    """Programs of earlier files are dropped once a process takes gigabytes; what is needed again is compiled again."""
    yield
    if resident_bytes() > 3e9:
        jax.clear_caches()
        gc.collect()


def resident_bytes() -> int:
    """How much memory this process has; 0 where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0


ORACLES = Path(__file__).parent / "oracles"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of this test's own, which does not depend on the order in which tests run."""
    value = (SESSION_SEED ^ zlib.crc32(request.node.nodeid.encode())) % 2**31
    # Shown by pytest when the test fails.
    print(f"INTERP_TEST_SEED={SESSION_SEED} (seed of this test: {value})")
    return value


@pytest.fixture
def key(seed: int) -> jax.Array:
    """A random key; its seed is printed when the test fails."""
    return jax.random.key(seed)


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """A NumPy generator; its seed is printed when the test fails."""
    return np.random.default_rng(seed)


# Real directories written by Hugging Face's PyTorch models (tests/oracles/record_tiny_torch.py).
TINY = ("tiny_gpt2", "tiny_llama")


@pytest.fixture(scope="session", params=TINY)
def tiny(request: pytest.FixtureRequest) -> Any:
    """A tiny random model of each family, three layers, as loaded."""
    from interp_jax.models.loading import load

    return load(ORACLES / request.param)


@pytest.fixture(scope="session")
def tiny_llama() -> Any:
    """The tiny random Llama: grouped-query attention, rotary base 100000, an unembedding of its own."""
    from interp_jax.models.loading import load

    return load(ORACLES / "tiny_llama")


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """SmolLM2-135M with its real weights."""
    from interp_jax.models.loading import load

    return load("smollm2-135m")
