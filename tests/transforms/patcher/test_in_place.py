"""Live objects are changed in place: through decorators and wrappers, for every alias, and exactly back.

Source: interp_jax.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import types

import jax
import jax.numpy as jnp
import pytest

from interp_jax.transforms.patcher import Patcher, PatchError

UPSTREAM = '''
"""A module with everything that holds a function."""
import abc
import contextlib
import dataclasses
import enum
import functools

import jax
import jax.numpy as jnp

SCALE = 2


def plain(x):
    """Twice."""
    return x * 2


def silent(fn):
    def wrapper(*args):
        return fn(*args)
    return wrapper


def loud(fn):
    @functools.wraps(fn)
    def wrapper(*args):
        return fn(*args)
    return wrapper


class Holder:
    def __init__(self, fn):
        self.fn = fn

    def __call__(self, *args):
        return self.fn(*args)


@loud
@loud
def wrapped(x): return x * 2

@silent
def hidden(x): return x * 2

@Holder
def held(x): return x * 2

@functools.cache
def cached(x): return x * 2

@jax.jit
def jitted(x): return x * 2.0

@functools.partial(jax.jit, static_argnums=1)
def static(x, n): return x * 2.0

@jax.checkpoint
def checkpointed(x): return x * 2.0

@jax.custom_jvp
def custom(x): return x * 2.0

@custom.defjvp
def custom_rule(primals, tangents): return custom(primals[0]), tangents[0] * 2.0

@contextlib.contextmanager
def managed(x):
    yield x * 2

@functools.singledispatch
def dispatched(x): return x * 2

partial = functools.partial(plain, 4)
lam = lambda x: x * 2
two, three = (lambda x: x * 2), (lambda x: x * 3)

async def coroutine(x): return x * 2

def generator(x):
    yield x * 2

def make(k):
    def inner(x):
        return x * 2 + k
    return inner

first, second = make(10), make(20)

def recursive(n):
    return 1 if n == 0 else recursive(n - 1) * 2

class Base(abc.ABC):
    unit = 1

    def method(self, x): return x * 2

    @property
    def prop(self): return self.unit * 2

    @prop.setter
    def prop(self, value): self.unit = value * 2

    @classmethod
    def cls_method(cls, x): return x * 2

    @staticmethod
    def static_method(x): return x * 2

    @functools.cached_property
    def lazy(self): return self.unit * 2

    @functools.lru_cache
    def remembered(self, x): return x * 2

    @abc.abstractmethod
    def needed(self): ...

    def __private(self, x): return x * 2

    def calls_private(self, x): return self.__private(x)

    def __call__(self, x): return x * 2

    alias = method
    by_lambda = lambda self, x: x * 2

    class Inner:
        def method(self, x): return x * 2


class Child(Base):
    def needed(self): return 1

    def method(self, x): return super().method(x) + 1

    def own_class(self, x): return (__class__, x * 2)


@dataclasses.dataclass
class Data:
    x: int = 1
    def total(self): return self.x * 2

@dataclasses.dataclass(slots=True)
class Slotted:
    x: int = 1
    def total(self): return self.x * 2

class Colour(enum.Enum):
    RED = 1
    def twice(self): return self.value * 2

@jax.tree_util.register_pytree_node_class
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b
    def tree_flatten(self): return (self.a, self.b), None
    @classmethod
    def tree_unflatten(cls, _, children): return cls(*children)
    def total(self): return (self.a + self.b) * 2
'''


def _instance(module: types.ModuleType):
    return module.Child()


# member -> what to call; the patch turns `* 2` into `* 5`.
CALLS = {
    "plain": lambda m: m.plain(1),
    "wrapped": lambda m: m.wrapped(1),
    "hidden": lambda m: m.hidden(1),
    "held": lambda m: m.held(1),
    "cached": lambda m: m.cached(1),
    "lam": lambda m: m.lam(1),
    "two": lambda m: m.two(1),
    "partial": lambda m: m.partial() / 4,
    "managed": lambda m: m.managed(1).__enter__(),
    "dispatched": lambda m: m.dispatched(1),
    "coroutine": lambda m: asyncio.run(m.coroutine(1)),
    "generator": lambda m: next(m.generator(1)),
    "first": lambda m: m.first(1) - 10,
    "recursive": lambda m: m.recursive(1),
    "jitted": lambda m: float(m.jitted(jnp.float32(1))),
    "static": lambda m: float(m.static(jnp.float32(1), 3)),
    "checkpointed": lambda m: float(jax.jit(m.checkpointed)(jnp.float32(1))),
    "custom": lambda m: float(jax.jit(m.custom)(jnp.float32(1))),
    "make.inner": lambda m: m.make(0)(1),
    "Base.method": lambda m: base_method(m),
    "Base.alias": lambda m: base_method(m),
    "Base.cls_method": lambda m: m.Base.cls_method(1),
    "Base.static_method": lambda m: m.Base.static_method(1),
    "Base.lazy": lambda m: _instance(m).lazy,
    "Base.remembered": lambda m: m.Child.remembered(COMMON, 1),
    "Base.__private": lambda m: _instance(m).calls_private(1),
    "Base._Base__private": lambda m: _instance(m).calls_private(1),
    "Base.__call__": lambda m: _instance(m)(1),
    "Base.by_lambda": lambda m: _instance(m).by_lambda(1),
    "Base.Inner.method": lambda m: m.Base.Inner().method(1),
    "Base.Inner": lambda m: m.Base.Inner().method(1),
    "Child.own_class": lambda m: _instance(m).own_class(1)[1],
    "Data.total": lambda m: m.Data().total(),
    "Slotted.total": lambda m: m.Slotted().total(),
    "Colour.twice": lambda m: m.Colour.RED.twice(),
    "Pair.total": lambda m: m.Pair(0.5, 0.5).total(),
}
COMMON = type("Common", (), {})()


def base_method(module: types.ModuleType) -> int:
    return module.Base.method(None, 1)


@pytest.mark.parametrize("member", CALLS)
def test_every_kind_of_holder(make_module, member: str) -> None:
    module = make_module(UPSTREAM)
    call = CALLS[member]
    before = {function: function.__code__ for function in _all_functions(module)}
    assert call(module) == 2
    patcher = Patcher(module, {member: [("$x * $two", "$x * 5", (1, None))]})
    for _ in range(2):
        with patcher:
            assert call(module) == 5
        assert call(module) == 2
    assert all(function.__code__ is code for function, code in before.items())


def _all_functions(module: types.ModuleType) -> list[types.FunctionType]:
    found = []
    for owner in (module, *(value for value in vars(module).values() if isinstance(value, type))):
        for value in list(vars(owner).values()):
            value = inspect.unwrap(getattr(value, "__func__", value))
            if isinstance(value, types.FunctionType) and value.__module__ == module.__name__:
                found.append(value)
    assert found
    return found


def test_aliases_subclasses_and_instances_made_before(make_module) -> None:
    module = make_module(UPSTREAM)
    alias, bound, instance = module.plain, module.Child().method, module.Child()
    stored = {"f": module.plain, "p": functools.partial(module.plain, 1)}
    whole = ("def method(self, x): return $r", "def method(self, x): return x * 5")
    patcher = Patcher(module, {"plain": ["x * 2", "x * 5"], "Base.method": [whole]})
    with patcher:
        assert (alias(1), stored["f"](1), stored["p"](), bound(1), instance.method(1)) == (5, 5, 5, 6, 6)
        assert isinstance(instance, module.Base)
        assert instance.alias(1) == 5
    assert (alias(1), stored["f"](1), stored["p"](), bound(1), instance.method(1)) == (2, 2, 2, 3, 3)


def test_pytrees_stay_registered(make_module) -> None:
    module = make_module(UPSTREAM)
    pair = module.Pair(jnp.float32(1), jnp.float32(2))
    total = jax.jit(lambda p: p.total())
    with Patcher(module, {"Pair.total": ["$x * 2", "$x * 5"]}):
        assert float(total(pair)) == 15
        assert jax.tree.leaves(pair) == [1, 2]
    assert float(total(pair)) == 6


def test_property_getter_and_setter(make_module) -> None:
    module = make_module(UPSTREAM)
    child = module.Child()
    with Patcher(module, {"Base.prop": ["self.unit * 2", "self.unit * 5", "value * 2", "value * 7"]}):
        assert child.prop == 5
        child.prop = 1
    assert child.prop == 14


def test_super_and_class_cell(make_module) -> None:
    module = make_module(UPSTREAM)
    with Patcher(module, {"Child": ["super().method(x) + 1", "super().method(x) + 100", "x * 2", "x * 5"]}):
        assert module.Child().method(1) == 102
        assert module.Child().own_class(1) == (module.Child, 5)


def test_a_replacement_that_needs_super_no_more(make_module) -> None:
    module = make_module(UPSTREAM)
    code = module.Child.method.__code__
    assert code.co_freevars == ("__class__",)
    with Patcher(module, {"Child": ["super().method(x) + 1", "x"], "Child.own_class": ["(__class__, x * 2)", "x"]}):
        assert module.Child().method(7) == 7
        assert module.Child().own_class(7) == 7
        assert module.Child.method.__code__.co_freevars == ("__class__",)
    assert module.Child.method.__code__ is code


def test_private_names_are_mangled(make_module) -> None:
    module = make_module(UPSTREAM)
    with Patcher(module, {"Base.calls_private": ["self.__private(x)", "self.__private(x) + self.__private(1)"]}):
        assert module.Child().calls_private(10) == 22


def test_closures_of_one_definition_change_together(make_module) -> None:
    module = make_module(UPSTREAM)
    with Patcher(module, first=["x * 2 + k", "x * 5 + k"]):
        assert (module.first(1), module.second(1), module.make(30)(1)) == (15, 25, 32)
    assert (module.first(1), module.second(1)) == (12, 22)


def test_patching_the_outer_function_changes_what_it_makes_from_then_on(make_module) -> None:
    module = make_module(UPSTREAM)
    with Patcher(module, make=["x * 2 + k", "x * 5 + k"]):
        assert (module.first(1), module.make(30)(1)) == (12, 35)
        kept = module.make(40)
    assert (kept(1), module.make(30)(1)) == (45, 32)


def test_copies_of_a_function_change_with_it(make_module) -> None:
    module = make_module(UPSTREAM)
    copy = types.FunctionType(module.plain.__code__, module.plain.__globals__, "copy")
    with Patcher(module, plain=["x * 2", "x * 5"]):
        assert copy(1) == 5
    assert copy(1) == 2


def test_a_patcher_keeps_no_function_alive(make_module) -> None:
    import gc
    import weakref

    module = make_module(UPSTREAM)
    copy = types.FunctionType(module.plain.__code__, module.plain.__globals__, "copy")
    reference = weakref.ref(copy)
    patcher = Patcher(module, plain=["x * 2", "x * 5"])
    with patcher:
        assert copy(1) == 5
    del copy
    gc.collect()
    assert reference() is None
    with patcher:
        assert module.plain(1) == 5


def test_the_module_globals_are_the_real_ones(make_module) -> None:
    module = make_module("K = 1\nCOUNT = 0\ndef f():\n    global COUNT\n    COUNT += 1\n    return K\n")
    with Patcher(module, f=["return K", "return K * 10"]):
        assert module.f() == 10
        module.K = 7
        assert module.f() == 70
    assert (module.f(), module.COUNT) == (7, 3)


def test_a_running_generator_goes_on_with_its_code(make_module) -> None:
    module = make_module("def g():\n    yield 1\n    yield 2\n")
    running = module.g()
    assert next(running) == 1
    with Patcher(module, g=["yield 2", "yield 3"]):
        assert next(running) == 2
        assert list(module.g()) == [1, 3]


def test_signature(make_module) -> None:
    module = make_module(
        """
        from __future__ import annotations
        def f(a, b=object(), *, c: int = 3) -> int:
            "What it was."
            return a, b, c
        class A:
            unit = 4
            def m(self, x: int = unit): return x
        """
    )
    f, m = module.f, module.A.m
    old = (f.__defaults__, f.__kwdefaults__, f.__annotations__, m.__defaults__, inspect.signature(f))
    patcher = Patcher(
        module,
        {
            "f": [
                "def f(a, b=$b, *, c: $t = 3) -> int:\n  $$body",
                "def f(a, b=$b, z=[1], *, c: $t = 4, d: float = 5) -> str:\n  'What it is.'\n  return a, b, z, c, d",
            ],
            "A.m": ["def m(self, x: $t = unit): return x", "def m(self, x: $t = unit * 2): return x"],
        },
    )
    with patcher:
        assert f("a") == ("a", old[0][0], [1], 4, 5)
        assert f.__defaults__[0] is old[0][0]
        assert str(inspect.signature(f)).endswith("z=[1], *, c: 'int' = 4, d: 'float' = 5) -> 'str'")
        assert f.__doc__ == "What it is."
        assert module.A().m() == 8
    assert (f.__defaults__, f.__kwdefaults__, f.__annotations__, m.__defaults__, inspect.signature(f)) == old
    assert f.__defaults__ is old[0]
    assert f.__annotations__ is old[2]
    assert f.__doc__ == "What it was."


def test_a_signature_that_cannot_be_evaluated(make_module) -> None:
    module = make_module("def f(a=1): return a\n")
    with (
        pytest.raises(PatchError, match=r"The default or annotation `nothing\[0\]` cannot be evaluated \(NameError"),
        Patcher(module, f=["def f(a=1): $$b", "def f(a=nothing[0]): $$b"]),
    ):
        pass
    assert module.f() == 1


def test_definitions_under_conditions_and_redefinitions(make_module) -> None:
    module = make_module(
        """
        if True:
            def f(x): return x + 1
        else:
            def f(x): return x + 2
        class A:
            if True:
                def m(self): return 1
            else:
                def m(self): return 1
            def n(self): return 1
            def n(self): return 3
        class A(A):
            def k(self): return 1
        """
    )
    with Patcher(module, {"f": ["x + $n", "x + 10"], "A.k": ["return 1", "return 2"]}):
        assert (module.f(0), module.A().k(), module.A().n()) == (10, 2, 3)
    with pytest.raises(PatchError, match=r"Member 'A.m' of upstream_\d+ is inherited") as caught:
        Patcher(module, {"A.m": ["1", "2"]}).install()
    assert "all classes that inherit it see the patch" in str(caught.value)


def test_dead_definitions_are_refused(make_module) -> None:
    module = make_module("class A:\n    def n(self): return 1\n    def n(self): return 3\n")
    with pytest.raises(PatchError, match="Function 'n' is not in use") as caught:
        Patcher(module, A=["return 1", "return 2"]).install()
    assert "this definition was replaced or removed" in str(caught.value)
    assert module.A().n() == 3


def test_imported_members_are_patched_where_they_are_defined(make_module) -> None:
    inner = make_module("def f(x): return x * 2\n")
    outer = make_module(f"from {inner.__name__} import f\ndef g(x): return f(x)\n")
    patcher = Patcher(outer, f=["x * 2", "x * 5"])
    with patcher:
        assert (outer.g(1), inner.f(1)) == (5, 5)
    assert patcher.diff().startswith(f"--- a/{inner.__name__}.py\n+++ b/{inner.__name__}.py\n")


def test_new_free_variables_of_a_function_are_refused(make_module) -> None:
    module = make_module("def make(a, b):\n    def f(x): return x + a\n    return f\nf = make(1, 2)\n")
    with pytest.raises(PatchError, match="A replacement uses 'b' of an enclosing function") as caught:
        Patcher(module, f=["x + a", "x + a + b"]).install()
    assert "(a): a function that exists cannot be given more" in str(caught.value)
    assert "Fix: patch the enclosing function" in str(caught.value)
    assert module.f(1) == 2


def test_two_lambdas_on_a_line(make_module) -> None:
    module = make_module(UPSTREAM)
    with Patcher(module, three=["x * 3", "x * 4"]):
        assert (module.two(1), module.three(1)) == (2, 4)


def test_decorators_of_functions_are_refused(make_module) -> None:
    module = make_module(UPSTREAM)
    for after in ("@loud\ndef wrapped(x): return x * 2", "@loud\n@loud\ndef other(x): return x * 2"):
        with pytest.raises(PatchError, match="changes the decorators or the name of a function"):
            Patcher(module, wrapped=["@loud\n@loud\ndef wrapped(x): $$b", after]).install()


def test_things_without_source(make_module) -> None:
    import math

    with pytest.raises(PatchError, match=r"math:sqrt .*holds no Python function"):
        Patcher(math, sqrt=["x", "y"]).install()
    module = make_module("exec('def f(): return 1')\nfrom collections import namedtuple\nT = namedtuple('T', 'a')\n")
    with pytest.raises(PatchError, match=r"No source code \(<string>\) in upstream_\d+:f"):
        Patcher(module, f=["1", "2"]).install()
    with pytest.raises(PatchError, match=r"T .*does not hold|No source code|is not what"):
        Patcher(module, T=["1", "2"]).install()


def test_code_typed_into_a_notebook() -> None:
    import linecache

    module = types.ModuleType("typed")
    for cell, text in {"<cell 1>": "def f(x):\n    return x * 2\n", "<cell 2>": "def g(x): return f(x)\n"}.items():
        linecache.cache[cell] = (len(text), None, text.splitlines(keepends=True), cell)
        exec(compile(text, cell, "exec"), vars(module))
    with Patcher(module, f=["x * 2", "x * 5"], g=["f(x)", "f(x) + 1"]):
        assert (module.f(1), module.g(1)) == (5, 6)
        assert "return x * 5" in inspect.getsource(module.f)
    assert (module.f(1), module.g(1)) == (2, 2)


def test_a_changed_file_is_noticed(make_module) -> None:
    module = make_module("def f(x):\n    return x * 2\n")
    path = module.__file__
    assert path is not None
    with open(path, "w") as file:
        file.write("def f(x):\n    return x * 3\n")
    with pytest.raises(PatchError, match=r"The code that runs is not what upstream_\d+.py says") as caught:
        Patcher(module, f=["x * 3", "x * 4"]).install()
    assert "importlib.reload the module" in str(caught.value)
    with open(path, "w") as file:
        file.write("\n\n\n\n")
    with pytest.raises(PatchError, match="is not what"):
        Patcher(module, f=["x * 3", "x * 4"]).install()
    assert module.f(1) == 2


def test_unknown_members(make_module) -> None:
    module = make_module(UPSTREAM)
    with pytest.raises(PatchError) as caught:
        Patcher(module, plane=["1", "2"]).install()
    head, known, fix = str(caught.value).splitlines()
    assert head == f"Unknown member 'plane' in {module.__name__}. Did you mean 'plain'?"
    assert "Base, " in known
    assert fix == "  Fix: use the name of a function, class or method that is there."
    with pytest.raises(PatchError, match=r"Unknown member 'Base.metod' in upstream_\d+:Base. Did you mean 'method'\?"):
        Patcher(module, {"Base.metod": ["1", "2"]}).install()
    with pytest.raises(PatchError, match=r"Unknown member 'iner' in .*make.* Did you mean 'inner'"):
        Patcher(module, {"make.iner": ["1", "2"]}).install()
    with pytest.raises(PatchError, match="Module 'no_such_module_x' cannot be imported"):
        Patcher("no_such_module_x", {"f": ["1", "2"]}).__enter__()


def test_nothing_is_half_patched(make_module) -> None:
    module = make_module(UPSTREAM)
    before = {function: function.__code__ for function in _all_functions(module)}
    globals_before = dict(vars(module))
    for bad in (["x * 3", "x * 4"], ["x * 2", "nonsense(x)"], ["return x * 2", "break"]):
        with pytest.raises(PatchError):
            Patcher(module, {"plain": ["x * 2", "x * 5"], "hidden": bad}, names={"extra": 1}).install()
        assert all(function.__code__ is code for function, code in before.items())
        assert dict(vars(module)) == globals_before
    assert module.plain(1) == 2


def test_wrong_counts_name_everything(make_module) -> None:
    module = make_module("def f(x):\n    a = g(x, 1)\n    b = g(x, 1)\n    return a + b\n")
    name = module.__name__
    with pytest.raises(PatchError) as caught:
        Patcher(module, f=["g(x, 2)", "0"]).install()
    assert str(caught.value).splitlines() == [
        f"Pattern `g(x, 2)` matches 0 places in {name}:f ({name}.py:1).",
        "  Expected: 1 match. The code there that is most like it:",
        f"    {name}.py:2: `g(x, 1)`",
        "      upstream has `1` where the pattern has `2`",
        f"    {name}.py:3: `g(x, 1)`",
        "      upstream has `1` where the pattern has `2`",
        "  Fix: write the pattern as upstream's code is now; layout, comments and quotes do not matter.",
    ]
    with pytest.raises(PatchError) as caught:
        Patcher(module, f=["g(x, 1)", "0"]).install()
    assert str(caught.value).splitlines() == [
        f"Pattern `g(x, 1)` matches 2 places in {name}:f ({name}.py:1).",
        "  Expected: 1 match. It matches here:",
        f"    {name}.py:2: `g(x, 1)`",
        f"    {name}.py:3: `g(x, 1)`",
        "  Fix: extend the pattern by what stands around the place you mean, or pass count= to change them all.",
    ]
    for count in (2, (1, 2), (0, None)):
        with Patcher(module, f=[("g(x, 1)", "x", count)]):
            assert module.f(4) == 8
    with pytest.raises(PatchError, match=r"Expected: 3 to 4 matches\. It matches here"):
        Patcher(module, f=[("g(x, 1)", "x", (3, 4))]).install()
    with pytest.raises(PatchError, match=r"Expected: 1 match\. Nothing there is like it\."):
        Patcher(module, f=[("await some.thing[else_]", "x")]).install()
