"""Data: text to prompts and token streams. What a method is tried on, made for the tokenizer at hand.

Reading order: alignment (what a pair of prompts must be), prompts (families of them), words (what they are made of);
documents (texts from anywhere), tokenising, text_streams (packed sequences of tokens).

Source: interp_jax.
"""
