"""Names of models on the Hub: found in a cache laid out as Hugging Face's own tools lay it out, never fetched.

Source: interp_jax.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import jax
import numpy as np
import pytest

from interp_jax.core.errors import LoadError
from interp_jax.models.loading import load, read_checkpoint
from tests.models.directories import DIRECTORIES

NAMES = {
    "gpt2": "gpt2",
    "EleutherAI/pythia-70m": "gpt_neox",
    "HuggingFaceTB/SmolLM2-135M": "llama",
    "facebook/opt-125m": "opt",
}


def fill(hub: Path, name: str, family: str, revision: str = "0f3c") -> Path:
    """Put a model into a cache: contents under their hashes in `blobs`, links to them in `snapshots`."""
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / revision
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    for path in DIRECTORIES[family].iterdir():
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    (repository / "refs" / "main").write_text(revision)
    return snapshot


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home directory, and none of the variables that say where the cache is."""
    for variable in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_names_are_found_where_the_hubs_tools_put_them(name: str, home: Path) -> None:
    snapshot = fill(home / ".cache" / "huggingface" / "hub", name, NAMES[name])
    lm = load(name)
    assert lm.source == str(snapshot)
    assert lm.tokenizer is not None
    expected = load(DIRECTORIES[NAMES[name]])
    jax.tree.map(np.testing.assert_array_equal, lm.params, expected.params)
    # What comes out are files, not links into the cache.
    target = lm.export(home / "mine")
    assert all(path.is_file() and not path.is_symlink() for path in target.iterdir())
    assert (target / "tokenizer.json").read_bytes() == (snapshot / "tokenizer.json").read_bytes()


def test_the_variables_that_say_where_the_cache_is(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"XDG_CACHE_HOME": "huggingface/hub", "HF_HOME": "hub", "HF_HUB_CACHE": ""}
    for variable, inside in places.items():  # each goes before those above it
        snapshot = fill(home / variable / inside, "someone/model", "llama")
        monkeypatch.setenv(variable, str(home / variable))
        assert read_checkpoint("someone/model").source == str(snapshot)


def test_the_revision_that_main_points_to(home: Path) -> None:
    hub = home / ".cache" / "huggingface" / "hub"
    old, new = (fill(hub, "someone/model", family, family) for family in ("gpt2", "llama"))
    assert read_checkpoint("someone/model").source == str(new)
    (hub / "models--someone--model" / "refs" / "main").write_text("gpt2\n")
    assert read_checkpoint("someone/model").source == str(old)


@pytest.mark.parametrize("name", ["google/gemma-3-270m", "EleutherAI/pythia-70m", "gpt2"])
def test_names_that_are_not_there_say_how_to_fetch_them(name: str, home: Path) -> None:
    with pytest.raises(LoadError) as caught:
        load(name)
    assert str(caught.value).startswith(f"No model {name!r} on this machine in load.")
    assert f"fetch the model once with `hf download {name}` and load it by this name." in str(caught.value)
    assert not (home / ".cache").exists()


def test_a_download_that_was_broken_off(home: Path) -> None:
    snapshot = fill(home / ".cache" / "huggingface" / "hub", "someone/model", "llama")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"No file of weights in ") as caught:
        load("someone/model")
    assert "Fix: download the weights, for example with `hf download" in str(caught.value)
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/none"))
    with pytest.raises(LoadError, match=r"No file of weights \(links to files that are gone: model\.safetensors\) in "):
        load("someone/model")
