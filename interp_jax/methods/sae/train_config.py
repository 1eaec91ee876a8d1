"""What a training run of SAEs is: one frozen object, checked before anything runs.

>>> from interp_jax.methods.sae.top_k import TopK
>>> config = TrainConfig(StepRule(TopK(k=2), n_steps=10), n_latents=8, sites=("5.resid_post",))
>>> check_config(config, {"5.resid_post": 16})
>>> as_json(config)["rule"]["architecture"]
{'class': 'TopK', 'k': 2, 'is_centred': True}

Sharp edges: a run is its configuration, its stream and its seed; where it is saved and how often is not part of it.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from interp_jax.core.errors import InvalidInputError, UnknownNameError, check_choice, four_part
from interp_jax.methods.sae import normalization
from interp_jax.methods.sae.decoder_norm import check_constraint
from interp_jax.methods.sae.resampling import Redraw, Resample
from interp_jax.methods.sae.train_step import StepRule

BIASES = ("mean", "geometric_median", "zero")


@dataclass(frozen=True)
class TrainConfig:
    """What a run is, the stream apart.

    Args:
        rule: What a step is: variant, optimiser, constraints, dead-latent term; `rule.n_steps` is the run's length.
        n_latents: How many latents.
        sites: Which site each SAE is about; a pair (read, write) makes a transcoder.
        coefficients: Sparsity coefficients; every site gets an SAE for each.
        scaling: Rule by which activations are scaled (see `normalization`).
        n_sample_batches: On how many batches the scaling and the first b_dec are estimated.
        b_dec: Where b_dec begins: "mean", "geometric_median" or "zero".
        has_skip: Whether transcoders have a linear map past the latents.
        resampling: `Resample` or `Redraw`, between steps.
        n_refused_max: Stop once so many steps met values that are not finite.
        seed: Of initial weights and resampling.
    """

    rule: StepRule
    n_latents: int
    sites: tuple[str | tuple[str, str], ...]
    coefficients: tuple[float, ...] = (0.0,)
    scaling: str = "unit_ms"
    n_sample_batches: int = 25
    b_dec: str = "mean"
    has_skip: bool = False
    resampling: Resample | Redraw | None = None
    n_refused_max: int = 10
    seed: int = 0


def as_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON data, with the names of the classes in it.

    Args:
        config: The configuration.

    Returns:
        Mappings, lists, numbers and strings.
    """

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return {"class": type(value).__name__} | fields
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return plain(config)


def check_config(config: TrainConfig, widths: Mapping[str, int]) -> None:
    """Raise unless the parts of a configuration go together, and with a stream.

    Args:
        config: The configuration.
        widths: The stream's sites and their widths.

    Raises:
        UnknownNameError: A site the stream does not have, or an unknown rule.
        InvalidInputError: Numbers that do not go together.
    """
    normalization.check_rule(config.scaling, where="TrainConfig")
    check_constraint(config.rule.decoder_norm, where="StepRule")
    config.rule.architecture.check(config.n_latents)
    check_choice(config.b_dec, BIASES, what="b_dec", where="TrainConfig")
    names = [name for site in config.sites for name in (site if isinstance(site, tuple) else (site,))]
    for name in names:
        if name not in widths:
            raise UnknownNameError(
                four_part(
                    f"Unknown site {name!r}",
                    where="TrainConfig, with this stream",
                    names=widths,
                    given=name,
                    fix="make the stream with that site, or train on one it has.",
                )
            )
    numbers = {
        "rule.n_steps": config.rule.n_steps,
        "n_sample_batches": config.n_sample_batches,
        "the number of sites": len(config.sites),
        "the number of coefficients": len(config.coefficients),
    }
    for name, number in numbers.items():
        if number < 1:
            raise InvalidInputError(
                four_part(
                    f"{name} = {number} was given",
                    where="TrainConfig",
                    expected="at least 1.",
                    fix="give more, such as StepRule(..., n_steps=10_000)." if "n_steps" in name else "give more.",
                )
            )
    if wrong := [coefficient for coefficient in config.coefficients if not 0 <= coefficient < math.inf]:
        raise InvalidInputError(
            four_part(
                f"The coefficient {wrong[0]} was given",
                where="TrainConfig",
                expected="finite numbers, at least 0.",
                fix="give how much sparsity counts against the error, such as coefficients=(1e-3,).",
            )
        )
    for site in config.sites:
        if isinstance(site, tuple) and site[0] != site[1]:
            _check_transcoder(config, site)


def _check_transcoder(config: TrainConfig, site: tuple[str, str]) -> None:
    architecture = config.rule.architecture
    if architecture.reads_b_dec or config.scaling not in normalization.FOLDABLE:
        what = f"scaling {config.scaling!r}" if not architecture.reads_b_dec else f"{architecture}"
        raise InvalidInputError(
            four_part(
                f"{what} was given",
                where=f"TrainConfig, for the transcoder from {site[0]} to {site[1]}",
                expected="an encoder that subtracts no b_dec (which is in the space written, not the one read), and "
                f"one scale for all tokens ({', '.join(normalization.FOLDABLE)}).",
                fix="use a variant with is_centred=False, such as TopK(k, is_centred=False).",
            )
        )
