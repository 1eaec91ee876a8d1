"""Run on eight devices: atoms cut over all of them, and over four with the signals over two, change nothing.

Source: interp_jax.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from interp_jax.methods.pursuit import PURSUITS, pursue


def main() -> None:
    """Raise unless all agree; print how many devices did."""
    rng = np.random.default_rng(0)
    signals, dictionary = rng.normal(size=(8, 10)).astype("f"), rng.normal(size=(64, 10)).astype("f")
    layouts = [((8,), PartitionSpec("x"), PartitionSpec()), ((2, 4), PartitionSpec("y"), PartitionSpec("x"))]
    layouts.append(((2, 4), PartitionSpec(("x", "y")), PartitionSpec()))
    modes = [cls(is_nonneg=is_nonneg) for cls in PURSUITS for is_nonneg in (True, False)]
    for shape, of_atoms, of_signals in layouts:
        mesh = jax.make_mesh(shape, ("x", "y")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))
        atoms = jax.device_put(dictionary, NamedSharding(mesh, of_atoms))
        x = jax.device_put(signals, NamedSharding(mesh, of_signals))
        for pursuit in modes if of_atoms == layouts[0][1] else modes[:2]:
            whole = pursue(pursuit, signals, dictionary, 6, prefixes=(2, 4))
            cut = pursue(pursuit, x, atoms, 6, prefixes=(2, 4))
            assert (np.asarray(cut.indices) == np.asarray(whole.indices)).all()
            for left, right in zip(jax.tree.leaves(cut), jax.tree.leaves(whole), strict=True):
                np.testing.assert_allclose(left, right, atol=1e-5)
    print(jax.device_count(), "devices agree")


if __name__ == "__main__":
    main()
