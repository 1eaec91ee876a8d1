"""Promises of activation streams: no suffix of the model is run, shuffling and reading from disk cost little.

SmolLM2-135M on the documentation of Python, sequences of 128 tokens.

Source: issue "Sparse autoencoders"; design page, section 4.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import compare, report
from benchmarks.models import smollm2
from interp_jax.data.text_streams import Packed, pack, packed_rows
from interp_jax.forward.activation_files import write_activations
from interp_jax.forward.batch_streams import ArrayStream, BatchStream
from interp_jax.forward.shards import ShardStream
from interp_jax.forward.site_values import site_reader
from interp_jax.forward.store import ActivationStream, Buffer
from interp_jax.methods.sae.top_k import TopK
from interp_jax.methods.sae.train_step import StepRule, init_state, step

N_CTX, LAYER, D_MODEL = 128, "5.resid_post", 576


def prefix(packed: Packed) -> bool:
    """Reading layer 5 of 30 over reading the last layer."""
    tokens, mask = packed[:16], np.ones((16, N_CTX), bool)
    all_hold = True
    for lm, form in ((smollm2(), "unrolled"), (smollm2().stacked(), "stacked")):
        first, last = (site_reader(lm, site, n_ctx=N_CTX).read for site in (LAYER, "29.resid_post"))
        timed = compare(
            {
                "layer_5": lambda first=first, lm=lm: first(lm.params, tokens, mask),
                "layer_29": lambda last=last, lm=lm: last(lm.params, tokens, mask),
            },
            rounds=5,
            warm_up=1,
        )
        ratio = timed["layer_5"] / timed["layer_29"]
        all_hold &= report(
            f"reading layer 5 / reading layer 29 of 30, {form}, SmolLM2-135M",
            ratio,
            must="<= 0.25",
            holds=ratio <= 0.25,
            **{f"{name}_s": seconds for name, seconds in timed.items()},
        )
    return all_hold


def store(packed: Packed) -> bool:
    """Shuffled batches over the passes they are made of."""
    lm, n_sequences = smollm2(), 16
    buffer = Buffer(n_rows=2**14, sequences_per_pass=n_sequences)
    stream = ActivationStream(lm, packed, LAYER, batch_size=1024, buffer=buffer)
    reader = site_reader(lm, LAYER, n_ctx=N_CTX)
    tokens, mask = packed[:n_sequences], np.ones((n_sequences, N_CTX), bool)
    stream.next_batch()
    in_stream, in_passes, n_rows = 0.0, 0.0, 0
    for _ in range(4):
        before, start = stream.n_sequences_read, time.perf_counter()
        while stream.n_sequences_read == before or n_rows % 8192:
            stream.next_batch()
            n_rows += 1024
        in_stream += time.perf_counter() - start
        start = time.perf_counter()
        for _ in range((stream.n_sequences_read - before) // n_sequences):
            jax.block_until_ready(reader.read(lm.params, tokens, mask))
        in_passes += time.perf_counter() - start
    ratio = in_stream / in_passes
    return report(
        "shuffled batches of layer 5 / the passes they are made of, SmolLM2-135M",
        ratio,
        must="<= 1.15",
        holds=ratio <= 1.15,
        rows_per_s=n_rows / in_stream,
        rows=n_rows,
    )


def training_seconds(stream: BatchStream, name: str, n_steps: int) -> float:
    """Seconds per training step (TopK, 16384 latents, batch 4096) on a stream, the first one not counted."""
    rule = StepRule(TopK(k=32))
    state = init_state(rule, TopK(k=32).init(jax.random.key(0), d_in=D_MODEL, n_latents=16384))
    start = 0.0
    for number in range(n_steps + 1):
        if number == 1:
            start = time.perf_counter()
        state, _ = step(rule, state, jnp.asarray(stream.next_batch()[name]), None, jnp.asarray(0.0))
        jax.block_until_ready(state.params)
    return (time.perf_counter() - start) / n_steps


def disk(packed: Packed) -> bool:
    """What waiting for batches adds to training when they come from disk."""
    lm, packed = smollm2(), packed_rows(packed[:192])
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path = write_activations(lm, packed, LAYER, f"{folder}/rows", shard_bytes=2**25, sequences_per_pass=16)
        written_s = time.perf_counter() - start
        with ShardStream(path, read_ahead=0) as stream:
            n_rows = stream.manifest.n_rows
            n_batches = n_rows // stream.batch_size
            for _ in range(2 * n_batches):  # The first epoch also checks the files.
                stream.next_batch()
            alone = stream.throughput
        with ShardStream(path) as stream:
            with_stream = training_seconds(stream, LAYER, 6)
            waiting = stream.throughput
    share = waiting.seconds / 6 / with_stream
    return report(
        "waiting for batches from disk / training, TopK, 16384 latents, batch 4096",
        share,
        must="<= 0.2",
        holds=share <= 0.2,
        step_s=with_stream,
        share_without_thread=4096 / alone.rows_per_s / with_stream,
        alone_rows_per_s=alone.rows_per_s,
        alone_MB_per_s=alone.rows_per_s * D_MODEL * 4 / 1e6,
        written_rows=n_rows,
        written_rows_per_s=n_rows / written_s,
    )


def arrays() -> bool:
    """An array as a stream costs hardly more than picking its rows."""
    rows = np.random.default_rng(0).standard_normal((2**17, D_MODEL), np.float32)
    stream: Any = ArrayStream(rows, batch_size=4096)
    order = np.random.default_rng(0).permutation(2**17)[:4096]
    timed = compare({"stream": stream.next_batch, "rows": lambda: rows.take(order, axis=0)}, rounds=25)
    ratio = timed["stream"] / timed["rows"]
    return report("a batch of an array stream / picking its rows", ratio, must="<= 2", holds=ratio <= 2, **timed)


def main() -> bool:
    """Measure and report."""
    packed = pack("pydoc", smollm2(), n_ctx=N_CTX).train
    return all([prefix(packed), store(packed), disk(packed), arrays()])
