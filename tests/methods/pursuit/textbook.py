"""Pursuits as the textbooks write them: one signal at a time, dense, in float64 NumPy.

Source: Mallat & Zhang 1993; Pati et al. 1993; Blumensath & Davies 2008.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls


def codes_after_each_step(
    name: str, x: np.ndarray, dictionary: np.ndarray, k: int, *, is_nonneg: bool, guard: bool = False
) -> np.ndarray:
    """The coefficients of unit atoms after 0, 1, ... k steps, `[k + 1, n_atoms]`."""
    update = {
        "matching_pursuit": _matching,
        "orthogonal_matching_pursuit": _orthogonal,
        "gradient_pursuit": _gradient,
        "conjugate_gradient_pursuit": _gradient,
    }[name]
    memory: dict = {"chosen": [], "conjugate": name.startswith("conjugate"), "guard": guard}
    w, noise = np.zeros(len(dictionary)), 16 * np.finfo(float).eps * np.linalg.norm(x)
    codes = [w]
    for _ in range(k):
        products = dictionary @ (x - w @ dictionary)
        sizes = products if is_nonneg else np.abs(products)
        j = int(np.argmax(sizes))
        found = update(x, dictionary, w, products, j, is_nonneg, memory) if sizes[j] > noise else None
        if found is None:
            return np.stack(codes + [w] * (k + 1 - len(codes)))
        w = found
        codes.append(w)
    return np.stack(codes)


def _matching(x, dictionary, w, products, j, is_nonneg, memory):
    w = w.copy()
    w[j] += products[j]
    return w


def _orthogonal(x, dictionary, w, products, j, is_nonneg, memory):
    if j in memory["chosen"]:
        return None
    memory["chosen"].append(j)
    atoms = dictionary[memory["chosen"]].T
    w = np.zeros(len(dictionary))
    w[memory["chosen"]] = nnls(atoms, x)[0] if is_nonneg else np.linalg.lstsq(atoms, x, rcond=None)[0]
    return w


def _gradient(x, dictionary, w, products, j, is_nonneg, memory):
    memory["chosen"].append(j)
    moves = w > 0 if is_nonneg else np.isin(np.arange(len(w)), memory["chosen"])
    moves[j] = True
    direction = np.where(moves, products, 0)
    change = direction @ dictionary
    if memory["conjugate"] and memory.get("previous") is not None:
        before, change_before = memory["previous"]
        share = -(change @ change_before) / (change_before @ change_before)
        direction = direction + share * before
        change = direction @ dictionary
    residual = x - w @ dictionary
    there = w + (change @ residual) / (change @ change) * direction
    is_cut = is_nonneg and (there < 0).any()
    if is_cut:
        there = np.maximum(there, 0)
        if memory["guard"] and np.linalg.norm(x - there @ dictionary) >= np.linalg.norm(residual):
            return None
    memory["previous"] = None if is_cut else (direction, change)
    return there
