"""Names of places in a model as SAE files give them, and our sites.

SAELens names a TransformerLens hook (`blocks.5.hook_resid_post`), sparsify a module of the Hugging Face model
(`layers.5.mlp`), whose output the SAE reads, or whose input and output a transcoder reads and writes.

>>> site_of_hook("blocks.5.attn.hook_z"), hook_of_site(Site(5, "resid_post"))
(Site(layer=5, name='z'), 'blocks.5.hook_resid_post')
>>> sites_of_module("layers.5.mlp", is_transcoder=True)
(Site(layer=5, name='ln2'), Site(layer=5, name='mlp_out'))

Sharp edges: `hook_z` of an SAE file means the heads side by side, [..., head * d_head]. `mlp.hook_pre` is another site
in a gated MLP than in a plain one; without the model it is none.

Source: TransformerLens and transformers for the names.
"""

from __future__ import annotations

import re

from interp_jax.core.sites import Site

# TransformerLens's names inside a block.
_IN_BLOCK = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_q": "q",
    "attn.hook_k": "k",
    "attn.hook_v": "v",
    "attn.hook_z": "z",
    "attn.hook_rot_q": "rot_q",
    "attn.hook_rot_k": "rot_k",
    "attn.hook_pattern": "pattern",
    "mlp.hook_post": "mlp_post",
    "ln1.hook_normalized": "ln1",
    "ln2.hook_normalized": "ln2",
}
_OUTSIDE = {"hook_embed": "embed", "hook_pos_embed": "pos_embed", "ln_final.hook_normalized": "ln_final"}

# What the modules of a layer of transformers' models read and write.
_MODULES = {
    "": ("resid_pre", "resid_post"),
    "mlp": ("ln2", "mlp_out"),
    "attn": ("ln1", "attn_out"),
    "self_attn": ("ln1", "attn_out"),
    "attention": ("ln1", "attn_out"),
}
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in")
# There the modules' outputs pass another norm before they are added: they are not `mlp_out` and `attn_out`.
_POST_NORM = re.compile(r"gemma-?[23]", re.IGNORECASE)


def site_of_hook(hook: str | None) -> Site | None:
    """The site that TransformerLens's name `hook` stands for, None if there is none or it depends on the model."""
    if not isinstance(hook, str):
        return None
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    if match is None:
        return Site(None, _OUTSIDE[hook]) if hook in _OUTSIDE else None
    name = _IN_BLOCK.get(match.group(2))
    return None if name is None else Site(int(match.group(1)), name)


def hook_of_site(site: Site | None) -> str | None:
    """TransformerLens's name of a `site`, None if it has none that holds for every model."""
    if site is None:
        return None
    names = _OUTSIDE if site.layer is None else _IN_BLOCK
    hook = next((hook for hook, name in names.items() if name == site.name), None)
    return hook if hook is None or site.layer is None else f"blocks.{site.layer}.{hook}"


def sites_of_module(module: str, *, is_transcoder: bool, model: str | None = None) -> tuple[Site | None, Site | None]:
    """What an SAE on a module of a Hugging Face model reads and writes.

    Args:
        module: The module's path, such as "layers.5.mlp" or "transformer.h.5".
        is_transcoder: Whether it reads the module's input, not its output.
        model: The model's name, if known.

    Returns:
        The sites, None where they are not clear. The second is None for an autoencoder.
    """
    path = re.sub(r"^(model|transformer|gpt_neox|decoder)\.", "", module.replace("model.decoder.", "model."))
    if path in _EMBEDDINGS and not is_transcoder:
        return Site(None, "embed"), None
    match = re.fullmatch(r"(?:layers|h)\.(\d+)(?:\.(\w+))?", path)
    if match is None or (match.group(2) or "") not in _MODULES:
        return None, None
    if match.group(2) and model is not None and _POST_NORM.search(model):
        return None, None
    before, after = (Site(int(match.group(1)), name) for name in _MODULES[match.group(2) or ""])
    return (before, after) if is_transcoder else (after, None)
