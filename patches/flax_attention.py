"""Tags in Flax's attention core, which several transformers families call: `attn_scores` and `pattern`.

The softmax of the Flax models in transformers happens inside `flax.linen.attention`, not in their own files. The
patch sets of those families therefore take this patcher along.

>>> print(TAGS)  # doctest: +ELLIPSIS
Patcher(...flax.linen.attention...)

Sharp edges: `attn_scores` are what the softmax reads: scaled, with the mask's large negative numbers added. With
dropout in training, `pattern` is what it was before dropout.

Source: flax.linen.attention.dot_product_attention_weights.
"""

from __future__ import annotations

from interp_jax.transforms.patcher import Patcher

TAGS = Patcher(
    "flax.linen.attention",
    {
        "dot_product_attention_weights": [
            (
                "jax.nn.softmax(attn_weights.astype(jnp.float32))",
                'jax.nn.softmax(sow(attn_weights, name="attn_scores").astype(jnp.float32))',
            ),
            (
                "jax.nn.softmax(attn_weights).astype(dtype)",
                'jax.nn.softmax(sow(attn_weights, name="attn_scores")).astype(dtype)',
            ),
            (
                """
                if module:
                    module.sow('intermediates', 'attention_weights', attn_weights)
                """,
                """
                attn_weights = sow(attn_weights, name="pattern")
                if module:
                    module.sow('intermediates', 'attention_weights', attn_weights)
                """,
            ),
        ]
    },
)

# What the patches were written against: Flax 0.12.8.
DIGESTS = {
    "flax.linen.attention:dot_product_attention_weights": (
        "b758bd5ffdf999cddfc1ba10a9ced15cb48d375e9e13fa3d69dd315f0fcb9573"
    ),
}
