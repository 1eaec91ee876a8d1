"""Patch sets: one module per upstream model family, imported as `interp_jax.patches.<family>`.

A patch set says, as before/after pairs of source text, where upstream's forward pass gets its tags, and which
upstream faults are mended. Importing one patches nothing: installing does.

Source: interp_jax.
"""
