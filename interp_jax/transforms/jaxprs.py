"""Small tools on jaxprs that every interpreter of ours shares.

They use only what `jax.extend.core` and `jax.interpreters` publish: evaluating one equation, finding the jaxprs
inside an equation, and looking for sows.

>>> import jax
>>> closed = jax.make_jaxpr(jax.jit(lambda x: x + 1))(1.0)
>>> [name for name, inner in inner_jaxprs(closed.eqns[0])]
['jaxpr']

Source: JAX's own `eval_jaxpr` documents the protocol for binding an equation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from interp_jax.core.errors import InvalidInputError, UnsupportedModelError, four_part
from interp_jax.core.sites import Site
from interp_jax.transforms.sowing import INHERITED, NO_EFFECTS, SITE_TAG, LoopLayer, kept, layer_in, sow_p


def evaluate(eqn: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """The results of an equation `eqn` on the given operands, under its own context and source line."""
    with at_equation(eqn):
        return bind(eqn, operands)


def bind(eqn: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """The results of an equation `eqn` on the given operands, in the present place."""
    primitive = eqn.primitive
    bound = primitive.get_bind_params(eqn.params)
    # Until JAX 0.9 or so the functions among the parameters came apart from the rest.
    subfuns, params = bound if isinstance(bound, tuple) else ((), bound)
    out = primitive.bind(*subfuns, *operands, **params)
    return list(out) if primitive.multiple_results else [out]


@contextmanager
def at_equation(eqn: JaxprEqn) -> Iterator[None]:
    """Context in which what is done is done in the place of `eqn`: its source line, names and settings."""
    name_stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=name_stack), eqn.ctx.manager:
        yield


def inner_jaxprs(eqn: JaxprEqn) -> Iterator[tuple[str, Jaxpr]]:
    """Every jaxpr among the parameters of `eqn`, with the name of the parameter."""
    for name, param in eqn.params.items():
        for item in param if isinstance(param, (tuple, list)) else (param,):
            if isinstance(item, ClosedJaxpr):
                yield name, item.jaxpr
            elif isinstance(item, Jaxpr):
                yield name, item


class Outline(NamedTuple):
    """What an interpreter wants to know of a jaxpr before it runs it.

    `busy` holds the indices of the equations that sow or have a sow inside, at any depth; `frees` says for each
    equation which variables nobody reads after it; `unread` holds the indices of those without a result that is read.
    """

    busy: frozenset[int]
    frees: tuple[tuple[Var, ...], ...]
    unread: frozenset[int]


_OUTLINES: WeakKeyDictionary[Jaxpr, Outline] = WeakKeyDictionary()


def outline_of(jaxpr: Jaxpr) -> Outline:
    """The outline of `jaxpr`, made once."""
    outline = _OUTLINES.get(jaxpr)
    if outline is None:
        outline = _OUTLINES[jaxpr] = _make_outline(jaxpr)
    return outline


def _make_outline(jaxpr: Jaxpr) -> Outline:
    seen: set[Any] = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    busy, frees, unread = set(), [], set()
    for index in range(len(jaxpr.eqns) - 1, -1, -1):
        eqn = jaxpr.eqns[index]
        if eqn.primitive is sow_p or any(outline_of(inner).busy for _, inner in inner_jaxprs(eqn)):
            busy.add(index)
        if seen.isdisjoint(eqn.outvars):
            unread.add(index)
        mentioned = [*(atom for atom in eqn.invars if not isinstance(atom, Literal)), *eqn.outvars]
        frees.append(tuple(dict.fromkeys(var for var in mentioned if var not in seen)))
        seen.update(mentioned)
    return Outline(frozenset(busy), tuple(reversed(frees)), frozenset(unread))


_WITHOUT_EFFECTS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def without_effects_of_sows(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The program `closed`, traced to be harvested, with sows that have no effects; for the same one the same."""
    if not outline_of(closed.jaxpr).busy:
        return closed
    if closed not in _WITHOUT_EFFECTS:
        _WITHOUT_EFFECTS[closed] = closed.replace(jaxpr=_without_effects(closed.jaxpr))
    return _WITHOUT_EFFECTS[closed]


def _without_effects(jaxpr: Jaxpr) -> Jaxpr:
    busy = outline_of(jaxpr).busy
    if not busy:
        return jaxpr
    if jaxpr not in _WITHOUT_EFFECTS:
        eqns = [_equation_without_effects(eqn) if i in busy else eqn for i, eqn in enumerate(jaxpr.eqns)]
        effects = {effect for eqn in eqns for effect in eqn.effects}
        _WITHOUT_EFFECTS[jaxpr] = jaxpr.replace(eqns=eqns, effects=jaxpr.effects - (kept() - effects))
    return _WITHOUT_EFFECTS[jaxpr]


def _equation_without_effects(eqn: JaxprEqn) -> JaxprEqn:
    if eqn.primitive is sow_p:
        return eqn.replace(effects=NO_EFFECTS)

    plain = _with_jaxprs(eqn, _without_effects)
    effects = {effect for _, jaxpr in inner_jaxprs(plain) for effect in jaxpr.effects}
    return plain.replace(effects=eqn.effects - (kept() - effects))


_WITHOUT_SOWS: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()


def without_sows(jaxpr: Jaxpr, dropped: Callable[[JaxprEqn], bool]) -> Jaxpr:
    """A jaxpr in which some sows are what they are in an ordinary program: nothing.

    Args:
        jaxpr: The program.
        dropped: Whether a sow is taken out; hashable, as the result for it is kept.

    Returns:
        The program without them, always the same object, so that calls of one function stay calls of one function.
    """
    busy = outline_of(jaxpr).busy
    if not busy:
        return jaxpr
    known = _WITHOUT_SOWS.setdefault(jaxpr, {})
    if dropped not in known:
        known[dropped] = _drop_sows(jaxpr, busy, dropped)
    return known[dropped]


def _drop_sows(jaxpr: Jaxpr, busy: frozenset[int], dropped: Callable[[JaxprEqn], bool]) -> Jaxpr:
    instead: dict[Any, Any] = {}

    def renamed(atoms: Sequence[Any]) -> list[Any]:
        return [atom if isinstance(atom, Literal) else instead.get(atom, atom) for atom in atoms]

    eqns = []
    for index, eqn in enumerate(jaxpr.eqns):
        eqn = eqn.replace(invars=renamed(eqn.invars)) if instead else eqn
        if index not in busy:
            eqns.append(eqn)
        elif eqn.primitive is not sow_p:
            eqns.append(equation_without_sows(eqn, dropped))
        elif dropped(eqn):
            instead.update(zip(eqn.outvars, eqn.invars, strict=False))
        else:
            eqns.append(eqn)
    is_same = len(eqns) == len(jaxpr.eqns) and all(a is b for a, b in zip(eqns, jaxpr.eqns, strict=True))
    return jaxpr if is_same else jaxpr.replace(eqns=eqns, outvars=renamed(jaxpr.outvars))


def equation_without_sows(eqn: JaxprEqn, dropped: Callable[[JaxprEqn], bool]) -> JaxprEqn:
    """The equation `eqn`, no sow itself, with the sows inside that are `dropped` taken out."""
    return _with_jaxprs(eqn, lambda jaxpr: without_sows(jaxpr, dropped))


_CLOSED: WeakKeyDictionary[Any, dict[Jaxpr, ClosedJaxpr]] = WeakKeyDictionary()


def _with_jaxprs(eqn: JaxprEqn, change: Callable[[Jaxpr], Jaxpr]) -> JaxprEqn:
    """An equation with every jaxpr among its parameters changed."""

    def inside(param: Any) -> Any:
        if isinstance(param, (tuple, list)) and any(isinstance(item, (ClosedJaxpr, Jaxpr)) for item in param):
            items = list(map(inside, param))
            if all(a is b for a, b in zip(items, param, strict=True)):
                return param
            return type(param)(*items) if hasattr(param, "_fields") else type(param)(items)
        if isinstance(param, ClosedJaxpr):
            new = change(param.jaxpr)
            known = _CLOSED.setdefault(param, {})
            return param if new is param.jaxpr else known.setdefault(new, param.replace(jaxpr=new))
        return change(param) if isinstance(param, Jaxpr) else param

    params = {name: inside(param) for name, param in eqn.params.items()}
    return eqn if all(params[name] is eqn.params[name] for name in params) else eqn.replace(params=params)


CUSTOM_RULES = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})
"""Primitives that call a function with a derivative rule of its own."""

CHECKPOINTS = frozenset({"checkpoint", "remat", "remat2"})
"""Primitives that call a function whose values are computed again in the backward pass."""


def scan_counts(eqn: JaxprEqn) -> tuple[int, int]:
    """How many of the operands of `eqn`, a scan, are constants and how many carry; its `xs` come after them."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    # From JAX 0.11 on they are told as trees.
    n_consts, n_carry, _ = (len(list(tree)) for tree in eqn.params["ft_in"].unpack())
    return n_consts, n_carry


_CALLEE_PARAMS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_CALLS = frozenset({"jit", "pjit", "core_call", "closed_call", *CUSTOM_RULES, *CHECKPOINTS})

OPENABLE = frozenset({"scan", "while", "cond", "shard_map", *_CALLS})
"""Primitives whose jaxprs an interpreter can run itself."""


def callee_of(eqn: JaxprEqn) -> ClosedJaxpr:
    """The one jaxpr that `eqn`, a call (jit, checkpoint, a custom rule), calls.

    Raises:
        UnsupportedModelError: The equation is a call of a kind that cannot be opened.
    """
    for name in _CALLEE_PARAMS if eqn.primitive.name in _CALLS else ():
        inner = eqn.params.get(name)
        if isinstance(inner, ClosedJaxpr):
            return inner
        if isinstance(inner, Jaxpr):
            return ClosedJaxpr(inner, ())
    raise UnsupportedModelError(
        four_part(
            f"A site lies inside {eqn.primitive.name} ({source_line(eqn)}), a call that cannot be opened",
            expected="jit, checkpoint, custom_jvp, custom_vjp, scan, while or cond around a site.",
            fix="leave the site unselected, or use the running pass with engine='python'.",
        )
    )


def with_callee(eqn: JaxprEqn, callee: ClosedJaxpr) -> JaxprEqn:
    """The call `eqn` with another jaxpr to call, `callee`."""
    (name,) = (name for name in _CALLEE_PARAMS if isinstance(eqn.params.get(name), ClosedJaxpr))
    return eqn.replace(params={**eqn.params, name: callee})


def is_site(eqn: JaxprEqn) -> bool:
    """Whether `eqn` is a sow with the tag of sites."""
    return eqn.primitive is sow_p and eqn.params["tag"] == SITE_TAG


class Scope(NamedTuple):
    """The layer scope an equation lies in: the layer, and how many loops (`n_loops`) are around the scope itself."""

    layer: int | LoopLayer | None = None
    n_loops: int = 0


def scope_of(eqn: JaxprEqn, outer: Scope, n_loops: int) -> Scope:
    """The scope of an equation.

    Args:
        eqn: The equation.
        outer: The scope of the call or loop the equation lies in.
        n_loops: How many loops are around the equation.

    Returns:
        Its own innermost layer scope, or `outer` if it has none.
    """
    layer = layer_in(eqn.source_info.name_stack)
    return outer if layer is INHERITED else Scope(layer, n_loops)


def site_of(name: str, scope: Scope, loop_indices: Sequence[int]) -> Site:
    """The site of a sow of this name, given its scope and the `loop_indices` around it (outermost first)."""
    if not isinstance(scope.layer, LoopLayer):
        return Site(scope.layer, name)
    if scope.n_loops == 0:
        raise InvalidInputError(
            four_part(
                f"Site {name!r} lies in layer_scope(loop_layer()) outside any loop",
                expected="loop_layer in the body of a scan over layers.",
                fix="use layer_scope(i) here.",
            )
        )
    return Site(scope.layer.offset + scope.layer.stride * loop_indices[scope.n_loops - 1], name)


def is_loop(eqn: JaxprEqn) -> bool:
    """Whether `eqn` runs its jaxpr several times, which gives its body a loop index."""
    return eqn.primitive.name in ("scan", "while")


def any_site(jaxpr: Jaxpr, wanted: Callable[[str, Scope], bool], scope: Scope, n_loops: int) -> bool:
    """Whether a jaxpr in this scope and `n_loops` loops, or any inside it, has a site that is wanted."""
    for position in outline_of(jaxpr).busy:
        eqn = jaxpr.eqns[position]
        if is_site(eqn):
            if wanted(eqn.params["name"], scope_of(eqn, scope, n_loops)):
                return True
        elif any_site_inside(eqn, wanted, scope, n_loops):
            return True
    return False


def any_site_inside(eqn: JaxprEqn, wanted: Callable[[str, Scope], bool], scope: Scope, n_loops: int) -> bool:
    """Whether a jaxpr among the parameters of `eqn`, in this scope and `n_loops` loops, has a wanted site."""
    inner = [jaxpr for _, jaxpr in inner_jaxprs(eqn)]
    if not inner:
        return False
    own = scope_of(eqn, scope, n_loops)
    return any(any_site(jaxpr, wanted, own, n_loops + is_loop(eqn)) for jaxpr in inner)


def source_line(eqn: JaxprEqn) -> str:
    """Where in the user's (or upstream's) code `eqn` comes from: "file.py:12 (function)"."""
    return os.path.basename(source_info_util.summarize(eqn.source_info))
