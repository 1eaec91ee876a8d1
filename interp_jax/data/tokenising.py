"""Documents to token ids, once: into memory, or into files that are found again.

What is held out is decided here, since it is decided by document.

>>> from interp_jax.data.documents import open_documents
>>> spelling = Spelling(lambda text: [len(word) for word in text.split()], before=(), after=(0,), digest=None)
>>> tokens = tokenised(open_documents(["one three", "two"]), spelling, holdout=0.3)
>>> [part.tolist() for part in tokens.tokens], tokens.n_documents
([[3, 5, 0], [3, 0]], (1, 1))

Sharp edges: documents are gone through twice, once to hash and once to tokenise; the second time is spared when the
tokens are found.

Source: interp_jax.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from interp_jax.core.errors import InterpError, InvalidInputError, four_part
from interp_jax.data.documents import Documents

FORMAT = 1
_PARTS = ("train", "held_out")


class Spelling(NamedTuple):
    """How a document is spelt in tokens.

    Args:
        encode: From a text to its token ids, without special ones.
        before: What is put before each document.
        after: What is put after it.
        digest: A hash of the tokenizer; None if it has none.
    """

    encode: Callable[[str], Sequence[int]]
    before: tuple[int, ...]
    after: tuple[int, ...]
    digest: str | None


class Tokens(NamedTuple):
    """A tokenised text: of the training part and of what is held out each.

    Args:
        tokens: All tokens end to end, int32.
        n_documents: How many documents that are not empty.
        fingerprint: A hash of where they come from.
    """

    tokens: tuple[np.ndarray, np.ndarray]
    n_documents: tuple[int, int]
    fingerprint: str


def tokenised(
    source: Documents,
    spelling: Spelling,
    *,
    holdout: float,
    cache: str | os.PathLike[str] | None = None,
    in_memory_bytes: int = 2**26,
) -> Tokens:
    """The tokens of documents.

    Args:
        source: The documents.
        spelling: How they are spelt.
        holdout: The share of the text to hold out, in whole documents.
        cache: Where the tokens of large texts are kept; by default in the user's cache directory.
        in_memory_bytes: What a large text is. Without a digest of the tokenizer none is.

    Returns:
        The tokens.

    Raises:
        InvalidInputError: There is no text, or nothing that can be held out, or no room for the tokens.
    """
    if isinstance(holdout, bool) or not 0 <= holdout < 1:
        raise _refuse(f"holdout={holdout!r} was given", "a share from 0 to (but not) 1.", "hold out 0.1, say.")
    survey = _survey(source)
    held = _held_out(survey, holdout)
    settings = [FORMAT, survey.digest, spelling.digest, spelling.before, spelling.after, np.sort(held).tolist()]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    if spelling.digest is not None and survey.n_bytes > in_memory_bytes:
        return _cached(source, spelling, held, _cache_directory(cache) / key)
    tokens = _in_memory(source, spelling, held, key)
    if spelling.digest is None:  # The tokens themselves say what the tokenizer was.
        key = hashlib.sha256(b"".join(part.tobytes() for part in tokens.tokens)).hexdigest()[:32]
    return tokens._replace(fingerprint=key)


class _Survey(NamedTuple):
    """What is known of the documents without tokenising them."""

    digest: str
    hashes: np.ndarray
    sizes: np.ndarray

    @property
    def n_bytes(self) -> int:
        return int(self.sizes.sum())


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _hash(raw: bytes) -> int:
    """64 bits; texts that have them in common by chance lie on the same side, and no harm is done."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def _survey(source: Documents) -> _Survey:
    hashes, sizes = [], []
    for text in source:
        raw = _raw(text)
        hashes.append(_hash(raw))
        sizes.append(len(raw))
    if not sum(sizes):
        raise _refuse(
            f"An empty text ({source.name}: {len(sizes)} documents, none with a character in it)",
            "at least one document that is not empty.",
            "look at where the text comes from.",
        )
    column = np.array(hashes, np.uint64)
    return _Survey(hashlib.sha256(column.tobytes()).hexdigest(), column, np.array(sizes, np.int64))


def _held_out(survey: _Survey, share: float) -> np.ndarray:
    """Hashes of the documents to hold out.

    In the order of the hashes, which is a random one, a document is taken when that brings the held-out share nearer
    to what was asked for.
    """
    if not share:
        return np.zeros(0, np.uint64)
    unique, inverse = np.unique(survey.hashes, return_inverse=True)
    sizes = np.bincount(inverse, weights=survey.sizes)
    kept = np.flatnonzero(sizes)
    if len(kept) < 2:
        raise _refuse(
            f"holdout={share} was given for a text of one document",
            "at least two different ones: what is held out is whole documents.",
            "cut the text into documents, or pass holdout=0.",
        )
    target, total, taken = share * sizes.sum(), 0.0, []
    for index in kept:
        if abs(total + sizes[index] - target) < abs(total - target) and len(taken) < len(kept) - 1:
            taken.append(index)
            total += sizes[index]
    return unique[taken or [kept[sizes[kept].argmin()]]]


def _write(source: Documents, spelling: Spelling, held: np.ndarray, files: Sequence[BinaryIO]) -> tuple[int, int]:
    """The tokens of all documents, each into the file of its part; returns how many documents each part has."""
    is_held, counts = set(held.tolist()), [0, 0]
    for number, text in enumerate(tqdm(source, desc="tokenise", unit=" documents", disable=None, leave=False)):
        try:
            ids = spelling.encode(text) if text else ()
        except InterpError as error:
            error.add_note(f"  In document {number} of {source.name}.")
            raise
        if len(ids):
            part = int(bool(is_held) and _hash(_raw(text)) in is_held)
            files[part].write(np.array([*spelling.before, *ids, *spelling.after], np.int32).tobytes())
            counts[part] += 1
    return counts[0], counts[1]


def _in_memory(source: Documents, spelling: Spelling, held: np.ndarray, key: str) -> Tokens:
    train, held_out = io.BytesIO(), io.BytesIO()
    counts = _write(source, spelling, held, (train, held_out))
    return Tokens(
        (np.frombuffer(train.getvalue(), np.int32), np.frombuffer(held_out.getvalue(), np.int32)), counts, key
    )


def _cached(source: Documents, spelling: Spelling, held: np.ndarray, folder: Path) -> Tokens:
    """The tokens in a folder, which is written first if it is not there, whole or not at all."""
    if (tokens := _mapped(folder)) is not None:
        return tokens
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unfinished-"))
        try:
            with open(new / _PARTS[0], "wb") as train, open(new / _PARTS[1], "wb") as held_out:
                counts = _write(source, spelling, held, (train, held_out))
                sizes = [train.tell(), held_out.tell()]
                for file in (train, held_out):
                    file.flush()
                    os.fsync(file.fileno())
            (new / "parts.json").write_text(json.dumps({"documents": counts, "bytes": sizes}))
            shutil.rmtree(folder, ignore_errors=True)  # What is there is damaged.
            new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise _refuse(
            f"The tokens could not be written ({error})",
            f"a folder with room for the tokens of {source.name}: {folder.parent}.",
            "free some space, pass cache=<another folder>, or raise in_memory_bytes.",
        ) from error
    tokens = _mapped(folder)
    assert tokens is not None
    return tokens


def _mapped(folder: Path) -> Tokens | None:
    """The tokens in a folder, or None if it is not there or not complete."""
    try:
        told = json.loads((folder / "parts.json").read_text())
        sizes = [(folder / part).stat().st_size for part in _PARTS]
    except (OSError, ValueError):
        return None
    if sizes != told["bytes"]:
        return None
    # An empty file cannot be mapped.
    train, held_out = (
        np.memmap(folder / part, np.int32, "r") if size else np.zeros(0, np.int32)
        for part, size in zip(_PARTS, sizes, strict=True)
    )
    n_train, n_held_out = told["documents"]
    return Tokens((train, held_out), (n_train, n_held_out), folder.name)


def _cache_directory(cache: str | os.PathLike[str] | None) -> Path:
    """Where tokens are kept: as given, else `tokens` in this package's cache directory."""
    if cache is not None:
        return Path(cache).expanduser()
    base = os.environ.get("INTERP_JAX_CACHE")
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "interp_jax"
    return (Path(base).expanduser() if base else user) / "tokens"


def _refuse(what: str, expected: str, fix: str) -> InvalidInputError:
    return InvalidInputError(four_part(what, where="pack", expected=expected, fix=fix))
