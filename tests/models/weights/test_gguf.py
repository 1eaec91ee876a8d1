"""GGUF files: read as the `gguf` package and llama.cpp's converter mean them, and refused when damaged.

Source: interp_jax.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st

from interp_jax.core.errors import InterpError, LoadError, UnsupportedModelError
from interp_jax.models.weights import gguf, safetensors
from interp_jax.models.weights.gguf_file import dequantised, open_file
from interp_jax.patches import rotary
from tests.models.weights.gguf_files import TINY_LLAMA, write_llama

CONFIG: dict[str, Any] = json.loads((TINY_LLAMA / "config.json").read_text())
TENSORS = dict(safetensors.read_checkpoint(TINY_LLAMA).tensors)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf", CONFIG, TENSORS)


def test_names_and_layout_are_hugging_faces(tiny: Path):
    tensors = gguf.read_checkpoint(tiny).tensors
    assert set(tensors) == set(TENSORS)
    for name, values in TENSORS.items():
        assert tensors.shape(name) == values.shape
        assert tensors[name].dtype == tensors.dtype(name) == np.float32
        np.testing.assert_array_equal(tensors[name], values, err_msg=name)
        assert tensors[name].flags.writeable  # a copy, not the mapped file


def test_the_rows_of_q_and_k_are_stored_in_another_order(tiny: Path):
    # Otherwise the test above could not see whether the order is undone.
    for stored, name in {"blk.0.attn_q.weight": "q_proj", "blk.0.attn_k.weight": "k_proj"}.items():
        ours = TENSORS[f"model.layers.0.self_attn.{name}.weight"]
        assert not np.array_equal(open_file(tiny).tensor(stored), ours)
        np.testing.assert_array_equal(np.sort(open_file(tiny).tensor(stored), 0), np.sort(ours, 0))


def test_header_becomes_the_configuration(tiny: Path):
    checkpoint = gguf.read_checkpoint(tiny)
    assert checkpoint.family == "llama"
    assert checkpoint.source == str(tiny)
    config = dict(checkpoint.config)
    assert {config.pop("bos_token_id"), config.pop("eos_token_id")} == {None}
    assert config == {key: CONFIG[key] for key in config}  # 1e-06 and 100000.0 exactly, though stored as float32
    assert set(CONFIG) - set(config) <= {
        *("architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "initializer_range"),
        *("pretraining_tp", "rope_scaling", "transformers_version", "use_cache"),
    }


def test_a_tied_unembedding_and_defaults(tmp_path: Path):
    left_out = ("output.weight", "llama.rope.freq_base", "llama.attention.head_count_kv", "llama.vocab_size")
    config = CONFIG | {"num_key_value_heads": 4}
    checkpoint = gguf.read_checkpoint(write_llama(tmp_path / "tied.gguf", config, TENSORS, without=left_out))
    assert checkpoint.config["tie_word_embeddings"] is True
    assert checkpoint.config["rope_theta"] == 10000.0
    assert checkpoint.config["num_key_value_heads"] == 4
    assert checkpoint.config["vocab_size"] == 260


def test_rope_scaling_is_passed_on(tmp_path: Path):
    more = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    checkpoint = gguf.read_checkpoint(write_llama(tmp_path / "scaled.gguf", CONFIG, TENSORS, more=more))
    assert checkpoint.config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    none = write_llama(tmp_path / "none.gguf", CONFIG, TENSORS, more={"llama.rope.scaling.type": "none"})
    assert "rope_scaling" not in gguf.read_checkpoint(none).config


def factors(theta: float, d_head: int, factor: float, *, old: float = 8192.0) -> np.ndarray:
    """What llama.cpp's converter divides frequencies by, one at a time."""
    found = []
    for i in range(d_head // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / d_head)
        share = (old / wavelength - 1) / 3
        found.append(
            1.0 if wavelength < old / 4 else factor if wavelength > old else 1 / ((1 - share) / factor + share)
        )
    return np.array(found, np.float32)


@pytest.mark.parametrize(("theta", "d_head", "factor"), [(500000.0, 64, 32.0), (500000.0, 128, 8.0)])
def test_factors_of_frequencies_become_llama3s_scaling(theta: float, d_head: int, factor: float):
    given = factors(theta, d_head, factor)
    assert len(set(given.tolist())) > 3
    scaling = gguf.llama3_scaling(given, theta, d_head, source="x.gguf")
    assert scaling == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain, scaled = rotary.rotary_frequencies(theta, d_head), rotary.scaled_frequencies(theta, d_head, scaling, n_ctx=1)
    np.testing.assert_allclose(scaled, plain / np.tile(given, 2), rtol=1e-5)
    for other in (factors(theta, d_head, factor, old=4096.0), given[:-1]):
        with pytest.raises(UnsupportedModelError, match=r"Factors of rotary frequencies .* not Llama 3's.* in x\.gguf"):
            gguf.llama3_scaling(other, theta, d_head, source="x.gguf")


def test_factors_in_a_file(tmp_path: Path):
    config = CONFIG | {"rope_theta": 500000.0}
    extra = {"rope_freqs.weight": factors(500000.0, 6, 8.0)}
    checkpoint = gguf.read_checkpoint(write_llama(tmp_path / "l3.gguf", config, TENSORS | extra))
    assert checkpoint.config["rope_scaling"]["factor"] == 8.0
    assert set(checkpoint.tensors) == set(TENSORS)
    ones = {"rope_freqs.weight": np.ones(3, np.float32)}
    assert (
        gguf.read_checkpoint(write_llama(tmp_path / "l2.gguf", config, TENSORS | ones)).config["rope_scaling"] is None
    )


def test_header_and_tensors_are_what_the_gguf_package_reads(tiny: Path):
    theirs, ours = GGUFReader(tiny), open_file(tiny)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert set(fields) == set(ours.metadata)
    for name, value in fields.items():
        assert ours.metadata[name] == (float(np.float32(value).astype(str)) if isinstance(value, float) else value)
    assert [tensor.name for tensor in theirs.tensors] == list(ours.entries)
    for tensor in theirs.tensors:
        entry = ours.entries[tensor.name]
        assert (entry.start, entry.n_bytes, entry.kind) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)
        assert entry.shape == tuple(reversed(tensor.shape.tolist()))
        np.testing.assert_array_equal(ours.tensor(tensor.name), tensor.data)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.F16, Kind.BF16])
def test_dequantised_values_are_those_of_the_gguf_package(kind: Kind, rng: np.random.Generator):
    values = rng.standard_normal((700, 96), np.float32)  # several chunks, the last one not full
    stored = quantize(values, kind)
    ours = dequantised(np.frombuffer(stored.tobytes(), np.uint8), kind, values.shape)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, dequantize(stored, kind))
    assert np.abs(ours - values).max() < 0.5  # and near what was stored


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_XS])
def test_super_blocks_are_dequantised_as_the_gguf_package_does(kind: Kind, rng: np.random.Generator):
    # The package cannot write these: any bytes are a tensor, and both must read the same from them.
    size, n_bytes = GGML_QUANT_SIZES[kind]
    stored = rng.integers(0, 256, (300, 2 * n_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        ours, theirs = dequantised(stored.ravel(), kind, (300, 2 * size)), dequantize(stored, kind)
    np.testing.assert_array_equal(ours, theirs)


def test_a_storage_type_the_package_cannot_dequantise():
    with pytest.raises(UnsupportedModelError) as caught:
        dequantised(np.zeros(GGML_QUANT_SIZES[Kind.Q8_K][1], np.uint8), Kind.Q8_K, (1, 256))
    assert "Values stored as Q8_K in a GGUF file" in str(caught.value)
    assert "Fix: update `gguf`, or use a file of another quantisation" in str(caught.value)


# -- damaged files


def damaged(tiny: Path, directory: Path, change: Callable[[bytes], bytes]) -> Path:
    path = directory / "damaged.gguf"
    path.write_bytes(change(tiny.read_bytes()))
    return path


def test_every_truncated_file_is_refused(tiny: Path, tmp_path: Path, rng: np.random.Generator):
    size = tiny.stat().st_size
    for length in [0, 3, 4, 23, 24, size - 1, *rng.integers(0, size, 60).tolist()]:
        path = damaged(tiny, tmp_path, lambda data, length=length: data[:length])
        with pytest.raises(LoadError) as caught:
            gguf.read_checkpoint(path)
        assert f"in {path}" in str(caught.value)
        assert "Not a whole GGUF file: it " in str(caught.value)
        assert "Fix: download the file again and compare its size and checksum." in str(caught.value)


def test_where_a_truncated_file_ends_is_said(tiny: Path, tmp_path: Path):
    size = tiny.stat().st_size
    path = damaged(tiny, tmp_path, lambda data: data[:-1])
    with pytest.raises(LoadError, match=rf"it ends after {size - 1:,} bytes, but tensor '.*' reaches to byte {size:,}"):
        gguf.read_checkpoint(path)
    path = damaged(tiny, tmp_path, lambda data: data[:200])
    with pytest.raises(LoadError, match="it ends after 200 bytes, in the middle of its header"):
        gguf.read_checkpoint(path)


@pytest.mark.parametrize(
    ("start", "new", "words"),
    [
        (0, b"GGML", "it begins with b'GGML', not with b'GGUF'"),
        (4, (1).to_bytes(4, "little"), "its version is 1"),
        (4, (3).to_bytes(4, "big"), "it is big-endian"),
        (32, b"\xff\xfe", "is not UTF-8"),
        (8, (2**60).to_bytes(8, "little"), "it ends after"),
    ],
)
def test_a_damaged_header_is_named(tiny: Path, tmp_path: Path, start: int, new: bytes, words: str):
    path = damaged(tiny, tmp_path, lambda data: data[:start] + new + data[start + len(new) :])
    with pytest.raises(LoadError) as caught:
        gguf.read_checkpoint(path)
    assert words in str(caught.value)
    assert "Expected: a complete GGUF file, version 2 or 3, little-endian." in str(caught.value)


@given(data=st.data())
def test_a_byte_changed_in_the_header_never_gives_another_kind_of_error(
    data: st.DataObject, tiny: Path, tmp_path_factory: pytest.TempPathFactory
):
    whole = bytearray(tiny.read_bytes())
    n_header = min(entry.start for entry in open_file(tiny).entries.values())
    n_changes = data.draw(st.integers(1, 3))
    for _ in range(n_changes):
        # Half of them in the first part, where the numbers are; the vocabulary is most of the header.
        limit = data.draw(st.sampled_from([900, n_header]))
        whole[data.draw(st.integers(0, limit - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(whole)
    with contextlib.suppress(InterpError):
        gguf.read_checkpoint(path)


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(LoadError) as caught:
        gguf.read_checkpoint(tmp_path / "none.gguf")
    assert str(caught.value).startswith(f"No such file 'none.gguf' in {tmp_path}.")


# -- whole files we do not understand


def refusal(path: Path) -> str:
    with pytest.raises((LoadError, UnsupportedModelError)) as caught:
        gguf.read_checkpoint(path)
    assert "  Fix: " in str(caught.value)
    return str(caught.value)


def test_another_architecture(tmp_path: Path):
    path = write_llama(tmp_path / "m.gguf", CONFIG, TENSORS, architecture="qwen2")
    assert "Architecture 'qwen2' (general.architecture)" in refusal(path)


def test_header_keys_nobody_understands(tmp_path: Path):
    more = {"llama.logit_scale": 2.0, "llama.attention.sliding_window": 4096, "llama.expert_count": 0}
    words = refusal(write_llama(tmp_path / "m.gguf", CONFIG, TENSORS, more=more))
    assert "not understood: llama.logit_scale=2.0, llama.attention.sliding_window=4096 in" in words
    assert "expert_count" not in words.splitlines()[0]
    per_layer = write_llama(tmp_path / "l.gguf", CONFIG, TENSORS, more={"llama.attention.head_count_kv": [2, 4, 2]})
    assert "llama.attention.head_count_kv=[2, 4, 2]" in refusal(per_layer)


def test_header_keys_that_are_missing(tmp_path: Path):
    without = ("llama.embedding_length", "llama.attention.layer_norm_rms_epsilon", "token_embd.weight")
    words = refusal(write_llama(tmp_path / "m.gguf", CONFIG, TENSORS, without=without))
    assert "A llama file without llama.embedding_length" in words
    assert "llama.attention.layer_norm_rms_epsilon" in words
    assert "token_embd.weight" in words


def test_header_keys_that_contradict_each_other(tmp_path: Path):
    more = {"llama.vocab_size": 261, "llama.rope.dimension_count": 4}
    words = refusal(write_llama(tmp_path / "m.gguf", CONFIG, TENSORS, more=more))
    assert "llama.vocab_size=261 (not 260), llama.rope.dimension_count=4 (not 6)" in words


@pytest.mark.parametrize("n_heads", [0, 5, 24])
def test_rows_that_make_no_whole_heads(tmp_path: Path, n_heads: int):
    more = {"llama.attention.head_count": n_heads, "llama.rope.dimension_count": 24 // max(1, n_heads)}
    words = refusal(write_llama(tmp_path / "m.gguf", CONFIG, TENSORS, more=more))
    assert f"Tensor 'blk.0.attn_q.weight' of shape (24, 24) for {n_heads} heads in " in words


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("general.alignment", 0, "its alignment is 0"),
        ("general.alignment", "x", "its alignment is 'x'"),
        ("llama.block_count", "x", "not understood: llama.block_count='x'"),
        ("tokenizer.ggml.pre", 3, "Unknown pre-tokenizer 3"),
        ("tokenizer.ggml.bos_token_id", 260, "Damaged tokenizer.ggml.bos_token_id (260)"),
        ("tokenizer.ggml.eos_token_id", "x", "Damaged tokenizer.ggml.eos_token_id ('x')"),
    ],
)
def test_values_of_the_wrong_kind(tmp_path: Path, key: str, value: Any, words: str):
    assert words in refusal(write_llama(tmp_path / "m.gguf", CONFIG, TENSORS, more={key: value}))


def test_tensors_nobody_understands_keep_their_name_and_are_left_over(tmp_path: Path):
    extra = {"strange.weight": np.ones(3, np.float32)}
    checkpoint = gguf.read_checkpoint(write_llama(tmp_path / "m.gguf", CONFIG, TENSORS | extra))
    intake = checkpoint.intake()
    for name, values in TENSORS.items():
        intake.take(name, values.shape)
    with pytest.raises(LoadError, match=r"left over \(1\): strange.weight"):
        intake.finish()
