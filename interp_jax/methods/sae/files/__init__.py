"""Files of SAEs: our own, written and read, and those of other libraries.

Source: interp_jax; the sources of each format.
"""

from interp_jax.methods.sae.files.loading import FORMATS, load_sae
from interp_jax.methods.sae.files.own import save_sae
from interp_jax.methods.sae.files.saelens_export import export_saelens

__all__ = ["FORMATS", "export_saelens", "load_sae", "save_sae"]
