"""Streams of batches: what a trainer reads from, wherever the rows come from.

A stream does three things (`BatchStream`): it hands out the next batch, it says where it stands, and it goes on from
there. It never ends. An array makes the simplest one:

>>> stream = ArrayStream(np.arange(6.0)[:, None], batch_size=4, seed=0)
>>> state = stream.state()
>>> first = stream.next_batch()["x"]
>>> stream.restore(state)
>>> bool((stream.next_batch()["x"] == first).all()), first.shape
(True, (4, 1))

Sharp edges: a batch may hold the last rows of one epoch and the first of the next; no row is left out. A state fits
only a stream that was made alike, and says what differs otherwise.

Source: interp_jax.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part
from interp_jax.data.text_streams import Packed, shuffled


class Throughput(NamedTuple):
    """How fast a stream has been in this process, its first batch (which compiles) not counted.

    Args:
        n_rows: Rows handed out.
        seconds: Time spent in `next_batch`.
    """

    n_rows: int = 0
    seconds: float = 0.0

    @property
    def rows_per_s(self) -> float:
        """Rows per second of `next_batch`; NaN before the second batch."""
        return self.n_rows / self.seconds if self.seconds else float("nan")

    def seconds_for(self, n_rows: int) -> float:
        """The time `next_batch` will take for `n_rows` more."""
        return n_rows / self.rows_per_s if self.n_rows else float("nan")


class BatchStream(Protocol):
    """An endless stream of batches whose place can be noted and returned to."""

    @property
    def batch_size(self) -> int:
        """Rows per batch."""
        ...

    @property
    def widths(self) -> Mapping[str, int]:
        """Site name to the size of its rows, in the order of the forward pass."""
        ...

    @property
    def throughput(self) -> Throughput:
        """How fast it has been."""
        ...

    def next_batch(self) -> Mapping[str, np.ndarray | jax.Array]:
        """The next batch: site name to `[batch_size, width]`. The arrays are the caller's."""
        ...

    def state(self) -> dict[str, Any]:
        """Where the stream stands: a pytree of NumPy arrays and integers, copied, that a checkpoint can hold."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state` of a stream that was made alike.

        Raises:
            InvalidInputError: It is the state of a stream that was made otherwise.
        """
        ...


class TimedStream:
    """What all streams share: a count of what `next_batch` hands out, and of the time it takes."""

    def __init__(self) -> None:
        self._n_batches = 0
        self._throughput = Throughput()

    @property
    def throughput(self) -> Throughput:
        """How fast it has been."""
        return self._throughput

    def _count(self, started: float, n_rows: int) -> None:
        self._n_batches += 1
        if self._n_batches > 1:
            so_far = self._throughput
            elapsed = time.perf_counter() - started
            self._throughput = Throughput(so_far.n_rows + n_rows, so_far.seconds + elapsed)


class ArrayStream(TimedStream):
    """Batches of rows of arrays, in a new order each epoch.

    Args:
        arrays: Rows `[n, d]`, which count as a site called "x"; or site name to such rows, equally many.
        batch_size: Rows per batch.
        seed: Of the orders.

    Raises:
        ShapeError: Not arrays `[n, d]` of equally many rows.
        InvalidInputError: There is no row, a number is not finite, or the batch size is not positive.
    """

    def __init__(self, arrays: Any, batch_size: int, *, seed: int = 0):
        super().__init__()
        table = dict(arrays) if isinstance(arrays, Mapping) else {"x": arrays}
        self._arrays = {str(name): np.asarray(array) for name, array in table.items()}
        self._check(batch_size, seed)
        self._n_rows = len(next(iter(self._arrays.values())))
        self.batch_size, self._seed, self._next_row = batch_size, seed, 0
        contents = [part for name, array in self._arrays.items() for part in (name.encode(), array.tobytes())]
        self._config = {"seed": seed, "batch_size": batch_size, "arrays": checksum(*contents)}

    @property
    def widths(self) -> dict[str, int]:
        """Site name to the size of its rows."""
        return {name: array.shape[1] for name, array in self._arrays.items()}

    def next_batch(self) -> dict[str, np.ndarray]:
        """The next batch: site name to `[batch_size, width]`."""
        started = time.perf_counter()
        epochs, within = np.divmod(np.arange(self._next_row, self._next_row + self.batch_size), self._n_rows)
        rows = np.concatenate(
            [shuffled(self._n_rows, self._seed, epoch)[within[epochs == epoch]] for epoch in np.unique(epochs).tolist()]
        )
        batch = {name: array[rows] for name, array in self._arrays.items()}
        self._next_row += self.batch_size
        self._count(started, self.batch_size)
        return batch

    def state(self) -> dict[str, Any]:
        """Where the stream stands."""
        return {"config": dict(self._config), "next_row": self._next_row}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state` of a stream that was made alike."""
        check_config(state, self._config, where="ArrayStream.restore")
        self._next_row = int(state["next_row"])

    def _check(self, batch_size: int, seed: int) -> None:
        check_positive(where="ArrayStream", batch_size=batch_size)
        check_seed(seed, where="ArrayStream")
        shapes = {name: array.shape for name, array in self._arrays.items()}
        if not shapes or any(len(shape) != 2 for shape in shapes.values()) or len({s[0] for s in shapes.values()}) > 1:
            listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "none"
            raise ShapeError(
                four_part(
                    f"Arrays of unfit shapes were given ({listed})",
                    where="ArrayStream",
                    expected="rows [n, d], equally many in each.",
                    fix="flatten the axes before the last: array.reshape(-1, array.shape[-1]).",
                )
            )
        for name, array in self._arrays.items():
            n_bad = int((~np.isfinite(array)).sum())
            if not array.size or n_bad:
                raise InvalidInputError(
                    four_part(
                        f"{name!r} has {f'{n_bad:,} numbers that are not finite' if n_bad else 'no rows'}",
                        where="ArrayStream",
                        expected="at least one row, of finite numbers.",
                        fix="look at where the array comes from.",
                    )
                )


def checksum(*parts: bytes) -> int:
    """31 bits of all `parts`, which any checkpoint can hold."""
    return zlib.crc32(b"\0".join(parts)) & 0x7FFFFFFF


def check_config(state: Mapping[str, Any], config: Mapping[str, int], *, where: str) -> None:
    """Refuse the state of a stream that was made otherwise.

    Args:
        state: The state.
        config: What this stream was made with, as integers.
        where: The public call.

    Raises:
        InvalidInputError: They differ.
    """
    given = state.get("config", {}) if isinstance(state, Mapping) else {}
    hashed = ("text", "sites", "arrays", "files")
    differing = [
        f"another {name}" if name in hashed else f"{name} {int(given[name]) if name in given else 'unknown'}"
        for name, value in config.items()
        if name not in given or int(given[name]) != value
    ]
    if differing:
        expected = ", ".join(f"{name} {value}" for name, value in config.items() if name not in hashed)
        raise InvalidInputError(
            four_part(
                f"The state of a stream with {', '.join(differing)} was given",
                where=where,
                expected=f"that of a stream like this one: {expected}, and the same text and sites.",
                fix="make the stream as it was made for the checkpoint, or start anew.",
            )
        )


def check_text(packed: Any, *, where: str) -> None:
    """Refuse what is no packed text, or empty; `where` names the public call."""
    if not isinstance(packed, Packed):
        raise InvalidInputError(
            four_part(
                f"A text of type {type(packed).__name__} was given",
                where=where,
                expected="packed sequences of tokens.",
                fix="give one part of it, pack(...).train; tokens of your own go through packed_rows(tokens).",
            )
        )
    if not len(packed):
        raise InvalidInputError(
            four_part(
                f"A text without sequences ({packed!r}) was given",
                where=where,
                expected="at least one sequence.",
                fix="hold out a share of the text, pack(..., holdout=0.1), or give pack(...).train.",
            )
        )


def check_positive(*, where: str, **sizes: int) -> None:
    """Refuse sizes that are no positive integers; `where` names the public call."""
    wrong = [
        f"{name}={size!r}" for name, size in sizes.items() if isinstance(size, bool) or int(size) != size or size < 1
    ]
    if wrong:
        raise InvalidInputError(
            four_part(
                f"{', '.join(wrong)} was given", where=where, expected="positive integers.", fix="choose 1 or more."
            )
        )


def check_seed(seed: Any, *, where: str) -> None:
    """Refuse a seed that is no integer from 0 to 2**31 - 1; `where` names the public call."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**31:
        raise InvalidInputError(
            four_part(
                f"seed={seed!r} was given", where=where, expected="an integer from 0 to 2**31 - 1.", fix="choose one."
            )
        )
