"""The site of an SAE's latents: one page that finds them and shows each, beside small files of data.

    write_site(latent_dashboard(lm, sae, text.held_out), "dashboard")    # then open dashboard/index.html

A folder of static files, for a browser to open from disk or for any server: `index.html` is the page, `data/index.js`
what is needed to find latents by number, density, or the tokens they fire on and make likely, and each
`data/latents-N.js` what there is to see of some of them, read when one is looked at.

>>> write_site.__name__
'write_site'

Sharp edges: a search looks at the tokens on which a latent fires at half its largest activation or more in its
strongest examples, and at those it makes more likely; not at all of its text. Numbers are rounded to four digits.

Source: interp_jax; Bricken et al. 2023 and Neuronpedia for what such pages show.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.figures.page import escape, html_page, script_data
from interp_jax.figures.sae_site_page import BODY, SCRIPT, STYLE
from interp_jax.forward.batch_streams import check_positive
from interp_jax.methods.sae.dashboard import DashboardData, interval_edges
from interp_jax.methods.sae.examples import Examples
from interp_jax.methods.sae.reconstruction import DENSITY_FLOOR

_N_DENSITY_BARS = 60
# By how many tokens a latent can be found, of those it fires on and of those it makes likely.
_N_WORDS = 8

_NOTES = (
    "An example is a piece of text around one token, which is bold; a token's colour is the latent's activation on it. "
    "Activations are in the units of the SAE.",
    "The strongest examples are one per sequence. Below them the range from 0 to the largest activation is cut into "
    "equal intervals, each with a random sample of the tokens in it.",
    "Logit effects are those of the decoder row alone, at norm 1, through the final norm's gain and the unembedding, "
    "less their mean over the vocabulary. The final norm also divides them by the size of the residual stream, which "
    "differs from token to token and is left out.",
)


def write_site(
    data: DashboardData,
    directory: str | os.PathLike[str],
    *,
    title: str = "",
    per_file: int = 32,
    overwrite: bool = False,
) -> Path:
    """Write the site of some latents.

    Args:
        data: What was seen of them.
        directory: Where; a new or empty folder. It appears under its name when it is complete.
        title: Heading; by default model and site.
        per_file: Latents per file of data.
        overwrite: Whether to take the place of a folder that holds something.

    Returns:
        The page to open, `index.html`.

    Raises:
        InvalidInputError: The folder is there and holds something, or `per_file` is not positive.
    """
    check_positive(where="write_site", per_file=per_file)
    heading = title or " · ".join(part for part in (data.model, str(data.write)) if part)
    with new_folder(directory, overwrite=overwrite, where="write_site") as folder:
        caption = f"{len(data.latents):,} latents on {data.n_tokens:,} tokens" + (
            f" of {data.text}" if data.text else ""
        )
        body = BODY.format(heading=escape(heading), caption=escape(caption))
        (folder / "index.html").write_text(
            html_page(f"{heading} · latents", body=body, style=STYLE, script=SCRIPT), encoding="utf-8"
        )
        (folder / "data").mkdir()
        index = f"const INDEX = {script_data(site_index(data, per_file))};\nconst CHUNKS = {{}};\n"
        (folder / "data" / "index.js").write_text(index, encoding="utf-8")
        for number, start in enumerate(range(0, len(data.latents), per_file)):
            chunk = script_data(site_chunk(data, range(start, min(start + per_file, len(data.latents)))))
            (folder / "data" / f"latents-{number}.js").write_text(f"CHUNKS[{number}] = {chunk};\n", encoding="utf-8")
    return Path(directory) / "index.html"


@contextmanager
def new_folder(directory: str | os.PathLike[str], *, overwrite: bool, where: str) -> Iterator[Path]:
    """A folder to fill, which gets its name when all went well.

    Args:
        directory: Its name.
        overwrite: Whether it may take the place of a folder that holds something.
        where: The public call, for error messages.

    Returns:
        A context with a folder beside it.

    Raises:
        InvalidInputError: There is something of that name that it must not take the place of.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not overwrite)):
        raise InvalidInputError(
            four_part(
                f"{str(target)!r}, which is there and not empty, was given",
                where=where,
                expected="a new or empty folder.",
                fix="choose another name, or pass overwrite=True to replace a folder.",
            )
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=target.parent) as beside:
        new = Path(beside) / "new"
        new.mkdir()
        yield new
        if target.exists():
            target.rename(Path(beside) / "old")
        new.rename(target)


def site_index(data: DashboardData, per_file: int) -> dict[str, Any]:
    """What the page needs to list and find latents.

    Args:
        data: What was seen of them.
        per_file: Latents per file of data.

    Returns:
        JSON data.
    """
    texts = _TextTable(data.texts)
    log_density = np.log10(data.density + DENSITY_FLOOR)
    low, high = float(np.log10(DENSITY_FLOOR)), float(np.log10(1 + DENSITY_FLOOR))
    counts = np.histogram(np.clip(log_density, low, high), bins=_N_DENSITY_BARS, range=(low, high))[0]
    dead = int((data.n_fired == 0).sum())
    return {
        "perFile": per_file,
        "latents": data.latents.tolist(),
        "density": [_rounded(share) for share in data.density],
        "largest": [_rounded(value) for value in data.largest],
        "words": [[texts.number(token) for token in _words(data, row)] for row in range(len(data.latents))],
        "texts": texts.texts,
        "histogram": {"counts": counts.tolist(), "low": low, "high": 0.0},
        "about": [
            ["model", data.model or "?"],
            ["SAE", data.sae],
            ["text", data.text or "?"],
            ["sequences", f"{data.n_sequences:,} of {data.n_ctx} tokens"],
            ["tokens that count", f"{data.n_tokens:,}"],
            ["latents here", f"{len(data.latents):,} of {data.n_latents:,}; {dead:,} never fire"],
        ],
        "notes": list(_NOTES),
    }


def site_chunk(data: DashboardData, rows: Iterable[int]) -> dict[str, Any]:
    """What there is to see of some latents.

    Args:
        data: What was seen.
        rows: Which of the latents in it.

    Returns:
        JSON data.
    """
    texts = _TextTable(data.texts)
    return {"latents": [_record(data, row, texts) for row in rows], "texts": texts.texts}


class _TextTable:
    """Texts in order of first use; tokens with one text share it."""

    def __init__(self, of_token: dict[int, str]):
        self.texts: list[str] = []
        self._of_token, self._numbers = of_token, {}

    def number(self, token: int) -> int:
        """The place of the text of a `token`."""
        text = self._of_token[int(token)]
        if text not in self._numbers:
            self._numbers[text] = len(self.texts)
            self.texts.append(text)
        return self._numbers[text]


def _record(data: DashboardData, row: int, texts: _TextTable) -> dict[str, Any]:
    edges = interval_edges(data.largest[row : row + 1], data.show.n_intervals)[0]
    counts, fired = data.interval_counts[row], int(data.n_fired[row])
    intervals = [
        {
            "low": _rounded(edges[number]),
            "high": _rounded(edges[number + 1]),
            "count": int(counts[number]),
            "share": _rounded(counts[number] / max(fired, 1)),
            "examples": _examples(_at(data.samples, (row, number)), texts, data.show.n_before),
        }
        for number in reversed(range(data.show.n_intervals))
    ]
    record: dict[str, Any] = {
        "fired": fired,
        "bars": data.counts[row].tolist(),
        "top": _examples(_at(data.top, row), texts, data.show.n_before),
        "intervals": intervals,
        "neighbours": [
            [int(latent), _rounded(cosine)]
            for latent, cosine in zip(data.neighbours.latent[row], data.neighbours.cosine[row], strict=True)
        ],
    }
    if (effects := data.effects) is not None:
        for name, ids, values in (("up", effects.top_ids, effects.top), ("down", effects.bottom_ids, effects.bottom)):
            pairs = zip(ids[row].tolist(), values[row].tolist(), strict=True)
            record[name] = [[texts.number(token), _rounded(value)] for token, value in pairs]
        record["effects"] = effects.counts[row].tolist()
    return record


def _at(examples: Examples, index: Any) -> Examples:
    return Examples(*(column[index] for column in examples))


def _examples(examples: Examples, texts: _TextTable, n_before: int) -> list[dict[str, Any]]:
    """The examples that are there; of each the tokens that are, and which of them it is about."""
    found = []
    for sequence, position, value, tokens, values in zip(*examples, strict=True):
        if sequence < 0:
            continue
        there = tokens >= 0
        found.append(
            {
                "sequence": int(sequence),
                "position": int(position),
                "value": _rounded(value),
                "tokens": [texts.number(token) for token in tokens[there]],
                "values": [_rounded(one) for one in values[there]],
                "at": int(there[:n_before].sum()),
            }
        )
    return found


def _words(data: DashboardData, row: int) -> list[int]:
    """The tokens a latent can be found by: what it fires on most often, then what it makes likely."""
    tokens, values = data.top.tokens[row], data.top.values[row]
    strong = tokens[(values > 0) & (values >= 0.5 * data.largest[row]) & (tokens >= 0)]
    distinct, first, times = np.unique(strong, return_index=True, return_counts=True)
    words = distinct[np.lexsort((first, -times))][:_N_WORDS].tolist()
    promoted = [] if data.effects is None else data.effects.top_ids[row, :_N_WORDS].tolist()
    return list(dict.fromkeys([*words, *promoted]))


def _rounded(value: Any) -> float:
    # Integers are shorter in JSON without their ".0".
    number = float(f"{float(value):.4g}")
    return int(number) if number == int(number) else number
