"""Upstream's own pass in which every receiver hears a mixture of its senders' clean and corrupted writes.

The residual stream is a sum of writes, so what a receiver v reads can be changed without touching anyone else:

    input_v = resid + sum over senders u of mask[u, v] (corrupted_u - write_u)

where resid and write_u are those of this very pass. Heads read through queries, keys and values of their own, so each
gets the change of its normalised input through its own weights; MLPs and the final norm are given theirs at their
sites. The mask is data: one compiled program serves every subset of the edges, and its gradient is edge attribution.

    writes = sender_writes(lm, corrupted)
    logits = patched_edges(lm, lm.params, tokens, writes, circuit.mask)

>>> mixing = Mixing(jnp.array([[0.25]]), corrupted_writes=jnp.array([[[[4.0]]]]))
>>> mixing.writes(jnp.array([[[[2.0]]]]))
>>> float(mixing.reads(slice(0, 1), jnp.array([[[10.0]]]))[0, 0, 0, 0])
10.5

Sharp edges: with a mask of zeros the logits are the model's own, with ones those of the corrupted run, to rounding.
Tokens of both runs need the same padding. The norms before attention and MLP are computed here from `ln1_w`, `ln2_w`
and the config; `checked_writes` compares them with the model's own sites and refuses a model they do not describe.

Source: Syed et al., attribution patching outperforms ACDC (2310.10348), and Conmy et al. (2304.14997), for the pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp

from interp_jax.core.errors import ShapeError, UnsupportedModelError, four_part
from interp_jax.methods.circuits.edge_model import EdgeModel, edge_model
from interp_jax.transforms.compilations import counted_jit
from interp_jax.transforms.running_pass import run

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel


class Policy(Protocol):
    """What a pass does at its receivers and senders."""

    def reads(self, rows: slice, resid: jax.Array) -> jax.Array | None:
        """The inputs of the receivers of some `rows`, `[receiver, batch, pos, d_model]`; None leaves them `resid`."""
        ...

    def writes(self, values: jax.Array) -> None:
        """Take note of what the next senders write, their `values` `[sender, batch, pos, d_model]`."""
        ...


class Mixing:
    """The policy of `patched_edges`.

    Args:
        mask: How much of each edge is corrupted, `[sender, receiver]`.
        corrupted_writes: What each sender writes in the corrupted run.
    """

    def __init__(self, mask: jax.Array, corrupted_writes: jax.Array):
        self._mask, self._corrupted = mask, corrupted_writes
        self._differences: list[jax.Array] = []
        self._n_written = 0

    def reads(self, rows: slice, resid: jax.Array) -> jax.Array:
        first, inputs = 0, jnp.broadcast_to(resid, (rows.stop - rows.start, *resid.shape)).astype(jnp.float32)
        for block in self._differences:
            mask = self._mask[first : first + len(block), rows].astype(jnp.float32)
            inputs = inputs + jnp.einsum("uv,ubtd->vbtd", mask, block, precision="highest")
            first += len(block)
        return inputs

    def writes(self, values: jax.Array) -> None:
        corrupted = self._corrupted[self._n_written : self._n_written + len(values)]
        self._n_written += len(values)
        self._differences.append(corrupted.astype(jnp.float32) - values.astype(jnp.float32))
        # A handful of products per receiver, whatever the number of layers.
        if len(self._differences) > 2:
            self._differences = [jnp.concatenate(self._differences)]


class Recording:
    """The policy that changes nothing and keeps all writes."""

    def __init__(self) -> None:
        self.kept: list[jax.Array] = []

    def reads(self, rows: slice, resid: jax.Array) -> None:
        return None

    def writes(self, values: jax.Array) -> None:
        self.kept.append(values.astype(jnp.float32))


def run_edges(model: EdgeModel, params: Any, tokens: Any, policy: Policy) -> jax.Array:
    """Run the model with each receiver's input as a policy has it.

    Args:
        model: The model.
        params: Its parameters.
        tokens: Token ids, `[batch, pos]`.
        policy: What receivers read; it is told what senders write.

    Returns:
        The logits.
    """
    graph, last = model.graph, model.graph.n_layers - 1
    changes: dict[str, jax.Array | None] = {}
    for layer, name, value in (steps := run(model.upstream.forward, params, tokens, sites=model.stops)):
        assert layer is not None
        new = None
        if name == "resid_pre":
            if layer == 0:
                policy.writes(value[None])
            changes = _attention_changes(model, params, layer, value, policy)
            if graph.is_parallel and graph.has_mlps:
                changes |= _mlp_change(model, params, layer, value, policy)
                if model.mlp_norm == "ln1" and (shared := changes["ln1"]) is not None:
                    # What attention reads below is shared too, so that its own change counts from there.
                    changes |= {part: _minus(changes[part], shared) for part in "qkv"}
        elif name == "resid_mid":
            changes |= _mlp_change(model, params, layer, value, policy)
        elif name in ("q", "k", "v") and (by := changes[name]) is not None:
            weight = model.weight(params, f"W_{name.upper()}", layer)
            new = value.astype(jnp.float32) + jnp.einsum("hbtm,hmd->bthd", by, weight, precision="highest")
        elif name == model.mlp_norm and (by := changes[name]) is not None:
            new = value.astype(jnp.float32) + by[0]
        elif name == "z":
            policy.writes(head_writes(value, model.weight(params, "W_O", layer)))
        elif name == "mlp_out":
            policy.writes(value[None])
        elif name == "resid_post" and layer == last:
            inputs = policy.reads(slice(graph.shape[1] - 1, graph.shape[1]), value)
            new = None if inputs is None else inputs[0]
        if new is not None:
            steps.modified_value = new.astype(value.dtype)
    return steps.retval


def _attention_changes(
    model: EdgeModel, params: Any, layer: int, resid: jax.Array, policy: Policy
) -> dict[str, jax.Array | None]:
    """By how much the normalised input of every q, k and v differs from the model's own, by part."""
    rows = model.attention_rows(layer)
    inputs = policy.reads(rows, resid)
    if inputs is None:
        return dict.fromkeys("qkv")
    changed = change(resid, inputs, model.norm(params, "ln1", layer))
    return {
        part: changed[model.rows(layer, part).start - rows.start : model.rows(layer, part).stop - rows.start]
        for part in "qkv"
    }


def _mlp_change(
    model: EdgeModel, params: Any, layer: int, resid: jax.Array, policy: Policy
) -> dict[str, jax.Array | None]:
    inputs = policy.reads(model.rows(layer, "mlp"), resid)
    norm = model.norm(params, model.mlp_norm, layer)
    return {model.mlp_norm: None if inputs is None else change(resid, inputs, norm)}


def _minus(changed: jax.Array | None, shared: jax.Array) -> jax.Array | None:
    return None if changed is None else changed - jnp.broadcast_to(shared, changed.shape)


def change(resid: Any, inputs: Any, norm: Callable[[Any], Any] = lambda x: x) -> jax.Array:
    """By how much normalised inputs differ from the normalised residual.

    norm(inputs) - norm(resid)

    Args:
        resid: The residual, `[..., d_model]`.
        inputs: Several inputs, with one axis more in front.
        norm: The norm.

    Returns:
        The differences, float32.
    """
    own = norm(resid.astype(jnp.float32))
    return norm(inputs.astype(jnp.float32)) - jnp.broadcast_to(own, inputs.shape)


def head_writes(z: jax.Array, W_O: jax.Array) -> jax.Array:
    """What each head writes, `[head, batch, pos, d_model]`, from `z` and `W_O[head, d_head, d_model]`."""
    return jnp.einsum("bthe,hem->hbtm", z.astype(jnp.float32), W_O.astype(jnp.float32), precision="highest")


def patched_edges(lm: LanguageModel, params: Any, tokens: Any, corrupted_writes: Any, mask: Any) -> jax.Array:
    """The logits when every receiver hears a mixture of clean and corrupted writes, edge by edge.

    input_v = resid + sum_u mask[u, v] (corrupted_u - write_u)

    A pure function: jit it, batch it over masks, differentiate it with respect to the mask.

    Args:
        lm: The model.
        params: Its parameters, usually `lm.params`.
        tokens: Token ids, `[batch, pos]`.
        corrupted_writes: What each sender writes in another run, `[sender, batch, pos, d_model]` (`sender_writes`).
        mask: 0 for the write of this pass, 1 for the corrupted one, or between, `[sender, receiver]`. Entries that
            are no edge count for nothing.

    Returns:
        Logits, `[batch, pos, d_vocab]`.

    Raises:
        ShapeError: The mask or the writes do not fit the model and the tokens.
        UnsupportedModelError: The model has not the sites, weights or norms that are needed.
    """
    model = edge_model(lm, where="patched_edges")
    expected = (len(model.graph.senders), *jnp.shape(tokens), model.config.d_model)
    for what, value, shape in (("mask", mask, model.graph.shape), ("corrupted_writes", corrupted_writes, expected)):
        if jnp.shape(value) != shape:
            raise ShapeError(
                four_part(
                    f"{what} {list(jnp.shape(value))} was given",
                    where="patched_edges",
                    expected=f"{list(shape)}: senders, then receivers for a mask or the tokens' shape and d_model.",
                    fix="take the mask from Circuit.mask and the writes from sender_writes, both of this model.",
                )
            )
    policy = Mixing(jnp.asarray(mask), jnp.asarray(corrupted_writes))
    return run_edges(model, params, jnp.asarray(tokens), policy)


def sender_writes(lm: LanguageModel, tokens: Any) -> jax.Array:
    """What every sender writes to the residual stream.

    Args:
        lm: The model.
        tokens: Token ids, `[batch, pos]`.

    Returns:
        float32 `[sender, batch, pos, d_model]`, in the order of `edge_graph(lm).senders`.

    Raises:
        UnsupportedModelError: The model's residual stream is no sum of these writes.
    """
    model = edge_model(lm, where="sender_writes")
    return checked_writes(model, lm.params, lm.check_tokens(tokens, where="sender_writes"), where="sender_writes")


def checked_writes(model: EdgeModel, params: Any, tokens: Any, *, where: str) -> jax.Array:
    """The writes of all senders, as in `checked_run`, of a `model` with `params` on `tokens`; `where` as there."""
    return checked_run(model, params, tokens, where=where)[1]


def checked_run(model: EdgeModel, params: Any, tokens: Any, *, where: str) -> tuple[jax.Array, jax.Array]:
    """The logits, and the writes of all senders, once these are known to add up and the norms to be right.

    Args:
        model: The model.
        params: Its parameters.
        tokens: Token ids, `[batch, pos]`.
        where: The public call, for the error message.

    Returns:
        Logits, and writes in float32 `[sender, batch, pos, d_model]`.

    Raises:
        UnsupportedModelError: The writes do not add up to the residual stream, or the norms are others.
    """
    logits, writes, errors = _run_and_errors(model, params, tokens)
    allowed = max(1e-3, 16 * float(jnp.finfo(model.config.dtype).eps))
    wrong = {what: float(error) for what, error in errors.items() if not float(error) <= allowed}
    if wrong:
        raise UnsupportedModelError(
            four_part(
                "A model for which " + " and ".join(f"{what} (relative error {e:.1g})" for what, e in wrong.items()),
                where=where,
                expected=f"a residual stream that is a sum of heads and MLPs, read through a {model.config.norm}.",
                fix="see lm.check(); models that normalise what a block writes have no edges of this kind.",
            )
        )
    return logits, writes


def _recorded(model: EdgeModel, params: Any, tokens: Any) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Logits, writes, and how far each thing that is taken for granted is from true."""
    recording, resid, errors = Recording(), {}, {}
    sites = tuple(dict.fromkeys((*model.stops, *model.norms)))
    for layer, name, value in (steps := run(model.upstream.forward, params, tokens, sites=sites)):
        assert layer is not None
        value = value.astype(jnp.float32)
        if name in ("resid_pre", "resid_mid"):
            resid = {"ln1": resid.get("ln1"), "ln2": value} if name == "resid_mid" else {"ln1": value, "ln2": value}
        if name in model.norms:
            own = model.norm(params, name, layer)(resid[name])
            errors.setdefault(f"{name} is not the norm of its weights", []).append(_relative(own, value))
        if name == "resid_pre" and layer == 0:
            recording.writes(value[None])
        elif name == "z":
            recording.writes(head_writes(value, model.weight(params, "W_O", layer)))
        elif name == "mlp_out":
            recording.writes(value[None])
        elif name == "resid_post" and layer == model.graph.n_layers - 1:
            total = jnp.concatenate(recording.kept).sum(0)
            if "b_O" in model.upstream.layer_weights:
                biases = sum(model.weight(params, "b_O", i) for i in range(layer + 1))
                total = total + jnp.broadcast_to(biases, total.shape)
            errors["the writes do not add up to the residual stream"] = [_relative(total, value)]
    largest = {what: jnp.max(jnp.stack(found)) for what, found in errors.items()}
    return steps.retval, jnp.concatenate(recording.kept), largest


_run_and_errors = counted_jit(_recorded, name="sender writes", static_argnums=0)


def _relative(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(one - other)) / jnp.maximum(jnp.max(jnp.abs(other)), 1e-6)
