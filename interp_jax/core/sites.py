"""Sites: the named places of a forward pass, and the selectors that pick them.

A `Site` is a layer (None outside the layers) and a name. A selector is any of: a Site, a string with globs
("mlp_out", "5.mlp_out", "*.resid_post", "blocks.5.hook_resid_pre"), a layer number, a `range` of layers, a
predicate on Sites, None (everything), or a collection of these (their union).

>>> sites = [Site(None, "embed"), Site(0, "mlp_out"), Site(1, "mlp_out"), Site(1, "resid_post")]
>>> [str(site) for site in select_sites("mlp_out", sites)]
['0.mlp_out', '1.mlp_out']
>>> [str(site) for site in select_sites(["blocks.1.hook_resid_post", "embed"], sites)]
['embed', '1.resid_post']

Sharp edges: a name without a layer means that name in every layer and outside the layers. A plain tuple
(5, "mlp_out") is that Site, not a union. Order is always that of the forward pass, never that of the selector. A part
of a selector that matches nothing is an error.

Source: the vocabulary of this project's design page; TransformerLens for the names it calls hooks.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import NamedTuple, TypeAlias

from interp_jax.core.errors import UnknownNameError, four_part


class Site(NamedTuple):
    """A place in a forward pass where a value can be read or replaced.

    Args:
        layer: Index of the layer, or None for a site outside the layers.
        name: Name of the site, for example "mlp_out".
    """

    layer: int | None
    name: str

    def __str__(self) -> str:
        return self.name if self.layer is None else f"{self.layer}.{self.name}"


Selector: TypeAlias = "Site | str | int | range | Callable[[Site], bool] | Iterable[Selector] | None"

# TransformerLens's names without `hook_`, where they differ from ours (the rest are equal once stripped).
_TRANSFORMER_LENS = {
    "ln1.normalized": "ln1",
    "ln2.normalized": "ln2",
    "ln_final.normalized": "ln_final",
    "mlp.post": "mlp_post",
}
_TRANSFORMER_LENS_PLAIN_MLP = {"mlp.pre": "mlp_pre"}
_TRANSFORMER_LENS_GATED_MLP = {"mlp.pre": "mlp_gate", "mlp.pre_linear": "mlp_pre"}


def _from_transformer_lens(selector: str, *, is_gated: bool) -> str | None:
    """Our glob for a TransformerLens name ("blocks.5.attn.hook_q" -> "5.q"), or None if it is not one."""
    block = re.fullmatch(r"blocks\.(\d+|\*)\.(.+)", selector)
    rest = block.group(2) if block else selector
    if not block and "hook_" not in selector:
        return None
    short = re.sub(r"^attn\.", "", rest.replace("hook_", ""))
    mlp = _TRANSFORMER_LENS_GATED_MLP if is_gated else _TRANSFORMER_LENS_PLAIN_MLP
    name = _TRANSFORMER_LENS.get(short) or mlp.get(short) or short
    return f"{block.group(1)}.{name}" if block else name


def matcher(selector: Selector, *, is_gated: bool = False) -> Callable[[Site], bool]:
    """The predicate on sites that one non-collection selector stands for.

    Args:
        selector: A Site, string, layer number, range of layers, predicate, or None for every site.
        is_gated: Whether the model's MLP is gated, which decides what TransformerLens's `mlp.hook_pre` means.

    Returns:
        A function from Site to bool.

    Raises:
        UnknownNameError: The selector is of no known kind.
    """
    if selector is None:
        return lambda site: True
    if isinstance(selector, Site):
        return lambda site: site == selector
    if isinstance(selector, str):
        glob = _from_transformer_lens(selector, is_gated=is_gated) or selector

        def matches(site: Site) -> bool:
            # A pattern without a layer part ("mlp_out") is compared with the bare name, else with "5.mlp_out".
            return fnmatch.fnmatchcase(str(site), glob) or fnmatch.fnmatchcase(site.name, glob)

        return matches
    if isinstance(selector, Integral) and not isinstance(selector, bool):
        return lambda site: site.layer == selector
    if isinstance(selector, range):
        return lambda site: site.layer is not None and site.layer in selector
    if callable(selector):
        return selector
    raise UnknownNameError(
        four_part(
            f"{selector!r} ({type(selector).__name__}) was given as a site selector",
            expected='a Site, a string ("mlp_out", "5.mlp_out", "*.resid_post", "blocks.5.hook_mlp_out"), a layer '
            "number, a range of layers, a predicate on Sites, None for all, or a collection of these.",
            fix="write the selector in one of these forms.",
        )
    )


def selector_parts(selector: Selector) -> list[Selector]:
    """The non-collection selectors of which `selector` is the union.

    A plain tuple (layer, name) is a Site, which is that tuple with names, and not the union of its halves.
    """
    if isinstance(selector, Site) or not isinstance(selector, Iterable) or isinstance(selector, (str, range)):
        return [selector]
    if isinstance(selector, tuple):
        match selector:
            case (None | Integral() as layer, str(name)) if not isinstance(layer, bool):
                return [Site(None if layer is None else int(layer), name)]
    return [part for inner in selector for part in selector_parts(inner)]


def select_sites(
    selector: Selector, sites: Sequence[Site], *, where: str = "select_sites", empty_ok: bool = False
) -> list[Site]:
    """The sites a selector picks, in the order they are given in.

    Args:
        selector: What to pick; see the module's docstring.
        sites: The sites there are, in execution order.
        where: Name of the public call, for the error message.
        empty_ok: Whether a part that matches nothing is allowed.

    Returns:
        The picked sites, in the order of `sites`, each once.

    Raises:
        UnknownNameError: A part of the selector matches no site.
    """
    is_gated = any(site.name == "mlp_gate" for site in sites)
    parts = selector_parts(selector)
    matchers = [matcher(part, is_gated=is_gated) for part in parts]
    if not empty_ok:
        unmatched = [part for part, match in zip(parts, matchers, strict=True) if not any(map(match, sites))]
        # Asking for everything of a program without sites is no mistake.
        unmatched = [part for part in unmatched if part is not None]
        if unmatched:
            raise UnknownNameError(unknown_site_message(unmatched, sites, where=where))
    return [site for site in dict.fromkeys(sites) if any(match(site) for match in matchers)]


def unknown_site_message(unmatched: Sequence[Selector], sites: Sequence[Site], *, where: str) -> str:
    """The error text for selectors that match no site.

    Args:
        unmatched: The non-collection selectors that match nothing.
        sites: The sites there are.
        where: Name of the public call.

    Returns:
        The message: all offenders, the nearest name, the names and layers there are.
    """
    names = list(dict.fromkeys(site.name for site in sites))
    layers = [site.layer for site in sites if site.layer is not None]
    misspelt = [name for name in map(_name_in, unmatched) if name and name not in names]
    fix = "use one of these names, or add a tag to the model's patch set."
    if "resid_mid" in misspelt and {"attn_out", "mlp_out", "resid_post"} <= set(names):
        # A name of the vocabulary that a model can lack for a reason, not for want of a tag.
        misspelt.remove("resid_mid")
        fix = (
            "where attention and MLP run in parallel, both read resid_pre and there is no resid_mid: use resid_pre, "
            "attn_out or mlp_out. Where they do not, " + fix
        )
    return four_part(
        f"Unknown site{'s' * (len(unmatched) > 1)} {', '.join(map(_in_words, unmatched))}",
        where=where,
        names=names,
        given=misspelt[0] if misspelt else None,
        note=f"layers {min(layers)} to {max(layers)}" if layers else None,
        fix=fix,
    )


def _name_in(selector: Selector) -> str | None:
    """The name a selector asks for, without its layer ("mlp_out" in "5.mlp_out"), or None if it asks for none."""
    if isinstance(selector, Site):
        return selector.name
    if isinstance(selector, str):
        return (_from_transformer_lens(selector, is_gated=False) or selector).rpartition(".")[2]
    return None


def _in_words(selector: Selector) -> str:
    if isinstance(selector, Site):
        return repr(str(selector))
    if callable(selector):
        return f"(predicate {getattr(selector, '__name__', type(selector).__name__)})"
    return repr(selector)
