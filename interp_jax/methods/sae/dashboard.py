"""What there is to see of each latent: where it fires, how often and how strongly, what it does, what is like it.

    data = latent_dashboard(lm, sae, text.held_out)
    data.top.tokens[3]                         # latent 3: its strongest examples, one per sequence
    write_site(data, "dashboard")              # figures/sae_site.py: pages for a browser

The text is read twice: once for the strongest examples of each latent, and thereby its largest activation; once more
for the intervals between 0 and that, each with its share of the tokens and a random sample of them. Latents are
computed for some sequences at a time and only their examples are kept, so memory does not grow with the text.

>>> interval_edges(np.array([2.0]), 4).tolist()
[[0.0, 0.5, 1.0, 1.5, 2.0]]

Sharp edges: the strongest examples are one per sequence (its strongest token), so a latent that fires all through one
document does not fill its page with it; the samples of the intervals are of all tokens. Activations are in the units
of the SAE's own scaling. Positions that do not count (see `Keep`) have activation 0.

Source: Bricken et al. 2023 for what to show; Neuronpedia and SAEDashboard for the intervals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.core.sites import Site
from interp_jax.data.text_streams import Packed
from interp_jax.forward.batch_streams import check_positive, check_seed
from interp_jax.forward.site_values import Keep, SiteReader, filled_up, nothing_counts, read_rows, site_reader
from interp_jax.forward.sparse_coder import SparseCoder
from interp_jax.forward.splicing import checked_splice
from interp_jax.methods.sae.examples import Candidates, Examples, Places, around, random_scores, ranks
from interp_jax.methods.sae.logit_effects import LogitEffects, Neighbours, logit_effects, nearest_rows
from interp_jax.transforms.compilations import counted_jit

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

# Bars of an interval's histogram.
BARS_PER_INTERVAL = 8
# What the latents of the sequences that are read at once may take.
_LATENT_BYTES = 2**28


class Show(NamedTuple):
    """How much there is to see of each latent.

    Args:
        n_top: Strongest examples.
        n_intervals: Equal parts of the range from 0 to the largest activation.
        n_per_interval: Sampled examples of each.
        n_before: Tokens before the one an example is about.
        n_after: Tokens after it.
        n_logits: Tokens at either end of the logit effects.
        n_neighbours: Latents with similar decoder rows.
    """

    n_top: int = 20
    n_intervals: int = 5
    n_per_interval: int = 5
    n_before: int = 24
    n_after: int = 8
    n_logits: int = 10
    n_neighbours: int = 10


@dataclass(frozen=True, repr=False)
class DashboardData:
    """What was seen of some latents of an SAE.

    Args:
        latents: Numbers of the latents, `[latent]`.
        n_latents: How many the SAE has.
        n_fired: On how many tokens each fires, int64 `[latent]`.
        largest: Largest activation, float32 `[latent]`; 0 of a latent that never fires.
        counts: How many tokens with an activation above 0 are in each of the equal parts of the range from 0 to the
            largest, int64 `[latent, bar]`.
        top: Strongest examples, one per sequence: `[latent, example]`.
        samples: Random examples of each interval, the lowest interval first: `[latent, interval, example]`.
        effects: Effects on the logits; None where the way there is not known.
        neighbours: Latents with similar decoder rows.
        texts: The text of every token id above.
        n_tokens: How many tokens counted.
        n_sequences: How many sequences were read.
        n_ctx: Tokens per sequence.
        show: How much was asked for.
        model: The model's name.
        text: The text's name.
        sae: The SAE in words.
        read: The site it reads.
        write: The site it writes.
        seed: Of the samples.
    """

    latents: np.ndarray
    n_latents: int
    n_fired: np.ndarray
    largest: np.ndarray
    counts: np.ndarray
    top: Examples
    samples: Examples
    effects: LogitEffects | None
    neighbours: Neighbours
    texts: dict[int, str]
    n_tokens: int
    n_sequences: int
    n_ctx: int
    show: Show
    model: str
    text: str
    sae: str
    read: Site
    write: Site
    seed: int

    @property
    def density(self) -> np.ndarray:
        """Share of the tokens on which each latent fires, `[latent]`."""
        return self.n_fired / self.n_tokens

    @property
    def interval_counts(self) -> np.ndarray:
        """How many tokens with an activation above 0 are in each interval, `[latent, interval]`."""
        return self.counts.reshape(len(self.latents), self.show.n_intervals, BARS_PER_INTERVAL).sum(axis=2)

    def __repr__(self) -> str:
        n_dead = int((self.n_fired == 0).sum())
        return (
            f"DashboardData({len(self.latents):,} latents of {self.sae}, {n_dead:,} of them dead; "
            f"{self.n_tokens:,} tokens of {self.text or 'the text'})"
        )


def latent_dashboard(
    lm: LanguageModel,
    sae: SparseCoder,
    tokens: Any,
    *,
    latents: Sequence[int] | None = None,
    show: Show | None = None,
    keep: Keep | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> DashboardData:
    """Look at the latents of an SAE on a text.

    Args:
        lm: The model.
        sae: The SAE, with the site it reads.
        tokens: Packed sequences, such as `pack(...).held_out`, or token ids `[seq, pos]`, padding is -1.
        latents: Which latents; by default all.
        show: How much there is to see of each; by default `Show()`.
        keep: Which positions count; by default all but the first and those of special tokens, as in training.
        batch_size: Sequences that are read at once; by default as many as the memory for their latents allows.
        seed: Of the random samples.
        progress: Whether to show a progress bar, on a terminal.

    Returns:
        What was seen.

    Raises:
        InvalidInputError: No tokens, none that counts, latents the SAE does not have, an SAE without a site, or
            activations that are not finite.
        UnknownNameError: The model has no such site.
        ShapeError: The site has another width.
    """
    where = "latent_dashboard"
    _check_kinds({"sae": (sae, SparseCoder), "show": (show, Show | None), "keep": (keep, Keep | None)})
    show = show or Show()
    at_least_0 = ("n_before", "n_after")
    counts_of = {name: count + (name in at_least_0) for name, count in show._asdict().items()}
    check_positive(where=where, batch_size=1 if batch_size is None else batch_size, **counts_of)
    check_seed(seed, where=where)
    text = _Text(lm, tokens, keep or Keep())
    first = text.rows(0, 1)
    splice = checked_splice(lm, sae, first, where=where)
    numbers = _checked_latents(latents, sae.n_latents)
    n_ctx = first.shape[1]
    reader = site_reader(lm, splice.reads[0], n_ctx=n_ctx, where=where)
    fits = max(1, _LATENT_BYTES // (4 * n_ctx * sae.n_latents))
    size = min(batch_size or min(fits, 64), len(text))
    reading = _Reading(text, reader, sae.unplaced(), numbers, size, progress)

    top, n_fired, n_tokens = _strongest(reading, show)
    if n_tokens == 0:
        raise nothing_counts(text.name or "the text", text.keep, where=where)
    largest = top.value[:, 0].copy()
    samples, counts = _sampled(reading, show, largest, seed)
    effects = logit_effects(lm, sae, splice.writes[0], numbers, n_tokens=show.n_logits)
    ids = [top.tokens, samples.tokens] + ([] if effects is None else [effects.top_ids, effects.bottom_ids])
    return DashboardData(
        latents=numbers,
        n_latents=sae.n_latents,
        n_fired=n_fired,
        largest=largest,
        counts=counts,
        top=top,
        samples=samples,
        effects=effects,
        neighbours=nearest_rows(sae.W_dec, numbers, show.n_neighbours),
        texts=_texts(lm, ids),
        n_tokens=n_tokens,
        n_sequences=len(text),
        n_ctx=n_ctx,
        show=show,
        model=lm.name,
        text=text.name,
        sae=repr(sae),
        read=splice.reads[0],
        write=splice.writes[0],
        seed=seed,
    )


def interval_edges(largest: np.ndarray, n_intervals: int) -> np.ndarray:
    """The edges of each latent's intervals, from 0 to its largest activation.

    Args:
        largest: Largest activations, `[latent]`.
        n_intervals: How many intervals.

    Returns:
        float64 `[latent, interval + 1]`.
    """
    return np.asarray(largest, np.float64)[:, None] * np.arange(n_intervals + 1) / n_intervals


class _Text:
    """Sequences of tokens and which of their positions count."""

    def __init__(self, lm: LanguageModel, tokens: Any, keep: Keep):
        is_packed = isinstance(tokens, Packed)
        self.lm, self.keep, self.name = lm, keep, tokens.name if is_packed else ""
        self._special = tokens.rule.special_tokens if is_packed else ()
        self._tokens = tokens if is_packed else np.asarray(lm.check_tokens(tokens, where="latent_dashboard"))
        if not len(self):
            raise nothing_counts("a text without sequences", keep, where="latent_dashboard")

    def __len__(self) -> int:
        return len(self._tokens)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Some sequences, int32 `[seq, pos]`."""
        return np.asarray(self.lm.check_tokens(self._tokens[start:stop], where="latent_dashboard"))

    def mask(self, rows: np.ndarray) -> np.ndarray:
        """Which positions of them count."""
        return self.keep.mask(rows, self._special)


class _Firing(NamedTuple):
    """Where latents are above 0 in a batch; arrays are `[firing]`, in order of row, position and latent."""

    row: np.ndarray
    position: np.ndarray
    latent: np.ndarray
    value: np.ndarray

    def at(self, chosen: np.ndarray) -> _Firing:
        """Those with the `chosen` numbers."""
        return _Firing(*(column[chosen] for column in self))


class _Batch(NamedTuple):
    """Some sequences: number of the first, tokens `[seq, pos]`, how many count, latents `[seq, pos, latent]`."""

    start: int
    tokens: np.ndarray
    n_tokens: int
    latents: np.ndarray

    def firing(self) -> _Firing:
        """Where latents are above 0."""
        where = np.flatnonzero(self.latents.reshape(-1) > 0)
        row, position, latent = np.unravel_index(where, self.latents.shape)
        return _Firing(row, position, latent, self.latents.reshape(-1)[where])


class _Reading(NamedTuple):
    """A text that can be read again and again."""

    text: _Text
    reader: SiteReader
    sae: SparseCoder
    latents: np.ndarray
    batch_size: int
    progress: bool

    def batches(self, doing: str) -> Iterator[_Batch]:
        """The latents of some sequences at a time; 0 where positions do not count."""
        size, text = self.batch_size, self.text
        is_all = np.array_equal(self.latents, np.arange(self.sae.n_latents))
        chosen = None if is_all else jnp.asarray(self.latents)
        with tqdm(total=len(text), desc=doing, unit="seq", disable=None if self.progress else True, leave=False) as bar:
            for start in range(0, len(text), size):
                rows = text.rows(start, start + size)
                tokens, mask = filled_up(rows, size), np.zeros((size, rows.shape[1]), bool)
                mask[: len(rows)] = text.mask(rows)
                numbers = start + np.minimum(np.arange(size), len(rows) - 1)
                (read,) = read_rows(text.lm, self.reader, tokens, mask, numbers, where="latent_dashboard").values()
                x = np.zeros((*mask.shape, read.shape[-1]), np.float32)
                x[mask] = read
                latents = np.asarray(_latents(self.sae, x, mask, chosen))
                yield _Batch(start, tokens, int(mask.sum()), latents)
                bar.update(len(rows))


def _masked_latents(sae: SparseCoder, x: jax.Array, mask: jax.Array, chosen: jax.Array | None) -> jax.Array:
    latents = jnp.where(mask[..., None], sae.encode(x), 0.0)
    return latents if chosen is None else latents[..., chosen]


_latents = counted_jit(_masked_latents, name="sae.dashboard_latents")


def _strongest(reading: _Reading, show: Show) -> tuple[Examples, np.ndarray, int]:
    """The strongest examples, on how many tokens each latent fires, and how many tokens there are."""
    n_latents, window = len(reading.latents), range(-show.n_before, show.n_after + 1)
    places = Places(n_latents, show.n_top, len(window))
    n_fired, n_tokens = np.zeros(n_latents, np.int64), 0
    for batch in reading.batches("strongest examples"):
        firing = batch.firing()
        n_fired += np.bincount(firing.latent, minlength=n_latents)
        n_tokens += batch.n_tokens
        # The strongest token of each sequence, the first of equal ones.
        pair = firing.row * n_latents + firing.latent
        order = np.lexsort((firing.position, -firing.value, pair))
        strongest = firing.at(order[ranks(pair[order]) == 0])
        _offer(places, batch, strongest, window, strongest.latent, strongest.value.astype(np.float64))
    return places.examples(), n_fired, n_tokens


def _sampled(reading: _Reading, show: Show, largest: np.ndarray, seed: int) -> tuple[Examples, np.ndarray]:
    """Random examples of each interval, and how many tokens are in each bar."""
    window = range(-show.n_before, show.n_after + 1)
    n_latents, n_bars = len(reading.latents), show.n_intervals * BARS_PER_INTERVAL
    places = Places(n_latents * show.n_intervals, show.n_per_interval, len(window))
    counts = np.zeros(n_latents * n_bars, np.int64)
    for batch in reading.batches("samples"):
        firing = batch.firing()
        bar = np.floor(firing.value.astype(np.float64) * n_bars / largest[firing.latent]).astype(np.int64)
        bar = np.minimum(bar, n_bars - 1)
        counts += np.bincount(firing.latent * n_bars + bar, minlength=len(counts))
        group = firing.latent * show.n_intervals + bar // BARS_PER_INTERVAL
        token = (batch.start + firing.row) * batch.tokens.shape[1] + firing.position
        score = random_scores(seed, token, reading.latents[firing.latent])
        _offer(places, batch, firing, window, group, score)
    found = places.examples()
    shape = (n_latents, show.n_intervals, show.n_per_interval)
    return Examples(*(column.reshape(*shape, *column.shape[2:]) for column in found)), counts.reshape(n_latents, n_bars)


def _offer(places: Places, batch: _Batch, firing: _Firing, window: range, group: np.ndarray, score: np.ndarray) -> None:
    """Give places to firings, by score in their group."""

    def around_chosen(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        one = firing.at(chosen)
        return around(batch.tokens, batch.latents, one.row, one.position, one.latent, window)

    candidates = Candidates(group, firing.value, batch.start + firing.row, firing.position)
    places.offer(candidates, score, around_chosen)


def _check_kinds(given: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse what is of another kind than named beside it."""
    expected = {"sae": "one SAE", "show": "Show(n_top=...)", "keep": "Keep(first_position=..., special_tokens=...)"}
    for name, (value, kind) in given.items():
        if not isinstance(value, kind):
            raise InvalidInputError(
                four_part(
                    f"{type(value).__name__} {value!r:.60} was given for {name}",
                    where="latent_dashboard",
                    expected=f"{expected[name]}.",
                    fix="give one SAE, such as trained.saes[0]." if name == "sae" else "leave it out for the default.",
                )
            )


def _checked_latents(latents: Sequence[int] | None, n_latents: int) -> np.ndarray:
    if latents is None:
        return np.arange(n_latents)
    given = np.asarray(latents)
    is_valid = given.ndim == 1 and given.size and given.dtype.kind in "iu"
    if not is_valid or given.min() < 0 or given.max() >= n_latents or len(np.unique(given)) < len(given):
        raise InvalidInputError(
            four_part(
                f"latents={given.tolist()!r:.80} was given",
                where="latent_dashboard",
                expected=f"different integers from 0 to {n_latents - 1}, at least one.",
                fix="leave it out for all latents.",
            )
        )
    return given.astype(np.int64)


def _texts(lm: LanguageModel, ids: list[np.ndarray]) -> dict[int, str]:
    """The text of each token id, or the id itself where there is no tokenizer."""
    distinct = np.unique(np.concatenate([part.reshape(-1) for part in ids]))
    distinct = distinct[distinct >= 0]
    strings = [str(token) for token in distinct] if lm.tokenizer is None else lm.to_str_tokens(distinct)
    return dict(zip(distinct.tolist(), strings, strict=True))
