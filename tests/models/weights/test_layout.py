"""Layouts: parameters are read in pieces, typed, stacked and sharded as they come, and nothing is held twice.

Source: interp_jax.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from safetensors.numpy import save_file

from interp_jax.core.errors import InvalidInputError, LoadError, ShapeError
from interp_jax.models.loading import FAMILIES, load
from interp_jax.models.weights import checkpoint as checkpoints
from interp_jax.models.weights.checkpoint import Checkpoint, Tensors
from interp_jax.models.weights.layout import Placement, Stored, read, spread, turned
from interp_jax.models.weights.safetensors import read_checkpoint
from tests.models.directories import DIRECTORIES

# One of each kind of parameter.
LAYOUT = {
    "embed": Stored("wte", (16, 6)),
    "head": Stored("lm_head", (16, 6), view=turned),
    "scale": Stored("norm", (6,)),
    "number": Stored("n", ()),
    "kernels": Stored("h.{}.w", (8, 6), layers=range(4), view=turned),
    "biases": Stored("h.{}.b", (8,), layers=range(4)),
    "local": Stored("h.{}.c", (3, 4), layers=range(1, 4, 2)),
    "query": Stored("h.{}.qkv", (12, 6), layers=range(4), view=lambda t: t.reshape(2, 3, 2, 6)[:, 0].swapaxes(1, 2)),
}


def tensors_of(layout: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    leaves = jax.tree.leaves(layout)
    return {name: rng.standard_normal(leaf.shape, np.float32) for leaf in leaves for name in leaf.names}


def expected_of(stored: Stored, tensors: dict[str, np.ndarray]) -> np.ndarray:
    view = stored.view or (lambda tensor: tensor)
    found = [view(tensors[name]) for name in stored.names]
    return found[0] if stored.layers is None else np.stack(found)


def read_all(path: Path, dtype: Any = np.float32, sharding: Placement | None = None) -> dict[str, Any]:
    with read_checkpoint(path).intake() as intake:
        return read(LAYOUT, intake, dtype=dtype, sharding=sharding)


@pytest.fixture
def tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return tensors_of(LAYOUT, rng)


@pytest.fixture
def directory(tmp_path: Path, tensors: dict[str, np.ndarray]) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture(params=[64, 4 << 20], ids=["in-pieces", "whole"])
def piece_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read rows one or two at a time, and whole."""
    monkeypatch.setattr(checkpoints, "_PIECE_BYTES", request.param)


def rows_only(name: str, shape: tuple[int, ...]) -> Sharding:
    """Cut the first axis of the embedding and the layers of the stacked kernels, leave the rest on one device."""
    mesh = jax.make_mesh((2,), ("x",))
    spec = PartitionSpec("x") if name in ("wte", "h.{}.w") else PartitionSpec()
    return NamedSharding(mesh, spec)


@pytest.mark.usefixtures("piece_bytes")
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("place", [None, "mesh", "device", "rule"])
def test_every_value_is_in_its_place(
    directory: Path, tensors: dict[str, np.ndarray], dtype: Any, place: str | None
) -> None:
    shardings: dict[str | None, Placement | None] = {
        None: None,
        "mesh": jax.make_mesh((2,), ("x",)),
        "device": SingleDeviceSharding(jax.devices()[1]),
        "rule": rows_only,
    }
    params = read_all(directory, dtype, shardings[place])
    for key, stored in LAYOUT.items():
        array = params[key]
        assert array.dtype == dtype
        assert array.shape == stored.param_shape
        np.testing.assert_array_equal(array, expected_of(stored, tensors).astype(dtype), err_msg=key)
        if place == "device":
            assert array.devices() == {jax.devices()[1]}
    if place == "rule":
        assert params["kernels"].sharding.shard_shape((4, 6, 8)) == (2, 6, 8)
        assert params["embed"].sharding.shard_shape((16, 6)) == (8, 6)
    if place is None:
        assert not any(leaf.committed for leaf in jax.tree.leaves(params))


def test_the_rule_of_a_mesh() -> None:
    rule = spread(jax.make_mesh((2,), ("x",)))

    def spec(name: str, *shape: int) -> tuple[Any, ...]:
        sharding = rule(name, shape)
        assert isinstance(sharding, NamedSharding)
        return tuple(sharding.spec)

    assert spec("w", 4, 6) == (None, "x")
    assert spec("w", 6, 4) == ("x", None)
    assert spec("w", 4, 7) == ("x", None)
    assert spec("w", 3, 7) == (None, None)
    assert spec("b", 8) == (None,) or spec("b", 8) == ()
    # Never the layer axis.
    assert spec("h.{}.w", 100, 4, 6) == (None, None, "x")
    assert spec("h.{}.b", 100, 8) == (None, None)


def test_two_axes_of_a_mesh_cut_two_axes_of_a_parameter() -> None:
    sharding = spread(jax.make_mesh((2, 1), ("data", "model")))("w", (8, 12))
    assert isinstance(sharding, NamedSharding)
    assert tuple(sharding.spec) == ("model", "data")


def test_rules_get_the_names_of_the_file(directory: Path) -> None:
    seen = {}

    def rule(name: str, shape: tuple[int, ...]) -> Sharding:
        seen[name] = shape
        return SingleDeviceSharding(jax.devices()[0])

    read_all(directory, sharding=rule)
    assert seen == {stored.name: stored.param_shape for stored in LAYOUT.values()}
    assert seen["h.{}.w"] == (4, 6, 8)


def test_shardings_that_do_not_fit_are_all_named(directory: Path) -> None:
    mesh = jax.make_mesh((2,), ("x",))
    with pytest.raises(ShapeError) as caught:
        read_all(directory, sharding=lambda name, shape: NamedSharding(mesh, PartitionSpec(*[None] * 2, "x")))
    words = str(caught.value)
    assert "    wte [16, 6]: " in words
    assert "    norm [6]: " in words
    assert "h.{}.w" not in words
    assert "Fix: give a Mesh, which cuts only what it divides" in words


@pytest.mark.parametrize("sharding", [3, "model", lambda name, shape: PartitionSpec()], ids=["int", "str", "rule"])
def test_what_is_no_sharding(directory: Path, sharding: Any) -> None:
    with pytest.raises(
        InvalidInputError, match=r"Expected: a jax\.sharding\.Sharding, a jax\.sharding\.Mesh, or a fun"
    ):
        read_all(directory, sharding=sharding)


def test_buffers_are_not_copied_on_a_cpu(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[np.ndarray] = []
    put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda array, device=None: given.append(array) or put(array, device))
    params = read_all(directory)
    pointers = {array.ctypes.data for array in given}
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)} == pointers


@pytest.mark.usefixtures("piece_bytes")
@pytest.mark.parametrize(("value", "dtype"), [(np.nan, np.float32), (-np.inf, np.float32), (70_000.0, np.float16)])
def test_values_that_do_not_fit_the_type(directory: Path, tensors: dict[str, np.ndarray], value: float, dtype: Any):
    tensors["lm_head"][[3, 15], 2] = value
    tensors["h.2.qkv"][1, 1] = value
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(LoadError) as caught:
        read_all(directory, dtype)
    name = np.dtype(dtype).name
    assert f"lm_head has 2 values that are not finite, or too large for {name}" in str(caught.value)
    assert f"h.2.qkv has 1 values that are not finite, or too large for {name}" in str(caught.value)


def test_a_file_cut_short_while_it_is_read(directory: Path) -> None:
    checkpoint = read_checkpoint(directory)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(LoadError, match=r"Weight file model\.safetensors changed while it was read \(it ends after"):
        dict(checkpoint.tensors)
    path.unlink()
    with pytest.raises(LoadError, match=r"changed while it was read \(.*No such file"):
        dict(checkpoint.tensors)


def test_files_are_read_from_beginning_to_end(rng: np.random.Generator) -> None:
    tensors = tensors_of(LAYOUT, rng)
    names = sorted(tensors, reverse=True)
    asked: list[str] = []

    class Logged(Tensors):
        def rows(self, name: str) -> Any:
            asked.append(name)
            return super().rows(name)

    logged = Logged({})
    logged._entries = Tensors.from_arrays({name: tensors[name] for name in names})._entries
    with Checkpoint("gpt2", {}, logged, tokenizer=None, source="memory").intake() as intake:
        read({key: stored for key, stored in LAYOUT.items() if stored.layers is None}, intake, dtype=np.float32)
        assert asked == [name for name in names if "h." not in name]
        read({key: stored for key, stored in LAYOUT.items() if stored.layers is not None}, intake, dtype=np.float32)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_load_onto_a_mesh(family: str, stacked: bool) -> None:
    plain = load(DIRECTORIES[family], stacked=stacked, dtype="bfloat16")
    spreading = load(DIRECTORIES[family], stacked=stacked, dtype="bfloat16", sharding=jax.make_mesh((2,), ("model",)))
    jax.tree.map(np.testing.assert_array_equal, spreading.params, plain.params)
    leaves = jax.tree.leaves(spreading.params)
    assert all(isinstance(leaf.sharding, NamedSharding) for leaf in leaves)
    assert sum(not leaf.sharding.is_fully_replicated for leaf in leaves) >= 5


def test_a_model_on_a_mesh_computes_the_same() -> None:
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    for stacked in (False, True):
        lm = load(DIRECTORIES["llama"], stacked=stacked, sharding=jax.make_mesh((2,), ("model",)))
        np.testing.assert_allclose(lm(tokens), load(DIRECTORIES["llama"])(tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("stacked", [False, True])
def test_donation_holds_one_leaf_twice_at_most(stacked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from interp_jax.transforms import layer_stack

    lm = load(DIRECTORIES["gpt2"], stacked=stacked)
    before = sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))
    leaves = [leaf.nbytes for leaf in jax.tree.leaves(lm.stacked().params["transformer"]["h"])]
    known = {id(array) for array in jax.live_arrays()} - {id(leaf) for leaf in jax.tree.leaves(lm.params)}
    highest = []
    name = "_unstack" if stacked else "_stack"
    function = getattr(layer_stack, name)

    def watched(given: Any) -> Any:
        made = jax.block_until_ready(function(given))
        highest.append(sum(array.nbytes for array in jax.live_arrays() if id(array) not in known))
        return made

    monkeypatch.setattr(layer_stack, name, watched)
    other = lm.unstacked(donate=True) if stacked else lm.stacked(donate=True)
    assert len(highest) == len(leaves)
    assert max(highest) <= before + max(leaves)
    assert min(highest) >= before
    assert other.n_params == lm.n_params


@pytest.mark.slow
@pytest.mark.parametrize("case", ["stacked", "unstacked", "stacked-bfloat16", "stacked-sharded", "restacked"])
def test_peak_host_memory(case: str, tmp_path: Path) -> None:
    from benchmarks.common import in_new_process
    from benchmarks.load_once import write_model

    write_model(tmp_path / "model", n_layers=12)
    measured = in_new_process("benchmarks.load_once", str(tmp_path / "model"), *case.split("-"))
    assert measured["model_bytes"] > 90e6
    most = 1.45 if case == "restacked" else 1.2
    assert 0.9 <= measured["peak_bytes"] / measured["model_bytes"] <= most
