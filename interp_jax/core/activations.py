"""Activations: values read from sites, in the order of the forward pass; and the table of the sites there are.

>>> import numpy as np
>>> activations = Activations({Site(0, "mlp_out"): np.zeros((1, 4, 8)), Site(1, "mlp_out"): np.ones((1, 4, 8))})
>>> activations["1.mlp_out"].sum(), list(activations.select("mlp_out")) == list(activations)
(np.float64(32.0), True)

Sharp edges: indexing takes one site; `select` takes any selector and returns Activations; `stack` puts the layers
of one name on a new first axis.

Source: interp_jax.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from interp_jax.core.errors import ShapeError, UnknownNameError, four_part
from interp_jax.core.sites import Selector, Site, select_sites


class Activations(Mapping[Site, Any]):
    """Values by site, in the order of the forward pass. A pytree.

    Args:
        values: The value of each site.
    """

    def __init__(self, values: Mapping[Site, Any]):
        self._values = dict(values)

    def __getitem__(self, site: Site | str) -> Any:
        if isinstance(site, Site) and site in self._values:
            return self._values[site]
        picked = select_sites(site, list(self._values), where="Activations")
        if len(picked) > 1:
            raise UnknownNameError(
                four_part(
                    f"{str(site)!r} is {len(picked)} sites ({picked[0]} to {picked[-1]})",
                    where="Activations[...]",
                    expected='one site, such as "5.mlp_out".',
                    fix="name the layer, or use .select(...) for several or .stack(...) for one array over layers.",
                )
            )
        return self._values[picked[0]]

    def __contains__(self, site: object) -> bool:
        if isinstance(site, str):
            try:
                return bool(select_sites(site, list(self._values), where="Activations"))
            except UnknownNameError:
                return False
        return site in self._values

    def __iter__(self) -> Iterator[Site]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def select(self, selector: Selector) -> Activations:
        """The part of these activations a selector picks."""
        picked = select_sites(selector, list(self._values), where="Activations.select")
        return Activations({site: self._values[site] for site in picked})

    def stack(self, name: str) -> jax.Array:
        """All values of one name as one array with the layer as its first axis.

        Args:
            name: Name of the sites.

        Returns:
            An array [layer, ...].

        Raises:
            ShapeError: The values have different shapes.
        """
        values = [value for site, value in self.select(name).items() if site.layer is not None]
        shapes = {jnp.shape(value) for value in values}
        if len(shapes) != 1:
            raise ShapeError(
                four_part(
                    f"Values of {name!r} have shapes {sorted(shapes)}",
                    where="Activations.stack",
                    expected="one shape for all layers.",
                    fix="stack one name whose values agree in shape, or use .select(...).",
                )
            )
        return jnp.stack(values)

    def __repr__(self) -> str:
        return repr(SiteTable([SiteRow(site, value) for site, value in self.items()], title="Activations"))

    def _repr_html_(self) -> str:
        return SiteTable([SiteRow(site, value) for site, value in self.items()], title="Activations")._repr_html_()


jax.tree_util.register_pytree_node(
    Activations,
    lambda activations: (list(activations._values.values()), tuple(activations._values)),
    lambda sites, values: Activations(dict(zip(sites, values, strict=True))),
)


class SiteRow(NamedTuple):
    """A site, the value it holds (an array or `jax.ShapeDtypeStruct`, or a pytree of them), and its line of source."""

    site: Site
    value: Any
    source: str = ""


class SiteTable(Sequence[SiteRow]):
    """The sites of a program; prints as a table of names, layers, shapes, dtypes and bytes.

    Args:
        rows: The sites in execution order.
        title: First word of the printed table.
    """

    def __init__(self, rows: Sequence[SiteRow], *, title: str = "Sites"):
        self.rows = list(rows)
        self._title = title

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sites(self) -> list[Site]:
        """The sites alone."""
        return [row.site for row in self.rows]

    @property
    def n_bytes(self) -> int:
        """Bytes all values would take together."""
        return sum(_n_bytes(row.value) for row in self.rows)

    def _groups(self) -> list[tuple[str, str, str, str, str]]:
        """One line per name and form: name, layers, shape, dtype, bytes."""
        groups: dict[tuple[str, bool, str, str], list[SiteRow]] = {}
        for row in self.rows:
            shape, dtype = _form(row.value)
            groups.setdefault((row.site.name, row.site.layer is None, shape, dtype), []).append(row)
        return [
            (name, "-" if outside else _spans([row.site.layer for row in rows]), shape, dtype, _human(rows))
            for (name, outside, shape, dtype), rows in groups.items()
        ]

    def _title_line(self) -> str:
        return f"{self._title}: {len(self.rows)} values, {_human(self.rows)}"

    def __repr__(self) -> str:
        lines = [("name", "layers", "shape", "dtype", "bytes"), *self._groups()]
        widths = [max(len(line[column]) for line in lines) for column in range(5)]
        rows = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([self._title_line(), *("  " + row for row in rows)])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{cell}</th>" for cell in ("name", "layers", "shape", "dtype", "bytes"))
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in self._groups()
        )
        return f"<table><caption>{html.escape(self._title_line())}</caption><tr>{head}</tr>{body}</table>"


def _spans(layers: Sequence[int | None]) -> str:
    """Layers in short: "0-29", or "0-4, 7"."""
    numbers = sorted({layer for layer in layers if layer is not None})
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _form(value: Any) -> tuple[str, str]:
    leaves = jax.tree.leaves(value)
    shapes = ", ".join("[" + ", ".join(map(str, leaf.shape)) + "]" for leaf in leaves)
    return shapes, ", ".join(dict.fromkeys(str(leaf.dtype) for leaf in leaves))


def _n_bytes(value: Any) -> int:
    return sum(math.prod(leaf.shape) * _itemsize(leaf.dtype) for leaf in jax.tree.leaves(value))


def _itemsize(dtype: Any) -> int:
    return getattr(dtype, "itemsize", 0)


def _human(rows: Sequence[SiteRow]) -> str:
    size = float(sum(_n_bytes(row.value) for row in rows))
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
