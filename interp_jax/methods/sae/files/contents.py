"""What a folder of an SAE says: fields of a configuration and arrays, each taken once.

A loader takes what it knows by name, kind and shape. What is missing, left over, misshapen or of another kind is
collected and reported at once, since a file that is off in one place is mostly off in several. Nothing is guessed: a
field nobody here knows might change the function.

>>> contents = Contents("demo", {"k": 2, "kk": 3}, Tensors.from_arrays({"W_dec": np.ones((3, 5), np.float32)}))
>>> k, W_dec = contents.integer("k"), contents.array("W_dec", (5, 3))
>>> contents.finish()
Traceback (most recent call last):
interp_jax.core.errors.LoadError: An SAE whose files do not fit together in demo
    W_dec has shape [3, 5]: transposed, [5, 3] is expected
    the field kk = 3 is not known.
  Expected: ...

Sharp edges: a transposed matrix that is square has the right shape.

Source: interp_jax.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from interp_jax.core.errors import LoadError, closest, four_part
from interp_jax.models.weights.checkpoint import Tensors

_REQUIRED: Any = object()


class Contents:
    """Fields and arrays of one SAE, and all that is wrong with them.

    Args:
        where: The folder, for messages.
        fields: The configuration.
        tensors: The arrays.
    """

    def __init__(self, where: str, fields: Mapping[str, Any], tensors: Tensors) -> None:
        self._where = where
        self._fields = fields
        self._tensors = tensors
        self._taken_fields: set[str] = set()
        self._taken_arrays: set[str] = set()
        self._ignorable: tuple[str, ...] = ()
        self._faults: list[str] = []

    @property
    def where(self) -> str:
        """The folder, for messages."""
        return self._where

    @property
    def has_faults(self) -> bool:
        """Whether something did not fit so far."""
        return bool(self._faults)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def fault(self, text: str) -> None:
        """Note in `text` one thing that does not fit."""
        self._faults.append(text)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of the array `name`, None if there is none."""
        return self._tensors.shape(name) if name in self._tensors else None

    def raw(self, name: str, default: Any = None) -> Any:
        """The field `name` as it is, or `default`."""
        self._taken_fields.add(name)
        return self._fields.get(name, default)

    def integer(self, name: str, default: Any = _REQUIRED) -> int:
        """The field `name`, a whole number above 0, or `default`; 0 where it does not fit."""
        value = self._field(name, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and 0 < value < float("inf") and value == int(value):
            return int(value)
        return self._misfit(name, value, "a whole number above 0", 0)

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        """The field `name`, true or false, or `default`."""
        value = self._field(name, default)
        return value if isinstance(value, bool) else self._misfit(name, value, "true or false", False)

    def choice(self, name: str, options: Collection[str], default: Any = _REQUIRED) -> str:
        """The field `name`, one of `options`, or `default`."""
        value = self._field(name, default)
        if isinstance(value, str) and value in options:
            return value
        return self._misfit(name, value, f"one of {', '.join(options)}", next(iter(options)))

    def ignore(self, *patterns: str) -> None:
        """Fields that leave the function as it is, by glob `patterns`."""
        self._ignorable += patterns

    def array(self, name: str, shape: tuple[int, ...], *, is_integer: bool = False) -> np.ndarray:
        """The array `name`, in float32 unless it counts something.

        Args:
            name: Its name in the file.
            shape: What its shape is; a 0 stands for an axis nobody knows, since its field did not fit.
            is_integer: Whether it holds whole numbers.

        Returns:
            The values; nothing useful once something did not fit, which `finish` will report.
        """
        placeholder = np.zeros(shape, np.int64 if is_integer else np.float32)
        if name not in self._tensors:
            self.fault(f"{name}, {list(shape)}, is missing")
            return placeholder
        self._taken_arrays.add(name)
        found, dtype = self._tensors.shape(name), self._tensors.dtype(name)
        if len(found) != len(shape) or any(want not in (0, have) for have, want in zip(found, shape, strict=True)):
            remark = "transposed, " if len(shape) == 2 and found == shape[::-1] else ""
            self.fault(f"{name} has shape {list(found)}: {remark}{list(shape)} is expected")
            return placeholder
        is_float = np.issubdtype(dtype, np.floating) or dtype.name == "bfloat16"
        if not (np.issubdtype(dtype, np.integer) if is_integer else is_float):
            self.fault(f"{name} has dtype {dtype}: {'whole numbers are' if is_integer else 'a float is'} expected")
            return placeholder
        values = np.asarray(self._tensors[name]).astype(np.int64 if is_integer else np.float32)
        if not np.isfinite(values).all():
            self.fault(f"{name} has {int((~np.isfinite(values)).sum()):,} values that are not finite in float32")
            return placeholder
        return values

    def finish(self) -> None:
        """Report everything that did not fit.

        Raises:
            LoadError: Something did not.
        """
        for name, value in self._fields.items():
            if name in self._taken_fields or any(fnmatch.fnmatchcase(name, glob) for glob in self._ignorable):
                continue
            near = [other for other in closest(name, self._taken_fields) if other not in self._fields]
            hint = f" (is {near[0]} meant?)" if near else ""
            self.fault(f"the field {name} = {value!r:.60} is not known{hint}")
        for name in self._tensors:
            if name not in self._taken_arrays:
                self.fault(f"the array {name}, {list(self._tensors.shape(name))}, is not known")
        if self._faults:
            raise LoadError(
                four_part(
                    "An SAE whose files do not fit together",
                    where=self._where + "".join(f"\n    {fault}" for fault in self._faults),
                    expected=f"the fields {', '.join(sorted(self._taken_fields)) or '(none)'}, and the arrays they "
                    "imply, each in its shape and no other.",
                    fix="check that the files belong together and are whole; remove a field only if you know that "
                    "it leaves the function as it is.",
                )
            )

    def _field(self, name: str, default: Any) -> Any:
        self._taken_fields.add(name)
        if name not in self._fields and default is not _REQUIRED:
            return default
        return self._fields.get(name, _REQUIRED)

    def _misfit(self, name: str, value: Any, expected: str, placeholder: Any) -> Any:
        if value is _REQUIRED:
            self.fault(f"the field {name}, {expected}, is missing")
        else:
            self.fault(f"the field {name} = {value!r:.60}: {expected} is expected")
        return placeholder


def read_object(path: Path) -> dict[str, Any]:
    """The object in the JSON file at `path`.

    Raises:
        LoadError: There is none, or it is damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(
            four_part(
                f"An unusable {path.name} ({type(error).__name__}: {error})",
                where=str(path.parent),
                expected="one JSON object.",
                fix="copy or download the file again.",
            )
        ) from error
    return value


def frozen(value: Any) -> Any:
    """A `value` of JSON as one that can be hashed: lists as tuples, objects as tuples of pairs."""
    if isinstance(value, Mapping):
        return tuple((str(key), frozen(part)) for key, part in value.items())
    if isinstance(value, list | tuple):
        return tuple(frozen(part) for part in value)
    return value
