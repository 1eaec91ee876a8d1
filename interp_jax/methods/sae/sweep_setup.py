"""What the SAEs of a sweep have in common: text, site, sizes, optimiser, coefficients, seeds; one object of numbers.

An experiment holds a `SweepSetup`, says in which ways it is to be varied, and runs them. The activations of the text
are written to disk once, and read by every run of every experiment that asks for the same ones.

    setup = SweepSetup(n_latents=2048)
    ways = {"plain": setup.config(ReLU()), "ghosts": setup.config(ReLU(), dead_term=GhostGrads())}
    sweep = run_sweep(lm, setup, ways, name="ghosts")

>>> from interp_jax.methods.sae.relu import ReLU
>>> config = SweepSetup(n_steps=100).config(ReLU(), beta1=0.9)
>>> config.rule.beta1, config.rule.n_decay_steps, config.coefficients == SweepSetup().coefficients
(0.9, 20, True)

Sharp edges: what is trained is kept in `directory` as well: the same sweep asked for again is evaluated, not trained.
Positions that the stream leaves out (the first of each sequence, separators) are left as they are in the evaluation.

Source: interp_jax.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.data.text_streams import pack
from interp_jax.forward.activation_files import written_once
from interp_jax.forward.shards import ShardStream
from interp_jax.methods.sae.architecture import Architecture
from interp_jax.methods.sae.resampling import Redraw, Resample
from interp_jax.methods.sae.sweeps import SAESweep, sweep_saes
from interp_jax.methods.sae.train_config import TrainConfig
from interp_jax.methods.sae.train_step import StepRule

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel


@dataclass(frozen=True)
class SweepSetup:
    """What all SAEs of a sweep have in common.

    Args:
        text: "pydoc" (Python's own documentation), a file, a folder, or a data set on disk.
        site: What is read and written.
        n_ctx: Tokens per sequence.
        n_latents: How many latents.
        n_steps: How many steps.
        batch_size: Tokens per step.
        learning_rate: Of Adam.
        coefficients: Sparsity coefficients, for activations whose mean squared norm is 1.
        seeds: Of weights and order of batches.
        dead_after_steps: A latent that does not fire for so many steps is dead.
        n_held_out: On how many sequences SAEs are evaluated, spread over the held-out text.
        directory: Where activations and trained states are kept.
    """

    text: str = "pydoc"
    site: str = "0.mlp_out"
    n_ctx: int = 128
    n_latents: int = 1024
    n_steps: int = 500
    batch_size: int = 128
    learning_rate: float = 5e-3
    coefficients: tuple[float, ...] = (0.05, 0.15, 0.4)
    seeds: tuple[int, ...] = (0,)
    dead_after_steps: int = 40
    n_held_out: int = 8
    directory: str = "runs/sae_sweeps"

    def config(
        self, architecture: Architecture, *, resampling: Resample | Redraw | None = None, **changes: Any
    ) -> TrainConfig:
        """One way of training.

        Args:
            architecture: The variant.
            resampling: What is renewed between steps.
            changes: Fields of `StepRule` that differ.

        Returns:
            The configuration, with all coefficients.
        """
        options: dict[str, Any] = {
            "learning_rate": self.learning_rate,
            "n_steps": self.n_steps,
            "n_warm_up_steps": self.n_steps // 20,
            "n_decay_steps": self.n_steps // 5,
            "dead_after_tokens": self.dead_after_steps * self.batch_size,
        }
        return TrainConfig(
            StepRule(architecture, **(options | changes)),
            n_latents=self.n_latents,
            sites=(self.site,),
            coefficients=self.coefficients,
            n_sample_batches=max(1, min(20, self.n_steps // 4)),
            resampling=resampling,
        )


def run_sweep(
    lm: LanguageModel, setup: SweepSetup, configs: Mapping[str, TrainConfig], *, progress: bool = True
) -> SAESweep:
    """Train and evaluate SAEs in several ways on one text.

    Args:
        lm: The model.
        setup: Text, sizes, seeds.
        configs: Name to a way of training, such as from `SweepSetup.config`.
        progress: Whether to show progress bars, on a terminal.

    Returns:
        The SAEs' numbers.

    Raises:
        UnknownNameError: The model has no such site.
        InvalidInputError: Too little text, or what `sweep_saes` refuses.
    """
    if not isinstance(setup, SweepSetup):
        raise InvalidInputError(
            four_part(
                f"{type(setup).__name__} was given",
                where="run_sweep",
                expected="a SweepSetup, which says what all ways of training have in common.",
                fix='write run_sweep(lm, setup := SweepSetup(...), {"plain": setup.config(ReLU())}, ...).',
            )
        )
    packed = pack(setup.text, lm, n_ctx=setup.n_ctx)
    if not 1 <= setup.n_held_out <= len(packed.held_out):
        raise InvalidInputError(
            four_part(
                f"n_held_out = {setup.n_held_out} was given for a text with {len(packed.held_out)} held-out sequences "
                f"of {setup.n_ctx} tokens ({packed.held_out.name})",
                where="run_sweep",
                expected="at least 1, and no more than there are.",
                fix="give a longer text, or a smaller n_held_out or n_ctx.",
            )
        )
    directory = Path(setup.directory)
    folder = written_once(lm, packed.train, setup.site, directory)
    digest = hashlib.sha256(f"{folder.name} {setup.batch_size}".encode()).hexdigest()[:8]

    def open_stream(seed: int) -> ShardStream:
        return ShardStream(folder, batch_size=setup.batch_size, seed=seed)

    return sweep_saes(
        lm,
        configs,
        open_stream,
        packed.held_out.spread(setup.n_held_out),
        seeds=setup.seeds,
        directory=directory / f"states_{digest}",
        untouched_tokens=packed.held_out.rule.special_tokens,
        n_untouched=1,
        progress=progress,
    )
