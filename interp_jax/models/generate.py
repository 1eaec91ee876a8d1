"""Generation: tokens one after another, with a key-value cache, sampling, and sites changed along the way.

Each step is a pass in pieces (`interp_jax.models.passes`): a layer is compiled once for reading the prompts and once
for one token, whatever the number of layers and steps; other values, layers and settings compile nothing.

Interventions see positions as the columns of the finished text, padding and prompt included. An array, mask or addition
whose position axis has length 1 (or that lacks the axis) acts at every position; one as long as the prompt acts
there and nowhere later; one as long as prompt and new tokens together has a row for each column. A function gets
the value of the columns at hand: all of the prompt's, then one at a time.

>>> import jax.numpy as jnp
>>> def forward(params, tokens):  # the next token is one more than the last
...     return 9.0 * jax.nn.one_hot((tokens + 1) % 5, 5)
>>> count = Upstream("count", forward)
>>> generate(count, {}, np.array([[-1, 1], [3, 4]]), Settings(max_new_tokens=3, use_cache=False)).tokens
array([[-1,  1,  2,  3,  4],
       [ 3,  4,  0,  1,  2]], dtype=int32)

Sharp edges: a function that mixes positions (a mean over them) cannot give the same with a cache as without. Under
a cache, `attn_scores` and `pattern` have a key for each column there is room for, the ones not yet written masked.
A row that has ended goes on as padding.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from interp_jax.core.errors import InvalidInputError, ShapeError, UnsupportedModelError, four_part
from interp_jax.core.interventions import Added, Intervention, Masked, apply_intervention, describe
from interp_jax.core.sites import Site, select_sites
from interp_jax.models import passes
from interp_jax.models.sampling import Sampler, penalised, sample
from interp_jax.models.upstream import PAD, KVCache, Upstream
from interp_jax.transforms import running_pass
from interp_jax.transforms.compilations import counted_jit

if TYPE_CHECKING:
    from interp_jax.models.tokenizers import Tokenizer

# Room in the cache grows by this many columns, so that prompts and lengths that differ a little share a program.
ROOM_STEP = 64
# Sites whose axes are [batch, head, query, key]; all others are [batch, pos, ...].
_BY_QUERY_AND_KEY = ("attn_scores", "pattern")


@dataclass(frozen=True)
class Settings:
    """How to generate.

    Args:
        max_new_tokens: Most tokens to add, at least 1.
        temperature: 0 takes the most probable token; otherwise logits are divided by it and sampled from.
        top_k: Sample among the k most probable tokens only.
        top_p: Sample among the most probable tokens that together reach this probability only, in (0, 1].
        frequency_penalty: Taken from a token's logit for each time it is in the text so far, prompt included.
        eos_id: The token that ends a row, None if nothing does.
        at: Positions at which interventions act: "all", those of the "prompt", or the "generated" ones.
        use_cache: Whether keys and values are kept from step to step.
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    frequency_penalty: float = 0.0
    eos_id: int | None = None
    at: Literal["all", "prompt", "generated"] = "all"
    use_cache: bool = True


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Args:
        tokens: Prompts and what follows them, int32 `[batch, pos]`; `PAD` before a short prompt and after the end.
        n_prompt: How many columns of `tokens` are the prompts.
        log_probs: Log probability of each new token under the model (before penalty, temperature, top-k and top-p), in
            nats, `[batch, new]`; 0 after the end.
        texts: The new tokens of each row as text, None without a tokenizer.
    """

    tokens: np.ndarray
    n_prompt: int
    log_probs: np.ndarray
    texts: tuple[str, ...] | None = None

    @property
    def new_tokens(self) -> np.ndarray:
        """The tokens after the prompts, `[batch, new]`."""
        return self.tokens[:, self.n_prompt :]

    def with_text(self, tokenizer: Tokenizer) -> Generation:
        """The same with `texts` filled in by a tokenizer; what ended a row is left out of its text."""
        texts = tuple(tokenizer.decode(row, skip_special_tokens=True) for row in self.new_tokens.tolist())
        return dataclasses.replace(self, texts=texts)

    def __str__(self) -> str:
        return repr(self) if self.texts is None else "\n".join(self.texts)


def generate(
    upstream: Upstream,
    params: Any,
    tokens: np.ndarray,
    settings: Settings,
    *,
    interventions: Mapping[Any, Intervention] | None = None,
    key: Any = 0,
    n_ctx: int | None = None,
) -> Generation:
    """Continue prompts.

    Args:
        upstream: The model's functions.
        params: Its parameters.
        tokens: Prompts, int32 `[batch, pos]`; shorter ones are padded on the left.
        settings: How to generate.
        interventions: Selector to what is done to the sites it picks.
        key: A PRNG key, or an integer seed. Rows and steps draw independently of each other.
        n_ctx: Most tokens the model can read, if known.

    Returns:
        The generation.

    Raises:
        InvalidInputError: A setting is out of range, or a prompt is padded on the right.
        UnknownNameError: A selector matches no site.
        ShapeError: An intervention does not fit its site.
        UnsupportedModelError: A cache is asked for and the model has none.
    """
    _check(settings, tokens, n_ctx)
    batch, n_prompt = tokens.shape
    total = n_prompt + settings.max_new_tokens
    room = -(-total // ROOM_STEP) * ROOM_STEP
    room = total if n_ctx is None else min(room, n_ctx)
    edits = _edits(upstream, params, interventions or {}, (batch, n_prompt, total, room))
    sampler = Sampler(
        settings.temperature == 0, settings.top_k, settings.top_p is not None, settings.frequency_penalty != 0
    )
    knobs = {
        "temperature": np.float32(settings.temperature),
        "top_p": np.float32(settings.top_p or 1.0),
        "frequency_penalty": np.float32(settings.frequency_penalty),
    }
    key = _key(key)

    buffer = np.full((batch, room), PAD, np.int32)
    buffer[:, :n_prompt] = tokens
    log_probs = np.zeros((batch, settings.max_new_tokens), np.float32)
    running = np.ones(batch, bool)
    step, cache = _cache(upstream, batch, room) if settings.use_cache else (None, None)
    for n_new in range(settings.max_new_tokens):
        end = n_prompt + n_new
        start = end - 1 if step is not None and n_new > 0 else 0
        at_hand = _at_columns(edits, start, n_prompt, settings.at)
        if step is not None:
            logits, cache = passes.edit(step, (params, cache, buffer[:, start:end]), at_hand)
        else:
            logits = passes.edit(upstream.forward, (params, buffer), at_hand)
        last = lax.dynamic_index_in_dim(logits, np.int32(end - 1 - start), axis=1, keepdims=False)
        chosen, log_prob = _choose(last, buffer, key, np.int32(n_new), knobs, sampler=sampler)
        buffer[:, end] = np.where(running, np.asarray(chosen), PAD)
        log_probs[:, n_new] = np.where(running, np.asarray(log_prob), 0.0)
        _require_numbers(log_probs[:, n_new], n_new)
        running &= buffer[:, end] != (PAD if settings.eos_id is None else settings.eos_id)
        if not running.any():
            total = end + 1
            break
    return Generation(buffer[:, :total].copy(), n_prompt, log_probs[:, : total - n_prompt])


def _choose_tokens(
    logits: jax.Array, text: jax.Array, key: Any, n_new: Any, knobs: dict[str, Any], *, sampler: Sampler
) -> tuple[jax.Array, jax.Array]:
    """The next token of each row, from its logits and the text so far, and its log probability under the model."""
    rows = jnp.arange(logits.shape[0])
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), n_new))(rows)
    weighed = penalised(logits, text, knobs["frequency_penalty"]) if sampler.has_penalty else logits
    chosen = sample(weighed, keys, sampler, temperature=knobs["temperature"], top_p=knobs["top_p"])
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return chosen, jnp.take_along_axis(log_p, chosen[:, None], axis=-1)[:, 0]


_choose = counted_jit(_choose_tokens, name="choice of the next token", static_argnames="sampler")

# An intervention in the form generation uses: a function, or arrays with an entry for every column there is room for.
_Edit: TypeAlias = "Callable[[Any], Any] | Masked | Added"


def _at_columns(
    edits: Mapping[Site, Sequence[_Edit]], start: int, n_prompt: int, at: str
) -> dict[Site, Callable[[Any], Any]]:
    """The edits as functions of the values at the columns from `start` on."""

    def edit(site: Site) -> Callable[[Any], Any]:
        def apply(value: Any) -> Any:
            for one in edits[site]:
                axis = _position_axis(site)
                if isinstance(one, Masked | Added):
                    new = _with_columns(value, one, np.int32(start), axis=axis)
                else:
                    new = apply_intervention(one, value, where=f"{site} in generate")
                if at == "all":
                    value = new
                else:
                    split = np.int32(n_prompt - start)
                    value = _one_side(value, new, split, axis=axis, is_before=at == "prompt")
            return value

        return apply

    return {site: edit(site) for site in edits}


def _apply_columns(value: Any, intervention: Masked | Added, start: Any, *, axis: int) -> Any:
    """The value with the columns of an intervention that are at hand put in, or added."""
    at_hand = jax.tree.map(
        lambda part: lax.dynamic_slice_in_dim(part, start, value.shape[axis], axis) if part.shape[axis] > 1 else part,
        intervention,
    )
    return apply_intervention(at_hand, value, where="generate")


def _take_one_side(value: Any, new: Any, split: Any, *, axis: int, is_before: bool) -> Any:
    """`new` at the positions before `split` (or from it on), `value` elsewhere."""
    columns = lax.broadcasted_iota(jnp.int32, value.shape, axis)
    return jnp.where((columns < split) == is_before, new, value)


_with_columns = counted_jit(_apply_columns, name="intervention", static_argnames="axis")
_one_side = counted_jit(_take_one_side, name="intervention", static_argnames=("axis", "is_before"))


def _position_axis(site: Site) -> int:
    return 2 if site.name in _BY_QUERY_AND_KEY else 1


def _edits(
    upstream: Upstream, params: Any, interventions: Mapping[Any, Intervention], sizes: tuple[int, int, int, int]
) -> dict[Site, list[_Edit]]:
    """The interventions by site, checked against the sites as they are at full length."""
    if not interventions:
        return {}
    batch, _, _, room = sizes
    table = running_pass.list_sites(upstream.forward, params, np.zeros((batch, room), np.int32))
    forms = {row.site: row.value for row in table.rows}
    edits: dict[Site, list[_Edit]] = {}
    for selector, intervention in interventions.items():
        for site in select_sites(selector, list(forms), where=f"{upstream.name}.generate"):
            if callable(intervention):
                edits.setdefault(site, []).append(intervention)
                continue
            over_columns = _over_columns(intervention, forms[site], site, sizes)
            _check_fits(over_columns, forms[site], site)
            edits.setdefault(site, []).append(over_columns)
    return edits


def _over_columns(intervention: Any, form: Any, site: Site, sizes: tuple[int, int, int, int]) -> Masked | Added:
    """The arrays of an intervention with all axes of the site, and their position axes 1 or of full length."""
    given = intervention if isinstance(intervention, Masked | Added) else Masked(intervention, np.True_)
    axes = [_position_axis(site)] + ([3] if site.name in _BY_QUERY_AND_KEY else [])
    _, n_prompt, total, room = sizes
    second = given.mask if isinstance(given, Masked) else given.coefficient
    value, mask = (jnp.asarray(part) for part in (given.value, second))
    value, mask = (part.reshape((1,) * (form.ndim - part.ndim) + part.shape) for part in (value, mask))
    _check_columns(site, given, (value, mask), axes, sizes)
    if isinstance(given, Added):
        # Zeros do nothing, so what ends before the last column is extended by them.
        for axis in axes:
            value, mask = (
                _extend(part, axis, room) if part.shape[axis] in (n_prompt, total) and part.shape[axis] > 1 else part
                for part in (value, mask)
            )
        return Added(value, mask)
    for axis in axes:
        # What ends before the last column does nothing after its end.
        short = [part.shape[axis] for part in (value, mask) if part.shape[axis] in (n_prompt, total)]
        if short and mask.shape[axis] == 1:
            mask = jnp.repeat(mask, min(short), axis)
        value, mask = (_extend(part, axis, room) if part.shape[axis] in short else part for part in (value, mask))
    return Masked(value, mask)


def _check_columns(site: Site, given: Masked | Added, parts: tuple[Any, Any], axes: list[int], sizes: Any) -> None:
    """Refuse arrays whose position axes are of no length that means something."""
    _, n_prompt, total, room = sizes
    if all(part.shape[axis] in (1, n_prompt, total, room) for part in parts for axis in axes):
        return
    shown = ", ".join(f"{name} {describe(jnp.asarray(part))}" for name, part in vars(given).items())
    raise ShapeError(
        four_part(
            f"An intervention with {shown} was given",
            where=f"site {site} in generate",
            expected=f"1 position, the {n_prompt} of the prompt, or all {total}, new tokens included.",
            fix="give one row per column of the finished text; columns of padding count.",
        )
    )


def _extend(part: jax.Array, axis: int, length: int) -> jax.Array:
    widths = [(0, length - size if i == axis else 0) for i, size in enumerate(part.shape)]
    return jnp.pad(part, widths)


def _check_fits(intervention: Masked | Added, form: Any, site: Site) -> None:
    jax.eval_shape(lambda value: apply_intervention(intervention, value, where=str(site)), form)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _key(seed: Any) -> jax.Array:
    """The PRNG key of a seed, or the key itself."""
    is_key = isinstance(seed, jax.Array) and (jnp.issubdtype(seed.dtype, jax.dtypes.prng_key) or seed.shape == (2,))
    if not is_key and (isinstance(seed, bool) or not isinstance(seed, int | np.integer)):
        raise InvalidInputError(
            four_part(
                f"seed={seed!r:.60} was given",
                where="generate",
                expected="an integer, or a key as jax.random.key(0) makes it.",
                fix="choose an integer.",
            )
        )
    return seed if isinstance(seed, jax.Array) else jax.random.key(seed)


def _require_numbers(log_probs: np.ndarray, n_new: int) -> None:
    """Refuse to choose a token from logits that say nothing."""
    if np.isnan(log_probs).any():
        row = int(np.flatnonzero(np.isnan(log_probs))[0])
        raise InvalidInputError(
            four_part(
                f"Logits that are not numbers (NaN), row {row}, at new token {n_new}",
                where="generate",
                expected="finite logits to choose a token from.",
                fix="look for the first site with a NaN: lm.check() reads all of them, an intervention may make one.",
            )
        )


def _check(settings: Settings, tokens: np.ndarray, n_ctx: int | None) -> None:
    """Refuse settings that are out of range, all at once."""
    wrong = []
    if isinstance(settings.max_new_tokens, bool) or not isinstance(settings.max_new_tokens, int | np.integer):
        wrong.append(("max_new_tokens", settings.max_new_tokens, "a whole number"))
    elif settings.max_new_tokens < 1:
        wrong.append(("max_new_tokens", settings.max_new_tokens, "at least 1"))
    elif n_ctx is not None and tokens.shape[1] + settings.max_new_tokens > n_ctx:
        most = n_ctx - tokens.shape[1]
        wrong.append(("max_new_tokens", settings.max_new_tokens, f"at most {most} (n_ctx {n_ctx} less the prompt)"))
    if not _is_number(settings.temperature) or not 0 <= settings.temperature < np.inf:
        wrong.append(("temperature", settings.temperature, "0 or a positive number"))
    if settings.top_k is not None and not (isinstance(settings.top_k, int | np.integer) and settings.top_k >= 1):
        wrong.append(("top_k", settings.top_k, "at least 1"))
    if settings.top_p is not None and not (_is_number(settings.top_p) and 0 < settings.top_p <= 1):
        wrong.append(("top_p", settings.top_p, "above 0 and at most 1"))
    if not _is_number(settings.frequency_penalty) or not np.isfinite(settings.frequency_penalty):
        wrong.append(("frequency_penalty", settings.frequency_penalty, "a finite number"))
    if settings.at not in ("all", "prompt", "generated"):
        wrong.append(("at", settings.at, "'all', 'prompt' or 'generated'"))
    if wrong:
        raise InvalidInputError(
            four_part(
                ", ".join(f"{name}={value!r}" for name, value, _ in wrong) + (" was given" if wrong[1:] == [] else ""),
                where="generate",
                expected="; ".join(f"{name} {allowed}" for name, _, allowed in wrong) + ".",
                fix="choose values in range.",
            )
        )
    if (tokens[:, -1] == PAD).any():
        raise InvalidInputError(
            four_part(
                f"A prompt padded on the right (row {int(np.flatnonzero(tokens[:, -1] == PAD)[0])}) was given",
                where="generate",
                expected="padding on the left, so that every prompt ends in the last column.",
                fix="move the padding to the front, as lm.tokenize(list_of_texts) does.",
            )
        )


def _cache(upstream: Upstream, batch: int, room: int) -> tuple[Callable[..., Any], KVCache]:
    """The function that reads tokens after those in a cache, and an empty cache."""
    if upstream.step is None or upstream.init_cache is None:
        raise UnsupportedModelError(
            four_part(
                f"{upstream.name} has no key-value cache",
                where="generate",
                expected="an Upstream with step and init_cache, or use_cache=False.",
                fix="pass use_cache=False.",
            )
        )
    return upstream.step, upstream.init_cache(batch, room)
