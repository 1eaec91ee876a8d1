"""`check`: run the site contracts on a model, or on any function with sites, and say what fails and where to look.

Besides the contracts of `interp_jax.models.contracts` it proves that nobody is disturbed by the tags: the program
with tags lowers to the same StableHLO as the one without, a pass that puts every value back gives the same result
bit for bit, a pass gives what the compiled function gives, and a change of a site does reach the result.

>>> import jax.numpy as jnp
>>> from interp_jax.transforms.sowing import layer_scope, sow
>>> def model(x):
...     with layer_scope(0):
...         x = sow(x, name="resid_pre")
...         write = sow(jnp.sin(x), name="mlp_out")
...         return sow(x + 2 * write, name="resid_post")
>>> report = check(model, jnp.ones((1, 3, 4)), name="my model")
>>> report.ok
False
>>> print(report.failures[0].contract, "|", report.failures[0].detail)
resid_post = resid_pre + writes | off by 0.841 at 0.resid_post, where 8.78e-07 is allowed (1 of 1 fails)

Sharp edges: contracts apply if the sites and weights they speak of are there; the report says which did not. The
passes run in the highest matmul precision, so on an accelerator a model is compiled afresh for its check.

Source: interp_jax.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from interp_jax.core.activations import SiteTable
from interp_jax.core.interventions import describe
from interp_jax.core.sites import Site
from interp_jax.models.contracts import CONTRACTS, Contract, Evidence
from interp_jax.models.upstream import PAD, ModelConfig, Upstream
from interp_jax.transforms import running_pass
from interp_jax.transforms.compilations import counted_jit


@dataclass(frozen=True)
class Outcome:
    """What became of one contract.

    Args:
        contract: The identity, in words or symbols.
        ok: Whether it holds; None if it does not apply.
        detail: By how much it fails and where, or how often it held, or why it does not apply.
        hint: For a failing one, where in the patch set or the function to look.
    """

    contract: str
    ok: bool | None
    detail: str
    hint: str = ""


@dataclass(frozen=True)
class CheckReport:
    """The contracts of one model with their outcomes; prints as a table.

    Args:
        name: The model's name.
        outcomes: One per contract.
    """

    name: str
    outcomes: tuple[Outcome, ...]

    @property
    def ok(self) -> bool:
        """Whether every contract that applies holds."""
        return not self.failures

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The contracts that do not hold."""
        return tuple(outcome for outcome in self.outcomes if outcome.ok is False)

    def __str__(self) -> str:
        width = max((len(outcome.contract) for outcome in self.outcomes), default=0)
        lines = [self._headline()]
        for outcome in self.outcomes:
            lines.append(f"  {_WORDS[outcome.ok]:<5}  {outcome.contract:<{width}}  {outcome.detail}")
            if outcome.hint:
                lines.append(f"         look at {outcome.hint}")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{_WORDS[o.ok]}</td><td>{html.escape(o.contract)}</td><td>{html.escape(o.detail)}</td>"
            f"<td>{html.escape(o.hint)}</td></tr>"
            for o in self.outcomes
        )
        return f"<table><caption>{html.escape(self._headline())}</caption>{rows}</table>"

    def _headline(self) -> str:
        n_applied = sum(outcome.ok is not None for outcome in self.outcomes)
        n_failed = len(self.failures)
        verdict = (
            f"all {n_applied} hold." if not n_failed else f"{n_failed} of {n_applied} fail{'s' * (n_failed == 1)}."
        )
        return f"Site contracts of {self.name}: {verdict}"


_WORDS = {True: "holds", False: "FAILS", None: "-"}


def check(
    fn: Callable[..., Any],
    *args: Any,
    name: str = "",
    tokens: Any = None,
    config: ModelConfig | None = None,
    weight: Callable[[str, int | None], Any] | None = None,
    weight_names: tuple[str, ...] = (),
    decode: Callable[[Any], Any] | None = None,
    untagged: Callable[..., Any] | None = None,
    patch_set: Any = None,
) -> CheckReport:
    """Run the site contracts on any function with sites.

    Args:
        fn: The function.
        *args: Its arguments.
        name: What to call it in the report.
        tokens: The tokens among the arguments, `[batch, pos]`, for the contracts on masks.
        config: The model's shape, for the contracts that depend on it.
        weight: `(name, layer) -> array` under canonical names.
        weight_names: The weights there are.
        decode: `residual -> logits`: final norm and unembedding.
        untagged: `fn` without its tags.
        patch_set: The patch set `fn` runs under, for hints.

    Returns:
        The report.
    """
    name = name or getattr(fn, "__qualname__", type(fn).__name__)
    with jax.default_matmul_precision("highest"):
        table = running_pass.list_sites(fn, *args)
        values, result = _read_all(fn, args)
        evidence = Evidence(
            values=values,
            result=result,
            is_token=None if tokens is None else np.asarray(tokens) != PAD,
            config=config,
            weight=weight,
            weight_names=weight_names,
            decode=decode,
        )
        where = _Whereabouts(table, patch_set)
        outcomes = [
            _unheard(fn, untagged, args, patch_set),
            _nothing_changes(fn, args, result),
            _as_compiled(fn, args, result),
            _everything_counts(fn, args, values, result, where),
            _shapes(evidence, where),
            *(_judge(contract, evidence, where) for contract in CONTRACTS),
        ]
    return CheckReport(name, tuple(outcomes))


def check_model(
    upstream: Upstream, params: Any, config: ModelConfig | None = None, tokens: Any = None, *, name: str = ""
) -> CheckReport:
    """Run the site contracts on a model.

    Args:
        upstream: The model's functions.
        params: Its parameters.
        config: Its shape.
        tokens: Tokens to check on; by default two short rows, one of them padded.
        name: What to call it in the report.

    Returns:
        The report.
    """
    if tokens is None:
        d_vocab = 2 if config is None else config.d_vocab
        tokens = np.random.default_rng(0).integers(0, d_vocab, (2, 6)).astype(np.int32)
        tokens[1, :2] = PAD

    def weight(weight_name: str, layer: int | None) -> Any:
        if layer is None or weight_name in upstream.weights:
            return upstream.weights[weight_name](params)
        assert upstream.layer_params is not None
        return upstream.layer_weights[weight_name](upstream.layer_params(params, layer))

    def decode(residual: Any) -> Any:
        return _decode(upstream, params, residual)

    return check(
        upstream.forward,
        params,
        tokens,
        name=name or upstream.name,
        tokens=tokens,
        config=config,
        weight=weight,
        weight_names=upstream.weight_names if upstream.layer_params is not None else (),
        decode=None if upstream.ln_final is None or upstream.unembed is None else decode,
        untagged=upstream.untagged,
        patch_set=upstream.patch_set,
    )


def _decode_residual(upstream: Upstream, params: Any, residual: Any) -> Any:
    return upstream.unembed(params, upstream.ln_final(params, residual))  # type: ignore[misc]


_decode = counted_jit(_decode_residual, name="last lens view", static_argnums=0)


# Axes of the canonical sites, as the design page declares them.
_SHAPES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("embed", "pos_embed", "ln_final"), ("batch", "pos", "d_model")),
    **dict.fromkeys(("resid_pre", "resid_mid", "resid_post"), ("batch", "pos", "d_model")),
    **dict.fromkeys(("ln1", "attn_proj", "attn_out", "ln2", "mlp_proj", "mlp_out"), ("batch", "pos", "d_model")),
    **dict.fromkeys(("q", "rot_q", "z"), ("batch", "pos", "n_heads", "d_head")),
    **dict.fromkeys(("k", "v", "rot_k"), ("batch", "pos", "n_kv_heads", "d_head")),
    **dict.fromkeys(("attn_scores", "pattern"), ("batch", "n_heads", "pos", "pos")),
    **dict.fromkeys(("mlp_pre", "mlp_gate", "mlp_post"), ("batch", "pos", "d_mlp")),
    "logits": ("batch", "pos", "d_vocab"),
}


class _Whereabouts:
    """Where in the code each site's tag is."""

    def __init__(self, table: SiteTable, patch_set: Any):
        self._source = {row.site: row.source for row in table.rows}
        self._patch_set = patch_set

    def __call__(self, site: Site) -> str:
        # The patched form of a file carries a digest in its name.
        at = re.sub(r" [0-9a-f]{12}>", "", self._source.get(site, ""))
        if self._patch_set is None:
            return f"sow(..., name={site.name!r}) at {at}"
        return f"the tag {site.name!r} in patches/{_module_of(self._patch_set)}.py, which runs at {at}"


def _module_of(patch_set: Any) -> str:
    """The module a patch set lies in; that of stacked layers lies beside the other one, and says so in brackets."""
    return patch_set.name.partition(" ")[0]


def _read_all(fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[dict[Site, Any], Any]:
    """The value of every site, and the result."""
    values = {}
    with running_pass.run(fn, *args) as steps:
        for layer, name, value in steps:
            values[Site(layer, name)] = value
    return values, steps.retval


def _replaying(fn: Callable[..., Any], args: tuple[Any, ...], replace: Callable[[Site, Any], Any]) -> Any:
    """The result of a pass in which every value is replaced."""
    with running_pass.run(fn, *args) as steps:
        for layer, name, value in steps:
            steps.modified_value = replace(Site(layer, name), value)
    return steps.retval


def _n_different(one: Any, other: Any) -> int:
    """How many numbers differ between two results, NaN counting as equal to itself."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return sum(int((np.asarray(a) != np.asarray(b))[~(np.isnan(a) & np.isnan(b))].sum()) for a, b in pairs)


def _unheard(
    fn: Callable[..., Any], untagged: Callable[..., Any] | None, args: tuple[Any, ...], patch_set: Any
) -> Outcome:
    """Whether the tags vanish from the compiled program."""
    contract = "nobody listening: StableHLO is that without tags"
    if untagged is None:
        return Outcome(contract, None, "does not apply: needs the function without its tags")
    with_tags, without = stable_hlo(fn, *args), stable_hlo(untagged, *args)
    if with_tags == without:
        return Outcome(contract, True, f"{len(without):,} bytes equal")
    lines = list(zip(with_tags.splitlines(), without.splitlines(), strict=False))
    first = next((i for i, (a, b) in enumerate(lines) if a != b), len(lines))
    line = with_tags.splitlines()[first : first + 1] or ["(end)"]
    n_lines = [text.count("\n") for text in (with_tags, without)]
    where = (
        "" if patch_set is None else f"the tags in patches/{_module_of(patch_set)}.py: one of them computes something"
    )
    detail = f"{n_lines[0]} lines instead of {n_lines[1]}; first difference in line {first + 1}: {line[0].strip():.80}"
    return Outcome(contract, False, detail, where)


def stable_hlo(fn: Callable[..., Any], *args: Any) -> str:
    """The StableHLO text `jax.jit(fn)` lowers to on these `args`, whatever the names of its functions.

    JAX numbers private functions of one name as it meets them, some of them before it drops them; here they are
    numbered as they appear.
    """
    text = re.sub(r"^module @\S+", "module", jax.jit(fn).lower(*args).as_text())
    symbols = {name: i for i, name in enumerate(dict.fromkeys(re.findall(r"@[\w.]+", text)))}
    return re.sub(r"@[\w.]+", lambda found: f"{re.sub(r'_[0-9]+$', '', found[0])}_{symbols[found[0]]}", text)


def _nothing_changes(fn: Callable[..., Any], args: tuple[Any, ...], result: Any) -> Outcome:
    contract = "putting every value back changes nothing, bit for bit"
    n_different = _n_different(result, _replaying(fn, args, lambda site, value: value))
    if n_different:
        return Outcome(contract, False, f"{n_different} numbers of the result differ")
    return Outcome(contract, True, f"{sum(np.size(leaf) for leaf in jax.tree.leaves(result)):,} numbers equal")


def _as_compiled(fn: Callable[..., Any], args: tuple[Any, ...], result: Any) -> Outcome:
    """Whether a pass in pieces gives what one compiled program gives, up to rounding in other orders."""
    contract = "a pass gives what the compiled function gives"
    errors = [0.0]
    for one, other in zip(jax.tree.leaves(result), jax.tree.leaves(jax.jit(fn)(*args)), strict=True):
        a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
        errors.append(float(np.nanmax(np.abs(a - b), initial=0.0) / max(np.nanmax(np.abs(b), initial=0.0), 1e-30)))
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(result) if jax.numpy.issubdtype(leaf.dtype, np.inexact)}
    allowed = max([1e-4, *(8 * float(jax.numpy.finfo(dtype).eps) for dtype in dtypes)])
    detail = f"relative difference {max(errors):.3g}, {allowed:.3g} allowed"
    return Outcome(contract, max(errors) <= allowed, detail)


def _everything_counts(
    fn: Callable[..., Any], args: tuple[Any, ...], values: Mapping[Site, Any], result: Any, where: _Whereabouts
) -> Outcome:
    """Whether a site's value is used: zeroing it (or adding one to zeros) must change the result."""
    contract = "a change of a site reaches the result"
    by_name: dict[str, list[Site]] = {}
    for site in values:
        if site.name in _SHAPES:
            by_name.setdefault(site.name, []).append(site)
    unused = []
    for sites in by_name.values():
        target = sites[len(sites) // 2]

        def change(site: Site, value: Any, target: Site = target) -> Any:
            if site != target:
                return value
            return jax.tree.map(lambda leaf: leaf * 0 if np.any(np.asarray(leaf)) else leaf + 1, value)

        if not _n_different(result, _replaying(fn, args, change)):
            unused.append(target)
    if not by_name:
        return Outcome(contract, None, "does not apply: no site has a canonical name")
    if unused:
        names = ", ".join(map(str, unused))
        return Outcome(contract, False, f"not that of {names}: its value is read but not used", where(unused[0]))
    return Outcome(contract, True, f"{len(by_name)} sites, one layer each")


def _shapes(evidence: Evidence, where: _Whereabouts) -> Outcome:
    contract = "shapes are as declared"
    config, is_token = evidence.config, evidence.is_token
    if config is None or is_token is None:
        return Outcome(contract, None, "does not apply: needs a config and tokens")
    sizes = {**vars(config), "batch": is_token.shape[0], "pos": is_token.shape[1]}
    wrong, n_checked = [], 0
    for site, value in evidence.values.items():
        if (axes := _SHAPES.get(site.name)) is None:
            continue
        n_checked += 1
        if np.shape(value) != tuple(sizes[axis] for axis in axes):
            wrong.append((site, f"{site} is {describe(value)}, declared [{', '.join(axes)}]"))
    n_layers = config.n_layers
    if evidence.layers != list(range(n_layers)):
        layers = ", ".join(map(str, evidence.layers)) or "none"
        return Outcome(contract, False, f"sites in layers {layers}; the config has 0 to {n_layers - 1}")
    if wrong:
        return Outcome(contract, False, f"{wrong[0][1]} ({len(wrong)} of {n_checked} fail)", where(wrong[0][0]))
    return Outcome(contract, True, f"{n_checked} sites, {n_layers} layers")


def _judge(contract: Contract, evidence: Evidence, where: _Whereabouts) -> Outcome:
    try:
        findings = list(contract.measure(evidence))
    except (ValueError, LookupError) as error:
        # Arrays of unexpected shapes do not even broadcast: as good a sign of a misplaced tag as a wrong number.
        site = next((site for site in evidence.values if site.name == contract.sites[0]), Site(None, contract.sites[0]))
        return Outcome(contract.identity, False, f"could not be computed ({error!r:.200})", where(site))
    if not findings:
        needs = " ".join(contract.sites) + (f", {contract.needs}" if contract.needs else "")
        return Outcome(contract.identity, None, f"does not apply: needs {needs}")
    failed = [finding for finding in findings if not finding.error <= finding.allowed]
    if failed:
        worst = max(failed, key=lambda finding: finding.error)
        share = f"({len(failed)} of {len(findings)} fail{'s' * (len(failed) == 1)})"
        detail = f"off by {worst.error:.3g} at {worst.site}, where {worst.allowed:.3g} is allowed {share}"
        return Outcome(contract.identity, False, detail, where(worst.site))
    worst = max(findings, key=lambda finding: finding.error)
    return Outcome(contract.identity, True, f"{len(findings)} times, off by {worst.error:.3g} at most")
