"""`reap`, `plant`, `harvest` and `nest`: Oryx Harvest's functions, by name and tag.

>>> import jax
>>> def f(x):
...     return sow(x * 2.0, tag="t", name="a") + 1.0
>>> reap(f, tag="t")(3.0)["a"], plant(f, tag="t")({"a": 10.0}, 3.0)
(Array(6., dtype=float32, weak_type=True), Array(11., dtype=float32))

Sharp edges: a planted name is not reaped. A value must be planted in the form it is sown in, and a name nobody sows
is an error (`unknown="ignore"` for Oryx's behaviour). Under `vmap(reap(f))` values are those of one example; under
`reap(vmap(f))` they have the mapped axis first.

Source: Oryx Harvest, whose names and semantics these are; where it is silently wrong, these are right or raise.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any

import jax

from interp_jax.core.errors import UnknownNameError, four_part
from interp_jax.transforms.harvest.interpret import interpret
from interp_jax.transforms.harvest.keys import Names, Place, nest_label, show_key
from interp_jax.transforms.harvest.planting import Planting, check_fits
from interp_jax.transforms.harvest.staging import staged
from interp_jax.transforms.harvest.survey import keys_in, survey
from interp_jax.transforms.sowing import sow
from interp_jax.transforms.tracing import trace_program

__all__ = ["call_and_reap", "harvest", "nest", "plant", "reap", "sow"]


def harvest(
    f: Callable[..., Any],
    *,
    tag: Hashable,
    allowlist: Collection[str] | None = None,
    blocklist: Collection[str] = (),
    exclusive: bool = False,
    unknown: str = "error",
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A function that also takes values to plant and returns values reaped.

    Args:
        f: The function.
        tag: The tag of the sows it concerns.
        allowlist: The names it concerns; all by default. Sows of the tag that are left out are dropped.
        blocklist: Names it does not concern.
        exclusive: Whether sows of other tags are dropped too.
        unknown: What is done about a planted name that nobody sows: "error" or "ignore".

    Returns:
        A function `(plants, *args, **kwargs) -> (result, reaps)`. `plants` and `reaps` are dictionaries by name;
        names inside `nest(..., scope=s)` are in a dictionary under `s`.

    Raises:
        InvalidInputError: At the call: sows whose names or modes do not go together.
        UnknownNameError: At the call: a planted name that nobody sows.
        ShapeError: At the call: a planted value of another form than the sown one.
    """
    policy = _policy(tag, allowlist, blocklist, exclusive)

    def harvested(plants: Mapping[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        return _harvest(f, policy, plants, args, kwargs, unknown=unknown, reaps=True)

    return _renamed(f, harvested, takes_plants=True)


def _harvest(
    f: Callable[..., Any],
    policy: Names,
    plants: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    unknown: str,
    reaps: bool,
) -> tuple[Any, dict[str, Any]]:
    trace = trace_program(f, args, kwargs)
    where = f"plant({getattr(f, '__name__', type(f).__name__)})"
    found = survey(trace.closed.jaxpr, policy, Place())
    sown = frozenset(keys_in(trace.closed.jaxpr, policy, Place()))  # Filtered out or not.
    flat = {key: value for key, value in _by_path(plants, sown).items() if policy.is_wanted(key)}
    if unknown != "ignore":
        _check_known(flat, found, tag=policy.tag, where=where)
    if not reaps:
        policy = policy._replace(only=frozenset(flat))
    # What is not found here may be sown by a derivative rule that runs only when the function is differentiated.
    flat = {key: check_fits(key, found[key], v, where=where) if key in found else v for key, v in flat.items()}

    def interpreted(args: Any, planted: list[Any]) -> tuple[Any, OrderedDict[Any, Any]]:
        values: dict[Any, Any] = dict(zip(flat, planted, strict=True))
        outs, reaped = interpret(trace.closed, args, Planting(policy, values), Place())
        # JAX sorts the keys of other dictionaries.
        in_order = OrderedDict((key, value) for key, (value, _) in reaped.items())
        return jax.tree.unflatten(trace.out_tree, outs), in_order

    result, in_order = staged(trace.closed, (policy, tuple(flat)), interpreted, trace.args, list(flat.values()))
    return result, _nested(in_order)


def call_and_reap(f: Callable[..., Any], **options: Any) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """`f` as a function that returns `(result, reaps)`; options as of `harvest`."""
    harvested = harvest(f, **options)
    return _renamed(f, lambda *args, **kwargs: harvested({}, *args, **kwargs))


def reap(f: Callable[..., Any], **options: Any) -> Callable[..., dict[str, Any]]:
    """`f` as a function that returns the reaped values only; options as of `harvest`."""
    harvested = harvest(f, **options)
    return _renamed(f, lambda *args, **kwargs: harvested({}, *args, **kwargs)[1])


def plant(
    f: Callable[..., Any],
    *,
    tag: Hashable,
    allowlist: Collection[str] | None = None,
    blocklist: Collection[str] = (),
    exclusive: bool = False,
    unknown: str = "error",
) -> Callable[..., Any]:
    """A function `(plants, *args, **kwargs) -> result`. Sows that nothing is planted at are left for others.

    Args:
        f: The function.
        tag: The tag of the sows it concerns.
        allowlist: The names it concerns; all by default.
        blocklist: Names it does not concern.
        exclusive: Whether sows of other tags are dropped.
        unknown: What is done about a planted name that nobody sows: "error" or "ignore".

    Returns:
        The function.
    """
    policy = _policy(tag, allowlist, blocklist, exclusive)

    def planted(plants: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return _harvest(f, policy, plants, args, kwargs, unknown=unknown, reaps=False)[0]

    return _renamed(f, planted, takes_plants=True)


def _policy(tag: Hashable, allowlist: Collection[str] | None, blocklist: Collection[str], exclusive: bool) -> Names:
    return Names(tag, None if allowlist is None else frozenset(allowlist), frozenset(blocklist), exclusive)


def nest(f: Callable[..., Any], *, scope: str) -> Callable[..., Any]:
    """The function with every name sown in it put under a scope.

    Args:
        f: The function.
        scope: Name of the scope.

    Returns:
        The same function to all but a harvest, which returns and takes a dictionary under `scope`.
    """

    def nested(*args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(nest_label(scope)):
            return f(*args, **kwargs)

    return _renamed(f, nested)


def _renamed(f: Callable[..., Any], wrapper: Callable[..., Any], *, takes_plants: bool = False) -> Callable[..., Any]:
    renamed = functools.wraps(f, updated=())(wrapper)
    if takes_plants:
        # `__wrapped__` would say that the signature is that of `f`, and jax.jit would count arguments by it.
        del renamed.__wrapped__
    return renamed


def _by_path(plants: Mapping[str, Any], sown: Collection[Any], scope: tuple[str, ...] = ()) -> dict[Any, Any]:
    """Planted values by path of names; a dictionary is a scope unless a name of that path is sown."""
    flat: dict[Any, Any] = {}
    for name, value in plants.items():
        path = (*scope, name)
        is_scope = isinstance(value, Mapping) and path not in sown and any(key[: len(path)] == path for key in sown)
        flat.update(_by_path(value, sown, path) if is_scope else {path: value})
    return flat


def _check_known(plants: Collection[Any], sown: Collection[Any], *, tag: Hashable, where: str) -> None:
    """Refuse to plant what nobody sows."""
    missing = [show_key(key) for key in plants if key not in sown]
    if missing:
        raise UnknownNameError(
            four_part(
                f"Nobody sows {', '.join(map(repr, missing))} with tag {tag!r}",
                where=where,
                names=list(map(show_key, sown)),
                given=missing[0],
                fix="plant under one of these names, or pass unknown='ignore'.",
            )
        )


def _nested(reaps: Mapping[Any, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for *scopes, name in reaps:
        here = out
        for scope in scopes:
            here = here.setdefault(scope, {})
        here[name] = reaps[*scopes, name]
    return out
