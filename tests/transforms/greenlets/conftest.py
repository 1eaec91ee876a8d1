"""A clean slate for every file: other tests of this process may have left generators suspended.

Source: interp_jax.
"""

from __future__ import annotations

import gc

import pytest

from interp_jax.transforms.greenlets.scopes import current_scope


@pytest.fixture(scope="module", autouse=True)
def _nothing_suspended_yet() -> None:
    """Closes what was left: bodies that refer to themselves, or passes that a kept traceback refers to."""
    gc.collect()
    current_scope().close_live()
