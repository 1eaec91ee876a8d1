"""Prompt pairs and models of the circuit tests."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(scope="package")
def pair():
    """Two aligned pairs that differ from position 1 on, or at one position only."""
    clean = np.array([[3, 7, 1, 4, 2], [5, 0, 6, 8, 9]], np.int32)
    corrupted = np.array([[3, 2, 1, 9, 2], [5, 4, 6, 8, 9]], np.int32)
    return clean, corrupted
