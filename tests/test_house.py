"""The house: what is packaged, pinned, listed and tracked agrees with what is there.

Source: interp_jax.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from interp_jax.models import loading
from tests.source_tree import MAPPED, MODULES, ROOT, tracked_files

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
REQUIREMENTS = [
    Requirement(text)
    for group in (PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values())
    for text in group
]


def pins(name: str) -> dict[str, Version]:
    """The versions a constraints file pins, by distribution."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!]+)", line)
        assert match, f"{name}: {line!r} is not NAME==VERSION"
        found[canonicalize_name(match.group(1))] = Version(match.group(2))
    return found


def test_every_folder_with_code_is_packaged() -> None:
    folders = {name if module.is_package else name.rpartition(".")[0] for name, module in MODULES.items()}
    assert sorted(SETUPTOOLS["packages"]) == sorted(folders)
    assert SETUPTOOLS["package-dir"] == {
        "interp_jax": "interp_jax",
        **{f"interp_jax.{folder}": folder for folder in MAPPED},
    }


def test_every_folder_with_code_says_what_it_is() -> None:
    assert [name for name in SETUPTOOLS["packages"] if name not in MODULES] == []


def test_pyright_finds_the_mapped_folders() -> None:
    links = {link.name: link.resolve() for link in (ROOT / "typings" / "interp_jax").iterdir()}
    front_door = {"__init__.pyi": ROOT / "interp_jax" / "__init__.py"}
    assert links == {folder: ROOT / folder for folder in MAPPED} | front_door


def test_the_editable_install_finds_the_mapped_folders() -> None:
    program = f"import interp_jax.{', interp_jax.'.join(MAPPED)} as last; print(last.__file__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.strip() == str(ROOT / MAPPED[-1] / "__init__.py")


def test_a_wheel_holds_every_module_and_nothing_else(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    for path in tracked_files():
        if path.relative_to(ROOT).parts[0] in ("interp_jax", *MAPPED) or path.parent == ROOT:
            target = source / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*command, "-w", out, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("interp_jax-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    expected = {
        (name.replace(".", "/") + ("/__init__.py" if module.is_package else ".py")) for name, module in MODULES.items()
    }
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == expected | {"interp_jax/py.typed"}
    # It imports from where it was unpacked, the mapped folders too.
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        f"import interp_jax.{', interp_jax.'.join(MAPPED)}\n"
        "print(interp_jax.__file__, interp_jax.patches.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.count(str(tmp_path / "site" / "interp_jax")) == 2


def test_the_command_is_there() -> None:
    module, _, function = PROJECT["project"]["scripts"]["interp-jax"].partition(":")
    assert module in MODULES
    assert any(isinstance(node, ast.FunctionDef) and node.name == function for node in MODULES[module].tree.body)


def test_every_import_is_declared() -> None:
    declared = {canonicalize_name(r.name).replace("-", "_") for r in REQUIREMENTS} | {"orbax"}
    known = declared | set(sys.stdlib_module_names) | {"interp_jax"}
    undeclared = {
        (str(module), name)
        for module in MODULES.values()
        for node in ast.walk(module.tree)
        for name in (
            [alias.name.split(".")[0] for alias in node.names]
            if isinstance(node, ast.Import)
            else [(node.module or "interp_jax").split(".")[0]]
            if isinstance(node, ast.ImportFrom) and not node.level
            else []
        )
        if name not in known
    }
    assert undeclared == set()


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_the_pins_fit_what_is_declared(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    # Tunix has an environment of its own.
    pinned = {**pins("constraints-tunix.txt"), **pins("constraints.txt")}
    assert requirement.specifier.contains(pinned[name])
    oldest = pins("constraints-oldest.txt")
    if name in oldest:
        assert requirement.specifier.contains(oldest[name])


@pytest.mark.parametrize(
    "text", [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["transformers"]]
)
def test_the_oldest_environment_holds_the_lower_bounds(text: str) -> None:
    """What is declared as the oldest supported version is the one `make test-oldest` runs."""
    requirement = Requirement(text)
    (bound,) = [s.version for s in requirement.specifier if s.operator == ">="]
    assert pins("constraints-oldest.txt")[canonicalize_name(requirement.name)] == Version(bound)


def test_the_readme_states_the_tested_versions_of_jax() -> None:
    readme = (ROOT / "README.md").read_text()
    for file in ("constraints.txt", "constraints-oldest.txt"):
        assert f"JAX {pins(file)['jax']}" in readme


def test_the_version_has_a_changelog_entry() -> None:
    assert f"## {PROJECT['project']['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_patch_set_is_known_to_the_loader() -> None:
    """A family is one file in `patches/` and one line in the loader: neither without the other."""
    families = {
        name
        for name, module in MODULES.items()
        if module.folder == "patches"
        and any(
            isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PATCH_SET" for node in module.tree.body
        )
    }
    assert families == {*loading.FAMILIES.values(), *loading.TUNIX.values()}


def test_every_patch_set_is_under_test() -> None:
    imports = [
        line
        for path in (ROOT / "tests" / "patches").rglob("test_*.py")
        for line in path.read_text().splitlines()
        if line.startswith("from interp_jax.patches import ")
    ]
    names = {family.rpartition(".")[2] for family in (*loading.FAMILIES.values(), *loading.TUNIX.values())}
    assert [name for name in sorted(names) if not any(name in line for line in imports)] == []


def test_make_targets_that_the_readme_names_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`?make ([a-z][\w-]*)", (ROOT / "README.md").read_text()))
    assert {"demo", "test"} <= named
    assert named <= targets
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert set(phony.group(1).split()) == targets


def test_the_map_in_the_readme_names_every_folder() -> None:
    readme = (ROOT / "README.md").read_text()
    folders = {name.partition(".")[2].replace(".", "/") for name in SETUPTOOLS["packages"] if name.count(".") == 1}
    assert [folder for folder in sorted(folders) if f"{folder}/" not in readme] == []


# Where this machine keeps things, and where packages come from here, are nobody else's business.
MACHINE = re.compile(r"(?<![\w.~/-])/(?:home|root|work|Users|workspace|mnt|opt)/[\w.]")
REGISTRY = re.compile(
    r"https?://[^\s)\"']*(?:pypi|pythonhosted|npmjs|registry|/simple\b)|--(?:extra-)?index-url|--find-links"
)


def test_no_file_names_this_machine_or_a_registry() -> None:
    offenders = []
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" in content or path == Path(__file__).resolve():
            continue
        for number, line in enumerate(content.decode().splitlines(), 1):
            if MACHINE.search(line) or REGISTRY.search(line):
                offenders.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert offenders == []


@pytest.mark.parametrize(
    ("line", "is_bad"),
    [
        ("see /root/.cache", True),
        ("open('/home/user/x')", True),
        ("pip install --index-url x", True),
        ("https://pypi.example.org/simple/", True),
        ("a/work/b and ./root/x", False),
        ("https://github.com/opt/in", False),
        ("https://arxiv.org/abs/1", False),
    ],
)
def test_the_pattern_sees_machines_and_registries(line: str, is_bad: bool) -> None:
    assert bool(MACHINE.search(line) or REGISTRY.search(line)) == is_bad


def test_every_ignored_lint_rule_says_why() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^ignore = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    assert [line for line in block.group(1).splitlines() if not re.match(r'    "\w+",\s+# \w', line)] == []


def test_every_exception_in_the_code_says_why() -> None:
    """`noqa` names its rule; a bare `type: ignore` or `noqa` would hide whatever comes later."""
    bare = re.compile(r"#\s*(?:noqa(?!:)|type:\s*ignore(?!\[)|pyright:\s*ignore(?!\[))")
    offenders = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked_files()
        if path.suffix == ".py" and path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if bare.search(line)
    ]
    assert offenders == []


def test_nothing_is_skipped() -> None:
    """Tests that cannot run are no tests: what needs more than this machine says so by its marker."""
    pattern = re.compile(r"pytest\.(?:mark\.)?(?:skip|skipif|importorskip|xfail)\b|unittest\.skip")
    offenders = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked_files()
        if path.suffix == ".py" and path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert offenders == []


def test_python_versions_agree() -> None:
    requires = SpecifierSet(PROJECT["project"]["requires-python"])
    oldest = PROJECT["tool"]["pyright"]["pythonVersion"]
    assert oldest in requires
    assert f"py{oldest.replace('.', '')}" == PROJECT["tool"]["ruff"]["target-version"]
    assert f"Python {oldest}" in (ROOT / "README.md").read_text()
