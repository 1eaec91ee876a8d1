"""What a harvest calls the sows it meets, and which of them it is about.

A key is a path of names for Oryx's functions, a `Site` for ours. The body of a scan over layers is one jaxpr for all
layers, so inside it a site is a `LoopSite`, which becomes one `Site` per iteration outside. A `Place` is what has to be
known of the way from the whole program down to a jaxpr for the keys in it.

>>> LoopSite("mlp_out", LoopLayer(stride=2, offset=1), n_loops=1).site(3)
Site(layer=7, name='mlp_out')

Source: interp_jax.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Hashable
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote, unquote

from jax.extend.core import JaxprEqn

from interp_jax.core.sites import Site
from interp_jax.transforms.jaxprs import Scope, scope_of
from interp_jax.transforms.sowing import LoopLayer

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
        nests = self.nests + _nests_in(eqn.source_info.name_stack)
        return Place(scope_of(eqn, self.scope, self.n_loops), nests, self.n_loops)

    def in_loop(self) -> Place:
        """The place of the body of a loop at this place."""
        return self._replace(n_loops=self.n_loops + 1)


_NEST = re.compile(r"ij\.nest=([^/()]*)\.")


@functools.lru_cache(maxsize=4096)
def _nests_in(name_stack: Any) -> tuple[str, ...]:
    return tuple(map(unquote, _NEST.findall(str(name_stack))))


def nest_label(scope: str) -> str:
    """The name-stack entry of a nest."""
    return f"ij.nest={quote(scope, safe='').replace('.', '%2E')}."


class Dropped(NamedTuple):
    """Which sows a harvest takes out although nothing is read from them: those `of_tag`, and `others`."""

    tag: Hashable
    of_tag: bool
    others: bool

    def __call__(self, eqn: JaxprEqn) -> bool:
        return self.of_tag if eqn.params["tag"] == self.tag else self.others


EVERY = Dropped(None, of_tag=True, others=True)
"""Takes every sow out: for code that also runs elsewhere, where it sows."""


class Policy(Protocol):
    """Which sows a harvest concerns, and what it calls them."""

    def key(self, eqn: JaxprEqn, place: Place) -> Key | None:
        """The key of a sow, or None if this harvest leaves it where it is."""
        ...

    def is_wanted(self, key: Key) -> bool:
        """Whether a sow of this key is harvested; otherwise it is dropped."""
        ...

    @property
    def dropped(self) -> Dropped:
        """Which sows are taken out although nothing is read from them."""
        ...

    def iterations(self, key: LoopSite, length: int) -> list[int]:
        """The iterations of a loop over layers whose site is read."""
        ...

    def reading_nothing(self) -> Policy:
        """The policy that knows the same sows and harvests none of them."""
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

    @property
    def dropped(self) -> Dropped:
        return Dropped(self.tag, of_tag=self.only is None, others=self.exclusive)

    def iterations(self, key: LoopSite, length: int) -> list[int]:
        raise AssertionError("names have no layers")

    def reading_nothing(self) -> Names:
        return self._replace(allowlist=frozenset())


def show_key(key: Any) -> str:
    """A key as users write it: "scope/name", or "5.mlp_out"."""
    return "/".join(map(str, key)) if type(key) is tuple else str(key)
