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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from interp_jax.core.errors import InvalidInputError, UnknownNameError, check_choice, check_number, four_part
from interp_jax.forward.batch_streams import check_seed
from interp_jax.methods.sae import normalization
from interp_jax.methods.sae.architecture import Architecture
from interp_jax.methods.sae.dead_latents import DeadTerm
from interp_jax.methods.sae.decoder_norm import check_constraint
from interp_jax.methods.sae.resampling import Redraw, Resample
from interp_jax.methods.sae.train_step import TOKENS_MAX, StepRule

BIASES = ("mean", "geometric_median", "zero")
DTYPES = ("float32", "bfloat16", "float16")

_WHOLE = {"is_whole": True, "at_least": 0}
_COUNT = {"is_whole": True, "at_least": 1}
# What the numbers of a rule, of a run and of resampling may be.
_RULE_NUMBERS: Mapping[str, Mapping[str, Any]] = {
    "n_steps": _COUNT,
    "learning_rate": {"above": 0},
    "beta1": {"at_least": 0, "below": 1},
    "beta2": {"at_least": 0, "below": 1},
    "epsilon": {"at_least": 0},
    "n_warm_up_steps": _WHOLE,
    "n_coefficient_warm_up_steps": _WHOLE,
    "n_decay_steps": _WHOLE,
    "dead_after_tokens": _COUNT | {"at_most": TOKENS_MAX},
}
_RUN_NUMBERS: Mapping[str, Mapping[str, Any]] = {
    "n_latents": _COUNT,
    "n_sample_batches": _COUNT,
    "n_refused_max": _COUNT,
}
_RESAMPLING_NUMBERS: Mapping[str, Mapping[str, Any]] = {
    "window_steps": _COUNT,
    "n_inputs": _COUNT,
    "encoder_norm": {"above": 0},
    "frequency": {"at_least": 0, "at_most": 1},
}


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
        if isinstance(value, np.generic):
            return value.item()
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    return plain(config)


def check_config(config: TrainConfig, widths: Mapping[str, int]) -> None:
    """Raise unless the parts of a configuration go together, and with a stream.

    Args:
        config: The configuration.
        widths: The stream's sites and their widths.

    Raises:
        UnknownNameError: A site the stream does not have, or an unknown rule.
        InvalidInputError: Something of another kind, numbers out of range, or that do not go together.
    """
    check_settings(config)
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


def check_settings(config: TrainConfig) -> None:
    """Raise unless the parts of a configuration go together, whatever the stream.

    Args:
        config: The configuration.

    Raises:
        UnknownNameError: An unknown rule.
        InvalidInputError: Something of another kind, numbers out of range, or that do not go together.
    """
    _check_kind(config, TrainConfig, "TrainConfig(StepRule(TopK(k=32), n_steps=1000), n_latents=..., sites=...)")
    where = "TrainConfig"
    _check_kind(config.rule, StepRule, "StepRule(TopK(k=32), n_steps=1000)", where=where)
    _check_rule(config.rule)
    _check_numbers(config, _RUN_NUMBERS, where)
    check_seed(config.seed, where=where)
    normalization.check_rule(config.scaling, where=where)
    check_choice(config.b_dec, BIASES, what="b_dec", where=where)
    config.rule.architecture.check(config.n_latents)
    _check_list(config.sites, "sites", '("5.resid_post",)')
    _check_list(config.coefficients, "coefficients", "(1e-3,)")
    for coefficient in config.coefficients:
        check_number(coefficient, what="coefficient", where=where, at_least=0)
    if config.resampling is not None:
        _check_kind(config.resampling, Resample | Redraw, "Resample() or Redraw(at_steps=(1000,))", where=where)
        where = type(config.resampling).__name__
        _check_numbers(config.resampling, _RESAMPLING_NUMBERS, where)
        _check_list(config.resampling.at_steps, "at_steps", "(25_000, 50_000)", where=where)
        for step in config.resampling.at_steps:
            check_number(step, what="at_steps", where=where, **_COUNT)
    for site in config.sites:
        names = site if isinstance(site, tuple) else (site,)
        if len(names) > 2 or not all(isinstance(name, str) for name in names):
            raise InvalidInputError(
                four_part(
                    f"The site {site!r:.60} was given",
                    where="TrainConfig",
                    expected='a name such as "5.resid_post", or a pair (read, write) of names.',
                    fix="write the site as the stream does; stream.widths lists what it has.",
                )
            )
        if len(names) == 2 and names[0] != names[1]:
            _check_transcoder(config, (names[0], names[1]))


def _check_rule(rule: StepRule) -> None:
    where = "StepRule"
    _check_kind(rule.architecture, Architecture, "a variant with its numbers, such as TopK(k=32)", where=where)
    _check_numbers(rule, _RULE_NUMBERS, where)
    check_constraint(rule.decoder_norm, where=where)
    check_choice(rule.dtype, DTYPES, what="dtype", where=where)
    if rule.gradient_clip is not None:
        check_number(rule.gradient_clip, what="gradient_clip", where=where, above=0)
    if rule.dead_term is not None:
        _check_kind(rule.dead_term, DeadTerm, "AuxK() or GhostGrads()", where=where)
    if rule.n_warm_up_steps + rule.n_decay_steps > rule.n_steps:
        raise InvalidInputError(
            four_part(
                f"n_warm_up_steps = {rule.n_warm_up_steps} and n_decay_steps = {rule.n_decay_steps} were given",
                where=f"StepRule, with n_steps = {rule.n_steps}",
                expected="no more of both together than there are steps.",
                fix="shorten them, or train for longer.",
            )
        )


def _check_numbers(given: Any, bounds: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Those of the fields that it has."""
    for name, bound in bounds.items():
        if hasattr(given, name):
            check_number(getattr(given, name), what=name, where=where, **bound)


def _check_kind(given: Any, kind: Any, example: str, *, where: str = "train") -> None:
    if not isinstance(given, kind):
        name = f"The class {given.__name__}" if isinstance(given, type) else f"{type(given).__name__} {given!r:.60}"
        raise InvalidInputError(
            four_part(
                f"{name} was given", where=where, expected=f"{example}.", fix="make one, with its numbers in brackets."
            )
        )


def _check_list(given: Any, what: str, example: str, *, where: str = "TrainConfig") -> None:
    is_list = isinstance(given, tuple | list)
    if not is_list or not given:
        raise InvalidInputError(
            four_part(
                f"the number of {what} = 0 was given" if is_list else f"{what} = {given!r:.60} was given",
                where=where,
                expected="a tuple with at least one in it.",
                fix=f"write {what}={example}.",
            )
        )


def _check_transcoder(config: TrainConfig, site: tuple[str, str]) -> None:
    architecture = config.rule.architecture
    is_tied = getattr(architecture, "is_tied", False)
    if architecture.reads_b_dec or is_tied or config.scaling not in normalization.FOLDABLE:
        what = f"{architecture}" if architecture.reads_b_dec or is_tied else f"scaling {config.scaling!r}"
        raise InvalidInputError(
            four_part(
                f"{what} was given",
                where=f"TrainConfig, for the transcoder from {site[0]} to {site[1]}",
                expected="an encoder that subtracts no b_dec (which is in the space written, not the one read), "
                f"weights of its own (not tied), and one scale for all tokens ({', '.join(normalization.FOLDABLE)}).",
                fix="use a variant with is_centred=False, such as TopK(k, is_centred=False).",
            )
        )
