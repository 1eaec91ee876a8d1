"""Does it help to subtract the decoder's bias before encoding?

Question: with `(x - b_dec) W_enc + b_enc` the encoder sees what the latents have to explain; without, `b_enc` can do
the same, so that any function of the one is one of the other. What is left is how they train: with b_dec subtracted
(tied to the decoder's, beginning at the activations' mean or at zero), and with nothing subtracted; with momentum and
without.

Expected: little between them without momentum; with momentum the subtraction is felt.

Found (seed 0; 1,015 held-out tokens; two seeds of the first way differ by 0.01 in loss recovered from the mean and
0.002 in FVU at the coefficients 0.05 and 0.15, by 0.05 and 0.04 at 0.4): without momentum the three are alike at the
two smaller coefficients (loss recovered 0.963, 0.964, 0.964 at L0 19.5, 21.6, 18.4; 0.919, 0.916, 0.914 at 6.6, 7.2,
6.9). At 0.4 more latents die with nothing subtracted (a share of 0.42; 0.18 and 0.17 with b_dec) and less is recovered
(0.44; 0.52 and 0.51). With beta1 = 0.99 it is felt at the smallest coefficient already: FVU 0.25, 0.27 and 0.39 and
shares dead 0.57, 0.74 and 0.89, from the mean, from zero and with none. At the larger ones nothing is learned with
0.99 in any way.

>>> len(ways(SMOKE)), list(ways(SMOKE))[0]
(6, 'from the mean, beta1 0')

Sharp edges: where nothing is subtracted, b_dec still begins at the mean and is added after decoding.

Source: Bricken et al. 2023, Towards Monosemanticity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
        beta1s: The values of Adam's beta1 it is asked for.
    """

    model: str = "smollm2-135m"
    setup: SweepSetup = _SETUP
    beta1s: tuple[float, ...] = (0.0, 0.99)


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
    found = {}
    for beta1 in config.beta1s:
        tied = config.setup.config(ReLU(is_centred=True), beta1=beta1)
        found[f"from the mean, beta1 {beta1:g}"] = tied
        found[f"from zero, beta1 {beta1:g}"] = replace(tied, b_dec="zero")
        found[f"none, beta1 {beta1:g}"] = config.setup.config(ReLU(is_centred=False), beta1=beta1)
    return found


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
    return {"frontier.png": sweep_figure(result, title="pre-encoder bias")}
