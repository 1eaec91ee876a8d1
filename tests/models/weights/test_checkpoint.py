"""Intake: what does not fit is all reported, once, in words; what fits is read when it is taken.

Source: interp_jax.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from interp_jax.core.errors import LoadError, UnsupportedModelError
from interp_jax.models.weights.checkpoint import Checkpoint, LazyTensor, Tensors


def checkpoint_of(arrays: dict[str, np.ndarray], **config: object) -> Checkpoint:
    return Checkpoint("gpt2", config, Tensors.from_arrays(arrays), tokenizer=None, source="here/model")


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def take_all(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]], **options: Any) -> None:
    with checkpoint.intake(**options) as intake:
        for name, shape in shapes.items():
            assert intake.take(name, shape).shape == shape


def test_tensors_are_read_each_time_they_are_asked_for_and_not_before():
    reads: list[str] = []

    def entry(name: str) -> LazyTensor:
        return LazyTensor((2,), np.dtype(np.float32), lambda: (reads.append(name), ones(2))[1])

    tensors = Tensors({"a": entry("a"), "b": entry("b")})
    assert list(tensors) == ["a", "b"]
    assert len(tensors) == 2
    assert "a" in tensors
    assert "c" not in tensors
    assert tensors.shape("a") == (2,)
    assert tensors.dtype("b") == np.float32
    assert "2 tensors, 4 values" in repr(tensors)
    assert reads == []
    np.testing.assert_array_equal(tensors["b"], ones(2))
    assert reads == ["b"]


def test_what_fits_is_given_as_it_is():
    arrays = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, ml_dtypes.bfloat16)}
    with checkpoint_of(arrays).intake() as intake:
        assert intake.take("w", (2, 3)) is arrays["w"]
        assert intake.take("b", (3,)) is arrays["b"]
        assert intake.take_if_present("lm_head", (3,)) is None


def test_every_offender_is_reported_at_once():
    arrays = {f"h.{i}.ln_1.weight": ones(4) for i in range(12)}
    arrays |= {f"h.{i}.ln_1.bias": ones(5) for i in range(12)}
    arrays |= {f"h.{i}.attn.bias": np.ones((1, 1), bool) for i in range(12)}
    arrays |= {"wte.weigth": ones(8, 4), "ids": np.arange(4), "adapter.A": ones(1), "adapter.B": ones(1)}
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (8, 4), "ids": (4,)}
    shapes |= {f"h.{i}.ln_1.{part}": (4,) for i in range(12) for part in ("weight", "bias")}
    with pytest.raises(LoadError) as caught:
        take_all(checkpoint_of(arrays), shapes, ignorable=("*.attn.bias",))
    assert str(caught.value) == (
        "Weights that do not fit the configuration in here/model\n"
        "    missing (1): wte.weight\n"
        "    left over (3): wte.weigth, adapter.A, adapter.B\n"
        "    ids has dtype int64, expected floating point\n"
        "    h.{0..11}.ln_1.bias has shape (5,), expected (4,)\n"
        "    is 'wte.weigth' meant to be 'wte.weight'?.\n"
        "  Expected: each tensor the configuration implies, once and in its shape, and no other "
        "(may be left over: *.attn.bias)\n"
        "  Fix: check that config.json and the weights belong together and that the download is complete."
    )


def test_numbers_that_do_not_run_are_listed():
    arrays = {f"h.{i}.w": ones(1) for i in (0, 3, 7)} | {f"h.{i}.u.{j}": ones(1) for i in (0, 1, 2) for j in (4, 5)}
    with pytest.raises(LoadError) as caught:
        take_all(checkpoint_of(arrays), {})
    assert "left over (9): h.{0,3,7}.w, h.{0..2}.u.{4,5}" in str(caught.value)


def test_nothing_is_read_once_something_does_not_fit():
    entries = {"b": LazyTensor((2,), np.dtype(np.float32), lambda: pytest.fail("read although the load must fail"))}
    checkpoint = Checkpoint("gpt2", {}, Tensors(entries), tokenizer=None, source="model")
    with pytest.raises(LoadError, match=r"missing \(1\): a"):
        take_all(checkpoint, {"a": (3,), "b": (2,)})


def test_the_offender_is_reported_when_the_converter_stumbles_over_it():
    with pytest.raises(LoadError, match=r"missing \(1\): a"), checkpoint_of({}).intake() as intake:
        intake.take("a", (3,)).reshape(2, 2)


def test_an_error_of_the_converter_itself_is_left_alone():
    with pytest.raises(ZeroDivisionError), checkpoint_of({"a": ones(3), "b": ones(1)}).intake() as intake:
        intake.take("a", (3,))[1 // 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_that_are_not_finite_are_refused(bad: float, dtype: type):
    values = np.ones(5, dtype)
    values[[1, 3]] = bad
    with (
        pytest.raises(LoadError, match="a has 2 values that are not finite"),
        checkpoint_of({"a": values}).intake() as i,
    ):
        i.take("a", (5,))


def test_a_prefix_may_be_absent_from_the_file():
    with checkpoint_of({"wte": ones(2), "lm_head": ones(2)}).intake(optional_prefix="transformer.") as intake:
        np.testing.assert_array_equal(intake.take("transformer.wte", (2,)), ones(2))
        intake.take("lm_head", (2,))
    both = {"wte": ones(2), "transformer.wte": ones(2)}
    with pytest.raises(LoadError, match=r"left over \(1\): wte"):
        take_all(checkpoint_of(both), {"transformer.wte": (2,)}, optional_prefix="transformer.")


def test_configuration_keys_nobody_knows_are_refused():
    known = checkpoint_of({}, n_layer=2, model_type="gpt2", torch_dtype="float32", use_cache=True, summary_type="x")
    known.check_config(handled={"n_layer"}, ignorable={"summary_type"})
    empty = checkpoint_of({}, n_layer=2, rope_scaling=None, pruned_heads={}, quantization_config=None)
    empty.check_config(handled={"n_layer"})
    with pytest.raises(UnsupportedModelError) as caught:
        checkpoint_of({}, n_layers=2, alibi=True).check_config(handled={"n_layer", "n_head"})
    assert str(caught.value) == (
        "Unknown configuration keys n_layers=2, alibi=True in here/model.\n"
        "  Expected: keys the gpt2 family handles: n_head, n_layer. 'n_layers' resembles 'n_layer'\n"
        "  Fix: check that this is a gpt2 (model_type). If these keys leave the forward pass unchanged, remove them "
        "from config.json; otherwise the patch set of gpt2 has to learn them (HANDLED_KEYS, IGNORABLE_KEYS)."
    )
