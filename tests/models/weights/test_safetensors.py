"""Hugging Face directories: single and sharded files read alike; missing, extra and damaged files in words.

Source: interp_jax.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from interp_jax.core.errors import LoadError, UnsupportedModelError
from interp_jax.models.weights.safetensors import read_checkpoint
from tests.models.weights.gguf_files import ORACLES, TINY_LLAMA

TENSORS = load_file(TINY_LLAMA / "model.safetensors")
INDEX = "model.safetensors.index.json"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of the tiny Llama to damage."""
    return Path(shutil.copytree(TINY_LLAMA, tmp_path / "model"))


@pytest.fixture
def sharded(directory: Path) -> Path:
    """The same with its weights in three files."""
    (directory / "model.safetensors").unlink()
    names = sorted(TENSORS)
    weight_map = {name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: TENSORS[name] for name in names if weight_map[name] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def refusal(directory: Path, kind: type[Exception] = LoadError) -> str:
    with pytest.raises(kind) as caught:
        read_checkpoint(directory)
    assert str(directory) in str(caught.value)
    assert "\n  Fix: " in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_a_directory_is_read_as_it_is(name: str):
    directory = ORACLES / name
    checkpoint = read_checkpoint(directory)
    assert checkpoint.family == name.removeprefix("tiny_")
    assert checkpoint.config == json.loads((directory / "config.json").read_text())
    assert checkpoint.source == str(directory)
    assert checkpoint.tokenizer is not None
    assert (checkpoint.tokenizer.d_vocab, checkpoint.tokenizer.eos_id) == (260, 259)
    expected = load_file(directory / "model.safetensors")
    assert set(checkpoint.tensors) == set(expected)
    for tensor, values in expected.items():
        assert checkpoint.tensors.shape(tensor) == values.shape
        assert checkpoint.tensors.dtype(tensor) == values.dtype
        np.testing.assert_array_equal(checkpoint.tensors[tensor], values)


def test_several_files_are_one(sharded: Path):
    tensors = read_checkpoint(sharded).tensors
    assert set(tensors) == set(TENSORS)
    for name, values in TENSORS.items():
        np.testing.assert_array_equal(tensors[name], values)


def test_a_directory_without_a_tokenizer(directory: Path):
    (directory / "tokenizer.json").unlink()
    assert read_checkpoint(directory).tokenizer is None


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.int32, np.bool_])
def test_types_of_values(directory: Path, dtype: type):
    values = np.arange(6).reshape(2, 3).astype(dtype)
    save_file({"x": values, "scalar": np.array(1, dtype)}, directory / "model.safetensors")
    tensors = read_checkpoint(directory).tensors
    assert tensors.dtype("x") == tensors["x"].dtype == dtype
    assert tensors.shape("scalar") == ()
    np.testing.assert_array_equal(tensors["x"], values)


def test_types_numpy_has_no_name_for(directory: Path):
    save_file({"x": np.ones(4, ml_dtypes.float8_e4m3fn)}, directory / "model.safetensors")
    words = refusal(directory, UnsupportedModelError)
    assert "Tensors of an unknown dtype: x (F8_E4M3) in " in words
    assert "Known: F64, F32, F16, BF16" in words


@pytest.mark.parametrize("length", [0, 5, 8, 100, -1])
def test_a_truncated_file(directory: Path, length: int):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    words = refusal(directory)
    assert words.startswith("Damaged weight file model.safetensors (")
    assert "Expected: complete safetensors files." in words
    assert "Fix: download the file again and compare its size." in words


def test_a_truncated_file_among_several(sharded: Path):
    path = sharded / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert refusal(sharded).startswith("Damaged weight file model-00002-of-00003.safetensors (")


def test_all_truncated_files_are_named(sharded: Path):
    for i in (1, 3):
        path = sharded / f"model-0000{i}-of-00003.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
    words = refusal(sharded)
    assert words.startswith("Damaged weight file model-00001-of-00003.safetensors (")
    assert ", model-00003-of-00003.safetensors (" in words


def test_a_pointer_in_place_of_the_file(directory: Path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 100\n"
    (directory / "model.safetensors").write_text(pointer)
    words = refusal(directory)
    assert "Damaged weight file model.safetensors (a Git LFS pointer in place of the file)" in words
    assert "Fix: run `git lfs pull`." in words


def test_missing_files_of_several_are_all_named(sharded: Path):
    (sharded / "model-00001-of-00003.safetensors").unlink()
    (sharded / "model-00003-of-00003.safetensors").unlink()
    words = refusal(sharded)
    assert "model-00001-of-00003.safetensors" in words
    assert "model-00003-of-00003.safetensors" in words
    assert "(2 of 3)" in words
    assert f"Expected: each file that {INDEX} names." in words


def test_an_index_that_contradicts_the_files(sharded: Path):
    path = sharded / "model-00001-of-00003.safetensors"
    save_file({"stranger": np.ones(1, np.float32)}, path)
    words = refusal(sharded)
    assert f"Weight file {path.name} that does not hold what {INDEX} says (missing: lm_head.weight, " in words
    assert "not in the index: stranger)" in words


def test_an_index_that_names_tensors_there_are_not(sharded: Path):
    index = json.loads((sharded / INDEX).read_text())
    for i in (1, 2):
        index["weight_map"][f"model.layers.9{i}.w"] = f"model-0000{i}-of-00003.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    words = refusal(sharded)
    for i in (1, 2):
        assert f"model-0000{i}-of-00003.safetensors that does not hold what {INDEX} says" in words
        assert f"(missing: model.layers.9{i}.w; not in the index: none)" in words


def test_parts_without_their_index(sharded: Path):
    (sharded / INDEX).unlink()
    assert refusal(sharded).startswith(f"Missing weight files {INDEX} in {sharded}.\n")
    (sharded / "model-00002-of-00003.safetensors").unlink()
    words = refusal(sharded)
    assert words.startswith(f"Missing weight files {INDEX}, model-00002-of-00003.safetensors in {sharded}.\n")
    assert "Fix: download the missing files" in words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "without weight_map in"),
        ("{", "Damaged"),
        ("[]", "holds a list"),
        ('{"weight_map": ["a"]}', "without weight_map from tensors to files"),
        ('{"weight_map": {"a": 3}}', "without weight_map from tensors to files"),
    ],
)
def test_a_damaged_index(sharded: Path, text: str, words: str):
    (sharded / INDEX).write_text(text)
    assert words in refusal(sharded)


def test_no_weights_at_all(directory: Path):
    (directory / "model.safetensors").unlink()
    words = refusal(directory)
    assert words.startswith("No file of weights in ")
    assert "beside config.json; there is config.json, tokenizer.json." in words
    assert "Fix: download the weights, for example with `hf download <model> --local-dir <directory>`." in words


def test_weights_under_a_misspelt_name(directory: Path):
    (directory / "model.safetensors").rename(directory / "models.safetensors")
    assert "No file of weights (is 'models.safetensors' meant to be 'model.safetensors'?) in " in refusal(directory)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "flax_model.msgpack"])
def test_weights_in_another_format(directory: Path, file: str):
    (directory / "model.safetensors").rename(directory / file)
    words = refusal(directory, UnsupportedModelError)
    assert f"Weights in {file} in " in words
    assert "save_pretrained(directory)" in words


def test_no_config(directory: Path):
    (directory / "config.json").unlink()
    assert refusal(directory).startswith(f"No config.json in {directory}.")


@pytest.mark.parametrize("text", ["", "{", "[1]", '"llama"'])
def test_a_damaged_config(directory: Path, text: str):
    (directory / "config.json").write_text(text)
    assert refusal(directory).startswith("Damaged config.json (")


def test_a_config_without_a_family(directory: Path):
    (directory / "config.json").write_text('{"hidden_size": 3}')
    assert refusal(directory).startswith("A config.json without model_type in ")
