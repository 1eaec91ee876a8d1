"""Activations on disk: shards of rows, each a random sample of the whole text, and a manifest.

    write_activations(lm, train, "5.resid_post", "activations")   # the model reads the text once
    print(read_manifest("activations"))

The rows of each sequence are dealt to all shards at random. Read from end to end and shuffled in memory, one shard is
as good as rows drawn from everything.

>>> import tempfile
>>> from interp_jax.data.text_streams import packed_rows
>>> from interp_jax.models.language_model import LanguageModel
>>> from interp_jax.models.upstream import Upstream
>>> from interp_jax.transforms.sowing import sow
>>> lm = LanguageModel(Upstream("table", lambda table, tokens: sow(table[tokens], name="embed")), jnp.eye(4))
>>> with tempfile.TemporaryDirectory() as folder:
...     path = write_activations(lm, packed_rows([[0, 1, 2], [0, 2, 3]]), "embed", f"{folder}/rows")
...     manifest = read_manifest(path)
>>> manifest.n_rows, manifest.widths, manifest.shards[0].files
(4, {'embed': 4}, {'embed': 'shard-00000-0.bin'})

Sharp edges: the folder appears under its name only when it is complete; what a killed process leaves is a folder whose
name begins with a dot. Files are raw rows; `manifest.json` says their dtype, width and SHA-256.

Source: interp_jax.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from interp_jax.core.errors import ExportError, InvalidInputError, LoadError, four_part
from interp_jax.core.sites import Selector
from interp_jax.data.text_streams import Packed, shuffled
from interp_jax.forward.batch_streams import check_positive, check_seed, check_text
from interp_jax.forward.site_values import (
    Keep,
    SiteReader,
    as_bits,
    filled_up,
    nothing_counts,
    read_rows,
    site_reader,
)
from interp_jax.models.weights.writing import publish_whole, write_file

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

FORMAT = 1
MANIFEST = "manifest.json"
# Rows are gathered to this many bytes before they are dealt to the shards.
DEAL_BYTES = 2**28
# The orders of dealing have this in their key, so that no others are made of the same numbers.
_DEAL = 2


class Shard(NamedTuple):
    """Some rows of all sites.

    Args:
        n_rows: How many.
        files: Site name to its file.
        sha256: Site name to the file's digest.
    """

    n_rows: int
    files: dict[str, str]
    sha256: dict[str, str]


class Manifest(NamedTuple):
    """What is in a folder of activations.

    Args:
        model: The model's name.
        text: The text's name.
        fingerprint: The text's fingerprint.
        keep: Which positions count.
        widths: Site name to the size of its rows.
        dtypes: Site name to their dtype.
        n_rows: Rows per site.
        n_sequences: Sequences the model has read.
        shards: The shards.
    """

    model: str
    text: str
    fingerprint: str
    keep: str
    widths: dict[str, int]
    dtypes: dict[str, str]
    n_rows: int
    n_sequences: int
    shards: tuple[Shard, ...]


def write_activations(
    lm: LanguageModel,
    packed: Packed,
    sites: Selector,
    directory: str | os.PathLike[str],
    *,
    seed: int = 0,
    keep: Keep | None = None,
    dtype: str | None = None,
    shard_bytes: int = 2**27,
    sequences_per_pass: int = 32,
) -> Path:
    """Write a model's activations on a text, each row once. The folder appears when it is complete.

    Args:
        lm: The model.
        packed: Packed sequences of tokens, such as `pack(...).train`.
        sites: Which sites; their rows come from the same tokens.
        directory: Where; it must not exist, or be empty.
        seed: Of the shards' contents.
        keep: Which positions count; by default all but the first and those of special tokens.
        dtype: "float32" or "bfloat16"; by default what the model computes in.
        shard_bytes: About how large a shard may be, all sites together. A reader has two of them in memory.
        sequences_per_pass: How many sequences the model reads at once.

    Returns:
        The directory.

    Raises:
        UnknownNameError: A part of the selector matches no site.
        InvalidInputError: The text is empty, no token counts, a value is not finite, or something is there already.
        ExportError: It could not be written; nothing has changed.
    """
    where, keep = "write_activations", keep or Keep()
    check_text(packed, where=where)
    check_seed(seed, where=where)
    check_positive(where=where, shard_bytes=shard_bytes, sequences_per_pass=sequences_per_pass)
    reader = site_reader(lm, sites, n_ctx=packed.rule.n_ctx, where=where)
    dtypes = {name: np.dtype(jnp.dtype(dtype)) if dtype else own for name, own in reader.dtypes.items()}
    target = Path(os.path.abspath(Path(directory).expanduser()))
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise InvalidInputError(
            four_part(
                f"{target.name!r} is there already",
                where=where,
                expected="a directory that does not exist yet, or an empty one.",
                fix="choose another directory, or remove this one.",
            )
        )
    row_bytes = sum(width * dtypes[name].itemsize for name, width in reader.widths.items())
    n_rows = _count_rows(packed, keep)
    dealer = _Dealer(reader, dtypes, n_shards=math.ceil(n_rows * row_bytes / shard_bytes), seed=seed)

    def write(folder: Path) -> None:
        _deal_all(lm, packed, keep, dealer, folder, sequences_per_pass, max(1, DEAL_BYTES // row_bytes))
        manifest = Manifest(
            lm.name,
            packed.name,
            packed.fingerprint,
            str(keep),
            dict(reader.widths),
            {name: one.name for name, one in dtypes.items()},
            n_rows,
            len(packed),
            dealer.finish(folder),
        )
        document = {"format": FORMAT, **manifest._asdict(), "shards": [s._asdict() for s in manifest.shards]}
        write_file(folder / MANIFEST, json.dumps(document, indent=1).encode())

    try:
        publish_whole(target, write, n_bytes=n_rows * row_bytes)
    except OSError as error:
        raise ExportError(
            four_part(
                f"The activations cannot be written ({error})",
                where=str(target),
                expected=f"a directory that may be written to, with {n_rows * row_bytes / 1e6:,.0f} MB of room.",
                fix="free some space, choose another directory, or write less: dtype='bfloat16' is half.",
            )
        ) from error
    return target


def written_once(lm: LanguageModel, packed: Packed, sites: Selector, directory: str | Path, *, seed: int = 0) -> Path:
    """The activations of a text on disk, written unless they are there.

    Args:
        lm: The model.
        packed: The text.
        sites: Which sites.
        directory: The folder they are in, or are to be in, under a name that says which they are.
        seed: Of the shards' contents, if they are written now.

    Returns:
        What `ShardStream` reads.

    Raises:
        UnknownNameError: The model has no such site.
        InvalidInputError: The text is empty.
    """
    digest = hashlib.sha256(f"{lm.name} {sites} {packed.fingerprint}".encode()).hexdigest()[:8]
    folder = Path(directory) / f"activations_{digest}"
    if not folder.exists():
        Path(directory).mkdir(parents=True, exist_ok=True)
        write_activations(lm, packed, sites, folder, seed=seed)
    return folder


def _count_rows(packed: Packed, keep: Keep) -> int:
    step = max(1, 2**20 // packed.rule.n_ctx)
    special = packed.rule.special_tokens
    n_rows = sum(int(keep.mask(packed[i : i + step], special).sum()) for i in range(0, len(packed), step))
    if not n_rows:
        raise nothing_counts(packed.name, keep, where="write_activations")
    return n_rows


def _deal_all(
    lm: LanguageModel,
    packed: Packed,
    keep: Keep,
    dealer: _Dealer,
    folder: Path,
    sequences_per_pass: int,
    rows_per_deal: int,
) -> None:
    """Read the whole text, and deal its rows to the shards."""
    n = min(sequences_per_pass, len(packed))
    waiting: list[dict[str, np.ndarray]] = []
    for start in tqdm(range(0, len(packed), n), desc="activations", unit="pass", disable=None, leave=False):
        numbers = np.arange(start, min(start + n, len(packed)))
        tokens = filled_up(packed[numbers], n)
        mask = keep.mask(tokens, packed.rule.special_tokens)
        mask[len(numbers) :] = False
        rows = read_rows(lm, dealer.reader, tokens, mask, filled_up(numbers, n), where="write_activations")
        waiting.append({name: value.astype(dealer.dtypes[name], copy=False) for name, value in rows.items()})
        if sum(len(next(iter(rows.values()))) for rows in waiting) >= rows_per_deal:
            dealer.deal(waiting, folder)
            waiting = []
    if waiting:
        dealer.deal(waiting, folder)


class _Dealer:
    """Hands rows to shards, to each the same number or one more, at random."""

    def __init__(self, reader: SiteReader, dtypes: dict[str, np.dtype], *, n_shards: int, seed: int):
        self.reader, self.dtypes = reader, dtypes
        self._seed, self._n_deals, self._next_shard = seed, 0, 0
        self._n_rows = np.zeros(n_shards, np.int64)
        self._digests = [{name: hashlib.sha256() for name in reader.widths} for _ in range(n_shards)]

    def deal(self, parts: list[dict[str, np.ndarray]], folder: Path) -> None:
        rows = {name: np.concatenate([part[name] for part in parts]) for name in self.reader.widths}
        n_rows, n_shards = len(next(iter(rows.values()))), len(self._n_rows)
        order = shuffled.__wrapped__(n_rows, self._seed, _DEAL, self._n_deals)
        for number in range(min(n_shards, n_rows)):
            shard = (self._next_shard + number) % n_shards
            chosen = order[number::n_shards]
            self._n_rows[shard] += len(chosen)
            for site, (name, values) in enumerate(rows.items()):
                content = as_bits(values)[chosen].tobytes()
                self._digests[shard][name].update(content)
                with open(folder / _file_name(shard, site), "ab") as file:
                    file.write(content)
        self._next_shard = (self._next_shard + n_rows) % n_shards
        self._n_deals += 1

    def finish(self, folder: Path) -> tuple[Shard, ...]:
        """See that everything is on the disk, and say what is where."""
        shards = []
        for number, n_rows in enumerate(self._n_rows.tolist()):
            files = {name: _file_name(number, site) for site, name in enumerate(self.reader.widths)}
            for file in files.values():
                with open(folder / file, "rb+") as stream:
                    os.fsync(stream.fileno())
            digests = {name: digest.hexdigest() for name, digest in self._digests[number].items()}
            shards.append(Shard(n_rows, files, digests))
        return tuple(shards)


def _file_name(shard: int, site: int) -> str:
    return f"shard-{shard:05d}-{site}.bin"


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """What a folder of activations says it holds, once all its files are there in full length.

    Args:
        directory: The folder.

    Returns:
        The manifest.

    Raises:
        LoadError: It is no such folder, or files are missing or cut off.
    """
    folder = Path(directory).expanduser()
    try:
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if document.pop("format") != FORMAT:
            raise ValueError("of another version")
        shards = tuple(Shard(**shard) for shard in document.pop("shards"))
        manifest = Manifest(**document, shards=shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(
            four_part(
                f"No readable {MANIFEST} ({error})",
                where=str(folder),
                expected="a folder that write_activations has written.",
                fix="check the path, or write the activations again.",
            )
        ) from error
    wrong = []
    for shard in shards:
        for name, file in shard.files.items():
            size = shard.n_rows * manifest.widths[name] * jnp.dtype(manifest.dtypes[name]).itemsize
            path = folder / file
            if not path.is_file():
                wrong.append(f"{file} is missing")
            elif path.stat().st_size != size:
                wrong.append(f"{file} has {path.stat().st_size:,} of {size:,} bytes")
    if wrong:
        raise torn(wrong, folder)
    return manifest


def torn(faults: list[str], folder: Path) -> LoadError:
    """The error for files of a `folder` that are not as they were written, with their `faults`."""
    rest = f", ... ({len(faults)} in all)" if len(faults) > 8 else ""
    return LoadError(
        four_part(
            f"Shards that are not as they were written: {', '.join(faults[:8])}{rest}",
            where=str(folder),
            expected="the files that write_activations wrote, unchanged.",
            fix="copy the folder again from where it was written, or write the activations again.",
        )
    )
