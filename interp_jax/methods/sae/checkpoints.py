"""Checkpoints of a training run: written beside the training, whole or not at all, and read back to the last bit.

One folder per saved step, through Orbax; a folder appears under its name when it is complete. What is written is a
pytree of arrays and integers. A step that cannot be read (a torn file) is passed over for the one before, and a
step that cannot be written (a full disk) leaves those before as they were, and nothing of its own; both say so in a
warning.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as directory, Checkpoints(directory, {"n_latents": 5}) as checkpoints:
...     checkpoints.save(3, {"weights": np.arange(2.0), "n": 7})
...     checkpoints.wait()
...     step, tree = checkpoints.latest()
>>> step, tree
(3, {'n': 7, 'weights': array([0., 1.])})

Sharp edges: arrays come back as NumPy's, of the dtype they were saved in. A folder belongs to one configuration.

Source: interp_jax, on orbax-checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from interp_jax.core.errors import ExportError, LoadError, four_part

N_KEPT = 2


class Checkpoints:
    """The checkpoints of one run in a folder; close it, or use it in `with`.

    Args:
        directory: The folder; it is made.
        config: What the run was started with, as JSON data; a run with another one is refused.

    Raises:
        LoadError: The folder belongs to a run with another configuration, or does not say which.
        ExportError: The folder cannot be made or written to.
    """

    def __init__(self, directory: str | Path, config: dict[str, Any]):
        self._directory = Path(directory).absolute()
        self._steps, self._writing = self._directory / "steps", None
        try:
            self._check(config)
            self._steps.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExportError(
                four_part(
                    f"A folder that cannot be written to ({error})",
                    where=str(self._directory),
                    expected="a folder for the run's state, with room in it.",
                    fix="free some space, or name another directory.",
                )
            ) from error
        self._remove_parts()  # Of a run that was killed.
        options = ocp.CheckpointManagerOptions(max_to_keep=N_KEPT, enable_async_checkpointing=True)
        # Named, so that what a folder holds is known before anything was saved or read in this process.
        handler = ocp.PyTreeCheckpointHandler()
        self._manager = ocp.CheckpointManager(self._steps, options=options, item_handlers=handler)

    def _check(self, config: dict[str, Any]) -> None:
        path, given = self._directory / "config.json", json.loads(json.dumps(config))
        if not path.exists():
            self._directory.mkdir(parents=True, exist_ok=True)
            write_whole_text(path, json.dumps(given, indent=1, sort_keys=True))
            return
        saved = self._saved_config(path)
        differing = sorted(name for name in {*saved, *given} if saved.get(name) != given.get(name))
        if differing:
            lines = [f"    {name}: {given.get(name)!r}, there {saved.get(name)!r}" for name in differing]
            raise LoadError(
                four_part(
                    "A run with another configuration was given:\n" + "\n".join(lines) + "\n ",
                    where=str(self._directory),
                    expected="the configuration the checkpoints there were made with.",
                    fix="take up the run with that configuration, or name another directory.",
                )
            )

    def _saved_config(self, path: Path) -> dict[str, Any]:
        try:
            saved = json.loads(path.read_text())
            if not isinstance(saved, dict):
                raise ValueError(f"it holds a {type(saved).__name__}")
        except ValueError as error:
            raise LoadError(
                four_part(
                    f"An unusable {path.name} ({type(error).__name__}: {error})",
                    where=str(self._directory),
                    expected="the configuration of the run whose checkpoints are there.",
                    fix="start anew in another directory.",
                )
            ) from error
        return saved

    def save(self, step: int, tree: Any) -> None:
        """Write what a run is after a step, in the background; the step before is waited for.

        Args:
            step: Number of the step.
            tree: Arrays and integers; copied before this returns.
        """
        copied = jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)
        self.wait()  # Else its failure would be raised in place of this step's writing.
        self._writing = step
        self._tried(lambda: self._manager.save(step, args=ocp.args.PyTreeSave(copied)))

    def wait(self) -> None:
        """Return when what is being written is written, or has failed."""
        self._tried(self._manager.wait_until_finished)

    def latest(self) -> tuple[int, Any] | None:
        """The newest step that can be read, and its tree; None where there is none.

        Raises:
            LoadError: There are steps, and none can be read.
        """
        steps, reasons = sorted(self._manager.all_steps(), reverse=True), []
        for step in steps:
            try:
                return step, self._read(step)
            except Exception as error:
                # Whatever a torn file makes Orbax raise: the step before may be whole.
                reasons.append(f"step {step}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
                warnings.warn(f"Checkpoint {reasons[-1]}. It is passed over for the one before.", stacklevel=2)
        if not steps:
            return None
        raise LoadError(
            four_part(
                "Checkpoints that cannot be read:\n    " + "\n    ".join(reasons) + "\n ",
                where=str(self._directory),
                expected="at least one whole one.",
                fix="start anew in another directory.",
            )
        )

    def _read(self, step: int) -> Any:
        metadata = self._manager.item_metadata(step)
        tree = getattr(metadata, "tree", metadata)
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = self._manager.restore(step, args=ocp.args.PyTreeRestore(restore_args=restore_args))
        return jax.tree.map(_plain, restored)

    def _tried(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except (OSError, ValueError, RuntimeError) as error:
            self._remove_parts()
            warnings.warn(
                f"The checkpoint of step {self._writing} could not be written to {self._directory}: "
                f"{str(error).splitlines()[0]}. Training goes on; the checkpoints before it are whole.",
                stacklevel=3,
            )

    def _remove_parts(self) -> None:
        """What was begun and is not whole would take the room the next one needs."""
        for part in self._steps.glob("*orbax-checkpoint-tmp*"):
            shutil.rmtree(part, ignore_errors=True)

    def close(self) -> None:
        """Wait, and let go of the folder."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_whole_text(path: Path, text: str) -> None:
    """Give a file its name once all of it is on disk; what is there before is replaced.

    Args:
        path: The file.
        text: What is to be in it.

    Raises:
        OSError: It could not be written; nothing has changed.
    """
    part = path.with_name(f".{path.name}-part")
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _plain(leaf: Any) -> Any:
    array = np.asarray(leaf)
    return array.item() if array.ndim == 0 and np.issubdtype(array.dtype, np.int64) else array
