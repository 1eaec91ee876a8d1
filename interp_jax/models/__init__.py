"""Models: upstream's own code under a patch set, its weights and its tokenizer behind one contract.

Reading order: `weights.checkpoint` (files as one noun), `weights.gguf`, `weights.safetensors`, `tokenizers`,
`language_model` (the contract), `loading` (`load`).

Source: interp_jax.
"""
