"""Survey: what a jaxpr sows, seen from outside, before anything is run.

The survey walks a jaxpr and says for each name what a harvest will return: a scan turns an appended value into a
stack of them, a clobbered one into its last, and so on. All mistakes that can be seen without running are found
here, with the source line of the sow.

>>> import jax
>>> from interp_jax.transforms.sowing import sow
>>> closed = jax.make_jaxpr(lambda x: sow(x * 2.0, tag="t", name="a"))(1.0)
>>> [(key, sown.mode) for key, sown in survey(closed.jaxpr, Names("t"), Place()).items()]
[(('a',), 'strict')]

Source: Oryx Harvest for the modes and their rules.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote, unquote

import jax
from jax.extend.core import Jaxpr, JaxprEqn

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.core.sites import Site
from interp_jax.transforms.jaxprs import Scope, callee_of, inner_jaxprs, is_loop, scope_of, source_line
from interp_jax.transforms.sowing import LoopLayer, sow_p, value_seen

Key = Hashable
"""What a harvest knows a value by: a path of names, a `Site`, or in the body of a loop over layers a `LoopSite`."""


class LoopSite(NamedTuple):
    """A site in the body of a scan over layers: one site per iteration, `Site(offset + stride * index, name)`.

    `n_loops` says which loop: the number of loops around its body, itself included.
    """

    name: str
    layer: LoopLayer
    n_loops: int

    def site(self, index: int) -> Site:
        """The site of an iteration."""
        return Site(self.layer.offset + self.layer.stride * index, self.name)

    def __str__(self) -> str:
        return f"*.{self.name}"


class Place(NamedTuple):
    """Where in a program a jaxpr is called: its layer scope, the nests around it, and how many loops."""

    scope: Scope = Scope()
    nests: tuple[str, ...] = ()
    n_loops: int = 0

    def of(self, eqn: JaxprEqn) -> Place:
        """The place of an equation in a jaxpr at this place."""
        found = _NEST.findall(str(eqn.source_info.name_stack))
        nests = (*self.nests, *map(unquote, found)) if found else self.nests
        return Place(scope_of(eqn, self.scope, self.n_loops), nests, self.n_loops)

    def in_loop(self) -> Place:
        """The place of the body of a loop at this place."""
        return self._replace(n_loops=self.n_loops + 1)


_NEST = re.compile(r"ij\.nest=([^/()]*)\.")


def nest_label(scope: str) -> str:
    """The name-stack entry of a nest."""
    return f"ij.nest={quote(scope, safe='').replace('.', '%2E')}."


class Policy(Protocol):
    """Which sows a harvest concerns, and what it calls them."""

    def key(self, eqn: JaxprEqn, place: Place) -> Key | None:
        """The key of a sow, or None if this harvest leaves it where it is."""
        ...

    def is_wanted(self, key: Key) -> bool:
        """Whether a sow of this key is harvested; otherwise it is dropped."""
        ...

    def is_dropped(self, eqn: JaxprEqn) -> bool:
        """Whether a sow without a key is taken out all the same."""
        ...

    def iterations(self, key: LoopSite, length: int) -> list[int]:
        """The iterations of a loop over layers whose site is read."""
        ...


class Names(NamedTuple):
    """The policy of Oryx: sows of one tag, by name. With `only`, all but those keys are left where they are."""

    tag: Hashable
    allowlist: frozenset[str] | None = None
    blocklist: frozenset[str] = frozenset()
    exclusive: bool = False
    only: frozenset[Key] | None = None

    def key(self, eqn: JaxprEqn, place: Place) -> Key | None:
        key = (*place.nests, eqn.params["name"])
        concerns_it = eqn.params["tag"] == self.tag and (self.only is None or key in self.only)
        return key if concerns_it else None

    def is_wanted(self, key: Any) -> bool:
        names = {key[-1], "/".join(key)}
        return not names & self.blocklist and (self.allowlist is None or bool(names & self.allowlist))

    def is_dropped(self, eqn: JaxprEqn) -> bool:
        return self.exclusive

    def iterations(self, key: LoopSite, length: int) -> list[int]:
        raise AssertionError("names have no layers")


@dataclass(frozen=True)
class Sown:
    """One harvested value as its reader sees it: its form, its mode, and where it is sown."""

    form: Any
    mode: str
    source: str

    @property
    def leaves(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of its arrays."""
        return jax.tree.leaves(self.form)


def form_of(eqn: JaxprEqn) -> Any:
    """Shapes and dtypes of what the reader of a sow sees."""
    avals = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in eqn.outvars]
    if not eqn.params["batch_axes"]:
        return jax.tree.unflatten(eqn.params["tree"], avals)
    return jax.eval_shape(lambda *leaves: value_seen(leaves, eqn.params), *avals)


def concerns(eqn: JaxprEqn, policy: Policy, place: Place) -> bool:
    """Whether a harvest has anything to do in an equation: itself a sow it knows, or with one inside."""
    if eqn.primitive is sow_p:
        return policy.key(eqn, place.of(eqn)) is not None or policy.is_dropped(eqn)
    inner = list(inner_jaxprs(eqn))
    if not inner:
        return False
    own = place.of(eqn).in_loop() if is_loop(eqn) else place.of(eqn)
    return any(concerns(inside, policy, own) for _, jaxpr in inner for inside in jaxpr.eqns)


def keys_in(jaxpr: Jaxpr, policy: Policy, place: Place) -> Iterator[Key]:
    """The key of every sow of a harvest in a jaxpr and inside it, wanted or not."""
    for eqn in jaxpr.eqns:
        if eqn.primitive is sow_p:
            key = policy.key(eqn, place.of(eqn))
            if key is not None:
                yield key
            continue
        inner = list(inner_jaxprs(eqn))
        if inner:
            own = place.of(eqn).in_loop() if is_loop(eqn) else place.of(eqn)
            for _, inside in inner:
                yield from keys_in(inside, policy, own)


def survey(jaxpr: Jaxpr, policy: Policy, place: Place) -> dict[Key, Sown]:
    """What a harvest of a jaxpr finds, by key, in execution order.

    Args:
        jaxpr: The program.
        policy: Which sows count.
        place: Where it is called.

    Returns:
        The harvested values as seen from outside the jaxpr.

    Raises:
        InvalidInputError: Two sows of one key, a mode that cannot be used where it is, branches that disagree.
    """
    found: dict[Key, Sown] = {}
    for eqn in jaxpr.eqns:
        if not concerns(eqn, policy, place):
            continue
        for key, sown in _survey_equation(eqn, policy, place).items():
            if key in found and not {sown.mode, found[key].mode} <= {"clobber", "cond_clobber"}:
                raise _refuse(
                    f"Variable has already been reaped: {show_key(key)} (sown at {found[key].source}, and again at "
                    f"{sown.source})",
                    expected="one sow per name in strict and append mode.",
                    fix="give the second another name, nest one of them, or sow both with mode='clobber'.",
                )
            found[key] = sown
    return found


def _survey_equation(eqn: JaxprEqn, policy: Policy, place: Place) -> dict[Key, Sown]:
    own = place.of(eqn)
    if eqn.primitive is sow_p:
        key = policy.key(eqn, own)
        if key is None or not policy.is_wanted(key):
            return {}
        return {key: Sown(form_of(eqn), eqn.params["mode"], source_line(eqn))}
    match eqn.primitive.name:
        case "scan":
            return survey_scan(eqn, policy, own)[1]
        case "while":
            return _survey_while(eqn, policy, own.in_loop())
        case "cond":
            return _survey_branches([survey(branch.jaxpr, policy, own) for branch in eqn.params["branches"]])
        case "shard_map":
            if survey(eqn.params["jaxpr"], policy, own):
                raise _refuse(
                    f"Detected sow calls inside a shard_map. This is not currently supported. ({source_line(eqn)})",
                    expected="sows outside shard_map, where a value has a global shape.",
                    fix="return the value from the shard_map, with an out_spec, and sow it outside.",
                )
            return {}
    if is_recomputation(eqn):
        return {}
    return survey(callee_of(eqn).jaxpr, policy, own)


def is_recomputation(eqn: JaxprEqn) -> bool:
    """Whether an equation repeats, for a backward pass, what a checkpointed call has computed before.

    Its sows have been reaped where they were first computed; what is planted there is planted here too.
    """
    return bool(eqn.params.get("differentiated")) and "prevent_cse" in eqn.params


def survey_scan(eqn: JaxprEqn, policy: Policy, place: Place) -> tuple[dict[Key, Sown], dict[Key, Sown]]:
    """What a scan sows, as seen in one iteration and as seen from outside.

    Args:
        eqn: The scan.
        policy: Which sows count.
        place: The scan's own place.

    Returns:
        Both, by key. In one iteration a site of a loop over layers is one `LoopSite`; outside it is the `Site`s asked
        for.
    """
    length = eqn.params["length"]
    inside = survey(eqn.params["jaxpr"].jaxpr, policy, place.in_loop())
    outside: dict[Key, Sown] = {}
    for key, sown in inside.items():
        if isinstance(key, LoopSite) and key.n_loops == place.n_loops + 1:
            outside.update({key.site(i): sown for i in policy.iterations(key, length)})
        else:
            outside[key] = _leave_scan(key, sown, length)
    return inside, outside


def _leave_scan(key: Key, sown: Sown, length: int) -> Sown:
    if sown.mode == "strict":
        raise _refuse(
            f"Cannot use strict mode for {show_key(key)!r} inside `scan`. (sown at {sown.source})",
            expected="append (all iterations stacked), clobber (the last) or cond_clobber (the last with a true "
            "predicate); for a scan over layers, layer_scope(loop_layer()) and sites.",
            fix="give the sow one of these modes.",
        )
    if sown.mode != "append":
        return sown
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((length, *leaf.shape), leaf.dtype), sown.form)
    return replace(sown, form=stacked)


def _survey_while(eqn: JaxprEqn, policy: Policy, body_place: Place) -> dict[Key, Sown]:
    condition = survey(eqn.params["cond_jaxpr"].jaxpr, policy, body_place)
    if condition:
        keys = ", ".join(map(show_key, condition))
        raise _refuse(
            f"{keys} is sown in the condition of a `while_loop` ({source_line(eqn)})",
            expected="sows in the body only.",
            fix="compute the value in the body and carry it to the condition.",
        )
    body = survey(eqn.params["body_jaxpr"].jaxpr, policy, body_place)
    for key, sown in body.items():
        if sown.mode in ("strict", "append"):
            raise _refuse(
                f"Must use clobber or cond_clobber mode for {show_key(key)!r} inside of a `while_loop`. (sown at "
                f"{sown.source} with mode {sown.mode})",
                expected="clobber or cond_clobber: how often the loop runs is not known beforehand.",
                fix="sow with mode='clobber', or use lax.scan.",
            )
    return body


def _survey_branches(branches: Sequence[dict[Key, Sown]]) -> dict[Key, Sown]:
    first = branches[0]
    for other in branches[1:]:
        sources = ", ".join(sown.source for branch in (first, other) for sown in branch.values())
        if len(other) != len(first):
            raise _refuse(
                f"Mismatching number of `sow`s between branches. (sown at {sources})",
                expected="the same names in every branch of a cond or switch.",
                fix="sow a placeholder of the same shape in the other branch.",
            )
        # The branch of a false predicate comes first in JAX; users read the other way round.
        for key in other:
            if key not in first:
                raise _refuse(
                    f"Missing sow in branch: {show_key(key)!r}. (sown at {sources})",
                    expected="the same names in every branch of a cond or switch.",
                    fix="sow the name in every branch.",
                )
        for key, sown in first.items():
            if other[key].form != sown.form:
                raise _refuse(
                    f"Mismatched shape between branches: {show_key(key)!r}. ({sown.form} and {other[key].form}, sown at "
                    f"{sources})",
                    expected="one structure, shape and dtype for a name in every branch.",
                    fix="give the values of all branches one form.",
                )
            if other[key].mode != sown.mode:
                raise _refuse(
                    f"Mismatched mode between branches: {show_key(key)!r} ({sown.mode} and {other[key].mode})",
                    expected="one mode for a name in every branch.",
                    fix="sow with the same mode in every branch.",
                )
    return first


def show_key(key: Any) -> str:
    """A key as users write it: "scope/name", or "5.mlp_out"."""
    return "/".join(map(str, key)) if type(key) is tuple else str(key)


def _refuse(what: str, *, expected: str, fix: str) -> InvalidInputError:
    return InvalidInputError(four_part(what.removesuffix("."), expected=expected, fix=fix))
