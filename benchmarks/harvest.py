"""Promises of harvest: reading costs what is read, a scan stays a scan, and nothing asked for costs nothing.

A Llama of random weights, 32 layers at the width of SmolLM2-135M, stacked; SmolLM2-135M itself; and for compile times a
transformer in plain JAX beside the Llama (benchmarks/stacked.py says why they differ). Memory is XLA's own account of a
compiled program for 512 tokens; results count, so that what was read does wherever it ends up.

Source: design page, section 3.3.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.common import compare, report
from benchmarks.models import plain_transformer, smollm2, smollm2_width
from benchmarks.stacked import compile_s
from interp_jax.transforms.harvest import harvest_sites, intervene, site_gradients

SITE = "mlp_out"
LONG = np.arange(1000, 1512, dtype=np.int32)[None]
TOKENS, SHORT = LONG[:, :128], LONG[:, :32]


def spread(k: int, n_layers: int) -> list[str]:
    """Selectors of `k` layers from first to last."""
    return [f"{layer}.{SITE}" for layer in sorted({round(i * (n_layers - 1) / max(k - 1, 1)) for i in range(k)})]


def last_logits(lm: Any) -> Callable[[Any, Any], Any]:
    """The forward pass, of which the last position's logits are kept, so that layers and not logits take the memory."""
    return lambda params, tokens: lm.forward(params, tokens)[:, -1]


def appended(fn: Callable[..., Any], layers: Sequence[str]) -> Callable[..., Any]:
    """The same layers by way of the scan's stacked output of all."""

    def read(*args: Any) -> Any:
        result, activations = harvest_sites(fn, SITE)(*args)
        return result, [activations[layer] for layer in layers]

    return read


def taken_bytes(compiled: Any) -> int:
    """Temporaries and results."""
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def slots(name: str, lm: Any) -> bool:
    """Memory and time of reading k layers of a scan, in slots of one layer's value and as a ratio to the plain scan."""
    fn, n_layers = last_logits(lm), lm.config.n_layers
    slot = LONG.size * lm.config.d_model * 4
    programs = {"plain": fn}
    for k in (1, 2, 8, n_layers):
        layers = spread(k, n_layers)
        programs[f"k={k}"] = harvest_sites(fn, layers)
        programs[f"append, k={k}"] = appended(fn, layers)
    jitted = {key: jax.jit(each) for key, each in programs.items()}
    taken = {key: taken_bytes(each.lower(lm.params, LONG).compile()) for key, each in jitted.items()}
    seconds = compare({key: lambda each=each: each(lm.params, TOKENS) for key, each in jitted.items()}, rounds=9)
    holds = True
    for key in list(programs)[1:]:
        extra, ratio = (taken[key] - taken["plain"]) / slot, seconds[key] / seconds["plain"]
        is_promised = key == "k=1"
        holds &= report(
            f"memory over plain, {key}, {name}, in slots",
            extra,
            must="<= 1.5" if is_promised else "for comparison",
            holds=extra <= 1.5 or not is_promised,
            plain_bytes=taken["plain"],
            slot_bytes=slot,
        )
        holds &= report(
            f"time over plain, {key}, {name}",
            ratio,
            must="<= 1.05" if is_promised else "for comparison",
            holds=ratio <= 1.05 or not is_promised,
            plain_s=seconds["plain"],
        )
    return holds


def gradients(name: str, unrolled: Any, stacked: Any, operand: Any, metric: Any, *, is_promised: bool) -> bool:
    """Value and gradient at every resid_pre: compiling unrolled over stacked, running stacked over unrolled."""
    programs, seconds, details = {}, {}, {}
    for key, model in (("unrolled", unrolled), ("stacked", stacked)):
        of_sites = site_gradients(model.forward, "resid_pre", metric)
        lower_s, xla_s = min((compile_s(of_sites, model.params, operand) for _ in range(2)), key=sum)
        details |= {f"{key}_trace_and_lower_s": lower_s, f"{key}_xla_s": xla_s}
        seconds[key] = lower_s + xla_s
        program = jax.jit(of_sites)
        programs[key] = lambda program=program, model=model: program(model.params, operand)
    running = compare(programs, rounds=9)
    compiling, run = seconds["unrolled"] / seconds["stacked"], running["stacked"] / running["unrolled"]
    what, named = f"value and gradient at every resid_pre, {name}", {f"{k}_s": v for k, v in running.items()}
    musts = (">= 10", "<= 1.1") if is_promised else ("for comparison",) * 2
    return all(
        [
            report(
                f"compile {what}: unrolled / stacked",
                compiling,
                must=musts[0],
                holds=compiling >= 10 or not is_promised,
                **details,
            ),
            report(f"run {what}: stacked / unrolled", run, must=musts[1], holds=run <= 1.1 or not is_promised, **named),
        ]
    )


def logit(logits: Any) -> Any:
    """A number per example, of logits."""
    return logits[:, -1, 1] - logits[:, -1, 2]


def power(x: Any) -> Any:
    """A number per example, of a residual stream."""
    return (x**2).mean((1, 2))


def trace_s(fn: Callable[..., Any], *args: Any) -> float:
    """Seconds to trace a function, which JAX has not seen before."""
    jax.clear_caches()
    start = time.perf_counter()
    jax.make_jaxpr(lambda *args: fn(*args))(*args)
    return time.perf_counter() - start


def tracing(name: str, lm: Any) -> bool:
    """Tracing harvested over tracing plain; the best of five each, in turn."""
    programs = {"plain": lm.forward, "harvested": harvest_sites(lm.forward, "resid_post")}
    tries = [{key: trace_s(fn, lm.params, SHORT) for key, fn in programs.items()} for _ in range(5)]
    seconds = {key: min(each[key] for each in tries) for key in programs}
    ratio = seconds["harvested"] / seconds["plain"]
    named = {f"{key}_s": value for key, value in seconds.items()}
    return report(f"trace harvested / plain, {name}", ratio, must="<= 1.3", holds=ratio <= 1.3, **named)


def nothing(name: str, lm: Any) -> bool:
    """StableHLO with nothing reaped and nothing planted is the plain function's."""

    def text(fn: Callable[..., Any]) -> str:
        def program(params: Any, tokens: Any) -> Any:
            return fn(params, tokens)

        return jax.jit(program).lower(lm.params, SHORT).as_text()

    plain = text(lm.forward)
    holds = True
    for what, fn in (
        ("reaping", lambda *args: harvest_sites(lm.forward, [])(*args)[0]),
        ("planting", intervene(lm.forward, {})),
    ):
        same = text(fn) == plain
        holds &= report(f"{what} nothing, StableHLO of {name}", float(same), must="identical", holds=same)
    return holds


def main() -> bool:
    """Measure and report."""
    lm, random = smollm2(), smollm2_width(n_layers=32)
    stacked, deep = lm.stacked(), random.stacked()
    holds = [
        nothing("SmolLM2-135M", lm),
        nothing("SmolLM2-135M, stacked", stacked),
        tracing("SmolLM2-135M", lm),
        tracing("SmolLM2-135M, stacked", stacked),
        slots("32 layers at SmolLM2's width", deep),
        slots("SmolLM2-135M, stacked", stacked),
        gradients(
            "32 layers in plain JAX",
            plain_transformer(is_stacked=False),
            plain_transformer(is_stacked=True),
            np.random.default_rng(1).normal(size=(2, 64, 256)).astype(np.float32),
            power,
            is_promised=True,
        ),
        gradients("32 layers at SmolLM2's width", random, deep, TOKENS, logit, is_promised=False),
    ]
    return all(holds)
