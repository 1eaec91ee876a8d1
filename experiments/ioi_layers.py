"""What does a model think at each layer, and which of its layers does its answer depend on?

Question: on "When Mary and John went to the store, John gave a drink to", at which layer does SmolLM2-135M come to
" Mary", and what becomes of the lead of " Mary" over " John" when one layer's attention or MLP is silenced?

Expected: names only in the upper half of the layers; a few attention layers there that move the name, and the MLP of
layer 0, without which no token is read as itself.

Found: " Mary" has 92 % and leads by 6.1, yet no layer but the last one decodes to it: layers 23 to 28 say " the". The
answer rests on the first layers (the MLP of layer 0, the attention of layers 0 and 1) and on the MLP of layer 11:
without any of these " John" overtakes. The mover of names is the attention of layer 23 (-4.6), against layer 24's
(+2.1). `interp-jax demo` runs this file and says so.

Each effect is measured twice, by a loop of running passes and by one compiled sweep, which agree to 1e-4.

>>> Config().prompt
'When Mary and John went to the store, John gave a drink to'

Sharp edges: the first time of each route includes what it compiles; later ones do not.

Source: the prompt is of the kind of Wang et al., "Interpretability in the Wild" (2211.00593).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.figures.layer_effects import effects_figure, effects_page
from interp_jax.figures.logit_lens import lens_figure, lens_page
from interp_jax.figures.token_text import visible
from interp_jax.forward.metrics import logit_difference
from interp_jax.methods.layer_effects import ROUTES, LayerEffectsResult, layer_effects
from interp_jax.methods.logit_lens import LogitLensResult, logit_lens
from interp_jax.models.loading import load

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel


@dataclass(frozen=True)
class Config:
    """What is asked of which model.

    Args:
        model: Name or path, as in `load`.
        prompt: The text whose next token is asked for.
        answer: The right next token.
        other: The wrong one it competes with.
        sites: Which sites are silenced, one at a time.
        top_k: How many tokens are kept per view and position.
        n_times: How often each route is measured; the first time it compiles.
    """

    model: str = "smollm2-135m"
    prompt: str = "When Mary and John went to the store, John gave a drink to"
    answer: str = " Mary"
    other: str = " John"
    sites: tuple[str, ...] = ("attn_out", "mlp_out")
    top_k: int = 5
    n_times: int = 2


SMOKE = Config(prompt="Mary met John. John called", sites=("29.attn_out", "29.mlp_out"), n_times=1)


@dataclass(frozen=True)
class Result:
    """What was found.

    Args:
        model: The model's name.
        prompt: The prompt.
        metric: The metric of the effects, in symbols.
        lens: The logit lens of the prompt; its last view is the model's output.
        effects: The effect of zeroing each site, by the sweep.
        effects_by_loop: The same by the loop.
        max_difference: The largest difference between the two, in logits.
        seconds: Seconds each route took, each time it was measured.
        texts: Text of every token id that occurs, by the id's digits.
    """

    model: str
    prompt: str
    metric: str
    lens: LogitLensResult
    effects: LayerEffectsResult
    effects_by_loop: LayerEffectsResult
    max_difference: float
    seconds: Mapping[str, list[float]]
    texts: Mapping[str, str]

    def decode(self, tokens: Any) -> str:
        """Text of these `tokens`, from the result alone."""
        return "".join(self.texts[str(int(token))] for token in np.ravel(tokens))


def run(config: Config, *, lm: LanguageModel | None = None, progress: bool = True) -> Result:
    """Answer the question.

    Args:
        config: What is asked.
        lm: The model, if it is loaded already.
        progress: Whether to show progress bars, on a terminal.

    Returns:
        The lens, the effects by both routes, and their times.

    Raises:
        InvalidInputError: An answer is not one token, or both are the same one.
    """
    if config.answer == config.other:
        raise InvalidInputError(
            four_part(
                f"answer and other are both {config.answer!r}",
                where="ioi_layers",
                expected="two answers that compete: the lead of one over itself is always 0.",
                fix='choose another wrong answer, such as " John".',
            )
        )
    model = load(config.model) if lm is None else lm
    tokens = model.tokenize(config.prompt)
    answer, other = (one_token(model, text) for text in (config.answer, config.other))
    metric = logit_difference(answer, other)

    lens = logit_lens(model, tokens, top_k=config.top_k)
    by_route: dict[str, LayerEffectsResult] = {}
    seconds: dict[str, list[float]] = {}
    for route in ROUTES:
        seconds[route] = []
        for _ in range(config.n_times):
            start = time.perf_counter()
            by_route[route] = layer_effects(model, tokens, metric, sites=config.sites, route=route, progress=progress)
            seconds[route].append(time.perf_counter() - start)
    ids = {int(token) for part in (tokens, lens.top_ids, lens.target) for token in np.ravel(part)}
    return Result(
        model=model.name or config.model,
        prompt=config.prompt,
        metric=f"logit({visible(config.answer)}) − logit({visible(config.other)})",
        lens=lens,
        effects=by_route["sweep"],
        effects_by_loop=by_route["loop"],
        max_difference=float(np.abs(by_route["sweep"].effects - by_route["loop"].effects).max()),
        seconds=seconds,
        texts={str(token): model.decode(np.array([token], np.int32)) for token in sorted(ids)},
    )


def plot(result: Result) -> dict[str, Any]:
    """The figures of a result, by file name.

    Args:
        result: What `run` returned.

    Returns:
        Matplotlib figures and HTML pages.
    """
    return {
        "logit_lens.png": lens_figure(result.lens, result.decode, title=result.model),
        "logit_lens.html": lens_page(result.lens, result.decode, title=result.model, text=result.prompt),
        "layer_effects.png": effects_figure(result.effects, title=result.model, metric=result.metric),
        "layer_effects.html": effects_page(
            result.effects, title=result.model, metric=result.metric, text=result.prompt
        ),
    }


def one_token(lm: LanguageModel, text: str) -> int:
    """The id of a text that is one token.

    Args:
        lm: The model.
        text: The text, with its leading space.

    Returns:
        The id.

    Raises:
        InvalidInputError: The text is several tokens.
    """
    ids = lm.tokenize(text, add_special_tokens=False)[0].tolist()
    if len(ids) != 1:
        raise InvalidInputError(
            four_part(
                f"The answer {text!r} is {len(ids)} tokens, {[lm.decode([token]) for token in ids]}",
                where="ioi_layers",
                expected="one token: the lead of one answer over another is read at one position.",
                fix='choose a word that is one token, with its leading space, such as " Mary".',
            )
        )
    return ids[0]
