"""Latents as Neuronpedia reads them: the batches of JSON that SAEDashboard writes.

    data = latent_dashboard(lm, sae, text.held_out, show=Show(n_top=30))
    neuronpedia_batches(data, "export", model_id="smollm2-135m", sae_set="res-4k")

A folder holds `batch-0.json` and so on, with as many latents each as asked for; `run_settings.json`, what they were
made with; and `skipped_indexes.json`, the latents that never fired, which are in no batch.

>>> neuronpedia_batches.__name__
'neuronpedia_batches'

Sharp edges: what was not measured is an empty list, as SAEDashboard leaves it: alignment with neurons, correlations
with neurons and other latents. An interval's `bin_contains` is its share of all tokens that count, the lowest one's
with the zeros, as there. Tokens are parts of sequences around the one an example is about.

Source: the layout of SAEDashboard's neuronpedia_dashboard.py (2026), as read in its public code.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from interp_jax.figures.sae_site import new_folder
from interp_jax.forward.batch_streams import check_positive
from interp_jax.methods.sae.dashboard import DashboardData, interval_edges
from interp_jax.methods.sae.examples import Examples
from interp_jax.methods.sae.logit_effects import N_BINS

_NOT_MEASURED = (
    *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
    *("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
    "decoder_weights_dist",
)


def neuronpedia_batches(
    data: DashboardData,
    directory: str | os.PathLike[str],
    *,
    model_id: str = "",
    sae_set: str = "",
    dataset: str = "",
    per_batch: int = 128,
    overwrite: bool = False,
) -> list[Path]:
    """Write the batches.

    Args:
        data: What was seen of the latents.
        directory: Where; a new or empty folder. It appears under its name when it is complete.
        model_id: Neuronpedia's name of the model; by default the model's own.
        sae_set: Its name of the set of SAEs.
        dataset: Its name of the text; by default the text's own.
        per_batch: Latents per file.
        overwrite: Whether to take the place of a folder that holds something.

    Returns:
        The batches' files.

    Raises:
        InvalidInputError: The folder is there and holds something, or `per_batch` is not positive.
    """
    check_positive(where="neuronpedia_batches", per_batch=per_batch)
    # Layer 0 also stands for sites of no layer, as in SAEDashboard.
    shared = {"model_id": model_id or data.model, "layer": data.read.layer or 0, "sae_set": sae_set}
    dataset = dataset or data.text
    alive = np.flatnonzero(data.n_fired > 0)
    with new_folder(directory, overwrite=overwrite, where="neuronpedia_batches") as folder:
        starts = range(0, len(alive), per_batch)
        for number, start in enumerate(starts):
            features = [_feature(data, row, dataset) for row in alive[start : start + per_batch].tolist()]
            _write(folder / f"batch-{number}.json", shared | {"features": features})
        dead = data.latents[data.n_fired == 0]
        _write(folder / "skipped_indexes.json", shared | {"skipped_indexes": dead.tolist()})
        settings = shared | {
            "huggingface_dataset_path": dataset,
            "n_prompts_total": data.n_sequences,
            "n_tokens_in_prompt": data.n_ctx,
            "n_features_at_a_time": per_batch,
            "n_quantiles": data.show.n_intervals,
            "quantile_group_size": data.show.n_per_interval,
            "top_acts_group_size": data.show.n_top,
            "sae": data.sae,
            "hook_point": str(data.read),
        }
        _write(folder / "run_settings.json", settings)
    return [Path(directory) / f"batch-{number}.json" for number in range(len(starts))]


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, allow_nan=False), encoding="utf-8")


def _feature(data: DashboardData, row: int, dataset: str) -> dict[str, Any]:
    largest, n_bars = float(data.largest[row]), data.counts.shape[1]
    feature: dict[str, Any] = {"feature_index": int(data.latents[row])} | {name: [] for name in _NOT_MEASURED}
    feature |= _logits(data, row)
    return feature | {
        "frac_nonzero": float(data.density[row]),
        "freq_hist_data_bar_values": _centres(0.0, largest, n_bars),
        "freq_hist_data_bar_heights": data.counts[row].tolist(),
        "n_prompts_total": data.n_sequences,
        "n_tokens_in_prompt": data.n_ctx,
        "dataset": dataset,
        "activations": _activations(data, row),
    }


def _logits(data: DashboardData, row: int) -> dict[str, Any]:
    effects = data.effects
    if effects is None:
        names = ("neg_str", "neg_values", "pos_str", "pos_values")
        return {name: [] for name in (*names, "logits_hist_data_bar_heights", "logits_hist_data_bar_values")}
    return {
        "neg_str": [data.texts[token] for token in effects.bottom_ids[row].tolist()],
        "neg_values": _rounded(effects.bottom[row]),
        "pos_str": [data.texts[token] for token in effects.top_ids[row].tolist()],
        "pos_values": _rounded(effects.top[row]),
        "logits_hist_data_bar_heights": effects.counts[row].tolist(),
        "logits_hist_data_bar_values": _centres(effects.bottom[row, 0], effects.top[row, 0], N_BINS),
    }


def _activations(data: DashboardData, row: int) -> list[dict[str, Any]]:
    """The strongest examples, then those of the intervals from the highest one down."""
    edges = interval_edges(data.largest[row : row + 1], data.show.n_intervals)[0]
    shares = data.interval_counts[row] / data.n_tokens
    shares[0] += 1 - data.density[row]
    found = _examples(data, Examples(*(column[row] for column in data.top)), (-1.0, float(data.largest[row]), -1.0))
    for number in reversed(range(data.show.n_intervals)):
        group = Examples(*(column[row, number] for column in data.samples))
        found += _examples(data, group, (float(edges[number]), float(edges[number + 1]), float(shares[number])))
    return found


def _examples(data: DashboardData, examples: Examples, group: tuple[float, float, float]) -> list[dict[str, Any]]:
    low, high, share = group
    low, high = _rounded([low, high])
    return [
        {
            "bin_min": low,
            "bin_max": high,
            "bin_contains": round(share, 5),
            "tokens": [data.texts[token] for token in tokens[tokens >= 0].tolist()],
            "values": _rounded(values[tokens >= 0]),
            "qualifying_token_index": int((tokens[: data.show.n_before] >= 0).sum()),
        }
        for sequence, tokens, values in zip(examples.sequence, examples.tokens, examples.values, strict=True)
        if sequence >= 0
    ]


def _centres(low: float, high: float, n_bars: int) -> list[float]:
    return _rounded(low + (high - low) * (np.arange(n_bars) + 0.5) / n_bars)


def _rounded(values: Any) -> list[float]:
    """Three digits after the point, as there, or more where that would leave nothing of small numbers."""
    values = np.asarray(values, np.float64)
    largest = np.abs(values).max(initial=0.0)
    digits = 3 if largest == 0 else max(3, 3 - int(np.floor(np.log10(largest))))
    return np.round(values, digits).tolist()
