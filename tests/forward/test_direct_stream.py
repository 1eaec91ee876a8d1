"""Streams without a buffer: whose rows come, that they stay on the device, and that a place can be returned to.

Source: interp_jax.
"""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

import interp_jax as ij
from interp_jax.core.errors import InvalidInputError
from interp_jax.data.text_streams import pack, packed_rows
from interp_jax.forward.direct_stream import DirectStream
from interp_jax.forward.site_values import Keep, activations_of
from interp_jax.transforms.compilations import count_compilations
from tests.forward.streams import N_CTX, TELLING, numbered, same, take, tokens_in

EVERYTHING = Keep(first_position=0, special_tokens=True)


@pytest.mark.parametrize(("keep", "batch_size"), [(EVERYTHING, 12), (EVERYTHING, 7), (Keep(first_position=2), 9)])
def test_rows_come_in_the_order_of_the_sequences(keep: Keep, batch_size: int) -> None:
    packed = numbered(11)
    stream = DirectStream(TELLING, packed, "embed", batch_size=batch_size, seed=3, keep=keep)
    assert isinstance(stream.next_batch()["embed"], jax.Array)
    first = stream.n_sequences_read
    for _ in range(8):
        batch = stream.next_batch()
        assert batch["embed"].shape == (batch_size, 2)
        order = packed.order(start=first, count=stream.n_sequences_read - first, seed=3)
        expected = packed[order][:, keep.first_position :].reshape(-1)[:batch_size]
        np.testing.assert_array_equal(tokens_in(batch), expected)
        # No more sequences than needed.
        assert len(order) == -(-batch_size // (N_CTX - keep.first_position))
        first = stream.n_sequences_read


def test_what_does_not_count_is_left_out() -> None:
    train, _ = pack(
        ["3 4 5 6", "7 8", "9 10 11 12 13"],
        lambda text: [int(word) for word in text.split()],
        n_ctx=4,
        separator=1,
        holdout=0,
    )
    seen = [tokens_in(batch) for batch in take(DirectStream(TELLING, train, "embed", batch_size=4), 20)]
    assert set(np.concatenate(seen).tolist()) == {4, 5, 6, 7, 8, 10, 11, 12}
    padded = packed_rows([[5, 6, -1, -1], [-1, 7, 8, 9]])
    seen = [tokens_in(b) for b in take(DirectStream(TELLING, padded, "embed", batch_size=4, keep=EVERYTHING), 9)]
    assert set(np.concatenate(seen).tolist()) == {5, 6, 7, 8, 9}


def test_rows_are_the_models_own_and_few_programs_are_compiled(tiny_llama, rng) -> None:
    packed = packed_rows(rng.integers(0, 250, (16, 10)))
    sites = ["0.mlp_out", "1.resid_pre"]
    stream = DirectStream(tiny_llama, packed, sites, batch_size=30)
    with count_compilations() as compiled:
        batches = take(stream, 4)
    assert [entry.name for entry in compiled].count("rows of sites") == 1
    truth = activations_of(tiny_llama, packed[packed.order(start=0, count=16, seed=0)], sites)
    for batch, start in zip(batches, itertools.count(step=4)):
        for name, rows in batch.items():
            expected = truth[name][start : start + 4, 1:].reshape(36, -1)[:30]
            np.testing.assert_allclose(rows, expected, atol=1e-5)


def test_a_place_can_be_returned_to() -> None:
    def made(seed: int = 5) -> DirectStream:
        return DirectStream(TELLING, numbered(11), "embed", batch_size=7, seed=seed)

    stream = made()
    take(stream, 3)
    state, rest = stream.state(), take(stream, 5)
    again = made()
    again.restore(state)
    assert same(take(again, 5), rest)
    with pytest.raises(InvalidInputError, match="seed"):
        made(seed=6).restore(state)


def test_saes_are_trained_on_it_as_on_arrays(tiny_llama, rng) -> None:
    packed = packed_rows(rng.integers(0, 250, (8, 10)))
    rule = ij.sae.StepRule(ij.sae.TopK(4), n_steps=3)
    config = ij.sae.TrainConfig(rule, n_latents=32, sites=("1.resid_pre",), n_sample_batches=1)
    trained = ij.sae.train(config, DirectStream(tiny_llama, packed, "1.resid_pre", batch_size=18), progress=False)
    batches = take(DirectStream(tiny_llama, packed, "1.resid_pre", batch_size=18), 4)

    class Replay(ij.ArrayStream):
        def next_batch(self) -> dict[str, np.ndarray]:
            return batches.pop(0)

    replay = Replay({"1.resid_pre": batches[0]["1.resid_pre"]}, 18)
    by_array = ij.sae.train(config, replay, progress=False)
    for name, value in trained.saes[0].params.items():
        np.testing.assert_array_equal(value, by_array.saes[0].params[name], err_msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed"),
        ({"keep": Keep(first_position=N_CTX)}, "No token of"),
    ],
    ids=str,
)
def test_impossible_streams_are_refused(options, message) -> None:
    with pytest.raises(InvalidInputError, match=message):
        DirectStream(TELLING, numbered(4), "embed", **({"batch_size": 4} | options)).next_batch()
