"""The activation store: whose rows come, how often, how well mixed, and what happens to the ones that are no numbers.

Source: interp_jax.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, UnknownNameError
from interp_jax.data.text_streams import pack, packed_rows
from interp_jax.forward.site_values import Keep, NotFiniteError, activations_of
from interp_jax.forward.store import ActivationStream, Buffer
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import Upstream
from interp_jax.transforms.compilations import count_compilations
from interp_jax.transforms.sowing import sow
from tests.forward.streams import N_CTX, TELLING, numbered, same, take, tokens_in

EVERYTHING = Keep(first_position=0, special_tokens=True)


def words(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def left_in(stream: ActivationStream) -> np.ndarray:
    """The tokens whose rows are in the buffer, still to come."""
    state = stream.state()
    slots = state["order"][state["position"] : state["n_live"]]
    assert len(np.unique(state["order"])) == len(state["order"])
    return state["buffer"]["embed"][slots, 0].astype(np.int64)


@pytest.mark.parametrize("keep", [EVERYTHING, Keep(first_position=2)])
def test_every_row_that_was_read_comes_once(keep: Keep) -> None:
    packed = numbered(11)
    buffer = Buffer(n_rows=8 * N_CTX + 5, sequences_per_pass=4)
    stream = ActivationStream(TELLING, packed, "embed", batch_size=7, seed=3, keep=keep, buffer=buffer)
    seen: list[int] = []
    for _ in range(60):
        seen += tokens_in(stream.next_batch()).tolist()
        order = packed.order(start=0, count=stream.n_sequences_read, seed=3)
        read = packed[order][:, keep.first_position :].reshape(-1)
        assert Counter(read.tolist()) == Counter([*seen, *left_in(stream).tolist()])
        assert len(left_in(stream)) >= buffer.n_rows // 2 - 7
    assert stream.n_sequences_read > 3 * len(packed)


def test_special_tokens_padding_and_the_first_position_are_left_out() -> None:
    train, _ = pack(["3 4 5 6", "7 8", "9 10 11 12 13"], words, n_ctx=4, separator=1, holdout=0)
    small = Buffer(n_rows=16, sequences_per_pass=2)
    # Rows: 3 4 5 6 | 1 7 8 1 | 9 10 11 12; the last token fills no sequence.
    stream = ActivationStream(TELLING, train, "embed", batch_size=4, buffer=small)
    assert set(np.concatenate([tokens_in(batch) for batch in take(stream, 20)])) == {4, 5, 6, 7, 8, 10, 11, 12}
    stream = ActivationStream(TELLING, train, "embed", batch_size=4, buffer=small, keep=EVERYTHING)
    assert set(np.concatenate([tokens_in(batch) for batch in take(stream, 20)])) == {*range(1, 13)} - {2}
    padded = packed_rows([[5, 6, -1, -1], [-1, 7, 8, 9]])
    stream = ActivationStream(TELLING, padded, "embed", batch_size=4, buffer=small, keep=EVERYTHING)
    assert set(np.concatenate([tokens_in(batch) for batch in take(stream, 9)])) == {5, 6, 7, 8, 9}


def test_rows_are_the_models_own(tiny_llama, rng) -> None:
    lm = tiny_llama
    packed = packed_rows(rng.integers(0, 250, (8, 10)))
    sites = ["0.mlp_out", "1.resid_pre"]  # what a transcoder writes to and reads from, say
    small = Buffer(n_rows=80, sequences_per_pass=4)
    stream = ActivationStream(lm, packed, sites, batch_size=16, buffer=small)
    with count_compilations() as compiled:
        batches = take(stream, 8)
    assert [entry.name for entry in compiled].count("values of sites") == 1
    truth = {name: value[:, 1:].reshape(72, -1) for name, value in activations_of(lm, packed[:], sites).items()}
    for batch in batches:
        for row in range(16):
            distance = abs(truth["0.mlp_out"] - batch["0.mlp_out"][row]).max(1)
            (candidates,) = np.nonzero(distance < 1e-4)
            # The other site's row is of the same token.
            assert any(abs(truth["1.resid_pre"][i] - batch["1.resid_pre"][row]).max() < 1e-3 for i in candidates)
    with count_compilations() as compiled:
        take(ActivationStream(lm, packed, sites, batch_size=32, seed=1, buffer=small), 4)
    assert len(compiled) == 0


def test_tokens_of_one_sequence_are_spread() -> None:
    # Rows straight from the model would hold whole sequences: 63 pairs of 64 rows in 2 sequences of 32.
    packed = numbered(512, 32)
    buffer = Buffer(n_rows=256 * 32, sequences_per_pass=16)
    stream = ActivationStream(TELLING, packed, "embed", batch_size=64, keep=EVERYTHING, buffer=buffer)
    pairs = 0
    for batch in take(stream, 100):
        per_sequence = np.bincount(tokens_in(batch) // 32)
        pairs += int((per_sequence * (per_sequence - 1)).sum() // 2)
    # Drawn from 256 whole sequences without regard to order: C(64, 2) * 31 / (256 * 32 - 1) = 7.6 a batch.
    assert 5 < pairs / 100 < 11


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_buffer_lies_on_disk_if_asked(dtype: str, tmp_path: Path) -> None:
    packed = numbered(20)
    options: dict[str, Any] = {"n_rows": 16 * N_CTX, "sequences_per_pass": 4, "dtype": dtype}
    in_memory = ActivationStream(TELLING, packed, ["embed", "mlp_out"], batch_size=8, buffer=Buffer(**options))
    on_disk = ActivationStream(
        TELLING,
        packed,
        ["embed", "mlp_out"],
        batch_size=8,
        buffer=Buffer(**options, directory=str(tmp_path / "buffer")),
    )
    assert (
        sum(path.stat().st_size for path in (tmp_path / "buffer").iterdir())
        == 16 * N_CTX * 3 * jnp.dtype(dtype).itemsize
    )
    state = in_memory.state()
    batches = take(in_memory, 30)
    assert same(take(on_disk, 30), batches)
    assert batches[0]["embed"].dtype.name == dtype
    state, ahead = in_memory.state(), take(in_memory, 20)
    on_disk.restore(state)
    assert same(take(on_disk, 20), ahead)


def faulty(token: int) -> LanguageModel:
    """A model that has an infinity for one token."""

    def forward(params: Any, tokens: Any) -> Any:
        value = jnp.where(tokens == token, jnp.inf, tokens.astype(jnp.float32))[..., None]
        return sow(jnp.concatenate([value, value, params * value], -1), name="embed")

    return LanguageModel(Upstream("faulty", forward), jnp.zeros((), jnp.float32), name="faulty")


def test_numbers_that_are_not_finite_are_named_and_passed_over() -> None:
    packed = numbered(12)
    sequence, small = 7, Buffer(n_rows=12 * N_CTX, sequences_per_pass=2)
    stream = ActivationStream(faulty(sequence * N_CTX + 3), packed, "embed", batch_size=6, buffer=small)
    tokens: list[int] = []
    messages = []
    while stream.n_sequences_read < 24:
        try:
            tokens += tokens_in(stream.next_batch()).tolist()
        except InvalidInputError as error:
            messages.append(str(error))
    # inf and inf * 0: all three numbers of one row, once in each epoch; a pass is 2 sequences, 5 rows each count.
    assert 2 <= len(messages) <= 3
    assert messages[0].startswith(f"embed has 3 of 30 numbers that are not finite, in sequence {sequence} in Activ")
    assert "Expected: finite activations." in messages[0]
    assert "Fix: look at these sequences (packed[number]); load the model in float32" in messages[0]
    assert sequence not in {token // N_CTX for token in tokens}
    assert len({token // N_CTX for token in tokens}) >= 9


def test_a_stated_number_of_faults_is_left_out() -> None:
    small = Buffer(n_rows=12 * N_CTX, sequences_per_pass=2)
    stream = ActivationStream(faulty(45), numbered(12), "embed", batch_size=6, buffer=small, n_faults_allowed=2)
    with (
        pytest.warns(UserWarning, match="left out") as warned,
        pytest.raises(NotFiniteError, match="embed has 3 of 30 numbers"),
    ):
        take(stream, 1000)
    words = "embed has 3 of 30 numbers that are not finite, in sequence 7: the 2 sequences of that pass are left out."
    assert [str(warning.message) for warning in warned] == [words] * 2
    # The count is part of the state: a run that is resumed does not begin anew to count.
    again = ActivationStream(faulty(45), numbered(12), "embed", batch_size=6, buffer=small, n_faults_allowed=3)
    again.restore(stream.state())
    with pytest.raises(NotFiniteError):
        take(again, 100)


def test_it_goes_on_the_same_after_a_fault() -> None:
    small = Buffer(n_rows=12 * N_CTX, sequences_per_pass=2)

    def batches(stream: ActivationStream, n: int) -> list[dict[str, np.ndarray]]:
        found = []
        while len(found) < n:
            try:
                found.append(stream.next_batch())
            except InvalidInputError:
                # What was read before the fault is in the state, though it has not been shuffled yet.
                stream.restore(stream.state())
        return found

    one, two = (ActivationStream(faulty(25), numbered(12), "embed", batch_size=6, buffer=small) for _ in range(2))
    ahead = batches(one, 40)
    assert same(batches(two, 25) + batches(two, 15), ahead)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"packed": [[1, 2]]}, InvalidInputError, r"A text of type list was given(.|\n)*packed_rows\(tokens\)"),
        ({"sites": "embde"}, UnknownNameError, r"Unknown site 'embde' in ActivationStream(.|\n)*Did you mean 'embed'"),
        ({"batch_size": 40}, InvalidInputError, r"A buffer of 48 rows(.|\n)*Buffer\(n_rows=80\)"),
        ({"buffer": Buffer(n_rows=30, sequences_per_pass=4)}, InvalidInputError, r"4 sequences of 6(.|\n)*n_rows=48"),
        ({"buffer": Buffer(sequences_per_pass=0)}, InvalidInputError, "sequences_per_pass=0"),
        ({"keep": Keep(first_position=6)}, InvalidInputError, r"No token of rows counts(.|\n)*Keep\(first_position=0"),
    ],
)
def test_what_makes_no_stream(options: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {
        "packed": numbered(9),
        "sites": "embed",
        "batch_size": 8,
        "buffer": Buffer(n_rows=48, sequences_per_pass=4),
    }
    given |= options
    with pytest.raises(error, match=words):
        ActivationStream(TELLING, given.pop("packed"), given.pop("sites"), **given).next_batch()


def test_an_empty_part_makes_no_stream() -> None:
    _, held_out = pack(
        ["1 2 3 4"], lambda text: [int(word) for word in text.split()], n_ctx=2, separator=None, holdout=0
    )
    with pytest.raises(InvalidInputError, match=r"A text without sequences(.|\n)*pack\(\.\.\., holdout=0\.1\)"):
        ActivationStream(TELLING, held_out, "embed")


def test_a_folder_that_cannot_hold_the_buffer(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InvalidInputError, match=r"The buffer cannot be kept in(.|\n)*a folder with room for 1 MB"):
        ActivationStream(TELLING, numbered(9), "embed", batch_size=8, buffer=Buffer(directory=str(tmp_path / "file")))


@pytest.mark.slow
def test_on_smollm2(smollm2) -> None:
    train, held_out = pack("pydoc", smollm2, n_ctx=32)
    buffer = Buffer(n_rows=1024, sequences_per_pass=8)
    stream = ActivationStream(smollm2, train, "5.resid_post", batch_size=128, buffer=buffer)
    batches = np.concatenate([batch["5.resid_post"] for batch in take(stream, 8)])
    assert batches.shape == (1024, 576)
    read = train[train.order(start=0, count=stream.n_sequences_read, seed=0)]
    truth = np.asarray(smollm2.reap(read, "5.resid_post")["5.resid_post"])
    norms = np.linalg.norm(truth, axis=-1)
    # What stands first has many times the norm of the rest, and is left out.
    assert norms[:, 0].min() > 5 * np.median(norms[:, 1:])
    assert np.linalg.norm(batches, axis=-1).max() <= norms[:, 1:].max() * 1.001
    flat = truth[:, 1:].reshape(-1, 576)
    for row in batches[::64]:
        assert abs(flat - row).max(1).min() < 1e-3
    assert len(held_out) > 100
