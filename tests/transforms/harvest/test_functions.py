"""reap, plant, harvest and nest: filters, tags, structure, composition, and what they do not disturb."""

from __future__ import annotations

import enum
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from interp_jax.transforms.harvest import call_and_reap, harvest, intervene, nest, plant, reap, sow, sow_cond
from interp_jax.transforms.jaxprs import inner_jaxprs
from tests.transforms.harvest.test_laws import assert_equal

X = jnp.array([1.0, 2.0, 3.0])
tagged = functools.partial(sow, tag="t")


def primitives(jaxpr: Any) -> list[str]:
    """Names of all equations, those inside others too."""
    names = []
    for eqn in jaxpr.eqns:
        names.append(eqn.primitive.name)
        for _, inner in inner_jaxprs(eqn):
            names += primitives(inner)
    return names


def two(x: Any) -> Any:
    return tagged(x * 2.0, name="a") + tagged(x + 1.0, name="b")


class TestFilters:
    def test_allowlist_and_blocklist(self) -> None:
        assert list(reap(two, tag="t", allowlist=["b"])(X)) == ["b"]
        assert list(reap(two, tag="t", blocklist=["b"])(X)) == ["a"]
        assert list(reap(two, tag="t", allowlist=["a", "b"], blocklist=["a"])(X)) == ["b"]
        # What is filtered out is not planted either, and is not an unknown name.
        assert_equal(plant(two, tag="t", allowlist=["a"])({"a": X, "b": X}, X), X + X + 1.0)

    def test_what_is_filtered_out_is_dropped(self) -> None:
        assert reap(reap(two, tag="t", blocklist=["b"]), tag="t")(X) == {}

    def test_a_path_picks_one_of_several_scopes(self) -> None:
        def fn(x: Any) -> Any:
            return nest(two, scope="first")(x) + nest(two, scope="second")(x)

        assert reap(fn, tag="t", allowlist=["second/a"])(X).keys() == {"second"}
        assert {scope: list(names) for scope, names in reap(fn, tag="t", allowlist=["a"])(X).items()} == {
            "first": ["a"],
            "second": ["a"],
        }

    def test_what_is_filtered_out_is_not_planted_in_a_scope_either(self) -> None:
        inner = nest(lambda x: sow(x * 2.0, tag="t", name="a"), scope="s")
        fn = lambda x: inner(x) + sow(x, tag="t", name="b")  # noqa: E731
        for filtered in (plant(fn, tag="t", allowlist=["b", "s"]), plant(fn, tag="t", blocklist=["a"])):
            assert filtered({"s": {"a": 100.0}, "b": 5.0}, 1.0) == 7.0
            assert filtered({"s": {"a": 100.0}}, 1.0) == 3.0

    def test_exclusive_drops_other_tags(self) -> None:
        def fn(x: Any) -> Any:
            return jax.jit(lambda x: sow(two(x), tag="other", name="c"))(x)

        assert list(reap(reap(fn, tag="t"), tag="other")(X)) == ["c"]
        assert list(reap(lambda x: call_and_reap(fn, tag="t")(x)[0], tag="other")(X)) == ["c"]
        assert reap(lambda x: call_and_reap(fn, tag="t", exclusive=True)(x)[0], tag="other")(X) == {}

    def test_other_tags_inside_a_call_with_a_rule_of_its_own_are_left_once(self) -> None:
        inner = jax.custom_jvp(lambda x: sow(sow(x * 2.0, tag="u", name="b"), tag="t", name="a"))
        inner.defjvp(lambda primals, tangents: (inner(*primals), tangents[0] * 5.0))
        fn = lambda x: inner(x) + 1.0  # noqa: E731
        (out, reaps), others = call_and_reap(call_and_reap(fn, tag="t"), tag="u")(3.0)
        assert (out, reaps, others) == (7.0, {"a": 6.0}, {"b": 6.0})
        assert jax.grad(lambda x: call_and_reap(call_and_reap(fn, tag="t"), tag="u")(x)[0][0])(3.0) == 5.0
        # The same by site: the sites of a function that is intervened on elsewhere.
        sited = lambda x: sow(inner(x), name="after")  # noqa: E731
        changed = intervene(sited, {"after": lambda value: value * 2.0})
        assert jax.grad(lambda x: call_and_reap(changed, tag="t")(x)[0])(3.0) == 10.0
        assert jax.value_and_grad(lambda x: call_and_reap(changed, tag="t")(x)[1]["a"])(3.0) == (6.0, 2.0)


class TestTagsAndNames:
    @pytest.mark.parametrize("tag", ["t", 3, 1.5, ("a", 1), frozenset({1}), enum.Enum("E", "A").A, functools.partial])
    def test_a_tag_is_anything_with_a_hash(self, tag: Any) -> None:
        fn = jax.jit(lambda x: sow(x * 2.0, tag=tag, name="a"))
        assert_equal(reap(fn, tag=tag)(X), {"a": X * 2.0})
        assert reap(fn, tag="other")(X) == {}

    def test_names_come_in_execution_order(self) -> None:
        def fn(x: Any) -> Any:
            for name in "zaqb":
                x = jax.jit(lambda x, name=name: tagged(x + 1.0, name=name))(x)
            return x

        assert list(reap(fn, tag="t")(X)) == list("zaqb")
        assert list(jax.vmap(reap(fn, tag="t"))(jnp.stack([X, X]))) == sorted("zaqb")  # As JAX sorts them.

    def test_sites_are_a_tag_like_any_other(self) -> None:
        assert_equal(reap(lambda x: sow(x, name="a"), tag="site")(X), {"a": X})

    def test_scopes_nest(self) -> None:
        fn = nest(jax.jit(nest(two, scope="in/ner.")), scope="outer")
        assert_equal(reap(fn, tag="t")(X), {"outer": {"in/ner.": {"a": X * 2.0, "b": X + 1.0}}})
        assert_equal(plant(fn, tag="t")({"outer": {"in/ner.": {"a": X}}}, X), X + X + 1.0)

    def test_a_dictionary_that_is_sown_is_no_scope(self) -> None:
        def fn(x: Any) -> Any:
            return tagged({"a": x, "b": {"c": x * 2.0}}, name="d")

        assert_equal(reap(fn, tag="t")(X), {"d": {"a": X, "b": {"c": X * 2.0}}})
        assert_equal(plant(fn, tag="t")({"d": {"a": X, "b": {"c": X}}}, X), {"a": X, "b": {"c": X}})


class TestValues:
    def test_pytrees_in_branches_and_loops(self) -> None:
        def value(x: Any) -> Any:
            return {"sin": jnp.sin(x), "rest": (x.sum(), [x > 1.0])}

        def branches(x: Any) -> Any:
            return lax.cond(x[0] > 0, lambda: tagged(value(x), name="a"), lambda: tagged(value(x * 2.0), name="a"))[
                "sin"
            ]

        def loop(x: Any) -> Any:
            def body(x: Any, _: Any) -> Any:
                tagged(value(x), name="all", mode="append")
                tagged(value(x), name="last", mode="clobber")
                sow_cond(value(x), x[0] < 1.5, tag="t", name="some")
                return x + 1.0, None

            return lax.scan(body, x, None, length=3)[0]

        assert_equal(reap(branches, tag="t")(X), {"a": value(X)})
        assert_equal(reap(branches, tag="t")(-X), {"a": value(-X * 2.0)})
        reaps = reap(loop, tag="t")(X)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(value(X + i) for i in (0.0, 1.0, 2.0)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), reaps["all"], stacked)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), reaps["last"], value(X + 2.0))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), reaps["some"], value(X))

    def test_random_keys(self, key: jax.Array) -> None:
        def draws(key: Any) -> Any:
            def body(key: Any, _: Any) -> Any:
                key, now = jax.random.split(key)
                now = tagged(now, name="all", mode="append")
                tagged(now, name="last", mode="clobber")
                sow_cond(now, True, tag="t", name="some")
                sow_cond(now, False, tag="t", name="none")
                return key, jax.random.normal(now)

            return lax.scan(body, key, None, length=3)[1]

        keys, rest = [], key
        for _ in range(3):
            rest, now = jax.random.split(rest)
            keys.append(now)
        numbers, reaps = jax.jit(call_and_reap(draws, tag="t"))(key)
        data = jax.tree.map(jax.random.key_data, reaps)
        assert_equal(data["all"], jnp.stack([jax.random.key_data(one) for one in keys]))
        assert_equal((data["last"], data["some"]), (data["all"][2], data["all"][2]))
        assert_equal(data["none"], np.zeros_like(data["last"]))
        assert_equal(plant(draws, tag="t")({"all": reaps["all"]}, rest), numbers)
        assert_equal(jax.vmap(plant(draws, tag="t"), (0, None))({"all": reaps["all"][None]}, rest)[0], numbers)

    def test_numbers_and_host_arrays_can_be_sown_and_planted(self) -> None:
        def fn(x: Any) -> Any:
            return x * tagged(2.0, name="number") + tagged(np.ones(3, np.float32), name="array")

        assert_equal(reap(fn, tag="t")(X), {"number": jnp.float32(2.0), "array": np.ones(3, np.float32)})
        assert_equal(plant(fn, tag="t")({"number": 3, "array": np.zeros(3, np.float32)}, X), X * 3.0)

    def test_a_value_depends_on_its_key(self) -> None:
        # `key` keeps a sow after what the key comes from.
        jaxpr = jax.make_jaxpr(lambda x: tagged(x, name="a", key=jnp.sin(x)))(X).jaxpr
        assert [eqn.primitive.name for eqn in jaxpr.eqns] == ["sin", "sow"]
        assert_equal(reap(lambda x: tagged(x, name="a", key={"k": x}), tag="t")(X), {"a": X})

    def test_zero_iterations(self) -> None:
        def fn(x: Any) -> Any:
            def body(x: Any, _: Any) -> Any:
                tagged(x, name="all", mode="append")
                tagged(x, name="last", mode="clobber")
                sow_cond(x, True, tag="t", name="some")
                return x * 2.0, None

            return lax.scan(body, x, None, length=0)[0]

        out, reaps = call_and_reap(fn, tag="t")(X)
        assert_equal(out, X)
        assert_equal(reaps, {"all": np.zeros((0, 3)), "last": np.zeros(3), "some": np.zeros(3)})
        assert_equal(plant(fn, tag="t")({"all": jnp.zeros((0, 3))}, X), X)


class TestConditional:
    def test_a_false_predicate_keeps_what_was_sown_before(self) -> None:
        def fn(x: Any, pred: Any) -> Any:
            tagged(x, name="a", mode="clobber")
            sow_cond(x * 2.0, pred, tag="t", name="a")
            sow_cond(x * 3.0, ~pred, tag="t", name="b")
            sow_cond(x * 4.0, pred, tag="t", name="b")
            return x

        run = jax.jit(reap(fn, tag="t"))
        assert_equal(run(X, True), {"a": X * 2.0, "b": X * 4.0})
        assert_equal(run(X, False), {"a": X, "b": X * 3.0})

    def test_planted_whatever_the_predicate(self) -> None:
        def fn(x: Any) -> Any:
            return lax.scan(lambda x, _: (sow_cond(x, x[0] > 1.5, tag="t", name="a") + 1.0, None), x, None, length=3)[0]

        assert_equal(plant(fn, tag="t")({"a": X * 5.0}, X), X * 5.0 + 1.0)

    def test_under_vmap_each_example_has_its_own(self) -> None:
        def fn(x: Any) -> Any:
            def body(x: Any, _: Any) -> Any:
                sow_cond(x * 10.0, x < 3.0, tag="t", name="a")
                return x + 1.0, None

            x, _ = lax.scan(body, x, None, length=3)
            sow_cond(x, x > 5.5, tag="t", name="a")
            return x

        truth = jax.vmap(lambda x: jnp.where(x + 3.0 > 5.5, x + 3.0, jnp.where(x < 3.0, 20.0, 0.0)))(X)
        assert_equal(jax.vmap(reap(fn, tag="t"))(X)["a"], truth)
        assert_equal(reap(jax.vmap(fn), tag="t")(X)["a"], truth)
        assert_equal(reap(jax.vmap(jax.vmap(fn)), tag="t")(jnp.stack([X, X * 0.5]))["a"][0], truth)


class TestUnderTransformations:
    def test_vmap_inside_puts_the_mapped_axis_first(self) -> None:
        x = jnp.arange(6.0).reshape(2, 3)
        mapped = jax.vmap(two, in_axes=1, out_axes=1)
        assert_equal(reap(mapped, tag="t")(x), {"a": x.T * 2.0, "b": x.T + 1.0})
        assert_equal(plant(mapped, tag="t")({"a": x.T * 0.0}, x), x + 1.0)
        # A value that is the same for all examples stays one value.
        assert_equal(reap(jax.vmap(lambda x: x + tagged(X, name="c")), tag="t")(x), {"c": X})

    def test_a_while_loop_that_ends_at_different_times(self) -> None:
        def fn(x: Any) -> Any:
            def body(x: Any) -> Any:
                sow_cond(x, x < 4.0, tag="t", name="some")
                tagged(jnp.float32(7.0), name="same", mode="clobber")
                return tagged(x * 2.0, name="last", mode="clobber")

            return lax.while_loop(lambda x: x < 10.0, body, x)

        xs = jnp.array([1.0, 3.0, 5.0, 20.0])
        truth = jax.vmap(call_and_reap(fn, tag="t"))(xs)
        out, reaps = call_and_reap(jax.vmap(fn), tag="t")(xs)
        assert_equal((out, reaps["last"], reaps["some"]), (truth[0], truth[1]["last"], truth[1]["some"]))
        assert_equal(reaps["same"], jnp.float32(7.0))
        grid = jnp.stack([xs, xs + 1.0])
        twice = reap(jax.vmap(jax.vmap(fn)), tag="t")(grid)
        assert_equal(twice["last"], jax.vmap(jax.vmap(reap(fn, tag="t")))(grid)["last"])

    def test_derivatives_with_respect_to_what_is_planted_and_of_what_is_reaped(self) -> None:
        def fn(x: Any) -> Any:
            return jnp.sum(tagged(x * x, name="a") * 3.0)

        assert_equal(jax.grad(lambda a: plant(fn, tag="t")({"a": a}, X))(X), jnp.full(3, 3.0))
        assert_equal(jax.grad(lambda x: reap(fn, tag="t")(x)["a"].sum())(X), 2.0 * X)
        assert_equal(reap(jax.grad(fn), tag="t")(X), {"a": X * X})

    def test_closing_over_values_of_a_trace_under_way(self) -> None:
        def metric(scale: Any) -> Any:
            def fn(x: Any) -> Any:
                return jax.jit(lambda x: tagged(x * scale, name="a"))(x) * scale

            out, reaps = call_and_reap(fn, tag="t")(X)
            planted = plant(fn, tag="t")({"a": reaps["a"] * scale}, X)
            return jnp.sum(out + reaps["a"] + planted)

        def truth(s: Any) -> Any:
            return jnp.sum(X * s * s + X * s + X * s * s * s)

        two = jnp.float32(2.0)
        for wrap in (lambda f: f, jax.jit):
            np.testing.assert_allclose(wrap(metric)(two), truth(two), rtol=1e-6)
            np.testing.assert_allclose(wrap(jax.grad(metric))(two), jax.grad(truth)(two), rtol=1e-6)
        np.testing.assert_allclose(jax.vmap(metric)(jnp.array([2.0, 3.0])), [truth(2.0), truth(3.0)], rtol=1e-6)
        with jax.checking_leaks():
            jax.jit(jax.grad(metric))(two)

    def test_keyword_arguments_and_constants(self) -> None:
        def fn(x: Any, mode: str, *, scale: float = 1.0, flag: bool) -> Any:
            assert mode == "sin" and flag is True
            return tagged(jnp.sin(x) * scale, name="a")

        assert_equal(reap(fn, tag="t")(X, "sin", scale=2.0, flag=True), {"a": jnp.sin(X) * 2.0})
        planted = jax.jit(plant(fn, tag="t"), static_argnums=2, static_argnames="flag")
        assert_equal(planted({"a": X}, X, "sin", flag=True), X)
        reaped = jax.jit(reap(fn, tag="t"), static_argnames=("mode", "flag"))
        assert_equal(reaped(X, "sin", flag=True), {"a": jnp.sin(X)})

    def test_shardings_of_a_jit_stay(self) -> None:
        mesh = jax.make_mesh((2,), ("device",), axis_types=(AxisType.Auto,))
        split, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("device",), ()))
        fn = jax.jit(lambda x: tagged(x * 2.0, name="a") + 1.0, in_shardings=split, out_shardings=whole)
        x = jnp.arange(4.0)
        out, reaps = jax.jit(call_and_reap(fn, tag="t"))(x)
        assert_equal((out, reaps), (x * 2.0 + 1.0, {"a": x * 2.0}))
        assert out.sharding.is_equivalent_to(whole, 1)
        assert reaps["a"].sharding.is_equivalent_to(split, 1)

    def test_the_function_of_a_harvested_jaxpr_is_a_program_like_any_other(self) -> None:
        closed = jax.make_jaxpr(call_and_reap(two, tag="t"))(X)
        assert_equal(jaxpr_as_fun(closed)(X), [X * 2.0 + X + 1.0, X * 2.0, X + 1.0])


class TestCallsStayCalls:
    def test_one_jit_stays_one_jit_of_its_name(self) -> None:
        @jax.jit
        def inner(x: Any) -> Any:
            return two(x)

        jaxpr = jax.make_jaxpr(reap(lambda x: inner(x) * 2.0, tag="t"))(X).jaxpr
        (call,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name in ("jit", "pjit"))
        assert call.params["name"] == "inner"

    def test_a_checkpoint_is_still_computed_again(self) -> None:
        def fn(x: Any) -> Any:
            return jax.checkpoint(lambda x: jnp.sin(tagged(jnp.sin(x), name="a")))(x).sum()

        def recomputations(fn: Any) -> list[bool]:
            eqns = jax.make_jaxpr(fn)(X).jaxpr.eqns
            return [eqn.params["differentiated"] for eqn in eqns if "prevent_cse" in eqn.params]

        plain = recomputations(jax.grad(fn))
        assert True in plain
        for of in (
            lambda x: call_and_reap(jax.grad(fn), tag="t")(x),
            lambda x: plant(jax.grad(fn), tag="t")({"a": X}, x),
            jax.grad(lambda x: call_and_reap(fn, tag="t")(x)[0]),
        ):
            assert recomputations(of) == plain
            assert "optimization_barrier" in jax.jit(of).lower(X).as_text()
            assert "sow" not in str(jax.make_jaxpr(of)(X))

    def test_a_checkpoint_policy_stays(self) -> None:
        policy = jax.checkpoint_policies.dots_saveable
        fn = jax.checkpoint(lambda x: tagged(jnp.sin(x @ jnp.ones((3, 3))), name="a").sum(), policy=policy)
        (eqn,) = (eqn for eqn in jax.make_jaxpr(reap(fn, tag="t"))(X).jaxpr.eqns if "prevent_cse" in eqn.params)
        assert eqn.params["policy"] is policy

    def test_a_custom_rule_stays_in_force_and_what_is_read_has_the_derivative_of_the_code(self) -> None:
        def code(x: Any) -> Any:
            return tagged(x * x, name="a") * 2.0

        for fn in (jax.custom_jvp(code), jax.custom_vjp(code)):
            if isinstance(fn, jax.custom_jvp):
                fn.defjvp(lambda primals, tangents, fn=fn: (fn(*primals), tangents[0] * 7.0))
            else:
                fn.defvjp(lambda x, fn=fn: (fn(x), None), lambda _, g: (g * 7.0,))
            harvested = call_and_reap(fn, tag="t")
            for wrap in (lambda f: f, jax.jit):
                assert_equal(jax.grad(wrap(lambda x, h=harvested: h(x)[0].sum()))(X), jnp.full(3, 7.0))
                assert_equal(jax.grad(wrap(lambda x, h=harvested: h(x)[1]["a"].sum()))(X), 2.0 * X)
                planted = wrap(lambda x, fn=fn: plant(fn, tag="t")({"a": x * x * x}, x).sum())
                assert_equal(jax.grad(planted)(X), 6.0 * X * X)
            if isinstance(fn, jax.custom_jvp):
                assert_equal(jax.jvp(lambda x, h=harvested: h(x)[1]["a"], (X,), (jnp.ones(3),))[1], 2.0 * X)

    def test_code_without_a_derivative_behind_a_rule(self) -> None:
        @jax.custom_vjp
        def fn(x: Any) -> Any:
            x = jax.jit(lambda x: tagged(x * 2.0, name="a"))(x)
            return jax.pure_callback(lambda x: np.asarray(x) * 3.0, jax.ShapeDtypeStruct((3,), jnp.float32), x)

        fn.defvjp(lambda x: (fn(x), None), lambda _, g: (g * 7.0,))

        def total(x: Any) -> Any:
            out, reaps = call_and_reap(fn, tag="t")(x)
            return out.sum(), reaps

        assert_equal(jax.grad(total, has_aux=True)(X), (jnp.full(3, 7.0), {"a": X * 2.0}))

    def test_ordered_effects_stay_in_order(self) -> None:
        calls: list[tuple[str, float]] = []

        def note(name: str, value: Any) -> None:
            jax.debug.callback(lambda value: calls.append((name, float(value[0]))), value, ordered=True)

        def fn(x: Any) -> Any:
            def body(x: Any, _: Any) -> Any:
                note("before", x)
                x = tagged(x + 1.0, name="a", mode="append")
                note("after", x)
                return x, None

            x = jax.jit(lambda x: lax.scan(body, x, None, length=2)[0])(x)

            def yes(x: Any) -> Any:
                note("yes", x)
                return tagged(x, name="b")

            return lax.cond(x[0] > 0, yes, lambda x: tagged(x, name="b"), x)

        expected = [("before", 1.0), ("after", 2.0), ("before", 2.0), ("after", 3.0), ("yes", 3.0)]
        for run in (fn, reap(fn, tag="t"), jax.jit(reap(fn, tag="t"))):
            calls.clear()
            jax.block_until_ready(run(X))
            jax.effects_barrier()
            assert calls == expected


class TestShardMap:
    spec = PartitionSpec("device")

    def mapped(self, body: Any) -> Any:
        mesh = jax.make_mesh((2,), ("device",), axis_types=(AxisType.Auto,))
        return jax.shard_map(body, mesh=mesh, in_specs=self.spec, out_specs=self.spec)

    def test_what_all_devices_share_can_be_reaped_and_planted(self) -> None:
        def fn(x: Any) -> Any:
            def body(x: Any) -> Any:
                mean = tagged(lax.psum(x.sum(), "device"), name="total")
                return x - mean

            return self.mapped(body)(x)

        x = jnp.arange(4.0)
        for run in (call_and_reap(fn, tag="t"), jax.jit(call_and_reap(fn, tag="t"))):
            assert_equal(run(x), (x - 6.0, {"total": jnp.float32(6.0)}))
        assert_equal(plant(fn, tag="t")({"total": 1.0}, x), x - 1.0)
        assert_equal(jax.jit(plant(fn, tag="t"))({"total": jnp.float32(1.0)}, x), x - 1.0)
        assert_equal(jax.grad(lambda t: plant(fn, tag="t")({"total": t}, x).sum())(jnp.float32(1.0)), jnp.float32(-4.0))

    def test_what_is_not_wanted_is_dropped(self) -> None:
        def fn(x: Any) -> Any:
            return self.mapped(lambda x: tagged(x * 2.0, name="a"))(x)

        x = jnp.arange(4.0)
        assert_equal(call_and_reap(fn, tag="t", blocklist=["a"])(x), (x * 2.0, {}))
        assert "sow" in primitives(jax.make_jaxpr(reap(fn, tag="other"))(x).jaxpr)
        assert "sow" not in primitives(jax.make_jaxpr(reap(fn, tag="t", blocklist=["a"]))(x).jaxpr)
        assert "sow" not in primitives(jax.make_jaxpr(reap(fn, tag="other", exclusive=True))(x).jaxpr)


def test_an_exception_inside_leaves_jax_clean() -> None:
    def failing(x: Any) -> Any:
        def body(x: Any, _: Any) -> Any:
            tagged(x, name="a", mode="append")
            raise KeyError("inside")

        return jax.jit(lambda x: lax.scan(body, x, None, length=2)[0])(x)

    for run in (reap(failing, tag="t"), jax.jit(reap(failing, tag="t")), jax.vmap(reap(failing, tag="t"))):
        with pytest.raises(KeyError, match="inside"):
            run(X)
    with pytest.raises(ValueError, match="already been reaped"):
        jax.jit(reap(lambda x: two(x) + two(x), tag="t"))(X)
    with jax.checking_leaks():
        assert_equal(jax.jit(reap(two, tag="t"))(X), {"a": X * 2.0, "b": X + 1.0})
        assert_equal(jax.jit(jax.grad(lambda x: jnp.sum(x * x)))(X), 2.0 * X)


def test_a_sow_nobody_reads_is_gone_from_an_ordinary_program() -> None:
    def fn(x: Any) -> Any:
        tagged(jnp.sin(x), name="a")
        return lax.scan(lambda x, _: (x + tagged(x, name="b", mode="append"), None), x, None, length=2)[0]

    text = jax.jit(fn).lower(X).as_text()
    assert "sine" not in text
    assert jax.make_jaxpr(fn)(X).effects == set()
    # Harvested first, then as it is: the traces are kept apart.
    reap(fn, tag="t")(X)
    assert jax.jit(fn).lower(X).as_text() == text


def test_plant_leaves_other_sows_for_others() -> None:
    planted = functools.partial(plant(two, tag="t"), {"a": X})
    assert_equal(reap(planted, tag="t")(X), {"b": X + 1.0})
    harvested = call_and_reap(lambda x: harvest(two, tag="t")({"a": X}, x), tag="t")
    assert_equal(harvested(X), ((X + X + 1.0, {"b": X + 1.0}), {}))
