"""Sparse autoencoders: from activations to a dictionary of latents, and back.

Source: Bricken et al. 2023, Towards Monosemanticity; the sources of each variant.
"""

from interp_jax.methods.sae.batch_top_k import BatchTopK
from interp_jax.methods.sae.dashboard import DashboardData, Show, latent_dashboard
from interp_jax.methods.sae.dead_latents import AuxK, GhostGrads
from interp_jax.methods.sae.evaluation import SAEEvaluation, evaluate_sae
from interp_jax.methods.sae.evaluation_each import evaluate_each
from interp_jax.methods.sae.files import export_saelens, load_sae, save_sae
from interp_jax.methods.sae.gated import Gated
from interp_jax.methods.sae.jump_relu import JumpReLU
from interp_jax.methods.sae.matching_pursuit import MatchingPursuit
from interp_jax.methods.sae.matryoshka import Matryoshka
from interp_jax.methods.sae.relu import ReLU
from interp_jax.methods.sae.resampling import Redraw, Resample
from interp_jax.methods.sae.sae import SAE
from interp_jax.methods.sae.sweep_setup import SweepSetup, run_sweep
from interp_jax.methods.sae.sweeps import SAESweep, sweep_saes
from interp_jax.methods.sae.top_k import TopK
from interp_jax.methods.sae.top_latents import TopLatents
from interp_jax.methods.sae.train_config import TrainConfig
from interp_jax.methods.sae.train_step import StepRule
from interp_jax.methods.sae.training import TrainResult, train
from interp_jax.methods.sae.variants import VARIANTS

__all__ = [
    "SAE",
    "VARIANTS",
    "AuxK",
    "BatchTopK",
    "DashboardData",
    "Gated",
    "GhostGrads",
    "JumpReLU",
    "MatchingPursuit",
    "Matryoshka",
    "ReLU",
    "Redraw",
    "Resample",
    "SAEEvaluation",
    "SAESweep",
    "Show",
    "StepRule",
    "SweepSetup",
    "TopK",
    "TopLatents",
    "TrainConfig",
    "TrainResult",
    "evaluate_each",
    "evaluate_sae",
    "export_saelens",
    "latent_dashboard",
    "load_sae",
    "run_sweep",
    "save_sae",
    "sweep_saes",
    "train",
]
