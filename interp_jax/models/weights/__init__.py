"""Files of weights, whatever their format, as one noun: a `Checkpoint`.

A format (`gguf`, `safetensors`) turns files into a `Checkpoint`; an upstream family (a module in `patches/`) turns a
`Checkpoint` into a `LanguageModel`. Neither knows the other: between them stand the keys of a Hugging Face
`config.json` and the Hugging Face names of the tensors.

Source: interp_jax.
"""
