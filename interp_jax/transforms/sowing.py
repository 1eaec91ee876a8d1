"""`sow`: the tag that makes a site, as a JAX primitive that compiles to nothing.

A sow is an identity on its value with a name attached. It is an equation of its own in a jaxpr, so that
interpreters (the running pass, harvest) find it; it lowers to its operands, so that a program nobody listens to
compiles to the same StableHLO as one without sows. Inside `layer_scope(i)` a sow's site is `Site(i, name)`; inside
the body of a scan over layers, `layer_scope(loop_layer())` says how the layer follows from the loop's index.

The layer travels in JAX's name stack, not in the sow: a jit-compiled block that is called once per layer keeps one
trace for all of them, and interpreters find the layer at the call.

>>> import jax
>>> def layer(x):
...     with layer_scope(3):
...         return sow(x * 2.0, name="mlp_out")
>>> eqn = jax.make_jaxpr(layer)(1.0).eqns[-1]
>>> print(eqn.primitive, layer_in(eqn.source_info.name_stack))
sow 3

Sharp edges: under differentiation a sow's primal is sown and its tangent passes by, so a value replaced inside a
function that was already differentiated does not change the derivative there. Under vmap the value keeps its
layout; readers present it with the mapped axis first.

Source: Oryx Harvest for the semantics of tag, name, mode and key.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import source_info_util
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from interp_jax.core.errors import InvalidInputError, four_part

# The source line of a sow is the line that calls it.
source_info_util.register_exclusion(__file__)

SITE_TAG = "site"
NO_EFFECTS: frozenset[Any] = frozenset()
MODES = ("strict", "append", "clobber", "cond_clobber")


class LoopLayer(NamedTuple):
    """How the layer of a sow in a loop's body follows from the loop's index: `offset + stride * index`."""

    stride: int
    offset: int


@dataclass(frozen=True)
class _TracedLoopLayer:
    """A `LoopLayer` together with the loop's own index, which only the python engine needs."""

    spec: LoopLayer
    index: Any
    length: int


class SownHere(NamedTuple):
    """What a sow hands to a listener: its name, its layer, and the index and length of the loop the layer follows."""

    name: str
    layer: int | LoopLayer | None
    index: Any
    length: int | None


_LAYER: ContextVar[int | LoopLayer | _TracedLoopLayer | None] = ContextVar("layer", default=None)
HARVESTING: ContextVar[bool] = ContextVar("harvesting", default=False)
_harvest_traces = jax.make_user_context(default_value=False)
# Set by the python engine inside its greenlet: gets every sow of the site tag and returns the value to go on with.
LISTENER: ContextVar[Callable[[SownHere, Any], Any] | None] = ContextVar("listener", default=None)


class layer_scope:  # noqa: N801 - used like a function
    """Context in which every sow belongs to a layer.

    Args:
        layer: Index of the layer (>= 0), None for outside the layers, or `loop_layer(...)` in the body of a scan.

    Raises:
        InvalidInputError: The layer is negative or not an integer.
    """

    def __init__(self, layer: int | LoopLayer | _TracedLoopLayer | None):
        is_index = isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0
        if not (layer is None or is_index or isinstance(layer, (LoopLayer, _TracedLoopLayer))):
            raise InvalidInputError(
                four_part(
                    f"{layer!r} ({type(layer).__name__}) was given as a layer",
                    where="layer_scope",
                    expected="an int >= 0, None, or loop_layer(...).",
                    fix="inside a scan over layers use layer_scope(loop_layer()); elsewhere give the layer's index.",
                )
            )
        self._layer = layer
        self._named_scope = jax.named_scope(_label(layer.spec if isinstance(layer, _TracedLoopLayer) else layer))

    def __enter__(self) -> None:
        self._token = _LAYER.set(self._layer)
        self._named_scope.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self._named_scope.__exit__(*exc)
        _LAYER.reset(self._token)


def _label(layer: int | LoopLayer | None) -> str:
    """The name-stack entry for a layer: "ij.layer=3", "ij.layer=none" or "ij.layer=1+2*loop"."""
    if isinstance(layer, LoopLayer):
        return f"ij.layer={layer.offset}+{layer.stride}*loop"
    return f"ij.layer={'none' if layer is None else layer}"


_LABEL = re.compile(r"ij\.layer=(none|\d+)(?:\+(\d+)\*loop)?")

INHERITED: Any = object()
"""What `layer_in` returns for a name stack without a layer scope."""


@functools.lru_cache(maxsize=4096)
def layer_in(name_stack: Any) -> int | LoopLayer | None:
    """The innermost layer scope in a `name_stack`, or `INHERITED`."""
    found = _LABEL.findall(str(name_stack))
    if not found:
        return INHERITED
    number, stride = found[-1]
    if stride:
        return LoopLayer(int(stride), int(number))
    return None if number == "none" else int(number)


def loop_layer(stride: int = 1, offset: int = 0, *, index: Any = None, length: int | None = None) -> Any:
    """The layer of the current iteration of the loop in whose body this is called: `offset + stride * index`.

    Args:
        stride: Layers per iteration (2 for a scan over pairs of layers).
        offset: Layer of the first iteration.
        index: The loop's own (traced) index. Only `engine="python"` needs it.
        length: The loop's number of iterations. Only `engine="python"` needs it.

    Returns:
        A value for `layer_scope`.
    """
    spec = LoopLayer(stride, offset)
    if index is None:
        return spec
    if length is None:
        raise InvalidInputError(
            four_part(
                "loop_layer was given an index but no length",
                expected="both, or neither.",
                fix="pass length= the number of iterations of the loop.",
            )
        )
    return _TracedLoopLayer(spec, index, length)


sow_p = Primitive("sow")
sow_p.multiple_results = True


def sow(value: Any, *, name: str, tag: Hashable = SITE_TAG, mode: str = "strict", key: Any = None) -> Any:
    """Mark a value as a site; the identity for everything but those who listen.

    Args:
        value: An array or pytree of arrays (PRNG key arrays too).
        name: Name of the site.
        tag: Family of sows this one belongs to; any hashable but None. Sites have the tag "site".
        mode: What a harvest does with several sows of one name: "strict" (an error), "append" (the iterations of a
            scan stacked) or "clobber" (the last).
        key: A value the sow is made to depend on.

    Returns:
        The value, or what a listener put in its place.

    Raises:
        InvalidInputError: The name is not a string, the tag None or without a hash, or the mode unknown.
    """
    _check_names(name, tag, mode, MODES[:3])
    layer = _LAYER.get()
    listener = LISTENER.get()
    if listener is not None and tag == SITE_TAG:
        is_traced = isinstance(layer, _TracedLoopLayer)
        spec, index, length = (layer.spec, layer.index, layer.length) if is_traced else (layer, None, None)
        return listener(SownHere(name, spec, index, length), value)
    return _bind(value, [], jax.tree.leaves(key), name=name, tag=tag, mode=mode)


def sow_cond(value: Any, pred: Any, *, tag: Hashable, name: str, mode: str = "cond_clobber") -> Any:
    """Mark a value that counts only where a predicate is true.

    Args:
        value: An array or pytree of arrays.
        pred: A scalar bool. In a loop, the value of the last iteration with a true predicate is reaped, and zeros if
            there was none.
        tag: Family of sows this one belongs to.
        name: Name of the value.
        mode: "cond_clobber".

    Returns:
        The value, or what was planted in its place.

    Raises:
        InvalidInputError: As for `sow`, or the predicate is not a scalar bool.
    """
    _check_names(name, tag, mode, MODES[3:])
    pred = jnp.asarray(pred)
    if pred.shape != () or pred.dtype != jnp.bool_:
        raise InvalidInputError(
            four_part(
                f"A predicate {pred.dtype}{list(pred.shape)} was given",
                where=f"sow_cond(name={name!r})",
                expected="a scalar bool.",
                fix="reduce the predicate to one bool, or sow jnp.where(pred, value, other).",
            )
        )
    return _bind(value, [pred], [], name=name, tag=tag, mode=mode)


def _check_names(name: Any, tag: Any, mode: str, modes: Sequence[str]) -> None:
    if not (isinstance(name, str) and name) or tag is None or not _has_hash(tag):
        raise InvalidInputError(
            four_part(
                f"sow(name={name!r}, tag={tag!r}) was given",
                expected="a non-empty string as name, and a hashable tag other than None.",
                fix="name the site, for example sow(x, name='mlp_out').",
            )
        )
    if mode not in modes:
        hint = " (sow_cond has cond_clobber, sow the other modes)" if mode in MODES else ""
        where = f"a sow named {name!r}{hint}"
        raise InvalidInputError(
            four_part(
                f"Unknown mode {mode!r}", where=where, names=modes, given=str(mode), fix="use one of these modes."
            )
        )


def _has_hash(tag: Any) -> bool:
    try:
        hash(tag)
    except TypeError:
        return False
    return True


def _bind(value: Any, predicate: list[Any], keys: list[Any], **params: Any) -> Any:
    leaves, tree = jax.tree.flatten(value)
    leaves = [leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf) for leaf in leaves]
    outs = sow_p.bind(*leaves, *predicate, *keys, **params, tree=tree, has_predicate=bool(predicate), batch_axes=())
    return jax.tree.unflatten(tree, outs)


def value_seen(leaves: Sequence[Any], params: dict[str, Any]) -> Any:
    """The `leaves` of a sow with these `params` as its reader sees them: a pytree, mapped axes first."""
    leaves = list(leaves[: params["tree"].num_leaves])
    for depth, axes in enumerate(reversed(params["batch_axes"])):
        leaves = [
            leaf if axis is None else jnp.moveaxis(leaf, axis + depth, depth)
            for leaf, axis in zip(leaves, axes, strict=True)
        ]
    return jax.tree.unflatten(params["tree"], leaves)


def predicate_seen(operands: Sequence[Any], params: dict[str, Any]) -> Any:
    """The predicate among the `operands` of a sow with these `params`, mapped axes first; None without one."""
    return operands[_n_values(params)] if params["has_predicate"] else None


def leaves_of_seen(value: Any, params: dict[str, Any]) -> list[Any]:
    """The inverse of `value_seen`: from the value a reader sees to the results of a sow with these `params`."""
    leaves = jax.tree.leaves(value)
    stack = list(enumerate(reversed(params["batch_axes"])))
    for depth, axes in reversed(stack):
        leaves = [
            leaf if axis is None else jnp.moveaxis(leaf, depth, axis + depth)
            for leaf, axis in zip(leaves, axes, strict=True)
        ]
    return leaves


def _n_values(params: dict[str, Any]) -> int:
    return params["tree"].num_leaves


def _identity(*operands: Any, **params: Any) -> list[Any]:
    return list(operands[: _n_values(params)])


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[list[Any], list[Any]]:
    return sow_p.bind(*primals, **params), list(tangents[: _n_values(params)])


def _transpose(cotangents: Sequence[Any], *operands: Any, **params: Any) -> list[Any]:
    return [*cotangents, *[None] * (len(operands) - _n_values(params))]


def _batch(operands: Sequence[Any], axes: Sequence[int | None], **params: Any) -> tuple[list[Any], list[Any]]:
    if params["has_predicate"]:
        # A predicate is compared with its value example by example, so both get the mapped axis in front.
        (size,) = {operand.shape[axis] for operand, axis in zip(operands, axes, strict=True) if axis is not None}
        operands = [
            jnp.broadcast_to(operand, (size, *jnp.shape(operand))) if axis is None else jnp.moveaxis(operand, axis, 0)
            for operand, axis in zip(operands, axes, strict=True)
        ]
        axes = [0] * len(operands)
    own_axes = tuple(axes[: _n_values(params)])
    params["batch_axes"] = (*params["batch_axes"], own_axes)
    return sow_p.bind(*operands, **params), list(own_axes)


def _abstract(*operands: Any, **params: Any) -> tuple[list[Any], Any]:
    return _identity(*operands, **params), kept() if HARVESTING.get() else NO_EFFECTS


@functools.cache
def kept() -> Any:
    """The effects of `jax.debug.callback`, which every transformation of JAX keeps though nobody reads its result."""
    return jax.make_jaxpr(lambda x: jax.debug.callback(lambda _: None, x))(0.0).effects


@contextmanager
def harvesting() -> Iterator[None]:
    """Context in which a program is traced to be harvested: sows survive, and JAX keeps such traces apart.

    A sow is as dead as any identity whose result nobody reads, and JAX drops it, under a gradient even from the body of
    a scan. In this context it has an effect, which `jaxprs.without_effects_of_sows` takes off the finished trace.
    """
    token = HARVESTING.set(True)
    try:
        with _harvest_traces(True):
            yield
    finally:
        HARVESTING.reset(token)


sow_p.def_impl(_identity)
sow_p.def_effectful_abstract_eval(_abstract)
mlir.register_lowering(sow_p, lambda ctx, *operands, **params: _identity(*operands, **params))
ad.primitive_jvps[sow_p] = _jvp
ad.primitive_transposes[sow_p] = _transpose
batching.primitive_batchers[sow_p] = _batch
