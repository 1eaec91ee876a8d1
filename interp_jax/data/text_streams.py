"""Packed text: documents as tokens end to end, cut into sequences of one length, in an order that a seed decides.

A model is read at full length everywhere, so no computation goes into padding. Documents are tokenised once. Sequence
i is then a matter of index arithmetic, and the order of an epoch a permutation made from (seed, epoch) alone: where a
stream stands is one integer.

    train, held_out = pack("pydoc", lm, n_ctx=128, holdout=0.1)
    train[0], train[[5, 3]]                        # int32 [n_ctx], [2, n_ctx]
    train[train.order(start=0, count=32, seed=0)]  # the first 32 sequences of a shuffled, endless stream

>>> texts = ["one two three", "four five", "six", "seven eight"]
>>> train, _ = pack(texts, lambda text: [len(word) for word in text.split()], n_ctx=4, separator=0, holdout=0)
>>> train[:].tolist()
[[3, 3, 5, 0], [4, 4, 0, 3], [0, 5, 5, 0]]

Rules. After each document stands the `separator`. A BOS stands where `bos` says: at the start of each "sequence", where
it takes the place of one token; at the start of each "document"; or nowhere. "auto" is "sequence" for a model whose own
tokenizer begins a text with BOS, and nowhere otherwise. Documents run on from one sequence to the next, and a token
sees what stands before it in its sequence, other documents included. The end that fills no sequence is dropped.
Characters that the vocabulary cannot spell are left out, and so are empty documents.

What is held out is whole documents, picked by a hash of their text: the same text never lies on both sides, however
often and wherever it comes.

Sharp edges: "eos" is what the tokenizer calls its end of text; some files name the end of a chat turn there, and the
text the model was trained on had another one between documents. A document in the middle of a sequence is read after
the end of another one, as in the training of most models.

Source: interp_jax; random access by permuted indices as in Grain.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np

from interp_jax.core.errors import InvalidInputError, ShapeError, UnknownNameError, four_part
from interp_jax.data.alignment import encoder
from interp_jax.data.documents import Source, open_documents
from interp_jax.data.tokenising import Spelling, tokenised

BOS_PLACES = ("auto", "sequence", "document", None)


class PackingRule(NamedTuple):
    """How documents become sequences.

    Args:
        n_ctx: Tokens per sequence.
        separator: The token after each document, None for none.
        bos: The token that begins sequences or documents, None for none.
        bos_at: "sequence" or "document"; None without a BOS.
    """

    n_ctx: int
    separator: int | None
    bos: int | None
    bos_at: str | None

    @property
    def special_tokens(self) -> tuple[int, ...]:
        """The tokens that are there by rule, and not because a text holds them."""
        return tuple(sorted({token for token in (self.separator, self.bos) if token is not None}))


@dataclass(frozen=True, eq=False, repr=False)
class Packed:
    """Sequences of tokens, all of one length.

    Args:
        tokens: All tokens end to end, int32; perhaps a file that is mapped into memory.
        rule: How they were packed.
        name: Where the text is from.
        part: "train" or "held_out".
        n_documents: How many documents that are not empty.
        fingerprint: A hash of the tokens' origin: the text, the tokenizer and the rule.
    """

    tokens: np.ndarray
    rule: PackingRule
    name: str
    part: str
    n_documents: int
    fingerprint: str

    @property
    def _stride(self) -> int:
        return self.rule.n_ctx - (self.rule.bos_at == "sequence")

    @property
    def n_tokens(self) -> int:
        """Tokens in all sequences together."""
        return len(self) * self.rule.n_ctx

    def __len__(self) -> int:
        return len(self.tokens) // self._stride

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | np.ndarray) -> np.ndarray: ...
    def __getitem__(self, index: Any) -> np.ndarray:
        """Sequences by number: int32 `[n_ctx]` for an integer, `[n, n_ctx]` for a slice or several integers.

        Args:
            index: Which ones.
        """
        numbers = np.arange(len(self))[index]  # NumPy's own rules, and its error for what is not there.
        whole = self.tokens[: len(self) * self._stride].reshape(len(self), self._stride)
        rows = np.asarray(whole[numbers], np.int32)
        if self.rule.bos_at != "sequence":
            return rows
        bos = np.full((*rows.shape[:-1], 1), self.rule.bos, np.int32)
        return np.concatenate([bos, rows], axis=-1)

    def spread(self, n: int) -> np.ndarray:
        """So many sequences from the first to the last, evenly spaced, int32 `[n, n_ctx]`."""
        return self[np.linspace(0, len(self) - 1, n, dtype=int)]

    def order(self, *, start: int, count: int, seed: int) -> np.ndarray:
        """Numbers of the sequences `start` to `start + count` of an endless stream, each epoch in an order of its own.

        Args:
            start: How many sequences of the stream came before.
            count: How many.
            seed: Of the order.

        Returns:
            The numbers, int64 `[count]`.
        """
        epochs, within = np.divmod(np.arange(start, start + count), len(self))
        return np.concatenate(
            [shuffled(len(self), seed, 0, epoch)[within[epochs == epoch]] for epoch in np.unique(epochs).tolist()]
        )

    def __repr__(self) -> str:
        rule = self.rule
        marks = f"separator {rule.separator}" + (f", BOS {rule.bos} per {rule.bos_at}" if rule.bos_at else ", no BOS")
        return f"Packed({len(self):,} x {rule.n_ctx} tokens, {self.n_documents:,} documents of {self.name}, {marks})"


class PackedText(NamedTuple):
    """The two parts of a text, `train` and `held_out`, which have no document in common."""

    train: Packed
    held_out: Packed


def packed_rows(tokens: Any, *, name: str = "rows") -> Packed:
    """Sequences that are packed already, one per row.

    Args:
        tokens: Token ids, `[n, n_ctx]`; -1 is padding.
        name: What to call them.

    Returns:
        The sequences, without a rule about special tokens.

    Raises:
        ShapeError: Not integers of shape `[n, n_ctx]`, or none.
    """
    rows = np.asarray(tokens)
    if rows.ndim != 2 or not rows.size or rows.dtype.kind not in "iu":
        raise ShapeError(
            four_part(
                f"Tokens of {rows.dtype}{list(rows.shape)} were given",
                where="packed_rows",
                expected="integers [n, n_ctx], at least one.",
                fix="give one row of token ids per sequence.",
            )
        )
    flat = np.ascontiguousarray(rows, np.int32).reshape(-1)
    digest = hashlib.sha256(flat.tobytes()).hexdigest()[:32]
    return Packed(
        flat, PackingRule(rows.shape[1], None, None, None), name, "train", len(rows), f"{digest}-{rows.shape}"
    )


@functools.lru_cache(maxsize=4)
def shuffled(n: int, *key: int) -> np.ndarray:
    """A permutation of `range(n)` that depends on its key alone: not on a state, nor on the version of NumPy.

    Args:
        n: How many.
        *key: Integers, not negative; a zero at the end makes no difference.

    Returns:
        The permutation, int64, not to be written to.
    """
    # Of NumPy's random numbers only raw ones are the same in all versions.
    order = np.random.Philox(np.random.SeedSequence(key)).random_raw(n).argsort(kind="stable")
    order.setflags(write=False)
    return order


def pack(
    documents: Source,
    tokenizer: Any,
    *,
    n_ctx: int = 128,
    separator: int | str | None = "eos",
    bos: str | None = "auto",
    holdout: float = 0.1,
    cache: str | os.PathLike[str] | None = None,
    in_memory_bytes: int = 2**26,
) -> PackedText:
    """Documents as packed sequences of tokens.

    Args:
        documents: Documents, or what `open_documents` makes some from: "pydoc", a path, a list of texts.
        tokenizer: A LanguageModel, a tokenizer, or a function from a text to token ids.
        n_ctx: Tokens per sequence.
        separator: The token after each document: an id, "eos" for the tokenizer's own, or None.
        bos: Where the tokenizer's BOS stands: "sequence", "document", None for nowhere, or "auto".
        holdout: The share of the text to hold out.
        cache: Where the tokens of large texts are kept; by default in the user's cache directory. They are found
            again by text, tokenizer and rule; another `n_ctx` finds them, too.
        in_memory_bytes: A text beyond this is tokenised into a file. A function as tokenizer has no name to be found
            again by, so its tokens stay in memory.

    Returns:
        `train` and `held_out`; the latter is empty if nothing was to be held out.

    Raises:
        InvalidInputError: The text is empty or too short, or an option is impossible for it or for the tokenizer.
        UnknownNameError: `separator` or `bos` is a word that means nothing.
    """
    source = open_documents(documents)
    voice = _voice(tokenizer)
    rule = _rule(voice, n_ctx, separator, bos)
    spelling = Spelling(
        voice.encode,
        before=() if rule.bos is None or rule.bos_at != "document" else (rule.bos,),
        after=() if rule.separator is None else (rule.separator,),
        digest=voice.digest,
    )
    files = tokenised(source, spelling, holdout=holdout, cache=cache, in_memory_bytes=in_memory_bytes)
    text = PackedText(
        *(
            Packed(tokens, rule, source.name, part, n, f"{files.fingerprint}-{part}-{n_ctx}-{rule.bos_at}")
            for part, tokens, n in zip(PackedText._fields, files.tokens, files.n_documents, strict=True)
        )
    )
    for packed in text:
        if not len(packed) and (packed.part == "train" or holdout):
            origin = f"{packed.n_documents} documents of {source.name}, {packed.part}"
            raise _refuse(
                f"A text of {len(packed.tokens)} tokens ({origin})",
                f"at least {packed._stride} tokens, one sequence.",
                "give more text or a smaller n_ctx" + (", or hold out another share of it." if holdout else "."),
            )
    return text


class _Voice(NamedTuple):
    """A tokenizer as this module needs it."""

    encode: Callable[[str], Sequence[int]]
    bos: int | None
    eos: int | None
    begins_with_bos: bool
    digest: str | None


def _voice(tokenizer: Any) -> _Voice:
    if hasattr(tokenizer, "tokenize") and hasattr(tokenizer, "tokenizer"):
        if tokenizer.tokenizer is None:
            raise _refuse(
                f"{tokenizer.name or 'A model'} without a tokenizer was given",
                "a model with one, a tokenizer, or a function from a text to token ids.",
                "give the tokenizer itself.",
            )
        tokenizer = tokenizer.tokenizer
    if not hasattr(tokenizer, "encode"):
        return _Voice(encoder(tokenizer), None, None, False, None)
    bos, eos = (getattr(tokenizer, f"{role}_id", getattr(tokenizer, f"{role}_token_id", None)) for role in _ENDS)
    options = {"add_special_tokens": False} | ({"drop_unknown": True} if hasattr(tokenizer, "lost_bytes") else {})
    encode = encoder(functools.partial(tokenizer.encode, **options))
    begins_with_bos = bos is not None and encoder(tokenizer)("a")[:1] == [bos] != encode("a")[:1]
    # Ours, transformers' and tokenizers' own: all have Hugging Face's description of themselves.
    backend = getattr(tokenizer, "backend", getattr(tokenizer, "backend_tokenizer", tokenizer))
    text = backend.to_str() if hasattr(backend, "to_str") else None
    return _Voice(
        encode, bos, eos, begins_with_bos, None if text is None else hashlib.sha256(text.encode()).hexdigest()
    )


_ENDS = ("bos", "eos")


def _rule(voice: _Voice, n_ctx: int, separator: Any, bos: Any) -> PackingRule:
    if isinstance(separator, str):
        if separator != "eos":
            raise UnknownNameError(
                four_part(
                    f"separator={separator!r} was given",
                    where="pack",
                    expected='a token id, "eos", or None.',
                    fix="take the id of a token from lm.tokenizer.token_id(text).",
                )
            )
        if voice.eos is None:
            raise _refuse(
                'separator="eos" was given for a tokenizer that has no end of text',
                "a token id, or None for nothing between documents.",
                "pass separator=None, or the id of a token.",
            )
        separator = voice.eos
    if bos not in BOS_PLACES:
        names = [str(place) for place in BOS_PLACES]
        raise UnknownNameError(
            four_part(f"bos={bos!r} was given", where="pack", names=names, given=str(bos), fix="use one of these.")
        )
    place = ("sequence" if voice.begins_with_bos else None) if bos == "auto" else bos
    if place is not None and voice.bos is None:
        raise _refuse(
            f"bos={bos!r} was given for a tokenizer that has no BOS", "bos=None.", "leave the BOS out: bos=None."
        )
    if isinstance(n_ctx, bool) or not isinstance(n_ctx, int) or n_ctx < 2:
        raise _refuse(f"n_ctx={n_ctx!r} was given", "an integer, at least 2.", "choose a length such as 128.")
    return PackingRule(n_ctx, separator, None if place is None else voice.bos, place)


def _refuse(what: str, expected: str, fix: str) -> InvalidInputError:
    return InvalidInputError(four_part(what, where="pack", expected=expected, fix=fix))
