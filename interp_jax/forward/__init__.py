"""Forward: many forward passes at once. A table of interventions goes in, one value per row comes out.

Reading order: metrics, sweeps.

Source: interp_jax.
"""
