"""Do ghost gradients or resampling give better dictionaries than plain training, at the same sparsity?

Question: latents of an SAE die, and there are several ways to bring them back: resampling (the published recipe, and
the cheap one that draws new random weights), ghost gradients in five forms, and AuxK. Loss recovered, FVU and the share
of dead latents against L0: which way is better than plain training, and by more than two seeds differ?

Expected: fewer dead latents with all of them; a better frontier where many would have died, and there only.

Found (two seeds; ± is half of what they differ by; 1,015 held-out tokens): no way beats plain training, whose loss
recovered from the mean is 0.960 ±0.003, 0.925 ±0.006 and 0.546 ±0.024 at the coefficients 0.05, 0.15 and 0.4 (L0 19.5,
6.6, 3.5). At 0.05 next to nothing ever died. At 0.15 and 0.4 the shares dead at the end are 0.02 and 0.18 with plain
training and AuxK, 0.02 and 0.22 with redrawing; ghosts leave more, 0.08 and 0.41 (original, and capped), 0.03 and 0.25
(rescaled), 0.03 and 0.27 (dead only), at a loss recovered of 0.922 to 0.925 and 0.541 to 0.547: within the seeds.
Resampling is the same up to 0.15; at 0.4 one seed collapses after it (1012 of 1024 dead), the other has 0.31 dead.
With all latents dead in the first 100 steps it is worse, 0.871 ±0.003 at L0 8.2 and 0.182 ±0.015 at 2.4. With `--beta1
0.9 --setup.coefficients 0.15 --setup.seeds 0`, where 0.15 are dead with plain training, FVU is 0.190 to 0.204, and
0.29 with all dead at first. What these ways are for, long runs of large dictionaries in which most latents die, cannot
be seen in 500 steps of 128 tokens.

>>> list(ways(SMOKE))[:4], SMOKE.setup.n_steps
(['plain', 'resampling', 'redrawing', 'ghosts'], 12)

Sharp edges: the recipes' numbers (dead after 12,500 of 25,000 steps, ...) are scaled to the length of the run. The site
is the first MLP's output, which is nearly a function of the token: a dictionary of words, easier than deeper ones.

Source: Jermyn & Templeton, Anthropic's January 2024 update (ghost gradients); Bricken et al. 2023 (resampling); Gao et
al. 2024 (2406.04093, AuxK).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interp_jax.figures.sae_frontier import sweep_figure
from interp_jax.methods.sae import AuxK, GhostGrads, Redraw, ReLU, Resample, TrainConfig
from interp_jax.methods.sae.sweep_setup import SweepSetup, run_sweep
from interp_jax.methods.sae.sweeps import SAESweep
from interp_jax.models.loading import load

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

_SETUP = SweepSetup(seeds=(0, 1))


@dataclass(frozen=True)
class Config:
    """What is compared on what.

    Args:
        model: Name or path, as in `load`.
        setup: What all SAEs have in common.
        beta1: Of Adam; with momentum more latents die.
        share_first: For this share of the steps all latents count as dead, in the way that has it so.
    """

    model: str = "smollm2-135m"
    setup: SweepSetup = _SETUP
    beta1: float = 0.0
    share_first: float = 0.2


SMOKE = Config(
    model="tests/oracles/tiny_llama",
    setup=SweepSetup(
        n_ctx=32, n_latents=32, n_steps=12, batch_size=32, coefficients=(0.02, 0.2), seeds=(0,), n_held_out=2
    ),
)


def ways(config: Config) -> dict[str, TrainConfig]:
    """The ways of training.

    Args:
        config: What is compared.

    Returns:
        Name to configuration.
    """
    setup, n_steps = config.setup, config.setup.n_steps
    # As in the recipe: four times, with a window of half the time between.
    at_steps = tuple(n_steps * i // 5 for i in (1, 2, 3, 4))
    window, n_inputs = max(1, n_steps // 10), 8 * setup.batch_size
    n_first = int(config.share_first * n_steps)

    def way(**options: Any) -> TrainConfig:
        return setup.config(ReLU(), beta1=config.beta1, **options)

    return {
        "plain": way(),
        "resampling": way(resampling=Resample(at_steps, window, n_inputs)),
        "redrawing": way(resampling=Redraw(at_steps, 1 / (window * setup.batch_size))),
        "ghosts": way(dead_term=GhostGrads()),
        "ghosts, rescaled": way(dead_term=GhostGrads("rescaled")),
        "ghosts, dead only": way(dead_term=GhostGrads("dead_only_rescaled")),
        "ghosts, capped": way(dead_term=GhostGrads(is_capped=True)),
        "ghosts, all dead at first": way(dead_term=GhostGrads(n_first_steps=n_first)),
        "AuxK": way(dead_term=AuxK()),
    }


def run(config: Config, *, lm: LanguageModel | None = None, progress: bool = True) -> SAESweep:
    """Answer the question.

    Args:
        config: What is compared on what.
        lm: The model, if it is loaded already.
        progress: Whether to show progress bars, on a terminal.

    Returns:
        The numbers of all SAEs.

    Raises:
        UnknownNameError: The model has no such site.
        InvalidInputError: Too little text, or numbers that do not go together.
    """
    return run_sweep(load(config.model) if lm is None else lm, config.setup, ways(config), progress=progress)


def plot(result: SAESweep) -> dict[str, Any]:
    """The figures of a result, by file name.

    Args:
        result: What `run` returned.

    Returns:
        Matplotlib figures.
    """
    return {"frontier.png": sweep_figure(result, title="bringing dead latents back")}
