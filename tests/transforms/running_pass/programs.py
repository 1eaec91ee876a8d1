"""Programs with sites in every kind of place, each in two forms: for JAX, and in plain Python.

A program is a function of `(ctl, x)`. `ctl` is how it tags, scans and branches: `Jax` uses sow and lax, `Plain`
uses Python loops and calls `visit(site, value)` directly, which is the truth the running pass is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from interp_jax.core.sites import Site
from interp_jax.transforms.harvest import layer_scope, loop_layer, sow


class Jax:
    """The program as a user of JAX writes it."""

    tag = staticmethod(lambda value, name: sow(value, name=name))
    layer = staticmethod(layer_scope)
    jit = staticmethod(jax.jit)
    checkpoint = staticmethod(jax.checkpoint)
    custom_jvp = staticmethod(jax.custom_jvp)
    cond = staticmethod(lax.cond)
    while_loop = staticmethod(lax.while_loop)
    vmap = staticmethod(jax.vmap)

    @staticmethod
    def scan(body: Callable[..., Any], carry: Any, xs: Any, *, stride: int = 1, reverse: bool = False) -> Any:
        def tagged(carry: Any, x: Any) -> Any:
            with layer_scope(loop_layer(stride)):
                return body(carry, x)

        return lax.scan(tagged, carry, xs, reverse=reverse)


class Plain:
    """The same program in plain Python, with a direct call at every tag."""

    def __init__(self, visit: Callable[[Site, Any], Any]):
        self._visit = visit
        self._layer: int | None = None

    def tag(self, value: Any, name: str) -> Any:
        return self._visit(Site(self._layer, name), value)

    def layer(self, index: int | None) -> Any:
        plain = self

        class Scope:
            def __enter__(self) -> None:
                self.outer, plain._layer = plain._layer, index

            def __exit__(self, *exc: object) -> None:
                plain._layer = self.outer

        return Scope()

    jit = checkpoint = custom_jvp = staticmethod(lambda fn: fn)
    cond = staticmethod(lambda predicate, yes, no, *operands: (yes if predicate else no)(*operands))

    @staticmethod
    def while_loop(condition: Any, body: Any, carry: Any) -> Any:
        while condition(carry):
            carry = body(carry)
        return carry

    def scan(self, body: Any, carry: Any, xs: Any, *, stride: int = 1, reverse: bool = False) -> Any:
        ys = {}
        for i in reversed(range(len(xs))) if reverse else range(len(xs)):
            with self.layer(stride * i):
                carry, ys[i] = body(carry, xs[i])
        return carry, jax.tree.map(lambda *rows: jnp.stack(rows), *(ys[i] for i in range(len(xs))))


ROWS = jnp.linspace(0.5, 1.5, 4 * 3).reshape(4, 3)


def straight(ctl: Any, x: Any) -> Any:
    x = ctl.tag(x * 2.0, "embed")
    for i in range(3):
        with ctl.layer(i):
            x = x + ctl.tag(jnp.sin(x), "mlp_out")
            x = ctl.tag(x, "resid_post")
    return {"logits": ctl.tag(x.sum(), "logits"), "x": x}


def inner_jit(ctl: Any, x: Any) -> Any:
    @ctl.jit
    def block(x: Any) -> Any:
        y = ctl.tag(jnp.tanh(x), "mlp_out")
        return x + y * y

    for i in range(3):
        with ctl.layer(i):
            x = block(x)
    return x


def nested_jit(ctl: Any, x: Any) -> Any:
    inner = ctl.jit(lambda x: ctl.tag(x * x, "a") + 1.0)
    return ctl.jit(lambda x: ctl.tag(inner(x) * 2.0, "b"))(x)


def checkpointed(ctl: Any, x: Any) -> Any:
    @ctl.checkpoint
    def block(x: Any) -> Any:
        return jnp.cos(ctl.tag(jnp.sin(x) * x, "mlp_out")) + x

    for i in range(2):
        with ctl.layer(i):
            x = block(x)
    return x


def custom_rule(ctl: Any, x: Any) -> Any:
    @ctl.custom_jvp
    def cube(x: Any) -> Any:
        return ctl.tag(x * x, "square") * x

    if isinstance(cube, jax.custom_jvp):
        cube.defjvp(lambda primals, tangents: (cube(*primals), 3 * primals[0] ** 2 * tangents[0]))
    return cube(x) + 1.0


def scanned(ctl: Any, x: Any) -> Any:
    def body(x: Any, row: Any) -> Any:
        y = ctl.tag(jnp.sin(x * row), "mlp_out")
        x = ctl.tag(x + y, "resid_post")
        return x, y * 2.0

    x = ctl.tag(x, "embed")
    x, ys = ctl.scan(body, x, ROWS)
    return x, ys


def scanned_in_reverse(ctl: Any, x: Any) -> Any:
    return ctl.scan(lambda x, row: (ctl.tag(x * row, "a"), x + row), x, ROWS, stride=2, reverse=True)


def checkpointed_scan(ctl: Any, x: Any) -> Any:
    body = ctl.checkpoint(lambda x, row: (ctl.tag(jnp.sin(x) * row, "a") + x, None))
    return ctl.scan(lambda x, row: (body(x, row)[0], x), x, ROWS)


def nested_scan(ctl: Any, x: Any) -> Any:
    def inner(x: Any, row: Any) -> Any:
        return ctl.tag(x * row, "inner"), row

    def outer(x: Any, row: Any) -> Any:
        x = ctl.tag(x + row, "outer")
        x, _ = ctl.scan(inner, x, ROWS[:2])
        return x, x.sum()

    return ctl.scan(outer, x, ROWS)


def branching(ctl: Any, x: Any) -> Any:
    x = ctl.cond(x.sum() > 0, lambda x: ctl.tag(x * 2.0, "yes"), lambda x: ctl.tag(x - 1.0, "no"), x)
    return ctl.cond(x.sum() < 0, lambda x: x, lambda x: ctl.tag(x * 3.0, "yes"), x)


def looping(ctl: Any, x: Any) -> Any:
    return ctl.while_loop(lambda x: x.sum() < 40.0, lambda x: ctl.tag(x * 2.0, "doubled"), x)


def trees(ctl: Any, x: Any) -> Any:
    both = ctl.tag({"sin": jnp.sin(x), "cos": (jnp.cos(x), x.sum())}, "both")
    return both["sin"] + both["cos"][0] * both["cos"][1]


def constants(ctl: Any, x: Any) -> Any:
    table = jnp.arange(3.0)
    return ctl.tag(x + table, "a") * jnp.array([1.0, 2.0, 3.0])


def unused(ctl: Any, x: Any) -> Any:
    ctl.tag(jnp.exp(x), "nobody_reads_me")
    return x


def returned_twice(ctl: Any, x: Any) -> Any:
    x = ctl.tag(x, "a")
    return x, x, 3.0


PROGRAMS = {
    fn.__name__: fn
    for fn in (
        straight,
        inner_jit,
        nested_jit,
        checkpointed,
        custom_rule,
        scanned,
        scanned_in_reverse,
        checkpointed_scan,
        nested_scan,
        branching,
        looping,
        trees,
        constants,
        unused,
        returned_twice,
    )
}


def jax_form(name: str) -> Callable[[Any], Any]:
    """The program for JAX, always the same function object, so that traces are reused."""
    return _FORMS[name]


_FORMS = {name: partial(fn, Jax) for name, fn in PROGRAMS.items()}
