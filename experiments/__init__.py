"""Experiments: one file per question, run by path with `interp-jax run experiments/<question>.py`.

A file holds a docstring (question; expected; found), a frozen `Config`, a `SMOKE` configuration that takes seconds on
a CPU, `run(config) -> Result` and `plot(result)`. Two experiments never import each other.

Source: interp_jax.
"""
