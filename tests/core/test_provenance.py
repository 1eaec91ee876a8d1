"""Provenance: commits and their state, against git itself in repositories made for the purpose.

Source: interp_jax.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from interp_jax.core import provenance as module
from interp_jax.core.provenance import provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "experiment.py").write_text("x = 1\n")
    (tmp_path / ".gitignore").write_text("runs/\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "First")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def working_directory() -> dict | None:
    return provenance()["git"]["working_directory"]


def test_commit_and_state(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    assert working_directory() == {"commit": commit, "dirty": False}
    (repository / "experiment.py").write_text("x = 2\n")
    assert working_directory() == {"commit": commit, "dirty": True}


def test_a_new_file_counts_and_an_ignored_one_does_not(repository: Path) -> None:
    (repository / "runs").mkdir()
    (repository / "runs" / "result").write_text("")
    assert working_directory() == {"commit": git(repository, "rev-parse", "HEAD"), "dirty": False}
    (repository / "new.py").write_text("")
    assert (working_directory() or {})["dirty"] is True


def test_outside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert working_directory() is None


def test_a_repository_without_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "--quiet")
    monkeypatch.chdir(tmp_path)
    assert working_directory() is None


def test_a_machine_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert provenance()["git"] == {"interp_jax": None, "working_directory": None}


def test_an_installed_copy_does_not_claim_its_neighbours_commit(repository: Path) -> None:
    installed = repository / "runs" / "site-packages"
    installed.mkdir(parents=True)
    copy = shutil.copy(module.__file__, installed)
    program = f"import runpy, json; print(json.dumps(runpy.run_path({copy!r})['provenance']()['git']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["interp_jax"] is None
    assert found["working_directory"]["commit"] == git(repository, "rev-parse", "HEAD")


def test_versions_device_and_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["interp-jax", "demo"])
    record = provenance(seeds={"init": 3}, patch_digests={"transformers_llama": {"forward": "ab"}})
    assert record["command"] == ["interp-jax", "demo"]
    assert record["versions"]["jax"] == jax.__version__
    assert record["versions"]["interp-jax"] == importlib.metadata.version("interp-jax")
    assert record["device"]["platform"] == "cpu"
    assert record["device"]["count"] == jax.device_count()
    assert "xla_force_host_platform_device_count" in record["jax_config"]["XLA_FLAGS"]
    with jax.default_matmul_precision("highest"):
        assert provenance()["jax_config"]["jax_default_matmul_precision"] == "highest"
    assert record["seeds"] == {"init": 3}
    assert record["patch_digests"] == {"transformers_llama": {"forward": "ab"}}


def test_it_is_ready_for_json() -> None:
    assert json.loads(json.dumps(provenance())) == provenance()
