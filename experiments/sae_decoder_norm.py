"""Must the rows of an SAE's decoder have norm 1?

Question: L1 can be cheated by small latents and large decoder rows, so rows are held at norm 1, or at most 1, or are
free under a penalty that weighs each latent by its row's norm. What does each give at the same L0, and what does the
plain penalty with free rows, which can be cheated?

Expected: little between the first three; with the plain penalty and free rows a coefficient that does nothing.

Found (seed 0 only; two seeds of the first way differ by up to 0.01 in loss recovered and 0.002 in FVU at the two
smaller coefficients, 0.05 and 0.04 at 0.4; 1,015 held-out tokens): "1" and "at most 1" are the same within that at all
coefficients (loss recovered from the mean 0.963 and 0.955, 0.919 and 0.914, 0.522 and 0.523). "Free, weighted" has a
little fewer latents above 0 and a little more left unexplained (L0 18.6 for 19.5, FVU 0.128 for 0.123). The plain
penalty is cheated: rows are 1.5, 2.0 and 3.0 times as long after 500 steps (l1_weighted / l1), the coefficient does
something all the same, and the reconstruction shrinks less (0.93 for 0.81 at 0.4). It gives L0 15.3 and FVU 0.157
where norm 1 gives 19.5 and 0.123, and more dead latents: 0.35 for 0.18 at the largest coefficient. That it costs loss
at equal L0 does not show at this size: at 0.4 it recovers 0.58 with 2.8 latents, norm 1 0.52 with 3.3.

>>> list(ways(SMOKE))[1:3]
['at most 1', 'free, weighted penalty']

Sharp edges: in a short run rows have little time to grow. `l1_weighted` / `l1` is the mean norm of the rows in use.

Source: Bricken et al. 2023 (norm 1); Anthropic's April 2024 update (free, weighted).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interp_jax.figures.sae_frontier import sweep_figure
from interp_jax.methods.sae import ReLU, TrainConfig
from interp_jax.methods.sae.sweep_setup import SweepSetup, run_sweep
from interp_jax.methods.sae.sweeps import SAESweep
from interp_jax.models.loading import load

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

_SETUP = SweepSetup()


@dataclass(frozen=True)
class Config:
    """What is compared on what.

    Args:
        model: Name or path, as in `load`.
        setup: What all SAEs have in common.
    """

    model: str = "smollm2-135m"
    setup: SweepSetup = _SETUP


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
    setup = config.setup
    return {
        "1": setup.config(ReLU()),
        "at most 1": setup.config(ReLU(), decoder_norm="at_most_one"),
        "free, weighted penalty": setup.config(ReLU(is_norm_weighted=True), decoder_norm="free"),
        "free, plain penalty": setup.config(ReLU(), decoder_norm="free"),
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
    title = "norm of the decoder's rows"
    return {
        "frontier.png": sweep_figure(result, title=title),
        "norms.png": sweep_figure(result, panels=("l1", "l1_weighted", "shrinkage"), title=title),
    }
