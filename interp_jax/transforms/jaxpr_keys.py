"""Keys of jaxprs: when two programs are the same code.

Two jaxprs are the same code when their equations are equal up to the names of variables. A key says all that decides
what is computed (primitives, parameters, jaxprs inside them, literals, input types) and nothing else; it is compared,
never hashed alone, so a collision cannot mix two programs up. Functions among the parameters (custom derivative rules)
count by identity, and only where a derivative could be taken.

>>> import jax
>>> one, two, other = (jax.make_jaxpr(f)(1.0).jaxpr for f in (lambda x: x * 2, lambda y: y * 2, lambda x: x * 3))
>>> jaxpr_key(one, False) == jaxpr_key(two, False), jaxpr_key(one, False) == jaxpr_key(other, False)
(True, False)

Source: interp_jax.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Parameters that say how to differentiate; they cannot matter where nothing is being differentiated.
_RULE_PARAMS = {"jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees"}


def params_key(params: dict[str, Any], traced: bool) -> Hashable:
    """A key for the parameters `params` of an equation; `traced` says whether derivative rules count."""
    return tuple(
        (name, param_key(value, traced)) for name, value in sorted(params.items()) if traced or name not in _RULE_PARAMS
    )


def param_key(value: Any, traced: bool) -> Hashable:
    """A key for `value`, a parameter of an equation; `traced` says whether derivative rules count."""
    if isinstance(value, ClosedJaxpr):
        return ("closed", jaxpr_key(value.jaxpr, traced), tuple(value_key(const) for const in value.consts))
    if isinstance(value, Jaxpr):
        return ("open", jaxpr_key(value, traced))
    if isinstance(value, (tuple, list)):
        return (type(value), tuple(param_key(item, traced) for item in value))
    if isinstance(value, dict):
        return ("dict", tuple((name, param_key(item, traced)) for name, item in value.items()))
    return value_key(value)


def value_key(value: Any) -> tuple[Hashable, ...]:
    """A key that only a value equal to `value` has. What cannot be compared is kept, and counts by identity."""
    if hasattr(value, "__array__") and not isinstance(value, jax.Array):
        # JAX 0.8 wraps the values of literals in an array type of its own, without an equality.
        value = np.asarray(value)
    if isinstance(value, np.ndarray) and value.nbytes <= 1024 and value.dtype != object:
        return ("array", value.dtype, value.shape, value.tobytes())
    if isinstance(value, float):
        return ("float", repr(value))
    if isinstance(value, (jax.Array, np.ndarray)):
        return ("same", _Same(value))
    try:
        hash(value)
    except TypeError:
        return ("same", _Same(value))
    return (type(value), value)


class _Same:
    """Equal to itself only; holds its value, so that the identity stays taken."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def jaxpr_key(jaxpr: Jaxpr, traced: bool) -> Hashable:
    """A key for `jaxpr` up to the names of its variables; `traced` says whether derivative rules count."""
    numbers: dict[Any, int] = {}
    for var in (*jaxpr.constvars, *jaxpr.invars):
        numbers[var] = len(numbers)

    def atom_key(atom: Any) -> Hashable:
        return ("literal", *value_key(atom.val), atom.aval) if isinstance(atom, Literal) else numbers[atom]

    lines = []
    for eqn in jaxpr.eqns:
        operands = tuple(map(atom_key, eqn.invars))
        for var in eqn.outvars:
            numbers[var] = len(numbers)
        lines.append((eqn.primitive, params_key(eqn.params, traced), value_key(eqn.ctx), operands))
    ins = tuple(var.aval for var in (*jaxpr.constvars, *jaxpr.invars))
    return (ins, tuple(lines), tuple(map(atom_key, jaxpr.outvars)))
