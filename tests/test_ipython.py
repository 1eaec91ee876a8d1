"""A real IPython: what is typed at its prompt prints usefully, and Ctrl-C in a loop leaves the session usable."""

from __future__ import annotations

import re
import signal
import sys
import textwrap

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from pexpect.popen_spawn import PopenSpawn

SETUP = """
import numpy as np, jax, jax.numpy as jnp
import interp_jax as ij
from interp_jax.models.upstream import Upstream

def forward(params, tokens):
    x = ij.sow(params["W_E"][tokens], name="embed")
    for layer in range(3):
        with ij.layer_scope(layer):
            x = ij.sow(x + ij.sow(jnp.tanh(x), name="mlp_out"), name="resid_post")
    return x @ params["W_U"]

lm = ij.LanguageModel(Upstream("toy", forward), {"W_E": jnp.eye(5, 4), "W_U": jnp.ones((4, 5))}, name="toy")
tokens = np.array([[0, 1, 2]])
"""


@pytest.fixture
def shell():
    shell = InteractiveShell()
    shell.run_cell(SETUP).raise_error()
    return shell


def shown(shell, expression):
    """What the prompt prints for an expression: the text of Out[...]."""
    with capture_output() as captured:
        result = shell.run_cell(expression)
    result.raise_error()
    assert captured.stderr == ""
    return captured.stdout


def html(shell, expression):
    """What a notebook shows for it."""
    return shell.display_formatter.format(shell.ev(expression))[0].get("text/html", "")


def test_the_model_says_what_it_is(shell):
    out = shown(shell, "lm")
    assert "LanguageModel toy" in out
    assert re.search(r"parameters +40 \(float32", out)
    assert len(out.splitlines()) < 15, "no dump of the weights"
    assert "<table>" in html(shell, "lm")


def test_the_sites_are_a_table(shell):
    out = shown(shell, "lm.sites(tokens)")
    rows = [line.split() for line in out.splitlines()]
    header = next(row for row in rows if "layers" in row)
    assert header[-5:] == ["name", "layers", "shape", "dtype", "bytes"]
    assert ["embed", "-", "[1,", "3,", "4]", "float32", "48", "B"] in rows
    assert ["mlp_out", "0-2", "[1,", "3,", "4]", "float32", "144", "B"] in rows
    assert "7 values" in out
    assert html(shell, "lm.sites(tokens)").count("<tr>") == 4


def test_a_running_pass_says_where_it_is(shell):
    assert "not started" in shown(shell, "rp = lm.run(tokens, sites='mlp_out')\nrp")
    assert "at a site 0.mlp_out = float32[1, 3, 4], 1 sites visited" in shown(shell, "_ = next(rp)\nrp")
    assert "finished" in shown(shell, "for step in rp: pass\nrp")
    assert "Array(" in shown(shell, "rp.retval")


def test_activations_are_a_table_not_a_flood(shell):
    out = shown(shell, "lm.reap(tokens, 'resid_post')")
    assert out.count("resid_post") == 1
    assert "0-2" in out
    assert "144 B" in out
    assert "Array(" not in out
    assert "<table>" in html(shell, "lm.reap(tokens, 'resid_post')")


def test_a_mistake_shows_its_four_parts(shell):
    with capture_output() as captured:
        shell.run_cell("lm.reap(tokens, 'mlp_uot')")
    assert "Did you mean 'mlp_out'?" in captured.stdout
    assert "Fix: " in captured.stdout


def test_a_loop_left_by_an_exception_leaves_the_session_usable(shell):
    before = shown(shell, "float(lm(tokens).sum())")
    for engine in ("compiled", "python"):
        with capture_output() as captured:
            result = shell.run_cell(
                f"for layer, name, value in (rp := lm.run(tokens, engine={engine!r})):\n"
                "    rp.modified_value = value * 0\n"
                "    if layer == 1: raise KeyboardInterrupt"
            )
        assert isinstance(result.error_in_exec, KeyboardInterrupt)
        assert "KeyboardInterrupt" in captured.stdout + captured.stderr
        # The compiled engine holds nothing open; the python engine's call stack is unwound.
        assert f"{'at a site' if engine == 'compiled' else 'abandoned at'} 1." in shown(shell, "rp")
        assert shown(shell, "float(lm(tokens).sum())").split("]:")[1] == before.split("]:")[1]
        assert "finished" in shown(shell, f"for _ in (again := lm.run(tokens, engine={engine!r})): pass\nagain")
        assert "(1, 3, 5)" in shown(shell, "jax.jit(lambda t: lm.forward(lm.params, t))(tokens).shape")


@pytest.fixture
def terminal():
    """An IPython in a process of its own, with the toy model loaded."""
    options = ["--simple-prompt", "--no-banner", "--no-confirm-exit", "--colors=NoColor", "--quick"]
    # Not a pseudo-terminal: that would fork this process, which JAX's threads forbid.
    child = PopenSpawn([sys.executable, "-u", "-m", "IPython", *options], encoding="utf-8", timeout=60)
    child.expect(r"In \[1\]: ")
    child.sendline(f"exec({SETUP!r})")
    child.expect(r"In \[2\]: ")
    yield child
    with child.proc:
        child.sendline("exit")


def ask(child, line):
    """Type a line and return what IPython prints before its next prompt."""
    child.sendline(line)
    child.expect(r"\nIn \[\d+\]: ")
    return child.before


@pytest.mark.parametrize("engine", ["compiled", "python"])
def test_ctrl_c_abandons_a_loop(terminal, engine):
    loop = textwrap.dedent(f"""
        import time
        for layer, name, value in (rp := lm.run(tokens, engine={engine!r})):
            rp.modified_value = value * 0
            if (layer, name) == (1, 'mlp_out'):
                print('waiting' + ' here', flush=True)
                time.sleep(60)
    """)
    terminal.sendline(f"exec({loop!r})")
    terminal.expect("waiting here")
    terminal.kill(signal.SIGINT)
    terminal.expect("KeyboardInterrupt")
    terminal.expect(r"In \[\d+\]: ")

    assert f"{'at a site' if engine == 'compiled' else 'abandoned at'} 1.mlp_out" in ask(terminal, "rp")
    assert "(1, 3, 5)" in ask(terminal, "lm(tokens).shape")
    ask(terminal, f"_ = [rp.close()] + list(again := lm.run(tokens, engine={engine!r}))")
    assert "finished" in ask(terminal, "again")
    assert "True" in ask(terminal, "bool((again.retval == lm(tokens)).all())")
    # A trace left open by the abandoned pass would swallow this one.
    assert "3.0" in ask(terminal, "float(jax.jit(lambda x: x + 1)(2.0))")
