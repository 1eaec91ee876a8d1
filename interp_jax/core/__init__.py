"""Nouns: sites, selectors, interventions, activations, results and errors. Nothing here knows a model.

Reading order: errors, sites, interventions, activations, results.

Source: interp_jax.
"""
