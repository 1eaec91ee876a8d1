"""Forward: many forward passes at once. Interventions or texts go in, numbers or rows of activations come out.

Reading order: metrics, sweeps; for activations of texts site_values, batch_streams, store, activation_files, shards;
sparse_coder and splicing, for dictionaries in a pass, and spliced_losses, for what they cost.

Source: interp_jax.
"""
