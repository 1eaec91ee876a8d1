"""Values of sites: equal to what reaping gives, one program, nothing of the model that comes after them.

Source: interp_jax.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, UnknownNameError
from interp_jax.forward.site_values import Keep, activation_batches, activations_of, site_reader
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import Upstream
from interp_jax.transforms.compilations import count_compilations
from interp_jax.transforms.layer_stack import scan_layers
from interp_jax.transforms.sowing import layer_scope, sow

SITES = ["embed", "1.z", "1.mlp_post", "2.resid_post"]


@pytest.mark.parametrize("is_stacked", [False, True])
def test_they_are_what_reaping_gives(tiny_llama, is_stacked: bool, rng) -> None:
    lm = tiny_llama.stacked() if is_stacked else tiny_llama
    tokens = rng.integers(0, 250, (5, 12)).astype(np.int32)
    tokens[1, :3] = -1
    with count_compilations() as compiled:
        found = activations_of(lm, tokens, SITES, batch_size=2)
    assert [entry.name for entry in compiled if entry.name == "values of sites"] == ["values of sites"]
    reaped = tiny_llama.reap(tokens, SITES)
    assert list(found) == [str(site) for site in reaped]
    for site, value in reaped.items():
        expected = np.asarray(value).reshape(5, 12, -1)
        # Other batches sum in another order: float32 rounding, of the size of the largest component.
        size = np.abs(expected[tokens >= 0]).max()
        np.testing.assert_allclose(found[str(site)][tokens >= 0], expected[tokens >= 0], rtol=1e-4, atol=1e-5 * size)
    shapes = [
        (rows.shape, values["1.z"].shape[:2]) for rows, values in activation_batches(lm, tokens, "1.z", batch_size=2)
    ]
    assert shapes == [((2, 12), (2, 12)), ((2, 12), (2, 12)), ((1, 12), (1, 12))]


def counting_model(*, is_stacked: bool) -> tuple[LanguageModel, list[int]]:
    """A model of four layers, each of which tells the host that it runs."""
    runs: list[int] = []

    def layer(x: Any, weight: Any) -> tuple[Any, None]:
        def tell(value: np.ndarray) -> np.ndarray:
            runs.append(1)
            return value

        x = jax.pure_callback(tell, jax.ShapeDtypeStruct(x.shape, x.dtype), x + weight)
        return sow(x, name="resid_post"), None

    def stacked(params: Any, tokens: Any) -> Any:
        return scan_layers(layer, tokens[..., None].astype(jnp.float32), params)[0]

    def unrolled(params: Any, tokens: Any) -> Any:
        x = tokens[..., None].astype(jnp.float32)
        for i in range(4):
            with layer_scope(i):
                x, _ = layer(x, params[i])
        return x

    return LanguageModel(Upstream("counting", stacked if is_stacked else unrolled), jnp.arange(4.0)), runs


@pytest.mark.parametrize("is_stacked", [False, True])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_what_comes_after_the_last_site_is_not_run(is_stacked: bool, layer: int) -> None:
    lm, runs = counting_model(is_stacked=is_stacked)
    name = f"{layer}.resid_post"
    tokens = np.arange(6, dtype=np.int32).reshape(2, 3)
    value = activations_of(lm, tokens, [name, "0.resid_post"])[name]
    assert len(runs) == layer + 1
    assert value[..., 0].tolist() == (tokens + sum(range(layer + 1))).tolist()


def test_which_positions_count() -> None:
    tokens = np.array([[1, 5, 2, 7], [-1, 5, 1, 2]], np.int32)
    special = (1, 2)
    every = Keep(first_position=0, special_tokens=True)
    assert every.mask(tokens, special).tolist() == [[True] * 4, [False, True, True, True]]
    assert Keep().mask(tokens, special).tolist() == [[False, True, False, True], [False, True, False, False]]
    assert Keep(first_position=2, special_tokens=True).mask(tokens).tolist() == [[False, False, True, True]] * 2


def test_faults_are_counted_where_it_matters() -> None:
    def forward(params: Any, tokens: Any) -> Any:
        value = jnp.where(tokens == 7, jnp.nan, params[tokens % 3, 0])[..., None]
        return sow(jnp.concatenate([value, value], -1), name="embed")

    reader = site_reader(LanguageModel(Upstream("faulty", forward), jnp.eye(3)), "embed", n_ctx=3)
    tokens = jnp.array([[7, 1, 7], [7, 0, 1]])
    mask = jnp.array([[True] * 3, [False, True, True]])
    assert reader.read(jnp.eye(3), tokens, mask)[1]["embed"].tolist() == [4, 0]
    assert (reader.widths, reader.dtypes) == ({"embed": 2}, {"embed": np.dtype(np.float32)})


def test_sites_that_cannot_be_read(tiny_llama) -> None:
    with pytest.raises(
        InvalidInputError, match=r"0\.pattern float32\[2, 4, 8, 8\] cannot be read position by"
    ) as error:
        site_reader(tiny_llama, ["0.pattern", "0.z"], n_ctx=8)
    assert "Fix: select other sites; for attention take q, k, v or z." in str(error.value)
    with pytest.raises(UnknownNameError, match="Did you mean 'resid_post'"):
        activations_of(tiny_llama, np.zeros((1, 4), np.int32), "1.resid_pots")
    with pytest.raises(InvalidInputError, match=r"Token ids 999 were given(.|\n)*lm\.tokenize"):
        activations_of(tiny_llama, np.full((1, 4), 999), "embed")
    with pytest.raises(InvalidInputError, match=r"60 tokens a row(.|\n)*n_ctx = 48"):
        site_reader(tiny_llama, "embed", n_ctx=60)
    with pytest.raises(UnknownNameError, match="No site was selected"):
        site_reader(tiny_llama, [], n_ctx=4)
