"""Figures: a method's result to a picture. One file per method; PNG by matplotlib, or one self-contained HTML page.

Reading order: token_text (token strings made visible), page (the HTML frame), then the file of the method.

Source: interp_jax.
"""
