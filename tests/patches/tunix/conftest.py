"""Tests of Tunix's models run where Tunix is: in an environment of their own, which `make test-tunix` sets up.

Source: interp_jax.
"""

from __future__ import annotations

import importlib.util

# `make test-all` runs them; without Tunix there is nothing here to collect.
collect_ignore_glob = [] if importlib.util.find_spec("tunix") else ["test_*.py"]
