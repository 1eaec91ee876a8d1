"""Sites in Penzai models: a layer that sows, a layer that says which one it is, and Penzai's scan over layers.

A Penzai model is a tree of layer objects made by builder functions. A family's patch set therefore patches the
builders, which then put a `Tag` wherever there is to be a site. Penzai names axes and keeps them in any order in
memory; a tag leaves the memory as it is and shows the axes in the order asked for.

>>> tag = Tag("mlp_pre", "batch", "seq", "neurons")
>>> jax.tree.leaves(tag), tag
([], Tag('mlp_pre', 'batch', 'seq', 'neurons'))

Sharp edges: a model holds the tags it was built with, whether or not the patches are still in force. Penzai unrolls its
scan over layers, so that it compiles no faster than a loop: `ROLLED` keeps it rolled.

Source: penzai.nn.layer_stack for the scan.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from interp_jax.patches.ordered_axes import sow_in_order
from interp_jax.transforms.patcher import Patcher
from interp_jax.transforms.sowing import LISTENER, layer_scope, loop_layer


@jax.tree_util.register_static
class Tag:
    """A layer of Penzai's that returns its argument, and is a site on the way.

    Args:
        name: The name of the site.
        *axes: The names of all axes of the argument, in the order in which readers see them.
    """

    def __init__(self, name: str, *axes: str):
        self._name, self._axes = name, axes

    def __call__(self, value: Any, **side_inputs: Any) -> Any:
        stored = list(value.named_shape)
        order = [stored.index(axis) for axis in self._axes]
        return jax.tree.map(lambda array: sow_in_order(array, order, name=self._name), value)

    def __repr__(self) -> str:
        return f"Tag({', '.join(map(repr, (self._name, *self._axes)))})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tag) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["block"], meta_fields=["layer"])
class InLayer:
    """A block of Penzai's, called in the scope of its layer.

    Args:
        layer: Which layer it is.
        block: The block.
    """

    def __init__(self, layer: int, block: Any):
        self.layer, self.block = layer, block

    def __call__(self, value: Any, **side_inputs: Any) -> Any:
        with layer_scope(self.layer):
            return self.block(value, **side_inputs)


def scan_of_layers(
    body: Callable[[Any, Any], tuple[Any, Any]], init: Any, xs: Any, *, length: int, unroll: int | bool
) -> tuple[Any, Any]:
    """`jax.lax.scan` over the layers of a model, with each iteration in the scope of its layer.

    Args:
        body: `(carry, slice of xs) -> (carry, out)`.
        init: The first carry.
        xs: What to scan over.
        length: The number of layers.
        unroll: As in `jax.lax.scan`.

    Returns:
        The last carry and the stacked outs.
    """

    def in_layer(carry: Any, scanned: tuple[Any, Any]) -> tuple[Any, Any]:
        index, one = scanned
        with layer_scope(loop_layer(index=index, length=None if index is None else length)):
            return body(carry, one)

    # Only the python engine needs the index; without it the program is as before.
    index = None if LISTENER.get() is None else jnp.arange(length)
    return lax.scan(in_layer, init, (index, xs), length=length, unroll=unroll)


STACK = "penzai.nn.layer_stack"

# The tag that says which layer the body of the scan is, and the mend that compiles one layer instead of all of them.
SCANNED_LAYERS = Patcher(
    STACK, {"LayerStack.__call__": [("jax.lax.scan", "scan_of_layers")]}, names={"scan_of_layers": scan_of_layers}
)
ROLLED = Patcher(STACK, {"LayerStack.__call__": [("True", "1")]})  # of `unroll=True`, the only True there is

# What the patches were written against: Penzai 0.2.5.
DIGESTS = {
    f"{STACK}:LayerStack.__call__": "484adbf6d01a828578b409a8f43ee321b37bfc2512e8654d82b261bdac8af925",
}
