"""Digests, drift reports and patch sets.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata

import pytest

from interp_jax.transforms.patcher import Patcher, PatchError, PatchSet
from interp_jax.transforms.patcher.drift import APPLIES, BROKEN, CHANGED, MISSING_UPSTREAM

OLD = '''
def f(x):
    """Adds one."""
    y = x + 1
    return y

class A:
    def m(self, x):
        return x * 2

    @property
    def p(self):
        return self._p

    @p.setter
    def p(self, value):
        self._p = value
'''
PATCHES = {"f": ["x + 1", "x + 2"], "A": ["x * 2", "x * 5", "return self._p", "return 0"]}


@pytest.fixture
def old(make_module):
    return make_module(OLD)


def test_digests_are_of_what_upstream_does(make_module, old) -> None:
    digests = Patcher(old, PATCHES).digests()
    assert list(digests) == ["f", "A.m", "A.p"]
    assert all(len(digest) == 64 for digest in digests.values())
    reworded = make_module(OLD.replace('"""Adds one."""', "# One more.").replace("x * 2", "(x * 2)  # twice"))
    assert Patcher(reworded, PATCHES).digests() == digests
    changed = make_module(OLD.replace("return y", "return y or 0"))
    now = Patcher(changed, PATCHES).digests()
    assert {name for name in digests if digests[name] != now[name]} == {"f"}
    with Patcher(old, f=["y = $x", "y = 0"]):  # what is in force is not upstream
        assert Patcher(old, PATCHES).digests() == digests


def test_it_applies(old) -> None:
    patcher = Patcher(old, PATCHES)
    assert patcher.check().status == APPLIES
    report = Patcher(old, PATCHES, upstream=patcher.digests()).check()
    assert [(drift.member, drift.status) for drift in report.members] == [
        (f"{old.__name__}:{member}", APPLIES) for member in ("f", "A.m", "A.p")
    ]
    assert not patcher.is_active


def test_upstream_changed_nearby(make_module, old) -> None:
    digests = Patcher(old, PATCHES).digests()
    new = make_module(OLD.replace("return y", "return y or 0"))
    report = Patcher(new, PATCHES, upstream=digests).check()
    assert report.status == CHANGED
    assert not report.is_broken
    (drift,) = [drift for drift in report.members if drift.status == CHANGED]
    assert drift.member == f"{new.__name__}:f"
    assert drift.detail.startswith(f"recorded {digests['f'][:12]}, now ")


def test_upstream_changed_nearby_with_the_recorded_source(make_module, old) -> None:
    import inspect

    recorded = {"f": inspect.getsource(old.f), "A.m": inspect.getsource(old.A.m)}
    new = make_module(OLD.replace("return y", "return y or 0"))
    report = Patcher(new, PATCHES).check(recorded)
    statuses = {drift.member.partition(":")[2]: drift for drift in report.members}
    assert statuses["f"].status == CHANGED
    assert statuses["f"].detail.splitlines()[-2:] == ["-    return y", "+    return y or 0"]
    assert statuses["A.m"].status == APPLIES
    assert statuses["A.p"].detail == "no digest is recorded for it; digests() gives the present one"
    assert "      -    return y".strip() in str(report)


def test_it_does_not_apply(make_module) -> None:
    new = make_module(OLD.replace("x + 1", "1 + x"))
    report = Patcher(new, PATCHES).check()
    assert report.is_broken
    assert report.status == BROKEN
    assert [drift.status for drift in report.members] == [BROKEN, APPLIES, APPLIES]
    assert report.members[0].detail.startswith(f"Pattern `x + 1` matches 0 places in {new.__name__}:f")
    assert f"{new.__name__}.py:4: `1 + x`" in str(report)


def test_it_matches_but_cannot_be_put_in_place(old) -> None:
    report = Patcher(old, f=["x + 1", "undefined_name(x)"]).check()
    assert report.is_broken
    assert "A replacement uses 'undefined_name'" in str(report)


def test_upstream_is_not_there() -> None:
    assert Patcher("no_such_package_x.y", f=["1", "2"]).check().status == MISSING_UPSTREAM
    report = Patcher("json.no_such_module", f=["1", "2"]).check()
    assert report.status == BROKEN
    assert "Module 'json.no_such_module' cannot be imported" in str(report)


# --- patch sets -----------------------------------------------------------------------------------------------------


@pytest.fixture
def patch_set(old) -> PatchSet:
    tags = Patcher(old, {"A.m": ["x * 2", "x * 5"]})
    mends = Patcher(old, f=["x + 1", "x + 2"])
    return PatchSet("example", tags=(tags,), mends=(mends,), versions={"numpy": ">=1", "pytest": ">=1,<1000"})


def test_a_patch_set_is_all_its_patchers(old, patch_set) -> None:
    with patch_set, patch_set:
        assert (old.f(0), old.A().m(1)) == (2, 5)
    assert (old.f(0), old.A().m(1)) == (1, 2)
    patch_set.install()
    assert (old.f(0), old.A().m(1)) == (2, 5)
    patch_set.uninstall()
    assert (old.f(0), old.A().m(1)) == (1, 2)
    assert patch_set.patchers == (*patch_set.mends, *patch_set.tags)
    assert patch_set.diff().count("--- a/") == 2
    assert patch_set.require_version()["numpy"] == importlib.metadata.version("numpy")


def test_a_patch_set_enters_all_or_nothing(old, patch_set) -> None:
    broken = dataclasses.replace(patch_set, tags=(*patch_set.tags, Patcher(old, f=["return z", "return 0"])))
    for enter in (broken.__enter__, broken.install):
        with pytest.raises(PatchError, match="matches 0 places"):
            enter()
        assert (old.f(0), old.A().m(1)) == (1, 2)
        assert not any(patcher.is_active for patcher in broken.patchers)


def test_recorded_digests_of_a_patch_set(make_module, old, patch_set) -> None:
    name = old.__name__
    recorded = patch_set.digests()
    assert list(recorded) == [f"{name}:f", f"{name}:A.m"]
    assert dataclasses.replace(patch_set, upstream=recorded).check().status == APPLIES
    off = dataclasses.replace(patch_set, upstream={**recorded, f"{name}:f": "0" * 64})
    assert off.status == CHANGED
    assert f"{name}:f: {CHANGED}\n    recorded 000000000000, now " in str(off.check())


def test_versions_out_of_range(old, patch_set) -> None:
    numpy, pytest_version = importlib.metadata.version("numpy"), importlib.metadata.version("pytest")
    outdated = dataclasses.replace(patch_set, versions={"numpy": "<1", "pytest": ">=9999", "jax": ">=0.1"})
    for use in (outdated.require_version, outdated.__enter__, outdated.install):
        with pytest.raises(PatchError) as caught:
            use()
        assert str(caught.value).splitlines() == [
            f"Upstream versions numpy {numpy}, pytest {pytest_version} in patch set 'example'.",
            "  Expected: numpy <1, pytest >=9999, jax >=0.1.",
            "  Fix: pip install 'numpy<1' 'pytest>=9999' 'jax>=0.1', "
            "or check the patches against your version and widen the range.",
        ]
    report = outdated.check()
    assert report.status == BROKEN
    assert report.members[0].member == "versions of numpy, pytest, jax"
    assert [drift.status for drift in report.members[1:]] == [APPLIES, APPLIES]
    assert old.f(0) == 1


def test_a_distribution_that_is_not_installed(patch_set) -> None:
    absent = dataclasses.replace(patch_set, versions={"no-such-distribution-x": ">=1"})
    assert absent.status == MISSING_UPSTREAM
    with pytest.raises(PatchError, match=r"no-such-distribution-x \(not installed\) in patch set 'example'"):
        absent.require_version()
