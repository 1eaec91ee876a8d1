"""Sites and selectors, against a slow and obvious reading of what a selector means.

Source: interp_jax.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interp_jax.core.errors import UnknownNameError
from interp_jax.core.sites import Selector, Site, matcher, select_sites, selector_parts

PLAIN_NAMES = ("resid_pre", "ln1", "q", "k", "v", "z", "attn_out", "resid_mid", "ln2", "mlp_pre", "mlp_post", "mlp_out")
GATED_NAMES = (*PLAIN_NAMES[:9], "mlp_gate", *PLAIN_NAMES[9:])


def forward_order(names: tuple[str, ...], n_layers: int) -> list[Site]:
    inner = [Site(layer, name) for layer in range(n_layers) for name in (*names, "resid_post")]
    return [Site(None, "embed"), *inner, Site(None, "ln_final"), Site(None, "logits")]


SITES = forward_order(PLAIN_NAMES, 12)
GATED = forward_order(GATED_NAMES, 3)


def picked(selector: Selector, sites: list[Site] = SITES) -> list[str]:
    return [str(site) for site in select_sites(selector, sites)]


def test_a_site_prints_as_the_string_that_selects_it() -> None:
    assert [picked(str(site)) for site in SITES] == [[str(site)] for site in SITES]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (Site(5, "mlp_out"), ["5.mlp_out"]),
        ("5.mlp_out", ["5.mlp_out"]),
        ("1.q", ["1.q"]),
        ("embed", ["embed"]),
        ("mlp_out", [f"{layer}.mlp_out" for layer in range(12)]),
        ("*.mlp_out", [f"{layer}.mlp_out" for layer in range(12)]),
        ("1?.q", ["10.q", "11.q"]),
        ("[35].q", ["3.q", "5.q"]),
        ("2.resid_*", ["2.resid_pre", "2.resid_mid", "2.resid_post"]),
        (range(9, 12), [str(site) for site in SITES if site.layer in (9, 10, 11)]),
        (7, [str(site) for site in SITES if site.layer == 7]),
        (np.int64(7), [str(site) for site in SITES if site.layer == 7]),
        (0, [str(site) for site in SITES if site.layer == 0]),
        (lambda site: site.layer is None, ["embed", "ln_final", "logits"]),
        (None, [str(site) for site in SITES]),
        ("*", [str(site) for site in SITES]),
        (["logits", "0.q", "embed"], ["embed", "0.q", "logits"]),
        ({"0.q": "any mapping", "0.k": "by its keys"}, ["0.q", "0.k"]),
        ([["0.q"], ("0.k", {"0.v"})], ["0.q", "0.k", "0.v"]),
        (("0.q", "0.q", Site(0, "q")), ["0.q"]),
        ((site for site in ("0.q", "1.q")), ["0.q", "1.q"]),
        ((5, "mlp_out"), ["5.mlp_out"]),
        ((np.int32(5), "mlp_out"), ["5.mlp_out"]),
        ((None, "embed"), ["embed"]),
        ([(5, "q"), (6, "q")], ["5.q", "6.q"]),
        ([], []),
    ],
)
def test_kinds_of_selector(selector: Selector, expected: list[str]) -> None:
    assert picked(selector) == expected


def test_a_list_of_a_layer_and_a_name_is_their_union() -> None:
    assert picked([5, "mlp_out"]) == [str(site) for site in SITES if site.layer == 5 or site.name == "mlp_out"]


def test_a_layer_number_selects_nothing_outside_the_layers() -> None:
    assert all(not matcher(0)(site) for site in SITES if site.layer is None)
    assert all(not matcher(range(12))(site) for site in SITES if site.layer is None)


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("hook_embed", "embed"),
        ("ln_final.hook_normalized", "ln_final"),
        ("blocks.5.hook_resid_pre", "5.resid_pre"),
        ("blocks.5.hook_resid_mid", "5.resid_mid"),
        ("blocks.5.hook_resid_post", "5.resid_post"),
        ("blocks.5.hook_attn_out", "5.attn_out"),
        ("blocks.5.hook_mlp_out", "5.mlp_out"),
        ("blocks.5.attn.hook_q", "5.q"),
        ("blocks.11.attn.hook_z", "11.z"),
        ("blocks.5.ln1.hook_normalized", "5.ln1"),
        ("blocks.5.ln2.hook_normalized", "5.ln2"),
        ("blocks.5.mlp.hook_pre", "5.mlp_pre"),
        ("blocks.5.mlp.hook_post", "5.mlp_post"),
    ],
)
def test_transformer_lens_names(hook: str, site: str) -> None:
    assert picked(hook) == [site]


def test_transformer_lens_names_with_a_glob_for_the_layer() -> None:
    assert picked("blocks.*.hook_mlp_out") == picked("mlp_out")


def test_transformer_lens_calls_the_nonlinear_branch_of_a_gated_mlp_pre() -> None:
    assert picked("blocks.1.mlp.hook_pre", GATED) == ["1.mlp_gate"]
    assert picked("blocks.1.mlp.hook_pre_linear", GATED) == ["1.mlp_pre"]
    assert picked("mlp_pre", GATED) == ["0.mlp_pre", "1.mlp_pre", "2.mlp_pre"]


def test_a_site_sown_twice_is_selected_once() -> None:
    assert select_sites("q", [Site(0, "q"), Site(0, "k"), Site(0, "q")]) == [Site(0, "q")]


def obvious(selector: Selector, site: Site) -> bool:
    """What a union of Sites, exact strings, layer numbers and bare names means, said another way."""
    for part in selector_parts(selector):
        if isinstance(part, Site) and part == site:
            return True
        if isinstance(part, int) and part == site.layer:
            return True
        if isinstance(part, str) and part in (site.name, f"{site.layer}.{site.name}"):
            return True
    return False


parts = st.one_of(
    st.sampled_from(SITES),
    st.sampled_from(SITES).map(str),
    st.sampled_from(SITES).map(lambda site: site.name),
    st.integers(0, 11),
)


@given(st.lists(parts, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_unions_are_in_the_order_of_the_forward_pass(selector: list, shuffler: random.Random) -> None:
    expected = [site for site in SITES if obvious(selector, site)]
    assert select_sites(selector, SITES) == expected
    shuffler.shuffle(selector)
    assert select_sites(selector, SITES) == expected


@given(st.lists(st.sampled_from(SITES), min_size=1, unique=True))
def test_selecting_again_changes_nothing(chosen: list[Site]) -> None:
    once = select_sites(chosen, SITES)
    assert set(once) == set(chosen)
    assert select_sites(None, once) == once


def message(selector: Selector, sites: list[Site] = SITES, where: str = "run(gpt2)") -> str:
    with pytest.raises(UnknownNameError) as error:
        select_sites(selector, sites, where=where)
    return str(error.value)


def test_an_unknown_name() -> None:
    few = [Site(None, "embed"), Site(0, "mlp_out"), Site(3, "mlp_out"), Site(None, "logits")]
    assert message("mlp_outs", few) == (
        "Unknown site 'mlp_outs' in run(gpt2). Did you mean 'mlp_out'?\n"
        "  Known: embed, mlp_out, logits (layers 0 to 3)\n"
        "  Fix: use one of these names, or add a tag to the model's patch set."
    )


@pytest.mark.parametrize("selector", ["5.mlp_outs", "blocks.5.hook_mlp_outs", Site(5, "mlp_outs"), (5, "mlp_outs")])
def test_the_nearest_name_whatever_the_spelling(selector: Selector) -> None:
    assert "Did you mean 'mlp_out'?" in message(selector)


def test_all_offenders_are_listed() -> None:
    text = message(["attn_outs", "mlp_out", Site(3, "mlp_outs"), 99])
    assert text.startswith("Unknown sites 'attn_outs', '3.mlp_outs', 99 in run(gpt2). Did you mean 'attn_out'?")


@pytest.mark.parametrize(
    ("selector", "words"),
    [("12.mlp_out", "'12.mlp_out'"), (12, "12"), (range(12, 20), "range(12, 20)"), (Site(12, "q"), "'12.q'")],
)
def test_a_layer_that_is_not_there_gets_the_layers_and_no_suggestion(selector: Selector, words: str) -> None:
    text = message(selector)
    assert text.startswith(f"Unknown site {words} in run(gpt2).\n")
    assert "(layers 0 to 11)" in text


def test_a_predicate_that_matches_nothing() -> None:
    def is_deep(site: Site) -> bool:
        return (site.layer or 0) > 100

    assert "Unknown site (predicate is_deep) in run(gpt2)." in message(is_deep)


def test_a_missing_resid_mid_is_explained() -> None:
    """A model can lack it for a reason; other missing names are not explained by it."""
    names = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    parallel = [Site(layer, name) for layer in range(2) for name in names]
    for selector in ("resid_mid", "1.resid_mid", "blocks.0.hook_resid_mid", Site(1, "resid_mid")):
        with pytest.raises(UnknownNameError, match="where attention and MLP run in parallel") as error:
            select_sites(selector, parallel)
        assert "Did you mean" not in str(error.value)
    with pytest.raises(UnknownNameError) as error:
        select_sites("resid_middle", parallel)
    assert "parallel" not in str(error.value)
    with pytest.raises(UnknownNameError) as error:
        select_sites("resid_mid", [Site(0, "resid_pre"), Site(0, "resid_post")])
    assert "parallel" not in str(error.value)


def test_transformer_lens_sites_that_are_not_tagged() -> None:
    assert "Unknown site 'blocks.5.ln1.hook_scale'" in message("blocks.5.ln1.hook_scale")


def test_one_part_that_matches_does_not_excuse_another() -> None:
    assert "'7.nope'" in message(["mlp_out", "7.nope"])


def test_sites_outside_the_layers_only() -> None:
    assert "  Known: embed\n" in message("q", [Site(None, "embed")])


def test_a_program_without_sites() -> None:
    assert "  Known: (none)\n" in message("q", [])
    assert select_sites(None, []) == []


def test_nothing_is_fine_when_asked_for() -> None:
    assert select_sites(["mlp_outs", "0.q"], SITES, empty_ok=True) == [Site(0, "q")]


@pytest.mark.parametrize("selector", [1.5, True, object(), [None, 2.0]], ids=["float", "bool", "object", "list"])
def test_no_selector_at_all(selector: object) -> None:
    with pytest.raises(UnknownNameError) as error:
        select_sites(selector, SITES)  # type: ignore[arg-type]
    text = str(error.value)
    assert "was given as a site selector." in text
    assert 'Expected: a Site, a string ("mlp_out", "5.mlp_out", "*.resid_post", "blocks.5.hook_mlp_out")' in text
    assert "Fix: write the selector in one of these forms." in text
