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

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from interp_jax.transforms.sowing import SITE_TAG, sow_p


def evaluate(eqn: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """The results of one equation on the given operands, under the equation's own context and source line."""
    primitive = eqn.primitive
    bound = primitive.get_bind_params(eqn.params)
    # Until JAX 0.9 or so the functions among the parameters came apart from the rest.
    subfuns, params = bound if isinstance(bound, tuple) else ((), bound)
    name_stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=name_stack), eqn.ctx.manager:
        out = primitive.bind(*subfuns, *operands, **params)
    return list(out) if primitive.multiple_results else [out]


def inner_jaxprs(eqn: JaxprEqn) -> Iterator[tuple[str, Jaxpr]]:
    """Every jaxpr among an equation's parameters, with the name of the parameter."""
    for name, param in eqn.params.items():
        for item in param if isinstance(param, (tuple, list)) else (param,):
            if isinstance(item, ClosedJaxpr):
                yield name, item.jaxpr
            elif isinstance(item, Jaxpr):
                yield name, item


def is_site(eqn: JaxprEqn) -> bool:
    """Whether an equation is a sow with the tag of sites."""
    return eqn.primitive is sow_p and eqn.params["tag"] == SITE_TAG


def any_site(jaxpr: Jaxpr, wanted: Callable[[dict[str, Any]], bool]) -> bool:
    """Whether a jaxpr, or any jaxpr inside it, has a site whose parameters are wanted."""
    for eqn in jaxpr.eqns:
        if is_site(eqn):
            if wanted(eqn.params):
                return True
        elif any(any_site(inner, wanted) for _, inner in inner_jaxprs(eqn)):
            return True
    return False


def source_line(eqn: JaxprEqn) -> str:
    """Where in the user's (or upstream's) code an equation comes from: "file.py:12 (function)"."""
    return source_info_util.summarize(eqn.source_info)
