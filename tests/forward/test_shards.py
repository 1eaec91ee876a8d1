"""Activations on disk: every row once, every shard a sample of everything, whole or not at all, faults by name.

Source: interp_jax.
"""

from __future__ import annotations

import gc
import json
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import ExportError, InvalidInputError, LoadError
from interp_jax.data.text_streams import packed_rows
from interp_jax.forward import activation_files
from interp_jax.forward.activation_files import MANIFEST, read_manifest, write_activations, written_once
from interp_jax.forward.shards import ShardStream
from interp_jax.forward.site_values import Keep
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import Upstream
from interp_jax.transforms.sowing import sow
from tests.forward.streams import N_CTX, TELLING, numbered, same, take, tokens_in

SITES = ["embed", "mlp_out"]
ROW_BYTES = 12
EVERYTHING = Keep(first_position=0, special_tokens=True)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """The rows of 50 sequences, all but the first position, in 10 shards; dealt in many small deals."""
    return write_activations(
        TELLING, numbered(50), SITES, tmp_path / "rows", shard_bytes=25 * ROW_BYTES, sequences_per_pass=7
    )


def tokens_of_shard(folder: Path, number: int) -> np.ndarray:
    """Which tokens the rows in a shard are of, as they lie there."""
    embed = np.fromfile(folder / f"shard-{number:05d}-0.bin", np.float32).reshape(-1, 2)
    mlp_out = np.fromfile(folder / f"shard-{number:05d}-1.bin", np.float32)
    assert (mlp_out == -embed[:, 0]).all()
    return embed[:, 0].astype(int)


def test_every_row_is_in_one_shard(rows: Path) -> None:
    manifest = read_manifest(rows)
    assert (manifest.n_rows, manifest.n_sequences, len(manifest.shards)) == (250, 50, 10)
    assert (manifest.model, manifest.text, manifest.fingerprint) == ("telling", "rows", numbered(50).fingerprint)
    assert manifest.widths == {"embed": 2, "0.mlp_out": 1}
    assert manifest.dtypes == {"embed": "float32", "0.mlp_out": "float32"}
    tokens = [tokens_of_shard(rows, number) for number in range(10)]
    assert [len(one) for one in tokens] == [shard.n_rows for shard in manifest.shards] == [25] * 10
    assert sorted(np.concatenate(tokens)) == sorted(numbered(50)[:][:, 1:].reshape(-1))


def test_every_shard_is_a_sample_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 400 sequences, dealt in portions of 20, to 10 shards of 240 rows.
    monkeypatch.setattr(activation_files, "DEAL_BYTES", 20 * N_CTX * ROW_BYTES)
    folder = write_activations(
        TELLING,
        numbered(400),
        SITES,
        tmp_path / "rows",
        keep=EVERYTHING,
        shard_bytes=240 * ROW_BYTES,
        sequences_per_pass=8,
    )
    for number in range(10):
        tokens = tokens_of_shard(folder, number)
        assert 235 <= len(tokens) <= 245
        # A fourth of it is of each fourth of the text, and few sequences are there more than a few times.
        assert (abs(np.bincount(tokens // N_CTX // 100, minlength=4) - 60) <= 10).all()
        assert np.bincount(tokens // N_CTX).max() <= 5


def test_every_row_comes_once_per_epoch(rows: Path) -> None:
    with ShardStream(rows, batch_size=20, seed=1) as stream:
        batches = [tokens_in(batch) for batch in take(stream, 25)]
    tokens = np.concatenate(batches)
    epochs = [tokens[:250], tokens[250:]]
    for epoch in epochs:
        assert Counter(epoch.tolist()) == Counter(numbered(50)[:][:, 1:].reshape(-1).tolist())
    assert epochs[0].tolist() != epochs[1].tolist()
    # The shards are in another order in each, and so are the rows of each.
    shards = [set(tokens_of_shard(rows, number).tolist()) for number in range(10)]
    orders = [[next(i for i, s in enumerate(shards) if int(token) in s) for token in epoch[::25]] for epoch in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == [*range(10)]
    assert orders[0] != orders[1]


def test_the_thread_changes_nothing_and_ends(rows: Path) -> None:
    before = threading.active_count()
    plain = ShardStream(rows, batch_size=20, read_ahead=0)
    assert threading.active_count() == before
    batches = take(plain, 20)
    with ShardStream(rows, batch_size=20, read_ahead=5) as stream:
        assert same(take(stream, 10), batches[:10])
        assert threading.active_count() == before + 1
        state = stream.state()  # of what was handed out, not of what was read ahead
        stream.close()
        assert same(take(stream, 10), batches[10:])
        stream.restore(state)
        assert same(take(stream, 10), batches[10:])
    forgotten = ShardStream(rows, batch_size=20, read_ahead=5)
    take(forgotten, 2)
    del forgotten
    gc.collect()
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_keep_their_dtype(dtype: str, tmp_path: Path) -> None:
    text = packed_rows(np.arange(40).reshape(8, 5))
    folder = write_activations(TELLING, text, SITES, tmp_path / "rows", dtype=dtype, keep=EVERYTHING)
    (shard,) = read_manifest(folder).shards
    assert (folder / shard.files["embed"]).stat().st_size == 40 * 2 * jnp.dtype(dtype).itemsize
    stream = ShardStream(folder, batch_size=40, read_ahead=0)
    batch = stream.next_batch()
    assert batch["embed"].dtype.name == dtype
    assert sorted(tokens_in({name: value.astype(np.float32) for name, value in batch.items()})) == [*range(40)]


def test_seeds_deal_differently(tmp_path: Path) -> None:
    options: dict[str, Any] = {"shard_bytes": 25 * ROW_BYTES}
    folders = [
        write_activations(TELLING, numbered(50), SITES, tmp_path / name, seed=seed, **options)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    contents = [(folder / "shard-00003-0.bin").read_bytes() for folder in folders]
    assert contents[0] == contents[1] != contents[2]


FAULTS = {
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-4]), "shard-00004-0.bin has 196 of 200 bytes"),
    "missing": (lambda path: path.unlink(), "shard-00004-0.bin is missing"),
    "of other contents": (lambda path: path.write_bytes(bytes(200)), "shard-00004-0.bin has other contents"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_not_as_it_was_is_named(rows: Path, fault: str) -> None:
    damage, words = FAULTS[fault]
    damage(rows / "shard-00004-0.bin")
    with pytest.raises(LoadError, match=words) as error:
        take(ShardStream(rows, batch_size=50, read_ahead=2), 5)
    assert "Shards that are not as they were written" in str(error.value)
    assert "Fix: copy the folder again from where it was written" in str(error.value)


def test_files_that_vanish_while_they_are_read(rows: Path) -> None:
    stream = ShardStream(rows, batch_size=10, read_ahead=0)
    stream.next_batch()
    for path in rows.glob("*.bin"):
        path.unlink()
    with pytest.raises(LoadError, match=r"shard-0000\d-0.bin cannot be read"):
        take(stream, 20)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": 7}', '{"format": 1, "shards": [], "model": "x"}'])
def test_a_folder_that_is_none(rows: Path, content: str | None) -> None:
    if content is None:
        (rows / MANIFEST).unlink()
    else:
        (rows / MANIFEST).write_text(content)
    with pytest.raises(LoadError, match=r"No readable manifest\.json(.|\n)*Expected: a folder that write_activations"):
        ShardStream(rows, batch_size=5)


def test_nothing_is_written_over(rows: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"'rows' is there already(.|\n)*or an empty one"):
        write_activations(TELLING, numbered(5), SITES, rows)
    (rows.parent / "empty").mkdir()
    assert read_manifest(write_activations(TELLING, numbered(5), SITES, rows.parent / "empty")).n_rows == 25


def test_the_folder_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(params: Any, tokens: Any) -> Any:
        return sow(jnp.where(tokens == 100, jnp.nan, params * tokens.astype(jnp.float32))[..., None], name="embed")

    lm = LanguageModel(Upstream("faulty", faulty), jnp.ones((), jnp.float32))
    with pytest.raises(InvalidInputError, match=rf"embed has 1 of 20 .* sequence {100 // N_CTX} in write_activations"):
        write_activations(lm, numbered(50), "embed", tmp_path / "rows", sequences_per_pass=4)
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
        with pytest.raises(
            ExportError, match=r"cannot be written \(0 MB to write, 0 MB free\)(.|\n)*bfloat16' is half"
        ):
            write_activations(TELLING, numbered(50), SITES, tmp_path / "rows")

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(activation_files._Dealer, "finish", full)
        with pytest.raises(ExportError, match="No space left on device"):
            write_activations(TELLING, numbered(50), SITES, tmp_path / "rows")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": Keep(first_position=9)}, "No token of rows counts in write_activations"),
        ({"shard_bytes": 0}, "shard_bytes=0 was given"),
        ({"seed": -3}, "seed=-3 was given"),
    ],
)
def test_what_cannot_be_written(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=words):
        write_activations(TELLING, numbered(5), SITES, tmp_path / "rows", **options)


def test_the_manifest_can_be_read_by_a_person(rows: Path) -> None:
    document = json.loads((rows / MANIFEST).read_text())
    assert document["keep"] == "Keep(first_position=1, special_tokens=False)"
    assert set(document) == {"format", *read_manifest(rows)._fields}


def test_activations_are_written_once(tmp_path: Path) -> None:
    folder = written_once(TELLING, numbered(5), "embed", tmp_path / "new")
    manifest = (folder / MANIFEST).stat().st_mtime_ns
    assert written_once(TELLING, numbered(5), "embed", tmp_path / "new") == folder
    assert (folder / MANIFEST).stat().st_mtime_ns == manifest
    others = {written_once(TELLING, numbered(5), "mlp_out", tmp_path / "new")}
    others.add(written_once(TELLING, numbered(6), "embed", tmp_path / "new"))
    assert len(others - {folder}) == 2
