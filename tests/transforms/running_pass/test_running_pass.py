"""The running pass against plain Python, in every kind of place a site can be in, under every caller's transform."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import RunningPassError, ShapeError, UnknownNameError, UnsupportedModelError
from interp_jax.core.sites import Site
from interp_jax.transforms.compilations import count_compilations
from interp_jax.transforms.harvest import layer_scope, loop_layer, sow
from interp_jax.transforms.running_pass import list_sites, run
from tests.transforms.running_pass.programs import PROGRAMS, Plain, jax_form

X = jnp.array([0.3, 0.7, 1.1])
NAMES = list(PROGRAMS)
# `lax.cond` and `lax.while_loop` with a traced predicate cannot be followed.
TRACEABLE = [name for name in NAMES if name not in ("branching", "looping")]


def change(site: Site, value: Any) -> Any:
    """A different change for each site."""
    factor = 1.0 + 0.1 * (site.layer or 0) + 0.01 * len(site.name)
    return jax.tree.map(lambda leaf: leaf * factor + 0.05, value)


def plain(name: str, x: Any, visit: Any = lambda site, value: value) -> tuple[Any, list[tuple[Site, Any]]]:
    seen = []

    def record(site: Site, value: Any) -> Any:
        seen.append((site, value))
        return visit(site, value)

    return PROGRAMS[name](Plain(record), x), seen


def loop(name: str, x: Any, visit: Any = None, **options: Any) -> tuple[Any, list[tuple[Site, Any]]]:
    seen = []
    for layer, site_name, value in (running_pass := run(jax_form(name), x, **options)):
        seen.append((Site(layer, site_name), value))
        if visit is not None:
            running_pass.modified_value = visit(Site(layer, site_name), value)
    return running_pass.retval, seen


def assert_same(ours: Any, truth: Any, tolerance: float = 2e-6) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, truth)


@pytest.mark.parametrize("name", NAMES)
def test_sees_every_site_in_execution_order_with_its_value(name: str) -> None:
    truth, truth_seen = plain(name, X)
    result, seen = loop(name, X)
    assert [site for site, _ in seen] == [site for site, _ in truth_seen]
    assert_same([value for _, value in seen], [value for _, value in truth_seen])
    assert_same(result, truth)


@pytest.mark.parametrize("name", NAMES)
def test_changes_at_every_site_have_their_effect(name: str) -> None:
    truth, truth_seen = plain(name, X, change)
    result, seen = loop(name, X, change)
    assert_same(result, truth)
    assert_same([value for _, value in seen], [value for _, value in truth_seen])


@pytest.mark.parametrize("name", NAMES)
def test_doing_nothing_changes_nothing_bit_for_bit(name: str) -> None:
    unwatched = jax.jit(jax_form(name))(X)
    untouched, _ = loop(name, X)
    sent_back, _ = loop(name, X, lambda site, value: value)
    jax.tree.map(np.testing.assert_array_equal, sent_back, untouched)
    assert_same(untouched, unwatched)


@pytest.mark.parametrize("name", NAMES)
def test_each_site_alone_can_be_selected_and_changed(name: str) -> None:
    sites = list(dict.fromkeys(site for site, _ in plain(name, X)[1]))
    for chosen in sites:

        def visit(site: Site, value: Any, chosen: Site = chosen) -> Any:
            return change(site, value) if site == chosen else value

        truth, _ = plain(name, X, visit)
        result, seen = loop(name, X, change, sites=chosen)
        assert {site for site, _ in seen} == {chosen}
        assert_same(result, truth)


@pytest.mark.parametrize("name", TRACEABLE)
def test_under_the_callers_jit_grad_and_vmap(name: str) -> None:
    def total(result: Any) -> Any:
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(result))

    def ours(x: Any) -> Any:
        return total(loop(name, x, change)[0])

    def truth(x: Any) -> Any:
        return total(plain(name, x, change)[0])

    xs = jnp.stack([X, X * 0.5, X + 0.25])
    assert_same(jax.jit(ours)(X), truth(X))
    assert_same(jax.vmap(ours)(xs), jnp.stack([truth(x) for x in xs]))
    assert_same(jax.grad(ours)(X), jax.grad(truth)(X), 1e-5)
    assert_same(jax.jit(jax.grad(ours))(X), jax.grad(truth)(X), 1e-5)
    assert_same(jax.vmap(jax.grad(ours))(xs), jnp.stack([jax.grad(truth)(x) for x in xs]), 1e-5)
    assert_same(jax.jit(jax.checkpoint(ours))(X), truth(X))
    assert_same(jax.grad(jax.checkpoint(ours))(X), jax.grad(truth)(X), 1e-5)


@pytest.mark.parametrize("name", TRACEABLE)
def test_leaks_no_tracers(name: str) -> None:
    def ours(x: Any) -> Any:
        for _, _, value in (running_pass := run(jax_form(name), x)):
            running_pass.modified_value = jax.tree.map(lambda leaf: leaf * 2.0, value)
            del value
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(running_pass.retval))

    with jax.checking_leaks():
        jax.jit(jax.grad(ours))(X)


def test_gradient_with_respect_to_what_the_loop_plants() -> None:
    def metric(direction: Any) -> Any:
        for layer, _, value in (running_pass := run(jax_form("straight"), X, sites="mlp_out")):
            if layer == 1:
                running_pass.modified_value = value + direction
        return running_pass.retval["x"] @ jnp.array([1.0, 2.0, 3.0])

    direction = jnp.array([0.1, -0.2, 0.3])
    gradient = jax.grad(metric)(direction)
    step = 1e-3
    for i in range(3):
        bump = step * jnp.eye(3)[i]
        difference = (metric(direction + bump) - metric(direction - bump)) / (2 * step)
        np.testing.assert_allclose(gradient[i], difference, rtol=5e-3)


def test_an_opened_custom_rule_keeps_its_rule_until_something_inside_is_changed() -> None:
    @jax.custom_vjp
    def straight_through(x: Any) -> Any:
        return jnp.round(sow(x * 2.0, name="scaled"))

    straight_through.defvjp(lambda x: (straight_through(x), None), lambda _, g: (g * 7.0,))

    def read_only(x: Any) -> Any:
        for _ in (running_pass := run(straight_through, x)):
            pass
        return running_pass.retval

    def changed(x: Any) -> Any:
        for _, _, value in (running_pass := run(straight_through, x)):
            running_pass.modified_value = value + 1.0
        return running_pass.retval

    assert jax.grad(read_only)(1.2) == 7.0
    # Inside the rule the derivative is that of the code, and rounding has none.
    assert jax.grad(changed)(1.2) == 0.0
    assert changed(1.2) == 3.0


def test_a_jitted_block_called_once_per_layer_keeps_one_trace_and_its_layers() -> None:
    traces = []

    @jax.jit
    def block(x: Any) -> Any:
        traces.append(1)
        return sow(jnp.sin(x), name="mlp_out")

    def model(x: Any) -> Any:
        for i in range(4):
            with layer_scope(i):
                x = block(x)
        return x

    assert [layer for layer, _, _ in run(model, X)] == [0, 1, 2, 3]
    assert len(traces) == 1


def test_two_passes_one_in_the_body_of_the_other() -> None:
    corrupted = X * -1.0
    for layer, name, value in (outer := run(jax_form("scanned"), corrupted)):
        for other_layer, other_name, clean in (inner := run(jax_form("scanned"), X)):
            if (other_layer, other_name) == (layer, name) == (2, "resid_post"):
                outer.modified_value = clean
            del clean
        assert_same(inner.retval, jax.jit(jax_form("scanned"))(X))
        del value
    # With the whole residual replaced in layer 2, the end is that of the clean run.
    np.testing.assert_allclose(outer.retval[0], jax_form("scanned")(X)[0], rtol=1e-6)


def test_interleaved_passes_do_not_disturb_each_other() -> None:
    first, second = run(jax_form("straight"), X), run(jax_form("straight"), X * 2.0)
    for one, two in zip(first, second, strict=True):
        assert one[:2] == two[:2]
    assert_same(first.retval, plain("straight", X)[0])
    # `zip` ends at the first that is exhausted: the second pass is still before its end.
    assert list(second) == []
    assert_same(second.retval, plain("straight", X * 2.0)[0])


def test_break_abandons_the_pass_and_harms_nothing() -> None:
    @jax.jit
    def partly(x: Any) -> Any:
        kept = x
        for layer, _, value in run(jax_form("scanned"), x):
            kept = value
            if layer == 1:
                break
        return kept * 2.0

    np.testing.assert_allclose(partly(X), plain("scanned", X)[1][3][1] * 2.0, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda x: x + 1)(X), X + 1)


def test_the_same_function_is_traced_once_and_a_moved_intervention_compiles_nothing() -> None:
    for name in ("straight", "scanned", "inner_jit"):
        loop(name, X, change, sites="0.mlp_out")
        loop(name, X, change, sites="1.mlp_out")
        with count_compilations() as new:
            _, seen = loop(name, X, change, sites="1.mlp_out")
            assert [str(site) for site, _ in seen] == ["1.mlp_out"]
    with count_compilations() as moved:
        loop("scanned", X, change, sites="2.mlp_out")
    assert new == [] and moved == []


def test_moving_between_the_layers_of_an_unrolled_model_compiles_nothing() -> None:
    def model(weights: Any, x: Any) -> Any:
        for i, weight in enumerate(weights):
            with layer_scope(i):
                x = x + sow(jnp.tanh(x @ weight), name="mlp_out")
        return x * 2.0

    def zeroed(layer: int) -> Any:
        for _, _, value in (running_pass := run(model, weights, X, sites=f"{layer}.mlp_out")):
            running_pass.modified_value = value * 0.0
        return running_pass.retval

    weights = list(jnp.linspace(0.0, 1.0, 6 * 9).reshape(6, 3, 3))
    zeroed(1)
    with count_compilations() as moved:
        results = [zeroed(layer) for layer in range(6)]
    assert moved == []
    for layer, result in enumerate(results):
        x = X
        for i, weight in enumerate(weights):
            x = x + (0.0 if i == layer else 1.0) * jnp.tanh(x @ weight)
        np.testing.assert_allclose(result, x * 2.0, rtol=1e-5)


def test_equal_layers_share_their_programs() -> None:
    def model(weights: Any, x: Any) -> Any:
        for i, weight in enumerate(weights):
            with layer_scope(i):
                x = sow(x + jnp.tanh(x @ weight), name="resid_post")
        return x

    weights = list(jnp.linspace(0.0, 1.0, 12 * 9).reshape(12, 3, 3))
    with count_compilations() as new:
        for _ in run(model, weights, X):
            pass
    assert len(new) == 1


def test_programs_that_differ_only_in_constants_are_kept_apart() -> None:
    def model(x: Any) -> Any:
        for i, factor in enumerate((2.0, 3.0, float("nan"), 3.0)):
            with layer_scope(i):
                x = sow(x * factor if factor == factor else x + np.array([1.0, 2.0, 3.0], np.float32), name="a")
        return x

    values = [value for _, _, value in run(model, X)]
    np.testing.assert_allclose(values[-1], (X * 6.0 + jnp.array([1.0, 2.0, 3.0])) * 3.0, rtol=1e-6)


def test_alternating_layers_scan_over_groups() -> None:
    def model(x: Any, rows: Any) -> Any:
        def body(x: Any, row: Any) -> Any:
            with layer_scope(loop_layer(stride=2)):
                x = sow(x + row, name="resid_post")
            with layer_scope(loop_layer(stride=2, offset=1)):
                x = sow(x * row, name="resid_post")
            return x, None

        return jax.lax.scan(body, x, rows)[0]

    rows = jnp.arange(1.0, 7.0).reshape(3, 2) @ jnp.ones((2, 3))
    assert [layer for layer, _, _ in run(model, X, rows)] == [0, 1, 2, 3, 4, 5]
    (only,) = run(model, X, rows, sites="4.resid_post")
    x = X
    for i in range(2):
        x = (x + rows[i]) * rows[i]
    np.testing.assert_allclose(only[2], x + rows[2], rtol=1e-6)


def test_vmap_inside_the_function_shows_the_mapped_axis_first() -> None:
    mapped = jax.vmap(lambda x: sow(x * 2.0, name="a") + 1.0, in_axes=1, out_axes=1)
    x = jnp.arange(6.0).reshape(2, 3)
    for _, _, value in (running_pass := run(mapped, x)):
        np.testing.assert_array_equal(value, x.T * 2.0)
        running_pass.modified_value = value.at[0].set(0.0)
    np.testing.assert_array_equal(running_pass.retval, (x * 2.0).at[:, 0].set(0.0) + 1.0)


def test_grad_inside_the_function_shows_the_primal_once() -> None:
    differentiated = jax.grad(lambda x: jnp.sum(sow(jnp.sin(x), name="a") ** 2))
    ((_, name, value),) = run(differentiated, X)
    assert name == "a"
    np.testing.assert_allclose(value, jnp.sin(X), rtol=1e-6)


def test_a_closure_over_the_callers_tracers() -> None:
    def metric(scale: Any) -> Any:
        def model(x: Any) -> Any:
            return sow(x * scale, name="a").sum()

        for _, _, value in (running_pass := run(model, X)):
            running_pass.modified_value = value * scale
        return running_pass.retval

    np.testing.assert_allclose(jax.grad(metric)(2.0), 2 * 2.0 * X.sum(), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(metric)(2.0), 4.0 * X.sum(), rtol=1e-6)
    with jax.checking_leaks():
        jax.grad(metric)(2.0)


def test_arguments_without_arrays_are_constants_of_the_program() -> None:
    def model(x: Any, mode: str, options: dict[str, Any], *, twice: bool) -> Any:
        assert mode == "sin" and options == {"name": None}
        return sow(jnp.sin(x) * (2.0 if twice else 1.0), name="a")

    ((_, _, value),) = run(model, X, "sin", {"name": None}, twice=True)
    np.testing.assert_allclose(value, jnp.sin(X) * 2.0, rtol=1e-6)
    with pytest.raises(ValueError, match=r"An argument \{'name': 'a'\} without arrays in it was given"):
        run(model, X, "sin", {"name": "a"}, twice=True)


def test_bound_methods_are_traced_once() -> None:
    traces = []

    class Model:
        def forward(self, x: Any) -> Any:
            traces.append(1)
            return sow(x + 1.0, name="a")

    model = Model()
    for _ in range(3):
        for _ in run(model.forward, X):
            pass
    assert len(traces) == 1


def test_list_sites_says_what_there_is() -> None:
    table = list_sites(jax_form("scanned"), X)
    assert table.sites[:3] == [Site(None, "embed"), Site(0, "mlp_out"), Site(0, "resid_post")]
    assert table.n_bytes == 9 * 3 * 4
    text = repr(table)
    assert "resid_post  0-3" in text and "[3]" in text and "float32" in text and "108 B" in text
    assert "<table>" in table._repr_html_()
    assert "programs.py" in table[1].source


class TestMistakes:
    def test_unknown_site(self) -> None:
        with pytest.raises(UnknownNameError) as error:
            run(jax_form("straight"), X, sites="mlp_outs")
        assert "Unknown site 'mlp_outs'" in str(error.value)
        assert "Did you mean 'mlp_out'?" in str(error.value)
        assert "Known: embed, mlp_out, resid_post, logits (layers 0 to 2)" in str(error.value)
        assert "Fix: " in str(error.value)

    @pytest.mark.parametrize("selector", ["7.mlp_out", Site(7, "mlp_out"), 7, range(7, 9), lambda site: False])
    def test_a_selector_that_matches_nothing(self, selector: Any) -> None:
        with pytest.raises(UnknownNameError, match="Unknown site"):
            run(jax_form("straight"), X, sites=[selector, "embed"])

    def test_unknown_engine(self) -> None:
        with pytest.raises(UnknownNameError, match=r"Unknown engine 'compile' in run\. Did you mean 'compiled'\?"):
            run(jax_form("straight"), X, engine="compile")

    @pytest.mark.parametrize(
        ("new", "given"),
        [
            (jnp.zeros(4), "float32[4]"),
            (jnp.zeros((3, 1)), "float32[3, 1]"),
            (jnp.zeros(3, jnp.int32), "int32[3]"),
            (jnp.zeros(3, jnp.bfloat16), "bfloat16[3]"),
            (0.0, "float32[]"),
            ({"a": jnp.zeros(3)}, "pytree structure"),
            ("zeros", "str"),
            (None, "pytree structure"),
        ],
    )
    def test_a_new_value_of_another_form(self, new: Any, given: str) -> None:
        running_pass = run(jax_form("straight"), X, sites="1.mlp_out")
        _, _, value = next(running_pass)
        with pytest.raises(ShapeError) as error:
            running_pass.modified_value = new
        message = str(error.value)
        assert given in message and "site 1.mlp_out" in message and 'engine="python"' in message
        # The pass is unharmed.
        running_pass.modified_value = value * 0.0
        assert list(running_pass) == []
        assert running_pass.retval["x"].shape == (3,)

    def test_out_of_turn(self) -> None:
        running_pass = run(jax_form("straight"), X)
        with pytest.raises(RunningPassError, match="retval was read while the pass is not started"):
            _ = running_pass.retval
        with pytest.raises(RunningPassError, match="modified_value was set while the pass is not started"):
            running_pass.modified_value = X
        next(running_pass)
        with pytest.raises(RunningPassError, match="retval was read while the pass is at a site"):
            _ = running_pass.retval
        assert [name for _, name, _ in running_pass][-1] == "logits"
        with pytest.raises(RunningPassError, match="modified_value was set while the pass is finished"):
            running_pass.modified_value = X

    def test_an_exception_in_the_body_leaves_the_pass_and_the_session_usable(self) -> None:
        with pytest.raises(KeyError), run(jax_form("straight"), X) as running_pass:
            for _ in running_pass:
                raise KeyError
        with pytest.raises(RunningPassError, match="while the pass is abandoned"):
            _ = running_pass.retval
        assert_same(loop("straight", X)[0], plain("straight", X)[0])

    def test_an_exception_in_the_program_is_the_passes_result(self) -> None:
        def failing(x: Any) -> Any:
            return jax.pure_callback(lambda x: 1 / 0, jax.ShapeDtypeStruct((3,), jnp.float32), sow(x, name="a"))

        running_pass = run(failing, X)
        with pytest.raises(Exception, match="division by zero"):
            for _ in running_pass:
                jax.block_until_ready(running_pass.modified_value)
            jax.block_until_ready(running_pass.retval)

    def test_a_branch_with_a_traced_predicate(self) -> None:
        with pytest.raises(UnsupportedModelError) as error:
            jax.jit(lambda x: loop("branching", x)[0])(X)
        assert "inside cond" in str(error.value) and "programs.py" in str(error.value)

    def test_loop_layer_outside_a_loop(self) -> None:
        def model(x: Any) -> Any:
            with layer_scope(loop_layer()):
                return sow(x, name="a")

        with pytest.raises(ValueError, match=r"'a' lies in layer_scope\(loop_layer\(\)\) outside any loop"):
            run(model, X)

    @pytest.mark.parametrize("layer", [-1, 1.0, True, "3"])
    def test_layer_scope_takes_layers_only(self, layer: Any) -> None:
        with pytest.raises(ValueError, match="was given as a layer in layer_scope"):
            layer_scope(layer)

    def test_sow_takes_names_only(self) -> None:
        with pytest.raises(ValueError, match=r"sow\(name=3, tag='site'\) was given"):
            sow(X, name=3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="Unknown mode 'appendd'"):
            sow(X, name="a", mode="appendd")


def test_the_repr_says_where_the_pass_is() -> None:
    running_pass = run(jax_form("straight"), X)
    assert "not started" in repr(running_pass)
    next(running_pass)
    assert "at a site embed = float32[3], 1 sites visited" in repr(running_pass)
    list(running_pass)
    assert "finished" in repr(running_pass)


def test_sendval_is_mishaxs_name() -> None:
    for _, name, value in (running_pass := run(jax_form("straight"), X, sites=["embed", "logits"])):
        running_pass.sendval = value * 0.0 if name == "embed" else None
    np.testing.assert_array_equal(running_pass.retval["x"], 0.0)


def test_an_unwatched_tagged_program_lowers_to_the_untagged_one() -> None:
    for name in ("straight", "inner_jit", "nested_jit", "checkpointed", "scanned", "nested_scan", "trees", "constants"):
        tagged = jax.jit(lambda x, fn=PROGRAMS[name]: fn(programs_jax(), x)).lower(X).as_text()
        untagged = jax.jit(lambda x, fn=PROGRAMS[name]: fn(programs_jax(tagged=False), x)).lower(X).as_text()
        assert tagged == untagged


def programs_jax(*, tagged: bool = True) -> Any:
    from tests.transforms.running_pass.programs import Jax

    return Jax if tagged else type("Untagged", (Jax,), {"tag": staticmethod(lambda value, name: value)})
