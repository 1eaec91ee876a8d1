"""Steered passes and steered text: vectors added to the residual stream, and how large they are against it.

    steered = steered_logits(lm, tokens, vector, coefficient=4.0)       # .logits, .sizes: |added| / |resid|
    steered = steered_generation(lm, "I went up to my friend and said", vector, coefficient=4.0)
    lm.intervene(tokens, additions(lm, tokens, vector, coefficient=4.0))  # as interventions, for any pass

Several vectors add up, at one site or at several, in any order. In generation a vector acts on the prompt alone by
default: at each step after that the model reads one new token, which is not steered again. With `at="all"` or
"generated" a vector of one row is added at every new token too.

>>> Sampling(n_samples=2).top_p
0.3

Sharp edges: sizes are against the residual as it is when the site is reached, with what was added at earlier sites in
it. A coefficient of 0 gives the model's own logits. What is sampled depends on how many rows are sampled together.

Source: Turner et al. 2023 (2308.10248), and the settings of its code for sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part
from interp_jax.core.interventions import Added, apply_intervention
from interp_jax.core.sites import Site
from interp_jax.methods.steering.prompt_pair import prompt_tokens
from interp_jax.methods.steering.steering_vector import SteeringVector, as_vectors, place, residual_site

if TYPE_CHECKING:
    from interp_jax.models.generate import Generation
    from interp_jax.models.language_model import LanguageModel

Vectors = SteeringVector | Sequence[SteeringVector]


@dataclass(frozen=True)
class Sampling:
    """How steered text is sampled; by default as in the original post.

    Args:
        n_samples: How many texts per prompt (and per coefficient, in a sweep).
        max_new_tokens: Most tokens to add.
        temperature: 0 takes the most probable token.
        top_p: Sample among the most probable tokens that together reach this probability.
        frequency_penalty: Taken from a token's logit for each time it is in the text so far.
        seed: What is drawn with.
        at: Which positions are steered: the "prompt" (the placement says where), the "generated" tokens, or "all".
        stop_at_eos: Whether a text ends with the tokenizer's end-of-text token.
        rows_per_step: Most texts sampled side by side in a sweep.
    """

    n_samples: int = 16
    max_new_tokens: int = 40
    temperature: float = 1.0
    top_p: float | None = 0.3
    frequency_penalty: float = 1.0
    seed: int = 0
    at: Literal["prompt", "generated", "all"] = "prompt"
    stop_at_eos: bool = True
    rows_per_step: int = 64


@dataclass(frozen=True, repr=False)
class AddedSize:
    """How large an addition is against the residual stream, position by position.

    Args:
        added: |coefficient * rows|, `[batch, pos]`.
        residual: |residual| before the addition, `[batch, pos]`; NaN at padding.
    """

    added: np.ndarray
    residual: np.ndarray

    @property
    def ratio(self) -> np.ndarray:
        """|added| / |residual|, `[batch, pos]`; NaN at padding."""
        return self.added / np.where(self.residual == 0, np.nan, self.residual)

    def __repr__(self) -> str:
        row = self.ratio[0][~np.isnan(self.ratio[0])]
        shown = " ".join(f"{ratio:.2f}" for ratio in row[:24]) + (" ..." if len(row) > 24 else "")
        return f"|added| / |resid| by position: {shown}"


@dataclass(frozen=True)
class SteeredLogits:
    """A steered pass.

    Args:
        logits: `[batch, pos, d_vocab]`.
        sizes: How large the addition was, by site.
    """

    logits: jax.Array
    sizes: Mapping[Site, AddedSize]


@dataclass(frozen=True)
class SteeredGeneration:
    """Steered text.

    Args:
        generation: The tokens and texts; the rows of one prompt stand together.
        sizes: How large the addition was, by site, over prompt and new tokens as far as they were steered.
    """

    generation: Generation
    sizes: Mapping[Site, AddedSize]

    @property
    def texts(self) -> tuple[str, ...]:
        """The completions, without the prompts."""
        return self.generation.texts or ()

    def __str__(self) -> str:
        return str(self.generation)


def placed(
    lm: LanguageModel, tokens: np.ndarray, vectors: Vectors, *, where: str
) -> tuple[dict[Site, np.ndarray], np.ndarray]:
    """What vectors add to each site of a pass, and where.

    Args:
        lm: The model.
        tokens: Token ids of the target, `[batch, pos]`.
        vectors: One steering vector or several, which add up.
        where: The public call, for error messages.

    Returns:
        Site to float32 `[batch, pos, d_model]`, and bool `[batch, pos]`.

    Raises:
        InvalidInputError: There is no vector, or the target is shorter than one.
        UnknownNameError: The model has no such site.
        ShapeError: A vector has another width than its site.
    """
    total: dict[Site, np.ndarray] = {}
    is_steered = np.zeros(tokens.shape, bool)
    forms = {row.site: row.value for row in lm.sites().rows}
    for vector in as_vectors(vectors, where=where):
        site = residual_site(lm, vector.site, where=where)
        if (width := forms[site].shape[-1]) != vector.values.shape[1]:
            raise ShapeError(
                four_part(
                    f"{vector!r} was given",
                    where=f"{where}, site {site}",
                    expected=f"rows of width {width}.",
                    fix="use the vector with the model and the site it was made for.",
                )
            )
        added, steers = place(vector, tokens)
        total[site] = total[site] + added if site in total else added
        is_steered |= steers
    order = [site for site in forms if site in total]
    return {site: total[site] for site in order}, is_steered


def additions(lm: LanguageModel, tokens: Any, vectors: Vectors, *, coefficient: float = 1.0) -> dict[Site, Added]:
    """Steering as interventions on one pass over tokens: for `lm.intervene`, `ij.intervene` and sweeps.

    Args:
        lm: The model.
        tokens: Token ids of the target, `[batch, pos]`.
        vectors: One steering vector or several, which add up.
        coefficient: What they are multiplied by.

    Returns:
        Site to what is added there.

    Raises:
        InvalidInputError: The target is shorter than a vector, or the coefficient is not finite.
        UnknownNameError: The model has no such site.
        ShapeError: A vector has another width than its site.
    """
    tokens = np.asarray(lm.check_tokens(tokens, where="additions"))
    check_coefficients(coefficient, where="additions")
    rows, _ = placed(lm, tokens, vectors, where="additions")
    return {site: Added(added, np.float32(coefficient)) for site, added in rows.items()}


def steered_logits(lm: LanguageModel, tokens: Any, vectors: Vectors, *, coefficient: float = 1.0) -> SteeredLogits:
    """A pass in which steering vectors are added.

    resid[b, p] becomes resid[b, p] + coefficient * rows[b, p]

    Args:
        lm: The model.
        tokens: Token ids, `[batch, pos]`; a text, or several, gets a BOS as prompt pairs do.
        vectors: One steering vector or several, which add up.
        coefficient: What they are multiplied by.

    Returns:
        The logits, and how large what was added is against the residual.

    Raises:
        InvalidInputError: The target is shorter than a vector, or the coefficient is not finite.
        UnknownNameError: The model has no such site.
        ShapeError: A vector has another width than its site.

    Source: Turner et al. 2308.10248, algorithm 1.
    """
    tokens = prompt_tokens(lm, tokens)
    table = additions(lm, tokens, vectors, coefficient=coefficient)
    sizes: dict[Site, AddedSize] = {}
    for layer, name, value in (running_pass := lm.run(tokens, sites=list(table))):
        site = Site(layer, name)
        sizes[site] = _size(table[site], value, tokens)
        running_pass.modified_value = apply_intervention(table[site], value, where=str(site))
    return SteeredLogits(running_pass.retval, sizes)


def added_sizes(lm: LanguageModel, tokens: np.ndarray, table: Mapping[Site, Added]) -> dict[Site, AddedSize]:
    """How large additions are; what comes after the last of their sites is not computed.

    Args:
        lm: The model.
        tokens: Token ids, `[batch, pos]`.
        table: What is added to which site.

    Returns:
        Site to size.
    """
    sizes: dict[Site, AddedSize] = {}
    with lm.run(tokens, sites=list(table)) as running_pass:
        for layer, name, value in running_pass:
            site = Site(layer, name)
            sizes[site] = _size(table[site], value, tokens)
            if len(sizes) == len(table):
                break
            running_pass.modified_value = apply_intervention(table[site], value, where=str(site))
    return sizes


def _size(added: Added, value: Any, tokens: np.ndarray) -> AddedSize:
    residual = np.linalg.norm(np.asarray(value, np.float32), axis=-1)
    factor = np.abs(np.broadcast_to(added.coefficient, (len(tokens), 1, 1))[..., 0])
    norms = np.broadcast_to(factor * np.linalg.norm(added.value, axis=-1), tokens.shape)
    return AddedSize(norms.astype(np.float32), np.where(tokens >= 0, residual, np.nan))


def steered_generation(
    lm: LanguageModel,
    prompt: Any,
    vectors: Vectors,
    *,
    coefficient: float = 1.0,
    sampling: Sampling | None = None,
) -> SteeredGeneration:
    """Continue prompts with a steered model.

    Args:
        lm: The model.
        prompt: A text or several (each gets a BOS as prompt pairs do), or token ids `[batch, pos]`.
        vectors: One steering vector or several, which add up.
        coefficient: What they are multiplied by; 0 for the model as it is.
        sampling: How many texts, and how.

    Returns:
        The texts, and how large what was added is against the residual.

    Raises:
        InvalidInputError: The prompt is shorter than a vector, a vector of several rows is to act on new tokens, or a
            setting is out of range.
        UnknownNameError: The model has no such site.
        ShapeError: A vector has another width than its site.
    """
    sampling = Sampling() if sampling is None else sampling
    check_sampling(sampling, where="steered_generation")
    check_coefficients(coefficient, where="steered_generation")
    tokens = np.repeat(prompt_tokens(lm, prompt), sampling.n_samples, axis=0)
    coefficients = np.full(len(tokens), coefficient, np.float32)
    generation, table = sample_rows(
        lm, tokens, vectors, coefficients, sampling, seed=sampling.seed, where="steered_generation"
    )
    # The last new token is never read, so nothing is added to it.
    n_read = tokens.shape[1] if sampling.at == "prompt" else max(tokens.shape[1], generation.tokens.shape[1] - 1)
    seen = {site: Added(added.value[:, :n_read], added.coefficient) for site, added in table.items()}
    return SteeredGeneration(generation, added_sizes(lm, generation.tokens[:, :n_read], seen))


def sample_rows(
    lm: LanguageModel,
    tokens: np.ndarray,
    vectors: Vectors,
    coefficients: np.ndarray,
    sampling: Sampling,
    *,
    seed: Any,
    where: str,
) -> tuple[Generation, dict[Site, Added]]:
    """Continue rows of tokens, each steered with a coefficient of its own.

    Args:
        lm: The model.
        tokens: Token ids, `[batch, pos]`.
        vectors: One steering vector or several, which add up.
        coefficients: One per row, `[batch]`.
        sampling: How.
        seed: An integer or a PRNG key.
        where: The public call, for error messages.

    Returns:
        One text per row, and what was added, `[batch, prompt and new tokens, d_model]`.

    Raises:
        InvalidInputError: As for `steered_generation`.
    """
    check_coefficients(coefficients, where=where, n_axes=1)
    n_prompt, n_total = tokens.shape[1], tokens.shape[1] + sampling.max_new_tokens
    rows, _ = placed(lm, tokens, vectors, where=where)
    # As long as the finished text, so that no addition of one column is taken for one everywhere.
    rows = {site: np.pad(added, ((0, 0), (0, n_total - n_prompt), (0, 0))) for site, added in rows.items()}
    if sampling.at != "prompt":
        for vector in as_vectors(vectors, where=where):
            rows[residual_site(lm, vector.site, where=where)][:, n_prompt:] += _only_row(vector, where)
    if sampling.at == "generated":
        rows = {site: np.concatenate([0 * added[:, :n_prompt], added[:, n_prompt:]], 1) for site, added in rows.items()}
    table = {site: Added(added, coefficients.reshape(-1, 1, 1)) for site, added in rows.items()}
    generation = lm.generate(
        tokens,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        frequency_penalty=sampling.frequency_penalty,
        seed=seed,
        stop_at_eos=sampling.stop_at_eos,
        interventions=table,
        use_cache=lm.upstream.step is not None,
    )
    return generation, table


def _only_row(vector: SteeringVector, where: str) -> np.ndarray:
    if len(vector) != 1:
        raise InvalidInputError(
            four_part(
                f"A vector of {len(vector)} rows to be added at every generated token",
                where=where,
                expected="a vector of one row, or at='prompt'.",
                fix="choose a row, vector.row(2), or the mean, SteeringVector(vector.values.mean(0), vector.site).",
            )
        )
    return vector.values[0]


def check_coefficients(coefficients: Any, *, where: str, n_axes: int = 0) -> np.ndarray:
    """Coefficients as float32, once they are known to be finite there.

    Args:
        coefficients: A number or several.
        where: The public call, for error messages.
        n_axes: 0 for one number, 1 for several, of which one number is one.

    Returns:
        An array of them, with so many axes.

    Raises:
        InvalidInputError: There is none, too many, or one is no finite number.
    """
    array = np.asarray(coefficients)
    array = np.atleast_1d(array) if n_axes else array
    with np.errstate(over="ignore"):
        numbers = array.astype(np.float32) if array.dtype.kind in "iuf" else np.full(1, np.nan)
    if array.size == 0 or array.ndim != n_axes or not np.isfinite(numbers).all():
        raise InvalidInputError(
            four_part(
                f"coefficient {coefficients!r:.60} was given",
                where=where,
                expected="finite numbers, at least one, [coefficient]." if n_axes else "one finite number.",
                fix="choose a number, such as 4.0; 0 leaves the model as it is.",
            )
        )
    return numbers


def check_sampling(sampling: Sampling, *, where: str) -> None:
    """Refuse a sampling that asks for no text.

    Args:
        sampling: How text is sampled.
        where: The public call, for error messages.

    Raises:
        InvalidInputError: It does.
    """
    wrong = [
        f"{name}={value!r}"
        for name in ("n_samples", "rows_per_step", "max_new_tokens")
        if isinstance(value := getattr(sampling, name), bool) or not isinstance(value, int | np.integer) or value < 1
    ]
    wrong += [] if sampling.at in ("prompt", "generated", "all") else [f"at={sampling.at!r}"]
    if wrong:
        raise InvalidInputError(
            four_part(
                f"{', '.join(wrong)} was given",
                where=where,
                expected="n_samples, rows_per_step and max_new_tokens from 1; at 'prompt', 'generated' or 'all'.",
                fix="choose values in range.",
            )
        )
