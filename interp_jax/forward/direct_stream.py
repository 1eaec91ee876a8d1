"""Activations straight from a pass into whatever reads them: they never leave the device, and nothing is kept.

    stream = DirectStream(lm, train, "5.resid_post", batch_size=4096, seed=0)
    x = stream.next_batch()["5.resid_post"]            # a jax.Array [4096, d_model]

A batch is one pass over the next sequences of a shuffled text, cut to the rows that count. There is no buffer to hold
or to save: where a stream stands is one number. What it costs is mixing: the rows of a batch come from few sequences,
`batch_size / n_ctx` of them, where an `ActivationStream` draws from all of its buffer.

>>> from interp_jax.data.text_streams import packed_rows
>>> from interp_jax.models.language_model import LanguageModel
>>> from interp_jax.models.upstream import Upstream
>>> from interp_jax.transforms.sowing import sow
>>> lm = LanguageModel(Upstream("table", lambda table, tokens: sow(table[tokens], name="embed")), jnp.eye(4))
>>> stream = DirectStream(lm, packed_rows([[0, 1, 2], [0, 2, 3], [0, 3, 1]]), "embed", batch_size=4)
>>> stream.next_batch()["embed"].shape
(4, 4)

Sharp edges: rows are not looked at, or each batch would have to be waited for: what is not finite is handed on, and a
training step passes over it. The rows of the last sequence that a batch has no room for are dropped.

Source: interp_jax.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.core.sites import Selector
from interp_jax.data.text_streams import Packed
from interp_jax.forward.batch_streams import TimedStream, check_config, check_positive, check_seed, check_text, checksum
from interp_jax.forward.site_values import Keep, filled_up, nothing_counts, site_reader
from interp_jax.transforms.compilations import counted_jit

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

# Passes are over a multiple of so many sequences: few programs, whichever sequences have more rows that count.
_SEQUENCES = 4


class DirectStream(TimedStream):
    """Batches of a model's activations on a text, on the device, each from a pass of its own.

    Args:
        lm: The model.
        packed: Packed sequences of tokens, such as `pack(...).train`.
        sites: Which sites; their rows come from the same tokens.
        batch_size: Rows per batch.
        seed: Of the order of sequences.
        keep: Which positions count; by default all but the first and those of special tokens.

    Raises:
        UnknownNameError: A part of the selector matches no site.
        InvalidInputError: The text is empty, or the batch size is not positive.
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
    ):
        super().__init__()
        check_text(packed, where="DirectStream")
        check_seed(seed, where="DirectStream")
        check_positive(where="DirectStream", batch_size=batch_size)
        self._lm, self._packed, self._seed, self.batch_size = lm, packed, seed, batch_size
        self._keep, self._next_sequence = keep or Keep(), 0
        self._reader = site_reader(lm, sites, n_ctx=packed.rule.n_ctx, where="DirectStream")
        self._config = {
            "seed": seed,
            "batch_size": batch_size,
            "text": checksum(packed.fingerprint.encode()),
            "sites": checksum(f"{self._keep} {self._reader.sites}".encode()),
        }

    @property
    def widths(self) -> dict[str, int]:
        """Site name to the size of its rows, in the order of the forward pass."""
        return self._reader.widths

    @property
    def n_sequences_read(self) -> int:
        """How many sequences the model has read, over all epochs."""
        return self._next_sequence

    def next_batch(self) -> dict[str, jax.Array]:
        """The next batch: site name to `[batch_size, width]`.

        Raises:
            InvalidInputError: No token of the text counts.
        """
        started = time.perf_counter()
        tokens, mask = self._next_tokens()
        rows = np.flatnonzero(mask)[: self.batch_size]
        n_sequences = -(-len(tokens) // _SEQUENCES) * _SEQUENCES
        tokens = self._lm.check_tokens(filled_up(tokens, n_sequences), where="DirectStream")
        batch = _program(self._reader.read)(self._lm.params, tokens, filled_up(mask, n_sequences), rows)
        self._count(started, self.batch_size)
        return batch

    def state(self) -> dict[str, Any]:
        """Where the stream stands."""
        return {"config": dict(self._config), "next_sequence": self._next_sequence}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state` of a stream that was made alike."""
        check_config(state, self._config, where="DirectStream.restore")
        self._next_sequence = int(state["next_sequence"])

    def _next_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """As many sequences as a batch needs, and which of their positions count."""
        tokens: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        n_rows = 0
        while n_rows < self.batch_size:
            # Of most sequences nearly all positions count: seldom more than two turns.
            count = max(1, (self.batch_size - n_rows) // self._packed.rule.n_ctx)
            chosen = self._packed.order(start=self._next_sequence, count=count, seed=self._seed)
            tokens.append(self._packed[chosen])
            masks.append(self._keep.mask(tokens[-1], self._packed.rule.special_tokens))
            self._next_sequence += count
            n_rows += int(masks[-1].sum())
            if not n_rows and sum(map(len, tokens)) >= len(self._packed):
                raise nothing_counts(self._packed.name, self._keep, where="DirectStream")
        return np.concatenate(tokens), np.concatenate(masks)


@functools.lru_cache(maxsize=32)
def _program(read: Callable[..., Any]) -> Callable[..., Any]:
    def rows_of(params: Any, tokens: Any, mask: Any, rows: Any) -> dict[str, jax.Array]:
        values, _ = read(params, tokens, mask)
        return {name: jnp.take(value.reshape(-1, value.shape[-1]), rows, axis=0) for name, value in values.items()}

    return counted_jit(rows_of, name="rows of sites")
