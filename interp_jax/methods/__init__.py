"""Methods: a model and tokens to a result. Leaves: no method imports another.

Reading order: logit_lens, direct_logit_attribution, layer_effects; node_diagnostics, node_search, cost_recall;
`circuits`, the edges between nodes; `sae` and `pursuit`, then sparsity_sweep and encoder_agreement, which compare them.

Source: interp_jax.
"""
