"""Promises of activation patching: an exact sweep costs far less than a pass per node, estimates a few passes in all.

SmolLM2-135M, a prompt pair of 16 tokens. The sweep is the one of every neighbouring tool's tutorial: resid_pre at every
layer and position. A pass per node is what a plain loop over compiled forward passes would take.

Source: algorithms page, section 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.common import compare, report
from benchmarks.models import smollm2
from interp_jax.core.interventions import Masked
from interp_jax.core.sites import Site
from interp_jax.forward.metrics import logit_difference
from interp_jax.forward.nodes import node_set
from interp_jax.methods.activation_patching import activation_patching
from interp_jax.methods.atp import attribution_patching
from interp_jax.transforms.compilations import count_compilations
from interp_jax.transforms.harvest import site_gradients

CLEAN = "Then, Mary and John went to the shop, and John gave a bag to"
CORRUPTED = "Then, Mary and John went to the shop, and Mary gave a bag to"


def seconds(fn: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - start


def sweep(lm: Any, clean: Any, corrupted: Any, metric: Any) -> bool:
    """Exact patching of every layer and position."""
    nodes = node_set(lm, clean, ["resid_pre"])

    def ours() -> Any:
        return activation_patching(lm, clean, corrupted, metric, nodes, progress=False)

    first_s = seconds(lambda: ours().effects)
    with count_compilations() as compiled:
        result = ours()
    timed = compare({"sweep": lambda: ours().effects, "forward": lambda: lm(clean)}, rounds=5, warm_up=1)
    truth = []
    for layer, position in ((0, 10), (9, 11), (17, 10), (24, 15), (29, 15)):
        site = Site(layer, "resid_pre")
        value = lm.reap(corrupted, site)[site]
        mask = np.zeros(value.shape, bool)
        mask[:, position] = True
        exact = metric(lm.intervene(clean, {site: Masked(value, mask)})) - metric(lm(clean))
        truth.append(abs(float(exact[0]) - float(result.grid("resid_pre")[layer, position, 0])))
    per_node = timed["sweep"] / (nodes.n_nodes * timed["forward"])
    # A loop of one pass per node costs 1; what a suffix of half the layers costs is a half.
    holds = report(
        "exact sweep of resid_pre / a forward pass per node, SmolLM2-135M",
        per_node,
        must="<= 0.5",
        holds=per_node <= 0.5,
        sweep_s=timed["sweep"],
        first_sweep_s=first_s,
        forward_s=timed["forward"],
        n_nodes=nodes.n_nodes,
        max_difference=max(truth),
    )
    return report("programs compiled by the second sweep", len(compiled), must="0", holds=not compiled) and holds


def estimates(lm: Any, clean: Any, corrupted: Any, metric: Any) -> bool:
    """AtP for all nodes of all sites over a forward; AtP* over two forwards and a backward per layer."""
    table = lm.sites(clean)
    skipped = ("attn_scores", "pattern", "logits", "ln_final")
    names = list(dict.fromkeys(row.site.name for row in table.rows if row.site.name not in skipped))
    every, heads = node_set(lm, clean, names), node_set(lm, clean, ["q", "k", "v", "z", "mlp_post"])
    forward = jax.jit(lambda params, tokens: metric(lm.forward(params, tokens)))
    both = jax.jit(site_gradients(lm.forward, "resid_pre", metric))
    timed = compare(
        {
            "forward": lambda: forward(lm.params, clean),
            "forward_and_backward": lambda: both(lm.params, clean),
            "atp": lambda: (
                attribution_patching(lm, clean, corrupted, metric, every, qk_fix=False, grad_drop=False).estimates
            ),
            "atp_star": lambda: attribution_patching(lm, clean, corrupted, metric, heads).scores,
        },
        rounds=5,
    )
    backward = timed["forward_and_backward"] - timed["forward"]
    floor = 2 * timed["forward"] + lm.config.n_layers * backward
    atp, star = timed["atp"] / timed["forward"], timed["atp_star"] / floor
    named = {f"{key}_s": value for key, value in timed.items()}
    return all(
        [
            report(
                f"AtP of {every.n_nodes} nodes at {len(names)} names / forward, SmolLM2-135M",
                atp,
                must="<= 4",
                holds=atp <= 4,
                **named,
            ),
            report(
                f"AtP* of {heads.n_nodes} nodes / (2 forwards + {lm.config.n_layers} backwards), SmolLM2-135M",
                star,
                must="<= 1.3",
                holds=star <= 1.3,
                floor_s=floor,
                **named,
            ),
        ]
    )


def main() -> bool:
    """Measure and report."""
    lm = smollm2()
    clean, corrupted = lm.tokenize(CLEAN), lm.tokenize(CORRUPTED)
    answers = [int(lm.tokenize(name)[0, 0]) for name in (" Mary", " John")]
    metric = logit_difference(*answers)
    return all([sweep(lm, clean, corrupted, metric), estimates(lm, clean, corrupted, metric)])
