"""Passes that read or change some sites, and need no loop of the user's.

A running pass is cut at every layer's site of the names it stops at (`interp_jax.transforms.running_pass`), so its
programs are the same whichever layer is read or changed: moving to another layer compiles nothing. A pass that has
nothing to stop at is cut where layers begin, and compiles a layer instead of a model.

>>> from interp_jax.transforms.sowing import layer_scope, sow
>>> def model(x):
...     for i in range(3):
...         with layer_scope(i):
...             x = sow(sow(x, name="resid_pre") + 1.0, name="resid_post")
...     return x
>>> {str(site): float(value) for site, value in read(model, (0.0,), "*.resid_post").items()}
{'0.resid_post': 1.0, '1.resid_post': 2.0, '2.resid_post': 3.0}
>>> float(edit(model, (0.0,), {Site(1, "resid_post"): lambda value: value * 10.0}))
21.0

Source: interp_jax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from interp_jax.core.sites import Selector, Site, select_sites
from interp_jax.transforms import running_pass


def read(fn: Callable[..., Any], args: tuple[Any, ...], select: Selector, *, where: str = "read") -> dict[Site, Any]:
    """The values of the selected sites; what comes after the last of them is not computed.

    Args:
        fn: A function with sites.
        args: Its arguments.
        select: Which sites.
        where: Name of the public call, for the error message.

    Returns:
        The values by site, in execution order.

    Raises:
        UnknownNameError: A selector matches no site.
    """
    wanted = select_sites(select, running_pass.list_sites(fn, *args).sites, where=where)
    values: dict[Site, Any] = {}
    with running_pass.run(fn, *args, sites=wanted) as steps:
        for layer, name, value in steps:
            values[Site(layer, name)] = value
            if len(values) == len(wanted):
                break
    return values


def edit(fn: Callable[..., Any], args: tuple[Any, ...], edits: Mapping[Site, Callable[[Any], Any]]) -> Any:
    """The result when the values of sites are put through functions.

    Args:
        fn: A function with sites.
        args: Its arguments.
        edits: Site to the function of its value.

    Returns:
        What `fn` returns.

    Raises:
        UnknownNameError: There is no such site.
        ShapeError: A new value does not have the form of the old one.
    """
    with running_pass.run(fn, *args, sites=list(edits) or _where_layers_begin(fn, args)) as steps:
        for layer, name, value in steps:
            if (site := Site(layer, name)) in edits:
                steps.modified_value = edits[site](value)
    return steps.retval


def _where_layers_begin(fn: Callable[..., Any], args: tuple[Any, ...]) -> list[Site]:
    """The sites of the name that comes first in a layer."""
    sites = running_pass.list_sites(fn, *args).sites
    name = next((site.name for site in sites if site.layer is not None), None)
    return [site for site in sites if site.name == name and site.layer is not None]
