"""Every mistake a user can make with a harvest is told in four parts, with the line that sows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from interp_jax.core.errors import InterpError, InvalidInputError, ShapeError, UnknownNameError, UnsupportedModelError
from interp_jax.core.interventions import Masked
from interp_jax.core.sites import Site
from interp_jax.transforms.harvest import (
    harvest_sites,
    intervene,
    layer_scope,
    loop_layer,
    nest,
    plant,
    reap,
    reap_sites,
    site_gradients,
    sow,
    sow_cond,
)

X = jnp.array([1.0, 2.0, 3.0])
tagged = functools.partial(sow, tag="t")


def refuses(error: type[InterpError], *words: str, at: str = "") -> Any:
    """A context that expects an error of four parts with these words, naming the line that has `# at`."""

    class Context:
        def __enter__(self) -> None:
            self.raises = pytest.raises(error)
            self.info = self.raises.__enter__()

        def __exit__(self, *exc: Any) -> bool:
            result = self.raises.__exit__(*exc)
            message = str(self.info.value)
            lines = message.splitlines()
            assert lines[1].startswith(("  Expected: ", "  Known: ")), message
            assert lines[-1].startswith("  Fix: "), message
            for word in words:
                assert word in message, message
            if at:
                assert f"test_mistakes.py:{line_of(at)}" in message, message
            return bool(result)

    return Context()


def line_of(mark: str) -> int:
    with open(__file__) as file:
        (number,) = (number for number, line in enumerate(file, 1) if line.rstrip().endswith(f"# {mark}"))
    return number


def in_scan(body: Callable[[Any], Any], x: Any, n: int = 3) -> Any:
    return lax.scan(lambda x, _: (body(x), None), x, None, length=n)[0]


class TestSows:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"name": "a", "tag": None}, "a hashable tag other than None"),
            ({"name": "a", "tag": [1]}, "tag=[1]"),
            ({"name": "a", "tag": (1, [2])}, "tag=(1, [2])"),
            ({"name": ""}, "a non-empty string as name"),
            ({"name": 3}, "name=3"),
        ],
    )
    def test_name_and_tag(self, options: dict[str, Any], words: str) -> None:
        with refuses(InvalidInputError, words):
            sow(X, **options)

    def test_modes(self) -> None:
        with refuses(InvalidInputError, "Unknown mode 'clober'", "Did you mean 'clobber'?", "strict, append, clobber"):
            tagged(X, name="a", mode="clober")
        with refuses(InvalidInputError, "Unknown mode 'cond_clobber'", "sow_cond has cond_clobber"):
            tagged(X, name="a", mode="cond_clobber")
        with refuses(InvalidInputError, "Unknown mode 'append'"):
            sow_cond(X, True, tag="t", name="a", mode="append")

    @pytest.mark.parametrize("pred", [X > 0, 1, 1.0])
    def test_a_predicate_is_one_bool(self, pred: Any) -> None:
        with refuses(InvalidInputError, "was given in sow_cond(name='a')", "a scalar bool."):
            sow_cond(X, pred, tag="t", name="a")


class TestReaping:
    def test_two_sows_of_one_name(self) -> None:
        def fn(x: Any) -> Any:
            x = tagged(x, name="a")  # first of two
            return tagged(x * 2.0, name="a")  # second of two

        with refuses(InvalidInputError, "already been reaped: a", "mode='clobber'", at="first of two"):
            reap(fn, tag="t")(X)
        with refuses(InvalidInputError, "and again at", at="second of two"):
            jax.jit(reap(fn, tag="t"))(X)
        with refuses(InvalidInputError, "already been reaped: s/a"):
            reap(nest(fn, scope="s"), tag="t")(X)

    def test_modes_that_do_not_go_together(self) -> None:
        def fn(x: Any) -> Any:
            x = tagged(x, name="a", mode="clobber")
            return tagged(x, name="a", mode="append")

        with refuses(InvalidInputError, "already been reaped: a"):
            reap(fn, tag="t")(X)

    def test_strict_in_a_scan(self) -> None:
        def body(x: Any) -> Any:
            return tagged(x + 1.0, name="a")  # strict in scan

        with refuses(InvalidInputError, "Cannot use strict mode for 'a' inside `scan`", "append", at="strict in scan"):
            reap(lambda x: in_scan(body, x), tag="t")(X)

    @pytest.mark.parametrize("mode", ["strict", "append"])
    def test_in_a_while_loop(self, mode: str) -> None:
        def fn(x: Any) -> Any:
            return lax.while_loop(lambda x: x[0] < 5, lambda x: tagged(x + 1.0, name="a", mode=mode), x)  # in while

        with refuses(InvalidInputError, "Must use clobber or cond_clobber", f"with mode {mode}", at="in while"):
            reap(fn, tag="t")(X)

    def test_in_the_condition_of_a_while_loop(self) -> None:
        def fn(x: Any) -> Any:
            condition = lambda x: tagged(x, name="a", mode="clobber")[0] < 5  # noqa: E731  # in condition
            return lax.while_loop(condition, lambda x: x + 1.0, x)

        with refuses(InvalidInputError, "The condition of a `while_loop` sows 'a'", at="in condition"):
            reap(fn, tag="t")(X)

    def test_in_one_branch_only(self) -> None:
        def fn(x: Any) -> Any:
            return lax.cond(x[0] > 0, lambda x: tagged(x, name="a"), lambda x: x, x)  # one branch

        with refuses(InvalidInputError, "Mismatching number of `sow`s between branches: 'a'", at="one branch"):
            reap(fn, tag="t")(X)
        assert reap(fn, tag="t", blocklist=["a"])(X) == {}

    def test_branches_of_different_names_forms_and_modes(self) -> None:
        def fn(x: Any, one: Any, other: Any) -> Any:
            return lax.cond(x[0] > 0, one, other, x)

        def branches(**options: Any) -> Any:
            default = {"value": lambda x: x, "name": "a", "mode": "strict"}

            def branch(value: Any, name: str, mode: str) -> Any:
                return lambda x: (tagged(value(x), name=name, mode=mode), x)[1]

            return functools.partial(fn, one=branch(**default), other=branch(**{**default, **options}))

        for options, words in (
            ({"name": "b"}, "Missing sow in branch: 'a'"),
            ({"value": lambda x: x[:2]}, "Mismatched shape between branches: 'a'"),
            ({"value": lambda x: x.astype(jnp.int32)}, "Mismatched shape between branches: 'a'"),
            ({"value": lambda x: (x, x)}, "Mismatched shape between branches: 'a'"),
            ({"mode": "append"}, "Mismatched mode between branches: 'a' (append and strict"),
        ):
            with refuses(InvalidInputError, words, "test_mistakes.py"):
                reap(branches(**options), tag="t")(X)

    def test_branches_that_vmap_runs_both(self) -> None:
        def fn(x: Any, mode: str) -> Any:
            yes = lambda x: tagged(x * 2.0, name="a", mode=mode)  # noqa: E731  # the branch yes
            return lax.cond(x > 1.5, yes, lambda x: tagged(x, name="a", mode=mode), x)

        for mode, words in (
            ("clobber", "differs between examples of a vmap"),
            ("strict", "branches of a cond under vmap"),
        ):
            of_mode = functools.partial(fn, mode=mode)
            with refuses(InvalidInputError, words, "vmap(reap(f))", at="the branch yes"):
                reap(jax.vmap(of_mode), tag="t")(X)
            assert jnp.array_equal(jax.vmap(reap(of_mode, tag="t"))(X)["a"], jnp.where(X > 1.5, X * 2.0, X))

        # Two sows that clobber under vmap are no branches.
        def twice(x: Any) -> Any:
            tagged(x, name="a", mode="clobber")
            return tagged(jnp.where(x == 0, x, x * 2.0), name="a", mode="clobber")

        assert jnp.array_equal(reap(jax.vmap(twice), tag="t")(X)["a"], X * 2.0)

    def test_forms_that_a_predicate_would_choose_between(self) -> None:
        def fn(x: Any) -> Any:
            tagged(x, name="a", mode="clobber")
            return sow_cond(x[:2], True, tag="t", name="a")  # other form

        with refuses(InvalidInputError, "'a' is sown as", "under a predicate", at="other form"):
            reap(fn, tag="t")(X)

    def test_out_of_a_shard_map(self) -> None:
        mesh, spec = jax.make_mesh((2,), ("device",), axis_types=(AxisType.Auto,)), PartitionSpec("device")

        def fn(x: Any, **options: Any) -> Any:
            def body(x: Any) -> Any:
                return tagged(x * 2.0, name="a")  # in shard_map

            return jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, **options)(x)

        x = jnp.arange(4.0)
        for options in ({}, {"check_vma": False}):
            with refuses(InvalidInputError, "inside a shard_map", "no out_spec", at="in shard_map"):
                reap(functools.partial(fn, **options), tag="t")(x)
            with refuses(InvalidInputError, "inside a shard_map", at="in shard_map"):
                plant(functools.partial(fn, **options), tag="t")({"a": x}, x)

    def test_inside_what_cannot_be_opened(self) -> None:
        def fn(x: Any) -> Any:
            def matvec(x: Any) -> Any:
                return tagged(x * 2.0, name="a")  # in a solver

            return lax.custom_linear_solve(matvec, x, lambda _, b: b / 2.0, symmetric=True)

        with refuses(UnsupportedModelError, "custom_linear_solve", "cannot be opened", "test_mistakes.py"):
            reap(fn, tag="t")(X)


class TestPlanting:
    def fn(self, x: Any) -> Any:
        x = tagged(x, name="input")  # input
        return x + in_scan(lambda x: tagged(x + 1.0, name="steps", mode="append"), x)  # steps

    def test_a_name_nobody_sows(self) -> None:
        with refuses(UnknownNameError, "Nobody sows 'inputs' with tag 't' in plant(fn)", "'input'", "input, steps"):
            plant(self.fn, tag="t")({"inputs": X}, X)
        with refuses(UnknownNameError, "'s/input', 'other'"):
            plant(self.fn, tag="t")({"s/input": X, "other": X}, X)
        assert jnp.array_equal(plant(self.fn, tag="t", unknown="ignore")({"inputs": X}, X), X * 2.0 + 3.0)

    @pytest.mark.parametrize(
        ("value", "given"),
        [
            (jnp.ones(2), "float32[2]"),
            (jnp.ones((1, 3)), "float32[1, 3]"),
            (jnp.ones(3, jnp.int32), "int32[3]"),
            (jnp.ones(3, jnp.bfloat16), "bfloat16[3]"),
            (1.0, "float32[]"),
            ([X], "PyTreeDef([*])"),
            ({"a": X}, "PyTreeDef({'a': *})"),
            (None, "PyTreeDef(None)"),
            ("text", "str"),
        ],
    )
    def test_a_value_of_another_form(self, value: Any, given: str) -> None:
        with refuses(ShapeError, given, "plant(fn), sow input", at="input"):
            plant(self.fn, tag="t")({"input": value}, X)

    def test_as_many_values_as_iterations(self) -> None:
        with refuses(ShapeError, "float32[2, 3]", "float32[3, 3]", "sow steps", at="steps"):
            plant(self.fn, tag="t")({"steps": jnp.ones((2, 3))}, X)


class TestSites:
    def model(self, x: Any) -> Any:
        with layer_scope(0):
            x = sow(x * 2.0, name="mlp_out")  # mlp_out
        return sow(x, name="logits")

    def stacked(self, x: Any) -> Any:
        def body(x: Any) -> Any:
            with layer_scope(loop_layer()):
                return sow(x * 2.0, name="mlp_out")

        return in_scan(body, x)

    def test_a_site_that_is_never_reached(self) -> None:
        for run in (
            reap_sites(self.model, "mlp_outs"),
            intervene(self.model, {"mlp_outs": X}),
            harvest_sites(self.model, None, {"mlp_outs": X}),
            site_gradients(self.model, "mlp_outs"),
        ):
            with refuses(UnknownNameError, "Unknown site 'mlp_outs'", "Did you mean 'mlp_out'?", "mlp_out, logits"):
                run(X)
        with refuses(UnknownNameError, "Unknown site '7.mlp_out' in reap_sites", "layers 0 to 2"):
            reap_sites(self.stacked, ["7.mlp_out", "0.mlp_out"])(X)

    @pytest.mark.parametrize(
        ("value", "given"),
        [
            (jnp.ones(2), "float32[2]"),
            (lambda value: value[:2], "float32[2]"),
            (lambda value: value.astype(jnp.int32), "int32[3]"),
            (lambda value: (value, value), "PyTreeDef((*, *))"),
            (Masked(jnp.ones(2), True), "Masked(value=float32[2], mask=bool[])"),
            (Masked(0.0, jnp.ones(3)), "mask=float32[3]"),
        ],
    )
    def test_an_intervention_of_another_form(self, value: Any, given: str) -> None:
        for run in (intervene(self.model, {"mlp_out": value}), jax.jit(intervene(self.model, {"mlp_out": value}))):
            with refuses(ShapeError, given, "0.mlp_out of intervene(", at="mlp_out"):
                run(X)

    def test_a_traced_layer_is_a_scalar_integer(self) -> None:
        for layer, given in ((1.5, "float"), (jnp.float32(1), "float32[]"), (jnp.arange(2), "int32[2]"), ("1", "str")):
            with refuses(UnknownNameError, f"with a layer {given} was given", "a scalar integer as layer"):
                intervene(self.stacked, [(Site(layer, "mlp_out"), X)])(X)  # type: ignore[arg-type]
        with refuses(UnknownNameError, "Site(layer, 'mlp_outs')", "Did you mean 'mlp_out'?"):
            intervene(self.stacked, [(Site(jnp.int32(1), "mlp_outs"), X)])(X)  # type: ignore[arg-type]

    def test_one_site_in_two_places(self) -> None:
        def fn(x: Any) -> Any:
            for _ in range(2):
                with layer_scope(3):
                    x = sow(x * 2.0, name="a")  # twice
            return x

        with refuses(InvalidInputError, "already been reaped: 3.a", at="twice"):
            reap_sites(fn, "a")(X)
        # Both are changed all the same.
        assert jnp.array_equal(intervene(fn, {"a": lambda value: value + 1.0})(X), X * 4.0 + 3.0)

    def test_a_scan_over_layers_that_does_not_say_so(self) -> None:
        def fn(x: Any) -> Any:
            return in_scan(lambda x: sow(x * 2.0, name="a"), x)  # no layer

        with refuses(InvalidInputError, "Cannot use strict mode for 'a'", "layer_scope(loop_layer())", at="no layer"):
            reap_sites(fn, "a")(X)

    def test_layers_that_overlap(self) -> None:
        def body(x: Any) -> Any:
            with layer_scope(loop_layer(stride=2)):
                x = sow(x * 2.0, name="a")
            with layer_scope(loop_layer(stride=1, offset=1)):
                return sow(x + 1.0, name="a")  # overlapping

        with refuses(InvalidInputError, "already been reaped: 2.a", "keep the layers apart", at="overlapping"):
            reap_sites(lambda x: in_scan(body, x), "a")(X)

    def test_a_while_loop_over_layers(self) -> None:
        def fn(x: Any) -> Any:
            def body(x: Any) -> Any:
                with layer_scope(loop_layer()):
                    return sow(x * 2.0, name="a", mode="clobber")  # while over layers

            return lax.while_loop(lambda x: x[0] < 9, body, x)

        with refuses(InvalidInputError, "'*.a' is read, whose layer is the index", "lax.scan", at="while over layers"):
            reap_sites(fn, "0.a")(X)

    def test_loop_layer_outside_a_loop(self) -> None:
        def fn(x: Any) -> Any:
            with layer_scope(loop_layer()):
                return sow(x, name="a")

        with refuses(InvalidInputError, "outside any loop", "layer_scope(i)"):
            reap_sites(fn, "a")(X)

    def test_gradients(self) -> None:
        def fn(x: Any) -> Any:
            index = sow(jnp.argmax(x), name="index")  # integers
            x = sow(x, name="a", mode="clobber")
            x = sow(x * 2.0, name="a", mode="clobber")  # clobbered
            return sow(x * index.astype(jnp.float32), name="b")

        with refuses(InvalidInputError, "Site 'index' holds int32", "real numbers", at="integers"):
            site_gradients(fn, ["index", "b"], jnp.sum)(X)
        with refuses(InvalidInputError, "'a' is sown with mode clobber", at="clobbered"):
            site_gradients(fn, "a", jnp.sum)(X)
        for metric, given in ((lambda x: x[:, None], "float32[3, 1]"), (jnp.argmax, "int32[]")):
            with refuses(ShapeError, f"A metric of {given} was given in site_gradients", "one per example"):
                site_gradients(fn, "b", metric)(X)
