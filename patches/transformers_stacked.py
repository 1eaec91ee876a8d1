"""Stacked layers for the Flax families of transformers: the loop over blocks as a scan, and where stacked weights lie.

Upstream holds a module and a subtree of parameters per layer, `layers/0`, `layers/1`, and calls the modules in a Python
loop. Stacked, the subtree `layers` is one layer's with a leading axis, and so is its part of the key-value cache;
`LAYER_SCAN` turns the loop into a scan whose body is upstream's own block, unbound.

>>> layers = Layers(("model", "layers"), n_layers=2, is_stacked=True)
>>> params = {"model": {"layers": {str(i): {"w": jnp.full(3, i)} for i in range(2)}}}
>>> stacked = layers.restack(params)
>>> stacked["model"]["layers"]["w"].shape, layers.params(stacked, 1)["w"]
((2, 3), Array([1, 1, 1], dtype=int32, weak_type=True))

Sharp edges: the attentions and hidden states that upstream returns when asked to are not there; sites are. Dropout
is not either: a scanned block draws no random numbers.

Source: transformers' modeling_flax files, whose loops over blocks are copies of one another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.core.errors import UnsupportedModelError, four_part
from interp_jax.transforms.layer_stack import scan_layers, stack_layers, unstack_layers

if TYPE_CHECKING:
    from interp_jax.models.weights.checkpoint import Intake

# The loop over blocks, as a tag and as a scan.
LAYER_LOOP = (
    """
    for block in self.blocks:
        $$body
    """,
    """
    for layer_index, block in enumerate(self.blocks):
        with layer_scope(layer_index):
            $$body
    """,
)
LAYER_SCAN = (
    """
    for block in self.blocks:
        if output_hidden_states:
            all_hidden_states += (hidden_states,)
        layer_outputs = $call
        hidden_states = layer_outputs[0]
        if output_attentions:
            $$attentions
    """,
    """
    hidden_states = scan_blocks(
        self,
        hidden_states,
        lambda block, hidden_states: $call[0],
        returns=(output_attentions, output_hidden_states, not deterministic),
    )
    """,
)


def scan_blocks(
    collection: Any, hidden_states: Any, call: Callable[[Any, Any], Any], *, returns: tuple[bool, bool, bool]
) -> Any:
    """Run a collection's blocks as a scan over its stacked parameters, and its stacked cache if it has one.

    Args:
        collection: The bound module that has the `blocks`.
        hidden_states: What the first block gets.
        call: `(block, hidden_states) -> hidden_states`, upstream's own call of a block.
        returns: Whether attentions or hidden states are asked for, and whether dropout is.

    Returns:
        What the last block returns.

    Raises:
        UnsupportedModelError: Attentions, hidden states or dropout are asked for.
    """
    asked = [name for name, is_asked in zip(_NOT_THERE, returns, strict=True) if is_asked]
    if asked:
        raise UnsupportedModelError(
            four_part(
                f"{' and '.join(asked)} were asked for",
                where=f"{type(collection).__name__} with stacked layers",
                expected="none of " + ", ".join(_NOT_THERE) + ".",
                fix="read the sites 'pattern' and 'resid_post' instead, or unstack the layers (lm.unstacked()).",
            )
        )
    variables = {kind: dict(collection.variables[kind]) for kind in ("params", "cache") if kind in collection.variables}
    # Any block will do: what makes a layer is its parameters.
    block = collection.blocks[0].clone(parent=None, name=None)

    def run(hidden_states: Any, layer: Any) -> tuple[Any, Any]:
        if "cache" not in layer:
            return block.apply(layer, hidden_states, method=call), None
        hidden_states, changed = block.apply(layer, hidden_states, method=call, mutable=["cache"])
        return hidden_states, dict(changed["cache"])

    hidden_states, cache = scan_layers(run, hidden_states, variables)
    for name, value in (cache or {}).items():
        collection.put_variable("cache", name, value)
    return hidden_states


_NOT_THERE = ("attentions", "hidden states", "dropout")


@dataclass(frozen=True)
class Layers:
    """Where a family's layers lie in its parameters and its cache, and whether they are stacked.

    Args:
        path: The keys that lead to the collection of blocks.
        n_layers: How many layers there are.
        is_stacked: Whether the layers are one subtree with a leading axis.
    """

    path: tuple[str, str]
    n_layers: int
    is_stacked: bool

    def params(self, params: Any, layer: int) -> Any:
        """The parameters of one `layer`, from `params` in this layout."""
        layers = self._at(params)
        return jax.tree.map(lambda leaf: leaf[layer], layers) if self.is_stacked else layers[str(layer)]

    def groups(self, params: Any) -> tuple[Any, ...]:
        """The stacked subtrees in `params`, as many as there are kinds of layers that alternate."""
        return (self._at(params),)

    def restack(self, params: Any, *, donate: bool = False) -> Any:
        """Parameters in this layout, from `params` in the other one; `donate` deletes the layers given."""
        given = self._at(params)
        if self.is_stacked:
            layers = stack_layers([given[str(i)] for i in range(self.n_layers)], donate=donate)
        else:
            layers = {str(i): layer for i, layer in enumerate(unstack_layers(given, donate=donate))}
        outer, inner = self.path
        return {**params, outer: {**params[outer], inner: layers}}

    def cache(self, layer: Callable[[], Any]) -> Any:
        """A cache in upstream's layout, from a function that makes an empty one for a layer."""
        if self.is_stacked:
            layers = jax.tree.map(lambda leaf: jnp.zeros((self.n_layers, *leaf.shape), leaf.dtype), layer())
        else:
            layers = {str(i): layer() for i in range(self.n_layers)}
        outer, inner = self.path
        return {outer: {inner: layers}}

    def _at(self, params: Any) -> Any:
        outer, inner = self.path
        return params[outer][inner]


class Reader:
    """Reads a checkpoint's tensors into arrays, those of all layers straight into one stacked array.

    A stacked array is filled tensor by tensor and handed to the device before the next is begun, so there is never a
    second copy of more than one of them.

    Args:
        intake: Where the tensors come from.
        dtype: Of the arrays.
        layers: The layout.
    """

    def __init__(self, intake: Intake, dtype: str, layers: Layers):
        self._intake, self._dtype, self._layers = intake, dtype, layers

    def layers(self, layer: Callable[[str], Any], at: str) -> Any:
        """The parameters of all layers.

        Args:
            layer: `(prefix) -> parameters of the layer whose tensors' names begin so`.
            at: The prefix, with "{}" for the layer's number.

        Returns:
            Stacked parameters, or those of each layer by its number.
        """
        if self._layers.is_stacked:
            return layer(at)
        return {str(i): layer(at.format(i)) for i in range(self._layers.n_layers)}

    def array(self, name: str, *shape: int, turned: bool = False) -> jax.Array:
        """The values of a tensor.

        Args:
            name: Its name; with "{}" in it, that tensor of each layer.
            *shape: The shape of the tensor in the file.
            turned: Whether to transpose it.

        Returns:
            The array; for all layers, with a leading layer axis.
        """
        if "{}" not in name:
            values = self._intake.take(name, shape)
            return jnp.asarray(values.T if turned else values, self._dtype)
        stacked = _aligned((self._layers.n_layers, *(reversed(shape) if turned else shape)), jnp.dtype(self._dtype))
        for i in range(self._layers.n_layers):
            values = self._intake.take(name.format(i), shape)
            stacked[i] = values.T if turned else values
        return jax.device_put(stacked)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array at a multiple of 64 bytes, which a CPU device takes over without copying."""
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    room = np.empty(n_bytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + n_bytes].view(dtype).reshape(shape)
