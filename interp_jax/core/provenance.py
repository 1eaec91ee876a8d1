"""Provenance: which code, versions, device and command a number comes from.

A number without its origin cannot be repeated. `provenance` collects, at the moment a result is saved, what could
have changed it: the commit of this package and of the working directory (and whether files differ from it), the
versions of the libraries, the patch sets in force, the seeds, the device and JAX's own switches.

>>> record = provenance(seeds={"init": 0})
>>> sorted(record)
['command', 'device', 'git', 'jax_config', 'patch_digests', 'seeds', 'versions']
>>> record["seeds"]
{'init': 0}

Sharp edges: asking for the device starts JAX's backend. Outside a git checkout, or without git, a commit is None.
"dirty" counts new files that git does not ignore, since an experiment is often one of them.

Source: interp_jax.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

# The distributions whose versions can change a number.
_DISTRIBUTIONS = (
    "interp-jax",
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "transformers",
    "penzai",
    "dm-haiku",
    "gguf",
    "safetensors",
    "tokenizers",
)
# So can JAX's switches.
_SWITCHES = ("jax_enable_x64", "jax_default_matmul_precision")


def provenance(
    *, patch_digests: Mapping[str, Any] | None = None, seeds: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Where a number computed now comes from.

    Args:
        patch_digests: Patch set -> the digests of the upstream functions it patched.
        seeds: What each seed was for -> the seed.

    Returns:
        A mapping of plain data, ready for JSON.
    """
    devices = jax.devices()
    return {
        "command": list(sys.argv),
        "git": {"interp_jax": _commit_of_file(Path(__file__)), "working_directory": _commit(Path.cwd())},
        "versions": {"python": platform.python_version()} | _versions(),
        "patch_digests": dict(patch_digests or {}),
        "seeds": dict(seeds or {}),
        "device": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "machine": platform.platform(),
        },
        "jax_config": {name: getattr(jax.config, name) for name in _SWITCHES}
        | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")},
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit(folder: Path) -> dict[str, Any] | None:
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain"))}


def _commit_of_file(file: Path) -> dict[str, Any] | None:
    # An installed copy may lie inside somebody else's repository: only a file that git tracks has a commit there.
    is_tracked = _git(file.parent, "ls-files", "--error-unmatch", file.name) is not None
    return _commit(file.parent) if is_tracked else None


def _git(folder: Path, *arguments: str) -> str | None:
    # Reading must never take the lock another git process waits for.
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
