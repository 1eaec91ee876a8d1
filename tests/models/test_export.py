"""Export: what was loaded comes out bit for bit, whole or not at all.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from interp_jax.core.errors import ExportError, InvalidInputError, ShapeError, UnsupportedModelError
from interp_jax.models import export
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.loading import FAMILIES, load
from interp_jax.models.upstream import Upstream
from interp_jax.models.weights import writing
from interp_jax.models.weights.checkpoint import Checkpoint
from interp_jax.models.weights.layout import Stored, read, turned
from tests.models.directories import DIRECTORIES, config_of
from tests.models.weights.gguf_files import write_llama

GPT2, LLAMA = DIRECTORIES["gpt2"], DIRECTORIES["llama"]
INDEX = "model.safetensors.index.json"


def assert_same(one: Path, other: Path) -> None:
    """Two directories hold the same model: configuration, tokenizer, tensors."""
    assert config_of(one) == config_of(other)
    assert (one / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert set(first) == set(second)
    for name, values in first.items():
        assert values.dtype == second[name].dtype
        np.testing.assert_array_equal(values, second[name], err_msg=name)


def nothing_hidden(directory: Path) -> bool:
    return not [path for path in directory.iterdir() if path.name.startswith(".")]


def test_there_is_a_directory_of_every_family() -> None:
    assert set(FAMILIES) <= set(DIRECTORIES)


# -- round trips


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_round_trip_is_exact(family: str, stacked: bool, tmp_path: Path) -> None:
    source = DIRECTORIES[family]
    target = load(source, stacked=stacked).export(tmp_path / "model")
    assert target == tmp_path / "model"
    assert_same(source, target)
    assert nothing_hidden(tmp_path)
    again, lm = load(target, stacked=stacked), load(source, stacked=stacked)
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)


def test_a_model_that_was_restacked_comes_out_the_same(tmp_path: Path) -> None:
    assert_same(LLAMA, load(LLAMA, stacked=True).unstacked().export(tmp_path / "one"))
    assert_same(LLAMA, load(LLAMA).stacked().export(tmp_path / "other"))


def test_a_model_on_several_devices(tmp_path: Path) -> None:
    for stacked in (False, True):
        lm = load(LLAMA, stacked=stacked, sharding=jax.make_mesh((2,), ("model",)))
        assert_same(LLAMA, lm.export(tmp_path / str(stacked)))


def test_bfloat16(tmp_path: Path) -> None:
    lm = load(LLAMA, dtype="bfloat16", stacked=True)
    target = lm.export(tmp_path / "model")
    assert config_of(target) == config_of(LLAMA) | {"dtype": "bfloat16"}
    source, written = load_file(LLAMA / "model.safetensors"), load_file(target / "model.safetensors")
    for name, values in written.items():
        np.testing.assert_array_equal(values, source[name].astype(jnp.bfloat16), err_msg=name)
    back = load(target, dtype="bfloat16", stacked=True)
    jax.tree.map(np.testing.assert_array_equal, back.params, lm.params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(load(target).params)} == {"float32"}


def test_several_files_and_an_index(tmp_path: Path) -> None:
    target = load(GPT2, stacked=True).export(tmp_path / "model", max_file_bytes=20_000)
    index = json.loads((target / INDEX).read_text())
    expected = load_file(GPT2 / "model.safetensors")
    assert set(index["weight_map"]) == set(expected)
    assert index["metadata"] == {"total_size": sum(values.nbytes for values in expected.values())}
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 3
    for file in files:
        tensors = load_file(target / file)
        assert sum(values.nbytes for values in tensors.values()) <= 20_000 or len(tensors) == 1
        for name, values in tensors.items():
            assert index["weight_map"][name] == file
            np.testing.assert_array_equal(values, expected[name])
    jax.tree.map(np.testing.assert_array_equal, load(target).params, load(GPT2).params)


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    target = load(GPT2).export(tmp_path / "model")
    with safe_open(target / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    # Tensors begin at multiples of their size.
    raw = (target / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert all(e["data_offsets"][0] % 4 == 0 for name, e in header.items() if name != "__metadata__")
    assert int.from_bytes(raw[:8], "little") % 8 == 0


def test_names_get_the_prefix_a_file_lacks(tmp_path: Path) -> None:
    bare = Path(shutil.copytree(GPT2, tmp_path / "bare"))
    tensors = load_file(GPT2 / "model.safetensors")
    save_file({name.removeprefix("transformer."): v for name, v in tensors.items()}, bare / "model.safetensors")
    assert_same(GPT2, load(bare).export(tmp_path / "model"))


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tied_and_untied_unembeddings(family: str, is_tied: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    source = Path(shutil.copytree(DIRECTORIES[family], tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    if not is_tied:
        tensors["lm_head.weight"] = rng.standard_normal((260, 24), np.float32)
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(config_of(source) | {"tie_word_embeddings": is_tied}))
    lm = load(source)
    head = tensors.get("lm_head.weight", np.asarray(lm.W_E))
    np.testing.assert_array_equal(lm.W_U, head.T)
    assert_same(source, lm.export(tmp_path / "model"))
    # A tied model may hold its embedding twice; it is written once.
    if is_tied:
        save_file(tensors | {"lm_head.weight": head}, source / "model.safetensors")
        target = load(source).export(tmp_path / "again")
        assert "lm_head.weight" not in load_file(target / "model.safetensors")


def test_a_gguf_file_becomes_a_directory(tmp_path: Path) -> None:
    tensors = load_file(LLAMA / "model.safetensors")
    lm = load(write_llama(tmp_path / "tiny.gguf", config_of(LLAMA), tensors))
    target = lm.export(tmp_path / "model")
    written = load_file(target / "model.safetensors")
    assert set(written) == set(tensors)
    for name, values in tensors.items():
        np.testing.assert_array_equal(written[name], values)
    again = load(target)
    assert again.config == lm.config
    assert again.tokenizer is not None
    assert lm.tokenizer is not None
    assert again.tokenizer.encode("the tea, the hat") == lm.tokenizer.encode("the tea, the hat")
    assert (again.tokenizer.bos_id, again.tokenizer.eos_id) == (lm.tokenizer.bos_id, lm.tokenizer.eos_id)


def test_changed_parameters_are_what_is_written(tmp_path: Path) -> None:
    lm = load(GPT2)
    doubled = dataclasses.replace(lm, params=jax.tree.map(lambda leaf: leaf * 2, lm.params))
    written = load_file(doubled.export(tmp_path / "model") / "model.safetensors")
    for name, values in load_file(GPT2 / "model.safetensors").items():
        np.testing.assert_array_equal(written[name], 2 * values)


# -- whole or not at all


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    lm = load(GPT2)
    target = lm.export(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(InvalidInputError) as caught:
        load(LLAMA).export(target)
    assert str(caught.value).startswith(f"A model directory is there already in export({str(target)!r}).")
    assert "Fix: pass overwrite=True, or choose another directory." in str(caught.value)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    load(LLAMA).export(target, overwrite=True)
    assert_same(LLAMA, target)
    assert nothing_hidden(tmp_path)


def test_directories_that_are_no_models_are_never_replaced(tmp_path: Path) -> None:
    lm = load(GPT2)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    (tmp_path / "file").write_text("x")
    for name, what in {"notes": "A directory with other files", "file": "A file"}.items():
        with pytest.raises(InvalidInputError, match=f"{what} is there already"):
            lm.export(tmp_path / name, overwrite=True)
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear diary"
    (tmp_path / "empty").mkdir()
    assert_same(GPT2, lm.export(tmp_path / "empty"))


@pytest.mark.parametrize("is_new", [True, False])
def test_a_full_disk_loses_nothing(is_new: bool, tmp_path: Path) -> None:
    target = tmp_path / "model"
    if not is_new:
        load(GPT2).export(target)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    lm = load(LLAMA)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))  # no file beyond, as if the disk were full
    try:
        with pytest.raises(ExportError) as caught:
            lm.export(target, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value).startswith(f"Cannot write the model ([Errno {errno.EFBIG}] File too large) in {target}.")
    assert "Fix: free some space or choose another directory; nothing there has changed." in str(caught.value)
    assert nothing_hidden(tmp_path)
    if is_new:
        assert not target.exists()
    else:
        assert_same(GPT2, target)


def test_room_is_looked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(ExportError, match=r"0 MB to write, 0 MB free"):
        load(GPT2).export(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_a_stop_between_the_renames_puts_the_old_one_back(
    kind: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = load(GPT2).export(tmp_path / "model")
    rename = Path.rename

    def stopped(self: Path, to: Path) -> Path:
        if "-part-" in self.name:
            raise kind("stopped")
        return rename(self, to)

    monkeypatch.setattr(writing.Path, "rename", stopped)
    with pytest.raises(ExportError if kind is OSError else kind):
        load(LLAMA).export(target, overwrite=True)
    assert_same(GPT2, target)
    assert nothing_hidden(tmp_path)


# -- mistakes


def test_parameters_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    lm = load(GPT2)
    params = jax.tree.map(lambda leaf: leaf, lm.params)
    params["transformer"]["wte"]["embedding"] = params["transformer"]["wte"]["embedding"][:100]
    del params["transformer"]["ln_f"]["bias"]
    params["transformer"]["extra"] = jnp.ones(3)
    params["transformer"]["wpe"]["embedding"] = jnp.ones((48, 24), jnp.complex64)
    with pytest.raises(ShapeError) as caught:
        dataclasses.replace(lm, params=params).export(tmp_path / "model")
    words = str(caught.value)
    assert "['transformer']['wte']['embedding'] has shape [100, 24], expected [260, 24]" in words
    assert "['transformer']['ln_f']['bias'] is missing" in words
    assert "['transformer']['extra'] is not known" in words
    assert "['transformer']['wpe']['embedding'] has dtype complex64" in words
    assert "Fix: give back the names and shapes `load` gave" in words
    assert list(tmp_path.iterdir()) == []


def test_donated_parameters(tmp_path: Path) -> None:
    lm = load(GPT2)
    lm.stacked(donate=True)
    with pytest.raises(ShapeError, match=r"\['h'\]\['2'\]\['mlp'\]\['c_proj'\]\['kernel'\] was deleted"):
        lm.export(tmp_path / "model")


def test_models_that_do_not_come_from_files(tmp_path: Path) -> None:
    toy = LanguageModel(Upstream("toy", lambda params, tokens: params), params={}, name="toy")
    with pytest.raises(UnsupportedModelError, match="toy has no layout of its parameters in export"):
        toy.export(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=r"tiny_gpt2 has no config\.json in export"):
        dataclasses.replace(load(GPT2), config_json=None).export(tmp_path / "model")


@pytest.mark.parametrize("n", [0, -1, 1.5, True])
def test_sizes_that_are_none(n: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"max_file_bytes=.* was given in export"):
        load(GPT2).export(tmp_path / "model", max_file_bytes=n)


def test_layouts_that_copy_or_do_not_cover() -> None:
    params = {"a": np.ones((2, 3), np.float32)}
    copying = {"a": Stored("w", (3, 2), view=lambda tensor: tensor.T.copy())}
    with pytest.raises(UnsupportedModelError, match="The view of 'w' makes a copy in export"):
        export.tensors_of(copying, params)["w"]
    partial = {"a": Stored("w", (4, 3), view=lambda tensor: tensor[::2])}
    with pytest.raises(UnsupportedModelError, match="make up 6 of the 12 values of 'w' in export"):
        export.tensors_of(partial, params)["w"]


def test_a_parameter_that_is_several_tensors_of_each_layer(rng: np.random.Generator) -> None:
    param = rng.standard_normal((4, 2, 3, 5), np.float32)
    layout = {"kv": Stored("h.{}.{part}", (5, 3), layers=range(4), parts=("k", "v"), view=turned)}
    for params in ({"kv": param}, {"kv": jax.device_put(param, jax.devices()[1])}):
        tensors = export.tensors_of(layout, params)
        assert set(tensors) == {f"h.{i}.{part}" for i in range(4) for part in "kv"}
        np.testing.assert_array_equal(tensors["h.2.v"], param[2, 1].T)
    checkpoint = Checkpoint("gpt2", {}, tensors, tokenizer=None, source="memory")
    with checkpoint.intake() as intake:
        np.testing.assert_array_equal(read(layout, intake, dtype=np.float32)["kv"], param)


def test_tensors_that_several_parameters_share() -> None:
    parts = {"a": np.full((2, 3), 1, np.float32), "b": np.full((2, 3), 2, np.float32)}
    layout = {
        name: Stored("w", (4, 3), view=lambda tensor, i=i: tensor.reshape(2, 2, 3)[:, i]) for i, name in enumerate("ab")
    }
    values = export.tensors_of(layout, parts)["w"]
    assert values.shape == (4, 3)
    np.testing.assert_array_equal(values[:, 0], [1, 2, 1, 2])
