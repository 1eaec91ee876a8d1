"""Does steering by an SAE's latents reach as far as steering by the raw difference, at less loss?

Question: a steering vector from two prompts makes SmolLM2 speak of weddings, or speak in anger, more often, and predict
ordinary text worse. Over coefficients and layers, what does each method pay for how much success: the raw difference,
its reconstruction by a sparse autoencoder, the few latents that contribute most, and the raw difference with what the
most frequent latents write projected out?

Expected: the raw difference at a middle layer reaches furthest; a few latents reach nearly as far at less loss, if the
autoencoder has seen texts like the prompts; frequent latents say little and can be projected out at no cost.

Found: steered to weddings, SmolLM2-135M speaks of them in 3 of 16 completions with the raw difference at layer 12,
times 1, at a loss of 2.95 nats per token (2.84 unsteered, then 0 of 16), in 2 at layers 16 and 4 (times 2, 2.97 and
3.10), in 1 at layer 8 (times 1, 2.99); harder steering costs more (3.20 and 3.43 at layer 12, times 4 and 6) and
gives no more. With what the five most frequent latents write projected out it is 4 of 16 (times 4, 3.18), at each
coefficient at a little less loss than without; the intervals overlap (.10 to .50, .07 to .43). The small dictionary
leaves 0.48 of the difference unexplained, and neither its reconstruction nor its ten strongest latents, of which two
are on at " weddings", make the model speak of one (0 of 16 at each coefficient). No latent is on for more than half
of the tokens. Anger: one completion of 16 at layer 4, times 4 ("a complete idiot"), at a loss of 3.06 (2.96
unsteered), none at layers 8 to 16 nor by latents. So what was expected of a few latents does not show here; 16
completions tell large effects only. Ten minutes of processor time.

>>> Config().studies, sorted(STUDIES)
(('weddings', 'anger'), ['anger', 'weddings'])

Sharp edges: without `sae` a small dictionary is trained on the spot, on the same text the loss is measured on (other
documents of it): Python's documentation, in which nobody marries. The vocabularies are short and miss much. SmolLM2
is small; what it says under steering is often neither on the subject nor sensible. GPT-2 XL, on which the original
settings were found (layers 6 and 20 of 48), is one flag away (`--model`), and has not been run: its weights were not
at hand.

Source: Turner et al. 2023 (2308.10248) for prompts and sampling.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from interp_jax.core.errors import InvalidInputError, check_choice, four_part
from interp_jax.data.text_streams import Packed, pack
from interp_jax.figures.steering import coefficient_figure, pareto_figure
from interp_jax.forward.batch_streams import ArrayStream
from interp_jax.forward.site_values import activations_of
from interp_jax.methods.sae import SAE, AuxK, StepRule, TopK, TrainConfig, load_sae, train
from interp_jax.methods.steering import (
    LatentDifference,
    PromptPair,
    Sampling,
    SteeringResult,
    SteeringVector,
    Vocabulary,
    project_out,
    prompt_pair,
    steering_sweep,
)
from interp_jax.models.loading import load

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel


class Study(NamedTuple):
    """What is steered to what: a `positive` and a `negative` text, the `prompt`, and the `vocabulary` of success."""

    positive: str
    negative: str
    prompt: str
    vocabulary: Vocabulary


STUDIES = {
    "weddings": Study(
        "I talk about weddings constantly",
        "I do not talk about weddings constantly",
        "I went up to my friend and said",
        Vocabulary(
            ("wedding", "wed", "marry", "marries", "married", "marriage", "bride", "bridesmaid", "groom", "honeymoon"),
            ("s", "ing"),
        ),
    ),
    "anger": Study(
        "Anger",
        "Calm",
        "I think you're",
        Vocabulary(
            (
                "anger",
                "angry",
                "angrily",
                "mad",
                "furious",
                "rage",
                "outrage",
                "hate",
                "hatred",
                "yell",
                "idiot",
                "fool",
            ),
            ("s", "d", "ed", "ing", "ish"),
        ),
    ),
}


@dataclass(frozen=True)
class Config:
    """What is steered how.

    Args:
        model: Name or path, as in `load`.
        studies: Names of `STUDIES`.
        layers: Where the raw difference is added, each in turn: before these layers.
        sae_layer: Where the methods that need an SAE add theirs; one of `layers`.
        coefficients: What vectors are multiplied by; 0 is the model as it is.
        k_top: How many pairs of position and latent the feature-restricted vector keeps.
        n_projected: How many of the latents that fire most often are projected out of the raw difference.
        n_samples: Completions per coefficient.
        max_new_tokens: Their length in tokens.
        text: Ordinary text: "pydoc" (Python's own documentation), a file, a folder, or a data set on disk.
        n_ctx: Tokens per text.
        n_texts: On how many held-out texts the loss is measured.
        sae: A saved SAE that reads `sae_layer`'s resid_pre; empty to train one.
        n_latents: Of the one that is trained.
        k: How many of its latents are active at a time.
        n_train_texts: On how many texts it is trained.
        n_steps: For how many steps.
        seed: Of weights, orders and samples.
    """

    model: str = "smollm2-135m"
    studies: tuple[str, ...] = ("weddings", "anger")
    layers: tuple[int, ...] = (4, 8, 12, 16)
    sae_layer: int = 12
    coefficients: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 6.0)
    k_top: int = 10
    n_projected: int = 5
    n_samples: int = 16
    max_new_tokens: int = 20
    text: str = "pydoc"
    n_ctx: int = 64
    n_texts: int = 8
    sae: str = ""
    n_latents: int = 2048
    k: int = 32
    n_train_texts: int = 384
    n_steps: int = 200
    seed: int = 0

    @property
    def site(self) -> str:
        """Where the SAE reads."""
        return f"{self.sae_layer}.resid_pre"


SMOKE = Config(
    model="tests/oracles/tiny_llama",
    studies=("anger",),
    layers=(1, 2),
    sae_layer=1,
    coefficients=(0.0, 4.0),
    k_top=3,
    n_samples=2,
    max_new_tokens=3,
    n_ctx=24,
    n_texts=2,
    n_latents=48,
    k=4,
    n_train_texts=16,
    n_steps=20,
)


@dataclass(frozen=True, repr=False)
class StudyResult:
    """What one study found.

    Args:
        name: Its name.
        sweeps: The sweep of each method at each layer.
        top: The latents kept by the feature-restricted vector, in words.
        dense: The dense latents and what they contribute, in words.
        fvu: What share of the difference's square the reconstruction leaves.
        dominance: Pairs of methods, the first at least as good as the second throughout, and better somewhere.
    """

    name: str
    sweeps: tuple[SteeringResult, ...]
    top: tuple[str, ...]
    dense: tuple[str, ...]
    fvu: float
    dominance: tuple[tuple[str, str], ...]

    def __repr__(self) -> str:
        lines = [f"{self.name}:", *map(repr, self.sweeps)]
        lines.append(f"  The SAE leaves {self.fvu:.2f} of the difference. Its latents: {'; '.join(self.top)}")
        lines.append(f"  Dense latents: {'; '.join(self.dense) or 'none'}")
        lines += [f"  {better} is at least as good as {worse} throughout" for better, worse in self.dominance]
        return "\n".join(lines)


@dataclass(frozen=True)
class Result:
    """What was found.

    Args:
        model: The model's name.
        studies: By name.
        sae: Which SAE, in words.
        seconds: How long each part took.
    """

    model: str
    studies: Mapping[str, StudyResult]
    sae: str
    seconds: Mapping[str, float]

    def __repr__(self) -> str:
        times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        return "\n".join([f"{self.model}, {self.sae} ({times})", *map(repr, self.studies.values())])


def run(config: Config, *, lm: LanguageModel | None = None, progress: bool = True) -> Result:
    """Answer the question.

    Args:
        config: What is steered how.
        lm: The model, if it is loaded already.
        progress: Whether to show progress bars, on a terminal.

    Returns:
        The sweeps of each study.

    Raises:
        UnknownNameError: There is no such study, or no such layer.
        InvalidInputError: The SAE's layer is not among the layers.
    """
    for name in config.studies:
        check_choice(name, STUDIES, what="study", where="steering")
    if config.sae_layer not in config.layers:
        raise InvalidInputError(
            four_part(
                f"sae_layer={config.sae_layer} and layers={config.layers} were given",
                where="steering",
                expected="the SAE's layer among the layers, for the raw difference beside it.",
                fix="add it to the layers.",
            )
        )
    model = load(config.model) if lm is None else lm
    start, seconds = time.perf_counter(), {}
    packed = pack(config.text, model, n_ctx=config.n_ctx, bos=_bos_place(model))
    sae, frequencies = dictionary(config, model, packed, progress=progress)
    seconds["SAE"] = time.perf_counter() - start
    studies = {}
    for name in config.studies:
        start = time.perf_counter()
        studies[name] = study(
            config, name, model, packed.held_out[: config.n_texts], sae, frequencies, progress=progress
        )
        seconds[name] = time.perf_counter() - start
    return Result(model.name or config.model, studies, repr(sae), seconds)


def _bos_place(lm: LanguageModel) -> str | None:
    """Texts begin as prompts do."""
    return None if lm.tokenizer is None or lm.tokenizer.bos_id is None else "sequence"


def dictionary(config: Config, lm: LanguageModel, packed: Any, *, progress: bool = True) -> tuple[SAE, np.ndarray]:
    """The SAE, loaded or trained, in the units of the activations, and how often each latent fires on the text.

    Args:
        config: What is steered how.
        lm: The model.
        packed: The text, `train` and `held_out`.
        progress: Whether to show progress bars, on a terminal.

    Returns:
        Both.
    """
    texts: Packed = packed.train
    tokens = texts[: config.n_train_texts]
    # What stands first has activations of many times the size of the others.
    rows = activations_of(lm, tokens, config.site)[config.site][:, 1:].reshape(-1, lm.W_E.shape[1])
    if config.sae:
        sae = load_sae(config.sae)
    else:
        rule = StepRule(
            TopK(k=config.k),
            learning_rate=1e-3,
            n_steps=config.n_steps,
            n_warm_up_steps=config.n_steps // 20,
            n_decay_steps=config.n_steps // 5,
            dead_after_tokens=len(rows),
            dead_term=AuxK(),
        )
        settings = TrainConfig(rule, config.n_latents, (config.site,), n_sample_batches=4, seed=config.seed)
        stream = ArrayStream({config.site: rows}, min(512, len(rows)), seed=config.seed)
        sae: SAE = train(settings, stream, progress=progress).saes[0]
    sae = sae.fold_scale()
    sample = np.asarray(sae.encode(rows[:: max(1, len(rows) // 4096)]))
    return sae, (sample != 0).mean(0)


def study(
    config: Config,
    name: str,
    lm: LanguageModel,
    text: np.ndarray,
    sae: SAE,
    frequencies: np.ndarray,
    *,
    progress: bool = True,
) -> StudyResult:
    """One study: every method over all coefficients.

    Args:
        config: What is steered how.
        name: Of the study.
        lm: The model.
        text: What the loss is measured on, token ids `[text, pos]`.
        sae: Reads `config.site`.
        frequencies: How often each of its latents fires.
        progress: Whether to show progress bars, on a terminal.

    Returns:
        The sweeps, and what the latents are.
    """
    what = STUDIES[name]
    pairs = {layer: prompt_pair(lm, what.positive, what.negative, layer) for layer in config.layers}
    pair = pairs[config.sae_layer]
    latents = pair.latents(sae.encode, sae.W_dec, frequencies=frequencies)
    vectors = [pair_.vector(name="raw difference") for pair_ in pairs.values()]
    vectors += latent_vectors(config, pair, latents)
    sampling = Sampling(n_samples=config.n_samples, max_new_tokens=config.max_new_tokens, seed=config.seed)
    sweeps = tuple(
        steering_sweep(
            lm, what.prompt, vector, config.coefficients, what.vocabulary, text, sampling=sampling, progress=progress
        )
        for vector in vectors
    )
    words = lm.to_str_tokens(pair.tokens[0])
    top = [f"{one.latent} at {words[one.position]!r} ({one.norm:.3g})" for one in latents.listed(config.k_top)]
    dense = [f"{one.latent} (on {one.frequency:.0%} of tokens, {one.norm:.3g})" for one in latents.dense()]
    left = np.square(pair.difference - latents.reconstruction).sum() / np.square(pair.difference).sum()
    labels = [f"{sweep.method} at {sweep.sites[0]}" for sweep in sweeps]
    dominance = tuple(
        (labels[i], labels[j])
        for i, one in enumerate(sweeps)
        for j, other in enumerate(sweeps)
        if one.dominates(other) and not other.dominates(one)
    )
    return StudyResult(name, sweeps, tuple(top), tuple(dense), float(left), dominance)


def latent_vectors(config: Config, pair: PromptPair, latents: LatentDifference) -> list[SteeringVector]:
    """The vectors that an SAE has a part in.

    Args:
        config: What is steered how.
        pair: The activations on both prompts.
        latents: The same as latents.

    Returns:
        Reconstruction, the top latents, and the raw difference with the most frequent latents projected out.
    """
    assert latents.frequencies is not None
    frequent = np.argsort(-latents.frequencies, kind="stable")[: config.n_projected]
    return [
        pair.vector(latents.reconstruction, name="SAE reconstruction"),
        pair.vector(latents.top(config.k_top, include_negative=True), name=f"top {config.k_top} latents"),
        pair.vector(project_out(pair.difference, latents.W_dec[frequent]), name="frequent latents out"),
    ]


def plot(result: Result) -> dict[str, Any]:
    """The figures of a result, by file name.

    Args:
        result: What `run` returned.

    Returns:
        Matplotlib figures.
    """
    figures = {}
    for name, found in result.studies.items():
        title = f"{result.model}, {name}"
        figures[f"{name}_pareto.png"] = pareto_figure(found.sweeps, title=title)
        figures[f"{name}_coefficients.png"] = coefficient_figure(found.sweeps, title=title)
    return figures
