"""Is an SAE's dictionary better than its encoder lets it be, and which dictionary is best at few latents?

Question: with a dictionary held fixed, how much of the model's loss comes back at each number of latents if they are
found by the SAE's own encoder, by its k largest latents, or by a pursuit (inference-time optimisation); and does a
dictionary that was trained at many latents per token serve better than one that was trained at few, even where few are
used?

Expected: pursuits beat the k largest latents of the encoder, most at few latents; gradient pursuit comes close to
orthogonal matching pursuit; random directions are of little use. By the report this follows, dictionaries trained at
high L0 win even at low L0.

Found (762 targets, clean loss 2.946; loss recovered from zero ablation): the report's claim does not hold here. The
best dictionary is the one that was trained at about the sparsity it is used at: at 4, 8 and 16 latents that of k = 8
under every pursuit, at 32 that of k = 32 by a hair, never that of k = 96, which is the worst of the three.

    latents                   4               8               16              32
    dictionary of k =    8   32   96     8   32   96     8   32   96     8   32   96
    encoder, k largest .867 .702 .496  .918 .850 .680     - .931 .834     - .966 .927
    MP                 .891 .808 .695  .938 .904 .829  .961 .956 .916  .977 .978 .965
    GP                 .888 .804 .688  .937 .901 .821  .963 .955 .912  .979 .980 .970
    OMP                .887 .803 .682  .938 .899 .819  .963 .957 .912  .977 .980 .967
    GP, random atoms        .362            .386            .425            .521

That pursuits beat the encoder does hold, at every sparsity and with each dictionary, the more the fewer latents are
used of those it was trained with. At its own sparsity the encoder of k = 8 costs 0.69 nats and gradient pursuit 0.53;
of k = 32, 0.29 and 0.17. Which pursuit hardly matters: gradient pursuit's FVU is within 0.002 of orthogonal
pursuit's, and matching pursuit's is up to 0.04 higher, which costs the predictions 0.02 nats at 32 latents, and at 4
and 8 mostly less than nothing (up to 0.11 better).

Encoder and gradient pursuit agree less the more latents there are: median correlation 0.84, 0.68 and 0.52 for k = 8,
32 and 96, and 0.19, -0.23 and -0.31 in the low half. The pursuit's smallest coefficients are the larger ones for 48, 70
and 74 % of the latents. All of it took 6.2 minutes of processor time, and 19 minutes on two cores wanted by some ten
other processes.

Dictionaries are trained here (TopK SAEs of several k on one site of SmolLM2, on Python's own documentation) and kept in
`directory`, or read from `saes`. All are measured on the same held-out text, and the encoder of each is compared with
gradient pursuit at the k it was trained at, latent by latent.

>>> Config().trained_ks, SMOKE.l0s
((8, 32, 96), (2, 4, 8))

Sharp edges: small dictionaries of a small text: each token was seen many times, and what wins here may not win on the
web. One seed each: small differences mean nothing. The first token of each sequence is left as it is.

Source: Smith 2024, Replacing SAE Encoders with Inference-Time Optimisation (Progress Update #1 of Google DeepMind's
mechanistic interpretability team).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.data.text_streams import Packed, pack
from interp_jax.figures.encoder_agreement import agreement_figure
from interp_jax.figures.sparsity_sweep import sparsity_figure
from interp_jax.forward.activation_files import written_once
from interp_jax.forward.shards import ShardStream
from interp_jax.forward.sparse_coder import SparseCoder
from interp_jax.methods.encoder_agreement import EncoderAgreement, encoder_agreement
from interp_jax.methods.pursuit import (
    GradientPursuit,
    MatchingPursuit,
    OrthogonalMatchingPursuit,
    Pursuit,
    PursuitEncoder,
    encoder,
    random_dictionary,
)
from interp_jax.methods.sae import SAE, AuxK, StepRule, TopK, TopLatents, TrainConfig, load_sae, save_sae, train
from interp_jax.methods.sparsity_sweep import SparsitySweep, sparsity_sweep
from interp_jax.models.loading import load

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

PURSUITS: dict[str, Pursuit] = {
    "MP": MatchingPursuit(),
    "OMP": OrthogonalMatchingPursuit(),
    "GP": GradientPursuit(),
}


@dataclass(frozen=True)
class Config:
    """What is trained and compared.

    Args:
        model: Name or path, as in `load`.
        text: "pydoc" (Python's own documentation), a file, a folder, or a data set on disk.
        site: What is read and written.
        saes: Folders of SAEs of that site, as `save_sae` writes them; empty to train some.
        trained_ks: How many latents per token the SAEs are trained at.
        n_latents: How many latents.
        n_steps: How many steps each is trained for.
        batch_size: Tokens per step.
        learning_rate: Of Adam.
        n_ctx: Tokens per sequence.
        n_train: At most so many sequences are trained on.
        l0s: At how many latents dictionaries are compared.
        n_held_out: On how many sequences of held-out text, spread over it.
        n_agreement: On how many such sequences encoders are compared latent by latent.
        seed: Of weights, order, and the random dictionary.
        directory: Where activations and dictionaries are kept.
    """

    model: str = "smollm2-135m"
    text: str = "pydoc"
    site: str = "10.resid_post"
    saes: tuple[str, ...] = ()
    trained_ks: tuple[int, ...] = (8, 32, 96)
    n_latents: int = 1024
    n_steps: int = 400
    batch_size: int = 512
    learning_rate: float = 2e-3
    n_ctx: int = 128
    n_train: int = 300
    l0s: tuple[int, ...] = (4, 8, 16, 32)
    n_held_out: int = 6
    n_agreement: int = 24
    seed: int = 0
    directory: str = "runs/ito_pareto/state"


SMOKE = Config(
    model="tests/oracles/tiny_llama",
    site="1.resid_post",
    trained_ks=(2, 8),
    n_latents=64,
    n_steps=20,
    batch_size=64,
    n_ctx=32,
    n_train=16,
    l0s=(2, 4, 8),
    n_held_out=4,
    n_agreement=4,
)


@dataclass(frozen=True)
class Result:
    """What was found.

    Args:
        model: The model's name.
        site: What was read and written.
        sweep: Each dictionary under each encoder at each sparsity.
        agreements: By dictionary, its encoder against gradient pursuit at the sparsity it was trained at.
        best: By encoder, the dictionary with the lowest loss at each sparsity.
    """

    model: str
    site: str
    sweep: SparsitySweep
    agreements: dict[str, EncoderAgreement]
    best: dict[str, tuple[str, ...]]

    def __repr__(self) -> str:
        lines = [repr(self.sweep)]
        for name, winners in self.best.items():
            lines.append(f"Lowest loss by {name}: {', '.join(winners)}")
        lines += [f"{name}: {agreement}" for name, agreement in self.agreements.items()]
        return "\n".join(lines)


def run(config: Config, *, lm: LanguageModel | None = None, progress: bool = True) -> Result:
    """Answer the question.

    Args:
        config: What is trained and compared.
        lm: The model, if it is loaded already.
        progress: Whether to show progress bars, on a terminal.

    Returns:
        The numbers.

    Raises:
        InvalidInputError: SAEs of another site, or too little text.
        UnknownNameError: There is no such site.
    """
    model = load(config.model) if lm is None else lm
    packed = pack(config.text, model, n_ctx=config.n_ctx)
    n_needed = max(config.n_held_out, config.n_agreement)
    if len(packed.held_out) < n_needed:
        raise InvalidInputError(
            four_part(
                f"{len(packed.held_out)} held-out sequences of {config.n_ctx} tokens are in {packed.held_out.name}",
                where="ito_pareto",
                expected=f"{n_needed}, by n_held_out and n_agreement.",
                fix="give a longer text, or smaller numbers.",
            )
        )
    saes = dictionaries(config, model, packed.train, progress=progress)
    # What training left out is left as it is.
    options: dict[str, Any] = {"n_untouched": 1, "untouched_tokens": packed.held_out.rule.special_tokens}
    options["progress"] = progress
    sweep = sparsity_sweep(
        model, coders(config, saes), packed.held_out.spread(config.n_held_out), l0s=config.l0s, **options
    )
    text = packed.held_out.spread(config.n_agreement)
    agreements = {
        name: encoder_agreement(model, sae, _ito(GradientPursuit(), sae, k=k), text, names=("encoder", "GP"), **options)
        for name, (sae, k) in saes.items()
    }
    trained = {name: sweep.curves[name] for name in saes}
    best = {
        by: tuple(min(trained, key=lambda name: trained[name][by].losses[at]) for at in range(len(config.l0s)))
        for by in ("top-k", *PURSUITS)
    }
    return Result(model.name, config.site, sweep, agreements, best)


def dictionaries(
    config: Config, lm: LanguageModel, text: Packed, *, progress: bool = True
) -> dict[str, tuple[SAE, int]]:
    """The SAEs by name, with the number of latents each was trained at: read where they are, trained where not.

    Args:
        config: What is trained.
        lm: The model.
        text: What is trained on.
        progress: Whether to show progress bars.

    Returns:
        Name to SAE and k.

    Raises:
        InvalidInputError: An SAE of another site, or that is no TopK SAE, was given by its folder.
    """
    if config.saes:
        found = [load_sae(path) for path in config.saes]
        for path, sae in zip(config.saes, found, strict=True):
            if str(sae.read) != config.site or sae.is_transcoder or not isinstance(sae.architecture, TopK):
                raise InvalidInputError(
                    four_part(
                        f"{sae} was found in {path}",
                        where="ito_pareto",
                        expected=f"a TopK SAE of {config.site}.",
                        fix="name that site with --site, and SAEs that were trained on it.",
                    )
                )
        by_k = [(sae, sae.architecture.k) for sae in found if isinstance(sae.architecture, TopK)]
        return {f"{number}: trained at {k}": (sae, k) for number, (sae, k) in enumerate(by_k, 1)}
    some = replace(text, tokens=text.tokens[: config.n_train * config.n_ctx])
    parts = (
        lm.name,
        config.site,
        some.fingerprint,
        config.n_train,
        config.n_latents,
        config.n_steps,
        config.batch_size,
    )
    digest = hashlib.sha256(repr((*parts, config.learning_rate, config.seed)).encode()).hexdigest()[:8]
    directory = Path(config.directory) / digest
    return {
        f"trained at {k}": (_trained(config, lm, some, k, directory, progress=progress), k) for k in config.trained_ks
    }


def _trained(config: Config, lm: LanguageModel, text: Packed, k: int, directory: Path, *, progress: bool) -> SAE:
    """The SAE of one k, from its folder if it is there."""
    target = directory / f"k_{k}"
    if target.exists():
        return load_sae(target)
    activations = written_once(lm, text, config.site, directory, seed=config.seed)
    stream = ShardStream(activations, batch_size=config.batch_size, seed=config.seed)
    rule = StepRule(
        TopK(k),
        learning_rate=config.learning_rate,
        n_steps=config.n_steps,
        n_warm_up_steps=config.n_steps // 20,
        n_decay_steps=config.n_steps // 5,
        dead_after_tokens=50 * config.batch_size,
        dead_term=AuxK(),
    )
    n_sample = max(1, min(20, config.n_steps // 4))
    settings = TrainConfig(rule, config.n_latents, sites=(config.site,), n_sample_batches=n_sample, seed=config.seed)
    origin = {"model": lm.name, "text": config.text, "n_ctx": config.n_ctx}
    sae = train(settings, stream, origin=origin, progress=progress).saes[0]
    save_sae(sae, target)
    return sae


def coders(config: Config, saes: Mapping[str, tuple[SAE, int]]) -> dict[str, dict[str, SparseCoder]]:
    """All that is compared: each dictionary with its encoder, its largest latents and the pursuits; random directions.

    Args:
        config: The sparsities, and the seed of the random directions.
        saes: Name to SAE and k.

    Returns:
        Dictionary to encoder to coder.
    """
    found: dict[str, dict[str, SparseCoder]] = {}
    for name, (sae, k) in saes.items():
        found[name] = {"encoder": sae, "top-k": TopLatents(sae, k)}
        found[name] |= {by: _ito(pursuit, sae, k=k) for by, pursuit in PURSUITS.items()}
    sae, _ = next(iter(saes.values()))
    directions = random_dictionary(jax.random.key(config.seed), n_atoms=sae.n_latents, d=sae.d_out)
    one = _ito(GradientPursuit(), sae, k=1)
    found["random"] = {"GP": replace(one, dictionary=directions)}
    return found


def _ito(pursuit: Pursuit, sae: SAE, *, k: int) -> PursuitEncoder:
    return encoder(pursuit, sae.W_dec, k=k, b_dec=sae.params["b_dec"], scaling=sae.input_scaling, read=sae.read)


def plot(result: Result) -> dict[str, Any]:
    """The figures of a result, by file name.

    Args:
        result: What `run` returned.

    Returns:
        Matplotlib figures.
    """
    title = f"{result.model}, {result.site}"
    figures: dict[str, Any] = {
        "by_dictionary.png": sparsity_figure(result.sweep, panels="dictionary", title=title),
        "by_encoder.png": sparsity_figure(result.sweep, panels="encoder", title=title),
    }
    for name, agreement in result.agreements.items():
        file = f"agreement_{''.join(char if char.isalnum() else '_' for char in name)}.png"
        figures[file] = agreement_figure(agreement, title=f"{title}, {name}")
    return figures
