"""Prompt pairs as data: which family, how many, from which seed.

An experiment's configuration names its pairs in words that can be saved, and makes them for the model at hand.

>>> Pairs("induction", n_pairs=2).make(type("Model", (), {"config": type("Config", (), {"d_vocab": 40})})).clean.shape
(2, 12)

Sharp edges: of IOI one template is used, so that each position means the same in all pairs.

Source: interp_jax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from interp_jax.core.errors import UnknownNameError, four_part
from interp_jax.data.alignment import PromptPairs
from interp_jax.data.prompts import IOI_TEMPLATES, induction_pairs, ioi_pairs

NAMES = ("ioi", "induction")


@dataclass(frozen=True)
class Pairs:
    """Some pairs of prompts.

    Args:
        family: "ioi", or "induction" (random tokens, for a model with any tokenizer).
        n_pairs: How many.
        seed: What they are drawn with.
        template: Of IOI prompts.
    """

    family: str = "ioi"
    n_pairs: int = 1
    seed: int = 0
    template: str = IOI_TEMPLATES[2]

    def make(self, lm: Any) -> PromptPairs:
        """The pairs.

        Args:
            lm: The model they are for.

        Returns:
            The pairs, aligned for its tokenizer.

        Raises:
            UnknownNameError: There is no such family.
        """
        if self.family == "ioi":
            return ioi_pairs(lm, self.n_pairs, seed=self.seed, templates=(self.template,))
        if self.family == "induction":
            return induction_pairs(lm.config.d_vocab, self.n_pairs, seed=self.seed)
        raise UnknownNameError(
            four_part(
                f"Unknown family {self.family!r}",
                where="Pairs",
                names=NAMES,
                given=self.family,
                fix="use one of these.",
            )
        )
