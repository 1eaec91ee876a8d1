"""`LanguageModel`: somebody else's model, with its sites, its weights under canonical names, and its tokenizer.

A frozen record of parameters and pure functions. The model's own code runs under its patch set; nothing here
re-implements a transformer, and no method keeps a result on the object.

    lm = ij.load("smollm2-135m")
    tokens = lm.tokenize("When Mary and John went to the store, John gave a drink to")
    for layer, name, value in (running_pass := lm.run(tokens, sites="mlp_out")):
        if layer == 5:
            running_pass.modified_value = value * 0
    logits = running_pass.retval

Any function with sows in it will do; here a bigram model:

>>> import numpy as np
>>> from interp_jax.transforms.sowing import sow
>>> def forward(params, tokens):
...     return sow(params["W_E"][tokens], name="embed") @ params["W_U"]
>>> params = {"W_E": jnp.eye(3), "W_U": 2 * jnp.eye(3)}
>>> lm = LanguageModel(Upstream("bigram", forward), params, name="bigram")
>>> lm(np.array([[0, 2]])).argmax(-1)
Array([[0, 2]], dtype=int32)
>>> lm.intervene(np.array([[0, 2]]), {"embed": lambda value: value[:, ::-1]}).argmax(-1)
Array([[2, 0]], dtype=int32)

Sharp edges: tokens are always `[batch, pos]`. A negative token (`PAD`) is padding: it is masked, and positions are
counted over the tokens of the row, so there is no separate mask to forget; values at padded positions mean nothing.
Tokens are checked when their values are known, which under `jax.jit` they are not.

Source: interp_jax.
"""

from __future__ import annotations

import html
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.core.activations import Activations, SiteTable
from interp_jax.core.errors import InvalidInputError, ShapeError, UnknownNameError, UnsupportedModelError, four_part
from interp_jax.core.interventions import Intervention, apply_intervention
from interp_jax.core.sites import Selector, Site, select_sites
from interp_jax.models import passes
from interp_jax.models.tokens import check_tokens, is_text
from interp_jax.models.upstream import PAD, ModelConfig, Upstream
from interp_jax.transforms import running_pass
from interp_jax.transforms.compilations import counted_jit

if TYPE_CHECKING:
    from pathlib import Path

    from interp_jax.models.check import CheckReport
    from interp_jax.models.generate import Generation
    from interp_jax.models.tokenizers import Tokenizer

__all__ = ["PAD", "LanguageModel", "ModelConfig", "check_tokens"]


def _weight(name: str, meaning: str) -> Any:
    """A property that computes a canonical weight from the parameters each time it is read."""
    return property(lambda lm: lm.weight(name), doc=meaning)


@dataclass(frozen=True, eq=False, repr=False)
class LanguageModel:
    """A model under its patch set.

    Args:
        upstream: The model's own code as pure functions.
        params: Its parameters, in upstream's own layout.
        config: Its shape; None for a model that is only a function.
        tokenizer: Text to tokens and back, if there is one.
        name: What to call it.
        source: Where the weights came from.
        config_json: The keys of the `config.json` it was loaded with, for export; None if there was none.
    """

    upstream: Upstream
    params: Any
    config: ModelConfig | None = None
    tokenizer: Tokenizer | None = None
    name: str = ""
    source: str = ""
    config_json: Mapping[str, Any] | None = None

    W_E = _weight("W_E", "Token embedding, `[d_vocab, d_model]`.")
    W_pos = _weight("W_pos", "Position embedding, `[n_ctx, d_model]`.")
    W_U = _weight("W_U", "Unembedding, `[d_model, d_vocab]`.")
    W_Q = _weight("W_Q", "Query weights, `[layer, head, d_model, d_head]`.")
    W_K = _weight("W_K", "Key weights, `[layer, kv_head, d_model, d_head]`.")
    W_V = _weight("W_V", "Value weights, `[layer, kv_head, d_model, d_head]`.")
    W_O = _weight("W_O", "Output weights of the heads, `[layer, head, d_head, d_model]`.")
    b_Q = _weight("b_Q", "Query biases, `[layer, head, d_head]`.")
    b_K = _weight("b_K", "Key biases, `[layer, kv_head, d_head]`.")
    b_V = _weight("b_V", "Value biases, `[layer, kv_head, d_head]`.")
    b_O = _weight("b_O", "Output biases of attention, `[layer, d_model]`.")
    W_gate = _weight("W_gate", "What the nonlinearity of a gated MLP reads, `[layer, d_model, d_mlp]`.")
    W_in = _weight("W_in", "The (linear branch of the) MLP's input weights, `[layer, d_model, d_mlp]`.")
    W_out = _weight("W_out", "The MLP's output weights, `[layer, d_mlp, d_model]`.")
    b_in = _weight("b_in", "The MLP's input biases, `[layer, d_mlp]`.")
    b_out = _weight("b_out", "The MLP's output biases, `[layer, d_model]`.")
    ln1_w = _weight("ln1_w", "Gain of the norm before attention, `[layer, d_model]`.")
    ln1_b = _weight("ln1_b", "Bias of the norm before attention, `[layer, d_model]`.")
    ln2_w = _weight("ln2_w", "Gain of the norm before the MLP, `[layer, d_model]`.")
    ln2_b = _weight("ln2_b", "Bias of the norm before the MLP, `[layer, d_model]`.")
    ln_final_w = _weight("ln_final_w", "Gain of the norm before the unembedding, `[d_model]`.")
    ln_final_b = _weight("ln_final_b", "Bias of the norm before the unembedding, `[d_model]`.")

    @property
    def forward(self) -> Callable[[Any, Any], jax.Array]:
        """`(params, tokens) -> logits`: pure, traceable, with the sites in it. The same object at each access."""
        return self.upstream.forward

    def __call__(self, tokens: Any) -> jax.Array:
        """The logits, compiled once per shape of the tokens.

        Args:
            tokens: Token ids, `[batch, pos]`; `PAD` is padding.

        Returns:
            Logits, `[batch, pos, d_vocab]`.

        Raises:
            InvalidInputError: Text, an empty prompt, or ids that are not in the vocabulary.
            ShapeError: Not integers of shape `[batch, pos]`.
        """
        return _compiled(self.upstream)(self.params, self.check_tokens(tokens))

    def run(
        self, tokens: Any, sites: Selector = None, engine: Literal["compiled", "python"] = "compiled"
    ) -> running_pass.RunningPass:
        """A running pass: a loop over the sites of the forward pass.

        Args:
            tokens: Token ids, `[batch, pos]`.
            sites: Which sites to stop at; all by default.
            engine: "compiled" or "python".

        Returns:
            The running pass; its `retval` is the logits.

        Raises:
            UnknownNameError: A selector matches no site.
        """
        return running_pass.run(self.forward, self.params, self.check_tokens(tokens), sites=sites, engine=engine)

    def reap(self, tokens: Any, select: Selector) -> Activations:
        """The values of the selected sites. What comes after the last of them is not computed.

        Args:
            tokens: Token ids, `[batch, pos]`.
            select: Which sites to read.

        Returns:
            The values by site, in execution order.

        Raises:
            UnknownNameError: A selector matches no site.
        """
        tokens = self.check_tokens(tokens)
        return Activations(passes.read(self.forward, (self.params, tokens), select, where=f"{self._label}.reap"))

    def intervene(self, tokens: Any, interventions: Mapping[Any, Intervention]) -> jax.Array:
        """The logits when sites are changed.

        Args:
            tokens: Token ids, `[batch, pos]`.
            interventions: Selector to what is done to the sites it picks: an array, a `Masked`, an `Added`, or a
                function of the value. A site that several selectors pick is changed by each in turn.

        Returns:
            Logits, `[batch, pos, d_vocab]`.

        Raises:
            UnknownNameError: A selector matches no site.
            ShapeError: A new value does not fit its site.
        """
        tokens = self.check_tokens(tokens)
        self._check_table(interventions, "intervene")
        by_site: dict[Site, list[Intervention]] = {}
        sites = self.sites(tokens).sites
        for selector, intervention in interventions.items():
            for site in select_sites(selector, sites, where=f"{self._label}.intervene"):
                by_site.setdefault(site, []).append(intervention)

        def edit(site: Site) -> Callable[[Any], Any]:
            return lambda value: reduce(
                lambda value, one: apply_intervention(one, value, where=f"{site} of {self._label}"),
                by_site[site],
                value,
            )

        return passes.edit(self.forward, (self.params, tokens), {site: edit(site) for site in by_site})

    def sites(self, tokens: Any = None) -> SiteTable:
        """The table of the model's sites, with shapes, dtypes and bytes. Nothing is computed.

        Args:
            tokens: Token ids, `[batch, pos]`, for their shape; by default one row of eight.

        Returns:
            The table, in execution order.
        """
        tokens = np.zeros((1, 8), np.int32) if tokens is None else self.check_tokens(tokens)
        return running_pass.list_sites(self.forward, self.params, tokens)

    def generate(
        self,
        prompt: Any,
        *,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        frequency_penalty: float = 0.0,
        seed: Any = 0,
        stop_at_eos: bool = True,
        interventions: Mapping[Any, Intervention] | None = None,
        at: Literal["all", "prompt", "generated"] = "all",
        use_cache: bool = True,
    ) -> Generation:
        """Continue prompts token by token, with sites changed if asked for.

        Args:
            prompt: A text, a list of texts, or token ids `[batch, pos]`.
            max_new_tokens: Most tokens to add.
            temperature: 0 takes the most probable token; otherwise logits are divided by it and sampled from.
            top_k: Sample among the k most probable tokens only.
            top_p: Sample among the most probable tokens that together reach this probability only.
            frequency_penalty: Taken from a token's logit for each time it is in the text so far, prompt included.
            seed: An integer or a PRNG key. Each row and each step draws on its own.
            stop_at_eos: Whether a row ends with the tokenizer's end-of-text token.
            interventions: Selector to intervention; see `interp_jax.models.generate` on positions.
            at: Positions at which they act: "all", those of the "prompt", or the "generated" ones.
            use_cache: Whether keys and values are kept from step to step. The tokens are the same without.

        Returns:
            The tokens, and their text if there is a tokenizer.
        """
        from interp_jax.models import generate

        tokens = self.tokenize(prompt) if is_text(prompt) else self.check_tokens(prompt, where="generate")
        self._check_table(interventions or {}, "generate")
        eos_id = self.tokenizer.eos_id if stop_at_eos and self.tokenizer is not None else None
        generation = generate.generate(
            self.upstream,
            self.params,
            np.asarray(tokens),
            generate.Settings(
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                frequency_penalty=frequency_penalty,
                eos_id=eos_id,
                at=at,
                use_cache=use_cache,
            ),
            interventions=interventions or {},
            key=seed,
            n_ctx=None if self.config is None else self.config.n_ctx,
        )
        return generation if self.tokenizer is None else generation.with_text(self.tokenizer)

    def check(self, tokens: Any = None) -> CheckReport:
        """Whether what is read at each site is what its name says.

        Args:
            tokens: Token ids to check on, `[batch, pos]`; by default two short rows, one of them padded.

        Returns:
            The contracts with their outcomes; prints as a table.
        """
        from interp_jax.models.check import check_model

        tokens = None if tokens is None else self.check_tokens(tokens, where="check")
        return check_model(self.upstream, self.params, self.config, tokens, name=self._label)

    def ln_final(self, residual: Any) -> jax.Array:
        """The norm before the unembedding, on a residual `[batch, pos, d_model]`: upstream's own code."""
        return self._part("ln_final")(self.params, self._check_residual(residual, "ln_final"))

    def unembed(self, normalised: Any) -> jax.Array:
        """Logits of a normalised residual, as `ln_final` returns it: upstream's own code."""
        return self._part("unembed")(self.params, self._check_residual(normalised, "unembed"))

    def weight(self, name: str, layer: int | None = None) -> jax.Array:
        """A weight under its canonical name, computed from the parameters now.

        Args:
            name: Such as "W_Q"; `upstream.weight_names` has them all.
            layer: Which layer's; by default all layers', stacked on a new first axis.

        Returns:
            The weight; its axes are in the docstring of the property of that name.

        Raises:
            UnknownNameError: The model has no weight of that name, or no such layer.
        """
        where = f"the weights of {self._label}"
        if name in self.upstream.weights and layer is None:
            return self.upstream.weights[name](self.params)
        if name not in self.upstream.layer_weights:
            has_it = name in self.upstream.weights
            what = f"{name!r} of layer {layer}" if has_it else f"{name!r}"
            names = list(self.upstream.layer_weights if has_it else self.upstream.weight_names)
            raise UnknownNameError(
                four_part(f"{what} was asked for", where=where, names=names, given=name, fix="use one of these names.")
            )
        of_layer, params_of = self.upstream.layer_weights[name], self.upstream.layer_params
        if params_of is None or self.config is None:
            raise self._lacking("layer_params and config")
        n_layers = self.config.n_layers
        if layer is None and self.upstream.stacked_layers is not None:
            by_kind = [jax.vmap(of_layer)(group) for group in self.upstream.stacked_layers(self.params)]
            return jnp.stack(by_kind, axis=1).reshape(n_layers, *by_kind[0].shape[1:])
        if layer is None:
            return jnp.stack([of_layer(params_of(self.params, i)) for i in range(n_layers)])
        if isinstance(layer, bool) or not isinstance(layer, int | np.integer) or not 0 <= layer < n_layers:
            raise UnknownNameError(
                four_part(
                    f"Layer {layer!r} was given",
                    where=where,
                    expected=f"0 to {n_layers - 1}, or None for all layers.",
                    fix="choose a layer in that range.",
                )
            )
        return of_layer(params_of(self.params, layer))

    def stacked(self, *, donate: bool = False) -> LanguageModel:
        """The same model with its layers held as one subtree and run as a scan: compiled as fast as one layer.

        Args:
            donate: Whether to delete this model's layers one array at a time as they are copied, so that there is
                never a second copy of the model. This model can then no longer be used.

        Returns:
            The model; this one, if its layers are stacked already.

        Raises:
            UnsupportedModelError: Its family has no stacked form.
            ShapeError: Its layers differ.
        """
        return self if self.upstream.is_stacked else self._restacked(donate=donate)

    def unstacked(self, *, donate: bool = False) -> LanguageModel:
        """The same model with a subtree for each layer, run one after the other: the inverse of `stacked`.

        Args:
            donate: As for `stacked`.

        Returns:
            The model; this one, if its layers are not stacked.
        """
        return self._restacked(donate=donate) if self.upstream.is_stacked else self

    def export(
        self, directory: str | os.PathLike[str], *, max_file_bytes: int = 5_000_000_000, overwrite: bool = False
    ) -> Path:
        """Write the model as a Hugging Face directory: config.json, safetensors, tokenizer. Whole or not at all.

        Args:
            directory: Where; it must not exist, or be empty, unless `overwrite`.
            max_file_bytes: Weights beyond this are cut into several files with an index.
            overwrite: Whether to replace a model directory that is there.

        Returns:
            The directory.

        Raises:
            UnsupportedModelError: It was not loaded from files, or its family cannot be written.
            ShapeError: Its parameters are not those of its configuration.
            InvalidInputError: `directory` holds something that is not to be replaced.
            ExportError: It could not be written; nothing has changed.
        """
        from interp_jax.models.export import checkpoint_of, export

        checkpoint = checkpoint_of(
            self.upstream,
            self.params,
            config_json=self.config_json,
            tokenizer=self.tokenizer,
            source=self.source,
            name=self._label,
        )
        return export(checkpoint, directory, max_file_bytes=max_file_bytes, overwrite=overwrite)

    def tokenize(self, text: str | Sequence[str], *, add_special_tokens: bool = True) -> np.ndarray:
        """Token ids of a text or of several, shorter ones padded on the left with `PAD`.

        Args:
            text: One text or a list of texts.
            add_special_tokens: Whether to add what the model's own tokenizer adds.

        Returns:
            Token ids, int32, `[batch, pos]`.

        Raises:
            InvalidInputError: There is no text, an empty one, or one longer than the model can read.
        """
        texts: list[Any] = list(text) if isinstance(text, Iterable) and not isinstance(text, str | bytes) else [text]
        if not all(isinstance(one, str) for one in texts):
            raise InvalidInputError(
                four_part(
                    f"Not a text: {text!r:.60} ({type(text).__name__})",
                    where=f"{self._label}.tokenize",
                    expected="one text, or a list of texts.",
                    fix="token ids need no tokenize: give them to the model as they are.",
                )
            )
        rows = [self._tokenizer().encode(one, add_special_tokens=add_special_tokens) for one in texts]
        if not rows or not all(rows):
            which = "No text" if not rows else f"Empty text (number {next(i for i, row in enumerate(rows) if not row)})"
            raise InvalidInputError(
                four_part(
                    f"{which} was given",
                    where=f"{self._label}.tokenize",
                    expected="one text, or a list of texts, each of at least one token.",
                    fix="leave empty texts out; to start from nothing use the model's beginning-of-text token.",
                )
            )
        n_pos = max(map(len, rows))
        tokens = np.array([[PAD] * (n_pos - len(row)) + row for row in rows], np.int32)
        return np.asarray(self.check_tokens(tokens, where="tokenize"))

    def decode(self, tokens: Any, *, skip_special_tokens: bool = False) -> Any:
        """The text of token ids.

        Args:
            tokens: Ids; padding says nothing.
            skip_special_tokens: Whether to leave out control tokens.

        Returns:
            One text for `[pos]` or a single id, a list of texts for `[batch, pos]`.
        """
        tokenizer = self._tokenizer()
        return _map_rows(lambda row: tokenizer.decode(row, skip_special_tokens=skip_special_tokens), tokens)

    def to_str_tokens(self, text: Any) -> Any:
        """The text of each token alone, for tables and axis labels.

        Args:
            text: A text, a list of texts, or token ids `[pos]` or `[batch, pos]`.

        Returns:
            A list of texts for one text or `[pos]`, a list of such lists otherwise.
        """
        tokenizer = self._tokenizer()
        if isinstance(text, str):
            return tokenizer.strings(tokenizer.encode(text))
        if is_text(text):
            return [tokenizer.strings(tokenizer.encode(one)) for one in text]
        return _map_rows(tokenizer.strings, text)

    def _check_table(self, interventions: Any, where: str) -> None:
        if not isinstance(interventions, Mapping):
            raise InvalidInputError(
                four_part(
                    f"Interventions of type {type(interventions).__name__} were given",
                    where=f"{self._label}.{where}",
                    expected="a dict, selector to what is done there.",
                    fix='write {"5.mlp_out": lambda value: value * 0}.',
                )
            )

    def _check_residual(self, residual: Any, where: str) -> Any:
        d_model = None if self.config is None else self.config.d_model
        shape = np.shape(residual)
        if len(shape) != 3 or d_model not in (None, shape[-1]):
            raise ShapeError(
                four_part(
                    f"A residual of shape {list(shape)} was given",
                    where=f"{self._label}.{where}",
                    expected=f"[batch, pos, {d_model or 'd_model'}].",
                    fix="give a value of resid_post, or of ln_final to unembed; one vector is vector[None, None].",
                )
            )
        return residual

    def check_tokens(self, tokens: Any, *, where: str = "") -> Any:
        """The tokens as int32, once they are known to fit this model; `where` names the caller in errors."""
        place = f"{self._label}.{where}" if where else self._label
        if self.config is None:
            return check_tokens(tokens, where=place)
        return check_tokens(tokens, d_vocab=self.config.d_vocab, n_ctx=self.config.n_ctx, where=place)

    @property
    def n_params(self) -> int:
        """Number of parameters."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.params))

    def __repr__(self) -> str:
        facts = self._facts()
        width = max(map(len, facts))
        return "\n".join([f"LanguageModel {self._label}", *(f"  {key:<{width}}  {facts[key]}" for key in facts)])

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in self._facts().items())
        return f"<table><caption>LanguageModel {html.escape(self._label)}</caption>{rows}</table>"

    def _facts(self) -> dict[str, str]:
        """What a person wants to know at a glance."""
        dtypes = sorted({leaf.dtype.name for leaf in jax.tree.leaves(self.params)})
        n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))
        facts = {"parameters": f"{self.n_params:,} ({', '.join(dtypes)}, {n_bytes / 1e6:,.0f} MB)"}
        if (config := self.config) is not None:
            kv = "" if config.n_kv_heads == config.n_heads else f" ({config.n_kv_heads} for keys and values)"
            mlp = "gated " if config.is_gated else ""
            facts |= {
                "family": config.family,
                "layers": f"{config.n_layers}{' stacked' * self.upstream.is_stacked}, d_model {config.d_model}",
                "attention": f"{config.n_heads} heads{kv}, d_head {config.d_head}",
                "MLP": f"{mlp}{config.activation}, d_mlp {config.d_mlp}",
                "tokens": f"d_vocab {config.d_vocab:,}, n_ctx {config.n_ctx:,}",
            }
        patch_set = "none (the model's own tags)" if self.upstream.patch_set is None else self.upstream.name
        facts["patch set"] = patch_set
        if self.source:
            facts["source"] = self.source
        return facts

    @property
    def _label(self) -> str:
        return self.name or self.upstream.name

    def _part(self, part: str) -> Callable[..., Any]:
        function = getattr(self.upstream, part)
        if function is None:
            raise self._lacking(part)
        return _compiled_part(self.upstream, part)

    def _restacked(self, *, donate: bool) -> LanguageModel:
        if self.upstream.restacked is None or self.upstream.restack is None:
            raise self._lacking("restacked form")
        params = self.upstream.restack(self.params, donate=donate)
        return replace(self, upstream=self.upstream.restacked(), params=params)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UnsupportedModelError(
                four_part(
                    f"{self._label} has no tokenizer",
                    where=self.source or None,
                    expected="tokenizer files beside the weights, or a tokenizer in the weights' metadata.",
                    fix="add the tokenizer files and load again, or give token ids instead of text.",
                )
            )
        return self.tokenizer

    def _lacking(self, part: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            four_part(
                f"{self._label} does not say what its {part} is",
                expected=f"an Upstream with {part}.",
                fix=f"give {part} when making the LanguageModel.",
            )
        )


@lru_cache(maxsize=32)
def _compiled(upstream: Upstream) -> Callable[..., Any]:
    return counted_jit(upstream.forward, name=f"{upstream.name}.forward")


@lru_cache(maxsize=64)
def _compiled_part(upstream: Upstream, part: str) -> Callable[..., Any]:
    return counted_jit(getattr(upstream, part), name=f"{upstream.name}.{part}")


def _map_rows(function: Callable[[list[int]], Any], tokens: Any) -> Any:
    array = np.asarray(tokens)
    if array.ndim < 2:
        return function(array.reshape(-1).tolist())
    return [function(row) for row in array.reshape(-1, array.shape[-1]).tolist()]
