"""Class-level patches: the class body is executed again, and what differs moves onto the live class.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from interp_jax.transforms.patcher import Patcher, PatchError

UPSTREAM = '''
import abc, dataclasses, enum, functools

REGISTRY = []

def register(cls):
    REGISTRY.append(cls)
    return cls

def double(fn):
    @functools.wraps(fn)
    def wrapper(*args): return fn(*args) * 2
    return wrapper

class Base:
    def m(self, x): return x

@register
class A(Base):
    """What it is."""
    unit = 2
    doubled = unit * 2
    seen = []

    def m(self, x): return x + self.unit

    def n(self, x, y=doubled): return x + y

    @property
    def p(self): return self.unit

    kept = property(lambda self: self.unit)

@dataclasses.dataclass
class D(Base):
    x: int = 1
    y: float = 2.0

    def total(self): return self.x + self.y

class E(enum.Enum):
    RED = 1

    def twice(self): return self.value * 2

class S:
    __slots__ = ("a",)

class Outer:
    class Inner:
        z = 1

class M(abc.ABC):
    @abc.abstractmethod
    def f(self): ...
    k = 1
'''


@pytest.fixture
def module(make_module):
    return make_module(UPSTREAM)


def snapshot(cls: type) -> dict:
    return {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}


def test_a_class_attribute_and_what_is_computed_from_it(module, caplog) -> None:
    before = snapshot(module.A)
    instance = module.A()
    patcher = Patcher(module, A=["unit = 2", "unit = 10"])
    with caplog.at_level(logging.WARNING, "interp_jax.patcher"), patcher:
        assert (module.A.unit, module.A.doubled, instance.m(1), instance.n(1), instance.p) == (10, 20, 11, 21, 10)
        # Untouched statements keep their objects, and code that only reads the attribute is not exchanged.
        assert module.A.seen is before["seen"]
        assert module.A.m is before["m"]
        assert module.A.__dict__["kept"] is before["kept"]
        assert type(instance) is module.A
    assert snapshot(module.A) == before
    assert list(map(id, snapshot(module.A).values())) == list(map(id, before.values()))
    said = f"{module.__name__}:A ({module.__name__}.py:18): class body executed again; taken from it: doubled, n, unit"
    assert said in caplog.messages
    assert said in patcher.report()


def test_new_method_new_attribute_and_removed_attribute(module) -> None:
    patcher = Patcher(module, A=["seen = []", "extra = 5\ndef new(self): return super().m(1), __class__, self.extra"])
    with patcher:
        assert module.A().new() == (1, module.A, 5)
        assert not hasattr(module.A, "seen")
    assert module.A.seen == []
    assert not hasattr(module.A, "new")
    assert not hasattr(module.A, "extra")


def test_a_method_that_begins_to_use_super(module) -> None:
    instance = module.A()
    with Patcher(module, {"A.m": ["x + self.unit", "super().m(x) * 100"]}) as patcher:
        assert instance.m(1) == 100
        assert "taken from it: m" in patcher.report()
    assert instance.m(1) == 3


def test_a_decorator(module) -> None:
    with Patcher(module, A=["def m(self, x): $$b", "@double\ndef m(self, x): $$b"]):
        assert module.A().m(1) == 6
    assert module.A().m(1) == 3


def test_class_and_method_patches_together(module) -> None:
    with Patcher(module, A=["unit = 2", "unit = 10", "x + self.unit", "x - self.unit", "return x + y", "return y"]):
        assert (module.A().m(1), module.A().n(1)) == (-9, 20)
    assert (module.A().m(1), module.A().n(1)) == (3, 5)


def test_dataclass_fields(module) -> None:
    old = module.D(5)
    with Patcher(module, D=["y: float = 2.0", "y: float = 3.0\nz: int = 7", "self.x + self.y", "self.x + self.z"]):
        new = module.D(1)
        assert (new.z, new.total(), repr(new)) == (7, 8, "D(x=1, y=3.0, z=7)")
        assert [field.name for field in dataclasses.fields(module.D)] == ["x", "y", "z"]
        assert isinstance(old, module.D)
    assert repr(module.D(1)) == "D(x=1, y=2.0)"
    assert module.D(1).total() == 3


def test_flax_fields(make_module) -> None:
    module = make_module(
        """
        import flax.linen as nn
        import jax.numpy as jnp

        class Block(nn.Module):
            width: int = 3

            @nn.compact
            def __call__(self, x):
                return nn.Dense(self.width)(x)

        class Tall(Block):
            height: int = 2
        """
    )
    x = jnp.ones((1, 2))
    block = module.Block()
    old = block.init(jax.random.key(0), x)
    patches = ["width: int = 3", "width: int = 3\nscale: float = 2.0", "return $y", "return $y * self.scale"]
    with Patcher(module, Block=patches):
        assert module.Block(scale=3.0).apply(old, x) == pytest.approx(
            3 * nn.Dense(3).apply({"params": old["params"]["Dense_0"]}, x)
        )
        assert isinstance(block, module.Block)
    with pytest.raises(TypeError, match="scale"):
        module.Block(scale=3.0)
    assert module.Block().apply(old, x).shape == (1, 3)


def test_decorators_run_again_and_this_is_said(module) -> None:
    assert module.REGISTRY == [module.A]
    with Patcher(module, A=["unit = 2", "unit = 10"]) as patcher:
        assert "class body executed again" in patcher.report()
        assert len(module.REGISTRY) == 2
        assert module.REGISTRY[0] is module.A


def test_abstract_classes_stay_abstract(module) -> None:
    with Patcher(module, M=["k = 1", "k = 2"]):
        assert module.M.k == 2
        with pytest.raises(TypeError, match="abstract"):
            module.M()


IMPOSSIBLE = {
    "an enumeration's members": ("E", "RED = 1", "RED = 2", "patch methods of the enumeration"),
    "its slots, bases or metaclass": ("S", '("a",)', '("b",)', "change attributes and methods of the class only"),
    "its bases or decorators": ("A", "Base", "object", "patch what is in the class body"),
    "a class inside another class": ("Outer.Inner", "z = 1", "z = 2", "patch methods, or what is around the class"),
    "patched class body raises ZeroDivisionError": ("A", "unit = 2", "unit = 1 / 0", "mend the replacement"),
}


@pytest.mark.parametrize("what", IMPOSSIBLE, ids=lambda what: what.replace(" ", "-"))
def test_impossible(module, what: str) -> None:
    member, before, after, fix = IMPOSSIBLE[what]
    old = [snapshot(cls) for cls in (module.A, module.E, module.S, module.Outer.Inner)]
    with pytest.raises(PatchError) as caught:
        Patcher(module, {member: [before, after]}).install()
    assert what in str(caught.value).splitlines()[0]
    assert f"{module.__name__}:{member} ({module.__name__}.py:" in str(caught.value)
    assert fix in str(caught.value)
    assert [snapshot(cls) for cls in (module.A, module.E, module.S, module.Outer.Inner)] == old


def test_names_are_there_when_the_body_runs(module) -> None:
    with Patcher(module, {"A": ["unit = 2", "unit = given"]}, names={"given": 42}):
        assert module.A.unit == 42
    assert not hasattr(module, "given")
