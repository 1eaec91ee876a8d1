"""Harvest by site against plain Python: reading, changing, gradients, scans over layers, composition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import interp_jax as ij
from interp_jax.core.activations import Activations
from interp_jax.core.errors import UnknownNameError
from interp_jax.core.interventions import Masked
from interp_jax.core.sites import Site
from interp_jax.transforms.harvest import (
    harvest_sites,
    intervene,
    layer_scope,
    loop_layer,
    reap,
    reap_sites,
    site_gradients,
    site_vjp,
    sow,
)
from interp_jax.transforms.jaxprs import scan_counts
from interp_jax.transforms.running_pass import run
from tests.transforms.harvest.contexts import op_by_op
from tests.transforms.running_pass.programs import PROGRAMS, Plain, jax_form

X = jnp.array([0.3, 0.7, 1.1])
# A site that is visited several times cannot be read as one; in the others a loop cannot be followed.
ONCE = [name for name in PROGRAMS if name not in ("nested_scan", "branching", "looping")]
NAMES = list(PROGRAMS)


def change(site: Site, value: Any) -> Any:
    """A different change for each site."""
    factor = 1.0 + 0.1 * (site.layer or 0) + 0.01 * len(site.name)
    return jax.tree.map(lambda leaf: leaf * factor + 0.05, value)


Visits = list[tuple[Site, Any]]


def plain(name: str, x: Any, visit: Callable[[Site, Any], Any] = lambda site, value: value) -> tuple[Any, Visits]:
    """The result, and what is seen at each site after `visit` has changed it."""
    seen: Visits = []

    def record(site: Site, value: Any) -> Any:
        value = visit(site, value)
        seen.append((site, value))
        return value

    return PROGRAMS[name](Plain(record), x), seen


def assert_close(ours: Any, truth: Any, tolerance: float = 2e-6) -> None:
    if isinstance(truth, Activations):
        assert list(ours) == list(truth)
        ours, truth = list(ours.values()), list(truth.values())
    assert jax.tree.structure(ours) == jax.tree.structure(truth)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, truth)


def total(result: Any) -> Any:
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(result))


class TestProgramsInEveryKindOfPlace:
    @pytest.mark.parametrize("name", ONCE)
    def test_reads_every_site_with_its_value(self, name: str) -> None:
        out, seen = plain(name, X)
        for wrap in (lambda f: f, jax.jit):
            result, activations = wrap(harvest_sites(jax_form(name), None))(X)
            assert list(activations) == [site for site, _ in seen]
            assert_close(result, out)
            assert_close(list(activations.values()), [value for _, value in seen])
        assert_close(reap_sites(jax_form(name), None)(X), activations)

    @pytest.mark.parametrize("name", ONCE)
    def test_reads_each_site_alone(self, name: str) -> None:
        for site, value in plain(name, X)[1]:
            (read,) = reap_sites(jax_form(name), site)(X).items()
            assert read[0] == site
            assert_close(read[1], value)

    @pytest.mark.parametrize("name", NAMES)
    def test_changes_at_every_site_have_their_effect(self, name: str) -> None:
        out, seen = plain(name, X, change)
        edits = [(site, lambda value, site=site: change(site, value)) for site in dict.fromkeys(s for s, _ in seen)]
        for wrap in (lambda f: f, jax.jit):
            assert_close(wrap(intervene(jax_form(name), edits))(X), out)
        if name in ONCE:
            result, activations = jax.jit(harvest_sites(jax_form(name), None, edits))(X)
            assert_close(result, out)
            assert_close(list(activations.values()), [value for _, value in seen])

    @pytest.mark.parametrize("name", NAMES)
    def test_each_site_alone_can_be_changed(self, name: str) -> None:
        for chosen in dict.fromkeys(site for site, _ in plain(name, X)[1]):

            def visit(site: Site, value: Any, chosen: Site = chosen) -> Any:
                return change(site, value) if site == chosen else value

            truth, _ = plain(name, X, visit)
            edits = {chosen: lambda value, chosen=chosen: change(chosen, value)}
            assert_close(jax.jit(intervene(jax_form(name), edits))(X), truth)

    @pytest.mark.parametrize("name", ONCE)
    def test_planting_what_was_read_changes_nothing(self, name: str) -> None:
        out = jax_form(name)(X)
        activations = reap_sites(jax_form(name), None)(X)
        assert_close(intervene(jax_form(name), dict(activations))(X), out, 1e-6)
        # One at a time, every operation evaluated by itself: to the last bit.
        every = op_by_op(harvest_sites(jax_form(name), None), X)
        activations = jax.tree.unflatten(jax.tree.structure(activations), every[-len(jax.tree.leaves(activations)) :])
        for site, value in activations.items():
            again = op_by_op(harvest_sites(jax_form(name), None, {site: value}), X)
            jax.tree.map(np.testing.assert_array_equal, again, every)

    @pytest.mark.parametrize("name", [name for name in ONCE if name != "custom_rule"])
    def test_gradients_at_every_site(self, name: str) -> None:
        metric, activations, gradients = jax.jit(site_gradients(jax_form(name), None, total))(X)
        out, seen = plain(name, X)
        assert_close(metric, total(out), 1e-5)
        assert list(gradients) == list(activations) == [site for site, _ in seen]

        def with_added(added: Any, chosen: Site) -> Any:
            def visit(site: Site, value: Any) -> Any:
                return jax.tree.map(jnp.add, value, added) if site == chosen else value

            return total(plain(name, X, visit)[0])

        for chosen, seen_here in seen:
            truth = jax.grad(with_added)(jax.tree.map(jnp.zeros_like, seen_here), chosen)
            assert_close(gradients[chosen], truth, 1e-5)
            (alone,) = site_gradients(jax_form(name), chosen, total)(X)[2].values()
            assert_close(alone, truth, 1e-5)

    @pytest.mark.parametrize("name", [name for name in NAMES if name not in ("branching", "looping")])
    def test_gradients_and_vmap_through_interventions(self, name: str) -> None:
        sites = dict.fromkeys(site for site, _ in plain(name, X)[1])
        intervened = intervene(jax_form(name), [(s, lambda value, s=s: change(s, value)) for s in sites])

        def truth(x: Any) -> Any:
            return total(plain(name, x, change)[0])

        xs = jnp.stack([X, X * 0.5])
        assert_close(jax.jit(jax.grad(lambda x: total(intervened(x))))(X), jax.grad(truth)(X), 1e-5)
        assert_close(jax.vmap(lambda x: total(intervened(x)))(xs), jnp.stack([truth(x) for x in xs]), 1e-5)
        with jax.checking_leaks():
            jax.jit(jax.grad(lambda x: total(intervened(x))))(X)

    @pytest.mark.parametrize("name", NAMES)
    def test_reading_nothing_and_changing_nothing_is_the_plain_function(self, name: str) -> None:
        def text(fn: Callable[[Any], Any]) -> str:
            def same_name(x: Any) -> Any:
                return fn(x)

            return jax.jit(same_name).lower(X).as_text()

        plain_text = text(lambda x: jax_form(name)(x))
        assert text(intervene(jax_form(name), {})) == plain_text
        assert text(lambda x: harvest_sites(jax_form(name), ())(x)[0]) == plain_text
        assert "sow" not in str(jax.make_jaxpr(reap_sites(jax_form(name), ()))(X))


# --- a stacked model, and the same one unrolled ---------------------------------------------------------------------

N_LAYERS, D = 6, 4


def layer(weights: Any, x: Any) -> Any:
    x = sow(x, name="resid_pre")
    out = sow(jnp.tanh(x @ weights), name="mlp_out")
    return sow(x + out, name="resid_post")


def stacked(weights: Any, x: Any, *, checkpoint: bool = False) -> Any:
    def body(x: Any, row: Any) -> Any:
        with layer_scope(loop_layer()):
            return (jax.checkpoint(layer) if checkpoint else layer)(row, x), None

    return sow(lax.scan(body, sow(x, name="embed"), weights)[0], name="ln_final")


def checkpointed(weights: Any, x: Any) -> Any:
    return stacked(weights, x, checkpoint=True)


def unrolled(weights: Any, x: Any) -> Any:
    x = sow(x, name="embed")
    for i, row in enumerate(weights):
        with layer_scope(i):
            x = layer(row, x)
    return sow(x, name="ln_final")


@pytest.fixture
def weights(key: jax.Array) -> jax.Array:
    return jax.random.normal(key, (N_LAYERS, D, D)) * 0.4


BATCH = jnp.linspace(-1.0, 1.0, 2 * D).reshape(2, D)


def _even_resid_pre(site: Site) -> bool:
    return site.layer in (0, 2, 4) and site.name == "resid_pre"


def _select_id(select: Any) -> str:
    return getattr(select, "__name__", str(select))


SELECTORS = (
    "3.mlp_out",
    ["0.mlp_out", "5.mlp_out"],
    "mlp_out",
    range(1, 3),
    ["embed", "2.*", "ln_final"],
    "blocks.4.hook_resid_post",
    _even_resid_pre,
    None,
)


class TestScanOverLayers:
    @pytest.mark.parametrize("select", SELECTORS, ids=_select_id)
    def test_reads_what_the_unrolled_model_has(self, weights: Any, select: Any) -> None:
        out, activations = jax.jit(harvest_sites(unrolled, select))(weights, BATCH)
        for fn in (stacked, checkpointed):
            result, read = jax.jit(harvest_sites(fn, select))(weights, BATCH)
            assert list(read) == list(activations)
            assert_close((result, list(read.values())), (out, list(activations.values())), 1e-5)

    @pytest.mark.parametrize("select", SELECTORS, ids=_select_id)
    def test_gradients_are_those_of_the_unrolled_model(self, weights: Any, select: Any) -> None:
        def metric(out: Any) -> Any:
            return jnp.sum(out * jnp.arange(1.0, D + 1)[None], axis=-1)  # One per example.

        truth = jax.jit(site_gradients(unrolled, select, metric))(weights, BATCH)
        assert truth[0].shape == (2,)
        for fn in (stacked, checkpointed):
            mine = jax.jit(site_gradients(fn, select, metric))(weights, BATCH)
            for ours, theirs in zip(mine, truth, strict=True):
                assert_close(ours, theirs, 1e-5)

    def test_gradients_are_finite_differences(self, weights: Any) -> None:
        def at(added: Any) -> Any:
            return total(intervene(checkpointed, {"2.mlp_out": lambda value: value + added})(weights, BATCH))

        gradient = site_gradients(checkpointed, "2.mlp_out", total)(weights, BATCH)[2]["2.mlp_out"]
        step = 1e-2
        for index in np.ndindex(2, D):
            bump = jnp.zeros((2, D)).at[index].set(step)
            np.testing.assert_allclose(gradient[index], (at(bump) - at(-bump)) / (2 * step), rtol=2e-3, atol=2e-4)

    def test_pullbacks_of_the_result_and_of_sites(self, weights: Any) -> None:
        select = ["resid_pre", "mlp_out"]

        def both(fn: Any, weights: Any) -> Any:
            result, activations, pullback = site_vjp(fn, select)(weights, BATCH)
            at_3 = pullback(jnp.zeros_like(result), {Site(3, "resid_pre"): jnp.ones_like(BATCH)})
            return (result, activations), pullback(jnp.ones_like(result), {}), at_3

        value, activations, gradients = site_gradients(unrolled, select, total)(weights, BATCH)
        truncated = site_gradients(lambda w, x: unrolled(w[:3], x), select, total)(weights, BATCH)[2]
        for fn in (stacked, checkpointed, unrolled):
            (result, read), of_result, at_3 = jax.jit(both, static_argnums=0)(fn, weights)
            assert_close(total(result), value, 1e-5)
            assert_close(read, activations, 1e-5)
            assert_close(of_result, gradients, 1e-5)
            # What reaches a site through the input of layer 3: the gradient in the model that ends there.
            for site, value_at in at_3.items():
                if site in truncated:
                    assert_close(value_at, truncated[site], 1e-5)
                else:
                    np.testing.assert_array_equal(value_at, float(site == Site(3, "resid_pre")))

    def test_a_cotangent_of_a_site_not_selected_is_refused(self, weights: Any) -> None:
        result, _, pullback = site_vjp(unrolled, "mlp_out")(weights, BATCH)
        with pytest.raises(UnknownNameError, match=r"3\.resid_pre"):
            pullback(result, {Site(3, "resid_pre"): BATCH})

    def test_parameters_and_sites_have_gradients_together(self, weights: Any) -> None:
        def loss(weights: Any, fn: Any) -> Any:
            out, activations = harvest_sites(fn, "1.mlp_out")(weights, BATCH)
            return total(out) + total(activations["1.mlp_out"] ** 2)

        truth = jax.jit(jax.grad(loss), static_argnums=1)(weights, unrolled)
        for fn in (stacked, checkpointed):
            assert_close(jax.jit(jax.grad(loss), static_argnums=1)(weights, fn), truth, 1e-5)

    def test_a_sweep_over_layers_compiles_once(self, weights: Any) -> None:
        def ablated(fn: Any, at: Any) -> Any:
            return intervene(fn, [(Site(at, "mlp_out"), lambda value: value * 0.0)])(weights, BATCH)

        for fn in (stacked, unrolled):
            traced = []

            def one(at: Any, fn: Any = fn, traced: list[Any] = traced) -> Any:
                traced.append(at)
                return ablated(fn, at)

            sweep = jax.jit(one)
            for i in range(N_LAYERS):
                truth = intervene(unrolled, {f"{i}.mlp_out": jnp.zeros((2, D))})(weights, BATCH)
                assert_close(sweep(i), truth, 1e-5)
                assert_close(sweep(np.int32(i)), truth, 1e-5)
            assert len(traced) == 2  # One for weakly typed numbers, one for int32.
            assert_close(sweep(N_LAYERS), fn(weights, BATCH), 1e-5)
            assert_close(sweep(-1), fn(weights, BATCH), 1e-5)
            layers = jnp.arange(N_LAYERS, dtype=jnp.uint8)
            mapped = jax.vmap(lambda at, fn=fn: ablated(fn, at))(layers)
            assert_close(mapped, jnp.stack([sweep(i) for i in layers]), 1e-5)

    def test_reads_and_changes_together(self, weights: Any) -> None:
        direction = jnp.arange(1.0, D + 1)
        edits = {"1.mlp_out": lambda value: value + direction[None], "3.resid_pre": jnp.zeros((2, D))}
        truth = harvest_sites(unrolled, "*.resid_p*", edits)(weights, BATCH)
        mine = harvest_sites(stacked, "*.resid_p*", edits)(weights, BATCH)
        assert_close(jax.tree.leaves(mine), jax.tree.leaves(truth), 1e-5)
        np.testing.assert_array_equal(mine[1]["3.resid_pre"], 0.0)

    def test_several_changes_at_one_site_act_in_order(self, weights: Any) -> None:
        double, add = (lambda value: value * 2.0), (lambda value: value + 1.0)
        for fn in (stacked, unrolled):
            value = reap_sites(fn, "2.mlp_out")(weights, BATCH)["2.mlp_out"]
            for edits, expected in (
                ([("2.mlp_out", double), (["2.mlp_out", "4.mlp_out"], add)], value * 2.0 + 1.0),
                ([(Site(jnp.int32(2), "mlp_out"), add), ("2.mlp_out", double)], (value + 1.0) * 2.0),
                (
                    {"2.mlp_out": Masked(5.0, BATCH > 0), "[23].mlp_out": double},
                    jnp.where(BATCH > 0, 10.0, value * 2.0),
                ),
            ):
                read = harvest_sites(fn, "2.mlp_out", edits)(weights, BATCH)[1]["2.mlp_out"]
                assert_close(read, expected, 1e-5)

    def test_splices_at_every_layer_compound(self, weights: Any, rng: np.random.Generator) -> None:
        # A dictionary put in the place of each residual, each layer's input being the last layer's reconstruction.
        encode, decode = (jnp.asarray(rng.normal(size=shape), jnp.float32) * 0.5 for shape in ((D, 8), (8, D)))

        def sae(value: Any) -> Any:
            return jax.nn.relu(value @ encode) @ decode

        x = BATCH
        for i in range(N_LAYERS):
            x = sae(x + jnp.tanh(x @ weights[i]))
        for fn in (stacked, unrolled, checkpointed):
            spliced = intervene(fn, {"resid_post": sae})
            assert_close(jax.jit(spliced)(weights, BATCH), x, 1e-5)
            gradient = jax.jit(jax.grad(lambda w, f=spliced: total(f(w, BATCH))))(weights)
            truth = jax.grad(lambda w: total(intervene(unrolled, {"resid_post": sae})(w, BATCH)))(weights)
            assert_close(gradient, truth, 1e-4)

    def test_gradients_at_changed_values(self, weights: Any) -> None:
        edits = {"2.resid_pre": lambda value: value * 0.5}
        truth = site_gradients(unrolled, "mlp_out", total, interventions=edits)(weights, BATCH)
        mine = site_gradients(stacked, "mlp_out", total, interventions=edits)(weights, BATCH)
        assert_close(jax.tree.leaves(mine), jax.tree.leaves(truth), 1e-5)
        plain = site_gradients(stacked, "mlp_out", total)(weights, BATCH)
        assert not np.allclose(plain[2]["1.mlp_out"], mine[2]["1.mlp_out"])

    def test_an_array_may_be_traced(self, weights: Any) -> None:
        def effect(fn: Any, value: Any) -> Any:
            return total(intervene(fn, {"3.mlp_out": value})(weights, BATCH))

        value = jnp.ones((2, D))
        truth = jax.grad(lambda value: effect(unrolled, value))(value)
        assert_close(jax.jit(jax.grad(lambda value: effect(stacked, value)))(value), truth, 1e-5)
        assert_close(jax.vmap(lambda v: effect(stacked, v))(value[None]), effect(unrolled, value)[None], 1e-5)

    def test_only_what_is_asked_for_leaves_the_scan(self, weights: Any) -> None:
        """The carry holds as many slots as layers are read; all of them leave stacked."""

        def scan_of(select: Any) -> Any:
            jaxpr = jax.make_jaxpr(reap_sites(stacked, select))(weights, BATCH).jaxpr
            (eqn,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
            _, n_carry = scan_counts(eqn)
            shapes = [var.aval.shape for var in eqn.outvars]
            return shapes[1:n_carry], shapes[n_carry:]

        assert scan_of("3.mlp_out") == ([(1, 2, D)], [])
        assert scan_of(["1.mlp_out", "4.mlp_out", "2.resid_pre"]) == ([(1, 2, D), (2, 2, D)], [])
        assert scan_of("mlp_out") == ([], [(N_LAYERS, 2, D)])


class TestScansOfOtherShapes:
    def test_groups_of_alternating_layers(self, weights: Any) -> None:
        def groups(weights: Any, x: Any) -> Any:
            def body(x: Any, pair: Any) -> Any:
                for offset in range(2):
                    with layer_scope(loop_layer(stride=2, offset=offset)):
                        x = layer(pair[offset] * (1.0 + offset), x)
                return x, None

            return lax.scan(body, x, weights.reshape(N_LAYERS // 2, 2, D, D))[0]

        def one_by_one(weights: Any, x: Any) -> Any:
            for i in range(N_LAYERS):
                with layer_scope(i):
                    x = layer(weights[i] * (1.0 + i % 2), x)
            return x

        for select in ("3.mlp_out", ["0.mlp_out", "5.mlp_out"], "mlp_out", range(1, 4)):
            truth = jax.jit(site_gradients(one_by_one, select, total))(weights, BATCH)
            mine = jax.jit(site_gradients(groups, select, total))(weights, BATCH)
            assert list(mine[1]) == list(truth[1])
            assert_close(jax.tree.leaves(mine), jax.tree.leaves(truth), 1e-5)
        for i in range(N_LAYERS):
            edits = [(Site(jnp.int32(i), "mlp_out"), lambda value: value * 0.0)]
            assert_close(intervene(groups, edits)(weights, BATCH), intervene(one_by_one, edits)(weights, BATCH), 1e-5)

    def test_layers_of_two_scans(self, weights: Any) -> None:
        def two(weights: Any, x: Any) -> Any:
            for offset in (0, 4):

                def body(x: Any, row: Any, offset: int = offset) -> Any:
                    with layer_scope(loop_layer(offset=offset)):
                        return layer(row, x), None

                x = lax.scan(body, x, weights[offset : offset + 4])[0]
            return x

        def one_by_one(weights: Any, x: Any) -> Any:
            return unrolled(weights, x)

        for select in ("5.mlp_out", "1.mlp_out", ["3.mlp_out", "4.mlp_out"], "mlp_out"):
            truth = jax.jit(site_gradients(one_by_one, select, total))(weights, BATCH)
            mine = jax.jit(site_gradients(two, select, total))(weights, BATCH)
            assert_close(jax.tree.leaves(mine), jax.tree.leaves(truth), 1e-5)

    def test_layers_in_reverse(self, weights: Any) -> None:
        def backwards(weights: Any, x: Any) -> Any:
            def body(x: Any, row: Any) -> Any:
                with layer_scope(loop_layer()):
                    return layer(row, x), None

            return lax.scan(body, x, weights, reverse=True)[0]

        def one_by_one(weights: Any, x: Any) -> Any:
            for i in reversed(range(N_LAYERS)):
                with layer_scope(i):
                    x = layer(weights[i], x)
            return x

        for select in ("1.mlp_out", "mlp_out", range(3)):
            truth = jax.jit(site_gradients(one_by_one, select, total))(weights, BATCH)
            mine = jax.jit(site_gradients(backwards, select, total))(weights, BATCH)
            for ours, theirs in zip(mine, truth, strict=True):
                assert_close(ours, theirs, 1e-5)

    def test_layers_inside_a_scan_over_chunks(self, weights: Any) -> None:
        """A scan over layers inside a scan over rows of a batch: the layers are read by appending over the rows."""

        def chunked(weights: Any, xs: Any) -> Any:
            def outer(_: Any, x: Any) -> Any:
                def body(x: Any, row: Any) -> Any:
                    with layer_scope(loop_layer()):
                        return sow(x + jnp.tanh(x @ row), name="resid_post", mode="append"), None

                return None, lax.scan(body, x, weights)[0]

            return lax.scan(outer, None, xs)[1]

        out, activations = jax.jit(harvest_sites(chunked, ["1.resid_post", "4.resid_post"]))(weights, BATCH)
        one_out, one = jax.jit(harvest_sites(stacked, ["1.resid_post", "4.resid_post"]))(weights, BATCH)
        assert_close((out, list(activations.values())), (one_out, list(one.values())), 1e-5)
        gradients = jax.jit(site_gradients(chunked, ["1.resid_post", "4.resid_post"], total))(weights, BATCH)[2]
        truth = jax.jit(site_gradients(stacked, ["1.resid_post", "4.resid_post"], total))(weights, BATCH)[2]
        assert_close(list(gradients.values()), list(truth.values()), 1e-5)

    def test_a_scan_over_steps_inside_each_layer(self, weights: Any) -> None:
        def fn(weights: Any, x: Any) -> Any:
            def body(x: Any, row: Any) -> Any:
                def step(x: Any, _: Any) -> Any:
                    return sow(jnp.tanh(x @ row), name="step", mode="append"), None

                with layer_scope(loop_layer()):
                    return lax.scan(step, x, None, length=3)[0], None

            return lax.scan(body, x, weights)[0]

        x, steps = BATCH, []
        for i in range(N_LAYERS):
            for _ in range(3):
                x = jnp.tanh(x @ weights[i])
                steps.append(x)
        value, activations, gradients = jax.jit(site_gradients(fn, "4.step", total))(weights, BATCH)
        assert_close(activations["4.step"], jnp.stack(steps[12:15]), 1e-5)
        assert_close(value, total(x), 1e-5)
        after = lambda x: jnp.tanh(jnp.tanh(jnp.tanh(x @ weights[5]) @ weights[5]) @ weights[5])  # noqa: E731
        assert_close(gradients["4.step"][2], jax.grad(lambda x: total(after(x)))(steps[14]), 1e-5)
        all_steps = jax.jit(site_gradients(fn, "step", total))(weights, BATCH)
        assert_close(all_steps[2]["4.step"], gradients["4.step"], 1e-5)

    def test_layers_of_a_while_loop_can_be_changed(self, weights: Any) -> None:
        def fn(n: Any, x: Any) -> Any:
            def body(i: Any, x: Any) -> Any:
                with layer_scope(loop_layer()):
                    return sow(x * 2.0, name="a")

            return lax.fori_loop(0, n, body, x)

        zeroed = jax.jit(lambda at, n: intervene(fn, [(Site(at, "a"), lambda value: value * 0.0 + 1.0)])(n, X))
        np.testing.assert_array_equal(zeroed(1, 4), 4.0)
        np.testing.assert_allclose(zeroed(9, 4), X * 16.0, rtol=1e-6)
        first = intervene(fn, {"0.a": lambda value: value * 0.0 + 1.0})
        np.testing.assert_array_equal(first(4, X), 8.0)


class TestComposition:
    def test_an_intervened_function_has_its_sites(self, weights: Any) -> None:
        edits = {"2.mlp_out": lambda value: value * 0.0}
        for fn in (stacked, unrolled):
            changed = intervene(fn, edits)
            out, activations = harvest_sites(fn, None, edits)(weights, BATCH)
            read = reap_sites(changed, None)(weights, BATCH)
            assert_close(read, activations, 1e-5)
            (alone,) = reap_sites(changed, "3.resid_post")(weights, BATCH).values()
            assert_close(alone, activations["3.resid_post"])
            seen = {}
            for at, name, value in (running_pass := run(changed, weights, BATCH)):
                seen[Site(at, name)] = value
            assert_close(running_pass.retval, out, 1e-5)
            assert_close(Activations(seen), activations, 1e-5)
            twice = intervene(changed, {"4.mlp_out": lambda value: value * 0.0})
            both = harvest_sites(fn, (), {**edits, "4.mlp_out": jnp.zeros((2, D))})(weights, BATCH)[0]
            assert_close(jax.jit(twice)(weights, BATCH), both, 1e-5)

    def test_layers_of_a_jitted_block_survive(self) -> None:
        block = jax.jit(lambda x: x + sow(jnp.tanh(x), name="mlp_out"))

        def model(x: Any) -> Any:
            for i in range(3):
                with layer_scope(i):
                    x = jax.checkpoint(block)(x)
            return x

        changed = intervene(model, {"1.mlp_out": lambda value: value * 0.0})
        assert [str(site) for site in reap_sites(changed, None)(X)] == ["0.mlp_out", "1.mlp_out", "2.mlp_out"]
        assert_close(changed(X), block(block(X)), 1e-6)

    def test_other_tags_are_left_alone(self) -> None:
        def fn(x: Any) -> Any:
            return jax.jit(lambda x: sow(sow(x * 2.0, name="a"), tag="t", name="b") + 1.0)(x)

        out, reaps = ij.harvest.call_and_reap(intervene(fn, {"a": lambda value: value * 0.0}), tag="t")(X)
        assert_close((out, reaps), (jnp.ones(3), {"b": jnp.zeros(3)}))
        assert list(reap(intervene(fn, {"a": lambda value: value}), tag="site")(X)) == ["a"]

    def test_interventions_on_parts_of_a_shard_map(self) -> None:
        mesh, spec = jax.make_mesh((2,), ("device",), axis_types=(AxisType.Auto,)), PartitionSpec("device")

        def fn(x: Any) -> Any:
            body = lambda x: sow(x * 2.0, name="a") + 1.0  # noqa: E731
            return jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec)(x)

        x = jnp.arange(4.0)
        scale = jnp.float32(3.0)
        for wrap in (lambda f: f, jax.jit):
            changed = wrap(lambda x, scale: intervene(fn, {"a": lambda value: value * scale})(x))
            assert_close(changed(x, scale), x * 6.0 + 1.0)
        assert_close(jax.grad(lambda s: changed(x, s).sum())(scale), jnp.float32(12.0))

    def test_random_keys_as_sites(self, key: jax.Array) -> None:
        def fn(key: Any) -> Any:
            def body(key: Any, _: Any) -> Any:
                with layer_scope(loop_layer()):
                    key, now = jax.random.split(key)
                    return key, jax.random.normal(sow(now, name="key"))

            return lax.scan(body, key, None, length=3)[1]

        numbers, activations = jax.jit(harvest_sites(fn, "1.key"))(key)
        assert_close(jax.random.normal(activations["1.key"]), numbers[1])
        moved = jax.jit(intervene(fn, {"2.key": activations["1.key"]}))(key)
        assert_close(moved, numbers.at[2].set(numbers[1]))

    def test_arguments(self) -> None:
        def fn(params: Any, x: Any, mode: str, *, scale: float = 1.0) -> Any:
            assert mode == "sin"
            return sow(jnp.sin(x) * params["w"] * scale, name="a")

        params = {"w": jnp.float32(2.0)}
        assert_close(reap_sites(fn, "a")(params, X, "sin", scale=3.0)["a"], jnp.sin(X) * 6.0)
        gradient = jax.grad(lambda params: total(reap_sites(fn, "a")(params, X, "sin")))(params)
        assert_close(gradient, {"w": total(jnp.sin(X))})
        mapped = jax.vmap(reap_sites(fn, "a"), in_axes=(None, 0, None))(params, jnp.stack([X, X]), "sin")
        assert isinstance(mapped, Activations) and mapped["a"].shape == (2, 3)

    def test_interventions_are_those_at_the_time_of_the_call(self) -> None:
        edits = {"a": lambda value: value * 0.0}
        changed = intervene(lambda x: sow(x, name="a"), edits)
        edits.clear()
        assert_close(changed(X), jnp.zeros(3))
        from_iterator = intervene(lambda x: sow(x, name="a"), iter([("a", lambda value: value * 0.0)]))
        assert_close([from_iterator(X), from_iterator(X)], [jnp.zeros(3)] * 2)

    def test_names_at_the_front_door(self) -> None:
        assert ij.harvest.reap_sites is reap_sites and ij.reap_sites is reap_sites
        assert ij.intervene is intervene and ij.harvest_sites is harvest_sites and ij.site_gradients is site_gradients
