"""The `interp-jax` command.

    interp-jax demo                       what SmolLM2-135M thinks at each layer, and what its answer depends on
    interp-jax lens "The capital of France is"
    interp-jax steer "I think you're" --positive Anger --negative Calm --coefficient 4
    interp-jax doctor smollm2-135m        is what I read what I think it is?
    interp-jax patches                    does every patch set fit the upstream code installed here?
    interp-jax run atp_star --top-k 20    an experiment; every field of its Config is a flag

>>> main(["lens", ""])
2

Exit status: 0, or 1 when a check found something wrong, 2 for a mistake in what was asked, 130 after Ctrl-C.

Sharp edges: results go to stdout, progress and errors to stderr. Nothing heavy is imported before a command needs
it, so `--help` answers at once. A mistake is told in four parts and without a traceback; `INTERP_JAX_TRACEBACK=1`
adds the traceback.

Source: interp_jax.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from interp_jax.core.errors import InterpError, InvalidInputError, UnknownNameError, four_part

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

COMMANDS = ("demo", "lens", "steer", "doctor", "patches", "run")
DEFAULT_MODEL = "smollm2-135m"
_MODEL_HELP = "a name (smollm2-135m, or a model in the local Hugging Face cache), a .gguf file, or a directory"


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints have four parts, too."""

    def error(self, message: str) -> NoReturn:
        fix = f"see `{self.prog} --help`."
        wrong = re.match(r"argument COMMAND: invalid choice: '(.*?)' \(", message)
        if wrong:
            what = f"Unknown command {wrong[1]!r}"
            raise UnknownNameError(four_part(what, where=self.prog, names=COMMANDS, given=wrong[1], fix=fix))
        what, usage = message[0].upper() + message[1:], " ".join(self.format_usage().split())
        if re.match(r"unrecognized arguments: [^-]", message):
            fix = f"a text of several words goes in quotes; {fix}"
        raise InvalidInputError(four_part(what, where=self.prog, expected=usage.removeprefix("usage: ") + ".", fix=fix))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(prog="interp-jax", description="Read and change any intermediate value of a JAX language model.")
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Callable[..., int], words: str, *, add_help: bool = True) -> argparse.ArgumentParser:
        description = words[0].upper() + words[1:] + "."
        sub = commands.add_parser(name, help=words, description=description, add_help=add_help, allow_abbrev=add_help)
        sub.set_defaults(run=run)
        return sub

    demo = command("demo", run_demo, "what a model thinks at each layer, and which layers its answer depends on")
    lens = command("lens", run_lens, "the logit lens of a text: what the model would say after each layer")
    steer = command("steer", run_steer, "continue a prompt with and without a steering vector from two other prompts")
    doctor = command("doctor", run_doctor, "check that each site of a model holds what its name says")
    command("patches", run_patches, "check that every patch set fits the upstream code installed here")
    # What it does not know of itself, --help too, is the experiment's.
    run = command("run", run_experiment, "run an experiment; without a name, list them", add_help=False)
    run.add_argument("experiment", nargs="?", help="its name, such as atp_star, or its file")
    run.add_argument("--smoke", action="store_true", help="at the size that only shows that it works")
    run.add_argument("--config", type=Path, help="as an earlier run: the config.json in its folder")

    demo.add_argument("--prompt", help="the text whose next token is asked for (default: Mary and John at the store)")
    demo.add_argument("--answer", help='the right next token (default: " Mary")')
    demo.add_argument("--other", help='the wrong one it competes with (default: " John")')
    lens.add_argument("text", help="the text to read")
    lens.add_argument(
        "--views",
        default="0.resid_pre,resid_post",
        help="sites to decode, separated by commas: resid_pre, resid_mid, 5.mlp_out, ... (default: %(default)s)",
    )
    lens.add_argument("--top-k", type=int, default=5, help="tokens kept per cell (default: %(default)s)")
    _add_steering(steer)
    for sub in (demo, lens, steer):
        sub.add_argument("--model", default=DEFAULT_MODEL, help=f"{_MODEL_HELP} (default: %(default)s)")
    for sub in (demo, lens, steer, run):
        sub.add_argument("--out", type=Path, default=Path("runs"), help="folder for the results (default: %(default)s)")
    doctor.add_argument("model", nargs="?", default=DEFAULT_MODEL, help=f"{_MODEL_HELP} (default: %(default)s)")
    doctor.add_argument("--patches", action="store_true", help="check the patch sets instead of a model")
    return parser


def _add_steering(steer: argparse.ArgumentParser) -> None:
    """The options of `interp-jax steer`."""
    shown = "(default: %(default)s)"
    steer.add_argument("prompt", help="the text to continue")
    steer.add_argument("--positive", required=True, help="a text to steer towards")
    steer.add_argument("--negative", required=True, help="a text to steer away from")
    steer.add_argument("--layer", type=int, help="add the vector before this layer (default: two fifths of the way up)")
    steer.add_argument("--coefficient", type=float, default=4.0, help=f"what it is multiplied by {shown}")
    places = ("front", "middle", "back", "everywhere")
    steer.add_argument("--placement", default="front", help=f"where on the prompt: {', '.join(places)} {shown}")
    steer.add_argument("--row", type=int, help="add this row of the vector alone, by default at every position")
    steer.add_argument("--at", default="prompt", help=f"steer the prompt, generated tokens, or all {shown}")
    steer.add_argument("--n-samples", type=int, default=3, help=f"completions of each kind {shown}")
    steer.add_argument("--max-new-tokens", type=int, default=40, help=f"tokens per completion {shown}")
    steer.add_argument("--temperature", type=float, default=1.0, help=f"0 for the most probable tokens {shown}")
    steer.add_argument("--top-p", type=float, default=0.3, help=f"sample among the likeliest tokens {shown}")
    steer.add_argument("--frequency-penalty", type=float, default=1.0, help=f"against repetition {shown}")
    steer.add_argument("--seed", type=int, default=0, help=f"what is drawn with {shown}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: What follows the command's name; by default what the process was given.

    Returns:
        The exit status.
    """
    try:
        parser = build_parser()
        options, rest = parser.parse_known_args(arguments)
        if getattr(options, "run", None) is run_experiment:
            return run_experiment(options, rest)
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        if options.version:
            return run_version(options)
        if not hasattr(options, "run"):
            parser.print_help()
            return 0
        status = options.run(options)
        sys.stdout.flush()
        return status
    except SystemExit as stop:  # argparse, after --help
        return int(stop.code or 0)
    except InterpError as error:
        if os.environ.get("INTERP_JAX_TRACEBACK"):
            raise
        print(f"interp-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterp-jax: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `interp-jax lens ... | head`: whoever read us has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run_version(options: argparse.Namespace) -> int:
    """`interp-jax --version`; it has no options."""
    from importlib.metadata import version

    print(f"interp-jax {version('interp-jax')}")
    return 0


def run_demo(options: argparse.Namespace) -> int:
    """`interp-jax demo` with its options."""
    _check_writable(options.out)
    from interp_jax.experiments import ioi_layers
    from interp_jax.figures import terminal
    from interp_jax.figures.token_text import visible

    given = {name: getattr(options, name) for name in ("prompt", "answer", "other")}
    for name, text in given.items():
        _check_text(text, where=f"interp-jax demo --{name}")
    config = ioi_layers.Config(model=options.model, **{name: text for name, text in given.items() if text is not None})
    lm = _loaded(options.model)
    print(f"\nPrompt: {config.prompt}")
    result = ioi_layers.run(config, lm=lm)

    _print_lens(result.lens, result.decode)
    _heading("Which layers does the answer depend on?")
    print(f"  {result.metric} = {result.effects.clean[0]:.3f}; how it changes when one write is zeroed:\n")
    print(terminal.effects_table(result.effects, n_columns=_columns()), end="\n\n")
    for sentence in terminal.effect_sentences(result.effects, visible(config.answer), visible(config.other)):
        print(f"  {sentence}")
    n_sites = len(result.effects.sites)
    _heading(f"The {n_sites} effects, measured twice")
    ways = {"loop": f"{n_sites + 1} running passes", "sweep": "one compiled program"}
    for route, how in ways.items():
        first, again = result.seconds[route]
        print(f"  {route:<6} {how:<22} {first:6.2f} s the first time (compiles), {again:6.2f} s the second time")
    print(f"  largest difference between the two: {result.max_difference:.1e} (in logits)")
    _save(result, "demo", config, ioi_layers.plot(result), lm, options.out)
    return 0


def run_lens(options: argparse.Namespace) -> int:
    """`interp-jax lens TEXT` with its options."""
    _check_text(options.text, where="interp-jax lens")
    _check_writable(options.out)
    from interp_jax.figures.logit_lens import lens_figure, lens_page
    from interp_jax.methods.logit_lens import logit_lens

    views = [view.strip() for view in options.views.split(",") if view.strip()]
    if not views:
        raise InvalidInputError(
            four_part(
                f"--views {options.views!r} names no site",
                where="interp-jax lens",
                expected="sites separated by commas.",
                fix="leave --views out, or write for example --views resid_mid,5.mlp_out.",
            )
        )
    lm = _loaded(options.model)
    result = logit_lens(lm, lm.tokenize(options.text), views=views, top_k=options.top_k)
    _print_lens(result, lm.decode)
    figures = {
        "logit_lens.png": lens_figure(result, lm.decode, title=lm.name),
        "logit_lens.html": lens_page(result, lm.decode, title=lm.name, text=options.text),
    }
    config = {"model": options.model, "text": options.text, "views": views, "top_k": options.top_k}
    _save(result, "lens", config, figures, lm, options.out)
    return 0


def run_steer(options: argparse.Namespace) -> int:
    """`interp-jax steer PROMPT` with its options."""
    given = {"PROMPT": options.prompt, "--positive": options.positive, "--negative": options.negative}
    for name, text in given.items():
        _check_text(text, where=f"interp-jax steer {name}")
    _check_writable(options.out)
    from dataclasses import replace

    from interp_jax.figures import terminal
    from interp_jax.figures.token_text import token_texts
    from interp_jax.methods.steering import Sampling, prompt_pair, prompt_tokens, steered_generation

    lm = _loaded(options.model)
    layer = options.layer if options.layer is not None or lm.config is None else 2 * lm.config.n_layers // 5
    vector = prompt_pair(lm, options.positive, options.negative, layer or 0).vector()
    if options.row is not None:
        if not -len(vector) <= options.row < len(vector):
            raise InvalidInputError(
                four_part(
                    f"--row {options.row} of a vector of {len(vector)} rows was given",
                    where="interp-jax steer",
                    expected=f"a row from 0 to {len(vector) - 1}.",
                    fix="row 0 is BOS, where the difference is 0; the last words are the last rows.",
                )
            )
        vector = vector.row(options.row)
    placed_everywhere = options.row is not None and options.placement == "front"
    vector = replace(vector, placement="everywhere" if placed_everywhere else options.placement)
    names = ("n_samples", "max_new_tokens", "temperature", "top_p", "frequency_penalty", "seed", "at")
    sampling = Sampling(**{name: getattr(options, name) for name in names})
    tokens = prompt_tokens(lm, options.prompt)
    steered, plain = (
        steered_generation(lm, tokens, vector, coefficient=c, sampling=replace(sampling, at=at))
        for c, at in ((options.coefficient, sampling.at), (0.0, "prompt"))
    )
    _heading(f"{options.coefficient:g} times {options.positive!r} - {options.negative!r} at {vector.site}")
    print("  |added| / |resid| at each position of the prompt:\n")
    ratios = steered.sizes[vector.site].ratio[0, : tokens.shape[1]]
    print(terminal.size_table(token_texts(lm.decode, tokens[0]).tolist(), ratios.tolist(), n_columns=_columns()))
    for name, generation in (("Unsteered", plain), ("Steered", steered)):
        _heading(f"{name}: {options.prompt} ...")
        print(terminal.numbered_texts(generation.texts, n_columns=_columns()))
    config = {name: value for name, value in vars(options).items() if name not in ("run", "out", "version")}
    _save({"vector": vector, "steered": steered, "unsteered": plain}, "steer", config, {}, lm, options.out)
    return 0


def run_doctor(options: argparse.Namespace) -> int:
    """`interp-jax doctor [MODEL]` with its options."""
    if options.patches:
        return run_patches(options)
    report = _loaded(options.model).check()
    print(report)
    return 0 if report.ok else 1


def run_patches(options: argparse.Namespace) -> int:
    """`interp-jax patches`; it has no options."""
    reports = {patch_set.name: patch_set.check() for patch_set in patch_sets()}
    print("\n".join(f"{name}: {report}" for name, report in reports.items()))
    return 1 if any(report.is_broken for report in reports.values()) else 0


def run_experiment(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """`interp-jax run [EXPERIMENT]` with its options, and the flags of the experiment."""
    from interp_jax import experiment_files

    if options.experiment is None:
        if flags:
            print("usage: interp-jax run [EXPERIMENT] [--smoke] [--config CONFIG] [--out OUT] [its own flags]\n")
        width = max(map(len, experiment_files.names()))
        for name in experiment_files.names():
            print(f"{name:<{width}}  {experiment_files.question(experiment_files.find(name))}")
        return 0
    _check_writable(options.out)
    experiment = experiment_files.find(options.experiment)
    default = experiment.SMOKE if options.smoke else experiment.Config()
    if options.config is not None:
        default = experiment_files.read_config(experiment.Config, options.config)
    name = experiment.__name__.rpartition(".")[2]
    config = experiment_files.parse_flags(experiment, flags, default, prog=f"interp-jax run {name}")
    lm = _loaded(config.model)
    print(f"{config}\n")
    result = experiment.run(config, lm=lm)
    print(result)
    _save(result, name, config, experiment.plot(result), lm, options.out)
    return 0


def patch_sets() -> list[Any]:
    """Every patch set there is, found by looking into the folder."""
    import importlib
    import pkgutil

    from interp_jax import patches

    modules = [
        importlib.import_module(f"{patches.__name__}.{found.name}") for found in pkgutil.iter_modules(patches.__path__)
    ]
    names = ("PATCH_SET", "STACKED_PATCH_SET")
    return [getattr(module, name) for module in modules for name in names if hasattr(module, name)]


def _loaded(name: str) -> LanguageModel:
    from interp_jax.models.loading import load

    start = time.perf_counter()
    lm = load(name)
    print(f"{lm}\n  loaded in {time.perf_counter() - start:.1f} s")
    return lm


def _print_lens(result: Any, decode: Callable[[Any], str]) -> None:
    """The most probable next tokens, and the lens as a table."""
    from interp_jax.figures import terminal
    from interp_jax.figures.token_text import token_texts

    _heading("Most probable next tokens")
    texts = token_texts(decode, result.top_ids[-1, 0, -1]).tolist()
    print(terminal.token_table(texts, result.top_probabilities[-1, 0, -1].tolist(), n_columns=_columns()))
    _heading("The best next token at each layer (logit lens)")
    is_coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(terminal.lens_table(result, decode, n_columns=_columns(), is_coloured=is_coloured, n_lines=16))
    own = "the model's own answer"
    print(f"  bold: {own}; the brighter a cell, the more probable its token" if is_coloured else f"  *: {own}")


def _save(result: Any, name: str, config: Any, figures: dict[str, Any], lm: Any, out: Path) -> None:
    from interp_jax.core.results import save_result

    patch_set = lm.upstream.patch_set
    digests = None if patch_set is None else {lm.upstream.name: patch_set.digests()}
    try:
        folder = save_result(result, name=name, config=config, figures=figures, patch_digests=digests, root=out)
    except OSError as error:
        raise InvalidInputError(
            four_part(
                f"The result could not be written ({error})",
                where=f"--out {out}",
                expected="a folder with room that can be written to.",
                fix="make room, or choose another folder with --out.",
            )
        ) from error
    _heading("Saved")
    for path in (*(folder / file for file in figures), folder):
        print(f"  {path}{'/' if path == folder else ''}")


def _heading(text: str) -> None:
    print(f"\n{text}")


def _columns() -> int:
    return min(120, shutil.get_terminal_size().columns)


def _check_text(text: str | None, *, where: str) -> None:
    if text is None:
        return
    fix = f'give the text in quotes: {where} "The capital of France is".'
    if not text:
        raise InvalidInputError(
            four_part("An empty text was given", where=where, expected="at least one character.", fix=fix)
        )
    if not text.isprintable() and any("\ud800" <= char <= "\udfff" for char in text):
        raise InvalidInputError(
            four_part("Bytes that are not UTF-8 were given", where=where, expected="UTF-8 text.", fix=fix)
        )


def _check_writable(folder: Path) -> None:
    """Before anything is computed: whether the results will find room in the folder."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "is not a folder" if not existing.is_dir() else "cannot be written to"
        raise InvalidInputError(
            four_part(
                f"--out {folder} was given, but {existing} {what}",
                where="interp-jax",
                expected="a folder that can be made and written to.",
                fix="choose another folder, for example --out runs.",
            )
        )


if __name__ == "__main__":
    sys.exit(main())
