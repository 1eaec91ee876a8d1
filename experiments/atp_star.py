"""How well do AtP, AtP with the QK fix, GradDrop and AtP* find the nodes that exact patching finds?

Question: of all heads' queries, keys, values and outputs and all MLP neurons of SmolLM2-135M at the last position of
IOI prompts, which does each method rank high, and which of the 50 that matter most does it miss?

Expected: neurons are well estimated by all; AtP misses queries and keys of saturated heads, which the QK fix brings
back; GradDrop brings back nodes whose direct and indirect effects cancel, for one backward pass more per layer.

Found (46800 nodes, 3 pairs): at one position gradients are nearly right, and there is little to mend. Nobody misses any
of the true top 50. The QK fix makes queries and keys better and all 50 found; GradDrop costs more than it brings until
some 550 nodes are asked for: for the true top 1000, AtP* spends 1199 forward passes and AtP 1464. Without gradients the
top 50 cost 1903 passes at best, where AtP with the QK fix spends 52.

    method         rank correlation (q, k)    found of 50   cost   times the oracle's, K to 1000
    AtP            0.9999 (0.9978, 0.9969)    48             2      2.06
    AtP + QK fix   0.9999 (0.9998, 0.9999)    50             2      1.75
    GradDrop       0.9951 (0.9966, 0.9926)    47            62      5.90
    AtP*           0.9951 (0.9983, 0.9946)    49            62      5.64
    hierarchical                                          2048     57
    blocks                                                 732    177
    subsampling                                           1024    387
    random order                                             0   1631

The largest: the query of head 24.4 (2.4), the outputs of 23.3 (2.3), 20.0 (1.6), 24.4 (1.5), 29.1 (1.4). Of what AtP*
leaves unverified, 1024 random subsets say that nothing exceeds 0.22, at 99 %; the largest is 0.12. All of it took 9.6
minutes of processor time, figures and compiling included, and 12.3 minutes on two cores wanted by ten other processes:
the exact effects 9.3 of these, the baselines 1.4.

>>> Config().top_k, SMOKE.pairs.family
(50, 'induction')

Sharp edges: the exact effects are nearly all of the time; Ctrl-C there ends the experiment, and nothing is kept. Costs
are in forward passes, a backward pass taken as two; the two passes that every search needs count for none.

Source: Kramar et al. 2024 (2403.00745), section 4.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from interp_jax.configs.pairs import Pairs
from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.data.alignment import PromptPairs
from interp_jax.figures.activation_patching import patching_figure, patching_page
from interp_jax.figures.cost_recall import cost_figure, cost_page
from interp_jax.figures.estimate_scatter import scatter_figure, scatter_page
from interp_jax.forward.metrics import logit_difference
from interp_jax.forward.node_subsets import SubsetPatching, subset_patching
from interp_jax.forward.nodes import node_set
from interp_jax.methods.activation_patching import PatchingResult, activation_patching
from interp_jax.methods.atp import attribution_patching
from interp_jax.methods.cost_recall import CostRecallResult, cost_recall
from interp_jax.methods.node_diagnostics import (
    MissedNodesResult,
    VerificationResult,
    bound_missed_nodes,
    rank_correlation,
    verify_top_nodes,
)
from interp_jax.methods.node_search import blocks, by_scores, hierarchical, random_order, subsampling
from interp_jax.models.loading import load

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

METHODS = ("AtP", "AtP + QK fix", "GradDrop", "AtP*")
# In forward passes; GradDrop goes back once more for each layer.
_BACKWARD_COST = 2.0
_PAIRS = Pairs("ioi", n_pairs=3)


@dataclass(frozen=True)
class Config:
    """What is asked of which model.

    Args:
        model: Name or path, as in `load`.
        pairs: Which prompt pairs; what is reported is a mean over them.
        sites: Names of the sites whose nodes are compared.
        position: Where in the prompt.
        top_k: How many of the truly largest nodes must be found, and how many of its own each method has verified.
        missed_rank: From which rank on such a node counts as missed.
        max_k: The longest list of true nodes in the curve of cost against recall.
        n_subsets: How many random subsets tell subsampling where to look, and what the verified nodes leave unseen.
        probability: With which a node is in such a subset.
        block_size: Nodes per block of the search by blocks.
        n_children: Into how many parts the hierarchical search splits a group.
        n_splits: Forward passes the hierarchical search spends before it verifies node by node.
    """

    model: str = "smollm2-135m"
    pairs: Pairs = _PAIRS
    sites: tuple[str, ...] = ("q", "k", "v", "z", "mlp_post")
    position: int = -1
    top_k: int = 50
    missed_rank: int = 200
    max_k: int = 1000
    n_subsets: int = 1024
    probability: float = 0.03
    block_size: int = 64
    n_children: int = 8
    n_splits: int = 2048


SMOKE = Config(
    model="tests/oracles/tiny_llama",
    pairs=Pairs("induction", n_pairs=2),
    sites=("q", "k", "mlp_post"),
    top_k=10,
    missed_rank=20,
    max_k=60,
    n_subsets=64,
    probability=0.2,
    block_size=8,
    n_children=4,
    n_splits=40,
)


@dataclass(frozen=True)
class Comparison:
    """One method against the truth.

    Args:
        scores: What the method ranks nodes by, `[pair, node]`.
        spearman: Rank correlation of mean scores and contributions, over all nodes.
        spearman_of_pairs: The same pair by pair, `[pair]`.
        spearman_of_sites: The same among the nodes of one name of site.
        found: How many of the true `top_k` are among the method's own.
        missed: The true `top_k` nodes that the method ranks beyond `missed_rank`, with true and estimated rank from 1.
        verified: Its own `top_k` nodes, patched for real.
        curve: What it spends until it has the true top K.
        cost: What its scores cost, in forward passes per pair.
    """

    scores: np.ndarray
    spearman: float
    spearman_of_pairs: np.ndarray
    spearman_of_sites: Mapping[str, float]
    found: int
    missed: tuple[tuple[str, int, int], ...]
    verified: VerificationResult
    curve: CostRecallResult
    cost: float

    @property
    def contribution(self) -> np.ndarray:
        """Mean score over the pairs, `[node]`."""
        return self.scores.mean(0)


@dataclass(frozen=True)
class Result:
    """What was found.

    Args:
        model: The model's name.
        prompts: The clean prompts.
        exact: The truth.
        methods: Each method against it.
        baselines: The curves of the searches that need no gradient, by name.
        bound: How large the effect of a node can still be that AtP* does not have among its verified ones.
        top: The truly largest nodes, with their contribution.
        seconds: How long the exact effects took, the scores (AtP with and without the QK fix come with GradDrop), and
            the baselines, with the bound.
    """

    model: str
    prompts: tuple[str, ...]
    exact: PatchingResult
    methods: Mapping[str, Comparison]
    baselines: Mapping[str, CostRecallResult]
    bound: MissedNodesResult
    top: tuple[tuple[str, float], ...]
    seconds: Mapping[str, float]

    def __repr__(self) -> str:
        lines = [f"{'method':<13}{'spearman':>9}{'found':>7}{'missed':>8}{'cost':>7}{'times the oracle':>18}"]
        for name, one in self.methods.items():
            lines.append(
                f"{name:<13}{one.spearman:>9.3f}{one.found:>7}{len(one.missed):>8}{one.cost:>7.0f}"
                f"{one.curve.score:>18.3g}"
            )
        lines += [f"{name:<44}{curve.score:>18.3g}" for name, curve in self.baselines.items()]
        return "\n".join(lines)


def run(
    config: Config, *, lm: LanguageModel | None = None, exact: PatchingResult | None = None, progress: bool = True
) -> Result:
    """Answer the question.

    Args:
        config: What is asked.
        lm: The model, if it is loaded already.
        exact: The exact effects of this very configuration, or the part of them that an earlier call has.
        progress: Whether to show a progress bar, on a terminal.

    Returns:
        The truth, and each method against it.

    Raises:
        UnknownNameError: There is no such family of pairs.
        InvalidInputError: `top_k`, `missed_rank` or `max_k` is out of range, or Ctrl-C came before the truth was known.
    """
    model = load(config.model) if lm is None else lm
    pairs = config.pairs.make(model)
    metric = logit_difference(pairs.answer, pairs.wrong)
    nodes = node_set(model, pairs.clean, config.sites, positions=[config.position])
    _check_ranks(config, nodes.n_nodes)

    start = time.perf_counter()
    exact = activation_patching(model, pairs.clean, pairs.corrupted, metric, nodes, resume=exact, progress=progress)
    seconds = {"exact": time.perf_counter() - start}
    if not exact.is_complete:
        raise InvalidInputError(
            four_part(
                f"The exact effects were interrupted: {exact!r}",
                where="atp_star",
                expected="all of them: what is missed is measured against them.",
                fix="run it again, with fewer pairs if it takes too long.",
            )
        )
    scores: dict[str, np.ndarray] = {}
    for qk_fix, (plain, dropped) in {False: ("AtP", "GradDrop"), True: ("AtP + QK fix", "AtP*")}.items():
        start = time.perf_counter()
        found = attribution_patching(model, pairs.clean, pairs.corrupted, metric, nodes, qk_fix=qk_fix)
        # The estimates that GradDrop starts from are those of AtP.
        scores |= {plain: np.abs(found.estimates), dropped: found.scores}
        seconds[dropped] = time.perf_counter() - start

    backwards = {"GradDrop": 1 + _n_layers(model, pairs), "AtP*": 1 + _n_layers(model, pairs)}
    methods = {
        name: compare(config, exact, scores[name], name, cost=_BACKWARD_COST * backwards.get(name, 1))
        for name in METHODS
    }
    start = time.perf_counter()
    subsets = subset_patching(model, pairs.clean, pairs.corrupted, metric, nodes, rows_per_step=config.n_children)
    baselines = search_without_gradients(config, exact, subsets)
    bound = bound_missed_nodes(
        subsets,
        nodes.n_nodes,
        n_subsets=config.n_subsets,
        probability=config.probability,
        seed=config.pairs.seed,
        verified=methods["AtP*"].verified.nodes,
    )
    seconds["baselines"] = time.perf_counter() - start
    order = exact.nodes.order(exact.contribution)[: config.top_k]
    return Result(
        model=model.name or config.model,
        prompts=pairs.clean_texts,
        exact=exact,
        methods=methods,
        baselines=baselines,
        bound=bound,
        top=tuple((str(nodes[int(i)]), float(exact.contribution[i])) for i in order),
        seconds=seconds,
    )


def compare(config: Config, exact: PatchingResult, scores: np.ndarray, name: str, *, cost: float) -> Comparison:
    """One method's scores against the exact effects.

    Args:
        config: What counts as found.
        exact: The exact effects.
        scores: The method's, `[pair, node]`.
        name: Of the method.
        cost: What its scores cost, in forward passes.

    Returns:
        The comparison.
    """
    nodes, truth, mean = exact.nodes, exact.contribution, scores.mean(0)
    search = by_scores(mean, n_forwards=0, n_backwards=cost / _BACKWARD_COST, method=name)
    rank = np.empty(nodes.n_nodes, int)
    rank[search.order] = np.arange(1, nodes.n_nodes + 1)
    top = nodes.order(truth)[: config.top_k]
    missed = [(str(nodes[int(i)]), at, int(rank[i])) for at, i in enumerate(top, 1) if rank[i] > config.missed_rank]
    return Comparison(
        scores=scores,
        spearman=rank_correlation(mean, truth),
        spearman_of_pairs=np.array(
            [rank_correlation(*each) for each in zip(scores, np.abs(exact.effects), strict=True)]
        ),
        spearman_of_sites={
            group.name: rank_correlation(mean[ids.start : ids.stop], truth[ids.start : ids.stop])
            for group, ids in nodes.with_ids()
        },
        found=int((rank[top] <= config.top_k).sum()),
        missed=tuple(missed),
        verified=verify_top_nodes(mean, lambda ids: exact.effects[:, ids], top_k=config.top_k),
        curve=_curve(config, exact, search.cost_of, name),
        cost=cost,
    )


def search_without_gradients(
    config: Config, exact: PatchingResult, subsets: SubsetPatching
) -> dict[str, CostRecallResult]:
    """The baselines: what searches spend that know nothing but the effects of sets of nodes.

    Args:
        config: How many sets they may patch.
        exact: The exact effects.
        subsets: What patching a set of nodes does.

    Returns:
        Their curves, by name.
    """
    n_nodes, seed = exact.nodes.n_nodes, config.pairs.seed

    def contribution(masks: np.ndarray) -> np.ndarray:
        return np.abs(subsets.per_pair(masks)).mean(0)

    searches = (
        subsampling(subsets, n_nodes, n_subsets=config.n_subsets, probability=config.probability, seed=seed),
        blocks(contribution, n_nodes, block_size=config.block_size, seed=seed),
        hierarchical(contribution, n_nodes, n_children=config.n_children, max_forwards=config.n_splits, seed=seed),
        random_order(n_nodes, seed=seed),
    )
    return {search.method: _curve(config, exact, search.cost_of, search.method) for search in searches}


def plot(result: Result) -> dict[str, Any]:
    """The figures of a result, by file name.

    Args:
        result: What `run` returned.

    Returns:
        Matplotlib figures and HTML pages.
    """
    title, nodes = result.model, result.exact.nodes
    estimates = {name: one.contribution for name, one in result.methods.items()}
    curves = [*(one.curve for one in result.methods.values()), *result.baselines.values()]
    figures: dict[str, Any] = {
        "scatter.png": scatter_figure(estimates, result.exact.contribution, nodes, title=title),
        "scatter.html": scatter_page(estimates, result.exact.contribution, nodes, title=title),
        "cost_recall.png": cost_figure(curves, title=title),
        "cost_recall.html": cost_page(curves, title=title),
    }
    if any(group.name in ("q", "k", "v", "z") for group in nodes.groups):
        figures |= {
            "heads.png": patching_figure(result.exact, title=title, metric="the logit difference"),
            "heads.html": patching_page(result.exact, title=title, metric="the logit difference"),
        }
    return figures


def _curve(config: Config, exact: PatchingResult, cost_of: np.ndarray, name: str) -> CostRecallResult:
    return cost_recall(exact.contribution, cost_of, max_k=min(config.max_k, exact.nodes.n_nodes), method=name)


def _n_layers(lm: LanguageModel, pairs: PromptPairs) -> int:
    return len({site.layer for site in lm.sites(pairs.clean).sites if site.layer is not None})


def _check_ranks(config: Config, n_nodes: int) -> None:
    wrong = [
        f"{name}={getattr(config, name)}"
        for name in ("top_k", "missed_rank", "max_k")
        if not 1 <= getattr(config, name) <= n_nodes
    ]
    if wrong:
        raise InvalidInputError(
            four_part(
                f"{', '.join(wrong)} was given",
                where="atp_star",
                expected=f"numbers of nodes, from 1 to {n_nodes}.",
                fix="choose numbers in that range, or compare more sites.",
            )
        )
