"""`check`: holds on models that are right, and names what is wrong with those that are not.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.models.check import CheckReport, Outcome, check, check_model
from interp_jax.models.contracts import ACTIVATIONS, CONTRACTS
from interp_jax.patches import flax_attention, transformers_flax, transformers_llama
from interp_jax.transforms.patcher import Patcher
from interp_jax.transforms.sowing import layer_scope, sow

TOKENS = np.array([[5, 80, 3, 7, 200], [-1, -1, 41, 6, 0]], np.int32)


def by_contract(report: CheckReport) -> dict[str, Outcome]:
    return {outcome.contract: outcome for outcome in report.outcomes}


def test_tiny_models_hold_every_contract(tiny) -> None:
    report = tiny.check()
    assert report.ok, report
    assert len(report.outcomes) == len(CONTRACTS) + 5
    assert all(outcome.ok is True for outcome in report.outcomes), report


def test_smollm2_holds_every_contract(smollm2) -> None:
    report = smollm2.check(smollm2.tokenize(["When Mary and John", "went"]))
    assert all(outcome.ok is True for outcome in report.outcomes), report
    assert "30 layers" in by_contract(report)["shapes are as declared"].detail


# The real patch set with one thing wrong: (patcher, member, part of a replacement, what stands there instead), the
# contracts that must see it, and the site they must name.
LAYER, ATTENTION, MLP = "FlaxLlamaDecoderLayer.__call__", "FlaxLlamaAttention.__call__", "FlaxLlamaMLP.__call__"
EINSUM = 'jnp.einsum("...hqk,...khd->...qhd", attn_weights, value)'
WEIGHTS = "dot_product_attention_weights"
FAULTS: dict[str, tuple[list[tuple[str, str, str]], dict[str, str]]] = {
    "attn_out before the output projection": (
        [
            (LAYER, 'sow(outputs[0], name="attn_out")', "outputs[0]"),
            (ATTENTION, "+", '("self.o_proj(attn_output)", \'self.o_proj(sow(attn_output, name="attn_out"))\')'),
        ],
        {
            "attn_out = sum over heads of z W_O + b_O": "attn_out",
            "resid_mid = resid_pre + attn_out": "resid_mid",
        },
    ),
    "resid_pre after the norm": (
        [
            (LAYER, 'residual = hidden_states = sow(hidden_states, name="resid_pre")', "residual = hidden_states"),
            (LAYER, 'sow(self.input_layernorm(hidden_states), name="ln1")',
             'sow(sow(self.input_layernorm(hidden_states), name="ln1"), name="resid_pre")'),
        ],
        {
            "first resid_pre = embed (+ pos_embed)": "0.resid_pre",
            "resid_mid = resid_pre + attn_out": "resid_mid",
            "resid_pre = the layer before's resid_post": "resid_pre",
        },
    ),
    "resid_mid without the stream": (
        [(LAYER, 'sow(residual + attn_output, name="resid_mid")', 'residual + sow(attn_output, name="resid_mid")')],
        {"resid_mid = resid_pre + attn_out": "resid_mid", "resid_post = resid_pre + writes": "resid_post"},
    ),
    "resid_post without the stream": (
        [(LAYER, 'sow(residual + hidden_states, name="resid_post")',
          'residual + sow(hidden_states, name="resid_post")')],
        {
            "resid_post = resid_pre + writes": "resid_post",
            "resid_pre = the layer before's resid_post": "resid_pre",
            "logits = unembed(ln_final(last resid_post))": "logits",
        },
    ),
    "q after the rotation": (
        [
            (ATTENTION, 'sow(self._split_heads(query, self.num_heads), name="q")',
             "self._split_heads(query, self.num_heads)"),
            (ATTENTION, 'sow(query, name="rot_q")', 'sow(sow(query, name="q"), name="rot_q")'),
        ],
        {"q, k, v, mlp_pre, mlp_gate = normed input W + b": "q"},
    ),
    "rot_k before the rotation": (
        [
            (ATTENTION, 'sow(self._split_heads(key, self.num_key_value_heads), name="k")',
             'sow(sow(self._split_heads(key, self.num_key_value_heads), name="k"), name="rot_k")'),
            (ATTENTION, ', sow(key, name="rot_k")', ", key"),
        ],
        {"attn_scores = q k / sqrt(d_head) where visible": "attn_scores"},
    ),
    "v for every query head": (
        [
            (ATTENTION, 'sow(self._split_heads(value, self.num_key_value_heads), name="v")',
             "self._split_heads(value, self.num_key_value_heads)"),
            (ATTENTION, "+", '("jnp.repeat(value, self.num_key_value_groups, axis=2)",'
             ' \'sow(jnp.repeat(value, self.num_key_value_groups, axis=2), name="v")\')'),
        ],
        {"shapes are as declared": "v", "q, k, v, mlp_pre, mlp_gate = normed input W + b": "v"},
    ),
    "pattern before the softmax": (
        [
            (WEIGHTS, 'attn_weights = sow(attn_weights, name="pattern")', "attn_weights = attn_weights"),
            (WEIGHTS, 'sow(attn_weights, name="attn_scores")).astype(dtype)',
             'sow(sow(attn_weights, name="attn_scores"), name="pattern")).astype(dtype)'),
        ],
        {
            "pattern = softmax(attn_scores)": "pattern",
            "pattern rows are >= 0 and sum to 1": "pattern",
            "pattern is 0 at later keys and at padding": "pattern",
            "z = pattern v": "z",
        },
    ),
    "mlp_post before the product": (
        [(MLP, 'sow(up_proj_states * gate_states, name="mlp_post")',
          'sow(up_proj_states, name="mlp_post") * gate_states')],
        {
            "mlp_post = act(mlp_gate) mlp_pre, or act(mlp_pre)": "mlp_post",
            "mlp_out = mlp_post W_out + b_out": "mlp_out",
        },
    ),
    "gate and linear branch exchanged": (
        [(MLP, 'name="mlp_pre"', 'name="mlp_other"'), (MLP, 'name="mlp_gate"', 'name="mlp_pre"'),
         (MLP, 'name="mlp_other"', 'name="mlp_gate"')],
        {
            "q, k, v, mlp_pre, mlp_gate = normed input W + b": "mlp_",
            "mlp_post = act(mlp_gate) mlp_pre, or act(mlp_pre)": "mlp_post",
        },
    ),
    "layers counted from one": (
        [("FlaxLlamaLayerCollection.__call__", "layer_scope(layer_index)", "layer_scope(layer_index + 1)")],
        {"shapes are as declared": "1, 2, 3", "attn_out = sum over heads of z W_O + b_O": "could not be computed"},
    ),
    "logits before the unembedding": (
        [
            ("FlaxLlamaForCausalLMModule.__call__", 'lm_logits = sow(lm_logits, name="logits")',
             'lm_logits = sow(lm_logits * 2, name="logits") / 2'),
        ],
        {
            "logits = unembed(ln_final(last resid_post))": "logits",
            "logits are what is returned": "logits",
            "nobody listening: StableHLO is that without tags": "lines instead of",
        },
    ),
    "a tag whose value is not used": (
        [(LAYER, 'attn_output = sow(outputs[0], name="attn_out")',
          'attn_output = outputs[0]\nsow(attn_output, name="attn_out")')],
        {"a change of a site reaches the result": "1.attn_out"},
    ),
    "a tag that computes": (
        [(MLP, 'sow(self.up_proj(hidden_states), name="mlp_pre")',
          'sow(self.up_proj(hidden_states) + 0.0, name="mlp_pre")')],
        {"nobody listening: StableHLO is that without tags": "lines instead of"},
    ),
}  # fmt: skip


def broken(lm: Any, edits: list[tuple[str, str, str]]) -> Any:
    """The tiny Llama under a patch set with edited replacements; "+" adds a pair."""
    tags = []
    for patcher in transformers_llama.PATCH_SET.tags:
        members: dict[str, list[Any]] = {m: [(p.before, p.after) for p in ps] for m, ps in patcher.members.items()}
        for member, old, new in edits:
            if member not in members:
                continue
            if old == "+":
                members[member].append(eval(new))
                continue
            assert sum(old in after for _, after in members[member]) == 1, old
            members[member] = [(before, after.replace(old, new)) for before, after in members[member]]
        tags.append(Patcher(patcher.module_name, members))
    module = _module(lm)

    def forward(params: Any, tokens: Any) -> Any:
        ids, mask, positions = transformers_flax.read_tokens(tokens)
        return module.apply({"params": params}, ids, attention_mask=mask, position_ids=positions).logits

    mends = transformers_llama.PATCH_SET.mends
    return dataclasses.replace(lm.upstream, forward=transformers_flax.under((*mends, *tags), forward, name="broken"))


def _module(lm: Any) -> Any:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_flax_llama import FlaxLlamaForCausalLMModule

    c = lm.config
    return FlaxLlamaForCausalLMModule(
        LlamaConfig(
            vocab_size=c.d_vocab,
            hidden_size=c.d_model,
            intermediate_size=c.d_mlp,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            max_position_embeddings=c.n_ctx,
            rope_theta=c.rope_theta,
            rms_norm_eps=c.norm_eps,
        )
    )


def test_the_patch_set_rebuilt_without_a_fault_holds(tiny_llama) -> None:
    report = check_model(broken(tiny_llama, []), tiny_llama.params, tiny_llama.config, TOKENS)
    assert all(outcome.ok is True for outcome in report.outcomes), report


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.replace(" ", "-"))
def test_a_misplaced_tag_is_seen_and_named(tiny_llama, fault: str) -> None:
    edits, expected = FAULTS[fault]
    report = check_model(broken(tiny_llama, edits), tiny_llama.params, tiny_llama.config, TOKENS)
    assert not report.ok
    outcomes = by_contract(report)
    for contract, words in expected.items():
        outcome = outcomes[contract]
        assert outcome.ok is False, report
        assert words in outcome.detail, outcome
        if "layers" not in outcome.detail and not contract.startswith("logits are"):
            assert "patches/transformers_llama.py" in outcome.hint, outcome
        if outcome.hint and "StableHLO" not in contract and "layers" not in outcome.detail:
            assert re.search(r"runs at \w+\.py:\d+", outcome.hint), outcome
    # And no more than is wrong: most of the others hold.
    assert len(report.failures) <= len(expected) + 4, report


def test_a_wrong_mask_is_seen(tiny_llama) -> None:
    """Every query sees one key too many."""
    one_more = Patcher(
        transformers_llama.MODULE,
        {ATTENTION: [("self.causal_mask[:, :, :query_length, :key_length]",
                      "(jnp.arange(key_length)[None, :] <= 1 + jnp.arange(query_length)[:, None])[None, None]")]},
    )  # fmt: skip
    module = _module(tiny_llama)

    def forward(params: Any, tokens: Any) -> Any:
        ids, mask, positions = transformers_flax.read_tokens(tokens)
        return module.apply({"params": params}, ids, attention_mask=mask, position_ids=positions).logits

    forward = transformers_flax.under((one_more, *transformers_llama.PATCH_SET.tags), forward, name="seeing")
    report = check_model(dataclasses.replace(tiny_llama.upstream, forward=forward), tiny_llama.params, None, TOKENS)
    outcome = by_contract(report)["pattern is 0 at later keys and at padding"]
    assert outcome.ok is False
    assert "pattern" in outcome.detail


# Functions of one's own.


def attention(x: jax.Array, causal: bool = True) -> jax.Array:
    """One layer with one head, tagged by hand."""
    with layer_scope(0):
        x = sow(x, name="resid_pre")
        q = k = v = x[:, :, None, :]
        q, k, v = sow(q, name="q"), sow(k, name="k"), sow(v, name="v")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(x.shape[-1]).astype(np.float32)
        if causal:
            n = x.shape[1]
            scores = jnp.where(jnp.tril(jnp.ones((1, 1, n, n), bool)), scores, -jnp.inf)
        scores = sow(scores, name="attn_scores")
        pattern = sow(jax.nn.softmax(scores), name="pattern")
        z = sow(jnp.einsum("bhqk,bkhd->bqhd", pattern, v), name="z")
        out = sow(z[:, :, 0], name="attn_out")
        return sow(x + out, name="resid_post")


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((2, 5, 4), np.float32)


def test_a_function_of_ones_own(x: np.ndarray) -> None:
    tokens = np.zeros((2, 5), np.int32)
    report = check(attention, x, tokens=tokens)
    assert report.ok, report
    assert report.name == "attention"
    outcomes = by_contract(report)
    assert outcomes["resid_post = resid_pre + writes"].ok
    assert outcomes["z = pattern v"].ok
    assert outcomes["attn_scores = q k / sqrt(d_head) where visible"].ok
    assert outcomes["pattern is 0 at later keys and at padding"].ok
    # What does not apply says what it would need.
    missing = outcomes["attn_out = sum over heads of z W_O + b_O"]
    assert missing.ok is None
    assert missing.detail == "does not apply: needs attn_out z, weights"
    assert outcomes["nobody listening: StableHLO is that without tags"].ok is None

    looking_ahead = check(lambda x: attention(x, causal=False), x, tokens=tokens)
    assert [failure.contract for failure in looking_ahead.failures] == ["pattern is 0 at later keys and at padding"]
    assert "sow(..., name='pattern')" in looking_ahead.failures[0].hint
    assert "test_check.py" in looking_ahead.failures[0].hint


def test_the_text_of_a_report(x: np.ndarray) -> None:
    def model(x: jax.Array) -> jax.Array:
        with layer_scope(0):
            x = sow(x, name="resid_pre")
            return sow(x + 2 * sow(jnp.sin(x), name="mlp_out"), name="resid_post")

    report = check(model, x, name="mine")
    lines = str(report).splitlines()
    assert lines[0] == "Site contracts of mine: 1 of 4 fails."
    failing = next(i for i, line in enumerate(lines) if "FAILS" in line)
    assert "resid_post = resid_pre + writes" in lines[failing]
    worst = np.abs(np.sin(x)).max()
    assert f"off by {worst:.3g} at 0.resid_post, where" in lines[failing]
    assert "look at sow(..., name='resid_post') at test_check.py:" in lines[failing + 1]
    assert repr(report) == str(report)
    assert report._repr_html_().startswith("<table>")
    assert "<td>FAILS</td>" in report._repr_html_()
    assert str(CheckReport("empty", ())) == "Site contracts of empty: all 0 hold."


def test_a_program_that_disagrees_with_its_untagged_form(x: np.ndarray) -> None:
    same = check(attention, x, untagged=lambda x: attention(x))
    assert by_contract(same)["nobody listening: StableHLO is that without tags"].ok is True
    other = check(attention, x, untagged=lambda x: attention(x) + 1)
    assert by_contract(other)["nobody listening: StableHLO is that without tags"].ok is False


def test_nan_is_not_agreement() -> None:
    def model(x: jax.Array) -> jax.Array:
        with layer_scope(0):
            x = sow(x, name="resid_pre")
            write = sow(x * 0, name="mlp_out")
            return sow(x + write + jnp.nan, name="resid_post")

    report = check(model, jnp.ones((1, 2, 3)))
    assert by_contract(report)["resid_post = resid_pre + writes"].ok is False


def test_nonlinearities_are_those_of_the_names(rng: np.random.Generator) -> None:
    """All that the installed upstream has."""
    from transformers.modeling_flax_utils import ACT2FN

    x = rng.normal(0, 3, 200).astype(np.float32)
    assert len(ACT2FN) >= 7
    for name, function in ACT2FN.items():
        np.testing.assert_allclose(ACTIVATIONS[name](x.astype(np.float64)), function(x), atol=2e-6, err_msg=name)


def test_attention_tags_are_shared() -> None:
    assert flax_attention.TAGS in transformers_llama.PATCH_SET.tags
