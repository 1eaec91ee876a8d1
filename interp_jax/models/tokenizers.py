"""Text to token ids and back, by the rules the model was trained with.

A `Tokenizer` is a thin frozen wrapper over Hugging Face's `tokenizers`. It comes from the `tokenizer.json` of a model
directory, or is rebuilt from the metadata of a GGUF file, which holds vocabulary and merges, but of the rule that cuts
text into words before merging (the pre-tokenizer) only a name. What each name means is fixed by llama.cpp, whose
converter wrote it; a wrong rule gives other tokens for digits or punctuation without any error, so names we do not
know are refused.

>>> letters = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
>>> tokenizer = from_gguf_metadata({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
...     "tokenizer.ggml.tokens": [*letters, "ab"], "tokenizer.ggml.merges": ["a b"]})
>>> tokenizer.encode("abc"), tokenizer.decode(tokenizer.encode("abc é 12"))
([256, 66], 'abc é 12')

Sharp edges: text that spells a special token ("<|im_start|>") is read as that token. A character cut in two by token
borders shows as U+FFFD when its tokens are decoded one by one.

Source: https://github.com/ggml-org/llama.cpp (src/llama-vocab.cpp, the rules behind `tokenizer.ggml.pre`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp_jax.core.errors import InvalidInputError, LoadError, UnsupportedModelError, four_part

if TYPE_CHECKING:
    import tokenizers

# The cut of GPT-2: contractions, then letters, numbers or other marks with at most one space before, then spaces.
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"

# The cut of Llama 3: numbers in threes, and a word takes along one mark before it.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

END_OF_TEXT = "<|endoftext|>"  # GPT-2's only special token, which its oldest files do not call special

# What llama.cpp does for each `tokenizer.ggml.pre`: expressions applied one after the other; each cuts every piece so
# far into its matches and what lies between them.
PRE_TOKENIZERS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "gpt2", "mpt", "olmo", "jais", "trillion", "granite-docling"), (_GPT2_WORDS,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (r"\p{N}", _GPT2_WORDS)
    ),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (_LLAMA3_WORDS,)),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"),
}

# Under these, a piece that is a token is that token, whatever the merges, and texts begin with `bos_id` by default.
_WHOLE_TOKENS_FIRST = ("llama-bpe", "llama3", "llama-v3")

_PRE = "tokenizer.ggml.pre"
_CONTROL, _USER_DEFINED = 3, 4  # values of `tokenizer.ggml.token_type`


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
        backend: The `tokenizers.Tokenizer` that does the work.
        d_vocab: The number of tokens, special ones included (the model's embedding may have more rows).
        bos_id: The token that begins a text, None if the model has none.
        eos_id: The token that ends one, None if the model has none.
        lost_bytes: UTF-8 bytes the vocabulary has no token for; `backend` alone would drop them without a word.
    """

    backend: tokenizers.Tokenizer
    d_vocab: int
    bos_id: int | None = None
    eos_id: int | None = None
    lost_bytes: frozenset[int] = frozenset()

    def encode(self, text: str, *, add_special_tokens: bool = True, drop_unknown: bool = False) -> list[int]:
        """The token ids of `text`.

        Args:
            text: Any text.
            add_special_tokens: Whether to add what the model's own tokenizer adds (for many models a leading
                `bos_id`; nothing for GPT-2 and SmolLM2).
            drop_unknown: Whether characters the vocabulary cannot spell are left out instead of refused. SmolLM2 lacks
                some control characters and empty planes of Unicode (upstream drops single bytes of them).

        Returns:
            The ids; the empty list for the empty text, unless special tokens are added.

        Raises:
            InvalidInputError: `text` is not a string, not valid Unicode, or has a character without a token.
        """
        if not isinstance(text, str):
            raise InvalidInputError(
                four_part(
                    f"Not a text: {text!r:.80} ({type(text).__name__})",
                    where="encode",
                    expected="one str.",
                    fix="for several texts encode them one by one, or use lm.tokenize(list).",
                )
            )
        try:
            raw = text.encode()
        except UnicodeEncodeError as error:
            raise InvalidInputError(
                four_part(
                    f"Text with half a character (a lone surrogate) at position {error.start}: {text!r:.80}",
                    where="encode",
                    expected="text that has a UTF-8 form.",
                    fix="decode the bytes it came from with errors='replace'.",
                )
            ) from None
        if not self.lost_bytes.isdisjoint(raw):
            lost = {i for i, character in enumerate(text) if not self.lost_bytes.isdisjoint(character.encode())}
            if not drop_unknown:
                first = min(lost)
                raise InvalidInputError(
                    four_part(
                        f"Character U+{ord(text[first]):04X} at position {first}, which the vocabulary cannot spell",
                        where="encode",
                        expected="text made of characters the model has tokens for.",
                        fix="remove it, or pass drop_unknown=True to leave such characters out.",
                    )
                )
            text = "".join(character for i, character in enumerate(text) if i not in lost)
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, tokens: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids.

        Args:
            tokens: Ids, as ints or a one-dimensional integer array. Negative ones are padding and say nothing.
            skip_special_tokens: Whether to leave out `bos_id`, `eos_id` and other control tokens.

        Returns:
            The text.

        Raises:
            InvalidInputError: An id is not in the vocabulary.
        """
        return self.backend.decode(self._checked(tokens), skip_special_tokens=skip_special_tokens)

    def strings(self, tokens: Iterable[int]) -> list[str]:
        """The text of each token alone, for tables and axis labels; padding (negative ids) gives the empty text.

        Args:
            tokens: Ids, as ints or a one-dimensional integer array.

        Returns:
            One text per id.

        Raises:
            InvalidInputError: An id is not in the vocabulary.
        """
        ids = list(tokens)
        self._checked(ids)
        return [self.backend.decode([int(token)], skip_special_tokens=False) if token >= 0 else "" for token in ids]

    def token_id(self, text: str) -> int:
        """The id of a text that is exactly one token, such as " Mary" (words carry their leading space).

        Args:
            text: The text of one token.

        Returns:
            Its id.

        Raises:
            InvalidInputError: `text` is no token or several.
        """
        ids = self.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise InvalidInputError(
                four_part(
                    f"{text!r} is not one token but {len(ids)}: {self.strings(ids)}",
                    where="token_id",
                    expected="the text of exactly one token; words inside a text carry their leading space.",
                    fix=f"try {' ' + text.strip()!r}, or take one of the tokens above.",
                )
            )
        return ids[0]

    def __repr__(self) -> str:
        return f"Tokenizer({self.d_vocab:,} tokens, bos_id={self.bos_id}, eos_id={self.eos_id})"

    def _checked(self, tokens: Iterable[int]) -> list[int]:
        ids = np.asarray(tokens).tolist() if hasattr(tokens, "dtype") else list(tokens)
        if not all(isinstance(token, int | np.integer) and not isinstance(token, bool) for token in ids):
            raise InvalidInputError(
                four_part(
                    f"{ids[:8]!r:.60} is no list of token ids",
                    where="decode",
                    expected="integers, as lm.tokenize returns them.",
                    fix="for the most probable tokens of logits write logits.argmax(-1).",
                )
            )
        ids = [int(token) for token in ids]
        d_vocab = self.d_vocab  # The backend counts its tokens anew each time, which takes milliseconds.
        wrong = [token for token in ids if token >= d_vocab]
        if wrong:
            raise InvalidInputError(
                four_part(
                    f"Token ids outside the vocabulary: {wrong[:8]}",
                    where="decode",
                    expected=f"ids from 0 to {self.d_vocab - 1}, or negative for padding.",
                    fix="pass token ids, not positions or logits.",
                )
            )
        return [token for token in ids if token >= 0]


def from_directory(directory: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face model directory.

    Args:
        directory: Where `tokenizer.json` lies, and perhaps `tokenizer_config.json`, `special_tokens_map.json` and
            `config.json`, which name the special tokens. GPT-2's older pair `vocab.json`, `merges.txt` will do too.

    Returns:
        The tokenizer, or None when there is none.

    Raises:
        LoadError: A file is damaged.
    """
    import tokenizers

    path = directory / "tokenizer.json"
    try:
        if path.exists():
            backend = tokenizers.Tokenizer.from_file(str(path))
        elif (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
            path = directory / "vocab.json"
            model = tokenizers.models.BPE.from_file(str(path), str(directory / "merges.txt"))
            backend = _byte_level(model, PRE_TOKENIZERS["gpt2"])
            backend.add_special_tokens([END_OF_TEXT] if backend.token_to_id(END_OF_TEXT) is not None else [])
        else:
            return None
    except BaseException as error:  # tokenizers raises bare Exception for whatever is wrong with a file
        # or, where it did not foresee it, Rust's panic, which is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise LoadError(
            four_part(
                f"Damaged tokenizer file {path.name} ({error})",
                where=str(directory),
                expected="a file of Hugging Face's `tokenizers`, complete.",
                fix="download the file again, or save it again with `Tokenizer.save`.",
            )
        ) from error
    bos_id, eos_id = (_named_token(directory, backend, role) for role in ("bos", "eos"))
    return _wrapped(backend, bos_id, eos_id)


def from_gguf_metadata(metadata: Mapping[str, Any], *, source: str = "GGUF metadata") -> Tokenizer:
    """The tokenizer a GGUF file describes.

    Args:
        metadata: The file's keys and values (`tokenizer.ggml.tokens`, `.merges`, `.pre`, ...).
        source: The file, for error messages.

    Returns:
        The tokenizer.

    Raises:
        UnsupportedModelError: It is not byte-level BPE, or its pre-tokenizer is not known here.
        LoadError: Part of the description is missing or contradicts the rest.

    Source: llama.cpp, src/llama-vocab.cpp.
    """
    import tokenizers

    _check_gguf_metadata(metadata, source)
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    takes_whole = metadata.get(_PRE) in _WHOLE_TOKENS_FIRST
    try:
        model = tokenizers.models.BPE(vocab=vocab, merges=merges, ignore_merges=takes_whole)
    except Exception as error:  # tokenizers raises bare Exception when a merge is not a pair of known tokens
        raise _damaged(f"merges ({error})", "pairs of tokens whose union is a token", source) from error
    backend = _byte_level(model, PRE_TOKENIZERS[metadata.get(_PRE, "default")])
    for token, kind in zip(tokens, metadata.get("tokenizer.ggml.token_type", ()), strict=False):
        if kind == _CONTROL:
            backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            backend.add_tokens([tokenizers.AddedToken(token, normalized=False, special=False)])
    bos_id, eos_id = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    _add_ends(
        backend,
        before=bos_id if metadata.get("tokenizer.ggml.add_bos_token", takes_whole) else None,
        after=eos_id if metadata.get("tokenizer.ggml.add_eos_token") else None,
    )
    return _wrapped(backend, bos_id, eos_id)


def _check_gguf_metadata(metadata: Mapping[str, Any], source: str) -> None:
    """Refuse a description of a tokenizer that is not understood, or damaged."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get(_PRE, "default")
    if kind != "gpt2":
        raise UnsupportedModelError(
            four_part(
                f"Tokenizer of kind {kind!r} (tokenizer.ggml.model)",
                where=source,
                expected="'gpt2', that is byte-level BPE.",
                fix="load the model from a Hugging Face directory with tokenizer.json.",
            )
        )
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            four_part(
                f"Unknown pre-tokenizer {pre!r} ({_PRE})",
                where=source,
                names=PRE_TOKENIZERS,
                given=str(pre),
                fix="load the model from a Hugging Face directory with tokenizer.json, or add the expressions of this "
                "pre-tokenizer to PRE_TOKENIZERS in interp_jax/models/tokenizers.py.",
            )
        )
    for name in ("tokens", "merges"):
        texts = metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise _damaged(f"{name} ({'none' if texts is None else f'{texts!r:.60}'})", "a list of strings", source)
    tokens = metadata["tokenizer.ggml.tokens"]
    if len(set(tokens)) < len(tokens):
        raise _damaged("tokens (some of them twice)", "each token once", source)
    kinds = metadata.get("tokenizer.ggml.token_type", [0] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise _damaged(f"token_type ({kinds!r:.60})", f"one number for each of {len(tokens)} tokens", source)
    for name in ("bos_token_id", "eos_token_id"):
        token = metadata.get(f"tokenizer.ggml.{name}")
        if token is not None and not (isinstance(token, int) and 0 <= token < len(tokens)):
            raise _damaged(f"{name} ({token!r:.60})", f"an id from 0 to {len(tokens) - 1}", source)


def _damaged(what: str, expected: str, source: str) -> LoadError:
    """The error for a part of a GGUF file's tokenizer that cannot be right."""
    return LoadError(
        four_part(
            f"Damaged tokenizer.ggml.{what}",
            where=source,
            expected=f"{expected}.",
            fix="download the file again, or load the model from a Hugging Face directory.",
        )
    )


def _byte_level(model: tokenizers.models.Model, expressions: Sequence[str]) -> tokenizers.Tokenizer:
    """A tokenizer that cuts text by `expressions`, writes the pieces as bytes and merges them."""
    import tokenizers
    from tokenizers import decoders, pre_tokenizers

    backend = tokenizers.Tokenizer(model)
    cuts = [pre_tokenizers.Split(tokenizers.Regex(expression), behavior="isolated") for expression in expressions]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _wrapped(backend: tokenizers.Tokenizer, bos_id: int | None, eos_id: int | None) -> Tokenizer:
    """A tokenizer that knows the size and the gaps of its vocabulary."""
    return Tokenizer(backend, backend.get_vocab_size(with_added_tokens=True), bos_id, eos_id, _lost_bytes(backend))


def _lost_bytes(backend: tokenizers.Tokenizer) -> frozenset[int]:
    """The bytes a byte-level tokenizer has neither a token nor an unknown token for (none for other tokenizers)."""
    from tokenizers import decoders, models

    is_byte_level = isinstance(backend.decoder, decoders.ByteLevel) and isinstance(backend.model, models.BPE)
    if not is_byte_level or backend.model.unk_token is not None:
        return frozenset()
    # GPT-2's alphabet: printable bytes stand for themselves, the others in order for U+0100 and up.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return frozenset(byte for byte, letter in letters.items() if backend.token_to_id(letter) is None)


def _add_ends(backend: tokenizers.Tokenizer, *, before: int | None, after: int | None) -> None:
    """Make `backend` put tokens before and after each text."""
    from tokenizers import processors

    if before is None and after is None:
        return
    ends = {name: index for name, index in (("[before]", before), ("[after]", after)) if index is not None}
    template = " ".join(
        [*(["[before]"] if before is not None else []), "$A", *(["[after]"] if after is not None else [])]
    )
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(ends.items()))


def _named_token(directory: Path, backend: tokenizers.Tokenizer, role: str) -> int | None:
    """The id of the "bos" or "eos" token: by its text where a tokenizer file names it, else by the config's id."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        named = _read_json(directory / file).get(f"{role}_token")
        text = named.get("content") if isinstance(named, dict) else named
        if text is not None and (token := backend.token_to_id(text)) is not None:
            return token
    token = _read_json(directory / "config.json").get(f"{role}_token_id")
    return token[0] if isinstance(token, list) else token


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; nothing when there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"holds a {type(value).__name__}")
    except ValueError as error:
        raise LoadError(
            four_part(
                f"Damaged {path.name} ({error})",
                where=str(path.parent),
                expected="one JSON object.",
                fix="download the file again.",
            )
        ) from error
    return value
