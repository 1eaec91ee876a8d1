"""The site of an SAE's latents: its files hold what was seen, whatever the tokens are, and a browser shows it."""

from __future__ import annotations

import functools
import http.server
import json
import re
import threading
from dataclasses import replace

import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError
from interp_jax.core.sites import Site
from interp_jax.figures.page import script_data
from interp_jax.figures.sae_neuronpedia import neuronpedia_batches
from interp_jax.figures.sae_site import write_site
from interp_jax.methods.sae.dashboard import BARS_PER_INTERVAL, DashboardData, Show
from interp_jax.methods.sae.examples import Examples
from interp_jax.methods.sae.logit_effects import N_BINS, LogitEffects, Neighbours
from tests.browser import ENTER, ESCAPE, chromium

SHOW = Show(n_top=3, n_intervals=2, n_per_interval=2, n_before=2, n_after=1, n_logits=3, n_neighbours=2)
# Texts that would be markup, end a script, or be invisible.
TEXTS = [
    "<script>alert(1)</script>",
    " &amp;",
    "</script>",
    "\"quoted'",
    "\n",
    " the",
    "\t",
    "\u2028",
    "<!--",
    "é",
    "日本",
    "",
]
LATENTS, DEAD = [0, 3, 4, 7, 11], 2


def examples(rng, *shape, largest):
    """Three places: two taken, the second at the start of its sequence; of a dead latent none."""
    sequence = rng.integers(0, 50, shape)
    tokens = rng.integers(0, len(TEXTS), (*shape, 4)).astype(np.int32)
    values = rng.uniform(0, 1, (*shape, 4)).astype(np.float32) * largest
    sequence[..., 2:], tokens[..., 1, :2], values[..., 1, :2] = -1, -1, 0
    sequence[DEAD] = -1
    value = np.where(sequence >= 0, values[..., 2], 0).astype(np.float32)
    return Examples(sequence, rng.integers(0, 9, shape).astype(np.int32), value, tokens, values)


@pytest.fixture
def data(rng):
    n, n_bars = len(LATENTS), SHOW.n_intervals * BARS_PER_INTERVAL
    counts = rng.integers(1, 40, (n, n_bars))
    counts[DEAD] = 0
    largest = np.where(np.arange(n) == DEAD, 0, rng.uniform(1, 5, n)).astype(np.float32)
    top = np.sort(rng.normal(size=(n, 3)).astype(np.float32), axis=1)[:, ::-1]
    ids = [rng.integers(0, len(TEXTS), (n, 3)) for _ in range(2)]
    return DashboardData(
        latents=np.array(LATENTS),
        n_latents=12,
        n_fired=counts.sum(1),
        largest=largest,
        counts=counts,
        top=examples(rng, n, 3, largest=largest[:, None, None]),
        samples=examples(rng, n, 2, 2, largest=largest[:, None, None, None]),
        effects=LogitEffects(ids[0], top, ids[1], -top, rng.integers(0, 9, (n, N_BINS))),
        neighbours=Neighbours(np.tile([3, 8], (n, 1)), np.tile(np.array([0.5, -0.25], np.float32), (n, 1))),
        texts=dict(enumerate(TEXTS)),
        n_tokens=5000,
        n_sequences=50,
        n_ctx=100,
        show=SHOW,
        model="<toy>",
        text="made & up",
        sae="SAE(relu)",
        read=Site(4, "mlp_out"),
        write=Site(4, "mlp_out"),
        seed=0,
    )


def read_script(path, pattern):
    """The data in a script: what stands in it is JSON, too."""
    match = re.match(pattern, path.read_text(encoding="utf-8"))
    assert match, path
    return json.loads(match[1])


def read_site(folder):
    index = read_script(folder / "data" / "index.js", r"const INDEX = (.*);\nconst CHUNKS = {};\n\Z")
    chunks = [
        read_script(folder / "data" / f"latents-{number}.js", rf"CHUNKS\[{number}\] = (.*);\n\Z")
        for number in range(-(-len(index["latents"]) // index["perFile"]))
    ]
    return index, chunks


def assert_examples(found, examples, texts):
    there = examples.sequence >= 0
    assert [one["sequence"] for one in found] == examples.sequence[there].tolist()
    assert [one["position"] for one in found] == examples.position[there].tolist()
    for one, value, tokens, values in zip(
        found, examples.value[there], examples.tokens[there], examples.values[there], strict=True
    ):
        assert one["value"] == pytest.approx(value, rel=1e-3)
        assert [texts[token] for token in one["tokens"]] == [TEXTS[token] for token in tokens if token >= 0]
        np.testing.assert_allclose(one["values"], values[tokens >= 0], rtol=1e-3)
        assert one["values"][one["at"]] == one["value"]


def at(examples, *index):
    return Examples(*(column[index] for column in examples))


def test_the_files_hold_what_was_seen(data, tmp_path):
    assert write_site(data, tmp_path / "site", per_file=2) == tmp_path / "site" / "index.html"
    files = sorted(str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("*.*"))
    assert files == ["data/index.js", *(f"data/latents-{n}.js" for n in range(3)), "index.html"]
    assert [path.name for path in tmp_path.iterdir()] == ["site"]
    index, chunks = read_site(tmp_path / "site")
    assert index["latents"] == LATENTS
    np.testing.assert_allclose(index["density"], data.density, rtol=1e-3)
    assert sum(index["histogram"]["counts"]) == len(LATENTS)
    assert index["histogram"]["counts"][0] == 1
    for row in range(len(LATENTS)):
        chunk = chunks[row // 2]
        record, texts = chunk["latents"][row % 2], chunk["texts"]
        assert record["fired"] == data.n_fired[row]
        assert record["bars"] == data.counts[row].tolist()
        assert_examples(record["top"], at(data.top, row), texts)
        for number, interval in enumerate(reversed(record["intervals"])):
            assert interval["count"] == data.interval_counts[row, number]
            assert interval["low"] == pytest.approx(data.largest[row] * number / 2, rel=1e-3)
            assert_examples(interval["examples"], at(data.samples, row, number), texts)
        for name, ids, values in (
            ("up", data.effects.top_ids, data.effects.top),
            ("down", data.effects.bottom_ids, data.effects.bottom),
        ):
            assert [texts[token] for token, _ in record[name]] == [TEXTS[token] for token in ids[row]]
            np.testing.assert_allclose([value for _, value in record[name]], values[row], rtol=1e-3)
        assert record["neighbours"] == [[3, 0.5], [8, -0.25]]


def test_a_latent_is_found_by_what_it_fires_on_and_makes_likely(data, tmp_path):
    tokens, values = data.top.tokens.copy(), np.zeros_like(data.top.values)
    tokens[0, 0], values[0, 0] = [5, 1, 9, 10], [0.2 * data.largest[0], 0, data.largest[0], 0.6 * data.largest[0]]
    tokens[0, 1], values[0, 1] = [-1, -1, 10, 4], [0, 0, data.largest[0], 0]
    write_site(replace(data, top=data.top._replace(tokens=tokens, values=values)), tmp_path / "site")
    index, _ = read_site(tmp_path / "site")
    # Twice, once, and then those made likely, without those that are there already.
    expected = dict.fromkeys([TEXTS[10], TEXTS[9], *(TEXTS[token] for token in data.effects.top_ids[0])])
    assert [index["texts"][word] for word in index["words"][0]] == list(expected)


def test_no_text_becomes_markup_or_ends_a_script(data, tmp_path):
    write_site(data, tmp_path / "site", title="<b>&")
    page = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;" in page
    assert "<b>" not in page
    assert "made &amp; up" in page
    for path in (tmp_path / "site" / "data").iterdir():
        content = path.read_text(encoding="utf-8")
        assert "<" not in content
        assert "\u2028" not in content
    # One script of its own and one beside it; nothing from elsewhere.
    assert re.findall(r'\b(?:src|href)="[^"]*"|@import|url\(', page) == ['href="#"', 'src="data/index.js"']
    assert page.count("</script>") == 2


def test_data_in_scripts_is_json_again():
    for value in (TEXTS, {"</script>": [1, None, -0.5]}):
        assert json.loads(script_data(value)) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        script_data([float("nan")])


def test_neuronpedia_batches(data, tmp_path):
    paths = neuronpedia_batches(data, tmp_path / "export", sae_set="res", per_batch=3, dataset="pydoc")
    assert [path.name for path in paths] == ["batch-0.json", "batch-1.json"]
    batches = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    assert [(one["model_id"], one["layer"], one["sae_set"]) for one in batches] == [("<toy>", 4, "res")] * 2
    skipped = json.loads((tmp_path / "export" / "skipped_indexes.json").read_text())
    assert skipped["skipped_indexes"] == [LATENTS[DEAD]]
    settings = json.loads((tmp_path / "export" / "run_settings.json").read_text())
    assert (settings["n_prompts_total"], settings["n_tokens_in_prompt"]) == (50, 100)
    features = [feature for batch in batches for feature in batch["features"]]
    alive = [row for row in range(len(LATENTS)) if row != DEAD]
    assert [feature["feature_index"] for feature in features] == [LATENTS[row] for row in alive]
    for row, feature in zip(alive, features, strict=True):
        assert feature["pos_str"] == [TEXTS[token] for token in data.effects.top_ids[row]]
        np.testing.assert_allclose(feature["neg_values"], data.effects.bottom[row], atol=1e-3)
        assert feature["frac_nonzero"] == data.n_fired[row] / 5000
        assert feature["freq_hist_data_bar_heights"] == data.counts[row].tolist()
        assert len(feature["logits_hist_data_bar_values"]) == len(feature["logits_hist_data_bar_heights"]) == N_BINS
        assert (feature["dataset"], feature["correlated_features_indices"]) == ("pydoc", [])
        groups = [at(data.top, row), at(data.samples, row, 1), at(data.samples, row, 0)]
        shares = [-1, *(data.interval_counts[row, ::-1] / 5000 + [0, 1 - data.density[row]])]
        found = iter(feature["activations"])
        for number, (group, share) in enumerate(zip(groups, shares, strict=True)):
            for sequence, value, tokens in zip(group.sequence, group.value, group.tokens, strict=True):
                if sequence < 0:
                    continue
                one = next(found)
                assert one["tokens"] == [TEXTS[token] for token in tokens if token >= 0]
                assert one["values"][one["qualifying_token_index"]] == pytest.approx(value, abs=1e-3)
                assert one["bin_contains"] == pytest.approx(share, abs=1e-4)
                assert one["bin_min"] == (
                    -1 if not number else pytest.approx(data.largest[row] * (2 - number) / 2, abs=1e-3)
                )
        assert not list(found)


def test_what_is_not_known_is_left_out(data, tmp_path):
    without = replace(data, effects=None, model="", text="")
    write_site(without, tmp_path / "site")
    assert "up" not in read_site(tmp_path / "site")[1][0]["latents"][0]
    (path,) = neuronpedia_batches(without, tmp_path / "export")
    assert json.loads(path.read_text())["features"][0]["pos_str"] == []


def test_folders_are_not_written_over(data, tmp_path):
    (tmp_path / "site").mkdir()
    write_site(data, tmp_path / "site")
    for write in (write_site, neuronpedia_batches):
        with pytest.raises(InvalidInputError, match=r"not empty, was given[\s\S]*a new or empty folder[\s\S]*Fix:"):
            write(data, tmp_path / "site")
    for path in (tmp_path / "other", tmp_path / "site"):
        with pytest.raises(KeyError):
            write_site(replace(data, texts={}), path, overwrite=True)
    assert len(read_site(tmp_path / "site")[1]) == 1
    write_site(data, tmp_path / "site", per_file=2, overwrite=True)
    assert len(read_site(tmp_path / "site")[1]) == 3
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InvalidInputError, match="file', which is there"):
        write_site(data, tmp_path / "file", overwrite=True)
    (tmp_path / "file").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["site"]
    with pytest.raises(InvalidInputError, match="per_file=0"):
        write_site(data, tmp_path / "third", per_file=0)


@pytest.fixture
def served(tmp_path):
    """A server of the site on this machine; its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/index.html"
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_in_a_browser(data, tmp_path, served):
    tokens = np.where(data.top.tokens == 10, 9, data.top.tokens)
    tokens[3, 0, 2] = 10
    values = data.top.values.copy()
    values[3, 0, 2] = data.largest[3]
    ids = np.where(data.effects.top_ids == 10, 9, data.effects.top_ids)
    data = replace(
        data, top=data.top._replace(tokens=tokens, values=values), effects=data.effects._replace(top_ids=ids)
    )
    page = write_site(data, tmp_path / "site", per_file=2)
    listed = "[...document.querySelectorAll('#list a b')].map((b) => Number(b.textContent))"
    heading = "document.querySelector('main h2')?.textContent"
    with chromium(tmp_path / "profile") as browser:
        for url in (page.as_uri(), served):
            browser.open(url)
            assert browser.wait(f"{heading}") == "Overview"
            assert browser.run(f"return {listed};") == LATENTS
            # A search by token, and the first hit on Enter.
            browser.type("#query", "日本")
            assert browser.run(f"return {listed};") == [LATENTS[3]]
            browser.type("#query", ENTER)
            browser.wait(f"{heading} === 'Latent {LATENTS[3]}'")
            assert browser.run("return document.activeElement === document.body;")
            contexts = browser.run("return [...document.querySelectorAll('.context')].map((c) => c.textContent);")
            assert len(contexts) == sum((one[3] >= 0).sum() for one in (data.top.sequence, data.samples.sequence))
            assert browser.run("return document.querySelector('.context .peak').textContent;") == "日本"
            assert (
                browser.run("return getComputedStyle(document.querySelector('.peak')).backgroundColor;")
                != "rgba(0, 0, 0, 0)"
            )
            # A click on another latent, and by keys on.
            browser.run("byId('query').value = ''; byId('query').dispatchEvent(new Event('input'));")
            browser.click("#list li:nth-child(1) a")
            browser.wait(f"{heading} === 'Latent {LATENTS[0]}'")
            browser.type("body", "j")
            browser.wait(f"{heading} === 'Latent {LATENTS[1]}'")
            browser.type("body", "jk" + "j")
            browser.wait(f"{heading} === 'Latent {LATENTS[DEAD]}'")
            assert "never fires" in browser.run("return document.querySelector('main').textContent;")
            # By density, and by order.
            browser.run("byId('low').value = 0.0001; byId('order').value = 'often';")
            browser.run("byId('low').dispatchEvent(new Event('input'));")
            by_density = sorted((-data.density[row], latent) for row, latent in enumerate(LATENTS) if row != DEAD)
            assert browser.run(f"return {listed};") == [latent for _, latent in by_density]
            browser.type("body", ESCAPE)
            browser.wait(f"{heading} === 'Overview'")
            assert browser.run("return document.querySelectorAll('script:not([src])').length;") == 1
            light = browser.screenshot(tmp_path / "light.png")
            browser.emulate(prefers_color_scheme="dark")
            assert browser.screenshot(tmp_path / "dark.png") != light
            assert light[:4] == b"\x89PNG"
            browser.emulate(prefers_color_scheme="light")
            assert [line for line in browser.errors() if "favicon" not in line] == []
