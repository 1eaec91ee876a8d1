"""Stacking layers and scanning over them: against the unrolled loop, with every leaf accounted for.

Source: interp_jax.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError
from interp_jax.transforms.layer_stack import n_stacked, scan_layers, stack_layers, unstack_layers
from interp_jax.transforms.running_pass import list_sites, run
from interp_jax.transforms.sowing import layer_scope, sow

N_LAYERS, WIDTH = 6, 4


@pytest.fixture
def layers(rng: np.random.Generator) -> list[dict[str, Any]]:
    return [
        {
            "w": jnp.asarray(rng.standard_normal((WIDTH, WIDTH)), jnp.float32),
            "norm": {"b": jnp.asarray(rng.standard_normal(WIDTH), jnp.float32)},
        }
        for _ in range(N_LAYERS)
    ]


def linear(x: jax.Array, layer: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    x = sow(jnp.tanh(x @ layer["w"]) + layer["norm"]["b"], name="resid_post")
    return x, x.sum()


def squared(x: jax.Array, layer: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    x = sow(jnp.tanh(x**2 @ layer["w"]), name="resid_post")
    return x, x.max()


def unrolled(blocks: Any, x: jax.Array, layers: list[Any]) -> jax.Array:
    for i, layer in enumerate(layers):
        with layer_scope(i):
            x, _ = blocks[i % len(blocks)](x, layer)
    return x


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("as_numpy", [False, True])
def test_unstacking_is_the_inverse(layers, stride: int, as_numpy: bool) -> None:
    layers = jax.tree.map(np.asarray, layers) if as_numpy else layers
    stacked = stack_layers(layers, stride=stride)
    groups = stacked if stride > 1 else (stacked,)
    assert len(groups) == stride
    for offset, group in enumerate(groups):
        assert group["w"].shape == (N_LAYERS // stride, WIDTH, WIDTH)
        np.testing.assert_array_equal(group["norm"]["b"][1], layers[offset + stride]["norm"]["b"])
    assert isinstance(jax.tree.leaves(stacked)[0], np.ndarray) == as_numpy
    back = unstack_layers(stacked, stride=stride)
    assert jax.tree.structure(back) == jax.tree.structure(layers)
    jax.tree.map(np.testing.assert_array_equal, back, layers)


def test_donated_arrays_are_gone_leaf_by_leaf(layers) -> None:
    kept = jax.tree.map(np.array, layers)
    stacked = stack_layers(layers, donate=True)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(layers))
    back = unstack_layers(stacked, donate=True)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(stacked))
    jax.tree.map(np.testing.assert_array_equal, back, kept)


def test_without_donation_nothing_is_deleted(layers) -> None:
    stacked = stack_layers(layers)
    unstack_layers(stacked)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((layers, stacked)))


def test_an_array_in_two_places_is_deleted_after_the_second() -> None:
    shared = [jnp.full(2, float(i)) for i in range(2)]
    stacked = stack_layers([{"a": array, "b": array} for array in shared], donate=True)
    np.testing.assert_array_equal(stacked["b"], [[0, 0], [1, 1]])
    assert all(array.is_deleted() for array in shared)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_scan_is_the_unrolled_loop(layers, stride: int) -> None:
    blocks = (linear, squared)[:stride]
    x = jnp.linspace(-1, 1, WIDTH)
    stacked = stack_layers(layers, stride=stride)

    def scanned(x: jax.Array, stacked: Any) -> jax.Array:
        return scan_layers(blocks if stride > 1 else linear, x, stacked)[0]

    np.testing.assert_allclose(scanned(x, stacked), unrolled(blocks, x, layers), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda stacked: scanned(x, stacked).sum())(stacked)
    by_layer = jax.grad(lambda layers: unrolled(blocks, x, layers).sum())(layers)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        unstack_layers(gradient, stride=stride),
        by_layer,
    )
    _, outs = scan_layers(blocks if stride > 1 else linear, x, stacked)
    sums = outs if stride == 1 else outs[0]
    np.testing.assert_allclose(sums[0], unrolled(blocks, x, layers[:1]).sum(), rtol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("engine", ["compiled", "python"])
def test_every_layer_is_a_site_under_both_engines(layers, stride: int, engine: str) -> None:
    blocks = (linear, squared)[:stride]
    x, stacked = jnp.linspace(-1, 1, WIDTH), stack_layers(layers, stride=stride)

    def model(x: jax.Array) -> jax.Array:
        return scan_layers(blocks if stride > 1 else linear, x, stacked)[0]

    def edited(fn: Any, engine: str) -> tuple[set[Any], Any]:
        seen = set()
        for layer, name, value in (running_pass := run(fn, x, engine=engine)):
            seen.add((layer, name))
            if layer == 3:
                running_pass.modified_value = value * 2.0
        return seen, running_pass.retval

    expected_sites, expected = edited(lambda x: unrolled(blocks, x, layers), "compiled")
    sites, result = edited(model, engine)
    assert sites == expected_sites
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
    assert [site.layer for site in list_sites(model, x).sites] == list(range(N_LAYERS))


def test_unlistened_the_program_holds_no_index(layers) -> None:
    stacked = stack_layers(layers)

    def plain(x: jax.Array, stacked: Any) -> Any:
        def block(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            x = jnp.tanh(x @ layer["w"]) + layer["norm"]["b"]
            return x, x.sum()

        return jax.lax.scan(block, x, stacked)

    def ours(x: jax.Array, stacked: Any) -> Any:
        return scan_layers(linear, x, stacked)

    x = jnp.ones(WIDTH)
    programs = [jax.jit(fn).lower(x, stacked).as_text().replace("ours", "plain") for fn in (plain, ours)]
    assert programs[0] == programs[1]


def test_stacking_under_jit_and_grad(layers) -> None:
    x = jnp.linspace(-1, 1, WIDTH)

    @jax.jit
    def loss(layers: Any) -> jax.Array:
        return scan_layers(linear, x, stack_layers(layers, donate=True))[0].sum()

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        jax.grad(loss)(layers),
        jax.grad(lambda layers: unrolled((linear,), x, layers).sum())(layers),
    )
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(layers))


def test_layers_that_differ_are_refused_with_all_offenders(layers) -> None:
    layers[2]["w"] = layers[2]["w"][:2]
    layers[4]["norm"]["b"] = layers[4]["norm"]["b"].astype(jnp.bfloat16)
    layers[5]["more"] = jnp.ones(1)
    del layers[5]["norm"]
    with pytest.raises(ShapeError) as error:
        stack_layers(layers)
    text = str(error.value)
    for words in (
        "['w']: float32[2, 4] in layer 2, float32[4, 4] in layer 0",
        "['norm']['b']: bfloat16[4] in layer 4, float32[4] in layer 0",
        "['more']: float32[1] in layer 5, nothing in layer 0",
        "['norm']['b']: nothing in layer 5, float32[4] in layer 0",
        "Fix: leave these layers unstacked",
    ):
        assert words in text


def test_under_a_stride_only_layers_of_one_kind_must_agree() -> None:
    layers = [np.ones(2 + i % 2, np.float32) for i in range(4)]
    first, second = stack_layers(layers, stride=2)
    assert (first.shape, second.shape) == ((2, 2), (2, 3))
    with pytest.raises(ShapeError, match=r"float32\[3\] in layer 1, float32\[2\] in layer 0"):
        stack_layers(layers)


def test_layers_of_another_type_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"in layer 1, .* in layer 0"):
        stack_layers([(np.ones(1), np.ones(1)), [np.ones(1), np.ones(1)]])


@pytest.mark.parametrize(("n_layers", "stride"), [(0, 1), (3, 2), (2, 0)])
def test_numbers_of_layers_that_do_not_fit(n_layers: int, stride: int) -> None:
    with pytest.raises(InvalidInputError, match=rf"{n_layers} layers and stride={stride} were given in stack_layers"):
        stack_layers([np.ones(1)] * n_layers, stride=stride)


def test_leading_axes_that_differ() -> None:
    with pytest.raises(ShapeError, match=r"Leading layer axes that differ: \['b'\] \[2\], \['c'\] \[\] in scan_layers"):
        scan_layers(linear, jnp.ones(1), {"a": jnp.ones(3), "b": jnp.ones(2), "c": jnp.ones(()), "d": jnp.ones(3)})
    with pytest.raises(ShapeError, match="Stacked layers without arrays in unstack_layers"):
        unstack_layers({})
    assert n_stacked({"a": jnp.ones((5, 2))}) == 5


def test_groups_that_do_not_fit_the_blocks() -> None:
    with pytest.raises(InvalidInputError, match=r"tuple of 3 was given as stacked layers(.|\n)*a tuple of 2"):
        scan_layers((linear, squared), jnp.ones(1), (1, 2, 3))
    with pytest.raises(InvalidInputError, match=r"dict was given as stacked layers in unstack_layers"):
        unstack_layers({"a": jnp.ones(2)}, stride=2)


def test_a_block_that_changes_the_form_of_the_carry(layers) -> None:
    with pytest.raises(ShapeError, match=r"the carry of scan_layers"):
        scan_layers(lambda x, layer: (x[:1], None), jnp.ones(WIDTH), stack_layers(layers))
