"""Activation steering: vectors added to the residual stream, what they make a model say, and what that costs.

Source: Turner et al. 2023, "Activation Addition: Steering Language Models Without Optimization" (2308.10248).
"""

from interp_jax.methods.steering.latents import LatentDifference, latent_direction, project_out
from interp_jax.methods.steering.pareto import dominates, pareto_frontier
from interp_jax.methods.steering.prompt_pair import PromptPair, prompt_pair, prompt_tokens
from interp_jax.methods.steering.spliced_loss import SplicedLoss, counted_targets, spliced_loss
from interp_jax.methods.steering.steered import (
    AddedSize,
    Sampling,
    SteeredGeneration,
    SteeredLogits,
    additions,
    steered_generation,
    steered_logits,
)
from interp_jax.methods.steering.steering_vector import PLACEMENTS, SteeringVector
from interp_jax.methods.steering.success import WEATHER, SuccessRate, Vocabulary, success_rate, wilson_interval
from interp_jax.methods.steering.sweep import SteeringResult, steering_sweep

__all__ = [
    "PLACEMENTS",
    "WEATHER",
    "AddedSize",
    "LatentDifference",
    "PromptPair",
    "Sampling",
    "SplicedLoss",
    "SteeredGeneration",
    "SteeredLogits",
    "SteeringResult",
    "SteeringVector",
    "SuccessRate",
    "Vocabulary",
    "additions",
    "counted_targets",
    "dominates",
    "latent_direction",
    "pareto_frontier",
    "project_out",
    "prompt_pair",
    "prompt_tokens",
    "spliced_loss",
    "steered_generation",
    "steered_logits",
    "steering_sweep",
    "success_rate",
    "wilson_interval",
]
