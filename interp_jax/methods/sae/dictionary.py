"""What a dictionary's weights alone say: how alike two are, how few neurons a row uses, where the encoder points.

    max_cosines(A, B)        each row of A: the largest cosine with a row of B; its mean is MMCS(A -> B)
    neuron_sparsity(W_dec)   each row: the share of its square in its largest neuron and in the next nine, and kurtosis
    encoder_decoder_cosines  each latent: the direction it is detected in against the one it stands for
    cluster_cosines          some latents' vectors against their mean
    null_space_fractions     the share of each row that a later map does not read

>>> rows = np.eye(4)[:2]
>>> max_cosines(rows, np.eye(4)).tolist(), mmcs(np.eye(4), rows)
([1.0, 1.0], 0.5)
>>> sparsity = neuron_sparsity(np.eye(12)[:1])
>>> sparsity.fve_top_1.tolist(), sparsity.fve_next_9.tolist(), sparsity.classes.tolist()
([1.0], [0.0], ['1-sparse'])

Sharp edges: rows are latents. Cosines keep their sign. MMCS is not symmetric: from the true atoms to the learned ones
it is recall, the other way precision. Neurons mean something where the written site has a privileged basis (after a
nonlinearity); in a residual stream they are coordinates.

Source: Sharkey et al. 2022 (MMCS); Bricken et al. 2023 for the clusters; algorithms by their definitions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part
from interp_jax.forward.sparse_coder import SparseCoder
from interp_jax.transforms.compilations import counted_jit

CLASSES = ("dense", "1-sparse", "10-sparse")
# What a block of cosines, or of rows in float64, may take.
_BLOCK_BYTES = 2**27


def max_cosines(rows: Any, others: Any) -> np.ndarray:
    """Each row's largest cosine with any of the others.

    c_i = max_j A_i . B_j / (|A_i| |B_j|)

    Args:
        rows: `[n, d]`.
        others: `[m, d]`.

    Returns:
        float32 `[n]`; the cosine with a row of zeros is 0.

    Raises:
        ShapeError: They are not matrices of the same width.
        InvalidInputError: One of them has no rows, or numbers that are not finite.
    """
    a, b = _matrix(rows, "rows", "max_cosines"), _matrix(others, "others", "max_cosines")
    if a.shape[1] != b.shape[1]:
        raise ShapeError(
            four_part(
                f"Rows of width {a.shape[1]} and of width {b.shape[1]} were given",
                where="max_cosines",
                expected="two dictionaries of the same width.",
                fix="compare SAEs of the same site; a decoder's rows are latents, [latent, d].",
            )
        )
    n_block = int(np.clip(_BLOCK_BYTES // (4 * len(b)), 1, len(a)))
    return np.asarray(_max_cosines(a.astype(np.float32), b.astype(np.float32), n_block=n_block))


def mmcs(rows: Any, others: Any) -> float:
    """Mean over `rows` of the largest cosine with any of `others`: MMCS(rows -> others).

    Args:
        rows: `[n, d]`, such as the true atoms (recall) or the learned ones (precision).
        others: `[m, d]`.

    Returns:
        The mean.

    Source: Sharkey et al. 2022, interim report on sparse autoencoders.
    """
    return float(max_cosines(rows, others).mean(dtype=np.float64))


def _max_cosines_in_blocks(rows: jax.Array, others: jax.Array, *, n_block: int) -> jax.Array:
    a, b = _unit(rows), _unit(others)
    n_missing = -len(a) % n_block
    blocks = jnp.pad(a, ((0, n_missing), (0, 0))).reshape(-1, n_block, a.shape[1])
    best = lax.map(lambda block: jnp.matmul(block, b.T, precision=lax.Precision.HIGHEST).max(axis=1), blocks)
    return best.reshape(-1)[: len(a)]


def _unit(rows: jax.Array) -> jax.Array:
    # Scaled first: squares of tiny or huge rows leave float32's range.
    largest = jnp.abs(rows).max(axis=1, keepdims=True)
    rows = rows / jnp.where(largest > 0, largest, 1.0)
    norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / jnp.where(norms > 0, norms, 1.0)


_max_cosines = counted_jit(_max_cosines_in_blocks, name="dictionary.max_cosines", static_argnames=("n_block",))


@dataclass(frozen=True, repr=False)
class NeuronSparsity:
    """How few neurons each row of a decoder uses; arrays are `[latent]`.

    Args:
        fve_top_1: Share of the row's square in its largest entry.
        fve_next_9: Share in the nine after it (in as many as there are).
        kurtosis: Excess kurtosis of the entries: 0 for a Gaussian, large for few large ones.
    """

    fve_top_1: np.ndarray
    fve_next_9: np.ndarray
    kurtosis: np.ndarray

    @property
    def classes(self) -> np.ndarray:
        """One of `CLASSES` for each row.

        "dense" if the ten largest entries hold less than 0.35 of the square; else "1-sparse" if the largest holds more
        than 0.35 and the next nine less than 0.1; else "10-sparse".
        """
        is_dense = self.fve_top_1 + self.fve_next_9 < 0.35
        is_single = (self.fve_top_1 > 0.35) & (self.fve_next_9 < 0.1)
        return np.where(is_dense, "dense", np.where(is_single, "1-sparse", "10-sparse"))

    def __repr__(self) -> str:
        counts = ", ".join(f"{(self.classes == name).sum()} {name}" for name in CLASSES)
        return f"NeuronSparsity({len(self.kurtosis)} rows: {counts}; median kurtosis {np.median(self.kurtosis):.3g})"


def neuron_sparsity(rows: Any) -> NeuronSparsity:
    """How the square of each row is spread over its entries.

    Args:
        rows: `[latent, neuron]`: decoder rows in the basis of neurons.

    Returns:
        The shares and the kurtosis; of a row of zeros, 0.

    Raises:
        ShapeError: Not a matrix.
        InvalidInputError: No rows, or numbers that are not finite.
    """
    rows = _matrix(rows, "rows", "neuron_sparsity")
    n_block = max(1, _BLOCK_BYTES // (8 * rows.shape[1]))
    blocks = [_neuron_sparsity(rows[start : start + n_block]) for start in range(0, len(rows), n_block)]
    return NeuronSparsity(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))


def _neuron_sparsity(rows: np.ndarray) -> tuple[np.ndarray, ...]:
    rows = rows.astype(np.float64)
    largest = np.abs(rows).max(axis=1, keepdims=True)
    rows = rows / np.where(largest > 0, largest, 1.0)
    squares = rows**2
    n_top = min(10, rows.shape[1])
    top = -np.sort(np.partition(-squares, n_top - 1, axis=1)[:, :n_top], axis=1)
    total = squares.sum(axis=1)
    total = np.where(total > 0, total, 1.0)
    deviations = rows - rows.mean(axis=1, keepdims=True)
    variance = (deviations**2).mean(axis=1)
    fourth = (deviations**4).mean(axis=1)
    kurtosis = np.where(variance > 0, fourth / np.where(variance > 0, variance, 1.0) ** 2 - 3, 0.0)
    return top[:, 0] / total, top[:, 1:].sum(axis=1) / total, kurtosis


def encoder_decoder_cosines(sae: SparseCoder) -> np.ndarray:
    """The cosine between each latent's encoder column and its decoder row.

    Args:
        sae: An SAE that writes a space as wide as the one it reads.

    Returns:
        float64 `[latent]`; with a vector of zeros, 0.

    Raises:
        ShapeError: It reads and writes spaces of different widths.
    """
    if sae.d_in != sae.d_out:
        raise ShapeError(
            four_part(
                f"{sae} was given",
                where="encoder_decoder_cosines",
                expected="as many numbers read as written.",
                fix="a transcoder's encoder and decoder live in different spaces; compare their rows among themselves.",
            )
        )
    columns, rows = np.asarray(sae.W_enc).T, np.asarray(sae.W_dec)
    n_block = max(1, _BLOCK_BYTES // (8 * sae.d_in))
    starts = range(0, sae.n_latents, n_block)
    return np.concatenate([_cosines(columns[at : at + n_block], rows[at : at + n_block]) for at in starts])


def cluster_cosines(vectors: Any, members: Any) -> np.ndarray:
    """The cosine of some vectors with their mean: near 1 where they all point one way.

    Args:
        vectors: `[latent, d]`: encoder columns (`sae.W_enc.T`) or decoder rows.
        members: Which of them, bool `[latent]`.

    Returns:
        float64, `[member]`.

    Raises:
        ShapeError: Not a matrix, or not one bool per vector.
    """
    vectors, members = np.asarray(vectors), np.asarray(members)
    if vectors.ndim != 2 or members.shape != vectors.shape[:1] or members.dtype != bool:
        raise ShapeError(
            four_part(
                f"Vectors {list(vectors.shape)} and members {members.dtype}{list(members.shape)} were given",
                where="cluster_cosines",
                expected="[latent, d] and bool[latent].",
                fix="give W_enc.T or W_dec, and a mask such as reconstruction.is_ultra_low.",
            )
        )
    chosen = vectors[members].astype(np.float64)
    return _cosines(chosen, np.broadcast_to(chosen.mean(axis=0), chosen.shape)) if len(chosen) else np.zeros(0)


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(axis=1) / np.where(norms > 0, norms, 1.0)


def null_space_fractions(rows: Any, W_out: Any) -> np.ndarray:
    """The share of each row's square that a later map sends to zero.

    1 - |P w|^2 / |w|^2, with P the projection onto what the map reads

    Args:
        rows: `[latent, neuron]`.
        W_out: The map, `[neuron, d]`; a neuron's row is what it writes.

    Returns:
        float64 `[latent]`; of a row of zeros, 0. For random directions see `random_null_space_fraction`.

    Raises:
        ShapeError: The rows are not as wide as the map is high.
        InvalidInputError: No rows, or numbers that are not finite.
    """
    rows = _matrix(rows, "rows", "null_space_fractions").astype(np.float64)
    W_out = _matrix(W_out, "W_out", "null_space_fractions").astype(np.float64)
    if rows.shape[1] != W_out.shape[0]:
        raise ShapeError(
            four_part(
                f"Rows {list(rows.shape)} and W_out {list(W_out.shape)} were given",
                where="null_space_fractions",
                expected="[latent, neuron] and [neuron, d].",
                fix="give the decoder of an SAE of mlp_post and lm.W_out[layer].",
            )
        )
    left, singular, _ = np.linalg.svd(W_out, full_matrices=False)
    read = left[:, singular > max(W_out.shape) * np.finfo(np.float64).eps * singular.max()]
    total = (rows**2).sum(axis=1)
    inside = ((rows @ read) ** 2).sum(axis=1)
    return np.where(total > 0, 1 - inside / np.where(total > 0, total, 1.0), 0.0)


def random_null_space_fraction(n_neurons: int, rank: int) -> tuple[float, float]:
    """Mean and standard deviation of the null-space fraction of a random direction.

    It is distributed as Beta((m - r) / 2, r / 2).

    Args:
        n_neurons: Width m of the rows.
        rank: Rank r of the map, from 0 to m.

    Returns:
        The two.

    Raises:
        InvalidInputError: The rank is out of range.
    """
    if not 0 <= rank <= n_neurons or n_neurons < 1:
        raise InvalidInputError(
            four_part(
                f"n_neurons={n_neurons}, rank={rank} was given",
                where="random_null_space_fraction",
                expected="a rank from 0 to the number of neurons, of which there is at least one.",
                fix="a map [neuron, d] has a rank of at most d.",
            )
        )
    mean = 1 - rank / n_neurons
    return mean, float(np.sqrt(mean * (1 - mean) / (n_neurons / 2 + 1)))


def _matrix(given: Any, name: str, where: str) -> np.ndarray:
    array = np.asarray(given)
    if array.ndim != 2 or not jnp.issubdtype(array.dtype, jnp.number):
        raise ShapeError(
            four_part(
                f"{name} of {array.dtype}{list(array.shape)} was given",
                where=where,
                expected="a matrix of numbers, one row per latent.",
                fix="give W_dec, or W_enc.T.",
            )
        )
    if array.size == 0 or not np.isfinite(array).all():
        raise InvalidInputError(
            four_part(
                f"{name} {list(array.shape)} was given, " + ("empty" if array.size == 0 else "with NaN or inf in it"),
                where=where,
                expected="at least one row, and finite numbers.",
                fix="look at where the dictionary comes from.",
            )
        )
    return array
