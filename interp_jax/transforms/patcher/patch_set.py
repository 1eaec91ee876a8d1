"""`PatchSet`: all patches for one upstream model family, with the versions and digests they were written against.

Tags make sites and change nothing that is computed; mends repair upstream. They are kept apart so that the tags alone
can be proven to change nothing.

>>> from interp_jax.transforms.patcher.patcher import Patcher
>>> tags = Patcher("textwrap", {"fill": [("w = $x", "w = $x", (0, None))]})
>>> patch_set = PatchSet("example", tags=(tags,), versions={"numpy": ">=1"})
>>> patch_set.status
'applies'

Sharp edges: entering a patch set refuses upstream versions outside its range, even where every pattern would match;
`dataclasses.replace(patch_set, versions={...})` widens the range at your own risk.

Source: interp_jax.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field

from packaging.specifiers import SpecifierSet

from interp_jax.core.errors import PatchError, four_part
from interp_jax.transforms.patcher.drift import BROKEN, MISSING_UPSTREAM, Drift, DriftReport
from interp_jax.transforms.patcher.patcher import Patcher


@dataclass(frozen=True, eq=False)
class PatchSet:
    """The patches for one upstream model family; a context manager that enters all of them.

    Args:
        name: What the family is called.
        tags: Patchers that make sites.
        mends: Patchers that repair upstream.
        versions: By distribution name, the range of versions the patches are for, for example ">=4.40,<5".
        upstream: Digests of the definitions changed, by "module:member", as `digests()` gives them.
    """

    name: str
    tags: tuple[Patcher, ...] = ()
    mends: tuple[Patcher, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    upstream: Mapping[str, str] = field(default_factory=dict)

    @property
    def patchers(self) -> tuple[Patcher, ...]:
        """All patchers, in the order they are entered."""
        return (*self.mends, *self.tags)

    def __enter__(self) -> PatchSet:
        self.require_version()
        entered: list[Patcher] = []
        try:
            for patcher in self.patchers:
                patcher.__enter__()
                entered.append(patcher)
        except BaseException:
            for patcher in reversed(entered):
                patcher.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for patcher in reversed(self.patchers):
            patcher.__exit__(*exc)

    def install(self) -> None:
        """Puts all patches in force until `uninstall`, or none.

        Raises:
            PatchError: A patch does not fit, or upstream's version is out of range.
        """
        self.require_version()
        installed: list[Patcher] = []
        try:
            for patcher in self.patchers:
                patcher.install()
                installed.append(patcher)
        except BaseException:
            for patcher in reversed(installed):
                patcher.uninstall()
            raise

    def uninstall(self) -> None:
        """Takes all patches out of force."""
        for patcher in reversed(self.patchers):
            patcher.uninstall()

    def require_version(self) -> dict[str, str]:
        """Refuses upstream versions the patches are not for.

        Returns:
            The installed version of each upstream distribution.

        Raises:
            PatchError: A distribution is not installed, or its version is out of range.
        """
        wrong = []
        for distribution, allowed in self.versions.items():
            version = _installed_version(distribution)
            if version is None or not _is_allowed(version, allowed):
                wrong.append(f"{distribution} {'(not installed)' if version is None else version}")
        if wrong:
            ranges = ", ".join(f"{name} {allowed}" for name, allowed in self.versions.items())
            requirements = " ".join(f"'{name}{allowed}'" for name, allowed in self.versions.items())
            raise PatchError(
                four_part(
                    f"Upstream versions {', '.join(wrong)}",
                    where=f"patch set {self.name!r}",
                    expected=f"{ranges}.",
                    fix=f"pip install {requirements}, or check the patches against your version and widen the range.",
                )
            )
        return {name: _installed_version(name) or "" for name in self.versions}

    def diff(self) -> str:
        """What the patches change, as a unified diff of upstream's files."""
        return "\n".join(filter(None, (patcher.diff() for patcher in self.patchers)))

    def digests(self) -> dict[str, str]:
        """Digests of all definitions the patches change, to be recorded as `upstream`.

        Returns:
            "module:member" to SHA-256.
        """
        return {
            f"{patcher.module_name}:{member}": value
            for patcher in self.patchers
            for member, value in patcher.digests().items()
        }

    def check(self) -> DriftReport:
        """Whether the versions are in range and the patches fit upstream as it is now. Nothing is changed.

        Returns:
            The report.
        """
        try:
            self.require_version()
        except PatchError as error:
            is_missing = any(_installed_version(name) is None for name in self.versions)
            status = MISSING_UPSTREAM if is_missing else BROKEN
            report = DriftReport((Drift(f"versions of {', '.join(self.versions)}", status, str(error)),))
            if is_missing:
                return report
        else:
            report = DriftReport(())
        for patcher in self.patchers:
            prefix = f"{patcher.module_name}:"
            recorded = {k.removeprefix(prefix): v for k, v in self.upstream.items() if k.startswith(prefix)}
            report += patcher.check({**patcher.upstream, **recorded})
        return report

    @property
    def status(self) -> str:
        """The worst status of any member."""
        return self.check().status


@functools.cache
def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.lru_cache(maxsize=256)
def _is_allowed(version: str, allowed: str) -> bool:
    return SpecifierSet(allowed).contains(version, prereleases=True)
