"""Training SAEs and transcoders from a stream of activations: one call, interruptible, resumable to the last bit.

    stream = ActivationStream(lm, pack("pydoc", lm, n_ctx=128).train, "5.resid_post")
    config = TrainConfig(StepRule(TopK(k=32), n_steps=2000), n_latents=4096, sites=("5.resid_post",))
    result = train(config, stream, directory="runs/sae")
    result.saes[0]

Several sites and several sparsity coefficients make several SAEs from one stream: the model runs once. What decides
a run is its configuration, the stream and the seed; with a directory its state is saved every so often, the
stream's included, and the same call takes it up where it was, also after a kill.

>>> from interp_jax.forward.batch_streams import ArrayStream
>>> from interp_jax.methods.sae.relu import ReLU
>>> from interp_jax.methods.sae.train_step import StepRule
>>> stream = ArrayStream(np.random.default_rng(0).normal(size=(64, 3)), batch_size=16, seed=0)
>>> config = TrainConfig(StepRule(ReLU(), n_steps=5), n_latents=8, sites=("x",), coefficients=(0.1, 1.0))
>>> result = train(config, stream, progress=False)
>>> result.saes
[SAE(relu, 3 -> 8 latents -> 3 at x), SAE(relu, 3 -> 8 latents -> 3 at x)]

Sharp edges: the scaling of activations and the first b_dec are estimated on the first `n_sample_batches` batches,
which the stream has then handed out: training begins with the next.

Source: interp_jax; Bricken et al. 2023 and the sources of each variant for the defaults.
"""

from __future__ import annotations

import functools
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from interp_jax.core.errors import InvalidInputError, check_number, four_part
from interp_jax.core.sites import Site
from interp_jax.forward.batch_streams import BatchStream
from interp_jax.methods.sae import normalization, resampling
from interp_jax.methods.sae.checkpoints import Checkpoints, write_whole_text
from interp_jax.methods.sae.normalization import Normalization
from interp_jax.methods.sae.parameters import geometric_median
from interp_jax.methods.sae.resampling import Redraw, Resample
from interp_jax.methods.sae.sae import SAE
from interp_jax.methods.sae.train_config import TrainConfig, as_json, check_config
from interp_jax.methods.sae.train_step import StepInfo, TrainState, init_state, steps


class TrainResult(NamedTuple):
    """What training gives.

    Args:
        saes: One for each site and coefficient, coefficients fastest.
        coefficients: Each SAE's own.
        log: The numbers of the steps that were logged, each with `step` and lists with a value for each SAE.
        states: What the last step left, for each site.
    """

    saes: list[SAE]
    coefficients: list[float]
    log: list[dict[str, Any]]
    states: list[TrainState]

    def __repr__(self) -> str:
        return f"TrainResult({len(self.saes)} SAEs, {len(self.log)} logged steps)"


def train(
    config: TrainConfig,
    stream: BatchStream,
    *,
    directory: str | Path | None = None,
    save_every: int = 1000,
    log_every: int = 100,
    origin: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train SAEs.

    Args:
        config: The run.
        stream: The activations.
        directory: Where to save the run's state and its log; None for nowhere. A run that is there is taken up.
        save_every: After how many steps.
        log_every: After how many steps the numbers are looked at.
        origin: What the SAEs should say of where they are from.
        progress: Whether to show a progress bar, on a terminal.

    Returns:
        The SAEs and the log.

    Raises:
        UnknownNameError: A site the stream does not have, or an unknown rule.
        InvalidInputError: Numbers that do not go together, or activations that are not finite too often.
        LoadError: The directory holds a run with another configuration.
        ExportError: The directory cannot be written to.
    """
    _check_call(stream, save_every, log_every, directory, origin)
    check_config(config, stream.widths)
    run = _Run(config, stream)
    if directory is None:
        run.start()
        return run.finish(_advance(run, None, None, save_every, log_every, progress), origin)
    directory = Path(directory)
    with Checkpoints(directory, as_json(config)) as checkpoints:
        saved = checkpoints.latest()
        run.start() if saved is None else run.restore(saved[1])
        log = _Log(directory / "log.jsonl", run.n_steps)
        return run.finish(_advance(run, checkpoints, log, save_every, log_every, progress), origin)


def _check_call(stream: Any, save_every: Any, log_every: Any, directory: Any, origin: Any) -> None:
    """Raise `InvalidInputError` unless what `train` was given is of the kinds it takes."""
    for name, number in {"save_every": save_every, "log_every": log_every}.items():
        check_number(number, what=name, where="train", is_whole=True, at_least=1)
    kinds = {
        "the stream": (hasattr(stream, "next_batch"), stream, "a stream; of an array, ArrayStream(rows, batch_size)"),
        "directory": (directory is None or isinstance(directory, str | Path), directory, "a path, or None"),
        "origin": (
            origin is None or isinstance(origin, Mapping),
            origin,
            'names and values, such as {"text": "pydoc"}',
        ),
    }
    for name, (is_right, given, expected) in kinds.items():
        if not is_right:
            raise InvalidInputError(
                four_part(
                    f"{type(given).__name__} was given for {name}",
                    where="train",
                    expected=f"{expected}.",
                    fix="train(config, stream, directory=..., origin=...) takes them in this order.",
                )
            )


def _advance(
    run: _Run, checkpoints: Checkpoints | None, log: _Log | None, save_every: int, log_every: int, progress: bool
) -> list[dict[str, Any]]:
    """The steps that are left; the log of all there were."""
    entries = log.entries if log is not None else []
    n_steps = run.config.rule.n_steps
    bar = tqdm(total=n_steps, initial=run.n_steps, unit="step", disable=None if progress else True)
    with bar:
        while run.n_steps < n_steps:
            started = time.perf_counter()
            infos = run.step()
            bar.update()
            is_last = run.n_steps == n_steps
            is_logged = is_last or run.n_steps % log_every == 0
            is_saved = checkpoints is not None and (is_last or run.n_steps % save_every == 0)
            if is_logged or is_saved:
                run.check_refused()
            if is_logged:
                entry = _entry(run, infos, time.perf_counter() - started)
                bar.set_postfix(fvu=f"{np.mean(entry['fvu']):.3f}", l0=f"{np.mean(entry['l0']):.1f}")
                entries.append(entry)
                if log is not None:
                    log.write(entry)
            if checkpoints is not None and is_saved:
                checkpoints.save(run.n_steps, run.tree())
    return entries


class _Run:
    """The moving parts of a run: a state for each site, with its SAEs stacked."""

    def __init__(self, config: TrainConfig, stream: BatchStream):
        self.config, self._stream, self.n_steps = config, stream, 0
        self._pairs = [site if isinstance(site, tuple) else (site, site) for site in config.sites]
        self._coefficients = jnp.asarray(config.coefficients, jnp.float32)
        self._scalings: dict[str, Normalization] = {}
        self._states: list[TrainState] = []
        self._infos: list[StepInfo] = []

    def start(self) -> None:
        """Estimate what is estimated once, and draw the first weights."""
        sample = _sample(self._stream, self.config.n_sample_batches)
        for name in {name for pair in self._pairs for name in pair}:
            self._scalings[name] = normalization.estimate(self.config.scaling, sample[name])
        for number, (read, write) in enumerate(self._pairs):
            y = self._scaled(write, sample[write])
            self._states.append(self._first_state(number, self._stream.widths[read], np.asarray(y), read != write))

    def _first_state(self, number: int, d_in: int, y: np.ndarray, is_transcoder: bool) -> TrainState:
        config, states = self.config, []
        b_dec = {
            "mean": lambda: y.mean(axis=0, dtype=np.float64),
            "geometric_median": lambda: geometric_median(y),
            "zero": lambda: np.zeros(y.shape[1]),
        }[config.b_dec]()
        for index in range(len(config.coefficients)):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), number), index)
            options = {"has_skip": True} if is_transcoder and config.has_skip else {}
            params = config.rule.architecture.init(
                key, d_in=d_in, n_latents=config.n_latents, d_out=y.shape[1], **options
            )
            params["b_dec"] = jnp.asarray(b_dec, jnp.float32)
            states.append(init_state(config.rule, params))
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def tree(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        return {
            "n_steps": self.n_steps,
            "scalings": {name: scaling.scale for name, scaling in self._scalings.items()},
            "states": {str(number): jax.tree.leaves(state) for number, state in enumerate(self._states)},
            "stream": self._stream.state(),
        }

    def restore(self, tree: Mapping[str, Any]) -> None:
        """Take up a run where `tree` left it."""
        self.n_steps = int(tree["n_steps"])
        self._scalings = {
            name: Normalization(self.config.scaling, jnp.asarray(scale)) for name, scale in tree["scalings"].items()
        }
        for number, (read, write) in enumerate(self._pairs):
            y = np.zeros((1, self._stream.widths[write]), np.float32)
            first = functools.partial(self._first_state, number, self._stream.widths[read], y, read != write)
            leaves = [jnp.asarray(leaf) for leaf in tree["states"][str(number)]]
            self._states.append(jax.tree.unflatten(jax.tree.structure(jax.eval_shape(first)), leaves))
        self._stream.restore(tree["stream"])

    def step(self) -> list[StepInfo]:
        """One step of every SAE, and what is due after it."""
        batch = self._stream.next_batch()
        # Looked at only now: the device was at the last step while the batch was fetched.
        self.check_refused()
        scaled, infos = {name: self._scaled(name, batch[name]) for name in self._scalings}, []
        for number, (read, write) in enumerate(self._pairs):
            y = None if read == write else scaled[write]
            state, info = steps(self.config.rule, self._states[number], scaled[read], y, self._coefficients)
            self._states[number] = state
            infos.append(info)
        self.n_steps, self._infos = self.n_steps + 1, infos
        if self.config.resampling is not None and self.n_steps in self.config.resampling.at_steps:
            self._resample(self.config.resampling)
        return infos

    def _scaled(self, name: str, rows: Any) -> jax.Array:
        return _scaled(self._scalings[name], jnp.asarray(rows, jnp.float32))

    def check_refused(self) -> None:
        """Raise `InvalidInputError` if the last step was refused, and too many were."""
        # Empty before the first step.
        for (read, write), state, info in zip(self._pairs, self._states, self._infos, strict=bool(self._infos)):
            n_refused = int(np.max(state.n_refused))
            if n_refused < self.config.n_refused_max or bool(np.all(info.is_finite)):
                continue
            n_bad = int(np.max(info.n_bad))
            seen = f"{n_bad} values of the last batch" if n_bad else "the loss or its gradient, not the batch,"
            raise InvalidInputError(
                four_part(
                    f"Values that are not finite in {n_refused} steps: {seen} at {read}"
                    + (f" and {write}" if write != read else ""),
                    where=f"train, after step {self.n_steps}",
                    expected=f"finite values; at most {self.config.n_refused_max - 1} steps are passed over.",
                    fix="look at the model's dtype and the text." if n_bad else "lower the learning rate.",
                )
            )

    def _resample(self, recipe: Resample | Redraw) -> None:
        """Renew the dead latents of every SAE."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), self.n_steps)
        pool = None
        if isinstance(recipe, Resample):
            n_batches = -(-recipe.n_inputs // self._stream.batch_size)
            pool = _sample(self._stream, n_batches)
        for number, (read, write) in enumerate(self._pairs):
            renewed = []
            for index in range(len(self.config.coefficients)):
                state = jax.tree.map(lambda leaf, i=index: leaf[i], self._states[number])
                seed = (self.config.seed, self.n_steps, number, index)
                if isinstance(recipe, Redraw):
                    own_key = jax.random.fold_in(jax.random.fold_in(key, number), index)
                    is_rare = np.asarray(state.n_fired) < recipe.frequency * float(state.n_window_tokens)
                    renewed.append(resampling.redrawn(self.config.rule, state, is_rare, own_key))
                else:
                    assert pool is not None
                    renewed.append(self._resampled(recipe, state, pool, (read, write), np.random.default_rng(seed)))
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *renewed)
            # A new window begins.
            self._states[number] = stacked._replace(
                n_fired=jnp.zeros_like(stacked.n_fired), n_window_tokens=jnp.zeros_like(stacked.n_window_tokens)
            )

    def _resampled(
        self,
        recipe: Resample,
        state: TrainState,
        pool: Mapping[str, np.ndarray],
        pair: tuple[str, str],
        rng: np.random.Generator,
    ) -> TrainState:
        is_dead = np.asarray(state.n_since_fired) >= recipe.window_steps * self._stream.batch_size
        if not is_dead.any():
            return state
        rule, size = self.config.rule, self._stream.batch_size
        (x, y), losses = (pool[name] for name in pair), []
        for start in range(0, len(x), size):
            batch = (self._scaled(name, rows[start : start + size]) for name, rows in zip(pair, (x, y), strict=True))
            losses.append(np.asarray(resampling.row_losses(rule, state.params, *batch)))
        chosen = resampling.draw(rng, np.concatenate(losses), int(is_dead.sum()))
        if not chosen.size:
            return state
        into, out = (self._scaled(name, rows[chosen]) for name, rows in zip(pair, (x, y), strict=True))
        return resampling.resampled(rule, state, is_dead, into, out, encoder_norm=recipe.encoder_norm)

    def finish(self, log: list[dict[str, Any]], origin: Mapping[str, Any] | None) -> TrainResult:
        """The SAEs, in the model's own units."""
        about = tuple(sorted((origin or {}).items()))
        saes = [
            SAE(
                architecture=self.config.rule.architecture,
                params=jax.tree.map(lambda leaf, i=index: leaf[i], state.params),
                input_scaling=self._scalings[read],
                output_scaling=None if read == write else self._scalings[write],
                read=_site(read),
                write=None if read == write else _site(write),
                origin=about,
            )
            for (read, write), state in zip(self._pairs, self._states, strict=True)
            for index in range(len(self.config.coefficients))
        ]
        return TrainResult(saes, list(self.config.coefficients) * len(self._pairs), log, self._states)


class _Log:
    """The log on disk, a JSON line for each entry; what was written after the state that is taken up is dropped."""

    def __init__(self, path: Path, n_steps: int):
        lines = path.read_text().splitlines() if path.exists() else []
        self.entries = [entry for line in lines if (entry := _parsed(line)) and entry["step"] <= n_steps]
        self._path, self._is_whole = path, True
        kept = "".join(json.dumps(entry) + "\n" for entry in self.entries)
        self._tried(lambda: write_whole_text(path, kept))

    def write(self, entry: dict[str, Any]) -> None:
        """Append an entry."""
        self._tried(lambda: self._append(json.dumps(entry) + "\n"))

    def _append(self, line: str) -> None:
        with self._path.open("a") as file:
            file.write(line)

    def _tried(self, action: Callable[[], None]) -> None:
        """A log that cannot be written is no reason to lose the run; it is said once."""
        try:
            action()
        except OSError as error:
            if self._is_whole:
                warnings.warn(
                    f"{self._path} could not be written ({error}). Training goes on; lines are missing from it.",
                    stacklevel=4,
                )
            self._is_whole = False


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # The line a kill cut short.
        return None


def _entry(run: _Run, infos: Sequence[StepInfo], seconds: float) -> dict[str, Any]:
    joined = {name: np.concatenate([np.asarray(getattr(info, name)) for info in infos]) for name in StepInfo._fields}
    return {"step": run.n_steps, "seconds": seconds} | {name: values.tolist() for name, values in joined.items()}


def _sample(stream: BatchStream, n_batches: int) -> dict[str, np.ndarray]:
    """The next batches, joined."""
    batches = [stream.next_batch() for _ in range(n_batches)]
    return {name: np.concatenate([batch[name] for batch in batches]).astype(np.float32) for name in stream.widths}


@jax.jit
def _scaled(scaling: Normalization, x: jax.Array) -> jax.Array:
    return scaling(x)[0]


def _site(name: str) -> Site:
    layer, dot, rest = name.partition(".")
    return Site(int(layer), rest) if dot and layer.isdigit() else Site(None, name)
