"""The examples of each latent, gathered in one passage over a text: the best few per group, with what stands around.

A text is read batch by batch and never held. Each group (a latent, or one interval of its activations) has a fixed
number of places; whatever scores higher than what has a place takes it over, surroundings included. With activations
as scores these are the strongest examples; with a random number per token and latent, a uniform sample of them.

>>> places = Places(n_groups=1, n_places=2, width=1)
>>> batch = Candidates(*(np.array(column) for column in ([0, 0, 0], [1.0, 3.0, 2.0], [4, 5, 6], [0, 0, 0])))
>>> places.offer(batch, batch.value, lambda chosen: (np.zeros((len(chosen), 1)), np.zeros((len(chosen), 1))))
>>> places.examples().sequence.tolist()
[[5, 6]]

Sharp edges: among equal scores the earlier token of the text keeps its place. The random numbers depend on seed,
token and latent alone, so a sample is the same whatever the batches.

Source: interp_jax; Steele et al. 2014 for the random numbers (SplitMix64).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from interp_jax.models.upstream import PAD


class Candidates(NamedTuple):
    """Tokens that may become examples; arrays are `[candidate]`.

    Args:
        group: The group each of them is a candidate of.
        value: The latent's activation.
        sequence: Number of the sequence in the text.
        position: Position in the sequence.
    """

    group: np.ndarray
    value: np.ndarray
    sequence: np.ndarray
    position: np.ndarray


class Examples(NamedTuple):
    """Tokens on which a latent fires, strongest first, and what stands around them.

    The first axes say which latent (and which interval), the next one which example. Where there are fewer examples
    than places, `sequence` is -1.

    Args:
        sequence: Number of the sequence in the text, int64 `[..., example]`.
        position: Position in the sequence, int32.
        value: The latent's activation there, float32.
        tokens: Ids of the tokens around it, int32 `[..., example, place]`; -1 before the start, after the end, and
            at padding.
        values: The latent's activations on them, float32; 0 where they do not count.
    """

    sequence: np.ndarray
    position: np.ndarray
    value: np.ndarray
    tokens: np.ndarray
    values: np.ndarray


class Places:
    """The examples so far.

    Args:
        n_groups: How many groups.
        n_places: Examples per group.
        width: Tokens per example.
    """

    def __init__(self, n_groups: int, n_places: int, width: int):
        self.n_places = n_places
        n = n_groups * n_places
        self._score = np.full(n, -np.inf)
        self._found = Examples(
            sequence=np.full(n, -1, np.int64),
            position=np.zeros(n, np.int32),
            value=np.zeros(n, np.float32),
            tokens=np.full((n, width), PAD, np.int32),
            values=np.zeros((n, width), np.float32),
        )

    def offer(
        self,
        batch: Candidates,
        score: np.ndarray,
        around: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    ) -> None:
        """Give places to those of a batch that score high enough.

        Args:
            batch: The candidates; their sequences come after those of earlier batches.
            score: By what they are chosen, `[candidate]`.
            around: From numbers of candidates to the tokens around them and the activations there, `[chosen, place]`.
        """
        worst = self._score.reshape(-1, self.n_places).min(axis=1)
        may = np.flatnonzero(score > worst[batch.group])
        affected = np.unique(batch.group[may])
        taken = (affected[:, None] * self.n_places + np.arange(self.n_places)).reshape(-1)

        group = np.concatenate([taken // self.n_places, batch.group[may]])
        scores = np.concatenate([self._score[taken], score[may]])
        sequence = np.concatenate([self._found.sequence[taken], batch.sequence[may]])
        position = np.concatenate([self._found.position[taken], batch.position[may]])
        order = np.lexsort((position, sequence, -scores, group))
        wins = ranks(group[order]) < self.n_places
        is_new = order >= len(taken)
        # Both run group by group, and a group loses as many as it gains.
        freed, chosen = taken[order[~wins & ~is_new]], may[order[wins & is_new] - len(taken)]
        self._score[freed] = score[chosen]
        tokens, values = around(chosen)
        new = Examples(batch.sequence[chosen], batch.position[chosen], batch.value[chosen], tokens, values)
        for column, part in zip(self._found, new, strict=True):
            column[freed] = part

    def examples(self) -> Examples:
        """What has places, by falling activation: `[group, example]`."""
        found, groups = self._found, np.arange(len(self._score)) // self.n_places
        is_empty = found.sequence < 0
        order = np.lexsort((found.position, found.sequence, -found.value, is_empty, groups))
        return Examples(*(column[order].reshape(-1, self.n_places, *column.shape[1:]) for column in found))


def ranks(groups: np.ndarray) -> np.ndarray:
    """Place of each element in its run of equal ones, from 0, for sorted `groups`."""
    is_first = np.concatenate([[True], groups[1:] != groups[:-1]]) if len(groups) else np.zeros(0, bool)
    starts = np.flatnonzero(is_first)
    return np.arange(len(groups)) - np.repeat(starts, np.diff(np.append(starts, len(groups))))


def around(
    tokens: np.ndarray, latents: np.ndarray, row: np.ndarray, position: np.ndarray, latent: np.ndarray, window: range
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and activations around some places of a batch.

    Args:
        tokens: Token ids, `[seq, pos]`.
        latents: Activations, `[seq, pos, latent]`.
        row: Which sequence, `[chosen]`.
        position: Which position, `[chosen]`.
        latent: Which latent, `[chosen]`.
        window: Offsets from the position, such as `range(-3, 2)`.

    Returns:
        Token ids and activations, `[chosen, place]`; -1 and 0 outside of the sequence.
    """
    at = position[:, None] + np.arange(window.start, window.stop)
    is_inside = (at >= 0) & (at < tokens.shape[1])
    at = np.where(is_inside, at, 0)
    ids = np.where(is_inside, tokens[row[:, None], at], PAD)
    return ids, np.where(is_inside, latents[row[:, None], at, latent[:, None]], 0.0)


def random_scores(seed: int, token: np.ndarray, latent: np.ndarray) -> np.ndarray:
    """A number from [0, 1) for each token and latent, which depends on nothing else.

    Args:
        seed: Seed, from 0 on.
        token: Number of the token in the text.
        latent: Number of the latent.

    Returns:
        float64, uniform and independent of each other.

    Source: the output function of SplitMix64 (Steele et al. 2014), at a counter.
    """
    state = _mixed(np.array([seed], np.uint64))
    for counter in (token, latent):
        state = _mixed(state + np.asarray(counter).astype(np.uint64) * _GOLDEN)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(x: np.ndarray) -> np.ndarray:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
