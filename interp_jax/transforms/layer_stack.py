"""Layers as one pytree with a leading layer axis, and the scan that runs them.

A model of 32 equal layers, unrolled, is traced and compiled 32 times over. Stacked, its layers are one subtree whose
leaves have the layer as their first axis, and `scan_layers` compiles one layer. Sites keep their layers: the body runs
in `layer_scope(loop_layer())`, which the running pass and harvest know how to step and to reap.

>>> from interp_jax.transforms.sowing import sow
>>> layers = [{"w": np.full(2, i, np.float32)} for i in range(3)]
>>> stacked = stack_layers(layers)
>>> stacked["w"].shape, len(unstack_layers(stacked))
((3, 2), 3)
>>> def block(x, layer):
...     return sow(x + layer["w"], name="resid_post"), None
>>> scan_layers(block, jnp.ones(2), stacked)[0]
Array([4., 4.], dtype=float32)

Layers that alternate (global and local attention) are stacked in groups of `stride`: a tuple of subtrees, the first
with layers 0, stride, 2 stride, ..., the second with layers 1, stride + 1, and so on.

Sharp edges: `donate=True` deletes the arrays it was given as soon as they are copied, so that there is never a second
copy of more than one of them; NumPy arrays cannot be deleted, only let go. The index of the loop is an operand of the
scan only while the python engine listens, so the program nobody listens to has no trace of it.

Source: interp_jax.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part
from interp_jax.core.interventions import same_form
from interp_jax.transforms.compilations import counted_jit
from interp_jax.transforms.sowing import LISTENER, layer_scope, loop_layer


def stack_layers(layers: Sequence[Any], *, stride: int = 1, donate: bool = False) -> Any:
    """One pytree with a leading layer axis, from a pytree per layer.

    Args:
        layers: The layers, first to last: pytrees of arrays, equal in structure, shapes and dtypes (under a `stride`,
            those that are a multiple of it apart).
        stride: How many kinds of layers alternate.
        donate: Whether to delete the layers' arrays, each once it is copied.

    Returns:
        The stacked layers; with a `stride` above 1, a tuple of as many.

    Raises:
        InvalidInputError: There are no layers, or their number is not a multiple of the stride.
        ShapeError: Layers differ.
    """
    layers = list(layers)
    if stride < 1 or not layers or len(layers) % stride:
        raise InvalidInputError(
            four_part(
                f"{len(layers)} layers and stride={stride} were given",
                where="stack_layers",
                expected="a stride of at least 1, and a positive multiple of it as the number of layers.",
                fix="give all layers, and as stride the number of kinds that alternate.",
            )
        )
    groups = [layers[offset::stride] for offset in range(stride)]
    _check_same(groups, stride)
    uses = Counter(map(id, jax.tree.leaves(layers))) if donate else None
    stacked = tuple(jax.tree.map(lambda *leaves: _stacked(leaves, uses), *group) for group in groups)
    return stacked if stride > 1 else stacked[0]


def unstack_layers(stacked: Any, *, stride: int = 1, donate: bool = False) -> list[Any]:
    """A pytree per layer, from one with a leading layer axis: the inverse of `stack_layers`.

    Args:
        stacked: What `stack_layers` returned for this `stride`.
        stride: How many kinds of layers alternate.
        donate: Whether to delete the stacked arrays, each once it is cut.

    Returns:
        The layers, first to last.

    Raises:
        ShapeError: The leading axes differ.
        InvalidInputError: With a `stride` above 1, not a tuple of as many pytrees.
    """
    groups = _groups(stacked, stride, where="unstack_layers")
    length = n_stacked(stacked, where="unstack_layers")
    uses = Counter(map(id, jax.tree.leaves(stacked))) if donate else None
    layers: list[Any] = [None] * (length * stride)
    for offset, group in enumerate(groups):
        leaves, tree = jax.tree.flatten(group)
        rows = [_unstacked(leaf, uses) for leaf in leaves]
        for i in range(length):
            layers[offset + i * stride] = tree.unflatten([row[i] for row in rows])
    return layers


def scan_layers(
    block: Callable[[Any, Any], tuple[Any, Any]] | Sequence[Callable[[Any, Any], tuple[Any, Any]]],
    carry: Any,
    stacked: Any,
) -> tuple[Any, Any]:
    """Run stacked layers one after the other, as one compiled loop.

    Args:
        block: `(carry, layer) -> (carry, out)`, where `layer` is one layer's part of `stacked`. For layers stacked in
            groups, a sequence of such functions, one for each kind of layer.
        carry: What the first layer gets, an array or a pytree of arrays.
        stacked: What `stack_layers` returned; with several blocks, for a stride of as many.

    Returns:
        The last carry, and the outs stacked on a leading layer axis; with several blocks, a tuple of as many.

    Raises:
        ShapeError: The leading axes differ, or a block returns a carry of another form.
        InvalidInputError: There are not as many stacked subtrees as blocks.
    """
    blocks = (block,) if callable(block) else tuple(block)
    stride = len(blocks)
    groups = _groups(stacked, stride, where="scan_layers")
    length = n_stacked(stacked, where="scan_layers")

    def body(carry: Any, scanned: tuple[Any, Any]) -> tuple[Any, Any]:
        index, layers = scanned
        outs = []
        for offset, (one, layer) in enumerate(zip(blocks, layers, strict=True)):
            at = loop_layer(stride, offset, index=index, length=None if index is None else length)
            with layer_scope(at):
                new, out = one(carry, layer)
            carry = same_form(carry, new, where="the carry of scan_layers")
            outs.append(out)
        return carry, tuple(outs)

    index = None if LISTENER.get() is None else jnp.arange(length)
    carry, outs = lax.scan(body, carry, (index, tuple(groups)))
    return carry, outs if stride > 1 else outs[0]


def n_stacked(stacked: Any, *, where: str = "n_stacked") -> int:
    """The length of the leading axis that all leaves share.

    Args:
        stacked: A pytree of arrays.
        where: Name of the public call, for the error message.

    Returns:
        The length.

    Raises:
        ShapeError: There are no leaves, a leaf has no axis, or the lengths differ.
    """
    named = [(jax.tree_util.keystr(path), np.shape(leaf)) for path, leaf in jax.tree.leaves_with_path(stacked)]
    lengths = Counter(shape[0] if shape else None for _, shape in named)
    if len(lengths) == 1 and None not in lengths:
        return named[0][1][0]
    usual = next((length for length, _ in lengths.most_common() if length is not None), None)
    odd = [f"{name or 'the value'} {list(shape)}" for name, shape in named if not shape or shape[0] != usual]
    raise ShapeError(
        four_part(
            "Stacked layers without arrays" if not named else "Leading layer axes that differ: " + ", ".join(odd),
            where=where,
            expected="leaves with the layer as first axis, all of one length"
            + ("." if usual is None else f" (the others have {usual})."),
            fix="make them with stack_layers(layers).",
        )
    )


def _groups(stacked: Any, stride: int, *, where: str) -> tuple[Any, ...]:
    """The stacked subtrees, one for each kind of layer."""
    if stride == 1:
        return (stacked,)
    if not isinstance(stacked, (tuple, list)) or len(stacked) != stride:
        n_given = f" of {len(stacked)}" if isinstance(stacked, (tuple, list)) else ""
        raise InvalidInputError(
            four_part(
                f"{type(stacked).__name__}{n_given} was given as stacked layers",
                where=where,
                expected=f"a tuple of {stride} stacked subtrees, one for each kind of layer.",
                fix=f"make it with stack_layers(layers, stride={stride}).",
            )
        )
    return tuple(stacked)


def _check_same(groups: Sequence[Sequence[Any]], stride: int) -> None:
    """Refuse layers that cannot share one stacked subtree, naming every leaf that differs."""
    offenders = []
    for offset, group in enumerate(groups):
        first = _forms(group[0])
        for i, layer in enumerate(group[1:], start=1):
            own, other = f"layer {offset + i * stride}", f"layer {offset}"
            forms = _forms(layer)
            for name in {**first, **forms}:
                if (form := forms.get(name)) != (wanted := first.get(name)):
                    has, of_first = (one or "nothing" for one in (form, wanted))
                    offenders.append(f"    {name or 'the layer'}: {has} in {own}, {of_first} in {other}")
            if forms == first and jax.tree.structure(layer) != jax.tree.structure(group[0]):
                offenders.append(f"    {jax.tree.structure(layer)} in {own}, {jax.tree.structure(group[0])} in {other}")
    if offenders:
        of_kind = "" if stride == 1 else f" {stride} apart"
        raise ShapeError(
            four_part(
                "Layers that differ:\n" + "\n".join(offenders) + "\n ",
                where="stack_layers",
                expected=f"layers{of_kind} with the same names, shapes and dtypes.",
                fix="leave these layers unstacked; if kinds of layers alternate, give their number as stride.",
            )
        )


def _forms(layer: Any) -> dict[str, str]:
    """Dtype and shape of each leaf, by its path."""
    return {
        jax.tree_util.keystr(path): f"{jnp.result_type(leaf)}{list(np.shape(leaf))}"
        for path, leaf in jax.tree.leaves_with_path(layer)
    }


_stack = counted_jit(lambda leaves: jnp.stack(leaves), name="stack of layers")
_unstack = counted_jit(lambda leaf: [leaf[i] for i in range(leaf.shape[0])], name="layers of a stack")


def _stacked(leaves: Sequence[Any], uses: Counter[int] | None) -> Any:
    if not any(isinstance(leaf, jax.Array) for leaf in leaves):
        return np.stack(leaves)
    stacked = _stack(list(leaves))
    _delete(leaves, stacked, uses)
    return stacked


def _unstacked(leaf: Any, uses: Counter[int] | None) -> list[Any]:
    if not isinstance(leaf, jax.Array):
        return list(np.asarray(leaf))
    rows = _unstack(leaf)
    _delete([leaf], rows, uses)
    return rows


def _delete(leaves: Sequence[Any], copies: Any, uses: Counter[int] | None) -> None:
    """Delete arrays that nobody in the tree still needs, once their copies are there."""
    if uses is None or any(isinstance(leaf, Tracer) for leaf in leaves):
        return
    jax.block_until_ready(copies)
    for leaf in leaves:
        uses[id(leaf)] -= 1
        if isinstance(leaf, jax.Array) and not uses[id(leaf)]:
            leaf.delete()
