"""Which tensor of a Hugging Face directory each parameter is, as data: read by `read`, written back by export.

A family says it once, as a pytree of `Stored` in the form of its parameters. `read` fills each parameter from its
tensors, rows at a time, in the dtype, the stacking and the sharding it will have, so that what the host holds besides
the parameters is one piece of one tensor. Export goes through the same pytree the other way.

>>> from interp_jax.models.weights.checkpoint import Checkpoint, Tensors
>>> tensors = Tensors.from_arrays({f"h.{i}.w": np.full((2, 3), i, np.float32) for i in range(4)})
>>> layout = {"h": {"kernel": Stored("h.{}.w", (2, 3), layers=range(4), view=turned)}}
>>> with Checkpoint("gpt2", {}, tensors, tokenizer=None, source="memory").intake() as intake:
...     params = read(layout, intake, dtype="bfloat16")
>>> params["h"]["kernel"].shape, params["h"]["kernel"].dtype
((4, 3, 2), dtype(bfloat16))

Sharp edges: a `view` may only reshape, index and transpose, and must give a view of the array it gets: export writes
through it. A CPU device takes the filled buffers over as they are, without a copy.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part
from interp_jax.models.weights.checkpoint import Intake

_OWN_PAGES = 1 << 18  # bytes from which an array is worth pages of its own

Rule = Callable[[str, tuple[int, ...]], Sharding]
Placement = Sharding | Mesh | Rule


def turned(tensor: np.ndarray) -> np.ndarray:
    """The transpose of a `tensor`: for a kernel that upstream holds as `[in, out]` and the file as `[out, in]`."""
    return tensor.T


@dataclasses.dataclass(frozen=True)
class Stored:
    """One parameter, and the tensor of a Hugging Face directory it is; for stacked layers, the tensor of each layer.

    Args:
        name: The name of the tensor, with "{}" for the number of the layer if there are several.
        shape: Its shape in the file.
        layers: Which layers' tensors are stacked, on a leading axis; None for a single tensor.
        view: `(tensor) -> the parameter`, as a view of the tensor; by default the tensor itself.
        parts: What "{part}" in the name stands for, if upstream holds several tensors as one parameter, on an axis
            that follows that of the layers.
    """

    name: str
    shape: tuple[int, ...]
    layers: Sequence[int] | None = None
    view: Callable[[np.ndarray], np.ndarray] | None = None
    parts: Sequence[str] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its tensors in the file, in the order of the leading axes of the parameter."""
        if self.layers is None and self.parts is None:
            return (self.name,)
        layers = (None,) if self.layers is None else self.layers
        return tuple(self.name.format(i, part=part) for i in layers for part in self.parts or ("",))

    @property
    def lead(self) -> tuple[int, ...]:
        """The sizes of the axes of the parameter that its tensors do not have: of layers, and of parts."""
        return tuple(len(several) for several in (self.layers, self.parts) if several is not None)

    @property
    def param_shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        # Memory that is not touched is not there.
        one = self.shape if self.view is None else self.view(np.empty(self.shape, np.bool_)).shape
        return (*self.lead, *one)


def read(layout: Any, intake: Intake, *, dtype: Any, sharding: Placement | None = None) -> Any:
    """The parameters a layout describes, typed, stacked and sharded as they are read.

    Args:
        layout: A pytree of `Stored`.
        intake: Where the tensors come from.
        dtype: Of the parameters.
        sharding: Where they go: a `Sharding` for all of them, a `Mesh` to spread them over (see `spread`), or a
            function `(name, shape) -> Sharding`, where `name` is that of the tensor in the file, with "{}" for the
            layer of stacked ones, and `shape` the parameter's. None leaves them on the default device.

    Returns:
        The parameters, in the form of the layout.

    Raises:
        ShapeError: A sharding does not fit its parameter.
        InvalidInputError: `sharding` is, or returns, something else.
    """
    leaves, tree = jax.tree.flatten(layout)
    shardings = _shardings(leaves, sharding)
    params: list[Any] = [None] * len(leaves)
    # In the order of the files, so that each is read from its beginning to its end.
    for i in sorted(range(len(leaves)), key=lambda i: intake.position(leaves[i].names[0])):
        params[i] = _array(leaves[i], intake, np.dtype(dtype), shardings[i])
    return tree.unflatten(params)


def spread(mesh: Mesh) -> Rule:
    """The rule a `Mesh` stands for: parameters cut evenly over its devices, as far as their shapes allow.

    Each axis of the mesh in turn cuts the longest axis of a parameter that it divides and that is not cut yet; never
    the layer axis of a stacked one. Vectors, such as norms and biases, are on every device. The axes of the mesh become
    `Auto`: upstream's code says nothing about shardings, and JAX refuses to guess for `Explicit` ones.

    Args:
        mesh: The devices.

    Returns:
        `(name, shape) -> sharding`.
    """

    def rule(name: str, shape: tuple[int, ...]) -> Sharding:
        first = 1 if "{}" in name else 0
        spec: list[str | None] = [None] * len(shape)
        for axis, size in mesh.shape.items() if len(shape) - first > 1 else ():
            free = [i for i in range(first, len(shape)) if spec[i] is None and shape[i] % size == 0]
            if free:
                spec[max(free, key=lambda i: shape[i])] = str(axis)
        return NamedSharding(auto, PartitionSpec(*spec))

    auto = Mesh(mesh.devices, mesh.axis_names)
    return rule


def _shardings(leaves: Sequence[Stored], sharding: Placement | None) -> list[Sharding | None]:
    """The sharding of each parameter, known to fit it."""
    if sharding is None:
        return [None] * len(leaves)
    if isinstance(sharding, Sharding):
        rule: Rule = lambda name, shape: sharding  # noqa: E731
    elif isinstance(sharding, Mesh):
        rule = spread(sharding)
    elif callable(sharding):
        rule = sharding
    else:
        raise _not_a_sharding(f"sharding={sharding!r:.80}")
    found: list[Sharding | None] = []
    misfits = []
    for leaf in leaves:
        one = rule(leaf.name, leaf.param_shape)
        if not isinstance(one, Sharding):
            raise _not_a_sharding(f"a rule that returns {one!r:.80} for {leaf.name!r}")
        try:
            one.shard_shape(leaf.param_shape)
        except (ValueError, IndexError) as error:
            reason = " ".join(str(error).split())[:160]
            misfits.append(f"    {leaf.name} {list(leaf.param_shape)}: {reason}")
        found.append(one)
    if misfits:
        raise ShapeError(
            four_part(
                "Shardings that do not fit their parameters:\n" + "\n".join(misfits) + "\n ",
                where="load",
                expected="for each parameter a sharding that divides its axes evenly.",
                fix="give a Mesh, which cuts only what it divides, or a function (name, shape) -> Sharding.",
            )
        )
    return found


def _not_a_sharding(what: str) -> InvalidInputError:
    return InvalidInputError(
        four_part(
            f"{what} was given",
            where="load",
            expected="a jax.sharding.Sharding, a jax.sharding.Mesh, or a function (name, shape) -> Sharding.",
            fix='for example sharding=jax.make_mesh((8,), ("model",)).',
        )
    )


def _array(stored: Stored, intake: Intake, dtype: np.dtype, sharding: Sharding | None) -> jax.Array:
    """One parameter: a buffer per shard, filled with pieces of its tensors."""
    shape = stored.param_shape
    if sharding is None:
        corners = {None: (0,) * len(shape)}
    else:
        corners = {
            device: tuple(part.indices(n)[0] for part, n in zip(index or (), shape, strict=True))
            for device, index in sharding.addressable_devices_indices_map(shape).items()
        }
    # Devices that hold the same part share its buffer.
    part_shape = shape if sharding is None else sharding.shard_shape(shape)
    buffers = {corner: _aligned(part_shape, dtype) for corner in corners.values()}
    for region, values in _pieces(stored, intake, dtype):
        for corner, buffer in buffers.items():
            _put(buffer, corner, region, values)
    parts = [jax.device_put(buffers[corner], device) for device, corner in corners.items()]
    return parts[0] if sharding is None else jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _pieces(stored: Stored, intake: Intake, dtype: np.dtype) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Pieces of a parameter, and where in it they belong."""
    for i, name in enumerate(stored.names):
        stack = tuple(slice(int(at), int(at) + 1) for at in np.unravel_index(i, stored.lead)) if stored.lead else ()
        at = (*(None,) * len(stored.lead), ...)
        is_turned = stored.view is turned and len(stored.shape) == 2
        if stored.view is None or is_turned:
            for rows, values in intake.rows(name, stored.shape, dtype=dtype):
                region = (*rows, *(slice(0, n) for n in stored.shape[len(rows) :]))
                yield (*stack, *(region[::-1] if is_turned else region)), (values.T if is_turned else values)[at]
        else:
            # Whole, since what part of the parameter a part of the tensor is only the view knows.
            for _, values in intake.rows(name, stored.shape, dtype=dtype, is_whole=True):
                part = stored.view(values)
                yield (*stack, *(slice(0, n) for n in part.shape)), part[at]


def _put(buffer: np.ndarray, corner: tuple[int, ...], region: tuple[slice, ...], values: np.ndarray) -> None:
    """Copy as much of `values`, which belong at `region`, as lies in a buffer that begins at `corner`."""
    here, there = [], []
    for n, first, part in zip(buffer.shape, corner, region, strict=True):
        start, stop = max(first, part.start), min(first + n, part.stop)
        if start >= stop:
            return
        here.append(slice(start - first, stop - first))
        there.append(slice(start - part.start, stop - part.start))
    with np.errstate(over="ignore", invalid="ignore"):  # the intake reports values that are too large
        buffer[tuple(here)] = values[tuple(there)]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array at a multiple of 64 bytes, which a CPU device takes over without copying."""
    n_bytes = math.prod(shape) * dtype.itemsize
    # Pages of its own, since the system gets them back when the array is deleted; from a heap it often does not.
    room = (
        np.frombuffer(mmap.mmap(-1, n_bytes), np.uint8) if n_bytes >= _OWN_PAGES else np.empty(n_bytes + 64, np.uint8)
    )
    start = -room.ctypes.data % 64
    return room[start : start + n_bytes].view(dtype).reshape(shape)
