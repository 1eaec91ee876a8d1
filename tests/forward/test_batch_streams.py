"""The protocol of streams, held by each kind of stream; and rows of arrays as a stream.

Source: interp_jax.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError
from interp_jax.forward.activation_files import write_activations
from interp_jax.forward.batch_streams import ArrayStream, BatchStream
from interp_jax.forward.shards import ShardStream
from interp_jax.forward.store import ActivationStream, Buffer
from tests.forward.streams import N_CTX, TELLING, numbered, same, take, tokens_in

SITES = ["embed", "mlp_out"]
SMALL = Buffer(n_rows=4 * 4 * N_CTX, sequences_per_pass=4)

Maker = Callable[..., BatchStream]


def arrays(**options: Any) -> BatchStream:
    tokens = np.arange(1, 43, dtype=np.float32)[:, None]
    return ArrayStream({"embed": np.concatenate([tokens, tokens], 1), "0.mlp_out": -tokens}, **options)


def harvested(**options: Any) -> BatchStream:
    return ActivationStream(TELLING, numbered(7), SITES, buffer=SMALL, **options)


@pytest.fixture(params=["arrays", "harvested", "shards", "shards without a thread"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Maker:
    """A function that makes one kind of stream of the same rows."""
    if request.param in ("arrays", "harvested"):
        return arrays if request.param == "arrays" else harvested
    folder = write_activations(TELLING, numbered(7), SITES, tmp_path / "rows", shard_bytes=100, sequences_per_pass=4)
    return lambda **options: ShardStream(folder, read_ahead=3 if request.param == "shards" else 0, **options)


def test_batches_are_as_the_protocol_says(make: Maker) -> None:
    stream = make(batch_size=8, seed=1)
    assert stream.batch_size == 8
    assert dict(stream.widths) == {"embed": 2, "0.mlp_out": 1}
    assert list(stream.widths) == ["embed", "0.mlp_out"]
    for batch in take(stream, 12):
        assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
            "embed": ((8, 2), "float32"),
            "0.mlp_out": ((8, 1), "float32"),
        }
        tokens_in(batch)  # row i is of the same token everywhere
        batch["embed"][:] = -1  # it is the caller's
    assert (tokens_in(stream.next_batch()) > 0).all()


@pytest.mark.parametrize("n_before", [0, 1, 5, 14])
def test_it_goes_on_from_any_place_to_the_last_bit(make: Maker, n_before: int) -> None:
    stream = make(batch_size=8, seed=2)
    take(stream, n_before)
    state = stream.state()
    ahead = take(stream, 15)
    stream.restore(state)
    assert same(take(stream, 15), ahead)
    other = make(batch_size=8, seed=2)
    take(other, 3)
    other.restore(state)
    assert same(take(other, 15), ahead)


def test_a_state_fits_a_checkpoint(make: Maker, tmp_path: Path) -> None:
    stream = make(batch_size=8, seed=3)
    take(stream, 4)
    state = stream.state()
    ahead = take(stream, 9)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", {"stream": state})
        checkpointer.wait_until_finished()
        read = checkpointer.restore(tmp_path / "checkpoint", {"stream": state})
    other = make(batch_size=8, seed=3)
    other.restore(read["stream"])
    assert same(take(other, 9), ahead)


def test_the_seed_decides_alone(make: Maker) -> None:
    first, again, other = make(batch_size=8, seed=4), make(batch_size=8, seed=4), make(batch_size=8, seed=5)
    np.random.seed(0)  # noqa: NPY002 - global state must not matter
    batches = take(first, 6)
    np.random.seed(1)  # noqa: NPY002
    assert same(take(again, 6), batches)
    assert not same(take(other, 6), batches)


def test_a_state_of_another_stream_is_refused(make: Maker) -> None:
    stream = make(batch_size=8, seed=0)
    with pytest.raises(InvalidInputError, match=r"The state of a stream with seed 1, batch_size 4 was given") as error:
        stream.restore(make(batch_size=4, seed=1).state())
    assert "Expected: that of a stream like this one: seed 0, batch_size 8" in str(error.value)
    assert "Fix: make the stream as it was made for the checkpoint, or start anew." in str(error.value)
    with pytest.raises(InvalidInputError, match="seed unknown, batch_size unknown"):
        stream.restore({})
    hashed = next(name for name in ("arrays", "sites", "files") if name in stream.state()["config"])
    state = stream.state()
    state["config"][hashed] += 1
    with pytest.raises(InvalidInputError, match=f"with another {hashed} was given"):
        stream.restore(state)


def test_the_speed_is_told_without_the_first_batch(make: Maker) -> None:
    stream = make(batch_size=8)
    assert math.isnan(stream.throughput.rows_per_s)
    stream.next_batch()
    assert stream.throughput == (0, 0.0)
    assert math.isnan(stream.throughput.seconds_for(10))
    take(stream, 5)
    assert stream.throughput.n_rows == 40
    assert stream.throughput.seconds_for(400) == pytest.approx(10 * stream.throughput.seconds)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size=0 was given"),
        ({"batch_size": 2.5}, "batch_size=2.5 was given"),
        ({"batch_size": 8, "seed": -1}, "seed=-1 was given"),
        ({"batch_size": 8, "seed": 0.5}, "seed=0.5 was given"),
    ],
)
def test_numbers_that_make_no_stream(make: Maker, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        make(**options)


def test_rows_of_arrays_come_once_per_epoch() -> None:
    stream = ArrayStream(np.arange(10.0)[:, None], batch_size=4, seed=0)
    rows = np.concatenate([batch["x"][:, 0] for batch in take(stream, 10)])
    for epoch in range(4):
        assert sorted(rows[10 * epoch : 10 * (epoch + 1)]) == [*range(10)]
    assert rows[:10].tolist() != rows[10:20].tolist()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (np.zeros(3), r"unfit shapes were given \(x \[3\]\)(.|\n)*Fix: flatten the axes"),
        ({"a": np.zeros((3, 2)), "b": np.zeros((4, 2))}, r"a \[3, 2\], b \[4, 2\]"),
        ({}, r"unfit shapes were given \(none\)"),
        (np.zeros((0, 2)), r"'x' has no rows"),
        (np.array([[1.0, np.inf], [np.nan, 1.0]]), r"'x' has 2 numbers that are not finite(.|\n)*of finite numbers"),
    ],
)
def test_arrays_that_make_no_stream(rows: Any, words: str) -> None:
    with pytest.raises((ShapeError, InvalidInputError), match=words):
        ArrayStream(rows, batch_size=2)
