"""The steering sweep: success and loss for each coefficient, and the frontier between them.

Steering harder makes the wanted words likelier and everything else the model says worse. A sweep over coefficients
measures both: P(success) by sampling from the steered prompt, the loss on ordinary text steered in the same way. The
coefficient is data: rows of all coefficients are sampled side by side, and the losses are one sweep, so that nothing is
compiled for a coefficient.

    result = steering_sweep(lm, "I went up to my friend and said", vector, [0, 1, 2, 4, 8], vocabulary, text)
    result.frontier, result.dominates(other_result)

>>> import numpy as np
>>> result = SteeringResult("raw", ("6.resid_pre",), np.array([0.0, 4.0]), np.array([1, 6]), 8,
...     np.array([3.0, 3.2]), 3.0, 900, {}, (("a",) * 8,) * 2, "I said")
>>> result.p_success.tolist(), result.frontier.tolist()
([0.125, 0.75], [0, 1])

Sharp edges: compare methods on one prompt, vocabulary and text only. With few rollouts a frontier is noise; look at the
intervals.

Source: Turner et al. 2023 (2308.10248) for P(success); interp_jax for the frontier against the spliced loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from tqdm import tqdm

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.core.interventions import Added
from interp_jax.methods.steering.pareto import dominates, pareto_frontier
from interp_jax.methods.steering.prompt_pair import prompt_tokens
from interp_jax.methods.steering.spliced_loss import spliced_loss
from interp_jax.methods.steering.steered import (
    Sampling,
    Vectors,
    added_sizes,
    check_coefficients,
    check_sampling,
    placed,
    sample_rows,
)
from interp_jax.methods.steering.steering_vector import as_vectors
from interp_jax.methods.steering.success import Vocabulary, success_rate, wilson_interval

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel


@dataclass(frozen=True, repr=False)
class SteeringResult:
    """What a sweep over coefficients found.

    Args:
        method: What to call it.
        sites: Where the vectors were added.
        coefficients: `[coefficient]`.
        n_successes: How many completions held a word of the vocabulary, `[coefficient]`.
        n_rollouts: Completions per coefficient.
        loss: On ordinary text after the steered positions, in nats per token, `[coefficient]`.
        baseline: The same without steering.
        n_targets: How many tokens the losses are means over.
        ratios: |added| / |resid| at the prompt's positions by site, `[coefficient, pos]`.
        completions: The texts, by coefficient.
        prompt: What they continue.
    """

    method: str
    sites: tuple[str, ...]
    coefficients: np.ndarray
    n_successes: np.ndarray
    n_rollouts: int
    loss: np.ndarray
    baseline: float
    n_targets: int
    ratios: Mapping[str, np.ndarray]
    completions: tuple[tuple[str, ...], ...]
    prompt: str = ""

    @property
    def p_success(self) -> np.ndarray:
        """The share of completions that succeeded, `[coefficient]`."""
        return self.n_successes / self.n_rollouts

    @property
    def intervals(self) -> np.ndarray:
        """Its 95 % Wilson interval, `[coefficient, 2]`."""
        return np.array([wilson_interval(int(n), self.n_rollouts) for n in self.n_successes])

    @property
    def points(self) -> np.ndarray:
        """(P(success), loss) of each coefficient, `[coefficient, 2]`."""
        return np.stack([self.p_success, np.asarray(self.loss, np.float64)], axis=1)

    @property
    def frontier(self) -> np.ndarray:
        """The coefficients' indices that no other one dominates, by rising loss."""
        return pareto_frontier(self.points)

    def dominates(self, other: SteeringResult) -> bool:
        """Whether for each point of another result one of these is at least as good at both.

        Args:
            other: A sweep on the same prompt, vocabulary and text.

        Returns:
            Whether it is so.
        """
        return dominates(self.points, other.points)

    def __repr__(self) -> str:
        head = f"SteeringResult({self.method} at {', '.join(self.sites)}; {self.n_rollouts} completions each, loss "
        lines = [head + f"{self.baseline:.3f} unsteered over {self.n_targets} targets)"]
        lines.append("  coefficient   P(success)  95 % interval     loss   |added|/|resid| at most")
        largest = np.max([np.nanmax(ratio, axis=1) for ratio in self.ratios.values()], axis=0) if self.ratios else None
        on_frontier = set(self.frontier.tolist())
        for i, coefficient in enumerate(self.coefficients):
            low, high = self.intervals[i]
            ratio = "" if largest is None else f"{largest[i]:8.2f}"
            mark = "*" if i in on_frontier else " "
            lines.append(
                f"  {coefficient:11.4g}   {self.p_success[i]:10.3f}  {low:.3f} to {high:.3f}  {self.loss[i]:7.3f}"
                f"   {ratio} {mark}"
            )
        return "\n".join([*lines, "  *: no other coefficient is better at both"])


def steering_sweep(
    lm: LanguageModel,
    prompt: Any,
    vectors: Vectors,
    coefficients: Any,
    vocabulary: Vocabulary,
    text: Any,
    *,
    sampling: Sampling | None = None,
    progress: bool = True,
) -> SteeringResult:
    """P(success) and loss for each coefficient.

    Args:
        lm: The model; it needs a tokenizer.
        prompt: What is continued: one text (it gets a BOS as prompt pairs do), or token ids `[pos]`.
        vectors: One steering vector or several, which add up.
        coefficients: What they are multiplied by, `[coefficient]`; 0 for the model as it is.
        vocabulary: What a completion is looked through for.
        text: Ordinary text for the loss, token ids `[batch, pos]`.
        sampling: How many completions per coefficient (`n_samples`), and how.
        progress: Whether to show progress bars, on a terminal.

    Returns:
        Both by coefficient, with the completions.

    Raises:
        InvalidInputError: Several prompts, no rollout, no target to count, a prompt shorter than a vector, ...
        UnknownNameError: The model has no such site.
        ShapeError: A vector has another width than its site.
    """
    where, sampling = "steering_sweep", Sampling() if sampling is None else sampling
    check_sampling(sampling, where=where)
    wanted = check_coefficients(coefficients, where=where, n_axes=1)
    if lm.tokenizer is None or not isinstance(vocabulary, Vocabulary):
        what = "A model without a tokenizer" if lm.tokenizer is None else f"The vocabulary {vocabulary!r:.60}"
        raise InvalidInputError(
            four_part(
                f"{what} was given",
                where=where,
                expected="a model that turns tokens into text, and a Vocabulary to look through it for.",
                fix='load the model with its tokenizer; write Vocabulary(("rain", "cloud"), inflections=("s",)).',
            )
        )
    tokens = prompt_tokens(lm, prompt)
    if len(tokens) != 1:
        raise InvalidInputError(
            four_part(
                f"{len(tokens)} prompts were given",
                where=where,
                expected="one prompt.",
                fix="run a sweep for each prompt.",
            )
        )
    added, _ = placed(lm, tokens, vectors, where=where)
    # The loss first: what cannot be counted is told before anything is sampled.
    loss = spliced_loss(lm, text, vectors, wanted, progress=progress)
    texts = _sampled(lm, tokens, vectors, wanted, sampling, progress=progress)
    many = np.repeat(tokens, len(wanted), axis=0)
    sizes = added_sizes(
        lm, many, {site: Added(np.repeat(rows, len(wanted), 0), wanted[:, None, None]) for site, rows in added.items()}
    )
    names = dict.fromkeys(vector.name for vector in as_vectors(vectors, where=where))
    return SteeringResult(
        method=" + ".join(filter(None, names)) or "steering",
        sites=tuple(map(str, added)),
        coefficients=wanted,
        n_successes=np.array([success_rate(some, vocabulary).n_successes for some in texts]),
        n_rollouts=sampling.n_samples,
        loss=loss.loss,
        baseline=loss.baseline,
        n_targets=loss.n_targets,
        ratios={str(site): size.ratio for site, size in sizes.items()},
        completions=texts,
        prompt=lm.decode(tokens[0], skip_special_tokens=True),
    )


def _sampled(
    lm: LanguageModel,
    tokens: np.ndarray,
    vectors: Vectors,
    coefficients: np.ndarray,
    sampling: Sampling,
    *,
    progress: bool,
) -> tuple[tuple[str, ...], ...]:
    """The completions of each coefficient: rows of all of them side by side, in steps of one shape."""
    n_rows = len(coefficients) * sampling.n_samples
    of_row = np.repeat(coefficients, sampling.n_samples)
    n_steps = -(-n_rows // sampling.rows_per_step)
    n_side_by_side = -(-n_rows // n_steps)
    key = jax.random.key(sampling.seed)
    texts: list[str] = []
    with tqdm(total=n_rows, desc="rollouts", unit="text", disable=None if progress else True, leave=False) as bar:
        for step, start in enumerate(range(0, n_rows, n_side_by_side)):
            rows = np.minimum(np.arange(start, start + n_side_by_side), n_rows - 1)
            generation, _ = sample_rows(
                lm,
                np.repeat(tokens, n_side_by_side, axis=0),
                vectors,
                of_row[rows],
                sampling,
                seed=jax.random.fold_in(key, step),
                where="steering_sweep",
            )
            new = (generation.texts or ())[: n_rows - start]
            texts += new
            bar.update(len(new))
    n = sampling.n_samples
    return tuple(tuple(texts[i * n : (i + 1) * n]) for i in range(len(coefficients)))
