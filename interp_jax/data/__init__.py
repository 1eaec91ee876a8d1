"""Data: text to prompts. What a method is tried on, made from a seed for the tokenizer at hand.

Reading order: alignment (what a pair of prompts must be), prompts (families of them), words (what they are made of).

Source: interp_jax.
"""
