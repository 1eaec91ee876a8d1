"""Generators out of any call stack: `yield_`, called however deep below a function, hands values to who iterates.

A forward pass is a deep stack of code that other people wrote. To stop it at a site and go on later, its stack has to
be set aside whole, which `yield` cannot do. Of the three tools that run a second flow of control, greenlets fit:

|                             | threads | generators                | greenlets   |
| --------------------------- | ------- | ------------------------- | ----------- |
| separate flow of control    | yes     | yes                       | yes         |
| communicates by             | queues  | `yield`                   | `.switch()` |
| has a call stack of its own | yes     | only through `yield from` | yes         |
| deterministic               | no      | yes                       | yes         |
| stays in the same thread    | no      | yes                       | yes         |
| runs in parallel            | yes     | no                        | no          |
| in the standard library     | yes     | yes                       | no          |

One rule keeps what `with` blocks promise: control goes from a greenlet only to the generator it started last, until
that one has ended, or by `yield_` back to the consumer. So generators nest as calls do and never interleave, and
whatever a body changes it can undo in order. Anything else is an InterleavingError, raised before control moves.
A `yield_` and the `next` that answers it take about a microsecond together.

>>> def halve(x):
...     return yield_("half", x / 2)  # could stand any number of calls deeper, below C code too
>>> with loop(lambda x: 1 + halve(x), 8.0) as halving:
...     for name, value in halving:
...         halving.modified_value = value * 10
>>> (name, value, halving.retval)
('half', 4.0, 41.0)

Sharp edges
- A suspended body that refers to its own generator object is never collected: the frames of a suspended greenlet are
  invisible to the garbage collector. Use `with loop(...)`, or call `close()`; at the latest, the end of the body that
  started it closes it.
- A body sees a copy of its starter's context variables; what it sets is not seen outside. It does not see the
  exception that its consumer is handling: `sys.exception()` and the context of new exceptions are its own.
- Thread-local state, such as a JAX configuration context, opened in a body stays in force for the consumer while the
  body is suspended. `local_context` prevents that.
- A generator belongs to the thread that started it. When that thread ends, a suspended body is dropped without running
  its `finally` blocks. One that is collected in another thread, or out of turn, is closed at its starter's next turn.

Reading order: scopes, generators, loops.

Source: PEP 342, 380 and 479; the documentation of greenlet; mishax (github.com/google-deepmind/mishax) for the rule.
"""

from interp_jax.core.errors import InterleavingError
from interp_jax.transforms.greenlets.generators import GreenletGenerator, generator, yield_, yield_from
from interp_jax.transforms.greenlets.loops import Loop, loop
from interp_jax.transforms.greenlets.scopes import local_context

__all__ = [
    "GreenletGenerator",
    "InterleavingError",
    "Loop",
    "generator",
    "local_context",
    "loop",
    "yield_",
    "yield_from",
]
