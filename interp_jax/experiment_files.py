"""Experiments by name or file, and their configurations from flags and from the folders of earlier runs.

An experiment is a module with a frozen `Config` whose fields have defaults (one of them `model`), a `SMOKE` instance of
it, `run(config, *, lm)` and `plot(result)`. It is found by its path; there is no list to add it to.

>>> "ioi_layers" in names(), question(find("ioi_layers")).endswith("?")
(True, True)
>>> parse_flags(find("atp_star"), ["--top-k", "3"], find("atp_star").Config(), prog="atp_star").top_k
3

Sharp edges: a file outside the package is executed as a module of its own; it may import `interp_jax`, not its
neighbours.

Source: interp_jax; the flags are tyro's.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import pkgutil
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from interp_jax.core.errors import InvalidInputError, LoadError, UnknownNameError, four_part

_PARTS = ("Config", "SMOKE", "run", "plot")


def names() -> list[str]:
    """The names of the experiments that come with the package."""
    from interp_jax import experiments

    return [module.name for module in pkgutil.iter_modules(experiments.__path__)]


def question(experiment: ModuleType) -> str:
    """What an experiment asks: the first line of its docstring."""
    return (experiment.__doc__ or "").partition("\n")[0]


def find(name: str) -> ModuleType:
    """The module of an experiment.

    Args:
        name: Its name, or the path of its file.

    Returns:
        The module.

    Raises:
        UnknownNameError: There is no such experiment or file.
        InvalidInputError: The file lacks a part of an experiment.
    """
    path = Path(name)
    if path.suffix != ".py":
        if name not in names():
            raise UnknownNameError(
                four_part(
                    f"Unknown experiment {name!r}",
                    where="interp-jax run",
                    names=names(),
                    given=name,
                    fix="use one of these names, or the path of a file that ends in .py.",
                )
            )
        return importlib.import_module(f"interp_jax.experiments.{name}")
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise UnknownNameError(
            four_part(
                f"There is no file {path}",
                where="interp-jax run",
                expected="an experiment's name, or the path of its file.",
                fix="`interp-jax run` alone lists the names.",
            )
        )
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while they are made.
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    missing = [part for part in _PARTS if not hasattr(module, part)]
    if missing:
        raise InvalidInputError(
            four_part(
                f"{path} without {', '.join(missing)} was given",
                where="interp-jax run",
                expected=f"a module with {', '.join(_PARTS)}.",
                fix="see experiments/ioi_layers.py for one.",
            )
        )
    return module


def parse_flags(experiment: ModuleType, flags: Sequence[str], default: Any, *, prog: str) -> Any:
    """The configuration that flags ask for.

    Args:
        experiment: The experiment.
        flags: Such as `["--top-k", "3"]`; `["--help"]` prints them all and ends.
        default: What holds where no flag says otherwise.
        prog: What the help calls the program.

    Returns:
        A `Config`.
    """
    import tyro

    return tyro.cli(type(default), args=list(flags), default=default, prog=prog, description=question(experiment))


def read_config(cls: type, path: Path) -> Any:
    """The configuration saved by an earlier run.

    Args:
        cls: The experiment's `Config`.
        path: The `config.json`, or the folder it is in.

    Returns:
        The configuration.

    Raises:
        LoadError: There is no such file, or it is another experiment's.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        return _rebuilt(cls, json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise LoadError(
            four_part(
                f"{file} cannot be used: {error}",
                where="interp-jax run --config",
                expected=f"the config.json that a run of this experiment saved: {', '.join(_fields(cls))}.",
                fix="give a folder from runs/ of the same experiment.",
            )
        ) from error


def _fields(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _rebuilt(cls: Any, data: Any) -> Any:
    """JSON data as the dataclass it was written from."""
    if dataclasses.is_dataclass(cls):
        if unknown := sorted(set(data) - set(_fields(cls))):
            raise ValueError(f"unknown {', '.join(unknown)}")
        hints, make = typing.get_type_hints(cls), typing.cast(Any, cls)
        return make(**{name: _rebuilt(hints[name], value) for name, value in data.items()})
    if isinstance(data, list):
        inner = (typing.get_args(cls) or (Any,))[0]
        return tuple(_rebuilt(inner, item) for item in data)
    return data
