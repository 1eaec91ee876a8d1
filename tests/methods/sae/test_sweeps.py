"""Sweeps: each SAE is the one that training alone gives, measured as evaluation alone measures it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from interp_jax.core.errors import InterpError, InvalidInputError, UnknownNameError
from interp_jax.core.sites import Site
from interp_jax.forward.batch_streams import ArrayStream
from interp_jax.methods.sae import GhostGrads, ReLU, StepRule, TrainConfig, evaluate_each, evaluate_sae, train
from interp_jax.methods.sae.sweep_setup import SweepSetup, run_sweep
from interp_jax.methods.sae.sweeps import SAESweep, SweepRow, mean_and_spread, sweep_saes

SITE = "1.mlp_out"


@pytest.fixture(scope="module")
def tokens(tiny_llama):
    return np.random.default_rng(0).integers(0, tiny_llama.config.d_vocab, (6, 12))


@pytest.fixture(scope="module")
def open_stream(tiny_llama, tokens):
    rows = np.asarray(tiny_llama.reap(tokens, SITE)[SITE]).reshape(-1, tiny_llama.config.d_model)
    return lambda seed: ArrayStream({SITE: rows}, batch_size=16, seed=seed)


def config(**changes) -> TrainConfig:
    rule = StepRule(ReLU(), learning_rate=1e-2, n_steps=6, dead_after_tokens=16, **changes)
    return TrainConfig(rule, n_latents=32, sites=(SITE,), coefficients=(0.05, 0.5), n_sample_batches=2)


@pytest.fixture(scope="module")
def configs() -> dict[str, TrainConfig]:
    return {"plain": config(), "ghosts": config(dead_term=GhostGrads(n_first_steps=3))}


@pytest.fixture(scope="module")
def sweep(tiny_llama, tokens, open_stream, configs) -> SAESweep:
    return sweep_saes(tiny_llama, configs, open_stream, tokens, seeds=(3, 5), n_untouched=1, progress=False)


def test_each_sae_is_the_one_trained_and_evaluated_alone(sweep, tiny_llama, tokens, open_stream, configs):
    assert [(row.name, row.seed, row.coefficient) for row in sweep.rows] == [
        (name, seed, coefficient) for name in configs for seed in (3, 5) for coefficient in (0.05, 0.5)
    ]
    for row in (sweep.rows[2], sweep.rows[7]):
        alone = dataclasses.replace(configs[row.name], seed=row.seed)
        trained = train(alone, open_stream(row.seed), progress=False)
        number = alone.coefficients.index(row.coefficient)
        expected = evaluate_sae(tiny_llama, trained.saes[number], tokens, n_untouched=1, progress=False)
        # The ablations too, which the sweep has measured for its first SAE only.
        assert row.evaluation.numbers() == pytest.approx(expected.numbers(), rel=1e-5, abs=1e-6)
        np.testing.assert_array_equal(row.evaluation.reconstruction.n_fired, expected.reconstruction.n_fired)
        assert row.n_dead == trained.log[-1]["n_dead"][number]
    moved = dataclasses.replace(trained.saes[0], read=Site(2, "mlp_out"))
    for saes, given in (([trained.saes[0], moved], "2 sites were given: 1.mlp_out -> 1.mlp_out, 2."), ([], "0 sites")):
        with pytest.raises(InvalidInputError, match=rf"SAEs of {given}[\s\S]*Expected:[\s\S]*Fix:"):
            evaluate_each(tiny_llama, saes, tokens, progress=False)


def test_ways_and_seeds_differ(sweep):
    fvu = sweep.table("fvu")
    assert list(fvu) == ["plain", "ghosts"] and fvu["plain"].shape == (2, 2)
    assert np.abs(fvu["plain"] - fvu["ghosts"]).min() > 1e-6
    assert np.abs(fvu["plain"][0] - fvu["plain"][1]).min() > 1e-6
    assert len({row.evaluation.losses["zero"] for row in sweep.rows}) == 1


class _Closed(ArrayStream):
    """A stream nobody may read."""

    def next_batch(self):
        raise AssertionError("a batch was asked for")


def test_what_is_trained_is_taken_up(sweep, tiny_llama, tokens, open_stream, configs, tmp_path):
    def trained(ways, opened=open_stream):
        return sweep_saes(
            tiny_llama, ways, opened, tokens, seeds=(5,), directory=tmp_path, n_untouched=1, progress=False
        )

    def closed(seed):
        return _Closed(open_stream(seed)._arrays, batch_size=16, seed=seed)

    first = trained({"plain": configs["plain"]})
    # Under another name it is the same training.
    second = trained({"as it was": configs["plain"]}, closed)
    expected = [row for row in sweep.rows if row.name == "plain" and row.seed == 5]
    for one, other, row in zip(first.rows, second.rows, expected, strict=True):
        assert one.evaluation.numbers() == pytest.approx(row.evaluation.numbers(), rel=1e-5, abs=1e-6)
        assert other.evaluation.numbers() == one.evaluation.numbers()
        assert (other.n_dead, other.name) == (one.n_dead, "as it was")
    with pytest.raises(AssertionError, match="a batch was asked for"):
        trained(configs, closed)


def planted(sweep: SAESweep, l0s, fvus) -> SAESweep:
    """Rows with L0 and FVU of our choice, `[seed][coefficient]`."""
    rows: list[SweepRow] = []
    for seed, (own_l0s, own_fvus) in enumerate(zip(l0s, fvus, strict=True)):
        for coefficient, (l0, fvu) in enumerate(zip(own_l0s, own_fvus, strict=True)):
            evaluation = sweep.rows[0].evaluation
            part = dataclasses.replace(evaluation.reconstruction, l0=l0, fvu=fvu)
            evaluation = dataclasses.replace(evaluation, reconstructions=(part,))
            rows.append(SweepRow("way", float(coefficient), seed, 8, 0.0, evaluation))
    return SAESweep("model", SITE, tuple(rows))


def test_at_equal_l0(sweep):
    made = planted(sweep, [[100.0, 1.0, 10.0], [20.0, 0.0, 5.0]], [[0.1, 0.9, 0.5], [0.2, 1.0, 0.4]])
    at = made.at_l0("fvu", np.sqrt(10.0))["way"]
    # Halfway from 1 to 10 on a logarithmic axis; the other seed's line begins at 5.
    assert at[0] == pytest.approx(0.7) and np.isnan(at[1])
    assert made.at_l0("fvu", 10.0)["way"] == pytest.approx([0.5, 0.3])
    assert np.isnan(made.at_l0("fvu", 200.0)["way"]).all()
    assert made.table("dead_share")["way"] == pytest.approx(np.full((2, 3), 8 / 32))


def test_it_prints_as_a_table(sweep):
    lines = repr(sweep).splitlines()
    assert lines[0] == f"SAESweep(8 SAEs at {SITE} of {sweep.model}; 2 seeds: mean ± half their range)"
    assert len(lines) == 2 + 4 and lines[4].split()[:2] == ["ghosts", "0.05"]
    assert mean_and_spread(sweep.table("l0")["ghosts"][:, 0]) in lines[4]
    assert mean_and_spread([123.4]) == "123"


def test_mistakes_are_named_before_anything_is_trained(tiny_llama, tokens, open_stream, configs):
    def refused(
        match, *, ways=configs, text=tokens, seeds=(0,), opens=open_stream, error: type[InterpError] = InvalidInputError
    ):
        with pytest.raises(error, match=match + r"[\s\S]*(Expected|Known):[\s\S]*Fix:"):
            sweep_saes(tiny_llama, ways, opens, text, seeds=seeds, progress=False)

    def plain(**changes):
        return {"plain": config(), "b": dataclasses.replace(config(), **changes)}

    refused("No configuration was given", ways={})
    refused("TrainConfig, function and seeds of tuple were given", ways=config())
    refused("list, function and seeds of tuple were given", ways=[config()])
    refused("dict, function and seeds of int were given", seeds=0)
    refused("dict, ArrayStream and seeds of tuple were given", opens=open_stream(0))
    refused("StepRule StepRule", ways={"plain": config().rule})
    refused("The class ReLU was given in StepRule", ways={"plain": SweepSetup().config(ReLU)})  # type: ignore[arg-type]
    refused("No seed was given", seeds=())
    refused("1, which comes 2 times among the seeds, was given", seeds=(1, 2, 1))
    refused("0.5, which comes 2 times among the coefficients of 'b', was", ways=plain(coefficients=(0.5, 0.1, 0.5)))
    refused("the number of coefficients = 0 was given", ways=plain(coefficients=()))
    refused(r"Configurations about plain: \('1.mlp_out',\), b: \('2.mlp_out',\)", ways=plain(sites=("2.mlp_out",)))
    refused("Unknown site '7.mlp_out'", ways={"a": plain(sites=("7.mlp_out",))["b"]}, error=UnknownNameError)
    refused("A held-out text of 0 sequences was given", text=tokens[:0])
    refused("Held-out sequences of fewer than two tokens were given", text=tokens[:, :1])


def test_numbers_go_by_name(sweep):
    with pytest.raises(UnknownNameError, match=r"Unknown number 'fvus' in SAESweep. Did you mean 'fvu'\?"):
        sweep.table("fvus")
    with pytest.raises(InvalidInputError, match=r"l0 = -1 was given in SAESweep.at_l0[\s\S]*above 0[\s\S]*Fix:"):
        sweep.at_l0("fvu", -1)


def test_one_sae_is_no_list(tiny_llama, tokens):
    for given, words in ((7, "7 was given"), (None, "None was given")):
        with pytest.raises(InvalidInputError, match=rf"{words} in evaluate_each[\s\S]*a list[\s\S]*Fix:"):
            evaluate_each(tiny_llama, given, tokens, progress=False)  # type: ignore[arg-type]


def test_a_configuration_is_no_setup(tiny_llama):
    with pytest.raises(InvalidInputError, match=r"TrainConfig was given in run_sweep[\s\S]*a SweepSetup[\s\S]*Fix:"):
        run_sweep(tiny_llama, config(), {"plain": config()}, progress=False)  # type: ignore[arg-type]


def test_too_little_text(tiny_llama, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / f"{name}.txt").write_text(f"the {name} sat on the mat. " * 20)
    setup = SweepSetup(text=str(tmp_path), n_ctx=32, n_held_out=64)
    with pytest.raises(
        InvalidInputError,
        match=r"n_held_out = 64 was given for a text with \d+ held-out sequences[\s\S]*Fix: give a longer text",
    ):
        run_sweep(tiny_llama, setup, {"plain": setup.config(ReLU())}, progress=False)
