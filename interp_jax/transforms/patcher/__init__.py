"""Patches for code we do not own: matched on syntax trees, written into upstream's text, put into live objects.

Reading order, bottom up: syntax (trees and their text), patterns (the `$` language), match; precedence, fill, render,
splice (text); upstream (files), members (live objects), plan; compiled, slots, signature, class_body, compose
(changes); state (what is in force), importing, patcher, drift, patch_set.

>>> import textwrap
>>> with Patcher(textwrap, shorten=["' '.join($x)", "'+'.join($x)"]):
...     textwrap.shorten("one two three", 99)
'one+two+three'

Source: interp_jax.
"""

from __future__ import annotations

from interp_jax.core.errors import PatchError
from interp_jax.transforms.patcher.drift import Drift, DriftReport
from interp_jax.transforms.patcher.patch_set import PatchSet
from interp_jax.transforms.patcher.patcher import Patcher
from interp_jax.transforms.patcher.patterns import Patch

__all__ = ["Drift", "DriftReport", "Patch", "PatchError", "PatchSet", "Patcher"]
