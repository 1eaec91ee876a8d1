"""Every construct of JAX that can hold a sow, each in two forms: with JAX, and as a plain Python function.

A context runs a body (a function of a vector) once, in a loop, in a branch, under a derivative. The JAX form takes the
body as it is. The plain form returns, beside its result, a tree of what the body did: `Loop` of its iterations, `Batch`
of its examples, or what one run sowed. `expected` reads from that tree what a harvest must find, by the mode alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.sharding import AxisType, PartitionSpec

from interp_jax.transforms.jaxprs import evaluate, scan_counts

Body = Callable[[Any], Any]
PlainBody = Callable[[Any], tuple[Any, "Tree"]]


class Sown(NamedTuple):
    """A sown value, and its predicate (True without one)."""

    value: Any
    when: bool


@dataclass
class Loop:
    """What each iteration did, by index, and the order in which they ran."""

    iterations: list[Tree]
    order: list[int]


@dataclass
class Batch:
    """What was done for each example."""

    examples: list[Tree]


Tree = dict[str, Sown] | Loop | Batch


def expected(tree: Tree, name: str, mode: str) -> np.ndarray:
    """What a harvest finds under a name that is sown with a mode."""
    return _fold(tree, name, mode)[0]


def _fold(tree: Tree, name: str, mode: str) -> tuple[np.ndarray, Any, int]:
    """The value, whether a predicate was true, and how many axes of iterations are in front."""
    if isinstance(tree, dict):
        value, when = tree[name]
        return (np.asarray(value) if when else np.zeros_like(value)), when, 0
    if isinstance(tree, Batch):
        parts = [_fold(example, name, mode) for example in tree.examples]
        n_loops = parts[0][2]
        return np.stack([value for value, _, _ in parts], axis=n_loops), [when for _, when, _ in parts], n_loops
    if mode == "append":
        parts = [_fold(iteration, name, mode) for iteration in tree.iterations]
        return np.stack([value for value, _, _ in parts]), True, parts[0][2] + 1
    done = [_fold(tree.iterations[i], name, mode) for i in tree.order]
    value = np.zeros_like(done[0][0])
    for new, when, _ in done:
        is_set = np.reshape(when, np.shape(when) + (1,) * (value.ndim - np.ndim(when)))
        value = np.where(is_set, new, value)
    return value, np.any([when for _, when, _ in done], axis=0), 0


class Context(NamedTuple):
    """A construct in its two forms, and the modes a sow in it may have."""

    name: str
    jax_form: Callable[[Body, Any], Any]
    plain: Callable[[PlainBody, Any], tuple[Any, Tree]]
    modes: tuple[str, ...]


ONCE = ("strict", "append", "clobber", "cond_clobber")
IN_SCAN = ONCE[1:]
IN_WHILE = ONCE[2:]


def repeat(body: PlainBody, x: Any, n: int, *, reverse: bool = False) -> tuple[Any, Loop, Any]:
    """Run a body n times: the last result, what was done, and what each iteration began with."""
    order = list(reversed(range(n))) if reverse else list(range(n))
    trees: dict[int, Tree] = {}
    starts: dict[int, Any] = {}
    for i in order:
        starts[i] = x
        x, trees[i] = body(x)
    return x, Loop([trees[i] for i in range(n)], order), jnp.stack([starts[i] for i in range(n)])


def without_sows(body: PlainBody) -> Body:
    """The body's result alone, for JAX to differentiate."""
    return lambda x: body(x)[0]


def gradient_of(plain: Callable[[PlainBody, Any], tuple[Any, Tree]]) -> Callable[[PlainBody, Any], tuple[Any, Tree]]:
    """The plain form of the gradient of the sum of another plain form's result."""

    def form(body: PlainBody, x: Any) -> tuple[Any, Tree]:
        total = lambda x: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(plain(body, x)[0]))  # noqa: E731
        return jax.grad(total)(x), plain(body, x)[1]

    return form


def gradient(form: Callable[[Body, Any], Any]) -> Callable[[Body, Any], Any]:
    """The same with JAX."""

    def of(body: Body, x: Any) -> Any:
        return jax.grad(lambda x: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(form(body, x))))(x)

    return of


def scan(body: Body, x: Any, **options: Any) -> Any:
    return lax.scan(lambda x, _: (body(x), x), x, None, length=3, **options)


def plain_scan(body: PlainBody, x: Any, **options: Any) -> tuple[Any, Tree]:
    x, tree, starts = repeat(body, x, 3, **options)
    return (x, starts), tree


def nested_scan(body: Body, x: Any) -> Any:
    inner = lambda x: lax.scan(lambda x, _: (body(x), None), x, None, length=3)[0]  # noqa: E731
    return lax.scan(lambda x, _: (inner(x), None), x, None, length=2)[0]


def plain_nested_scan(body: PlainBody, x: Any) -> tuple[Any, Tree]:
    return repeat(lambda x: repeat(body, x, 3)[:2], x, 2)[:2]


def while_loop(body: Body, x: Any, bound: Any = 3) -> Any:
    bound = bound + (x[0] * 0).astype(jnp.int32)  # Traced, so that it stays a while loop.
    return lax.while_loop(lambda carry: carry[0] < bound, lambda carry: (carry[0] + 1, body(carry[1])), (0, x))[1]


def while_per_example(body: Body, x: Any) -> Any:
    return jax.vmap(lambda x, bound: while_loop(body, x, bound))(jnp.stack([x, x * 2]), jnp.array([1, 3]))


def plain_while_per_example(body: PlainBody, x: Any) -> tuple[Any, Tree]:
    runs = [repeat(body, x, 1)[:2], repeat(body, x * 2, 3)[:2]]
    return jnp.stack([out for out, _ in runs]), Batch([tree for _, tree in runs])


def cond(body: Body, x: Any) -> Any:
    return lax.cond(x.sum() > 0, body, lambda x: body(x * 2), x), lax.cond(x.sum() < 0, lambda x: x, lambda x: x * 2, x)


def plain_cond(body: PlainBody, x: Any) -> tuple[Any, Tree]:
    out, tree = body(x if x.sum() > 0 else x * 2)
    return (out, x if x.sum() < 0 else x * 2), tree


def switch(body: Body, x: Any) -> Any:
    return lax.switch((x[0] * 0).astype(jnp.int32) + 1, [body, lambda x: body(x * 2), lambda x: body(x * 4)], x)


def vmap(body: Body, x: Any) -> Any:
    return jax.vmap(body)(jnp.stack([x, x * 2]))


def plain_vmap(body: PlainBody, x: Any) -> tuple[Any, Tree]:
    runs = [body(x), body(x * 2)]
    out = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(out for out, _ in runs))
    return out, Batch([tree for _, tree in runs])


def custom_jvp(body: Body, x: Any) -> Any:
    fn = jax.custom_jvp(body)
    fn.defjvp(lambda primals, tangents: (fn(*primals), tangents[0] * 3))
    return fn(x)


def custom_vjp(body: Body, x: Any) -> Any:
    fn = jax.custom_vjp(body)
    fn.defvjp(lambda x: (fn(x), None), lambda _, g: (g * 3,))
    return fn(x)


def plain_custom_gradient(body: PlainBody, x: Any) -> tuple[Any, Tree]:
    return jnp.full_like(x, 3), body(x)[1]


def _mesh() -> Any:
    return jax.make_mesh((2,), ("device",), axis_types=(AxisType.Auto,))


def _doubled_on_devices(x: Any) -> Any:
    spec = PartitionSpec("device")
    return jax.shard_map(lambda x: x * 2, mesh=_mesh(), in_specs=spec, out_specs=spec)(x)


def inside_shard_map(body: Body, x: Any) -> Any:
    spec = PartitionSpec()
    return jax.shard_map(body, mesh=_mesh(), in_specs=spec, out_specs=spec)(x)


def then(body: PlainBody, x: Any, after: Body) -> tuple[Any, Tree]:
    out, tree = body(x)
    return after(out), tree


CONTEXTS = (
    Context("plain", lambda body, x: body(x), lambda body, x: body(x), ONCE),
    Context("jit", lambda body, x: jax.jit(body)(x), lambda body, x: body(x), ONCE),
    Context("nested_jit", lambda body, x: jax.jit(lambda x: jax.jit(body)(x) * 2)(x) * 2,
            lambda body, x: then(body, x, lambda x: x * 4), ONCE),
    Context("checkpoint", lambda body, x: jax.checkpoint(body)(x), lambda body, x: body(x), ONCE),
    Context("scan", scan, plain_scan, IN_SCAN),
    Context("reverse_scan", lambda body, x: scan(body, x, reverse=True),
            lambda body, x: plain_scan(body, x, reverse=True), IN_SCAN),
    Context("unrolled_scan", lambda body, x: scan(body, x, unroll=3), plain_scan, IN_SCAN),
    Context("nested_scan", nested_scan, plain_nested_scan, IN_SCAN),
    Context("jit_in_scan", lambda body, x: scan(jax.jit(body), x), plain_scan, IN_SCAN),
    Context("checkpointed_scan", lambda body, x: scan(jax.checkpoint(body), x), plain_scan, IN_SCAN),
    Context("cond_in_scan", lambda body, x: scan(lambda x: lax.cond(x[0] > 1, body, lambda x: body(x * 2), x), x),
            lambda body, x: plain_scan(lambda x: body(x if x[0] > 1 else x * 2), x), IN_SCAN),
    Context("fori", lambda body, x: lax.fori_loop(0, 3, lambda _, x: body(x), x),
            lambda body, x: repeat(body, x, 3)[:2], IN_SCAN),
    Context("while", while_loop, lambda body, x: repeat(body, x, 3)[:2], IN_WHILE),
    Context("while_in_scan", lambda body, x: scan(lambda x: while_loop(body, x, 2), x),
            lambda body, x: plain_scan(lambda x: repeat(body, x, 2)[:2], x), IN_WHILE),
    Context("while_per_example", while_per_example, plain_while_per_example, IN_WHILE),
    Context("cond", cond, plain_cond, ONCE),
    Context("switch", switch, lambda body, x: body(x * 2), ONCE),
    Context("vmap", vmap, plain_vmap, ONCE),
    Context("vmap_of_scan", lambda body, x: vmap(lambda x: scan(body, x), x),
            lambda body, x: plain_vmap(lambda x: plain_scan(body, x), x), IN_SCAN),
    Context("scan_of_vmap", lambda body, x: scan(lambda x: vmap(body, x)[1], x),
            lambda body, x: plain_scan(lambda x: then(lambda x: plain_vmap(body, x), x, lambda x: x[1]), x), IN_SCAN),
    Context("grad", gradient(lambda body, x: body(x)), gradient_of(lambda body, x: body(x)), ONCE),
    Context("value_and_grad", lambda body, x: jax.value_and_grad(lambda x: body(x).sum())(x)[0],
            lambda body, x: then(body, x, jnp.sum), ONCE),
    Context("jvp", lambda body, x: jax.jvp(body, (x,), (jnp.ones_like(x),))[0], lambda body, x: body(x), ONCE),
    Context("linearize", lambda body, x: jax.linearize(body, x)[0], lambda body, x: body(x), ONCE),
    Context("grad_of_jit", gradient(lambda body, x: jax.jit(body)(x)), gradient_of(lambda body, x: body(x)), ONCE),
    Context("grad_of_scan", gradient(scan), gradient_of(plain_scan), IN_SCAN),
    Context("grad_of_checkpointed_scan", gradient(lambda body, x: scan(jax.checkpoint(body), x)),
            gradient_of(plain_scan), IN_SCAN),
    Context("grad_of_cond", gradient(cond), gradient_of(plain_cond), ONCE),
    Context("custom_jvp", custom_jvp, lambda body, x: body(x), ONCE),
    Context("custom_vjp", custom_vjp, lambda body, x: body(x), ONCE),
    Context("grad_of_custom_jvp", gradient(custom_jvp), plain_custom_gradient, ONCE),
    Context("grad_of_custom_vjp", gradient(custom_vjp), plain_custom_gradient, ONCE),
    Context("custom_jvp_in_scan", lambda body, x: scan(lambda x: custom_jvp(body, x), x), plain_scan, IN_SCAN),
    Context("before_shard_map", lambda body, x: _doubled_on_devices(body(x)),
            lambda body, x: then(body, x, lambda x: x * 2), ONCE),
    Context("after_shard_map", lambda body, x: body(_doubled_on_devices(x)), lambda body, x: body(x * 2), ONCE),
    Context("inside_shard_map", inside_shard_map, lambda body, x: body(x), ONCE),
)  # fmt: skip


def op_by_op(fn: Callable[..., Any], *args: Any) -> list[Any]:
    """The leaves of what a function returns, each operation run by itself, so that nothing is fused.

    Whole programs that differ in one value read are optimised differently, and may differ in the last bit.
    """
    closed = jax.make_jaxpr(fn)(*args)
    with jax.disable_jit():
        return _one_by_one(closed, jax.tree.leaves(args))


def _one_by_one(closed: Any, args: list[Any]) -> list[Any]:
    env = dict(zip((*closed.jaxpr.constvars, *closed.jaxpr.invars), (*closed.consts, *args), strict=True))
    for eqn in closed.jaxpr.eqns:
        operands = [atom.val if isinstance(atom, Literal) else env[atom] for atom in eqn.invars]
        env.update(zip(eqn.outvars, _alone(eqn, operands), strict=True))
    return [atom.val if isinstance(atom, Literal) else env[atom] for atom in closed.jaxpr.outvars]


def _alone(eqn: Any, operands: list[Any]) -> list[Any]:
    params, name = eqn.params, eqn.primitive.name
    if name == "scan":
        n_consts, n_carry = scan_counts(eqn)
        consts = operands[:n_consts]

        def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
            out = _one_by_one(params["jaxpr"], [*consts, *carry, *xs])
            return out[:n_carry], out[n_carry:]

        rest = operands[n_consts:]
        carry, ys = lax.scan(
            body, rest[:n_carry], rest[n_carry:], length=params["length"], reverse=params["reverse"]
        )  # A Python loop, as jit is disabled.
        return [*carry, *ys]
    if name == "cond":
        index = min(max(int(operands[0]), 0), len(params["branches"]) - 1)
        return _one_by_one(params["branches"][index], operands[1:])
    if name == "while":
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        of_cond, of_body, carry = operands[:n_cond], operands[n_cond : n_cond + n_body], operands[n_cond + n_body :]
        while _one_by_one(params["cond_jaxpr"], [*of_cond, *carry])[0]:
            carry = _one_by_one(params["body_jaxpr"], [*of_body, *carry])
        return carry
    inner = [param for param in params.values() if isinstance(param, (Jaxpr, ClosedJaxpr))]
    if len(inner) == 1 and name != "shard_map":
        callee = inner[0] if isinstance(inner[0], ClosedJaxpr) else ClosedJaxpr(inner[0], ())
        return _one_by_one(callee, operands)
    return evaluate(eqn, operands)
