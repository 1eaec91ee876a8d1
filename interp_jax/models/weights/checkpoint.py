"""A model as it lies on disk: configuration, named tensors, tokenizer.

Every format is brought to one convention, that of a Hugging Face directory: `config` has the keys of its
`config.json`, `tensors` its tensor names and layouts. A family's converter then takes the tensors one by one, saying
which shape it expects, and every tensor that is missing, left over or misshapen is reported at once. Tensors are read
when they are taken, so that no second copy of the model has to fit into memory.

>>> import numpy as np
>>> tensors = Tensors.from_arrays({"wte.weight": np.ones((5, 2), np.float32), "h.0.attn.bias": np.ones(4, bool)})
>>> checkpoint = Checkpoint("gpt2", {"vocab_size": 5}, tensors, tokenizer=None, source="memory")
>>> with checkpoint.intake(ignorable=("*.attn.bias",)) as intake:
...     embedding = intake.take("wte.weight", (5, 2))

Sharp edges: after the first tensor that is missing or misshapen `take` no longer reads and returns zeros of the
expected shape; the report at the end of the `with` block is what stops them from being used.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from interp_jax.core.errors import LoadError, UnsupportedModelError, closest, four_part, shorten
from interp_jax.models.weights.config_values import wrong_values

if TYPE_CHECKING:
    from interp_jax.models.tokenizers import Tokenizer

# Keys of any Hugging Face config that say nothing about the forward pass: where the model came from, how to sample
# from it, which outputs its own classes return, how it was initialised and regularised in training.
# fmt: off
NEUTRAL_KEYS = frozenset(
    {
        "_attn_implementation_autoset", "_name_or_path", "_num_labels", "add_cross_attention", "architectures",
        "auto_map", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
        "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
        "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty", "finetuning_task",
        "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range", "is_decoder",
        "is_encoder_decoder", "label2id", "length_penalty", "max_length", "min_length", "model_type",
        "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
        "output_hidden_states", "output_past", "output_scores", "pad_token_id", "prefix", "problem_type",
        "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
        "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
        "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version", "typical_p",
        "unk_token_id", "use_bfloat16", "use_cache",
    }
)
# fmt: on


_PIECE_BYTES = 4 << 20  # of a tensor that are in memory at once, where it can be read in pieces


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file: its shape and dtype are known, its values are not in memory.

    Attributes:
        shape: Its shape.
        dtype: The dtype it has once read.
        read: Reads its values.
        read_rows: Reads those with `start <= index < stop` on the first axis; None if only the whole can be read.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    read_rows: Callable[[int, int], np.ndarray] | None = None

    def rows(self) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """The values, some rows at a time, and which rows they are (nothing for a whole that has none)."""
        n_bytes = math.prod(self.shape) * self.dtype.itemsize
        if self.read_rows is None or n_bytes <= _PIECE_BYTES:
            yield (), self.read()
            return
        step = max(1, _PIECE_BYTES * self.shape[0] // n_bytes)
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            yield (slice(start, stop),), self.read_rows(start, stop)


def read_values(path: Path, dtype: np.dtype, n: int, start: int) -> np.ndarray:
    """Values that lie in a file one after the other.

    Args:
        path: The file.
        dtype: Their dtype.
        n: How many there are.
        start: The byte at which they begin.

    Returns:
        The values, `[n]`.

    Raises:
        LoadError: The file ends before, or cannot be read.
    """
    try:
        values = np.fromfile(path, dtype, count=n, offset=start)
        if len(values) == n:
            return values
        fault = f"it ends after {path.stat().st_size:,} bytes, but values reach to byte {start + n * dtype.itemsize:,}"
    except OSError as error:
        fault = str(error)
    raise LoadError(
        four_part(
            f"Weight file {path.name} changed while it was read ({fault})",
            where=str(path.parent),
            expected="a file that stays as it is until the model is loaded.",
            fix="wait until the download has ended, and load again.",
        )
    )


class Tensors(Mapping[str, np.ndarray]):
    """Tensors by name, read from their file each time they are looked up.

    Args:
        entries: The tensors, in the order of the file.
    """

    def __init__(self, entries: Mapping[str, LazyTensor]) -> None:
        self._entries = dict(entries)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Tensors:
        """Tensors that are in memory already.

        Args:
            arrays: The tensors by name.

        Returns:
            The same, as a mapping that knows shapes.
        """
        entries = {}
        for name, array in arrays.items():
            read_rows = (lambda start, stop, array=array: array[start:stop]) if array.ndim else None
            entries[name] = LazyTensor(array.shape, array.dtype, lambda array=array: array, read_rows)
        return cls(entries)

    def __getitem__(self, name: str) -> np.ndarray:
        """The values of tensor `name`, read now."""
        return self._entries[name].read()

    def rows(self, name: str) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """The values of tensor `name`, some rows at a time, and which rows they are."""
        return self._entries[name].rows()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # Mapping's own version would read the tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`, without reading it."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The dtype tensor `name` has once read, without reading it."""
        return self._entries[name].dtype

    def n_bytes(self, name: str) -> int:
        """The size of tensor `name` once read, without reading it."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def __repr__(self) -> str:
        n_values = sum(int(np.prod(entry.shape, dtype=np.int64)) for entry in self._entries.values())
        return f"Tensors({len(self)} tensors, {n_values:,} values, read on access)"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model's files in the Hugging Face convention.

    Attributes:
        family: The upstream family, a key of `interp_jax.models.loading.FAMILIES`.
        config: The keys and values of a Hugging Face `config.json`.
        tensors: The weights under their Hugging Face names, in Hugging Face layout.
        tokenizer: Text to token ids and back; None when the files hold no tokenizer.
        source: Where it came from, for error messages and provenance.
    """

    family: str
    config: Mapping[str, Any]
    tensors: Tensors
    tokenizer: Tokenizer | None
    source: str

    def check_config(self, *, handled: Collection[str], ignorable: Collection[str] = ()) -> None:
        """Refuse configuration keys that nobody here knows, as they may change the model, and impossible values.

        A key whose value is None or empty says nothing and passes.

        Args:
            handled: Keys the family's converter reads.
            ignorable: Keys it knows to leave the forward pass as it is.

        Raises:
            LoadError: A value is of a kind its key cannot have, such as a text where a number belongs.
            UnsupportedModelError: There is an unknown key.
        """
        if wrong := wrong_values(self.config):
            raise LoadError(
                four_part(
                    "Configuration with " + ", ".join(f"{key}={self.config[key]!r:.60}" for key in wrong),
                    where=self.source,
                    expected="; ".join(f"{key}: {kind}" for key, kind in wrong.items()) + ".",
                    fix="take the config.json the model was published with.",
                )
            )
        known = set(handled) | set(ignorable) | NEUTRAL_KEYS
        unknown = {key: value for key, value in self.config.items() if key not in known and value not in (None, [], {})}
        if not unknown:
            return
        listed = ", ".join(f"{key}={value!r}" for key, value in unknown.items())
        near = [f"{key!r} resembles {name!r}" for key in unknown for name in closest(key, handled)]
        raise UnsupportedModelError(
            four_part(
                f"Unknown configuration keys {listed}",
                where=self.source,
                expected=f"keys the {self.family} family handles: {shorten(sorted(handled), limit=40)}"
                + (f". {'; '.join(near)}" if near else ""),
                fix=f"check that this is a {self.family} (model_type). If these keys leave the forward pass unchanged, "
                f"remove them from config.json; otherwise the patch set of {self.family} has to learn them "
                "(HANDLED_KEYS, IGNORABLE_KEYS).",
            )
        )

    def intake(self, *, ignorable: Iterable[str] = (), optional_prefix: str = "") -> Intake:
        """A context in which a converter takes the tensors; what does not fit is reported at its end.

        Args:
            ignorable: Glob patterns of tensors that may be left over, such as "*.attn.bias" (mask buffers).
            optional_prefix: A prefix of the canonical names that the file may lack, such as "transformer.".

        Returns:
            The context, for `with checkpoint.intake() as intake:`.
        """
        return Intake(self, ignorable=tuple(ignorable), optional_prefix=optional_prefix)


class Intake:
    """Takes each tensor of a checkpoint once; knows at the end what was missing, left over or misshapen.

    Args:
        checkpoint: Where the tensors come from.
        ignorable: Glob patterns of tensors that may be left over.
        optional_prefix: A prefix of the canonical names that the file may lack.
    """

    def __init__(self, checkpoint: Checkpoint, *, ignorable: tuple[str, ...] = (), optional_prefix: str = "") -> None:
        self._source = checkpoint.source
        self._tensors = checkpoint.tensors
        self._ignorable = ignorable
        self._prefix = optional_prefix
        self._order = {name: i for i, name in enumerate(checkpoint.tensors)}
        self._taken: set[str] = set()
        self._missing: list[str] = []
        self._misfits: list[tuple[str, str]] = []  # (name, what is wrong with it)
        self._spoiled: list[tuple[str, str]] = []  # (name, what is wrong with its values)

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The values of tensor `name`, in the dtype of the file.

        Args:
            name: Its canonical name.
            shape: The shape the configuration implies.

        Returns:
            The values; zeros once something did not fit, since the report at the end will stop the load anyway.
        """
        pieces = list(self.rows(name, shape, is_whole=True))
        return pieces[0][1] if pieces else np.broadcast_to(np.float32(0), shape)

    def rows(
        self, name: str, shape: tuple[int, ...], *, dtype: np.dtype | None = None, is_whole: bool = False
    ) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """The values of tensor `name`, some rows at a time.

        Args:
            name: Its canonical name.
            shape: The shape the configuration implies.
            dtype: What the values will be cast to: one too large for it is an offender.
            is_whole: Whether to give them all at once.

        Yields:
            Which rows these are, `()` for all there are, and their values in the dtype of the file. Nothing once
            something did not fit.
        """
        found = self._claim(name, tuple(shape))
        if found is None:
            return
        limit = None if dtype is None else float(_finfo(dtype).max)
        n_wrong = 0
        for rows, values in [((), self._tensors[found])] if is_whole else self._tensors.rows(found):
            n_wrong += _n_beyond(values, limit)
            yield rows, values
        if n_wrong:
            reason = "not finite" if dtype is None else f"not finite, or too large for {dtype.name}"
            self._spoiled.append((found, f"has {n_wrong:,} values that are {reason}"))

    def position(self, name: str) -> int:
        """How far into the files tensor `name` lies, counted in tensors; one that is missing comes last."""
        found = self._find(name)
        return len(self._order) if found is None else self._order[found]

    def take_if_present(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """As `take`, but None when there is no such tensor (an untied `lm_head.weight`, an optional bias).

        Args:
            name: Its canonical name.
            shape: The shape it has if it is there.

        Returns:
            The values, or None.
        """
        return None if self._find(name) is None else self.take(name, shape)

    def finish(self) -> None:
        """Report everything that did not fit; leaving the `with` block calls it.

        Raises:
            LoadError: A tensor is missing, left over, or has the wrong shape or dtype, or values that are not finite.
        """
        extra = [
            name
            for name in self._tensors
            if name not in self._taken and not any(fnmatch.fnmatchcase(name, glob) for glob in self._ignorable)
        ]
        if not (self._missing or self._misfits or self._spoiled or extra):
            return
        lines = [f"Weights that do not fit the configuration in {self._source}"]
        if self._missing:
            lines.append(f"    missing ({len(self._missing)}): {_grouped(self._missing)}")
        if extra:
            lines.append(f"    left over ({len(extra)}): {_grouped(extra)}")
        by_reason: dict[str, list[str]] = {}
        for name, reason in self._misfits + self._spoiled:
            by_reason.setdefault(reason, []).append(name)
        lines += [f"    {_grouped(names)} {reason}" for reason, names in by_reason.items()]
        near = [(name, found[0]) for name in self._missing if (found := closest(name, extra))]
        lines += [f"    is {given!r} meant to be {name!r}?" for name, given in near[:3]]
        expected = "each tensor the configuration implies, once and in its shape, and no other"
        if self._ignorable:
            expected += f" (may be left over: {', '.join(self._ignorable)})"
        raise LoadError(
            four_part(
                "\n".join(lines),
                expected=expected,
                fix="check that config.json and the weights belong together and that the download is complete.",
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A converter may stumble over the zeros of an offender: the offender is then the thing to report.
        if error is None or self._missing or self._misfits or self._spoiled:
            self.finish()

    def _claim(self, name: str, shape: tuple[int, ...]) -> str | None:
        """The name under which the file holds tensor `name`, noted as taken; None once something did not fit."""
        found = self._find(name)
        if found is None:
            self._missing.append(name)
            return None
        self._taken.add(found)
        dtype = self._tensors.dtype(found)
        if self._tensors.shape(found) != shape:
            self._misfits.append((found, f"has shape {self._tensors.shape(found)}, expected {shape}"))
        elif not _is_float(dtype):
            self._misfits.append((found, f"has dtype {dtype}, expected floating point"))
        return None if self._missing or self._misfits else found

    def _find(self, name: str) -> str | None:
        """The name under which the file holds tensor `name`."""
        candidates = [name]
        if self._prefix and name.startswith(self._prefix):
            candidates.append(name.removeprefix(self._prefix))
        return next((candidate for candidate in candidates if candidate in self._tensors), None)


def _is_float(dtype: np.dtype) -> bool:
    """Whether values of `dtype` are floating point, ml_dtypes' bfloat16 and float8 included."""
    return np.issubdtype(dtype, np.floating) or dtype.name.startswith(("bfloat", "float"))


def _finfo(dtype: np.dtype) -> Any:
    """`np.finfo`, for bfloat16 and its like too."""
    import ml_dtypes

    return ml_dtypes.finfo(dtype)


def _n_beyond(values: np.ndarray, limit: float | None) -> int:
    """How many values are not finite, or beyond the limit."""
    limit = float(_finfo(values.dtype).max) if limit is None else limit
    if values.dtype.itemsize < 4:
        values = values.astype(np.float32)  # NumPy compares small types one by one
    # NaN fails every comparison, so the ends tell whether there is anything to count.
    if not values.size or (float(values.min()) >= -limit and float(values.max()) <= limit):
        return 0
    return values.size - int(np.count_nonzero(np.abs(values.astype(np.float64)) <= limit))


def _grouped(names: Iterable[str]) -> str:
    """Names joined by commas, those that differ only in their numbers as one: `h.{0..11}.ln_1.bias`."""
    groups: dict[str, list[list[int]]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "#", name), []).append([int(n) for n in re.findall(r"\d+", name)])
    shown = []
    for form, numbers in groups.items():
        for column in zip(*numbers, strict=True):
            values = sorted(set(column))
            runs = len(values) > 2 and values[-1] - values[0] == len(values) - 1
            text = f"{values[0]}..{values[-1]}" if runs else ",".join(map(str, values))
            form = form.replace("#", str(values[0]) if len(values) == 1 else "{" + text + "}", 1)
        shown.append(form)
    return shorten(shown)
