"""The running pass: a plain `for` loop over the sites of a forward pass.

Reading order: running_pass (the loop), tracing (function to jaxpr), plan (jaxpr to pieces), programs (pieces to
compiled functions), compiled and scans (running them), python_engine.

Source: interp_jax.
"""

from interp_jax.transforms.running_pass.running_pass import RunningPass, list_sites, run

__all__ = ["RunningPass", "list_sites", "run"]
