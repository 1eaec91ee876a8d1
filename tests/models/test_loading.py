"""`load`: names and paths to models, each mistake in words, and the numbers of PyTorch for real directories.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from interp_jax.core.errors import InvalidInputError, LoadError, PatchError, UnknownNameError, UnsupportedModelError
from interp_jax.models import loading
from interp_jax.models.loading import FAMILIES, PUBLISHED, TUNIX, load, read_checkpoint
from interp_jax.models.weights.checkpoint import Tensors
from tests.models.weights.gguf_files import ORACLES, write_llama

FAMILY_NAMES = sorted(FAMILIES)


def tiny(family: str) -> Path:
    return ORACLES / f"tiny_{family.replace('gpt_neox', 'neox')}"


@pytest.fixture(params=FAMILY_NAMES)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of each family's tiny model, to damage."""
    return Path(shutil.copytree(tiny(request.param), tmp_path / request.param))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def refusal(what: Any, kind: type[Exception] = LoadError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        load(what, **options)
    assert "\n  Fix: " in str(caught.value)
    return str(caught.value)


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


# -- the numbers


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_logit_is_that_of_pytorch(family: str):
    lm = load(tiny(family))
    with np.load(f"{tiny(family)}_logits.npz") as recorded:
        logits = np.asarray(lm(recorded["tokens"]))
        assert logits.shape == recorded["logits"].shape
        np.testing.assert_allclose(logits, recorded["logits"], rtol=0, atol=1e-4)


def test_a_gguf_file_and_a_directory_of_one_model_give_the_same_bits(tmp_path: Path):
    config = json.loads((tiny("llama") / "config.json").read_text())
    path = write_llama(tmp_path / "tiny.gguf", config, load_file(tiny("llama") / "model.safetensors"))
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    np.testing.assert_array_equal(load(path)(tokens), load(tiny("llama"))(tokens))


def test_several_files_of_weights_give_the_same_bits(directory: Path):
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    expected = np.asarray(load(directory)(tokens))
    tensors = load_file(directory / "model.safetensors")
    weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for part in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == part}, directory / part)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    np.testing.assert_array_equal(load(directory)(tokens), expected)


def test_weights_without_the_prefix_of_the_whole_model(directory: Path):
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    expected = np.asarray(load(directory)(tokens))

    def strip(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.").removeprefix("model.")] = tensors.pop(name)

    change_weights(directory, strip)
    np.testing.assert_array_equal(load(directory)(tokens), expected)


def test_buffers_of_old_files_are_ignored(tmp_path: Path):
    directory = Path(shutil.copytree(tiny("gpt2"), tmp_path / "gpt2"))
    mask = np.tril(np.ones((1, 1, 48, 48), np.float32))
    change_weights(directory, lambda tensors: tensors.update({f"transformer.h.{i}.attn.bias": mask for i in range(3)}))
    assert load(directory).config is not None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, "bfloat16"])
def test_weights_are_kept_in_the_type_asked_for(directory: Path, dtype: Any):
    if directory.name == "gpt_neox" and dtype == jnp.float16:
        assert "float32 or bfloat16" in refusal(directory, InvalidInputError, dtype=dtype)
        return
    lm = load(directory, dtype=dtype)
    assert lm.W_E.dtype == jnp.dtype(dtype)
    assert lm(np.array([[1, 2, 3]])).dtype == jnp.dtype(dtype)


def test_what_a_model_says_of_itself(directory: Path):
    lm = load(str(directory))
    assert lm.config is not None
    assert lm.config.family == directory.name
    assert lm.source == str(directory)
    assert lm.tokenizer is not None
    assert lm.tokenizer.decode(lm.tokenizer.encode("the tea")) == "the tea"


# -- damaged models


def test_all_misfits_are_named_at_once(directory: Path):
    tensors = load_file(directory / "model.safetensors")
    misshapen, missing, *_ = sorted(name for name in tensors if tensors[name].ndim == 2)
    tensors[misshapen] = np.ones((2, 3), np.float32)
    tensors["stranger"] = tensors.pop(missing)
    save_file(tensors, directory / "model.safetensors")
    words = refusal(directory)
    assert words.startswith(f"Weights that do not fit the configuration in {directory}\n")
    assert f"    missing (1): {missing}\n" in words
    assert "    left over (1): stranger\n" in words
    assert f"    {misshapen} has shape (2, 3), expected (" in words
    assert "Fix: check that config.json and the weights belong together and that the download is complete." in words


def test_a_layer_too_many_or_too_few(directory: Path):
    config = json.loads((directory / "config.json").read_text())
    (key,) = {"n_layer", "num_layers", "num_hidden_layers"} & set(config)
    n_layers = config[key]

    def with_layers(n: int) -> str:
        kinds = {"attention_types": [[["global"], n]], "attention_layers": None} if "attention_types" in config else {}
        change_config(directory, **{key: n}, **kinds)
        return refusal(directory)

    words = with_layers(n_layers - 1)
    assert "left over (" in words
    assert f".{n_layers - 1}." in words
    assert "missing" not in words
    words = with_layers(n_layers + 2)
    assert "missing (" in words
    assert f"{{{n_layers},{n_layers + 1}}}" in words


def test_values_that_are_not_finite(directory: Path):
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        name = sorted(tensors)[0]
        tensors[name] = tensors[name].copy()
        tensors[name].flat[3] = np.nan

    change_weights(directory, spoil)
    assert "has 1 values that are not finite" in refusal(directory)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_truncated_files(directory: Path, file: str):
    path = directory / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    words = refusal(directory)
    assert words.startswith("Damaged ")
    assert file in words
    assert str(directory) in words


def test_unknown_keys_of_the_configuration(directory: Path):
    change_config(directory, alibi=True)
    words = refusal(directory, UnsupportedModelError)
    assert f"Unknown configuration keys alibi=True in {directory}" in words


def test_after_a_failure_the_mended_directory_loads(directory: Path):
    whole = (directory / "model.safetensors").read_bytes()
    change_weights(directory, lambda tensors: tensors.pop(sorted(tensors)[0]))
    refusal(directory)
    (directory / "model.safetensors").write_bytes(whole)
    tokens = np.array([[5, 6, 7]], np.int32)
    np.testing.assert_array_equal(load(directory)(tokens), load(tiny(directory.name))(tokens))


def test_a_family_nobody_covers(directory: Path):
    change_config(directory, model_type="llama2")
    words = refusal(directory, UnsupportedModelError)
    assert words.startswith(f"A model of the family 'llama2' (model_type) in {directory}. Did you mean 'llama'?")
    assert f"Known: {', '.join(sorted(FAMILIES.keys() | TUNIX.keys()))}\n" in words


def test_an_upstream_that_does_not_run_the_family():
    with pytest.raises(
        UnknownNameError, match="upstream='tunix_llama' was given in load, for a model of the family 'lla"
    ):
        load(tiny("llama"), upstream="tunix_llama")
    with pytest.raises(UnknownNameError, match="Known: transformers_gpt2\n"):
        load(tiny("gpt2"), upstream="tunix_llama3")
    assert load(tiny("gpt2"), upstream="transformers_gpt2").upstream.name == "transformers_gpt2"


@pytest.mark.parametrize(("said", "held"), [("llama", "gpt2"), ("gpt2", "mistral")])
def test_weights_of_another_family(said: str, held: str, tmp_path: Path):
    directory = Path(shutil.copytree(tiny(said), tmp_path / said))
    shutil.copy(tiny(held) / "model.safetensors", directory)
    words = refusal(directory)
    n_expected = len(load_file(tiny(said) / "model.safetensors"))
    assert f"    missing ({n_expected}): " in words
    assert "    left over (" in words
    assert "transformer.h.{0..2}." in words
    assert "model.layers.{0..2}.self_attn" in words


def test_an_upstream_version_out_of_range_is_told_before_anything_is_read(
    directory: Path, monkeypatch: pytest.MonkeyPatch
):
    family = importlib.import_module(FAMILIES[json.loads((directory / "config.json").read_text())["model_type"]])
    patch_set = dataclasses.replace(family.PATCH_SET, versions={"jax": "<0.4", "flax": ">=99"})
    monkeypatch.setattr(family, "PATCH_SET", patch_set)
    monkeypatch.setattr(Tensors, "rows", lambda self, name: pytest.fail("a tensor was read"))
    words = refusal(directory, PatchError)
    assert words.startswith("Upstream versions jax ")
    assert ", flax " in words
    assert "Expected: jax <0.4, flax >=99." in words
    assert "Fix: pip install 'jax<0.4' 'flax>=99'" in words


# -- names and paths


def test_names_nobody_knows(hub: Path):
    assert refusal("smollm2-135").startswith(
        "No model 'smollm2-135' on this machine in load. Did you mean 'smollm2-135m'?\n"
        "  Known: smollm2-135m\n"
        "  Fix: give the path of a .gguf file or of a Hugging Face directory, or fetch the model once with "
        "`hf download smollm2-135` and load it by this name."
    )
    assert "`hf download someone/model`" in refusal("someone/model")


@pytest.mark.parametrize("name", ["./model", "~/no/such/model", "a/b/c", "model.gguf", Path("model"), "model/"])
def test_paths_that_are_not_there(hub: Path, name: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    words = refusal(name)
    assert words.startswith("No model at ")
    assert "Expected: an existing .gguf file, or a directory with config.json and safetensors." in words
    assert f"it is looked for from {tmp_path}." in words


@pytest.mark.parametrize("what", [None, 3, "", b"model", ["gpt2"]])
def test_what_is_no_name(what: Any):
    assert "is no model in load." in refusal(what, InvalidInputError)


@pytest.mark.parametrize("dtype", [jnp.int32, "bool", jnp.complex64])
def test_types_that_are_not_floating_point(dtype: Any):
    words = refusal(tiny("gpt2"), InvalidInputError, dtype=dtype)
    assert words.startswith(f"dtype {jnp.dtype(dtype).name} in load.")
    assert "Fix: pass jnp.float32, jnp.bfloat16 or jnp.float16." in words


def test_a_file_of_weights_in_place_of_its_directory():
    words = refusal(tiny("gpt2") / "model.safetensors")
    assert "A file that is no model: 'model.safetensors' in " in words
    assert f"Fix: load({str(tiny('gpt2'))!r})." in words


def test_the_hugging_face_cache(hub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def put(repository: str, family: str) -> Path:
        folder = hub / f"models--{repository.replace('/', '--')}"
        shutil.copytree(tiny(family), folder / "snapshots" / "abc")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("abc")
        return folder / "snapshots" / "abc"

    assert "No model 'gpt2' on this machine" in refusal("gpt2")
    moved = put("openai-community/gpt2", "gpt2")
    assert read_checkpoint("gpt2").source == str(moved)
    assert read_checkpoint("openai-community/gpt2").source == str(moved)
    old = put("gpt2", "gpt2")
    assert read_checkpoint("gpt2").source == str(old)
    assert read_checkpoint("someone/llama" if put("someone/llama", "llama") else "").family == "llama"
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert read_checkpoint("gpt2").source == str(old)
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    (tmp_path / "xdg" / "huggingface").mkdir(parents=True)
    hub.rename(tmp_path / "xdg" / "huggingface" / "hub")
    assert read_checkpoint("gpt2").family == "gpt2"
    shutil.rmtree(tmp_path / "xdg" / "huggingface" / "hub" / "models--gpt2" / "snapshots")
    assert "openai-community" in read_checkpoint("gpt2").source


def test_a_directory_here_wins_only_if_it_is_a_model(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    words = refusal("gpt2")
    assert "No model at 'gpt2': a directory without config.json in load." in words
    folder = hub / "models--gpt2"
    shutil.copytree(tiny("gpt2"), folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    assert read_checkpoint("gpt2").source == str(folder / "snapshots" / "abc")
    shutil.copytree(tiny("gpt2"), tmp_path / "gpt2", dirs_exist_ok=True)
    assert read_checkpoint("gpt2").source == "gpt2"


def test_a_published_name_fetches_its_own_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked = []

    def fetched(file: Any) -> Path:
        asked.append(file)
        config = json.loads((tiny("llama") / "config.json").read_text())
        return write_llama(tmp_path / "tiny.gguf", config, load_file(tiny("llama") / "model.safetensors"))

    monkeypatch.setattr(loading, "fetched", fetched)
    assert load("smollm2-135m").config is not None
    assert asked == [PUBLISHED["smollm2-135m"]]


def test_every_family_has_its_patch_set():
    for family, module in FAMILIES.items():
        assert load(tiny(family)).config is not None
        assert module.startswith("interp_jax.patches.") and module.endswith(f"_{family}")
