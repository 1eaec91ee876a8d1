"""From a prompt to a circuit: which edges between heads and MLPs say whose name comes next?

Question: on an IOI pair whose second mention of the subject is replaced by a third name, which heads and MLPs of
SmolLM2-135M matter (exact patching), along which edges (EAP, EAP-IG), how few of these give the same answer (ACDC), and
which heads write it to the last residual, on whose word (path patching)?

Expected: a few hundred of some 70000 edges; heads that move names near the end, led by their queries.

Found: " Matthew" leads " Laura" by 5.41, and by -1.24 with " Scott" in place of the second " Laura". Without the MLP of
layer 0 all of that is gone (-6.64), without heads 20.0, 29.1, 23.3 or 17.4 much (-2.86, -1.85, -1.71, -1.63), and 29.0
works against it (+1.32). EAP-IG has a faithfulness of 0.95 with 939 of 70651 edges (0.09 with 523); EAP needs 9966 for
0.94. ACDC leaves 55 of the 939, which have 0.63, and can be read: heads 5.6, 8.0 and 8.1 tell the query of 17.4 what is
repeated; 17.4 and 18.6 tell the values of 20.0; 20.0 leads the queries of 23.0, 23.1, 23.2 and 23.7, which write the
name. 23.3 goes by way of the MLP of layer 24 and the values of 29.0 and 29.1. Thirteen minutes on two cores wanted by
ten other processes, ten of them ACDC; six minutes of processor time.

>>> Config().enough, SMOKE.pairs.family
(0.8, 'induction')

Sharp edges: ACDC costs one pass per edge, so it starts from the smallest circuit of EAP-IG that is faithful enough.
Effects and scores are those of corrupting: what carries the answer is negative.

Source: Wang et al. 2022 (2211.00593); Conmy et al. 2023 (2304.14997); Hanna et al. 2024 (2403.17806).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from interp_jax.configs.pairs import Pairs
from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.figures.activation_patching import patching_figure, patching_page
from interp_jax.figures.circuits import circuit_figure, circuit_page, faithfulness_figure
from interp_jax.forward.metrics import logit_difference
from interp_jax.forward.nodes import node_set
from interp_jax.methods.activation_patching import PatchingResult, activation_patching
from interp_jax.methods.circuits.acdc import ACDCResult, acdc
from interp_jax.methods.circuits.edge_attribution import EdgeAttributionResult, edge_attribution
from interp_jax.methods.circuits.evaluation import FaithfulnessResult, faithfulness
from interp_jax.methods.circuits.graph import Circuit
from interp_jax.methods.circuits.path_patching import PathPatchingResult, path_patching
from interp_jax.models.loading import load

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

METRIC = "logit(answer) − logit(wrong)"
_PAIRS = Pairs("ioi", n_pairs=1)


@dataclass(frozen=True)
class Config:
    """What is asked of which model.

    Args:
        model: Name or path, as in `load`.
        pairs: Which prompt pairs; what is reported is a mean over them.
        n_steps: Gradients that EAP-IG averages.
        sizes: Numbers of edges of the circuits whose faithfulness is measured.
        enough: The faithfulness at which a circuit is large enough for ACDC to start from.
        threshold: How much the divergence from the whole model may rise per edge that ACDC removes, in nats.
        n_movers: How many of the heads with the largest direct effects are asked whose word they take.
    """

    model: str = "smollm2-135m"
    pairs: Pairs = _PAIRS
    n_steps: int = 5
    sizes: tuple[int, ...] = (50, 100, 200, 300, 400, 600, 800, 1000, 3000, 10000)
    enough: float = 0.8
    threshold: float = 0.01
    n_movers: int = 3


SMOKE = Config(
    model="tests/oracles/tiny_llama",
    pairs=Pairs("induction"),
    n_steps=2,
    sizes=(10, 40, 80),
    enough=0.5,
    threshold=1e-4,
    n_movers=1,
)


@dataclass(frozen=True)
class Result:
    """What was found.

    Args:
        model: The model's name.
        prompts: The clean and the corrupted prompt of the first pair.
        nodes: Effects of corrupting each head's output and each MLP, exactly.
        edges: Scores of all edges, by "eap" and "eap_ig".
        curves: Faithfulness of the circuits of each size, by the same names.
        start: The smallest of EAP-IG's that is faithful enough.
        pruned: What ACDC left of it.
        circuit: That without the edges that lead nowhere.
        faithful: Faithfulness of `start` and `circuit`.
        movers: The heads of the circuit with the largest direct effects on the logits.
        direct: Effects of the circuit's heads and MLPs through their direct paths to the logits.
        informants: Their effects through their direct paths to the movers' queries.
        seconds: How long each step took, compiling included.
    """

    model: str
    prompts: tuple[str, str]
    nodes: PatchingResult
    edges: Mapping[str, EdgeAttributionResult]
    curves: Mapping[str, FaithfulnessResult]
    start: Circuit
    pruned: ACDCResult
    circuit: Circuit
    faithful: FaithfulnessResult
    movers: tuple[str, ...]
    direct: PathPatchingResult
    informants: PathPatchingResult
    seconds: Mapping[str, float]

    def __repr__(self) -> str:
        found = zip(("EAP-IG", "after ACDC"), (self.start, self.circuit), self.faithful.faithfulness, strict=True)
        lines = [f"{self.model}: {self.prompts[0]!r}"]
        lines += [f"  {name}: {circuit.n_edges} edges, faithfulness {value:.2f}" for name, circuit, value in found]
        for name, result in (("logits", self.direct), ("queries of " + ", ".join(self.movers), self.informants)):
            top = ", ".join(f"{node} {effect:+.2f}" for node, effect in strongest(result, 5))
            lines.append(f"  directly to {name}: {top}")
        return "\n".join(lines)


def run(config: Config, *, lm: LanguageModel | None = None, progress: bool = True) -> Result:
    """Answer the question.

    Args:
        config: What is asked.
        lm: The model, if it is loaded already.
        progress: Whether to show progress bars, on a terminal.

    Returns:
        The circuit, and every step to it.

    Raises:
        UnknownNameError: There is no such family of pairs.
        InvalidInputError: No circuit of these sizes is faithful enough.
    """
    model = load(config.model) if lm is None else lm
    pairs = config.pairs.make(model)
    metric = logit_difference(pairs.answer, pairs.wrong)
    clean, corrupted = pairs.clean, pairs.corrupted
    seconds: dict[str, float] = {}
    with _timed("nodes", seconds):
        every = node_set(model, clean, ["z", "mlp_out"], is_pooled=True)
        nodes = activation_patching(model, clean, corrupted, metric, every, progress=progress)
    edges, curves = {}, {}
    for method in ("eap", "eap_ig"):
        with _timed(method, seconds):
            edges[method] = edge_attribution(
                model, clean, corrupted, metric, method=method, n_steps=config.n_steps, progress=progress
            )
        with _timed(f"faithfulness of {method}", seconds):
            circuits = [edges[method].top(n).pruned() for n in config.sizes]
            curves[method] = faithfulness(model, clean, corrupted, metric, circuits, progress=progress)
    start = _first_faithful(config, circuits, curves["eap_ig"])
    with _timed("acdc", seconds):
        pruned = acdc(model, clean, corrupted, threshold=config.threshold, start=start, progress=progress)
    circuit = pruned.circuit.pruned()
    faithful = faithfulness(model, clean, corrupted, metric, [start, circuit], progress=False)
    with _timed("path patching", seconds):
        senders = [node.name for node in circuit.senders]
        direct = path_patching(model, clean, corrupted, metric, receivers="logits", senders=senders, progress=progress)
        heads = [name for name, _ in strongest(direct, len(senders)) if "head" in name]
        movers = tuple(heads[: config.n_movers])
        informants = path_patching(
            model,
            clean,
            corrupted,
            metric,
            receivers=[f"{head}.q" for head in movers],
            senders=senders,
            progress=progress,
        )
    return Result(
        model=model.name or config.model,
        prompts=(pairs.clean_texts[0], pairs.corrupted_texts[0]),
        nodes=nodes,
        edges=edges,
        curves=curves,
        start=start,
        pruned=pruned,
        circuit=circuit,
        faithful=faithful,
        movers=movers,
        direct=direct,
        informants=informants,
        seconds=seconds,
    )


def strongest(result: PathPatchingResult, n: int) -> list[tuple[str, float]]:
    """The senders with the largest effects, whatever their sign, and their mean effects.

    Args:
        result: Of path patching, one sender a group.
        n: How many.

    Returns:
        Names and effects.
    """
    effects = result.effects.mean(1)
    order = np.argsort(-np.abs(effects), kind="stable")[:n]
    return [(result.senders[i][0], float(effects[i])) for i in order]


def plot(result: Result) -> dict[str, Any]:
    """The figures of a result, by file name.

    Args:
        result: What `run` returned.

    Returns:
        Matplotlib figures and HTML pages.
    """
    title, text, scores = result.model, "\n".join(result.prompts), result.edges["eap_ig"].scores
    return {
        "nodes.png": patching_figure(result.nodes, title=title, metric=METRIC),
        "nodes.html": patching_page(result.nodes, title=title, metric=METRIC, text=text),
        "circuit.png": circuit_figure(result.circuit, scores, title=title),
        "circuit.html": circuit_page(result.circuit, scores, title=title, text=text),
        "faithfulness_eap.png": faithfulness_figure(result.curves["eap"], title=f"{title}, EAP"),
        "faithfulness_eap_ig.png": faithfulness_figure(result.curves["eap_ig"], title=f"{title}, EAP-IG"),
    }


def _first_faithful(config: Config, circuits: list[Circuit], curve: FaithfulnessResult) -> Circuit:
    """The smallest circuit that is faithful enough, and not more than that by as much as it may lack."""
    for circuit, value in sorted(zip(circuits, curve.faithfulness, strict=True), key=lambda pair: pair[0].n_edges):
        if config.enough <= value <= 2 - config.enough:
            return circuit
    found = ", ".join(f"{n} edges {value:.2f}" for n, value in zip(curve.n_edges, curve.faithfulness, strict=True))
    raise InvalidInputError(
        four_part(
            f"No circuit of EAP-IG is faithful enough: {found}",
            where="ioi_circuit",
            expected=f"a faithfulness from {config.enough} to {2 - config.enough:g} for one of these sizes.",
            fix="ask for larger circuits (sizes), or for less (enough).",
        )
    )


@contextmanager
def _timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
