"""Forward: many forward passes at once. Interventions or texts go in, numbers or rows of activations come out.

Reading order: metrics, sweeps; for activations of texts site_values, batch_streams, store, activation_files, shards.

Source: interp_jax.
"""
