"""A Gemma 3 of any depth stacked: its layers are one subtree, wherever the groups of five local and one global end.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from interp_jax.core.sites import Site
from interp_jax.models.export import export
from interp_jax.models.loading import load, read_checkpoint
from interp_jax.models.weights.checkpoint import Tensors
from interp_jax.patches import tunix_gemma3
from interp_jax.transforms.compilations import count_compilations
from tests.conftest import ORACLES
from tests.patches.tunix import test_tunix
from tests.patches.tunix.test_tunix import TOKENS, close

pytestmark = test_tunix.pytestmark

N_INSIDE, ROUNDING = test_tunix.N_INSIDE["gemma3"], test_tunix.ROUNDING["gemma3"]
# A group and two local layers.
N_LAYERS = 8


def of_depth(n_layers: int) -> Any:
    """The files of the tiny Gemma 3, of whose twelve layers the first are taken, or some again."""
    checkpoint = read_checkpoint(ORACLES / "tiny_gemma3")
    kinds = [checkpoint.config["layer_types"][i % 6] for i in range(n_layers)]
    config = {**checkpoint.config, "num_hidden_layers": n_layers, "layer_types": kinds}
    arrays = {name: checkpoint.tensors[name] for name in checkpoint.tensors if ".layers." not in name}
    for i in range(n_layers):
        at = f"model.layers.{i % 12}."
        inside = [name for name in checkpoint.tensors if name.startswith(at)]
        arrays |= {f"model.layers.{i}.{name.removeprefix(at)}": checkpoint.tensors[name] for name in inside}
    return dataclasses.replace(checkpoint, config=config, tensors=Tensors.from_arrays(arrays))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(of_depth(N_LAYERS), tmp_path_factory.mktemp("models") / "gemma3")


@pytest.fixture(scope="module")
def pair(files: Path) -> tuple[Any, Any]:
    """Unstacked and stacked."""
    return load(files), load(files, stacked=True)


def test_all_layers_are_one_subtree(pair) -> None:
    plain, stacked = pair
    (subtree,) = stacked.upstream.stacked_layers(stacked.params)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(subtree)} == {N_LAYERS}
    jax.tree.map(np.testing.assert_array_equal, plain.stacked().params, stacked.params)
    jax.tree.map(np.testing.assert_array_equal, stacked.unstacked().params, plain.params)
    for layer in (0, 5, 6, 7):
        one, other = (lm.upstream.layer_params(lm.params, layer) for lm in pair)
        jax.tree.map(np.testing.assert_array_equal, other, one)


def test_the_same_numbers_at_every_site(pair) -> None:
    plain, stacked = pair
    expected, values = plain.reap(TOKENS, "*"), stacked.reap(TOKENS, "*")
    assert list(values) == list(expected)
    assert len(expected) == 3 + N_INSIDE * N_LAYERS
    for site, value in expected.items():
        close(values[site], value, ROUNDING)
    # What tells the kinds of layers apart: the window of seven, and the rotary base.
    far = {layer: np.asarray(values[layer, "pattern"])[0, :, 9, :3] for layer in range(N_LAYERS)}
    assert {layer for layer, pattern in far.items() if (pattern > 0).all()} == {5}
    assert {layer for layer, pattern in far.items() if (pattern == 0).all()} == {0, 1, 2, 3, 4, 6, 7}
    turned = [
        np.asarray(stacked.upstream.layer_params(stacked.params, i)["attn"]["_key_norm"]["scale"]) for i in (4, 5)
    ]
    cosines = [_angles(values, layer, gain) for layer, gain in zip((4, 5), turned, strict=True)]
    for cosine, base, factor in zip(cosines, (1e3, 1e5), (1.0, 2.0), strict=True):
        np.testing.assert_allclose(cosine, np.cos(9 / base ** (np.arange(3) / 3) / factor), atol=1e-3)


def _angles(values: Any, layer: int, gain: np.ndarray) -> np.ndarray:
    """By what cosine the components of a key at position 9 were turned."""
    key, turned = (np.asarray(values[layer, name], np.float64)[0, 9, 0] for name in ("k", "rot_k"))
    key = key / np.sqrt(np.mean(np.square(key)) + 1e-6) * (1 + gain)
    one, other = (vector[:3] + 1j * vector[3:] for vector in (key, turned))
    return (other / one).real


def test_the_same_gradients(pair) -> None:
    def gradient(lm: Any) -> Any:
        def loss(params: Any) -> Any:
            return -jax.nn.log_softmax(lm.forward(params, TOKENS[:1]))[..., 7].mean()

        return jax.jit(jax.grad(loss))(lm.params)

    plain, stacked = pair
    expected, gradients = gradient(plain), stacked.upstream.restack(gradient(stacked))
    jax.tree.map(lambda one, other: close(one, other, 10 * ROUNDING), gradients, expected)
    for layer in ("5", "7"):
        assert all(float(jnp.abs(leaf).max()) > 1e-6 for leaf in jax.tree.leaves(gradients["layers"][layer]))


@pytest.mark.parametrize("engine", ["compiled", "python"])
def test_the_same_loop(pair, engine: Any) -> None:
    """Its layers are numbers, and what is changed in one of the last two, or in the global one, is changed there."""
    plain, stacked = pair
    names = ["resid_pre", "mlp_post"]
    for changed in (5, 7):
        expected = plain.intervene(TOKENS, {f"{changed}.mlp_post": lambda value: value[..., ::-1]})
        seen = []
        for layer, name, value in (running_pass := stacked.run(TOKENS, sites=names, engine=engine)):
            seen.append(Site(layer, name))
            if (layer, name) == (changed, "mlp_post"):
                running_pass.modified_value = value[..., ::-1]
        assert sorted(seen, key=str) == sorted((Site(i, name) for i in range(N_LAYERS) for name in names), key=str)
        assert all(type(site.layer) is int for site in seen)
        close(running_pass.retval, expected, ROUNDING)
        assert float(jnp.abs(expected - plain(TOKENS)).max()) > 1e-2


def test_another_layer_of_another_kind_compiles_nothing(pair) -> None:
    _, stacked = pair

    def zeroed(layer: int) -> Any:
        for _, _, value in (running_pass := stacked.run(TOKENS, sites=f"{layer}.mlp_out")):
            running_pass.modified_value = value * 0.0
        return running_pass.retval

    first = zeroed(1)
    with count_compilations() as new:
        others = [zeroed(layer) for layer in (5, 7)]
    assert not new
    assert all(float(jnp.abs(other - first).max()) > 1e-3 for other in others)


def test_the_same_text_is_generated_with_a_cache(pair) -> None:
    plain = pair[0]
    expected = plain.generate(TOKENS, max_new_tokens=4, use_cache=False)
    for lm in pair:
        generation = lm.generate(TOKENS, max_new_tokens=4)
        np.testing.assert_array_equal(generation.tokens, expected.tokens)
        close(generation.log_probs, expected.log_probs, 1e-3)


def test_a_text_read_in_pieces(pair) -> None:
    plain, stacked = pair
    whole = np.asarray(plain(TOKENS))
    cache, pieces, step = stacked.upstream.init_cache(2, 12), [], jax.jit(stacked.upstream.step)
    for piece in (TOKENS[:, :3], TOKENS[:, 3:9], TOKENS[:, 9:]):
        logits, cache = step(stacked.params, cache, jnp.asarray(piece))
        pieces.append(logits)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(cache.layers)} == {N_LAYERS}
    close(np.concatenate(pieces, axis=1)[TOKENS >= 0], whole[TOKENS >= 0], ROUNDING)


def test_from_files_onto_a_mesh_and_back(pair, files: Path, tmp_path: Path) -> None:
    _, stacked = pair
    written = stacked.export(tmp_path / "written")
    expected, tensors = (load_file(directory / "model.safetensors") for directory in (files, written))
    assert set(tensors) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(tensors[name], values, err_msg=name)
    spread = load(written, stacked=True, sharding=jax.make_mesh((2,), ("model",)))
    assert any(len(leaf.sharding.device_set) == 2 for leaf in jax.tree.leaves(spread.params["layers"]))
    jax.tree.map(np.testing.assert_array_equal, spread.params, stacked.params)
    close(spread(TOKENS), stacked(TOKENS), ROUNDING)


@pytest.mark.parametrize("n_layers", [1, 6])
def test_other_depths(n_layers: int) -> None:
    checkpoint = of_depth(n_layers)
    plain, stacked = (tunix_gemma3.from_checkpoint(checkpoint, stacked=is_stacked) for is_stacked in (False, True))
    close(stacked(TOKENS), plain(TOKENS), ROUNDING)


def test_as_deep_as_the_model_of_a_billion() -> None:
    """Of 26 layers: one layer's program, whose patterns have the window that each layer should have."""
    lm = tunix_gemma3.from_checkpoint(of_depth(26), stacked=True)
    program = str(jax.make_jaxpr(lm.forward)(lm.params, TOKENS))
    assert program.count("sow[") == 3 + N_INSIDE
    assert program.count("= scan[") == 1
    assert len(lm.sites(TOKENS)) == 3 + N_INSIDE * 26
    report = lm.check(TOKENS)
    assert report.ok, report
    assert lm.config is not None
    windows = ((7,) * 5 + (None,)) * 4 + (7, 7)
    assert lm.config.window == windows
    config = dataclasses.replace(lm.config, window=(*windows[:25], None))
    assert not dataclasses.replace(lm, config=config).check(TOKENS).ok
