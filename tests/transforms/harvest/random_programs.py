"""Random programs that sow, in three forms: for JAX, for plain Python, and for Oryx.

A program is a tree of blocks drawn from a seed. `jax_form` writes it with jit, scan, while_loop and so on around the
`sow` it is given, ours or Oryx's. `evaluate` walks the tree with Python loops and branches on concrete numbers; it is
the truth, and shares no code with any harvest.

This module imports nothing of this package, and runs on JAX 0.4.38 as well, where Oryx's last release does.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

TAG = "t"
OTHER_TAG = "u"
MODES = ("strict", "append", "clobber", "cond_clobber")
SIZE = 3
BATCH = 2


@dataclass(frozen=True)
class Block:
    """A step from a vector to a vector: of some kind, with blocks inside, a name, a mode and a number."""

    kind: str
    inner: tuple[tuple[Block, ...], ...] = ()
    name: str = ""
    mode: str = ""
    number: float = 1.0
    tag: str = TAG

    def __str__(self) -> str:
        return "\n".join(_lines(self, 0))


def _lines(block: Block, depth: int) -> list[str]:
    parts = (block.kind, block.name, block.mode, f"{block.number:.2f}", block.tag if block.kind == "sow" else "")
    about = " ".join(part for part in parts if part)
    lines = ["  " * depth + about]
    for i, blocks in enumerate(block.inner):
        if i:
            lines.append("  " * depth + "else")
        lines += [line for inner in blocks for line in _lines(inner, depth + 1)]
    return lines


CALLS = ("jit", "checkpoint", "custom_jvp", "custom_vjp", "nest")
LOOPS = ("scan", "reverse_scan", "fori", "while")
KINDS = ("op", "op", "sow", "sow", "sow", *CALLS, *LOOPS, "cond", "vmap", "grad")


@dataclass
class _Draw:
    """Draws blocks so that modes and names go together as Harvest demands."""

    rng: random.Random
    for_oryx: bool
    careless: bool
    n_names: int = 0
    names: list[str] = field(default_factory=list)
    clobbered: list[str] = field(default_factory=list)

    def blocks(self, depth: int, around: tuple[str, ...], n: int | None = None) -> tuple[Block, ...]:
        n = self.rng.randint(1, 3) if n is None else n
        return tuple(self.block(depth, around) for _ in range(n))

    def block(self, depth: int, around: tuple[str, ...]) -> Block:
        kind = self.rng.choice([kind for kind in KINDS if self.fits(kind, depth, around)])
        number = round(self.rng.uniform(0.5, 1.5), 2)
        if kind == "op":
            return Block("op", number=number)
        if kind == "sow":
            return self.sow(around, number)
        if kind in LOOPS:
            number = float(self.rng.choice((1, 2, 3)))
            if self.rng.random() < 0.3 and not {*LOOPS, "vmap", "nest"} & set(around):
                around = (*around, "conditional")
        inner = self.blocks(depth + 1, (*around, kind))
        if kind == "cond":
            # Both branches sow the same names, the second with other values.
            return Block("cond", (inner, tuple(map(self.other, inner))), number=self.rng.choice((-1.0, 0.0, 1.0)))
        name = self.new_name("scope") if kind == "nest" else ""
        return Block(kind, (inner,), name=name, number=number)

    def fits(self, kind: str, depth: int, around: tuple[str, ...]) -> bool:
        if kind in ("op", "sow"):
            return True
        # Under vmap the branches of a cond would all run; a gradient through `while` does not exist backwards.
        not_in = {"cond": {"vmap"}, "while": {"grad", "vmap"}, "vmap": {"vmap"}, "nest": set(LOOPS)}
        if kind in ("custom_vjp", "custom_jvp") and "grad" in around:
            return False  # Their rules are not the derivatives of their code.
        if self.for_oryx and ORYX_FAILS.get(kind, set()) & set(around):
            return False
        return depth < 3 and not not_in.get(kind, set()) & set(around)

    def sow(self, around: tuple[str, ...], number: float) -> Block:
        mode = self.rng.choice(MODES[:-1] if self.careless and self.rng.random() < 0.2 else self.modes(around))
        tag = OTHER_TAG if self.rng.random() < 0.1 else TAG
        if self.careless and self.names and self.rng.random() < 0.1:
            return Block("sow", name=self.rng.choice(self.names), mode=mode, number=number)
        again = tag == TAG and mode == "clobber" and self.clobbered and not {"cond", "vmap"} & set(around)
        if again and self.rng.random() < 0.3:
            return Block("sow", name=self.rng.choice(self.clobbered), mode=mode, number=number)
        name = self.new_name()
        if tag == TAG and mode == "clobber" and not {"cond", "vmap", "nest"} & set(around):
            self.clobbered.append(name)
        self.names.append(name)
        return Block("sow", name=name, mode=mode, number=number, tag=tag)

    def modes(self, around: tuple[str, ...]) -> list[str]:
        """The modes a sow may have here."""
        modes = [mode for mode in MODES if not (mode in ("strict", "append") and "while" in around)]
        modes = [mode for mode in modes if not (mode == "strict" and set(LOOPS) & set(around))]
        if self.for_oryx and set(LOOPS) & set(around):
            # Its loops keep all values in the way of the last.
            return ["cond_clobber"] if "conditional" in around else modes[:-1]
        return modes[:-1] if self.for_oryx and {"vmap", "nest"} & set(around) else modes

    def new_name(self, stem: str = "") -> str:
        self.n_names += 1
        # In an order that is not that of execution.
        letter = self.rng.choice("abcxyz")
        return f"{stem or letter}{self.n_names}"

    def other(self, block: Block) -> Block:
        number = block.number if block.kind in LOOPS else round(block.number + 0.25, 2)
        inner = tuple(tuple(map(self.other, blocks)) for blocks in block.inner)
        mode = self.rng.choice(MODES[:-1]) if self.careless and block.mode and self.rng.random() < 0.1 else block.mode
        name = f"{block.name}b" if self.careless and block.mode and self.rng.random() < 0.1 else block.name
        return Block(block.kind, inner, name, mode, number, block.tag)


# What Oryx 0.2.9 refuses or gets wrong when there are sows in it: a kind of block inside others.
STAGED = {"jit", "checkpoint", "custom_jvp", "custom_vjp", "cond", "grad", *LOOPS}
ORYX_FAILS = {
    "vmap": {"conditional"},
    "custom_vjp": STAGED,
    "while": {"scan", "reverse_scan", "fori"},
    "grad": {"grad"},
    "nest": {"cond"},
}


def draw(seed: int, *, for_oryx: bool = False, careless: bool = False) -> Block:
    """The program of a seed.

    Args:
        seed: The seed.
        for_oryx: Whether to leave out what Oryx 0.2.9 is known to refuse or to get wrong.
        careless: Whether modes and names may be those that Harvest refuses.
    """
    drawing = _Draw(random.Random(seed), for_oryx, careless)
    return Block("jit", (drawing.blocks(0, (), n=drawing.rng.randint(2, 4)),))


def step(x: Any, number: float) -> Any:
    """What a block does besides its kind."""
    return jnp.sin(x * np.float32(number)) + x * np.float32(0.5)


# --- for JAX --------------------------------------------------------------------------------------------------------


def jax_form(program: Block, harvest: Any) -> Any:
    """The program as a function of a vector.

    Args:
        program: The program.
        harvest: A module with `sow`, `sow_cond` and `nest`.
    """
    return lambda x: _run_blocks(program.inner[0], x, harvest)


def _run_blocks(blocks: tuple[Block, ...], x: Any, harvest: Any) -> Any:
    for block in blocks:
        x = _run_block(block, x, harvest)
    return x


def _run_block(block: Block, x: Any, harvest: Any) -> Any:
    if block.kind == "op":
        return step(x, block.number)
    if block.kind == "sow":
        if block.mode == "cond_clobber":
            pred = jnp.sin(x.sum() * np.float32(5 * block.number)) > 0
            return harvest.sow_cond(step(x, block.number), pred, tag=block.tag, name=block.name, mode=block.mode)
        return harvest.sow(step(x, block.number), tag=block.tag, name=block.name, mode=block.mode)

    def inside(x: Any) -> Any:
        return _run_blocks(block.inner[0], x, harvest)

    n = int(block.number)
    if block.kind == "jit":
        return jax.jit(inside)(x)
    if block.kind == "checkpoint":
        return jax.checkpoint(inside)(x)
    if block.kind == "nest":
        return harvest.nest(inside, scope=block.name)(x)
    if block.kind == "custom_jvp":
        jvp = jax.custom_jvp(inside)
        jvp.defjvp(lambda primals, tangents: (jvp(*primals), tangents[0] * 7))
        return jvp(x)
    if block.kind == "custom_vjp":
        vjp = jax.custom_vjp(inside)
        vjp.defvjp(lambda x: (vjp(x), None), lambda _, g: (g * 7,))
        return vjp(x)
    if block.kind in ("scan", "reverse_scan"):
        rows = _rows(n)
        x, ys = lax.scan(lambda x, row: (inside(x + row), x * row), x, rows, reverse=block.kind == "reverse_scan")
        return x + ys.sum(0)
    if block.kind == "fori":
        return lax.fori_loop(0, n, lambda i, x: inside(x), x)
    if block.kind == "while":
        # Bounded by a traced number, so that it stays a while loop.
        bound = n + (x.sum() > 0).astype(jnp.int32)
        return lax.while_loop(lambda carry: carry[0] < bound, lambda carry: (carry[0] + 1, inside(carry[1])), (0, x))[1]
    if block.kind == "cond":
        no, yes = (lambda x, blocks=blocks: _run_blocks(blocks, x, harvest) for blocks in block.inner)
        return lax.cond(x.sum() > np.float32(block.number), yes, no, x)
    if block.kind == "vmap":
        return jax.vmap(inside)(_examples(x)).sum(0)
    if block.kind == "grad":
        return jax.grad(lambda x: inside(x).sum())(x) + x
    raise AssertionError(block.kind)


def _rows(n: int) -> Any:
    return jnp.linspace(0.25, 1.0, n * SIZE, dtype=jnp.float32).reshape(n, SIZE)


def _examples(x: Any) -> Any:
    return jnp.stack([x * np.float32(1 + i) for i in range(BATCH)])


# --- in plain Python ------------------------------------------------------------------------------------------------


@dataclass
class Value:
    """A reaped value: how many axes in front are iterations of loops, and whether its predicate was ever true."""

    value: np.ndarray
    n_loops: int = 0
    is_set: bool | np.ndarray = True


class Sowing:
    """A walk over a program in plain Python: `plants` are taken, everything else sown with the tag is reaped."""

    def __init__(self, plants: dict[str, np.ndarray] | None = None, tag: str = TAG):
        self.plants = plants or {}
        self.tag = tag
        self.iterations: tuple[int, ...] = ()
        self.examples: tuple[int, ...] = ()
        self.scopes: tuple[str, ...] = ()

    def blocks(self, blocks: tuple[Block, ...], x: Any) -> tuple[Any, dict[str, Value]]:
        reaps: dict[str, Value] = {}
        for block in blocks:
            x, new = self.block(block, x)
            for name, value in new.items():
                reaps[name] = _after(reaps.get(name), value)
        return x, reaps

    def block(self, block: Block, x: Any) -> tuple[Any, dict[str, Value]]:
        if block.kind == "op":
            return step(x, block.number), {}
        if block.kind == "sow":
            return self.sow(block, x)
        inner, n = block.inner[0], int(block.number)
        if block.kind in ("scan", "reverse_scan", "fori", "while"):
            return self.loop(block, x, n)
        if block.kind == "cond":
            return self.blocks(block.inner[int(x.sum() > block.number)], x)
        if block.kind == "vmap":
            return self.vmap(inner, x)
        if block.kind == "nest":
            self.scopes += (block.name,)
            x, reaps = self.blocks(inner, x)
            self.scopes = self.scopes[:-1]
            return x, reaps
        if block.kind == "grad":
            _, reaps = self.blocks(inner, x)
            return _gradient(inner, x, self) + x, reaps
        return self.blocks(inner, x)

    def sow(self, block: Block, x: Any) -> tuple[Any, dict[str, Value]]:
        value = step(x, block.number)
        path = "/".join((*self.scopes, block.name))
        if path in self.plants:
            planted = self.plants[path]
            for index in (*(self.iterations if block.mode == "append" else ()), *self.examples):
                planted = planted[index]
            return jnp.asarray(planted), {}
        if block.tag != self.tag:
            return value, {}
        if block.mode == "cond_clobber":
            is_set = bool(np.sin(np.float32(x.sum() * np.float32(5 * block.number))) > 0)
            return value, {path: Value(np.asarray(value) if is_set else np.zeros(SIZE, np.float32), 0, is_set)}
        return value, {path: Value(np.asarray(value))}

    def loop(self, block: Block, x: Any, n: int) -> tuple[Any, dict[str, Value]]:
        is_scan = "scan" in block.kind
        rows, ys, made = _rows(n), {}, {}
        modes = _modes(block)
        n_runs = n + int(x.sum() > 0) if block.kind == "while" else n
        for i in reversed(range(n)) if block.kind == "reverse_scan" else range(n_runs):
            if is_scan:
                ys[i] = x * rows[i]
                x = x + rows[i]
            self.iterations += (i,)
            x, made[i] = self.blocks(block.inner[0], x)
            self.iterations = self.iterations[:-1]
        reaps: dict[str, Value] = {}
        for name in next(iter(made.values())):
            if modes[name.split("/")[-1]] == "append":
                values = [made[i][name] for i in range(n)]
                reaps[name] = Value(np.stack([value.value for value in values]), values[0].n_loops + 1)
            else:
                for reaped in made.values():
                    reaps[name] = _after(reaps.get(name), reaped[name])
        return (x + sum(ys.values()) if is_scan else x), reaps

    def vmap(self, inner: tuple[Block, ...], x: Any) -> tuple[Any, dict[str, Value]]:
        outs, made = [], []
        for i, example in enumerate(_examples(x)):
            self.examples += (i,)
            out, reaps = self.blocks(inner, example)
            self.examples = self.examples[:-1]
            outs.append(out)
            made.append(reaps)
        stacked = {}
        for name, first in made[0].items():
            values = np.stack([reaps[name].value for reaps in made], axis=first.n_loops)
            stacked[name] = Value(values, first.n_loops, np.stack([reaps[name].is_set for reaps in made]))
        return sum(outs), stacked


def _after(old: Value | None, new: Value) -> Value:
    """What is reaped when a name is sown again."""
    is_set = np.asarray(new.is_set)
    if old is None or is_set.all():
        return new
    shape = is_set.shape + (1,) * (new.value.ndim - is_set.ndim)
    value = np.where(is_set.reshape(shape), new.value, old.value)
    return Value(value, new.n_loops, np.asarray(old.is_set) | is_set)


def _modes(block: Block) -> dict[str, str]:
    own = {block.name: block.mode} if block.kind == "sow" else {}
    return {**own, **{k: v for blocks in block.inner for one in blocks for k, v in _modes(one).items()}}


def _gradient(inner: tuple[Block, ...], x: Any, at: Sowing) -> Any:
    """The gradient of a block, by JAX, of the block without its sows (with what is planted in their places)."""

    class Planted:
        @staticmethod
        def sow(value: Any, *, name: str, **_: Any) -> Any:
            path = "/".join((*at.scopes, name))
            assert path not in at.plants, "not drawn: planting under grad"
            return value

        @staticmethod
        def sow_cond(value: Any, pred: Any, **options: Any) -> Any:
            return Planted.sow(value, **options)

        nest = staticmethod(lambda f, scope: f)

    return jax.grad(lambda x: _run_blocks(inner, x, Planted).sum())(x)


def evaluate(
    program: Block, x: Any, plants: dict[str, np.ndarray] | None = None, tag: str = TAG
) -> tuple[Any, dict[str, np.ndarray]]:
    """The result of a program and what it sows with a tag, by path of names ("scope/name")."""
    out, reaps = Sowing(plants, tag).blocks(program.inner[0], x)
    return np.asarray(out), {name: value.value for name, value in reaps.items()}


def flat(reaps: Any, scope: str = "") -> dict[str, Any]:
    """A harvest's nested dictionary by path of names."""
    out = {}
    for name, value in reaps.items():
        out.update(flat(value, f"{scope}{name}/") if isinstance(value, dict) else {scope + name: value})
    return out


def nested(plants: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    out: dict[str, Any] = {}
    for path, value in plants.items():
        *scopes, name = path.split("/")
        here = out
        for scope in scopes:
            here = here.setdefault(scope, {})
        here[name] = value
    return out


def names_under(block: Block, kind: str, inside: bool = False) -> set[str]:
    """The names sown somewhere inside a block of a kind."""
    own = {block.name} if inside and block.kind == "sow" else set()
    inside = inside or block.kind == kind
    return own.union(*(names_under(one, kind, inside) for blocks in block.inner for one in blocks))
