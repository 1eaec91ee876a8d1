"""The activation store: a model's activations on a text as a stream of shuffled batches.

    stream = ActivationStream(lm, train, "5.resid_post", batch_size=512, seed=0)
    batch = stream.next_batch()["5.resid_post"]        # [512, d_model]
    state = stream.state()                             # a pytree of arrays and integers, for a checkpoint
    stream.restore(state)                              # the batches that follow are the same, bit for bit

Tokens of one text resemble each other. An `ActivationStream` therefore keeps a buffer of many sequences' worth of
rows and draws its batches from all of it; when half is used up, it runs the model to fill the free half, and shuffles
everything anew. Which sequence comes when, and which row, follows from (seed, counter): no generator has a state.

>>> from interp_jax.data.text_streams import packed_rows
>>> from interp_jax.models.language_model import LanguageModel
>>> from interp_jax.models.upstream import Upstream
>>> from interp_jax.transforms.sowing import sow
>>> lm = LanguageModel(Upstream("table", lambda table, tokens: sow(table[tokens], name="embed")), jnp.eye(4))
>>> text = packed_rows([[0, 1, 2], [0, 2, 3], [0, 3, 1], [0, 1, 3]])
>>> small = Buffer(n_rows=12, sequences_per_pass=2)
>>> stream = ActivationStream(lm, text, "embed", batch_size=6, keep=Keep(first_position=1), buffer=small)
>>> stream.next_batch()["embed"].sum(0)[0]  # The first position of each sequence is left out.
np.float32(0.0)

Sharp edges: several sites come from the same pass, and row i of each from the same token. A stream never ends: after
the last sequence comes the first of another order. Values that are not finite raise; whoever calls again goes on with
the sequences after.

Source: interp_jax; the buffer that is filled up at half is the one of Bricken et al. 2023 and their replications.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.core.sites import Selector
from interp_jax.data.text_streams import Packed, shuffled
from interp_jax.forward.batch_streams import (
    TimedStream,
    check_config,
    check_positive,
    check_seed,
    check_text,
    checksum,
)
from interp_jax.forward.site_values import (
    Keep,
    NotFiniteError,
    SiteReader,
    as_bits,
    nothing_counts,
    read_rows,
    rows_at,
    site_reader,
)

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

# The order of sequences has 0 in this place of its key, so that no two orders are made of the same numbers.
_ROWS = 1


@dataclass(frozen=True)
class Buffer:
    """The rows that batches are drawn from.

    Args:
        n_rows: How many. Half of them, at least, are there whenever a batch is drawn.
        sequences_per_pass: How many sequences the model reads at once.
        dtype: What they are kept as, "float32" or "bfloat16"; by default what the model computes in.
        directory: A folder to keep them in, in files that are mapped into memory; by default host memory.
    """

    n_rows: int = 2**17
    sequences_per_pass: int = 32
    dtype: str | None = None
    directory: str | None = None


class ActivationStream(TimedStream):
    """Shuffled batches of a model's activations on a text, computed as they are needed.

    Args:
        lm: The model.
        packed: Packed sequences of tokens, such as `pack(...).train`.
        sites: Which sites; their rows come from the same tokens.
        batch_size: Rows per batch.
        seed: Of the order of sequences and rows.
        keep: Which positions count; by default all but the first and those of special tokens.
        buffer: The buffer's size, place and dtype.
        n_faults_allowed: How many passes of the model may have values that are not finite. Each is left out, with a
            warning; one more raises.

    Raises:
        UnknownNameError: A part of the selector matches no site.
        InvalidInputError: The text is empty, no token of it counts, or a size is impossible.
    """

    def __init__(
        self,
        lm: LanguageModel,
        packed: Packed,
        sites: Selector,
        *,
        batch_size: int = 4096,
        seed: int = 0,
        keep: Keep | None = None,
        buffer: Buffer | None = None,
        n_faults_allowed: int = 0,
    ):
        super().__init__()
        self._lm, self._packed, self._seed, self.batch_size = lm, packed, seed, batch_size
        self._keep, self._settings = keep or Keep(), buffer or Buffer()
        check_text(packed, where="ActivationStream")
        check_seed(seed, where="ActivationStream")
        n_sequences = self._settings.sequences_per_pass
        check_positive(where="ActivationStream", batch_size=batch_size, sequences_per_pass=n_sequences)
        n_ctx, n_rows = packed.rule.n_ctx, self._settings.n_rows
        self._reader: SiteReader = site_reader(lm, sites, n_ctx=n_ctx, where="ActivationStream")
        if n_rows < (least := 2 * max(batch_size, n_sequences * n_ctx)):
            raise InvalidInputError(
                four_part(
                    f"A buffer of {n_rows:,} rows was given",
                    where="ActivationStream",
                    expected=f"twice a batch ({batch_size:,}) and twice a pass ({n_sequences} sequences of {n_ctx}).",
                    fix=f"make it larger, Buffer(n_rows={least}), or batches or passes smaller.",
                )
            )
        self._rows = _MixedRows(self._reader, self._settings, seed)
        self._next_sequence, self._n_faults, self._n_faults_allowed = 0, 0, n_faults_allowed
        rule = f"{self._keep} {self._reader.sites} {self._rows.dtypes}"
        self._config = {
            "seed": seed,
            "batch_size": batch_size,
            "buffer_rows": n_rows,
            "sequences_per_pass": n_sequences,
            "text": checksum(packed.fingerprint.encode()),
            "sites": checksum(rule.encode()),
        }

    @property
    def widths(self) -> dict[str, int]:
        """Site name to the size of its rows, in the order of the forward pass."""
        return self._reader.widths

    @property
    def n_sequences_read(self) -> int:
        """How many sequences the model has read, over all epochs."""
        return self._next_sequence

    def next_batch(self) -> dict[str, np.ndarray]:
        """The next batch: site name to `[batch_size, width]`.

        Raises:
            NotFiniteError: A value is not finite. The stream can still go on, after the sequences of that pass.
        """
        started = time.perf_counter()
        if self._rows.n_left < self._settings.n_rows // 2:
            self._refill()
        batch = self._rows.take(self.batch_size)
        self._count(started, self.batch_size)
        return batch

    def state(self) -> dict[str, Any]:
        """Where the stream stands, the buffer's contents included."""
        counters = {"next_sequence": self._next_sequence, "n_faults": self._n_faults}
        return {"config": dict(self._config), **counters, **self._rows.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state` of a stream that was made alike."""
        check_config(state, self._config, where="ActivationStream.restore")
        self._rows.restore(state)
        self._next_sequence, self._n_faults = int(state["next_sequence"]), int(state["n_faults"])

    def _refill(self) -> None:
        """Run the model until no further pass fits into the buffer, then shuffle."""
        n_sequences, n_in_vain = self._settings.sequences_per_pass, 0
        self._rows.free()
        while self._rows.n_free >= n_sequences * self._packed.rule.n_ctx:
            chosen = self._packed.order(start=self._next_sequence, count=n_sequences, seed=self._seed)
            tokens = self._packed[chosen]
            mask = self._keep.mask(tokens, self._packed.rule.special_tokens)
            n_in_vain = 0 if mask.any() else n_in_vain + n_sequences
            if n_in_vain >= len(self._packed):
                raise nothing_counts(self._packed.name, self._keep, where="ActivationStream")
            try:
                rows = read_rows(self._lm, self._reader, tokens, mask, chosen, where="ActivationStream")
            except NotFiniteError as error:
                self._next_sequence += n_sequences
                self._n_faults += 1
                if self._n_faults > self._n_faults_allowed:
                    raise
                what = str(error).partition(" in ActivationStream")[0]
                warnings.warn(f"{what}: the {n_sequences} sequences of that pass are left out.", stacklevel=3)
                continue
            self._rows.put(rows)
            self._next_sequence += n_sequences
        self._rows.shuffle()


class _MixedRows:
    """Rows in slots, and the order in which they are handed out.

    `order[position:n_live]` are the slots of the rows still to come; all others are free.
    """

    def __init__(self, reader: SiteReader, settings: Buffer, seed: int):
        self.dtypes = {
            name: np.dtype(jnp.dtype(settings.dtype)) if settings.dtype else dtype
            for name, dtype in reader.dtypes.items()
        }
        self._seed, self._n_rows = seed, settings.n_rows
        self._arrays = {
            name: _room((settings.n_rows, width), self.dtypes[name], settings.directory, number)
            for number, (name, width) in enumerate(reader.widths.items())
        }
        self._order = np.arange(settings.n_rows)
        self._position = self._n_live = self._n_fills = 0

    @property
    def n_left(self) -> int:
        return self._n_live - self._position

    @property
    def n_free(self) -> int:
        return self._n_rows - self._n_live

    def free(self) -> None:
        """Make the slots of rows that were handed out the last ones of the order."""
        self._order = np.roll(self._order, -self._position)
        self._n_live -= self._position
        self._position = 0

    def put(self, rows: Mapping[str, np.ndarray]) -> None:
        n = len(next(iter(rows.values())))
        slots = self._order[self._n_live : self._n_live + n]
        for name, array in self._arrays.items():
            as_bits(array)[slots] = as_bits(rows[name].astype(array.dtype, copy=False))
        self._n_live += n

    def shuffle(self) -> None:
        # Free slots stand behind the rows, so the order is one permutation whatever is free.
        order = shuffled(self._n_live, self._seed, _ROWS, self._n_fills)
        self._order = np.concatenate([self._order[: self._n_live][order], self._order[self._n_live :]])
        self._n_fills += 1

    def take(self, n: int) -> dict[str, np.ndarray]:
        slots = self._order[self._position : self._position + n]
        self._position += n
        return {name: rows_at(array, slots) for name, array in self._arrays.items()}

    def state(self) -> dict[str, Any]:
        counters = {"position": self._position, "n_live": self._n_live, "n_fills": self._n_fills}
        buffer = {name: np.array(array) for name, array in self._arrays.items()}
        return {"buffer": buffer, "order": self._order.copy(), **counters}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name, array in self._arrays.items():
            as_bits(array)[...] = as_bits(np.ascontiguousarray(state["buffer"][name]))
        self._order = np.array(state["order"])
        self._position, self._n_live, self._n_fills = (int(state[k]) for k in ("position", "n_live", "n_fills"))


def _room(shape: tuple[int, int], dtype: np.dtype, directory: str | None, number: int) -> np.ndarray:
    """An array to write to, in memory or in a file of that folder."""
    if directory is None:
        return np.zeros(shape, dtype)
    folder = Path(directory).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return np.memmap(folder / f"buffer-{number}", dtype, "w+", shape=shape)
    except OSError as error:
        raise InvalidInputError(
            four_part(
                f"The buffer cannot be kept in {str(folder)!r} ({error})",
                where="ActivationStream",
                expected=f"a folder with room for {shape[0] * shape[1] * dtype.itemsize / 1e6:,.0f} MB.",
                fix="free some space, choose another folder, or a smaller buffer.",
            )
        ) from error
