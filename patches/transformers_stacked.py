"""Stacked layers for the Flax families of transformers: the loop over blocks as a scan, and where stacked weights lie.

Upstream holds a module and a subtree of parameters per layer, `layers/0`, `layers/1`, and calls the modules in a Python
loop. Stacked, the subtree `layers` is one layer's with a leading axis, and so is its part of the key-value cache;
`LAYER_SCAN` turns the loop into a scan whose body is upstream's own block, unbound.

Layers of several kinds that come round again, such as global and local attention, are stacked in groups: `layers/0`
holds the first layer of every group, `layers/1` the second, each with the group as leading axis.

>>> layers = Layers(("model", "layers"), n_layers=2, is_stacked=True)
>>> params = {"model": {"layers": {str(i): {"w": jnp.full(3, i)} for i in range(2)}}}
>>> stacked = layers.restack(params)
>>> stacked["model"]["layers"]["w"].shape, layers.params(stacked, 1)["w"]
((2, 3), Array([1, 1, 1], dtype=int32, weak_type=True))
>>> stride_of(["global", "local", "global", "local"])
2

Sharp edges: the attentions and hidden states that upstream returns when asked to are not there; sites are. Dropout
is not either: a scanned block draws no random numbers.

Source: transformers' modeling_flax files, whose loops over blocks are copies of one another.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.core.errors import ShapeError, UnsupportedModelError, four_part
from interp_jax.models.weights import layout
from interp_jax.models.weights.layout import Stored
from interp_jax.transforms.layer_stack import scan_layers, stack_layers, unstack_layers


def layer_loop(block: str = "block", blocks: str = "self.blocks") -> tuple[str, str]:
    """The tag of the loop over layers: the pair for a loop whose variable is `block` and which runs over `blocks`."""
    return (
        f"""
        for {block} in {blocks}:
            $$body
        """,
        f"""
        for layer_index, {block} in enumerate({blocks}):
            with layer_scope(layer_index):
                $$body
        """,
    )


def layer_scan(block: str = "block", blocks: str = "self.blocks") -> tuple[str, str]:
    """The pair that makes the loop of `block` over `blocks` a scan."""
    return (
        f"""
        for {block} in {blocks}:
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            layer_outputs = $call
            hidden_states = layer_outputs[0]
            if output_attentions:
                $$attentions
        """,
        f"""
        hidden_states = scan_blocks(
            self,
            {blocks},
            hidden_states,
            lambda {block}, hidden_states: $call[0],
            returns=(output_attentions, output_hidden_states, not deterministic),
        )
        """,
    )


# As most families write it.
LAYER_LOOP = layer_loop()
LAYER_SCAN = layer_scan()


def scan_blocks(
    collection: Any,
    blocks: Sequence[Any],
    hidden_states: Any,
    call: Callable[[Any, Any], Any],
    *,
    returns: tuple[bool, bool, bool],
    kinds: Sequence[str] = (),
) -> Any:
    """Run a collection's blocks as a scan over its stacked parameters, and its stacked cache if it has one.

    Args:
        collection: The bound module that has the blocks.
        blocks: Its blocks.
        hidden_states: What the first block gets.
        call: `(block, hidden_states) -> hidden_states`, upstream's own call of a block.
        returns: Whether attentions or hidden states are asked for, and whether dropout is.
        kinds: The kind of each layer; none if all are alike.

    Returns:
        What the last block returns.

    Raises:
        UnsupportedModelError: Attentions, hidden states or dropout are asked for, or the kinds do not repeat.
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
    stride = stride_of(kinds)
    # Any block of a kind will do: what makes a layer is its parameters.
    runs = [_run_of(block.clone(parent=None, name=None), call) for block in blocks[:stride]]
    held = {kind: collection.variables[kind] for kind in ("params", "cache") if kind in collection.variables}
    if stride == 1:
        hidden_states, cache = scan_layers(runs[0], hidden_states, {kind: dict(tree) for kind, tree in held.items()})
    else:
        groups = [{kind: tree[str(offset)] for kind, tree in held.items()} for offset in range(stride)]
        hidden_states, caches = scan_layers(runs, hidden_states, groups)
        cache = {str(offset): group for offset, group in enumerate(caches) if group is not None}
    for name, value in (cache or {}).items():
        collection.put_variable("cache", name, value)
    return hidden_states


def _run_of(block: Any, call: Callable[[Any, Any], Any]) -> Callable[[Any, Any], tuple[Any, Any]]:
    """One layer of the scan: an unbound block on a layer's variables."""

    def run(hidden_states: Any, layer: Any) -> tuple[Any, Any]:
        if "cache" not in layer:
            return block.apply(layer, hidden_states, method=call), None
        hidden_states, changed = block.apply(layer, hidden_states, method=call, mutable=["cache"])
        return hidden_states, dict(changed["cache"])

    return run


def stride_of(kinds: Sequence[str]) -> int:
    """After how many layers their kinds come round again.

    Args:
        kinds: The kind of each layer, first to last; none if all are alike.

    Returns:
        The smallest number of layers that make a group; 1 for layers of one kind.

    Raises:
        UnsupportedModelError: There is no such group.
    """
    n_layers = len(kinds)
    strides = (n for n in range(1, n_layers + 1) if n_layers % n == 0 and list(kinds) == [*kinds[:n]] * (n_layers // n))
    stride = next(strides, 1)
    if stride == n_layers > len(set(kinds)):
        raise UnsupportedModelError(
            four_part(
                "Layers that differ: " + ", ".join(f"{i} {kind}" for i, kind in enumerate(kinds)),
                where="a request for stacked layers",
                expected="kinds of layers that come round again in groups, all groups alike.",
                fix="leave the layers of this model unstacked (stacked=False).",
            )
        )
    return stride


_NOT_THERE = ("attentions", "hidden states", "dropout")


@dataclass(frozen=True)
class Layers:
    """Where a family's layers lie in its parameters and its cache, and whether they are stacked.

    Args:
        path: The keys that lead to the collection of blocks.
        n_layers: How many layers there are.
        is_stacked: Whether the layers are one subtree with a leading axis, or one for each layer of a group.
        kinds: The kind of each layer; none if all are alike.
    """

    path: tuple[str, ...]
    n_layers: int
    is_stacked: bool
    kinds: tuple[str, ...] = ()

    @property
    def stride(self) -> int:
        """How many layers make a group when they are stacked."""
        return stride_of(self.kinds)

    def params(self, params: Any, layer: int) -> Any:
        """The parameters of one `layer`, from `params` in this layout."""
        if not self.is_stacked:
            return self._at(params)[str(layer)]
        group, offset = divmod(layer, self.stride)
        return jax.tree.map(lambda leaf: leaf[group], self.groups(params)[offset])

    def groups(self, params: Any) -> tuple[Any, ...]:
        """The stacked subtrees in `params`, as many as there are kinds of layers that alternate."""
        layers = self._at(params)
        return (layers,) if self.stride == 1 else tuple(layers[str(offset)] for offset in range(self.stride))

    def restack(self, params: Any, *, donate: bool = False) -> Any:
        """Parameters in this layout, from `params` in the other one; `donate` deletes the layers given."""
        given, stride = self._at(params), self.stride
        if self.is_stacked:
            _check_numbers(given, self.n_layers)
            stacked = stack_layers([given[str(i)] for i in range(self.n_layers)], stride=stride, donate=donate)
            layers = stacked if stride == 1 else _numbered(stacked)
        else:
            stacked = given if stride == 1 else self.groups(params)
            layers = _numbered(unstack_layers(stacked, stride=stride, donate=donate))
        return _with(params, self.path, layers)

    def functions(self) -> dict[str, Any]:
        """What an `Upstream` says of its layers: `layer_params`, `stacked_layers` and `restack`."""
        other = replace(self, is_stacked=not self.is_stacked)
        return {
            "layer_params": self.params,
            "stacked_layers": self.groups if self.is_stacked else None,
            "restack": other.restack,
        }

    def cache(self, layer: Callable[[], Any]) -> Any:
        """A cache in upstream's layout, from a function that makes an empty one for a layer."""
        if not self.is_stacked:
            return _with({}, self.path, _numbered([layer() for _ in range(self.n_layers)]))
        stride, n_groups = self.stride, self.n_layers // self.stride
        groups = [
            jax.tree.map(lambda leaf: jnp.zeros((n_groups, *leaf.shape), leaf.dtype), layer()) for _ in range(stride)
        ]
        return _with({}, self.path, groups[0] if stride == 1 else _numbered(groups))

    def _at(self, params: Any) -> Any:
        return functools.reduce(lambda tree, key: tree[key], self.path, params)


def _with(tree: Any, path: tuple[str, ...], subtree: Any) -> Any:
    """The tree with another subtree at a path."""
    if not path:
        return subtree
    return {**tree, path[0]: _with(tree.get(path[0], {}), path[1:], subtree)}


def _check_numbers(layers: Any, n_layers: int) -> None:
    """Refuse a collection of layers that lacks one, or has one more."""
    expected = {str(i) for i in range(n_layers)}
    offenders = [f"layer {i} is missing" for i in sorted(expected - set(layers), key=int)]
    offenders += [f"layer {i} is not known" for i in sorted(set(layers) - expected)]
    if offenders:
        raise ShapeError(
            four_part(
                f"Parameters of other layers than the model has: {', '.join(offenders)}",
                where="a request for stacked layers",
                expected=f"layers 0 to {n_layers - 1}, as its configuration says.",
                fix="give the parameters as `load` gave them; a model of other layers needs another configuration.",
            )
        )


def _numbered(layers: Sequence[Any]) -> dict[str, Any]:
    return {str(i): layer for i, layer in enumerate(layers)}


class Names:
    """Says which tensors of a checkpoint the parameters are, those of all layers as one stacked parameter each.

    Args:
        layers: The layout.
    """

    def __init__(self, layers: Layers):
        self._layers = layers

    def layers(self, layer: Callable[[str], Any], at: str) -> Any:
        """The parameters of all layers.

        Args:
            layer: `(prefix) -> parameters of the layer whose tensors' names begin so`.
            at: The prefix, with "{}" for the layer's number.

        Returns:
            Stacked parameters, or those of each layer by its number.
        """
        if not self._layers.is_stacked:
            return _numbered([layer(at.format(i)) for i in range(self._layers.n_layers)])
        if (stride := self._layers.stride) == 1:
            return layer(at)
        # "{1}" stands for every layer that is second in its group.
        return _numbered([layer(at.format(f"{{{offset}}}")) for offset in range(stride)])

    def array(
        self, name: str, *shape: int, turned: bool = False, view: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> Stored:
        """A parameter that is a tensor.

        Args:
            name: Its name; with "{}" in it, that tensor of each layer, with "{1}", of each that is second in its group.
            *shape: The shape of the tensor in the file.
            turned: Whether to transpose it.
            view: Another view of the tensor that the parameter is (see `Stored`).

        Returns:
            Which tensor it is; for several layers, with a leading layer axis.
        """
        view = layout.turned if turned else view
        numbered = re.search(r"\{(\d*)\}", name)
        if numbered is None:
            return Stored(name, shape, view=view)
        layers = range(int(numbered[1] or 0), self._layers.n_layers, self._layers.stride)
        return Stored(name.replace(numbered[0], "{}"), shape, layers=layers, view=view)
