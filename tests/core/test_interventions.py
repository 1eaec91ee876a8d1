"""Interventions: what they replace, what they leave, and what they refuse.

Source: interp_jax.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from interp_jax.core.errors import ShapeError
from interp_jax.core.interventions import Added, Masked, apply_intervention, describe, same_form

SHAPE = (2, 3, 4)


@pytest.fixture
def value(key: jax.Array) -> jax.Array:
    return jax.random.normal(key, SHAPE)


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(ShapeError) as error:
        call(*args, **kwargs)
    return str(error.value)


def test_an_array_takes_the_place_of_the_value(value: jax.Array) -> None:
    np.testing.assert_array_equal(apply_intervention(value + 1.0, value), np.asarray(value) + 1.0)


def test_a_function_is_given_the_value(value: jax.Array) -> None:
    np.testing.assert_array_equal(apply_intervention(lambda x: x * 0.0, value), np.zeros(SHAPE, np.float32))


def test_a_function_may_return_what_it_was_given(value: jax.Array) -> None:
    assert apply_intervention(lambda x: x, value) is value


def test_a_numpy_array_is_enough(value: jax.Array) -> None:
    new = np.ones(SHAPE, np.float32)
    np.testing.assert_array_equal(apply_intervention(new, value), new)


@given(
    hnp.mutually_broadcastable_shapes(num_shapes=2, base_shape=(2, 3, 4), max_dims=3),
    st.integers(0, 2**31 - 1),
)
def test_masked_against_element_by_element(shapes: hnp.BroadcastableShapes, seed: int) -> None:
    rng = np.random.default_rng(seed)
    value = rng.normal(size=SHAPE).astype(np.float32)
    fits = [shape for shape in shapes.input_shapes if np.broadcast_shapes(shape, SHAPE) == SHAPE]
    mask_shape, new_shape = [*fits, (), ()][:2]
    mask = rng.integers(2, size=mask_shape).astype(bool)
    new = rng.normal(size=new_shape).astype(np.float32)
    result = np.asarray(apply_intervention(Masked(new, mask), jnp.asarray(value)))
    full_mask, full_new = np.broadcast_to(mask, SHAPE), np.broadcast_to(new, SHAPE)
    for index in np.ndindex(*SHAPE):
        assert result[index] == (full_new[index] if full_mask[index] else value[index])


def test_masked_with_a_number_keeps_the_dtype() -> None:
    value = jnp.arange(4, dtype=jnp.bfloat16)
    result = apply_intervention(Masked(0, np.array([True, False, True, False])), value)
    assert result.dtype == jnp.bfloat16
    assert result.tolist() == [0, 1, 0, 3]


def test_masked_nowhere_changes_no_bit(value: jax.Array) -> None:
    strange = value.at[0, 0, 0].set(jnp.nan).at[0, 0, 1].set(-0.0)
    result = apply_intervention(Masked(7.0, False), strange)
    assert np.asarray(result).tobytes() == np.asarray(strange).tobytes()


def test_masked_lets_no_nan_through_to_gradients_where_it_is_off() -> None:
    def loss(x: jax.Array) -> jax.Array:
        return apply_intervention(Masked(0.0, np.array([True, False])), x).sum()

    assert jax.grad(loss)(jnp.array([1.0, 2.0])).tolist() == [0.0, 1.0]


def test_masked_is_a_pytree_whose_parts_may_be_traced(value: jax.Array) -> None:
    rows = jnp.arange(2)

    def one(row: jax.Array) -> jax.Array:
        mask = (jnp.arange(2) == row)[:, None, None]
        return apply_intervention(Masked(0.0, mask), value)

    batched = jax.jit(jax.vmap(one))(rows)
    for row in range(2):
        expected = np.asarray(value).copy()
        expected[row] = 0
        np.testing.assert_array_equal(batched[row], expected)
    leaves, tree = jax.tree.flatten(Masked(jnp.ones(2), jnp.array(True)))
    assert len(leaves) == 2
    assert isinstance(jax.tree.unflatten(tree, leaves), Masked)


@pytest.mark.parametrize("number", [0, 2.5])
def test_a_python_number_takes_the_dtype_of_a_scalar_site(number: float) -> None:
    result = same_form(jnp.bfloat16(3.0), number, where="0.q")
    assert jnp.asarray(result).dtype == jnp.bfloat16
    assert float(result) == float(number)


@pytest.mark.parametrize(("site", "number"), [(jnp.int32(1), 15.0), (jnp.bool_(True), 0), (jnp.bfloat16(3), True)])
def test_a_python_number_may_stand_for_its_equal_in_another_dtype(site: jax.Array, number: float) -> None:
    result = jnp.asarray(same_form(site, number, where="0.q"))
    assert result.dtype == site.dtype
    assert result == jnp.asarray(number, site.dtype)


def test_a_pytree_keeps_its_structure(value: jax.Array) -> None:
    old = {"a": value, "b": (jnp.int32(1), value)}
    new = {"a": value * 2.0, "b": (3, value)}
    result = same_form(old, new, where="0.q")
    assert jax.tree.structure(result) == jax.tree.structure(old)
    assert jnp.asarray(result["b"][0]).dtype == jnp.int32


def test_cast_converts_dtypes_only(value: jax.Array) -> None:
    new = np.ones(SHAPE, np.float16)
    assert same_form(value, new, where="0.q", cast=True).dtype == jnp.float32
    assert "float32[2, 3, 4]" in refusal(same_form, value, np.ones((2, 3), np.float16), where="0.q", cast=True)


def test_shapes_are_not_broadcast(value: jax.Array) -> None:
    text = refusal(apply_intervention, jnp.zeros((3, 4)), value, where="5.mlp_out of gpt2")
    assert text == (
        "A new value float32[3, 4] was given in site 5.mlp_out of gpt2.\n"
        "  Expected: float32[2, 3, 4].\n"
        "  Fix: give the new value the form of the old one, as `value * 0` has it."
    )


def test_a_number_does_not_fill_an_array(value: jax.Array) -> None:
    assert "float32[] was given" in refusal(apply_intervention, 0.0, value)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.int32, jnp.bool_])
def test_another_dtype_is_refused(value: jax.Array, dtype: jnp.dtype) -> None:
    text = refusal(apply_intervention, value.astype(dtype), value)
    assert f"A new value {jnp.dtype(dtype).name}[2, 3, 4] was given" in text
    assert "Expected: float32[2, 3, 4]." in text


def test_a_float_does_not_round_into_an_integer_site() -> None:
    assert "float32[] was given" in refusal(same_form, jnp.int32(1), 1.5, where="0.q")


def test_what_is_no_array_is_refused(value: jax.Array) -> None:
    text = refusal(apply_intervention, "zero", value)
    assert "A new value of type str was given" in text
    assert "Expected: an array float32[2, 3, 4]." in text


def test_a_function_that_forgets_to_return(value: jax.Array) -> None:
    assert "pytree structure PyTreeDef(None)" in refusal(apply_intervention, lambda x: None, value)


def test_another_structure_is_refused(value: jax.Array) -> None:
    text = refusal(apply_intervention, {"a": value}, value)
    assert "A new value with pytree structure PyTreeDef({'a': *}) was given" in text
    assert "Expected: the structure PyTreeDef(*)." in text


def test_the_hint_joins_the_fix(value: jax.Array) -> None:
    text = refusal(same_form, value, jnp.zeros(2), where="0.q", hint='Or use engine="python".')
    assert text.endswith('`value * 0` has it. Or use engine="python".')


@pytest.mark.parametrize(
    ("masked", "words"),
    [
        (Masked(0.0, np.ones((5, 4), bool)), "Masked(value=float32[], mask=bool[5, 4]) was given"),
        (Masked(0.0, np.ones((1, 2, 3, 4), bool)), "mask=bool[1, 2, 3, 4]"),
        (Masked(np.zeros(5, np.float32), True), "Masked(value=float32[5], mask=bool[]) was given"),
        (Masked(0.0, np.ones(SHAPE, np.int32)), "mask=int32[2, 3, 4]"),
    ],
)
def test_masks_that_do_not_fit(value: jax.Array, masked: Masked, words: str) -> None:
    text = refusal(apply_intervention, masked, value, where="5.q")
    assert words in text
    assert "in site 5.q." in text
    assert "Expected: a value and a bool mask that broadcast to float32[2, 3, 4]." in text
    assert "Fix: give value and mask shapes that broadcast to the site's." in text


def test_a_masked_float_does_not_round_into_an_integer_site() -> None:
    text = refusal(apply_intervention, Masked(0.5, True), jnp.arange(3))
    assert "Expected: a value that casts to int32." in text
    assert "Fix: convert the replacement to the site's dtype." in text


def test_masked_needs_one_array(value: jax.Array) -> None:
    text = refusal(apply_intervention, Masked(0.0, True), (value, value))
    assert "A Masked was given for a value that is no single array" in text


def test_refusals_come_while_tracing_before_anything_runs(value: jax.Array) -> None:
    ran = []

    def program(x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: ran.append(1))
        return apply_intervention(jnp.zeros(5), x)

    refusal(jax.jit(program), value)
    assert not ran


def test_describe() -> None:
    assert describe(jnp.zeros((1, 14, 576))) == "float32[1, 14, 576]"
    assert describe(jnp.bfloat16(0)) == "bfloat16[]"
    assert describe(jax.ShapeDtypeStruct((2,), jnp.int8)) == "int8[2]"


@given(
    hnp.mutually_broadcastable_shapes(num_shapes=2, base_shape=(2, 3, 4), max_dims=3),
    st.integers(0, 2**31 - 1),
)
def test_added_against_element_by_element(shapes: hnp.BroadcastableShapes, seed: int) -> None:
    rng = np.random.default_rng(seed)
    value = rng.normal(size=SHAPE).astype(np.float32)
    fits = [shape for shape in shapes.input_shapes if np.broadcast_shapes(shape, SHAPE) == SHAPE]
    added, coefficient = (rng.normal(size=shape).astype(np.float32) for shape in [*fits, (), ()][:2])
    new = apply_intervention(Added(added, coefficient), value)
    added, coefficient = (np.broadcast_to(part, SHAPE) for part in (added, coefficient))
    for index in np.ndindex(SHAPE):
        assert new[index] == pytest.approx(value[index] + coefficient[index] * added[index], abs=1e-5)


def test_adding_nothing_changes_nothing(value: jax.Array) -> None:
    for nothing in (Added(0.0), Added(np.ones(4, np.float32), 0.0)):
        np.testing.assert_array_equal(apply_intervention(nothing, value), value)


def test_an_addition_in_a_narrow_dtype_is_rounded_once() -> None:
    # 257.001 rounds to 258; in bfloat16 1.001 is 1, and 257 lies between 256 and 258, of which 256 is even.
    new = apply_intervention(Added(np.full(3, 1.001, np.float32)), jnp.full(3, 256.0, jnp.bfloat16))
    assert new.dtype == jnp.bfloat16 and new.tolist() == [258.0] * 3


def test_an_addition_that_does_not_fit(value: jax.Array) -> None:
    assert "Added(value=float32[5]" in refusal(apply_intervention, Added(np.zeros(5, np.float32)), value)
    assert "a row per position" in refusal(apply_intervention, Added(1.0, np.zeros((2, 2), np.float32)), value)
    assert "cast to its dtype" in refusal(apply_intervention, Added(1.5), jnp.arange(3))
    assert "no single array" in refusal(apply_intervention, Added(1.5), {"a": value})
