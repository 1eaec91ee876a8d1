"""Promises of stacked layers: a deep model compiles like one layer, runs no slower, and the loop stays cheap.

A Llama of random weights, 32 layers at the width of SmolLM2-135M, and SmolLM2-135M itself, 30 layers of real weights.
Compiling is measured cold at 32 tokens, running at 256. XLA's CPU backend generates code once for equal kernels, so an
unrolled model costs it little more than its unlike kernels do; what stacking saves there is tracing and lowering.

Source: design page, section 3.5.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import compare, report
from benchmarks.models import smollm2, smollm2_width
from interp_jax.transforms.compilations import count_compilations

SHORT, LONG = (np.arange(1000, 1000 + n, dtype=np.int32)[None] for n in (32, 256))


def loss(lm: Any) -> Callable[[Any, Any], Any]:
    """Mean log probability of the next token."""

    def of_params(params: Any, tokens: Any) -> Any:
        log_p = jax.nn.log_softmax(lm.forward(params, tokens)[:, :-1])
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean()

    return of_params


def compile_s(fn: Callable[..., Any], *args: Any) -> tuple[float, float]:
    """Seconds to trace and lower a function, and to compile it."""
    start = time.perf_counter()
    lowered = jax.jit(lambda *args: fn(*args)).lower(*args)
    middle = time.perf_counter()
    lowered.compile()
    return middle - start, time.perf_counter() - middle


def loop(lm: Any, layer: int) -> Any:
    """One pass that stops at one site in one layer, and changes it."""
    for _, _, value in (running_pass := lm.run(LONG, sites=f"{layer}.mlp_out")):
        running_pass.modified_value = value
    return running_pass.retval


def compiling(name: str, plain: Any, stacked: Any) -> bool:
    """Seconds of compiling, unrolled over stacked; the better of two tries each, so that no first use is counted."""
    holds = True
    for what, least in (("value and gradient", 10), ("forward", 3)):
        details, total = {}, {}
        for key, lm in (("stacked", stacked), ("unrolled", plain)):
            fn = lm.forward if what == "forward" else jax.value_and_grad(loss(lm))
            trace_s, xla_s = min((compile_s(fn, lm.params, SHORT) for _ in range(2)), key=sum)
            details |= {f"{key}_trace_and_lower_s": trace_s, f"{key}_xla_s": xla_s}
            total[key] = trace_s + xla_s
        ratio = total["unrolled"] / total["stacked"]
        promise = f"trace and compile {what}, {name}: unrolled / stacked"
        holds &= report(promise, ratio, must=f">= {least}", holds=ratio >= least, **details)
    return holds


def running(name: str, plain: Any, stacked: Any, *, rounds: int = 15) -> bool:
    """Seconds of running, stacked over unrolled, and the loop over plain forward."""
    n_layers = stacked.config.n_layers
    difference = float(jnp.abs(stacked(LONG) - plain(LONG)).max())
    loop(stacked, 5)
    with count_compilations() as moved:
        loop(stacked, n_layers - 3)
    holds = report(f"programs compiled when the layer moves, {name}", len(moved), must="0", holds=not moved)
    layers = iter(range(10**6))
    seconds = compare(
        {
            "unrolled": lambda: plain(LONG),
            "stacked": lambda: stacked(LONG),
            "loop": lambda: loop(stacked, next(layers) % n_layers),
        },
        rounds=rounds,
    )
    named = {f"{key}_s": value for key, value in seconds.items()}
    for what, one, other, most in (
        ("stacked / unrolled forward", "stacked", "unrolled", 1.05),
        ("loop over one site in one layer / stacked forward", "loop", "stacked", 1.15),
    ):
        ratio = seconds[one] / seconds[other]
        holds &= report(
            f"{what}, {name}", ratio, must=f"<= {most}", holds=ratio <= most, max_difference=difference, **named
        )
    return holds


def main() -> bool:
    """Measure and report."""
    random = smollm2_width(n_layers=32)
    holds = compiling("32 layers at SmolLM2's width", random, random.stacked())
    lm = smollm2()
    stacked = lm.stacked()
    holds &= compiling("SmolLM2-135M", lm, stacked)
    return running("SmolLM2-135M", lm, stacked) and holds
