"""Survey: what a jaxpr sows, seen from outside, before anything is run.

The survey walks a jaxpr and says for each name what a harvest will return: a scan turns an appended value into a
stack of them, a clobbered one into its last, and so on. All mistakes that can be seen without running are found
here, with the source line of the sow.

>>> import jax
>>> from interp_jax.transforms.harvest.keys import Names
>>> from interp_jax.transforms.sowing import sow
>>> closed = jax.make_jaxpr(lambda x: sow(x * 2.0, tag="t", name="a"))(1.0)
>>> [(key, sown.mode) for key, sown in survey(closed.jaxpr, Names("t"), Place()).items()]
[(('a',), 'strict')]

Source: Oryx Harvest for the modes and their rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.transforms.harvest.keys import Key, LoopSite, Place, Policy, show_key
from interp_jax.transforms.jaxprs import CHECKPOINTS, callee_of, inner_jaxprs, is_loop, outline_of, source_line
from interp_jax.transforms.sowing import sow_p
from interp_jax.transforms.tracing import form_seen


@dataclass(frozen=True)
class Sown:
    """One harvested value as its reader sees it: its form, its mode, and where it is sown.

    `when` is the shape of the predicate of a conditional sow, `n_batched` the number of vmaps inside the harvested
    function that gave the value an axis, and `varies` whether devices hold different values of it (in a shard_map).
    """

    form: Any
    mode: str
    source: str
    when: tuple[int, ...] | None = None
    n_batched: int = 0
    varies: bool = False


def _sown(eqn: JaxprEqn) -> Sown:
    params = eqn.params
    predicate: Any = eqn.invars[len(eqn.outvars)].aval if params["has_predicate"] else None
    return Sown(
        form_seen(eqn),
        params["mode"],
        source_line(eqn),
        when=None if predicate is None else predicate.shape,
        n_batched=len(params["batch_axes"]),
        varies=any(map(_varies, eqn.outvars)),
    )


def _varies(var: Any) -> bool:
    """Whether devices hold different values of a variable inside a shard_map."""
    # JAX has renamed `vma` to `mat.varying`.
    varying = var.aval.mat.varying if hasattr(var.aval, "mat") else getattr(var.aval, "vma", ())
    return bool(varying)


def concerns(eqn: JaxprEqn, policy: Policy, place: Place) -> bool:
    """Whether a harvest has anything to do in an equation: itself a sow it knows, or with one inside."""
    if eqn.primitive is sow_p:
        return policy.key(eqn, place.of(eqn)) is not None or policy.dropped(eqn)
    inner = list(inner_jaxprs(eqn))
    if not inner:
        return False
    own = place.of(eqn).in_loop() if is_loop(eqn) else place.of(eqn)
    return any(concerns(inside, policy, own) for _, jaxpr in inner for inside in _busy_equations(jaxpr))


def _busy_equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """The equations that sow or have a sow inside, in execution order."""
    return (jaxpr.eqns[index] for index in sorted(outline_of(jaxpr).busy))


def keys_in(jaxpr: Jaxpr, policy: Policy, place: Place) -> Iterator[Key]:
    """The key of every sow of a harvest in a jaxpr and inside it, wanted or not."""
    for eqn in _busy_equations(jaxpr):
        if eqn.primitive is sow_p:
            key = policy.key(eqn, place.of(eqn))
            if key is not None:
                yield key
        else:
            yield from keys_of(eqn, policy, place)


def keys_of(eqn: JaxprEqn, policy: Policy, place: Place) -> Iterator[Key]:
    """The key of every sow inside an equation `eqn` at a `place` that `policy` knows, wanted or not."""
    own = place.of(eqn).in_loop() if is_loop(eqn) else place.of(eqn)
    for _, inside in inner_jaxprs(eqn):
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
    sown_at: dict[Key, int] = {}
    for index in sorted(outline_of(jaxpr).busy):
        eqn = jaxpr.eqns[index]
        if not concerns(eqn, policy, place):
            continue
        for key, sown in _survey_equation(eqn, policy, place).items():
            if key in found:
                before, between = jaxpr.eqns[: sown_at[key]], jaxpr.eqns[sown_at[key] : index]
                _check_second(key, found[key], sown, before=before, between=between)
            found[key], sown_at[key] = sown, index
    return found


def _check_second(
    key: Key, first: Sown, second: Sown, *, before: Sequence[JaxprEqn], between: Sequence[JaxprEqn]
) -> None:
    """Refuse a second sow of a key, unless both clobber.

    Args:
        key: Their key.
        first: One of them.
        second: The other.
        before: The equations before the first.
        between: The equations between the two.
    """
    both = f"(sown at {first.source}, and again at {second.source})"
    per_example = "use vmap(reap(f)) in place of reap(vmap(f))"
    if not {first.mode, second.mode} <= {"clobber", "cond_clobber"}:
        hint = f"; if they are branches of a cond under vmap, {per_example}" if second.n_batched else ""
        raise _refuse(
            f"Variable has already been reaped: {show_key(key)} {both}",
            expected="one sow per name in strict and append mode.",
            fix=f"give the second another name, nest one of them, or sow both with mode='clobber'{hint}.",
        )
    if second.mode == "cond_clobber" and first.form != second.form:
        raise _refuse(
            f"{show_key(key)!r} is sown as {first.form} and, under a predicate, as {second.form} {both}",
            expected="one structure, shape and dtype, as the predicate decides which is reaped.",
            fix="give both values one form, or the second another name.",
        )
    # vmap runs all branches of a cond whose predicate differs between examples, and compares the index with each.
    if second.n_batched and _indices_compared(before) & _indices_compared(between):
        raise _refuse(
            f"{show_key(key)!r} lies in branches of a cond whose predicate differs between examples of a vmap {both}",
            expected="one branch taken by all examples, or the harvest inside the vmap.",
            fix=f"{per_example}.",
        )


def _indices_compared(eqns: Sequence[JaxprEqn]) -> set[Any]:
    """The integer variables that equations compare with a number."""
    pairs: list[Any] = [eqn.invars for eqn in eqns if eqn.primitive.name == "eq"]
    return {a for a, b in pairs if isinstance(a, Var) and _is_int32(a.aval) and isinstance(b, Literal)}


def _is_int32(aval: Any) -> bool:
    return aval.dtype == np.int32


def _survey_equation(eqn: JaxprEqn, policy: Policy, place: Place) -> dict[Key, Sown]:
    own = place.of(eqn)
    if eqn.primitive is sow_p:
        key = policy.key(eqn, own)
        if key is None or not policy.is_wanted(key):
            return {}
        return {key: _sown(eqn)}
    match eqn.primitive.name:
        case "scan":
            return survey_scan(eqn, policy, own)[1]
        case "while":
            return survey_while(eqn, policy, own)
        case "cond":
            return survey_branches([survey(branch.jaxpr, policy, own) for branch in eqn.params["branches"]])
        case "shard_map":
            return _survey_shard_map(eqn, policy, own)
    if is_recomputation(eqn):
        return {}
    return survey(callee_of(eqn).jaxpr, policy, own)


def is_recomputation(eqn: JaxprEqn) -> bool:
    """Whether an equation repeats, for a backward pass, what a checkpointed call has computed before.

    Its sows have been reaped where they were first computed; what is planted there is planted here too.
    """
    return eqn.primitive.name in CHECKPOINTS and bool(eqn.params.get("differentiated"))


def _survey_shard_map(eqn: JaxprEqn, policy: Policy, place: Place) -> dict[Key, Sown]:
    found = survey(eqn.params["jaxpr"], policy, place)
    for key, sown in found.items():
        if sown.varies or not eqn.params.get("check_vma"):
            raise _refuse(
                f"Detected sow calls inside a shard_map. This is not currently supported: {show_key(key)!r} may differ "
                f"from device to device, and no out_spec says how its parts form one array (sown at {sown.source})",
                expected="a value that all devices share (as after psum, with check_vma=True), or a sow outside.",
                fix="return the value from the shard_map, with an out_spec, and sow it outside.",
            )
    return found


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
            leaving: dict[Key, Sown] = {key.site(i): sown for i in policy.iterations(key, length)}
        else:
            leaving = {key: _leave_scan(key, sown, length)}
        for site in leaving.keys() & outside.keys():
            raise _refuse(
                f"Variable has already been reaped: {show_key(site)} (sown at {outside[site].source}, and again at "
                f"{sown.source})",
                expected="one sow per layer and name.",
                fix="give loop_layer a stride and offset that keep the layers apart, or the second sow another name.",
            )
        outside.update(leaving)
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


def survey_while(eqn: JaxprEqn, policy: Policy, place: Place) -> dict[Key, Sown]:
    """What a while loop sows.

    Args:
        eqn: The loop.
        policy: Which sows count.
        place: The loop's own place.

    Returns:
        The last value of each sow in its body, by key.
    """
    condition = survey(eqn.params["cond_jaxpr"].jaxpr, policy, place.in_loop())
    if condition:
        sows = ", ".join(f"{show_key(key)!r} (sown at {sown.source})" for key, sown in condition.items())
        raise _refuse(
            f"The condition of a `while_loop` sows {sows}",
            expected="sows in the body only.",
            fix="compute the value in the body and carry it to the condition.",
        )
    body = survey(eqn.params["body_jaxpr"].jaxpr, policy, place.in_loop())
    examples = eqn.params["cond_jaxpr"].out_avals[0].shape
    return {key: _leave_while(key, sown, examples, place) for key, sown in body.items()}


def _leave_while(key: Key, sown: Sown, examples: tuple[int, ...], place: Place) -> Sown:
    """A sow of a while loop's body as seen from outside; `examples` is the shape of the loop's predicate."""
    if isinstance(key, LoopSite) and key.n_loops == place.n_loops + 1:
        raise _refuse(
            f"{show_key(key)!r} is read, whose layer is the index of a `while_loop` (sown at {sown.source})",
            expected="a scan over layers: how often a while loop runs is not known beforehand.",
            fix="use lax.scan, or lax.fori_loop with bounds that are Python integers.",
        )
    if sown.mode in ("strict", "append"):
        raise _refuse(
            f"Must use clobber or cond_clobber mode for {show_key(key)!r} inside of a `while_loop`. (sown at "
            f"{sown.source} with mode {sown.mode})",
            expected="clobber or cond_clobber: how often the loop runs is not known beforehand.",
            fix="sow with mode='clobber', or use lax.scan.",
        )
    if 0 < sown.n_batched < len(examples):
        raise _refuse(
            f"{show_key(key)!r} lies in a `while_loop` that ends at different times for the examples of several vmaps, "
            f"of which only some give it an axis (sown at {sown.source})",
            expected="the harvest inside the vmaps.",
            fix="use vmap(reap(f)) in place of reap(vmap(f)).",
        )
    when = sown.when
    if when is not None and sown.n_batched:
        when = tuple(np.broadcast_shapes(when, examples + when[len(examples) :]))
    return replace(sown, when=when)


def survey_branches(branches: Sequence[dict[Key, Sown]]) -> dict[Key, Sown]:
    """What a cond or switch sows: what each of its branches sows, which must agree.

    Args:
        branches: What each branch sows.

    Returns:
        What they all sow.
    """
    first = dict(branches[0])
    for other in branches[1:]:
        sources = ", ".join(sown.source for branch in (first, other) for sown in branch.values())
        if len(other) != len(first):
            lonely = ", ".join(repr(show_key(key)) for key in first.keys() ^ other.keys())
            raise _refuse(
                f"Mismatching number of `sow`s between branches: {lonely} in some only (sown at {sources})",
                expected="the same names in every branch of a cond or switch.",
                fix="sow a placeholder of the same form in the other branches, or leave the name out with blocklist=.",
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
            _check_branches(key, sown, other[key])
            when = None if sown.when is None else np.broadcast_shapes(sown.when, other[key].when or ())
            first[key] = replace(sown, when=when, varies=sown.varies or other[key].varies)
    return first


def _check_branches(key: Key, one: Sown, other: Sown) -> None:
    sources = f"(sown at {one.source} and {other.source})"
    if other.form != one.form:
        raise _refuse(
            f"Mismatched shape between branches: {show_key(key)!r}. ({one.form} and {other.form}) {sources}",
            expected="one structure, shape and dtype for a name in every branch.",
            fix="give the values of all branches one form.",
        )
    if other.mode != one.mode:
        raise _refuse(
            f"Mismatched mode between branches: {show_key(key)!r} ({one.mode} and {other.mode}) {sources}",
            expected="one mode for a name in every branch.",
            fix="sow with the same mode in every branch.",
        )


def _refuse(what: str, *, expected: str, fix: str) -> InvalidInputError:
    return InvalidInputError(four_part(what.removesuffix("."), expected=expected, fix=fix))
