"""Results on disk: what comes back, what cannot be saved, and what is left behind when saving fails.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from interp_jax.core import results
from interp_jax.core.activations import Activations
from interp_jax.core.errors import InvalidInputError, LoadError
from interp_jax.core.interventions import Added, Masked
from interp_jax.core.provenance import provenance
from interp_jax.core.results import load_result, save_result
from interp_jax.core.sites import Site


@dataclasses.dataclass(frozen=True)
class Config:
    layer: int
    scale: float
    names: tuple[str, ...]


class Pair(NamedTuple):
    left: float
    right: Any


@pytest.fixture(scope="module", autouse=True)
def _git_is_asked_once() -> Iterator[None]:
    """Property tests save hundreds of results; each would ask git six times."""
    record = provenance()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "provenance", lambda **given: record | given)
        yield


def round_trip(result: Any, root: Path, **more: Any) -> results.SavedResult:
    return load_result(save_result(result, name="test", root=root, **more))


def test_where_it_goes(tmp_path: Path) -> None:
    path = save_result({"effect": 1.0}, name="zeroing", config=Config(5, 0.5, ("a",)), root=tmp_path)
    assert path.parent == tmp_path / "zeroing"
    assert path.stem.split("_")[0].replace("-", "").isdigit()
    assert sorted(entry.name for entry in path.iterdir()) == ["config.json", "provenance.json", "result.json"]
    assert json.loads((path / "config.json").read_text()) == {"layer": 5, "scale": 0.5, "names": ["a"]}


def test_the_hash_is_that_of_the_configuration(tmp_path: Path) -> None:
    paths = [save_result(i, name="test", config={"a": a}, root=tmp_path) for i, a in enumerate([1, 1, 2])]
    hashes = [path.name.split("_")[1].split("-")[0] for path in paths]
    assert hashes[0] == hashes[1] != hashes[2]


def test_results_of_one_second_do_not_collide(tmp_path: Path) -> None:
    paths = [save_result({"number": number}, name="test", root=tmp_path) for number in range(5)]
    assert len(set(paths)) == 5
    assert [load_result(path).result["number"] for path in paths] == list(range(5))


plain = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5)
keys = st.sampled_from(["a", "b", "$a", "$array", "$float", "$masked", "a/b", "file", "", "é"])
arrays = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.int32, np.bool_, np.complex64]),
    hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3),
)
nests = st.recursive(
    plain | arrays, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)
)


@given(nests)
def test_plain_data_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, nest: Any) -> None:
    assert_same(round_trip(nest, tmp_path_factory.mktemp("runs")).result, nest)


def assert_same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, np.ndarray):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for name in left:
            assert_same(left[name], right[name])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert left == right


def test_numbers_json_does_not_have(tmp_path: Path) -> None:
    saved = round_trip([float("inf"), float("-inf"), float("nan"), np.float32("nan")], tmp_path)
    assert saved.result[:2] == [float("inf"), float("-inf")]
    assert np.isnan(saved.result[2])
    assert np.isnan(saved.result[3])
    for file in saved.path.glob("*.json"):
        json.loads(file.read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int4", "float16", "uint8"])
def test_every_dtype_of_jax(tmp_path: Path, dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    loaded = round_trip({"x": jnp.asarray(array)}, tmp_path).result["x"]
    assert loaded.dtype == array.dtype
    assert loaded.tobytes() == array.tobytes()


def test_nouns_of_this_package(tmp_path: Path) -> None:
    activations = Activations({Site(None, "embed"): jnp.ones(2), Site(3, "mlp_out"): jnp.zeros((2, 2))})
    saved = round_trip(
        {"pair": Pair(1.0, Site(3, "q")), "activations": activations, "path": tmp_path, "layers": range(3)}, tmp_path
    )
    assert saved.result["pair"] == {"left": 1.0, "right": "3.q"}
    assert list(saved.result["activations"]) == ["embed", "3.mlp_out"]
    assert saved.result["path"] == str(tmp_path)
    assert saved.result["layers"] == [0, 1, 2]


def test_interventions_come_back_ready_to_use(tmp_path: Path) -> None:
    mask = np.array([True, False])
    interventions = {Site(5, "mlp_out"): Masked(0.0, mask), "6.q": jnp.ones(2), "7.q": Added(np.arange(3.0), 2.5)}
    saved = round_trip(None, tmp_path, interventions=interventions)
    assert list(saved.interventions) == ["5.mlp_out", "6.q", "7.q"]
    masked = saved.interventions["5.mlp_out"]
    assert isinstance(masked, Masked)
    added = saved.interventions["7.q"]
    assert isinstance(added, Added) and added.coefficient == 2.5
    np.testing.assert_array_equal(added.value, np.arange(3.0))
    assert masked.value == 0.0
    np.testing.assert_array_equal(masked.mask, mask)
    assert round_trip(None, tmp_path).interventions is None


def test_figures(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    axes.plot([1, 2])
    path = save_result(
        {}, name="test", figures={"lens.png": figure, "lens.html": "<p>é</p>", "raw.bin": b"\0\1"}, root=tmp_path
    )
    plt.close(figure)
    assert (path / "lens.png").read_bytes().startswith(b"\x89PNG")
    assert (path / "lens.html").read_text(encoding="utf-8") == "<p>é</p>"
    assert (path / "raw.bin").read_bytes() == b"\0\1"


def test_provenance_of_a_saved_result(tmp_path: Path) -> None:
    saved = round_trip({}, tmp_path, seeds={"prompts": 3}, patch_digests={"transformers_llama": {"forward": "ab"}})
    assert saved.provenance["seeds"] == {"prompts": 3}
    assert saved.provenance["patch_digests"] == {"transformers_llama": {"forward": "ab"}}
    assert saved.provenance["versions"]["jax"] == jax.__version__
    assert saved.provenance["name"] == "test"


def test_a_saved_result_prints_shapes_of_large_arrays(tmp_path: Path) -> None:
    text = repr(round_trip({"big": np.zeros((30, 4), np.float32), "small": 1.5}, tmp_path, config={"layer": 5}))
    assert "config: {'layer': 5}" in text
    assert "big: float32[30, 4]" in text
    assert "small: 1.5" in text


def unsavable(result: Any, root: Path) -> str:
    with pytest.raises(InvalidInputError) as error:
        save_result(result, name="test", root=root)
    assert leftovers(root) == []
    return str(error.value)


def leftovers(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file() or path.name.startswith(".")]


def test_a_function_cannot_be_saved(tmp_path: Path) -> None:
    text = unsavable({"a": [1, {"metric": len}]}, tmp_path)
    assert text.startswith("A value of type builtin_function_or_method was given in save_result, at result/a/1/metric.")
    assert "Fix: save what it was made of: the numbers behind a function, the seed behind a PRNG key." in text


@pytest.mark.parametrize(
    "value", [{1, 2}, b"bytes", np.array([object()]), 1j], ids=["set", "bytes", "object", "complex"]
)
def test_other_values_that_cannot_be_saved(tmp_path: Path, value: Any) -> None:
    assert f"A value of type {type(value).__name__} was given" in unsavable(value, tmp_path)


def test_a_prng_key_cannot_be_saved(tmp_path: Path, key: jax.Array) -> None:
    assert "the seed behind a PRNG key" in unsavable({"key": key}, tmp_path)


@pytest.mark.parametrize("keys", [[1], ["q", (1, 2)], [Site(0, "q"), "0.q"]], ids=str)
def test_mappings_need_distinct_string_keys(tmp_path: Path, keys: list) -> None:
    text = unsavable({"a": dict.fromkeys(keys, 1)}, tmp_path)
    assert "A mapping with the keys [" in text
    assert "at result/a." in text


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".hidden", "-flag", "a b", "é", "a\n"])
def test_names_that_are_no_plain_file_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInputError) as error:
        save_result({}, name=name, root=tmp_path)
    assert f"The name {name!r} was given in save_result." in str(error.value)
    with pytest.raises(InvalidInputError):
        save_result({}, name="test", figures={name: "text"}, root=tmp_path)
    assert leftovers(tmp_path) == []


def test_a_figure_does_not_overwrite_the_result(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"and none of config\.json, result\.json"):
        save_result({}, name="test", figures={"result.json": "text"}, root=tmp_path)


def test_a_figure_of_no_known_kind(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="A figure of type int was given"):
        save_result({}, name="test", figures={"a.png": 3}, root=tmp_path)
    assert leftovers(tmp_path) == []


class FullDisk:
    """A figure that fails halfway, as writing to a full disk does."""

    def savefig(self, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("failure", [FullDisk, "interrupt"])
def test_a_failure_halfway_leaves_nothing(tmp_path: Path, failure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if failure == "interrupt":
        monkeypatch.setattr(np, "savez", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            save_result({"x": np.zeros(3)}, name="test", root=tmp_path)
    else:
        with pytest.raises(OSError, match="No space left"):
            save_result({"x": np.zeros(3)}, name="test", figures={"a.png": failure()}, root=tmp_path)
    assert leftovers(tmp_path) == []


def test_a_kill_halfway_leaves_nothing_under_a_final_name(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from interp_jax.core.results import save_result\n"
        "class Killer:\n"
        "    def savefig(self, path):\n"
        "        path.write_bytes(b'half')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "save_result({'x': 1}, name='test', figures={'a.png': Killer()}, root=sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (unfinished,) = (tmp_path / "test").iterdir()
    assert unfinished.name.startswith(".unfinished-")
    with pytest.raises(LoadError, match=r"unusable files was given: provenance\.json"):
        load_result(unfinished)
    # It is in nobody's way.
    assert load_result(save_result({"x": 1}, name="test", root=tmp_path)).result == {"x": 1}


def damage(path: Path) -> str:
    with pytest.raises(LoadError) as error:
        load_result(path)
    text = str(error.value)
    assert f"load_result({str(path)!r})" in text
    return text


def test_no_such_result(tmp_path: Path) -> None:
    path = save_result({}, name="test", root=tmp_path)
    text = damage(path.with_name(path.name + "x"))
    assert f"There is no directory '{path.name}x'" in text
    assert f"Did you mean {path.name!r}?" in text
    assert "Fix: give a directory that save_result returned." in text
    assert "Known: (none)" in damage(tmp_path / "nowhere" / "at_all")


def test_a_directory_that_is_no_result(tmp_path: Path) -> None:
    text = damage(tmp_path)
    assert "unusable files was given: provenance.json (FileNotFoundError" in text
    assert "Fix: copy the directory again from where it was saved, or run the experiment again." in text


def test_every_damaged_file_is_named(tmp_path: Path) -> None:
    path = save_result({"x": np.zeros(100)}, name="test", figures={"a.html": "text"}, root=tmp_path)
    (path / "arrays.npz").write_bytes((path / "arrays.npz").read_bytes()[:-20])
    (path / "result.json").unlink()
    text = damage(path)
    assert "arrays.npz (not as it was saved), result.json (missing)" in text
    assert "a.html" not in text


@pytest.mark.parametrize("content", ["{", "[]", "3", "{}", '{"format": 1}'])
def test_a_damaged_provenance(tmp_path: Path, content: str) -> None:
    path = save_result({}, name="test", root=tmp_path)
    (path / "provenance.json").write_text(content)
    assert "unusable files was given: provenance.json (" in damage(path)


def test_a_format_of_the_future(tmp_path: Path) -> None:
    path = save_result({}, name="test", root=tmp_path)
    record = json.loads((path / "provenance.json").read_text()) | {"format": 99}
    (path / "provenance.json").write_text(json.dumps(record))
    text = damage(path)
    assert "A result of format 99 was given" in text
    assert "Expected: format 1." in text
