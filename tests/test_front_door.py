"""The front door: what it advertises is there, and importing it does next to nothing.

Source: interp_jax.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from types import ModuleType

import pytest

import interp_jax
from interp_jax.core import errors
from tests.source_tree import MODULES

PROMISED = {
    *("greenlets", "harvest", "Patcher", "PatchSet"),
    *("sow", "layer_scope", "loop_layer", "run", "RunningPass", "list_sites", "compilations"),
    *("Site", "Masked", "Activations", "load", "LanguageModel"),
}
ERRORS = {name for name, member in inspect.getmembers(errors, inspect.isclass) if issubclass(member, Exception)}


def test_everything_promised_is_advertised() -> None:
    assert set(interp_jax.__all__) >= PROMISED | ERRORS
    assert set(dir(interp_jax)) >= set(interp_jax.__all__)


@pytest.mark.parametrize("name", interp_jax.__all__)
def test_an_advertised_name_is_the_thing_itself(name: str) -> None:
    value = getattr(interp_jax, name)
    home = importlib.import_module(interp_jax._HOME_OF[name])
    if isinstance(value, ModuleType):
        assert value is home
        assert home.__name__.endswith(f".{name}")
    else:
        assert value is getattr(home, name)
        assert value.__name__ == name


def test_a_type_checker_sees_the_same_names_in_the_same_places() -> None:
    (block,) = (node for node in MODULES["interp_jax"].tree.body if isinstance(node, ast.If))
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, f"{alias.name} is not marked as a re-export"
            is_module = f"{node.module}.{alias.name}" in MODULES
            seen[alias.name] = f"{node.module}.{alias.name}" if is_module else node.module
    assert seen == interp_jax._HOME_OF


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'interp_jax' has no attribute 'hooks'"):
        getattr(interp_jax, "hooks")  # noqa: B009 - a type checker would refuse the plain access, as it should


def test_an_import_error_inside_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    # `hasattr` must not turn a broken installation into a missing name.
    monkeypatch.setitem(interp_jax._HOME_OF, "broken", "interp_jax.core.no_such_module")
    with pytest.raises(ModuleNotFoundError, match=r"interp_jax\.core\.no_such_module"):
        hasattr(interp_jax, "broken")


def in_a_new_process(program: str, **environment: str) -> str:
    """What a program prints in a fresh Python that has only the given environment variables."""
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "", **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


# What importing the package must not load; each is heavy, optional, or opens a device.
HEAVY = (
    *("jax", "torch", "transformers", "matplotlib", "plotly", "tokenizers", "gguf", "safetensors", "flax", "optax"),
    *("tyro", "IPython", "interp_jax.transforms", "interp_jax.models", "interp_jax.patches"),
)


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = json.loads(in_a_new_process("import interp_jax, json, sys; print(json.dumps(sorted(sys.modules)))"))
    assert "interp_jax" in loaded
    assert [name for name in HEAVY if name in loaded] == []


def test_importing_the_package_needs_no_device() -> None:
    assert in_a_new_process("import interp_jax; print('done')", JAX_PLATFORMS="nope") == "done\n"


def test_importing_any_module_touches_no_device_and_draws_nothing() -> None:
    """Every module but the command line, in one process: no backend, no torch, no plotting, nothing patched."""
    names = [name for name, module in MODULES.items() if module.folder not in ("patches", "figures", "cli")]
    program = (
        "import importlib, json, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "optional = ['torch', 'transformers', 'matplotlib', 'plotly', 'interp_jax.patches']\n"
        "print(json.dumps([name for name in optional if name in sys.modules]))\n"
        "import jax\n"
        "try:\n"
        "    jax.devices()\n"
        "except RuntimeError as error:\n"
        "    print('nope' in str(error))\n"
    )
    loaded, is_untouched = in_a_new_process(program, JAX_PLATFORMS="nope").splitlines()
    assert json.loads(loaded) == []
    assert is_untouched == "True"


def test_using_a_name_loads_only_what_is_below_it() -> None:
    program = "import interp_jax, json, sys; interp_jax.Site; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(in_a_new_process(program))
    assert "interp_jax.core.sites" in loaded
    assert [name for name in ("jax", "interp_jax.transforms", "interp_jax.models") if name in loaded] == []


def test_the_loop_needs_no_model_library() -> None:
    program = "import interp_jax, json, sys; interp_jax.run; interp_jax.Patcher; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(in_a_new_process(program))
    assert [name for name in ("flax", "transformers", "matplotlib", "gguf", "tokenizers") if name in loaded] == []


def test_importing_any_patch_set_patches_nothing() -> None:
    """Upstream's functions have the same code before and after its patch sets are imported."""
    names = [name for name, module in MODULES.items() if module.folder == "patches"]
    program = (
        "import importlib, inspect\n"
        "import transformers.models.gpt2.modeling_flax_gpt2 as gpt2\n"
        "import transformers.models.llama.modeling_flax_llama as llama\n"
        "def codes():\n"
        "    return {\n"
        "        (module.__name__, cls, method): function.__code__\n"
        "        for module in (gpt2, llama)\n"
        "        for cls, members in inspect.getmembers(module, inspect.isclass)\n"
        "        for method, function in inspect.getmembers(members, inspect.isfunction)\n"
        "    }\n"
        "before, names = codes(), [set(vars(module)) for module in (gpt2, llama)]\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "after = codes()\n"
        "assert len(before) > 100\n"
        "assert all(before[key] is after[key] for key in before) and len(before) == len(after)\n"
        "assert names == [set(vars(module)) for module in (gpt2, llama)]\n"
        "print('unpatched')\n"
    )
    assert in_a_new_process(program, JAX_PLATFORMS="cpu") == "unpatched\n"
