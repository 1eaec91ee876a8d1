"""Passes that read or change a few sites, cut where layers begin.

A running pass compiles one program per distinct piece between two stops. Stopping at the asked-for sites alone would
leave two long pieces whose length depends on the layer, to be compiled afresh for every layer. With a further stop
at the first site of each layer all pieces are at most a layer long and the same for all layers: the first pass
compiles a layer instead of a model, and moving to another layer compiles nothing.

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

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from interp_jax.core.sites import Selector, Site, select_sites
from interp_jax.transforms import running_pass


def layer_borders(sites: Sequence[Site]) -> set[Site]:
    """The first site of each layer, in execution order."""
    first: dict[int | None, Site] = {}
    for site in sites:
        first.setdefault(site.layer, site)
    return {site for layer, site in first.items() if layer is not None}


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
    sites = running_pass.list_sites(fn, *args).sites
    wanted = set(select_sites(select, sites, where=where))
    values: dict[Site, Any] = {}
    with _stopping_at(fn, args, wanted | layer_borders(sites)) as steps:
        for layer, name, value in steps:
            if (site := Site(layer, name)) in wanted:
                values[site] = value
                if len(values) == len(wanted):
                    break
    return values


def edit(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    edits: Mapping[Site, Callable[[Any], Any]],
    *,
    borders: Collection[Site] | None = None,
) -> Any:
    """The result when the values of sites are put through functions.

    Args:
        fn: A function with sites.
        args: Its arguments.
        edits: Site to the function of its value.
        borders: The first site of each layer, if known; finding them takes as long as looking a trace up.

    Returns:
        What `fn` returns.

    Raises:
        ShapeError: A new value does not have the form of the old one.
    """
    if borders is None:
        borders = layer_borders(running_pass.list_sites(fn, *args).sites)
    with _stopping_at(fn, args, {*edits, *borders}) as steps:
        for layer, name, value in steps:
            if (site := Site(layer, name)) in edits:
                steps.modified_value = edits[site](value)
    return steps.retval


def _stopping_at(fn: Callable[..., Any], args: tuple[Any, ...], stops: Collection[Site]) -> running_pass.RunningPass:
    # A predicate, for a collection would be matched site by site.
    return running_pass.run(fn, *args, sites=(lambda site: site in stops) if stops else ())
