"""Patch sets: one module per upstream model family.

A family's module holds `PATCH_SET` (its tags and mends), `HANDLED_KEYS` and `IGNORABLE_KEYS` (of its configuration)
and `from_checkpoint`. Modules without a `PATCH_SET` hold what several families share.

Reading order: transformers_gpt2, transformers_llama, transformers_mistral, then what they use: flax_attention,
transformers_flax and transformers_stacked; penzai_gpt_neox with penzai_layers; tunix_llama3, tunix_qwen3 and
tunix_gemma3 with tunix_nnx.

Source: interp_jax.
"""
