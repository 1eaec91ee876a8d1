"""Sweeps: several ways to train an SAE, each over some sparsity coefficients and seeds, on the same batches.

A way is a `TrainConfig` under a name. All coefficients of a way are trained from one stream, and every way reads the
same batches in the same order; what is left to compare is the way. Each SAE is evaluated on the same held-out text.

    configs = {"plain": TrainConfig(StepRule(ReLU(), ...), ...), "ghosts": TrainConfig(StepRule(ReLU(), ...), ...)}
    sweep = sweep_saes(lm, configs, lambda seed: ShardStream(folder, seed=seed), packed.held_out[:32], seeds=(0, 1))
    sweep.at_l0("loss_recovered_mean", 20)      # by name: a value for each seed, on the line between two coefficients

>>> mean_and_spread([0.5, 0.75]), mean_and_spread([0.5])
('0.625 ±0.125', '0.500')

Sharp edges: two ways are better or worse at one L0 only; a coefficient means another L0 in each. Two seeds
tell a large difference from noise, no small one. All SAEs are in memory when they are evaluated.
`Resample` draws its inputs from the stream: the batches after it are later ones than the other ways read.

Source: Rajamanoharan et al. 2024 (2404.16014) for the comparison at equal L0.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from interp_jax.core.errors import InvalidInputError, check_choice, four_part
from interp_jax.forward.batch_streams import BatchStream
from interp_jax.forward.spliced_losses import ABLATIONS
from interp_jax.methods.sae.evaluation import SAEEvaluation
from interp_jax.methods.sae.evaluation_each import evaluate_each
from interp_jax.methods.sae.sae import SAE
from interp_jax.methods.sae.train_config import TrainConfig, as_json, check_config, check_settings
from interp_jax.methods.sae.training import train

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel


class SweepRow(NamedTuple):
    """One SAE of a sweep.

    Args:
        name: Of the way it was trained.
        coefficient: Its sparsity coefficient.
        seed: Of its weights and of the order of the batches.
        n_dead: How many latents had not fired for `dead_after_tokens` when training ended.
        seconds: How long training took, for all coefficients of this way and seed.
        evaluation: On held-out text.
    """

    name: str
    coefficient: float
    seed: int
    n_dead: int
    seconds: float
    evaluation: SAEEvaluation

    def numbers(self) -> dict[str, float]:
        """All numbers by name: those of the evaluation, and `dead_share` of the latents when training ended."""
        n_latents = self.evaluation.reconstruction.n_latents
        return self.evaluation.numbers() | {"dead_share": self.n_dead / n_latents}


@dataclass(frozen=True, repr=False)
class SAESweep:
    """All SAEs of a sweep.

    Args:
        model: The model's name.
        site: What they read.
        rows: The SAEs: by way, then seed, then coefficient.
    """

    model: str
    site: str
    rows: tuple[SweepRow, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The ways, in the order they were given in."""
        return tuple(dict.fromkeys(row.name for row in self.rows))

    def table(self, number: str) -> dict[str, np.ndarray]:
        """A number of every SAE.

        Args:
            number: Such as "l0", "fvu", "loss_recovered_mean", "dead_share"; see `SweepRow.numbers`.

        Returns:
            Way to `[seed, coefficient]`.

        Raises:
            UnknownNameError: There is no such number.
        """
        known = self.rows[0].numbers()
        check_choice(number, known, what="number", where="SAESweep")
        found = {}
        for name in self.names:
            rows = [row for row in self.rows if row.name == name]
            n_seeds = len({row.seed for row in rows})
            found[name] = np.array([row.numbers()[number] for row in rows]).reshape(n_seeds, -1)
        return found

    def at_l0(self, number: str, l0: float) -> dict[str, np.ndarray]:
        """A number where each way's line over log L0 passes an L0.

        Args:
            number: As in `table`.
            l0: Where, above 0.

        Returns:
            Way to `[seed]`; NaN where the coefficients reach no L0 on both sides.

        Raises:
            UnknownNameError: There is no such number.
            InvalidInputError: There is no such L0.
        """
        if not l0 > 0:
            raise InvalidInputError(
                four_part(f"l0 = {l0} was given", where="SAESweep.at_l0", expected="a number above 0.", fix="give one.")
            )
        values, places = self.table(number), self.table("l0")
        return {
            name: np.array([_between(x, y, l0) for x, y in zip(places[name], values[name], strict=True)])
            for name in self.names
        }

    def __repr__(self) -> str:
        shown = {"L0": "l0", "FVU": "fvu", "dead share": "dead_share", "never fire": "n_dead"}
        shown |= {f"recovered ({a})": f"loss_recovered_{a}" for a in ABLATIONS if a in self.rows[0].evaluation.losses}
        tables = {label: self.table(number) for label, number in shown.items()}
        n_seeds = len({row.seed for row in self.rows})
        told = f"{n_seeds} seeds: mean ± half their range" if n_seeds > 1 else "1 seed"
        width = max(len(name) for name in self.names) + 2
        lines = [f"SAESweep({len(self.rows)} SAEs at {self.site} of {self.model}; {told})"]
        lines.append(" " * (width + 9) + "".join(f"{label:>18}" for label in shown))
        for name in self.names:
            coefficients = [row.coefficient for row in self.rows if row.name == name]
            for i, coefficient in enumerate(dict.fromkeys(coefficients)):
                cells = [mean_and_spread(table[name][:, i]) for table in tables.values()]
                lines.append(f"  {name:<{width}}{coefficient:<7.4g}" + "".join(f"{cell:>18}" for cell in cells))
        return "\n".join(lines)


def mean_and_spread(values: Any) -> str:
    """The mean of the seeds, and half their range if there are several.

    Args:
        values: `[seed]`.

    Returns:
        Such as "0.625 ±0.125".
    """
    values = np.asarray(values, np.float64)
    mean, half = values.mean(), (values.max() - values.min()) / 2
    n_digits = 0 if abs(mean) >= 100 else 1 if abs(mean) >= 10 else 3
    return f"{mean:.{n_digits}f}" + (f" ±{half:.{n_digits}f}" if len(values) > 1 else "")


def sweep_saes(
    lm: LanguageModel,
    configs: Mapping[str, TrainConfig],
    open_stream: Callable[[int], BatchStream],
    tokens: Any,
    *,
    seeds: Sequence[int] = (0,),
    directory: str | Path | None = None,
    ablations: Sequence[str] = ABLATIONS,
    untouched_tokens: Sequence[int] = (),
    n_untouched: int = 0,
    progress: bool = True,
) -> SAESweep:
    """Train SAEs in several ways, and evaluate them.

    Args:
        lm: The model the activations are from.
        configs: Name to a way of training; all about one site.
        open_stream: From a seed to a stream of activations that begins at its beginning.
        tokens: Held-out text, as in `evaluate_sae`.
        seeds: Of weights and batches; they take the place of the configs' own.
        directory: Where what is trained is saved when it is done, for this call or another that has a configuration in
            common with it; None for nowhere. One directory, one text and one kind of stream.
        ablations: As in `evaluate_sae`.
        untouched_tokens: As in `evaluate_sae`.
        n_untouched: As in `evaluate_sae`.
        progress: Whether to show progress bars, on a terminal.

    Returns:
        The SAEs' numbers.

    Raises:
        InvalidInputError: No configs, seeds or text, a coefficient or seed that comes twice, configs about several
            sites, or what `train` and `evaluate_sae` refuse; configurations are looked at before anything is trained.
    """
    site = _checked(configs, open_stream, tokens, seeds)
    saes: list[SAE] = []
    about: list[tuple[str, float, int, int, float]] = []
    for name, config in configs.items():
        for seed in seeds:
            own, started = replace(config, seed=seed), time.perf_counter()
            folder = None if directory is None else Path(directory) / _folder_name(own)
            trained = train(own, open_stream(seed), directory=folder, save_every=10**9, progress=progress)
            seconds = time.perf_counter() - started
            saes += trained.saes
            dead = trained.log[-1]["n_dead"]
            about += [(name, c, seed, int(n), seconds) for c, n in zip(trained.coefficients, dead, strict=True)]
    evaluations = evaluate_each(
        lm,
        saes,
        tokens,
        ablations=ablations,
        untouched_tokens=untouched_tokens,
        n_untouched=n_untouched,
        progress=progress,
    )
    rows = (SweepRow(*told, evaluation) for told, evaluation in zip(about, evaluations, strict=True))
    return SAESweep(lm.name, site, tuple(rows))


def _between(x: np.ndarray, y: np.ndarray, at: float) -> float:
    """`y` at `at` on straight lines over log x; NaN outside."""
    order = np.argsort(x)
    inside = x > 0
    order = order[inside[order]]
    return float(np.interp(np.log(at), np.log(x[order]), y[order], left=np.nan, right=np.nan)) if len(order) else np.nan


def _folder_name(config: TrainConfig) -> str:
    """One for each configuration, whatever it is called: two sweeps that have one in common train it once."""
    return "way_" + hashlib.sha256(json.dumps(as_json(config), sort_keys=True).encode()).hexdigest()[:12]


def _checked(
    configs: Mapping[str, TrainConfig], open_stream: Callable[[int], BatchStream], tokens: Any, seeds: Sequence[int]
) -> str:
    """The one site of all configurations, once they are known to go together."""
    if not isinstance(configs, Mapping) or not hasattr(seeds, "__len__") or not callable(open_stream):
        raise _refuse(
            f"{type(configs).__name__}, {type(open_stream).__name__} and seeds of {type(seeds).__name__} were given",
            "ways of training by name, a function from a seed to a stream, and a tuple of seeds.",
            'write sweep_saes(lm, {"plain": TrainConfig(...)}, lambda seed: ShardStream(...), tokens, seeds=(0,)).',
        )
    for config in configs.values():
        check_settings(config)
    if not configs or not len(seeds):
        raise _refuse(
            f"{'No configuration' if not configs else 'No seed'} was given",
            "one or more ways of training, by name, and one or more seeds.",
            'write {"plain": TrainConfig(...)}, seeds=(0,).',
        )
    sites = {config.sites for config in configs.values()}
    if len(sites) > 1 or len(site := next(iter(sites))) != 1 or not isinstance(site[0], str):
        listed = ", ".join(f"{name}: {config.sites}" for name, config in configs.items())
        raise _refuse(
            f"Configurations about {listed} were given", "one site, the same in all.", "sweep over one site at a time."
        )
    lists: dict[str, list[float]] = {"the seeds": [float(seed) for seed in seeds]}
    lists |= {f"the coefficients of {name!r}": list(config.coefficients) for name, config in configs.items()}
    for what, values in lists.items():
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise _refuse(
                f"{twice[0]:g}, which comes {values.count(twice[0])} times among {what}, was given",
                "each once: equal ones give equal SAEs.",
                "leave the copies out.",
            )
    if len(tokens) == 0 or np.shape(tokens[:1])[-1] < 2:
        raise _refuse(
            f"A held-out text of {len(tokens)} sequences was given"
            if not len(tokens)
            else "Held-out sequences of fewer than two tokens were given",
            "sequences [sequence, pos] of two tokens or more.",
            "hold more out: pack(..., holdout=0.1), or give a longer text.",
        )
    widths = open_stream(seeds[0]).widths
    for config in configs.values():
        check_config(config, widths)
    return site[0]


def _refuse(what: str, expected: str, fix: str) -> InvalidInputError:
    return InvalidInputError(four_part(what, where="sweep_saes", expected=expected, fix=fix))
