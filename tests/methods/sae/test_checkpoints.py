"""Checkpoints where the disk fails: what is lost, what is said, and what is left behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from interp_jax.core.errors import ExportError, LoadError
from interp_jax.forward.batch_streams import ArrayStream
from interp_jax.methods.sae.checkpoints import Checkpoints
from interp_jax.methods.sae.relu import ReLU
from interp_jax.methods.sae.train_config import TrainConfig
from interp_jax.methods.sae.train_step import StepRule
from interp_jax.methods.sae.training import train

TREE = {"x": np.arange(3.0)}


def full(*_, **__):
    raise OSError(28, "No space left on device")


def small_run(directory: Path, n_steps: int = 4, **options):
    stream = ArrayStream(np.random.default_rng(0).normal(size=(32, 3)), batch_size=8, seed=0)
    config = TrainConfig(StepRule(ReLU(), n_steps=n_steps), n_latents=4, sites=("x",), n_sample_batches=1)
    return train(config, stream, directory=directory, progress=False, **options)


def test_a_step_that_failed_in_the_background_costs_no_other(tmp_path, monkeypatch) -> None:
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(1, TREE)
        checkpoints.wait()
        checkpoints.save(2, TREE)
        half = tmp_path / "steps" / "2.orbax-checkpoint-tmp"
        finish = checkpoints._manager.wait_until_finished

        def fail_once() -> None:
            monkeypatch.setattr(checkpoints._manager, "wait_until_finished", finish)
            finish()
            half.mkdir()
            full()

        monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail_once)
        # It comes to light when the next one is saved, under its own number; the next one is written all the same.
        with pytest.warns(UserWarning, match="step 2 could not be written.*No space left"):
            checkpoints.save(3, TREE)
        assert not half.exists()
        checkpoints.wait()
        found = checkpoints.latest()
        assert found is not None and found[0] == 3


def test_what_a_killed_run_left_half_written_is_removed(tmp_path) -> None:
    half = tmp_path / "steps" / "7.orbax-checkpoint-tmp" / "default"
    half.mkdir(parents=True)
    with Checkpoints(tmp_path, {}) as checkpoints:
        assert not half.parent.exists() and checkpoints.latest() is None


@pytest.mark.parametrize("content", ["", '{"seed": ', "[1]"])
def test_a_damaged_configuration_is_named(content, tmp_path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(LoadError, match=r"An unusable config\.json") as info:
        Checkpoints(tmp_path, {})
    assert str(tmp_path) in str(info.value) and "Fix: start anew" in str(info.value)


def test_a_full_disk_leaves_no_half_configuration(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ExportError, match=r"cannot be written to .*No space left") as info:
        Checkpoints(tmp_path / "run", {})
    assert "Fix: free some space" in str(info.value)
    monkeypatch.undo()
    assert not (tmp_path / "run" / "config.json").exists()
    with Checkpoints(tmp_path / "run", {}) as checkpoints:
        assert checkpoints.latest() is None


def test_a_place_that_is_no_folder(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ExportError, match="A folder that cannot be written to") as info:
            small_run(directory)
        assert str(directory) in str(info.value) and "name another directory" in str(info.value)


def test_a_log_that_cannot_be_written_does_not_stop_the_run(tmp_path, monkeypatch) -> None:
    opened = Path.open

    def no_appending(path: Path, mode: str = "r", *args, **options):
        return full() if mode == "a" else opened(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", no_appending)
    with pytest.warns(UserWarning, match="Training goes on") as seen:
        result = small_run(tmp_path, log_every=1)
    said = [str(warning.message) for warning in seen if "log.jsonl" in str(warning.message)]
    assert len(said) == 1 and "No space left" in said[0]
    assert [entry["step"] for entry in result.log] == [1, 2, 3, 4]
    assert (tmp_path / "log.jsonl").read_text() == "" and (tmp_path / "steps" / "4").is_dir()
