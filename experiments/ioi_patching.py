"""Where does a model hold the name that it is about to say?

Question: on an IOI pair whose second mention of the subject is replaced by a third name, which residual vectors, which
writes of attention and MLPs, and which heads of SmolLM2-135M carry the difference?

Expected: the difference sits at the changed name at first and moves to the last position in the upper half of the
layers, carried by few attention layers; heads that move names and heads that hold them back.

Found: denoising "... Laura offered the apple to", where " Matthew" leads " Laura" by 5.41, and with " Scott" in place
of the second " Laura" by -1.24, a difference of 6.65. That token holds all of it up to layer 17 (6.6 in each); before,
only the MLP of layer 0 is needed (6.66). Heads 17.4 (3.3) and 18.6 (1.9) see the repetition there, both by their
queries; attention writes 4.1 and 2.4 at that token. Head 20.0 carries it to the last token (4.9; the values of its
key-value head alone 3.9), and layer 23 moves the name (attention 6.1; heads 23.3 2.6, 23.7 1.4). From then on the last
position holds more than all of it (7.7), and layer 24 takes some back (-2.4; head 24.4 -1.6). All 1350 vectors and 720
heads took 57 and 44 seconds on two loaded cores, compiling included.

>>> Config().direction, SMOKE.pairs.family
('denoising', 'induction')

Sharp edges: a head here is patched at all positions at once. Positions before the first changed token have an effect of
exactly 0, and so have all but the last in the last layer.

Source: Wang et al. 2022 (2211.00593), section 3; Heimersheim and Nanda 2024 (2404.15255) on denoising.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from interp_jax.configs.pairs import Pairs
from interp_jax.figures.activation_patching import patching_figure, patching_page
from interp_jax.figures.token_text import token_texts
from interp_jax.forward.metrics import logit_difference
from interp_jax.forward.nodes import node_set
from interp_jax.methods.activation_patching import PatchingResult, activation_patching
from interp_jax.models.loading import load

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

_PAIRS = Pairs("ioi", n_pairs=1)
METRIC = "logit(answer) − logit(wrong)"


@dataclass(frozen=True)
class Config:
    """What is asked of which model.

    Args:
        model: Name or path, as in `load`.
        pairs: Which prompt pairs; what is reported is a mean over them.
        vectors: Sites patched at one position at a time.
        heads: Sites of heads, patched at all positions at once.
        direction: "noising" or "denoising".
    """

    model: str = "smollm2-135m"
    pairs: Pairs = _PAIRS
    vectors: tuple[str, ...] = ("resid_pre", "attn_out", "mlp_out")
    heads: tuple[str, ...] = ("q", "k", "v", "z")
    direction: Literal["noising", "denoising"] = "denoising"


SMOKE = Config(model="tests/oracles/tiny_llama", pairs=Pairs("induction"), vectors=("resid_pre",), heads=("z",))


@dataclass(frozen=True)
class Result:
    """What was found.

    Args:
        model: The model's name.
        prompts: The clean and the corrupted prompt of the first pair.
        labels: The tokens of the first clean prompt, with what stands there in the corrupted one where it differs.
        vectors: Effects by layer and position.
        heads: Effects by layer and head.
        seconds: How long each took.
    """

    model: str
    prompts: tuple[str, str]
    labels: tuple[str, ...]
    vectors: PatchingResult
    heads: PatchingResult
    seconds: Mapping[str, float]


def run(config: Config, *, lm: LanguageModel | None = None, progress: bool = True) -> Result:
    """Answer the question.

    Args:
        config: What is asked.
        lm: The model, if it is loaded already.
        progress: Whether to show progress bars, on a terminal.

    Returns:
        The effects.

    Raises:
        UnknownNameError: There is no such family of pairs.
    """
    model = load(config.model) if lm is None else lm
    pairs = config.pairs.make(model)
    metric = logit_difference(pairs.answer, pairs.wrong)
    found, seconds = {}, {}
    for kind, names in {"vectors": config.vectors, "heads": config.heads}.items():
        nodes = node_set(model, pairs.clean, names, is_pooled=kind == "heads")
        start = time.perf_counter()
        found[kind] = activation_patching(
            model, pairs.clean, pairs.corrupted, metric, nodes, direction=config.direction, progress=progress
        )
        seconds[kind] = time.perf_counter() - start
    clean, corrupted = (token_texts(model.decode, tokens[0]).tolist() for tokens in (pairs.clean, pairs.corrupted))
    return Result(
        model=model.name or config.model,
        prompts=(pairs.clean_texts[0], pairs.corrupted_texts[0]),
        labels=tuple(one if one == other else f"{one} / {other}" for one, other in zip(clean, corrupted, strict=True)),
        vectors=found["vectors"],
        heads=found["heads"],
        seconds=seconds,
    )


def plot(result: Result) -> dict[str, Any]:
    """The figures of a result, by file name.

    Args:
        result: What `run` returned.

    Returns:
        Matplotlib figures and HTML pages.
    """
    figures: dict[str, Any] = {}
    for kind, found in {"vectors": result.vectors, "heads": result.heads}.items():
        labels = result.labels if kind == "vectors" else None
        figures[f"{kind}.png"] = patching_figure(found, title=result.model, metric=METRIC, labels=labels)
        figures[f"{kind}.html"] = patching_page(
            found, title=result.model, metric=METRIC, labels=labels, text="\n".join(result.prompts)
        )
    return figures
