"""The command line: what it prints and saves, how it complains, and its exit status."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from interp_jax.cli import COMMANDS, main, patch_sets
from interp_jax.core.results import load_result
from interp_jax.models.loading import load
from interp_jax.transforms.patcher import Patcher, PatchSet
from tests.source_tree import ROOT

TINY = str(ROOT / "tests" / "oracles" / "tiny_llama")
COMMAND = [sys.executable, "-m", "interp_jax.cli"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def saved(out):
    """The result directory the command said it wrote, and the lines about its files."""
    lines = out.split("\nSaved\n")[1].split()
    assert lines[-1].endswith("/")
    return Path(lines[-1]), [Path(line) for line in lines[:-1]]


def test_lens_prints_and_saves_what_the_model_thinks(capsys):
    assert main(["lens", "the cat to", "--model", TINY, "--top-k", "3"]) == 0
    out, err = capsys.readouterr()
    assert "LanguageModel tiny_llama" in out

    lm = load(TINY)
    tokens = lm.tokenize("the cat to")
    probabilities = np.exp(np.asarray(lm(tokens), np.float64)[0, -1])
    best = np.sort(probabilities / probabilities.sum())[::-1]
    shown = [float(value) for value in re.findall(r"^ +\d  .* +([\d.]+) %$", out, re.MULTILINE)]
    np.testing.assert_allclose(shown, 100 * best[:3], atol=0.051)
    assert re.search(r"^2\.resid_post  .*\*", out, re.MULTILINE)
    assert re.search(r"^ 0\.resid_pre  ", out, re.MULTILINE)
    assert "\x1b" not in out, "no colours in a file"

    folder, files = saved(out)
    assert folder.parent == Path("runs/lens")
    assert [path.name for path in files] == ["logit_lens.png", "logit_lens.html"]
    assert all(path.exists() for path in files)
    assert files[0].read_bytes().startswith(b"\x89PNG")
    record = load_result(folder)
    assert record.config == {"model": TINY, "text": "the cat to", "views": ["0.resid_pre", "resid_post"], "top_k": 3}
    assert record.result["top_ids"].shape == (4, 1, tokens.shape[1], 3)
    np.testing.assert_array_equal(record.result["tokens"], tokens)
    assert list(record.provenance["patch_digests"]) == ["transformers_llama"]
    assert "Traceback" not in err


def test_lens_takes_views_and_a_folder(capsys, tmp_path):
    out_folder = tmp_path / "a" / "b"
    assert main(["lens", "cat", "--model", TINY, "--views", "resid_mid, 1.mlp_out", "--out", str(out_folder)]) == 0
    folder, _ = saved(capsys.readouterr().out)
    assert folder.parent == out_folder / "lens"
    assert load_result(folder).result["views"] == ["0.resid_mid", "1.resid_mid", "1.mlp_out", "2.resid_mid"]


STEER = ["steer", "the cat to", "--positive", "tree", "--negative", "a", "--model", TINY]


@pytest.mark.slow
def test_steer_prints_both_kinds_of_completions_and_saves_them(capsys):
    few = ["--n-samples", "2", "--max-new-tokens", "3", "--temperature", "0", "--layer", "2", "--coefficient", "-30"]
    assert main([*STEER, *few]) == 0
    out, err = capsys.readouterr()
    assert "-30 times 'tree' - 'a' at 2.resid_pre" in out and "Traceback" not in err
    folder, _ = saved(out)
    record = load_result(folder)
    assert record.config["layer"] == 2 and record.config["coefficient"] == -30 and record.config["at"] == "prompt"
    rows = record.result["vector"]["values"]
    size = record.result["steered"]["sizes"]["2.resid_pre"]
    np.testing.assert_allclose(size["added"][0, : len(rows)], 30 * np.linalg.norm(rows, axis=-1), rtol=1e-5)
    # A line for each position: its token, and how large what was added is there.
    shown = [float(ratio) for ratio in re.findall(r"^ +\d  .* (\d+\.\d\d)$", out, re.MULTILINE)]
    np.testing.assert_allclose(shown, size["added"][0] / size["residual"][0], atol=0.0051)
    unsteered, steered = (
        out.split("Unsteered: the cat to ...")[1].split("\nSaved\n")[0].split("Steered: the cat to ...")
    )
    texts = {name: record.result[name]["generation"]["texts"] for name in ("unsteered", "steered")}
    for name, lines in (("unsteered", unsteered), ("steered", steered)):
        assert texts[name][0] == texts[name][1], "at temperature 0 all are the same"
        assert [int(number) for number in re.findall(r"^ +(\d)  ", lines, re.MULTILINE)] == [1, 2]
    assert texts["unsteered"] != texts["steered"]
    lm = load(TINY)
    plain = lm.generate([[259, *lm.tokenize("the cat to")[0]]], max_new_tokens=3, frequency_penalty=1.0)
    assert plain.texts is not None and texts["unsteered"][0] == plain.texts[0]


def test_demo_shows_both_routes_and_saves_them(capsys):
    answers = ["--prompt", "the cat to", "--answer", " the", "--other", " t"]
    assert main(["demo", "--model", TINY, *answers]) == 0
    out = capsys.readouterr().out

    for part in ("Prompt: the cat to", "Most probable next tokens", "logit(·the) − logit(·t)", "Without the "):
        assert part in out
    seconds = re.findall(r"^  (loop|sweep) .* ([\d.]+) s the first time \(compiles\), +([\d.]+) s", out, re.MULTILINE)
    assert [route for route, *_ in seconds] == ["loop", "sweep"]
    difference = float(re.search(r"largest difference between the two: (\S+)", out)[1])  # type: ignore[index]
    assert difference < 1e-4

    folder, files = saved(out)
    assert sorted(path.name for path in files) == [
        "layer_effects.html",
        "layer_effects.png",
        "logit_lens.html",
        "logit_lens.png",
    ]
    result = load_result(folder).result
    np.testing.assert_allclose(result["effects"]["zeroed"], result["effects_by_loop"]["zeroed"], atol=1e-4)
    assert len(result["effects"]["sites"]) == 6
    assert float(f"{result['max_difference']:.1e}") == difference


def test_doctor_tells_of_a_healthy_and_of_a_broken_model(capsys, monkeypatch):
    assert main(["doctor", TINY]) == 0
    assert "Site contracts of tiny_llama: all" in capsys.readouterr().out

    from interp_jax.models import check, language_model

    def break_one(self, tokens=None):
        return check.CheckReport(self.name, (check.Outcome("resid_post = resid_mid + mlp_out", False, "off by 1"),))

    monkeypatch.setattr(language_model.LanguageModel, "check", break_one)
    assert main(["doctor", TINY]) == 1
    assert "FAILS" in capsys.readouterr().out


@pytest.mark.slow  # Each family's own test does it for that family.
@pytest.mark.parametrize("command", [["patches"], ["doctor", "--patches"]], ids=" ".join)
def test_every_patch_set_fits(capsys, command):
    assert main(command) == 0
    out = capsys.readouterr().out
    folder = {path.stem for path in (ROOT / "patches").glob("*.py") if "PATCH_SET = " in path.read_text()}
    names = {patch_set.name for patch_set in patch_sets()}
    assert names == folder | {f"{name} (stacked)" for name in folder}
    # Tunix has an environment of its own.
    absent = () if importlib.util.find_spec("tunix") else {name for name in names if name.startswith("tunix_")}
    # Digests are those of the newest upstream; an older one may read differently nearby.
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    is_newest = all(f"{package}=={version(package)}" in pinned for package in ("transformers", "flax"))
    nearby = "" if is_newest else "(, but upstream changed nearby)?"
    for name in names:
        status = "upstream is not installed" if name in absent else f"applies{nearby}"
        assert re.search(rf"^{re.escape(name)}: {status}$", out, re.MULTILINE)


def test_a_patch_that_does_not_fit_is_told_and_counts(capsys, monkeypatch):
    fits = PatchSet("fits", tags=(Patcher("textwrap", {"fill": [("w = $x", "w = $x")]}),))
    broken = PatchSet("broken", tags=(Patcher("textwrap", {"fill": [("w = nothing($x)", "w = $x")]}),))
    old = PatchSet("old", tags=fits.tags, versions={"jax": "<0.1"})
    for patch_sets_there, status in [([fits], 0), ([fits, broken], 1), ([old], 1)]:
        monkeypatch.setattr("interp_jax.cli.patch_sets", lambda there=patch_sets_there: there)
        assert main(["patches"]) == status
        out = capsys.readouterr().out
        assert "fits: applies" in out or patch_sets_there == [old]
        assert ("does not apply" in out) == (status == 1)


def test_run_lists_the_experiments(capsys):
    assert main(["run"]) == 0
    out = capsys.readouterr().out
    for path in (ROOT / "experiments").glob("[a-z]*.py"):
        assert re.search(rf"^{path.stem} +[A-Z].*\?$", out, re.MULTILINE)
    assert main(["run", "ioi_layers", "--help"]) == 0
    assert "--n-times INT" in capsys.readouterr().out


def test_run_takes_flags_and_repeats_an_earlier_run(capsys):
    flags = ["--model", TINY, "--prompt", "the cat to", "--answer", " the", "--other", " t", "--sites", "0.mlp_out"]
    assert main(["run", "ioi_layers", "--smoke", *flags]) == 0
    folder, files = saved(capsys.readouterr().out)
    assert {path.suffix for path in files} == {".png", ".html"}
    first = load_result(folder)
    assert first.config["sites"] == ["0.mlp_out"] and first.config["n_times"] == 1 and first.config["top_k"] == 5
    # Again from its folder, through the experiment's file, with one thing changed.
    file = str(ROOT / "experiments" / "ioi_layers.py")
    assert main(["run", file, "--config", str(folder), "--top-k", "3", "--out", "again"]) == 0
    folder, _ = saved(capsys.readouterr().out)
    second = load_result(folder)
    assert folder.parent == Path("again/ioi_layers") and second.config == first.config | {"top_k": 3}
    np.testing.assert_array_equal(second.result["effects"]["zeroed"], first.result["effects"]["zeroed"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "ioi_layer"], ["Unknown experiment 'ioi_layer'", "Did you mean 'ioi_layers'?"]),
        (["run", "nowhere.py"], ["There is no file nowhere.py"]),
        (["run", "ioi_layers", "--config", "nowhere"], ["nowhere cannot be used", "No such file"]),
        (["run", "ioi_layers", "--config", "other.json"], ["unknown k, n", "prompt, answer"]),
        (["run", "half.py"], ["half.py without SMOKE, run, plot"]),
        (["lens", ""], ["An empty text was given", "in quotes"]),
        (["lens"], ["The following arguments are required: text", "interp-jax lens --help"]),
        (["lens", "a", "--top-k", "many"], ["--top-k: invalid int value: 'many'", "interp-jax lens --help"]),
        (["lens", "a", "--top-k", "0", "--model", TINY], ["top_k=0", "1 to 260"]),
        (["lens", "a", "--views", "resid_pots", "--model", TINY], ["'resid_pots'", "Did you mean 'resid_post'?"]),
        (["lens", "a", "--views", "pattern", "--model", TINY], ["0.pattern is float32[1, 4, 1, 1]", "resid_mid"]),
        (["lens", "a" * 200, "--model", TINY], ["n_ctx = 48"]),
        (["lens", "a\udcff"], ["not UTF-8"]),
        (["lens", "a", "--model", "smollm2-135"], ["No model 'smollm2-135'", "Did you mean 'smollm2-135m'?"]),
        (["lens", "a", "--model", "./nowhere"], ["No model at './nowhere'", "check the path"]),
        (["lens", "a", "--out", "file/runs"], ["is not a folder", "--out runs"]),
        (["demo", "--model", TINY, "--prompt", "the"], ["The answer ' Mary' is 5 tokens", "one token"]),
        (["demo", "--prompt", ""], ["An empty text was given", 'quotes: interp-jax demo --prompt "The']),
        (
            ["demo", "--model", TINY, "--answer", " a", "--other", " a"],
            ["answer and other are both ' a'", "Expected: two answers"],
        ),
        (["lens", "two", "words"], ["Unrecognized arguments: words", "Expected: interp-jax", "goes in quotes"]),
        (["lens"], ["arguments are required: text", "Expected: interp-jax lens [-h]", "Fix: see `interp-jax lens"]),
        (["lens", "a", "--views", ","], ["--views ',' names no site", "Expected: sites separated", "Fix: leave"]),
        (["demo", "--out", "file"], ["is not a folder"]),
        (["steer", "a"], ["arguments are required: --positive, --negative", "interp-jax steer --help"]),
        ([*STEER[:3], "", *STEER[4:]], ["An empty text was given in interp-jax steer --positive"]),
        ([*STEER, "--row", "9"], ["--row 9 of a vector of 5 rows", "from 0 to 4"]),
        ([*STEER, "--layer", "7"], ["Unknown site '7.resid_pre'", "layers 0 to 2"]),
        ([*STEER, "--at", "always"], ["at='always'", "'prompt', 'generated' or 'all'"]),
        ([*STEER, "--at", "all"], ["A vector of 5 rows to be added at every generated token"]),
        ([*STEER, "--placement", "bakc"], ["Did you mean 'back'?"]),
        ([*STEER, "--coefficient", "nan"], ["coefficient nan was given", "one finite number"]),
        ([*STEER, "--top-p", "2"], ["top_p=2.0"]),
        (["steer", "t", *STEER[2:]], ["A target of 2 tokens", "steering vector of 5"]),
        (["doctor", "./nowhere"], ["No model at './nowhere'"]),
        (["lesn", "a"], ["Unknown command 'lesn'", "Did you mean 'lens'?", "demo, lens, steer, doctor, patches"]),
        (["patches", "more"], ["Unrecognized arguments: more"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_mistakes_are_told_in_parts_without_a_traceback(capsys, arguments, words):
    Path("file").touch()
    Path("other.json").write_text('{"n": 1, "k": 2}')
    Path("half.py").write_text("class Config: pass")
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("interp-jax: ")
    for word in [*words, "\n  Fix: "]:
        assert word in err
    assert "Traceback" not in err
    assert not Path("runs").exists(), "nothing half done is left behind"


def test_a_full_disk_is_told_in_parts(capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("interp_jax.core.results.save_result", full)
    assert main(["lens", "the", "--model", TINY]) == 2
    err = capsys.readouterr().err
    assert "could not be written ([Errno 28] No space left on device) in --out runs" in err
    assert "Fix: make room" in err


def test_a_traceback_is_there_for_who_asks(monkeypatch):
    monkeypatch.setenv("INTERP_JAX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="An empty text"):
        main(["lens", ""])


def test_help_names_every_command_and_starts_nothing():
    start = time.perf_counter()
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True)
    took = time.perf_counter() - start
    for command in COMMANDS:
        assert re.search(rf"^    {command} ", done.stdout, re.MULTILINE)
        assert main([command, "--help"]) == 0
    # A tenth of a second by itself; importing JAX alone takes longer than this allows.
    assert took < 1
    program = (
        "import sys, interp_jax.cli; print(sorted({'jax', 'numpy', 'matplotlib', 'transformers'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


def test_without_a_command_there_is_help(capsys):
    assert main([]) == 0
    assert "commands:" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"interp-jax \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_ctrl_c_ends_quietly():
    program = """
import sys, time
import interp_jax.cli, interp_jax.models.loading
def load(name):
    print("loading", flush=True)
    time.sleep(60)
interp_jax.models.loading.load = load
sys.exit(interp_jax.cli.main(["lens", "a"]))
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "loading\n"
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err


def test_a_reader_that_has_read_enough_is_no_error():
    pipeline = f"set -o pipefail; '{sys.executable}' -u -m interp_jax.cli lens 'the cat' --model '{TINY}' | head -n 1"
    done = subprocess.run(["bash", "-c", pipeline], capture_output=True, text=True)
    assert done.stdout == "LanguageModel tiny_llama\n"
    assert done.stderr == ""
    assert done.returncode == 0


def test_results_say_which_command_made_them():
    done = subprocess.run([*COMMAND, "lens", "the cat", "--model", TINY], capture_output=True, text=True, check=True)
    folder, _ = saved(done.stdout)
    record = json.loads((folder / "provenance.json").read_text())
    assert record["command"][1:] == ["lens", "the cat", "--model", TINY]
    assert record["versions"]["jax"]
