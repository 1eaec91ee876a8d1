"""Random harvests of random programs, and what comes of them: `python -m tests...random_harvests CASES RESULTS`.

A case says what is planted, which names and tags count, and which transform is around the harvest. `perform` carries it
out with a harvest module: ours in this process; run as a program on JAX 0.4.38, that of Oryx 0.2.9.

This module imports nothing of this package but the programs, and runs on JAX 0.4.38 as well.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.transforms.harvest.random_programs import (
    LOOPS,
    OTHER_TAG,
    TAG,
    Block,
    draw,
    evaluate,
    flat,
    jax_form,
    names_under,
    nested,
)

X = (0.3, -0.7, 1.1)


@dataclass(frozen=True)
class Case:
    """A program and how it is harvested; `plants` are lists of numbers by path of names."""

    program: Block
    around: str = "jit"
    plants: dict[str, Any] = dataclasses.field(default_factory=dict)
    allowlist: list[str] | None = None
    blocklist: list[str] = dataclasses.field(default_factory=list)
    exclusive: bool = False

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What is planted, as arrays by path of names."""
        return {path: np.asarray(value, np.float32) for path, value in self.plants.items()}

    def is_wanted(self, path: str) -> bool:
        """Whether the filters let a path of names through."""
        name = path.split("/")[-1]
        return (self.allowlist is None or name in self.allowlist) and name not in self.blocklist


def kinds_in(block: Block) -> set[str]:
    """The kinds of a block and of all blocks inside."""
    return {block.kind}.union(*(kinds_in(one) for blocks in block.inner for one in blocks))


def draw_case(seed: int, *, for_oryx: bool = False, careless: bool = False) -> Case:
    """The case of a seed; the options are those of `draw`."""
    program = draw(seed, for_oryx=for_oryx, careless=careless)
    if careless:
        return Case(program)
    rng = random.Random(~seed)
    sown = evaluate(program, jnp.asarray(X, jnp.float32))[1]
    names = sorted({part for path in sown for part in path.split("/")})
    scopes = {part for path in sown for part in path.split("/")[:-1]}
    allowlist = blocklist = None
    if rng.random() < 0.2:
        # Oryx drops a scope that is not in the list.
        allowlist = sorted(scopes | {name for name in names if rng.random() < 0.6})
    elif rng.random() < 0.2:
        blocklist = sorted({name for name in names if rng.random() < 0.3} - scopes)
    # Planting under a gradient ends it. Oryx does not plant what a loop clobbers, nor through the calls named here.
    apart = names_under(program, "grad").union(*(names_under(program, kind) for kind in (LOOPS if for_oryx else ())))
    chosen = [path for path in sown if path.split("/")[-1] not in apart and rng.random() < 0.4]
    plants = {p: np.round(np.sin(np.arange(sown[p].size) + len(p)), 3).reshape(sown[p].shape).tolist() for p in chosen}
    kinds = kinds_in(program)
    arounds = ["jit", "jit", "eager", "vmap"]
    if not kinds & {"while", "custom_jvp", "custom_vjp"}:
        arounds += ["grad"] * 4
    return Case(program, rng.choice(arounds), plants, allowlist, blocklist or [], rng.random() < 0.3)


def perform(case: Case, harvest: Any) -> dict[str, np.ndarray]:
    """What a case gives with a harvest module.

    Args:
        case: The case.
        harvest: The module.

    Returns:
        By path: the result "out", what is reaped "reaps/<name>", and what another harvest around it finds of the other
        tag "others/<name>". Around a gradient, the derivative of the sum of all these.
    """
    options = {"allowlist": case.allowlist, "blocklist": case.blocklist, "exclusive": case.exclusive}
    inner = harvest.harvest(jax_form(case.program, harvest), tag=TAG, **options)
    both = harvest.call_and_reap(lambda plants, x: inner(plants, x), tag=OTHER_TAG)
    plants, x = jax.tree.map(jnp.asarray, nested(case.arrays)), jnp.asarray(X, jnp.float32)

    def fn(plants: Any, x: Any) -> dict[str, Any]:
        (out, reaps), others = both(plants, x)
        return {"out": out, "reaps": reaps, "others": others}

    def total(plants: Any, x: Any) -> Any:
        return sum(leaf.sum() for leaf in jax.tree.leaves(fn(plants, x)))

    transformed = {
        "eager": fn,
        "jit": jax.jit(fn),
        "vmap": jax.jit(lambda plants, x: jax.vmap(fn, in_axes=(None, 0))(plants, jnp.stack([x, x * np.float32(0.5)]))),
        "grad": jax.jit(lambda plants, x: dict(zip(("plants", "x"), jax.grad(total, (0, 1))(plants, x)))),  # noqa: B905
    }[case.around]
    return {path: np.asarray(value) for path, value in flat(transformed(plants, x)).items()}


def truth(case: Case) -> dict[str, np.ndarray]:
    """What a case must give, but for gradients, by evaluation in plain Python."""
    plants = {path: value for path, value in case.arrays.items() if case.is_wanted(path)}

    def at(x: np.ndarray) -> dict[str, np.ndarray]:
        out, reaps = evaluate(case.program, jnp.asarray(x), plants)
        others = {} if case.exclusive else evaluate(case.program, jnp.asarray(x), plants, OTHER_TAG)[1]
        wanted = {name: value for name, value in reaps.items() if case.is_wanted(name)}
        return {
            "out": out,
            **{f"reaps/{name}": value for name, value in wanted.items()},
            **{f"others/{name}": value for name, value in others.items()},
        }

    x = np.asarray(X, np.float32)
    if case.around != "vmap":
        return at(x)
    first, second = at(x), at(x * np.float32(0.5))
    return {path: np.stack([first[path], second[path]]) for path in first}


# --- the process in which Oryx runs ---------------------------------------------------------------------------------


def to_json(cases: list[Case]) -> str:
    """Cases as text."""
    return json.dumps([dataclasses.asdict(case) for case in cases])


def from_json(text: str) -> list[Case]:
    """Cases from text."""
    return [Case(**{**case, "program": _block(case["program"])}) for case in json.loads(text)]


def _block(fields: dict[str, Any]) -> Block:
    inner = tuple(tuple(map(_block, blocks)) for blocks in fields["inner"])
    return Block(**{**fields, "inner": inner})


def outcome(case: Case, harvest: Any) -> dict[str, Any]:
    """What a case gives, or its error, as lists and text."""
    try:
        return {path: [value.shape, value.ravel().tolist()] for path, value in perform(case, harvest).items()}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def _in_a_process_of_its_own(case: Case, harvest: Any) -> str:
    """On JAX 0.4.38 an error inside a harvest spoils every later trace of the process."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with os.fdopen(writer, "w") as file:
            file.write(json.dumps(outcome(case, harvest)))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(child, 0)
    return text


def main() -> None:
    """Carry out the cases of a file with Oryx."""
    from oryx.core.interpreters import harvest  # pyright: ignore[reportMissingImports]

    cases, results = map(Path, sys.argv[1:])
    outcomes = [_in_a_process_of_its_own(case, harvest) for case in from_json(cases.read_text())]
    results.write_text(f"[{','.join(outcomes)}]")


if __name__ == "__main__":
    main()
