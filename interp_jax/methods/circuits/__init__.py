"""Circuits: which edges between heads and MLPs an answer depends on, found and tested.

Reading order: `graph` (the nodes and edges of a model, and subsets of them), `edge_passes` (upstream's own pass in
which every receiver hears a mixture of its senders' clean and corrupted writes), `edge_attribution` (EAP and EAP-IG:
every edge's effect at once, to first order), `acdc` (edge by edge, exactly), `path_patching` (direct paths from
senders to receivers), `evaluation` (faithfulness of a circuit).

Source: interp_jax; each module names its paper.
"""
