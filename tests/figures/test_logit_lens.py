"""The lens's pictures: what they show is in them, escaped, self-contained, and drawn without a warning."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError
from interp_jax.core.sites import Site
from interp_jax.figures.logit_lens import lens_cells, lens_figure, lens_page
from interp_jax.methods.logit_lens import LogitLensResult

# Awkward on purpose: markup, mathematics, line breaks, wide and unknown characters, nothing at all.
WORDS = ["</script><b>", " $x_1$", "\n", "日本", "\U000f0000", "", " Mary", '"quoted"', "&amp;", "\u2028", "\ufffd"]
N_VIEWS, POS, K = 3, 6, 4


def decode(ids):
    return "".join(WORDS[int(token)] for token in ids)


@pytest.fixture
def result(rng):
    tokens = rng.integers(0, len(WORDS), (2, POS)).astype(np.int32)
    tokens[1, :2] = -1
    shape = (N_VIEWS, 2, POS)
    probabilities = np.sort(rng.dirichlet(np.ones(K + 1), shape)[..., :K], axis=-1)[..., ::-1]
    mask = tokens >= 0
    mask[:, -1] = False
    return LogitLensResult(
        tokens=tokens,
        mask=mask,
        target=rng.integers(0, len(WORDS), (2, POS)),
        top_ids=rng.integers(0, len(WORDS), (*shape, K)),
        top_probabilities=probabilities,
        target_probability=rng.uniform(size=shape),
        rank=rng.integers(1, 50, shape),
        agrees=rng.integers(0, 2, shape).astype(bool),
        kl=np.where(rng.uniform(size=shape) < 0.2, np.inf, rng.uniform(size=shape)),
        kl_reverse=rng.uniform(size=shape),
        entropy=rng.uniform(size=shape),
        views=(Site(0, "resid_pre"), Site(0, "resid_post"), Site(1, "resid_post")),
        norm="final",
        target_name="next",
    )


def page_data(page):
    return json.loads(re.search(r"^const DATA = (.*);$", page, re.MULTILINE)[1])  # type: ignore[index]


def test_the_page_holds_every_number_of_its_row(result):
    page = lens_page(result, decode, row=1, title="toy <1>")
    data = page_data(page)

    assert data["views"] == ["0.resid_pre", "0.resid_post", "1.resid_post"]
    assert len(data["inputs"]) == POS - 2, "padding is left out"
    shown = np.array(data["texts"], object)[np.array(data["top"])]
    assert shown.tolist() == lens_cells(result, decode, row=1).texts.tolist()
    for name, values in [
        ("p", result.top_probabilities),
        ("target_p", result.target_probability),
        ("rank", result.rank),
    ]:
        np.testing.assert_allclose(data[name], values[:, 1, 2:], rtol=1e-3)
    np.testing.assert_array_equal(data["agrees"], result.agrees[:, 1, 2:])
    for name in ("kl", "kl_reverse", "entropy"):
        expected = getattr(result, name)[:, 1, 2:]
        found = np.array([[np.inf if value is None else value for value in row] for row in data[name]])
        np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert data["targets"][-1] is None, "the last position has no next token"
    assert None not in data["targets"][:-1]
    assert data["target"] == "the token that follows in the text"


def test_tokens_cannot_become_markup(result):
    result.tokens[0, 0] = result.top_ids[0, 0, 0, 0] = 0
    page = lens_page(result, decode, title="toy <1>", text="</script><i>& '\"")
    assert page.count("</script>") == 1
    assert "<b>Bold</b>" in page
    assert "script><b>" not in page
    assert "toy <1>" not in page
    assert "toy &lt;1&gt;" in page
    assert "&lt;/script&gt;&lt;i&gt;&amp;" in page
    assert "</script><b>" in page_data(page)["texts"]


def test_the_page_needs_nothing_else(result):
    page = lens_page(result, decode)
    assert re.findall(r"\b(?:src|href|@import|url\()", page) == []
    # The only address is the name of the SVG namespace, which is never fetched.
    assert set(re.findall(r"https?://[^\"' ]*", page)) == {"http://www.w3.org/2000/svg"}
    assert "prefers-color-scheme: dark" in page
    page.encode("utf-8")


@pytest.mark.parametrize("row", [0, 1])
def test_the_figure_is_drawn_without_a_warning(result, row):
    figure = lens_figure(result, decode, row=row, title="toy $1 日本 \U000f0000")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")
    # Inches of the canvas grow with what is shown: all views, all positions but padding.
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert len([text for text in texts if not text.isdigit()]) == N_VIEWS * (POS - 2 * row)


def test_the_figure_shades_by_probability_and_marks_agreement(result):
    figure = lens_figure(result, decode)
    axes = figure.axes[0]
    np.testing.assert_allclose(
        np.array(axes.collections[0].get_array()).ravel(), result.top_probabilities[:, 0, :, 0].ravel(), rtol=1e-6
    )
    bold = [text.get_fontweight() == "bold" for text in axes.texts if not text.get_text().isdigit()]
    assert bold == result.agrees[:, 0].ravel().tolist()


def test_a_long_text_is_cut_and_says_so(result):
    figure = lens_figure(result, decode, max_positions=4)
    assert any("The last 4 of 6 positions" in text.get_text() for text in figure.texts)
    assert [label.get_text() for label in figure.axes[0].texts][-4:] == ["2", "3", "4", "5"]
    assert not any("The last" in text.get_text() for text in lens_figure(result, decode).texts)


def test_an_unknown_row_is_refused(result):
    for draw in (lens_figure, lens_page):
        with pytest.raises(InvalidInputError, match=r"row=2 was given[\s\S]*0 to 1[\s\S]*Fix:"):
            draw(result, decode, row=2)


def test_drawing_modules_import_without_matplotlib_and_draw_without_pyplot():
    program = (
        "import sys, interp_jax.figures.logit_lens, interp_jax.figures.layer_effects\n"
        "assert not any(name.startswith('matplotlib') for name in sys.modules)\n"
        "from interp_jax.figures.plotting import drawing\n"
        "with drawing(2, 2) as figure: figure.add_axes((0, 0, 1, 1))\n"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
