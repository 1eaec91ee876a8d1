"""Results as text: they fit the terminal, and say what the result says."""

from __future__ import annotations

import re

import numpy as np
import pytest

from interp_jax.core.sites import Site
from interp_jax.figures.terminal import bar, effect_sentences, effects_table, lens_table, padded, token_table
from interp_jax.figures.token_text import text_width
from interp_jax.methods.layer_effects import LayerEffectsResult
from interp_jax.methods.logit_lens import LogitLensResult

WORDS = [" the", "\n", "日本語の単語", " electricity", "\x1b[31m", " Mary"]
N_VIEWS, POS = 9, 7


def decode(ids):
    return "".join(WORDS[int(token)] for token in ids)


@pytest.fixture
def result(rng):
    shape = (N_VIEWS, 1, POS)
    values = {name: rng.uniform(size=shape) for name in ("target_probability", "kl", "kl_reverse", "entropy")}
    return LogitLensResult(
        tokens=rng.integers(0, len(WORDS), (1, POS)),
        mask=np.ones((1, POS), bool),
        target=rng.integers(0, len(WORDS), (1, POS)),
        top_ids=rng.integers(0, len(WORDS), (*shape, 2)),
        top_probabilities=rng.uniform(size=(*shape, 2)),
        rank=np.ones(shape, int),
        agrees=rng.integers(0, 2, shape).astype(bool),
        views=tuple(Site(layer, "resid_post") for layer in range(N_VIEWS)),
        norm="final",
        target_name="final",
        **values,
    )


def plain(text):
    return re.sub(r"\x1b\[[\d;]*m", "", text)


@pytest.mark.parametrize("n_columns", [24, 40, 80, 200])
@pytest.mark.parametrize("is_coloured", [False, True])
def test_the_lens_fits_the_terminal(result, n_columns, is_coloured):
    table = lens_table(result, decode, n_columns=n_columns, is_coloured=is_coloured)
    lines = plain(table).splitlines()
    assert max(map(text_width, lines)) <= n_columns
    assert len(lines) == N_VIEWS + 2
    assert "\x1b" not in plain(table), "a token's own control characters are shown as text"


def test_the_lens_lists_the_output_first_and_the_input_last(result):
    lines = lens_table(result, decode, n_columns=200).splitlines()
    assert [line.split()[0] for line in lines[:N_VIEWS]] == [f"{layer}.resid_post" for layer in range(8, -1, -1)]
    assert lines[-1].split()[0] == "input"


def test_cells_hold_the_top_token_and_mark_the_answer(result):
    result.top_ids[-1, 0, -1, 0], result.agrees[-1, 0, -1] = 5, True
    result.top_ids[-2, 0, -1, 0], result.agrees[-2, 0, -1] = 0, False
    lines = lens_table(result, decode, n_columns=200).splitlines()
    assert lines[0].endswith("·Mary*")
    assert lines[1].endswith("·the")
    coloured = lens_table(result, decode, n_columns=200, is_coloured=True).splitlines()
    assert plain(coloured[0]).rstrip().endswith("·Mary")
    assert coloured[0].count("\x1b[1;") == result.agrees[-1].sum()


@pytest.mark.parametrize(
    ("n_lines", "shown"), [(9, range(8, -1, -1)), (5, [8, 6, 4, 2, 0]), (4, [8, 5, 2, 0]), (1, [8, 0])]
)
def test_many_views_are_thinned_but_never_the_last(result, n_lines, shown):
    lines = lens_table(result, decode, n_columns=200, n_lines=n_lines).splitlines()[:-2]
    assert [line.split()[0] for line in lines] == [f"{layer}.resid_post" for layer in shown]


def test_bars_are_as_long_as_their_part():
    assert [bar(part, 4) for part in (0, 0.5, 1, 2, -1)] == ["    ", "██  ", "████", "████", "    "]
    assert bar(1 / 32, 4) == "▏   "
    rows = token_table([" a", "日本"], [0.5, 0.25], n_columns=60).splitlines()
    assert [text_width(row) for row in rows] == [text_width(rows[0])] * 2
    assert text_width(rows[0]) <= 60
    assert (rows[0].count("█"), rows[1].count("█"), rows[1].count("▌")) == (19, 9, 1)
    assert rows[0].endswith(" 50.0 %")


def test_padding_counts_columns():
    assert [padded("日本", 6, align=align) for align in "<>^"] == ["日本  ", "  日本", " 日本 "]


EFFECTS = LayerEffectsResult(
    np.array([2.0]),
    np.array([[-1.0], [1.5], [3.0], [2.0]]),
    (Site(0, "mlp_out"), Site(3, "attn_out"), Site(4, "mlp_out"), Site(None, "embed")),
)


def test_effects_point_to_their_side():
    lines = effects_table(EFFECTS, n_columns=60).splitlines()
    assert [line.split()[0] for line in lines] == ["0.mlp_out", "4.mlp_out", "3.attn_out", "embed"]
    assert [line.split()[-1] for line in lines] == ["−3.00", "+1.00", "−0.50", "+0.00"]
    left, right = zip(*(line.split("│") for line in lines), strict=True)
    assert [side.count("█") > 0 for side in left] == [True, False, True, False]
    assert [side.count("█") > 0 for side in right] == [False, True, False, False]
    assert left[0].count("█") == pytest.approx(6 * left[2].count("█"), abs=6)
    assert max(map(len, lines)) <= 60


def test_effects_in_words():
    assert effect_sentences(EFFECTS, "A", "B") == [
        "Without the MLP of layer 0, B overtakes A (+2.00 to −1.00).",
        "Without the MLP of layer 4, the lead of A grows (+2.00 to +3.00).",
        "Without the attention of layer 3, the lead of A shrinks (+2.00 to +1.50).",
    ]
    behind = LayerEffectsResult(-EFFECTS.clean, -EFFECTS.zeroed, EFFECTS.sites)
    assert effect_sentences(behind, "A", "B", n=2) == [
        "Without the MLP of layer 0, A overtakes B (−2.00 to +1.00).",
        "Without the MLP of layer 4, the lead of B grows (−2.00 to −3.00).",
    ]
