"""The Matryoshka SAE: BatchTopK whose first latents must reconstruct alone, and the first few of those again.

The latents come in groups; the loss is the mean over prefixes of groups of the prefix's squared error. Early latents
learn what is general, as they must do without the late ones.

>>> Matryoshka(k=2, groups=(2, 3)).check(5)

Sharp edges: the groups' sizes must add up to the number of latents. The threshold is BatchTopK's.

Source: Bussmann et al. 2025 (2503.17547).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.methods.sae import parameters
from interp_jax.methods.sae.architecture import TrainPass, squared_error
from interp_jax.methods.sae.batch_top_k import BatchThreshold, batch_top_k
from interp_jax.methods.sae.parameters import Params
from interp_jax.methods.sae.top_k import check_k


@final
@dataclass(frozen=True)
class Matryoshka(BatchThreshold):
    """Nested groups of BatchTopK latents.

    Args:
        k: How many latents for each row, on average.
        groups: Sizes of the groups, first to last.
        is_centred: Whether `b_dec` is subtracted before encoding.
    """

    k: int
    groups: tuple[int, ...]
    is_centred: bool = True

    name: ClassVar[str] = "matryoshka"

    def check(self, n_latents: int) -> None:
        """Raise `InvalidInputError` if k or the groups do not go with `n_latents`."""
        check_k(self.k, n_latents, where=f"Matryoshka, with {n_latents} latents")
        is_tuple = isinstance(self.groups, tuple) and all(isinstance(size, int) for size in self.groups)
        if not is_tuple or sum(self.groups) != n_latents or not all(size > 0 for size in self.groups):
            total = f"; these add up to {sum(self.groups)}" if is_tuple else ", in a tuple of ints"
            raise InvalidInputError(
                four_part(
                    f"groups = {self.groups!r:.60} were given",
                    where=f"Matryoshka, with {n_latents} latents",
                    expected=f"positive sizes that add up to {n_latents}{total}.",
                    fix="change the groups or n_latents.",
                )
            )

    def train_pass(self, params: Params, x: jax.Array, y: jax.Array, *, dtype: Any = jnp.float32) -> TrainPass:
        """One batch of `params` from `x` to `y`, with factors of `dtype`; every prefix of groups reconstructs."""
        pre, for_dead = self.pre_activations(params, x, dtype)
        latents = batch_top_k(pre, self.k)
        reconstruction, start, errors = parameters.offset(params, x, dtype=dtype), 0, []
        for size in self.groups:
            rows = slice(start, start + size)
            reconstruction = reconstruction + parameters.matmul(latents[:, rows], params["W_dec"][rows], dtype)
            errors.append(squared_error(y, reconstruction))
            start += size
        # The whole reconstruction's error is the loss's own term: what is added makes it the mean over prefixes.
        auxiliary = jnp.stack(errors).mean() - errors[-1]
        return TrainPass(for_dead, latents, reconstruction, penalty=jnp.zeros(()), auxiliary=auxiliary)
