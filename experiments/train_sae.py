"""How well does a sparse dictionary stand for what a model writes, and what does it cost the model's predictions?

Question: trained on a text small enough for a laptop, how much of SmolLM2's residual stream do so many latents, so few
of them active at a time, explain on text that was held out; and how much worse does the model predict with the
reconstruction in the stream's place?

Expected: most of the variance, at a loss a little above the model's own; far better than with the mean in its place.

The run's state is saved in `directory` as it goes, and the same command takes it up where it was. The dictionary is
saved there too (`sae/`, for `load_sae`), and a site that shows each of its latents (`dashboard/index.html`). The
activations of a small text are written to disk once and read for every epoch; with `--activations buffer` or `direct`
they are computed as they are needed, for texts that are larger than the disk.

>>> Config().architecture(), SMOKE.n_steps
(TopK(k=32, is_centred=True), 30)

Sharp edges: Python's documentation is a hundred thousand tokens or two: a dictionary of thousands of latents sees each
many times over. Numbers on it are no numbers on the web.

Source: Gao et al. 2024 (2406.04093) for the method.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_jax.core.errors import InvalidInputError, check_choice, check_number, four_part
from interp_jax.data.text_streams import Packed, pack
from interp_jax.figures.sae_evaluation import density_figure, evaluation_page
from interp_jax.figures.sae_site import write_site
from interp_jax.figures.sae_training import training_figure
from interp_jax.forward.activation_files import written_once
from interp_jax.forward.batch_streams import BatchStream
from interp_jax.forward.direct_stream import DirectStream
from interp_jax.forward.shards import ShardStream
from interp_jax.forward.store import ActivationStream, Buffer
from interp_jax.methods.sae import SAE, VARIANTS, AuxK, StepRule, TrainConfig, train
from interp_jax.methods.sae.architecture import Architecture
from interp_jax.methods.sae.dashboard import latent_dashboard
from interp_jax.methods.sae.evaluation import SAEEvaluation, evaluate_sae
from interp_jax.methods.sae.files import save_sae
from interp_jax.methods.sae.train_config import check_settings
from interp_jax.models.loading import load

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

ACTIVATIONS = ("disk", "buffer", "direct")


@dataclass(frozen=True)
class Config:
    """What is trained on what.

    Args:
        model: Name or path, as in `load`.
        text: "pydoc" (Python's own documentation), a file, a folder, or a data set on disk.
        site: What is read and written.
        variant: Name of the SAE's variant.
        k: How many latents are active at a time, where the variant has a k.
        coefficient: The sparsity coefficient, which a variant without a k must be given.
        n_latents: How many latents.
        n_steps: How many steps.
        batch_size: Tokens per step.
        learning_rate: Of Adam.
        n_ctx: Tokens per sequence.
        activations: "disk" (all are written once), "buffer" (so many are mixed as they are computed) or "direct" (each
            step's come from a pass of its own and never leave the device).
        n_buffer_tokens: How many tokens' activations a buffer mixes.
        n_held_out: On how many sequences of held-out text it is evaluated.
        n_dashboard: On how many such sequences its latents are looked at, for the dashboard; 0 for none.
        dead_after_tokens: A latent that does not fire for so many tokens is dead, and brought back by AuxK.
        seed: Of weights and order.
        directory: Where the run's state and the dictionary are saved.
        save_every: After how many steps the state is saved; a run that is killed loses at most so many.
    """

    model: str = "smollm2-135m"
    text: str = "pydoc"
    site: str = "15.resid_post"
    variant: str = "top_k"
    k: int = 32
    coefficient: float | None = None
    n_latents: int = 4096
    n_steps: int = 2000
    batch_size: int = 1024
    learning_rate: float = 1e-3
    n_ctx: int = 128
    activations: str = "disk"
    n_buffer_tokens: int = 2**17
    n_held_out: int = 64
    n_dashboard: int = 256
    dead_after_tokens: int = 200_000
    seed: int = 0
    directory: str = "runs/train_sae/state"
    save_every: int = 500

    def architecture(self) -> Architecture:
        """The variant with its k.

        Returns:
            The variant.

        Raises:
            UnknownNameError: There is no such variant.
        """
        by_name = {variant.name: variant for variant in VARIANTS}
        check_choice(self.variant, by_name, what="variant", where="train_sae")
        has_k = {"k", "groups"} & set(by_name[self.variant].__dataclass_fields__)
        options: dict[str, Any] = {"k": self.k} if has_k else {}
        if "groups" in has_k:
            quarter = self.n_latents // 4
            options["groups"] = (quarter, self.n_latents - quarter)
        return by_name[self.variant](**options)

    def settings(self) -> TrainConfig:
        """The training run.

        Returns:
            Its configuration.

        Raises:
            UnknownNameError: There is no such variant.
            InvalidInputError: Nothing makes its latents sparse.
        """
        architecture = self.architecture()
        if self.coefficient is None and not hasattr(architecture, "k"):
            raise InvalidInputError(
                four_part(
                    f"The variant {self.variant!r} without a coefficient was given",
                    where="train_sae",
                    expected="how much its penalty counts against the error: nothing else makes its latents sparse.",
                    fix="add --coefficient 0.1, and look at the L0 it leads to; larger is sparser, 0 is no penalty.",
                )
            )
        rule = StepRule(
            architecture,
            learning_rate=self.learning_rate,
            n_steps=self.n_steps,
            n_warm_up_steps=self.n_steps // 20,
            n_decay_steps=self.n_steps // 5,
            dead_after_tokens=self.dead_after_tokens,
            dead_term=AuxK(),
        )
        return TrainConfig(
            rule,
            n_latents=self.n_latents,
            sites=(self.site,),
            coefficients=(self.coefficient or 0.0,),
            n_sample_batches=max(1, min(25, self.n_steps // 4)),
            seed=self.seed,
        )


SMOKE = Config(
    model="tests/oracles/tiny_llama",
    site="1.resid_post",
    k=4,
    n_latents=64,
    n_steps=30,
    batch_size=64,
    n_ctx=32,
    n_held_out=4,
    n_dashboard=4,
)


@dataclass(frozen=True)
class Result:
    """What was found.

    Args:
        model: The model's name.
        site: What was read and written.
        log: The numbers of the logged steps.
        evaluation: On held-out text.
        directory: Where the dictionary is.
        dashboard: The page of its latents, to open in a browser; empty for none.
    """

    model: str
    site: str
    log: list[dict[str, Any]]
    evaluation: SAEEvaluation
    directory: str
    dashboard: str = ""

    def __repr__(self) -> str:
        page = f" Its latents: open {self.dashboard}." if self.dashboard else ""
        return f"{self.evaluation}\nThe dictionary is in {self.directory}.{page}"


def run(config: Config, *, lm: LanguageModel | None = None, progress: bool = True) -> Result:
    """Answer the question.

    Args:
        config: What is trained on what.
        lm: The model, if it is loaded already.
        progress: Whether to show progress bars, on a terminal.

    Returns:
        The dictionary's numbers.

    Raises:
        UnknownNameError: There is no such variant or site.
        InvalidInputError: Numbers out of range, or that do not go together; most are looked at before anything runs.
        LoadError: The directory holds a run with another configuration.
    """
    settings = config.settings()
    check_settings(settings)  # Before the model's passes over the whole text.
    check_choice(config.activations, ACTIVATIONS, what="activations", where="train_sae")
    for name, least in {"batch_size": 1, "n_held_out": 1, "n_dashboard": 0, "save_every": 1}.items():
        check_number(getattr(config, name), what=name, where="train_sae", is_whole=True, at_least=least)
    model = load(config.model) if lm is None else lm
    packed = pack(config.text, model, n_ctx=config.n_ctx)
    directory = Path(config.directory)
    stream = open_stream(config, model, packed.train, directory)
    origin = {"model": model.name, "text": config.text, "n_ctx": config.n_ctx}
    trained = train(
        settings, stream, directory=directory, save_every=config.save_every, origin=origin, progress=progress
    )
    sae: SAE = trained.saes[0]
    save_sae(sae, directory / "sae", overwrite=True)
    evaluation = evaluate_sae(model, sae, packed.held_out[: config.n_held_out], n_untouched=1, progress=progress)
    page = ""
    if config.n_dashboard:
        looked_at = replace(packed.held_out, tokens=packed.held_out.tokens[: config.n_dashboard * config.n_ctx])
        seen = latent_dashboard(model, sae, looked_at, progress=progress)
        page = str(write_site(seen, directory / "dashboard", overwrite=True))
    return Result(model.name, config.site, trained.log, evaluation, str(directory / "sae"), page)


def open_stream(config: Config, lm: LanguageModel, packed: Packed, directory: Path) -> BatchStream:
    """The activations, as the configuration says: written to disk unless they are there, mixed or straight.

    Args:
        config: What is trained on what.
        lm: The model.
        packed: The text.
        directory: The run's folder.

    Returns:
        The stream.

    Raises:
        UnknownNameError: There is no such way to have them.
    """
    check_choice(config.activations, ACTIVATIONS, what="activations", where="train_sae")
    if config.activations == "direct":
        return DirectStream(lm, packed, config.site, batch_size=config.batch_size, seed=config.seed)
    if config.activations == "buffer":
        buffer = Buffer(n_rows=config.n_buffer_tokens)
        return ActivationStream(lm, packed, config.site, batch_size=config.batch_size, seed=config.seed, buffer=buffer)
    folder = written_once(lm, packed, config.site, directory, seed=config.seed)
    return ShardStream(folder, batch_size=config.batch_size, seed=config.seed)


def plot(result: Result) -> dict[str, Any]:
    """The figures of a result, by file name.

    Args:
        result: What `run` returned.

    Returns:
        Matplotlib figures and an HTML page.
    """
    title, evaluations = f"{result.model}, {result.site}", {"held-out text": result.evaluation}
    return {
        "training.png": training_figure(result.log, title=title),
        "density.png": density_figure(evaluations, title=title),
        "evaluation.html": evaluation_page(evaluations, title=title),
    }
