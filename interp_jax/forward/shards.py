"""Shuffled batches of activations from disk, prepared by a thread while the caller is busy with the last.

    write_activations(lm, train, "5.resid_post", "activations")
    with ShardStream("activations", batch_size=4096, seed=0) as stream:
        batch = stream.next_batch()["5.resid_post"]

A shard is a random sample of the whole text. It is read from end to end and shuffled when it is in memory, so the disk
sees long reads only, and where the stream stands is one integer.

>>> import tempfile
>>> from interp_jax.data.text_streams import packed_rows
>>> from interp_jax.forward.activation_files import write_activations
>>> from interp_jax.models.language_model import LanguageModel
>>> from interp_jax.models.upstream import Upstream
>>> from interp_jax.transforms.sowing import sow
>>> lm = LanguageModel(Upstream("table", lambda table, tokens: sow(table[tokens], name="embed")), jnp.eye(4))
>>> with tempfile.TemporaryDirectory() as folder:
...     path = write_activations(lm, packed_rows([[0, 1, 2], [0, 2, 3]]), "embed", f"{folder}/rows")
...     with ShardStream(path, batch_size=4) as stream:
...         print(stream.next_batch()["embed"].sum(0))
[0. 1. 2. 1.]

Sharp edges: two shards are in memory at a time. A file's SHA-256 is checked when it is first read, and its length when
the stream is made.

Source: interp_jax.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from interp_jax.data.text_streams import shuffled
from interp_jax.forward.activation_files import Manifest, read_manifest, torn
from interp_jax.forward.batch_streams import TimedStream, check_config, check_positive, check_seed, checksum
from interp_jax.forward.site_values import rows_at

# Orders have this in their keys, so that no two are made of the same numbers.
_SHARDS, _ROWS = 3, 4


class ShardStream(TimedStream):
    """Shuffled batches of activations from disk.

    Args:
        directory: What `write_activations` has written.
        batch_size: Rows per batch.
        seed: Of the order.
        read_ahead: How many batches are prepared ahead; 0 for none, and no thread.

    Raises:
        LoadError: The folder or a file in it is not as it was written.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, batch_size: int = 4096, seed: int = 0, read_ahead: int = 4
    ):
        super().__init__()
        check_positive(where="ShardStream", batch_size=batch_size)
        check_seed(seed, where="ShardStream")
        self.manifest = read_manifest(directory)
        self.batch_size, self._read_ahead, self._next_row = batch_size, read_ahead, 0
        self._shards = _Shards(Path(directory).expanduser(), self.manifest, seed)
        digests = [digest.encode() for shard in self.manifest.shards for digest in shard.sha256.values()]
        self._config = {"seed": seed, "batch_size": batch_size, "files": checksum(*digests)}
        self._ahead: deque[Future[dict[str, np.ndarray]]] = deque()
        self._thread = ThreadPoolExecutor(1, "activations") if read_ahead else None
        if self._thread is not None:
            # Nobody has to close the stream: the thread ends when the stream is forgotten.
            weakref.finalize(self, self._thread.shutdown, wait=False, cancel_futures=True)

    @property
    def widths(self) -> dict[str, int]:
        """Site name to the size of its rows, in the order of the forward pass."""
        return self.manifest.widths

    def next_batch(self) -> dict[str, np.ndarray]:
        """The next batch: site name to `[batch_size, width]`.

        Raises:
            LoadError: A file is not as it was written.
        """
        started = time.perf_counter()
        if self._thread is None:
            batch = self._shards.rows(self._next_row, self.batch_size)
        else:
            while len(self._ahead) <= self._read_ahead:
                start = self._next_row + len(self._ahead) * self.batch_size
                self._ahead.append(self._thread.submit(self._shards.rows, start, self.batch_size))
            batch = self._ahead.popleft().result()
        self._next_row += self.batch_size
        self._count(started, self.batch_size)
        return batch

    def state(self) -> dict[str, Any]:
        """Where the stream stands: of the files only what tells them apart."""
        return {"config": dict(self._config), "next_row": self._next_row}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state` of a stream over the same files."""
        check_config(state, self._config, where="ShardStream.restore")
        self._forget()
        self._next_row = int(state["next_row"])

    def close(self) -> None:
        """End the thread. The stream can still be read, without one."""
        self._forget()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None

    def __enter__(self) -> ShardStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forget(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()


class _Shards:
    """Rows of the endless stream by number; of the files, the last two are kept."""

    def __init__(self, folder: Path, manifest: Manifest, seed: int):
        self._folder, self._manifest, self._seed = folder, manifest, seed
        self._whole: set[int] = set()  # whose digests are known to be right
        self._lock = threading.Lock()
        self._load = functools.lru_cache(maxsize=2)(self._read)

    def rows(self, start: int, count: int) -> dict[str, np.ndarray]:
        """Rows `start` to `start + count`: in each epoch the shards in another order, and the rows of each."""
        pieces: list[dict[str, np.ndarray]] = []
        with self._lock:
            while count:
                epoch, offset = divmod(start, self._manifest.n_rows)
                order = shuffled(len(self._manifest.shards), self._seed, _SHARDS, epoch)
                ends = np.cumsum([self._manifest.shards[i].n_rows for i in order])
                place = int(np.searchsorted(ends, offset, side="right"))
                shard = int(order[place])
                n_rows = self._manifest.shards[shard].n_rows
                first = offset - (int(ends[place]) - n_rows)
                chosen = shuffled(n_rows, self._seed, _ROWS, epoch, shard)[first : first + count]
                arrays = self._load(shard)
                pieces.append({name: rows_at(array, chosen) for name, array in arrays.items()})
                start, count = start + len(chosen), count - len(chosen)
        if len(pieces) == 1:
            return pieces[0]
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def _read(self, number: int) -> dict[str, np.ndarray]:
        shard = self._manifest.shards[number]
        arrays, wrong = {}, []
        for name, width in self._manifest.widths.items():
            array = np.empty((shard.n_rows, width), jnp.dtype(self._manifest.dtypes[name]))
            memory = memoryview(array.view(np.uint8).data).cast("B")
            try:
                with open(self._folder / shard.files[name], "rb") as file:
                    n_bytes = file.readinto(memory)
            except OSError as error:
                wrong.append(f"{shard.files[name]} cannot be read ({error})")
                continue
            if n_bytes != len(memory):
                wrong.append(f"{shard.files[name]} has {n_bytes:,} of {len(memory):,} bytes")
            elif number not in self._whole and hashlib.sha256(memory).hexdigest() != shard.sha256[name]:
                wrong.append(f"{shard.files[name]} has other contents")
            arrays[name] = array
        if wrong:
            raise torn(wrong, self._folder)
        self._whole.add(number)
        return arrays
