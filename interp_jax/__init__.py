"""interp_jax: read and change any intermediate value of a JAX language model somebody else wrote.

This is the front door: it only re-exports, and only when a name is first used, so importing it touches no device
and costs next to nothing. Nothing inside the package imports it.

>>> import interp_jax as ij
>>> def model(x):
...     return ij.sow(x + 1.0, name="hidden") * 2.0
>>> for layer, name, value in (running_pass := ij.run(model, 3.0)):
...     running_pass.modified_value = value * 10.0
>>> float(running_pass.retval)
80.0

Map and reading order, bottom up; each folder imports only from those above it in this list:

- `core`: the nouns. Sites and selectors, interventions, activations, results on disk, errors.
- `transforms`: function to function. `greenlets` (generators out of any call stack), `patcher` (syntax-tree
  patches for code we do not own), `harvest` (sow), `running_pass` (the loop and its two engines).
- `models`, `data`: `LanguageModel`, loading and weight files, tokenizers; prompts.
- `patches` (a top-level folder): one module per upstream model family.
- `forward`, `methods`, `figures`: sweeps, methods, pictures.
- `cli`: the `interp-jax` command.

Sharp edges: a name in `dir(interp_jax)` is imported at first use, so a missing dependency shows only then.

Source: PEP 562 for the module's `__getattr__`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp_jax.core.activations import Activations as Activations
    from interp_jax.core.errors import ExportError as ExportError
    from interp_jax.core.errors import InterleavingError as InterleavingError
    from interp_jax.core.errors import InterpError as InterpError
    from interp_jax.core.errors import InvalidInputError as InvalidInputError
    from interp_jax.core.errors import LoadError as LoadError
    from interp_jax.core.errors import PatchError as PatchError
    from interp_jax.core.errors import RunningPassError as RunningPassError
    from interp_jax.core.errors import ShapeError as ShapeError
    from interp_jax.core.errors import SiteNotReachedError as SiteNotReachedError
    from interp_jax.core.errors import UnknownNameError as UnknownNameError
    from interp_jax.core.errors import UnsupportedModelError as UnsupportedModelError
    from interp_jax.core.interventions import Added as Added
    from interp_jax.core.interventions import Masked as Masked
    from interp_jax.core.sites import Site as Site
    from interp_jax.data.alignment import PromptPairs as PromptPairs
    from interp_jax.data.alignment import align_prompts as align_prompts
    from interp_jax.data.documents import open_documents as open_documents
    from interp_jax.data.prompts import a_an_pairs as a_an_pairs
    from interp_jax.data.prompts import city_country_pairs as city_country_pairs
    from interp_jax.data.prompts import greater_than_pairs as greater_than_pairs
    from interp_jax.data.prompts import induction_pairs as induction_pairs
    from interp_jax.data.prompts import ioi_pairs as ioi_pairs
    from interp_jax.data.prompts import random_text_pairs as random_text_pairs
    from interp_jax.data.text_streams import pack as pack
    from interp_jax.data.text_streams import packed_rows as packed_rows
    from interp_jax.forward.activation_files import write_activations as write_activations
    from interp_jax.forward.batch_streams import ArrayStream as ArrayStream
    from interp_jax.forward.direct_stream import DirectStream as DirectStream
    from interp_jax.forward.metrics import logit_difference as logit_difference
    from interp_jax.forward.node_subsets import subset_patching as subset_patching
    from interp_jax.forward.nodes import NodeSet as NodeSet
    from interp_jax.forward.nodes import node_set as node_set
    from interp_jax.forward.shards import ShardStream as ShardStream
    from interp_jax.forward.site_values import Keep as Keep
    from interp_jax.forward.site_values import activations_of as activations_of
    from interp_jax.forward.splicing import spliced_logits as spliced_logits
    from interp_jax.forward.store import ActivationStream as ActivationStream
    from interp_jax.forward.store import Buffer as Buffer
    from interp_jax.forward.sweeps import scaled as scaled
    from interp_jax.forward.sweeps import sweep as sweep
    from interp_jax.methods import pursuit as pursuit
    from interp_jax.methods import sae as sae
    from interp_jax.methods import steering as steering
    from interp_jax.methods.activation_patching import ablation as ablation
    from interp_jax.methods.activation_patching import activation_patching as activation_patching
    from interp_jax.methods.atp import attribution_patching as attribution_patching
    from interp_jax.methods.circuits.acdc import acdc as acdc
    from interp_jax.methods.circuits.edge_attribution import edge_attribution as edge_attribution
    from interp_jax.methods.circuits.edge_model import edge_graph as edge_graph
    from interp_jax.methods.circuits.edge_passes import patched_edges as patched_edges
    from interp_jax.methods.circuits.edge_passes import sender_writes as sender_writes
    from interp_jax.methods.circuits.evaluation import faithfulness as faithfulness
    from interp_jax.methods.circuits.graph import Circuit as Circuit
    from interp_jax.methods.circuits.path_patching import path_patching as path_patching
    from interp_jax.methods.cost_recall import cost_recall as cost_recall
    from interp_jax.methods.direct_logit_attribution import direct_logit_attribution as direct_logit_attribution
    from interp_jax.methods.encoder_agreement import encoder_agreement as encoder_agreement
    from interp_jax.methods.layer_effects import layer_effects as layer_effects
    from interp_jax.methods.logit_lens import logit_lens as logit_lens
    from interp_jax.methods.node_diagnostics import bound_missed_nodes as bound_missed_nodes
    from interp_jax.methods.node_diagnostics import verify_top_nodes as verify_top_nodes
    from interp_jax.methods.sparsity_sweep import sparsity_sweep as sparsity_sweep
    from interp_jax.models.language_model import LanguageModel as LanguageModel
    from interp_jax.models.loading import load as load
    from interp_jax.transforms import greenlets as greenlets
    from interp_jax.transforms import harvest as harvest
    from interp_jax.transforms.compilations import compilations as compilations
    from interp_jax.transforms.harvest import harvest_sites as harvest_sites
    from interp_jax.transforms.harvest import intervene as intervene
    from interp_jax.transforms.harvest import layer_scope as layer_scope
    from interp_jax.transforms.harvest import loop_layer as loop_layer
    from interp_jax.transforms.harvest import reap_sites as reap_sites
    from interp_jax.transforms.harvest import site_gradients as site_gradients
    from interp_jax.transforms.harvest import site_vjp as site_vjp
    from interp_jax.transforms.harvest import sow as sow
    from interp_jax.transforms.layer_stack import scan_layers as scan_layers
    from interp_jax.transforms.layer_stack import stack_layers as stack_layers
    from interp_jax.transforms.layer_stack import unstack_layers as unstack_layers
    from interp_jax.transforms.patcher import Patcher as Patcher
    from interp_jax.transforms.patcher import PatchSet as PatchSet
    from interp_jax.transforms.running_pass import RunningPass as RunningPass
    from interp_jax.transforms.running_pass import list_sites as list_sites
    from interp_jax.transforms.running_pass import run as run

# Where each name lives. A test compares this table with the imports above.
_HOMES = {
    "interp_jax.core.activations": ("Activations",),
    "interp_jax.core.errors": (
        "ExportError",
        "InterleavingError",
        "InterpError",
        "InvalidInputError",
        "LoadError",
        "PatchError",
        "RunningPassError",
        "ShapeError",
        "SiteNotReachedError",
        "UnknownNameError",
        "UnsupportedModelError",
    ),
    "interp_jax.core.interventions": ("Added", "Masked"),
    "interp_jax.core.sites": ("Site",),
    "interp_jax.data.alignment": ("PromptPairs", "align_prompts"),
    "interp_jax.data.prompts": (
        "a_an_pairs",
        "city_country_pairs",
        "greater_than_pairs",
        "induction_pairs",
        "ioi_pairs",
        "random_text_pairs",
    ),
    "interp_jax.data.documents": ("open_documents",),
    "interp_jax.data.text_streams": (
        "pack",
        "packed_rows",
    ),
    "interp_jax.forward.activation_files": ("write_activations",),
    "interp_jax.forward.batch_streams": ("ArrayStream",),
    "interp_jax.forward.direct_stream": ("DirectStream",),
    "interp_jax.forward.shards": ("ShardStream",),
    "interp_jax.forward.site_values": (
        "Keep",
        "activations_of",
    ),
    "interp_jax.forward.splicing": ("spliced_logits",),
    "interp_jax.forward.store": (
        "ActivationStream",
        "Buffer",
    ),
    "interp_jax.forward.metrics": ("logit_difference",),
    "interp_jax.forward.node_subsets": ("subset_patching",),
    "interp_jax.forward.sweeps": ("scaled", "sweep"),
    "interp_jax.methods.circuits.acdc": ("acdc",),
    "interp_jax.methods.circuits.edge_attribution": ("edge_attribution",),
    "interp_jax.methods.circuits.edge_model": ("edge_graph",),
    "interp_jax.methods.circuits.edge_passes": ("patched_edges", "sender_writes"),
    "interp_jax.methods.circuits.evaluation": ("faithfulness",),
    "interp_jax.methods.circuits.graph": ("Circuit",),
    "interp_jax.methods.circuits.path_patching": ("path_patching",),
    "interp_jax.methods.cost_recall": ("cost_recall",),
    "interp_jax.forward.nodes": ("NodeSet", "node_set"),
    "interp_jax.methods.activation_patching": ("ablation", "activation_patching"),
    "interp_jax.methods.atp": ("attribution_patching",),
    "interp_jax.methods.direct_logit_attribution": ("direct_logit_attribution",),
    "interp_jax.methods.encoder_agreement": ("encoder_agreement",),
    "interp_jax.methods.layer_effects": ("layer_effects",),
    "interp_jax.methods.logit_lens": ("logit_lens",),
    "interp_jax.methods.pursuit": ("pursuit",),
    "interp_jax.methods.sae": ("sae",),
    "interp_jax.methods.steering": ("steering",),
    "interp_jax.methods.sparsity_sweep": ("sparsity_sweep",),
    "interp_jax.methods.node_diagnostics": ("bound_missed_nodes", "verify_top_nodes"),
    "interp_jax.models.language_model": ("LanguageModel",),
    "interp_jax.models.loading": ("load",),
    "interp_jax.transforms.compilations": ("compilations",),
    "interp_jax.transforms.greenlets": ("greenlets",),
    "interp_jax.transforms.harvest": (
        "harvest",
        "harvest_sites",
        "intervene",
        "layer_scope",
        "loop_layer",
        "reap_sites",
        "site_gradients",
        "site_vjp",
        "sow",
    ),
    "interp_jax.transforms.layer_stack": ("scan_layers", "stack_layers", "unstack_layers"),
    "interp_jax.transforms.patcher": ("PatchSet", "Patcher"),
    "interp_jax.transforms.running_pass": ("RunningPass", "list_sites", "run"),
}
_MODULES = ("greenlets", "harvest", "pursuit", "sae", "steering")
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll] - the names live in one table


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(home)
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
