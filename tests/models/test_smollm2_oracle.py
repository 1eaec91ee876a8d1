"""SmolLM2-135M, as `load` gives it, against PyTorch on the same file: weights bit for bit, tokens, logits, top 5.

Source: interp_jax; tests/oracles/record_smollm2_torch.py recorded the numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.models.language_model import LanguageModel
from interp_jax.models.loading import load, read_checkpoint
from tests.models.weights.gguf_files import ORACLES

N_PROMPTS = 10
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def recorded() -> Mapping[str, np.ndarray]:
    with np.load(ORACLES / "smollm2_torch.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load("smollm2-135m")


@pytest.fixture(scope="module")
def logits(lm: LanguageModel, recorded: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """For each prompt its logits `[pos, d_vocab]`: the nine short ones as one padded batch, the long one alone."""
    prompts = recorded["prompts"].tolist()
    *short, long = prompts
    batch = np.asarray(lm(lm.tokenize(short)))
    alone = np.asarray(lm(lm.tokenize(long)))
    lengths = [len(recorded[f"tokens_{i}"]) for i in range(len(short))]
    return [row[-length:] for row, length in zip(batch, lengths, strict=True)] + [alone[0]]


def test_weights_are_those_transformers_reads_to_the_bit(recorded: Mapping[str, np.ndarray]):
    tensors = read_checkpoint("smollm2-135m").tensors
    names = recorded["weight_names"].tolist()
    assert set(tensors) == set(names)
    differ = [
        name
        for name, crc32 in zip(names, recorded["weight_crc32"].tolist(), strict=True)
        if zlib.crc32(np.ascontiguousarray(tensors[name]).data) != crc32
    ]
    assert differ == []


def test_tokens_are_those_of_transformers(lm: LanguageModel, recorded: Mapping[str, np.ndarray]):
    for i, prompt in enumerate(recorded["prompts"].tolist()):
        np.testing.assert_array_equal(lm.tokenize(prompt)[0], recorded[f"tokens_{i}"])
    assert len(recorded["prompts"]) == N_PROMPTS


@pytest.mark.parametrize("i", range(N_PROMPTS))
def test_logits_and_top_five_are_those_of_pytorch(i: int, logits: list[np.ndarray], recorded: Mapping[str, np.ndarray]):
    ours = logits[i]
    assert ours.shape == (len(recorded[f"tokens_{i}"]), 49152)
    np.testing.assert_allclose(ours[-1, recorded["last_ids"]], recorded[f"last_{i}"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(ours[:, recorded["every_ids"]], recorded[f"every_{i}"], rtol=0, atol=TOLERANCE)
    top = np.argsort(-ours[-1], kind="stable")[:5]
    np.testing.assert_array_equal(top, recorded[f"top_{i}"])
    np.testing.assert_allclose(ours[-1, top], recorded[f"top_logits_{i}"], rtol=0, atol=TOLERANCE)
    # Over the whole vocabulary: no row differs anywhere without showing in one of these.
    summary = np.stack([ours.mean(-1), ours.std(-1), ours.max(-1), jax.nn.logsumexp(jnp.asarray(ours), -1)], axis=-1)
    np.testing.assert_allclose(summary, recorded[f"summary_{i}"], rtol=0, atol=TOLERANCE)
