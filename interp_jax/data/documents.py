"""Documents: text from wherever it lies, one document after the other, as often as asked for.

What a dictionary is trained on starts as documents: the entries of a list, the files of a folder, the rows of a data
set. They are read lazily, so a text need not fit into memory.

    open_documents("pydoc")                          # the documentation of Python, which every Python carries along
    open_documents("notes.md")                       # one file, one document; .txt .md .rst
    open_documents("text.jsonl", key="body")         # one row, one document; .jsonl .parquet .arrow
    open_documents("folder")                         # every such file in it, in the order of their names
    open_documents("saved", split="train")           # what `datasets` wrote with save_to_disk
    open_documents(["one text", "another"])

>>> documents = open_documents(["one text", "another"])
>>> list(documents), list(documents) == list(documents)
(['one text', 'another'], True)

Sharp edges: a string is a place, never a text: a text goes into a list. Files are UTF-8, and files of other kinds in a
folder are passed over, hidden ones too. A row without text (null) is an empty document. Parquet and Arrow need
`pyarrow` (`pip install 'interp-jax[datasets]'`). The text of "pydoc" is that of the running Python: another version of
Python, another text.

Source: interp_jax; the layout of `save_to_disk` is that of Hugging Face's `datasets`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from interp_jax.core.errors import InvalidInputError, LoadError, UnknownNameError, closest, four_part, shorten

PYDOC = "pydoc"
PLAIN = (".txt", ".md", ".rst")
ROWS = (".jsonl", ".parquet", ".arrow")

# A data set on disk says what it is in one of these.
_SPLITS, _STATE = "dataset_dict.json", "state.json"

Source: TypeAlias = "str | os.PathLike[str] | Sequence[str] | Documents"


@dataclass(frozen=True, eq=False, repr=False)
class Documents:
    """Texts that can be gone through again and again.

    Args:
        name: Where they are from.
        read: A function that goes through them from the start.
    """

    name: str
    read: Callable[[], Iterator[str]]

    def __iter__(self) -> Iterator[str]:
        return self.read()

    def __repr__(self) -> str:
        return f"Documents({self.name})"


def open_documents(source: Source, *, key: str = "text", split: str | None = None) -> Documents:
    """Documents from a text source.

    Args:
        source: "pydoc", a file, a folder, a data set on disk, or a sequence of texts.
        key: The column that holds the text, in files of rows.
        split: Which split of a data set that has several.

    Returns:
        The documents. Nothing but names and headers has been read.

    Raises:
        LoadError: There is no such file, or none with text in the folder. When read: a file is damaged.
        UnknownNameError: The data set has no such split. When read: its rows have no such column.
        InvalidInputError: It is no text source.
    """
    if isinstance(source, Documents):
        return source
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        return _of_sequence(source)
    if not isinstance(source, str | os.PathLike):
        raise _no_source(f"A text source of type {type(source).__name__} was given")
    if source == PYDOC:
        return Documents(PYDOC, _pydoc)
    path = Path(source).expanduser()
    if not path.exists():
        raise LoadError(
            four_part(
                f"{str(source)!r:.80} is no file or folder",
                where="open_documents",
                expected=f'a path, "{PYDOC}", or a list of texts.',
                fix="check the path; a text itself goes into a list: [text].",
            )
        )
    if path.is_dir():
        return _of_folder(path, key, split)
    if path.suffix not in PLAIN + ROWS:
        raise _no_source(f"A {path.suffix or 'nameless'} file ({path.name}) was given")
    return Documents(str(path), lambda: _of_file(path, key))


def _of_sequence(texts: Sequence[Any]) -> Documents:
    wrong = [number for number, text in enumerate(texts) if not isinstance(text, str)]
    if wrong:
        kind = type(texts[wrong[0]]).__name__
        raise _no_source(f"{len(wrong)} of {len(texts)} documents are no texts (number {wrong[0]} is of type {kind})")
    return Documents(f"{len(texts)} texts", lambda: iter(texts))


def _pydoc() -> Iterator[str]:
    from pydoc_data.topics import topics

    return (topics[name] for name in sorted(topics))


def _of_folder(folder: Path, key: str, split: str | None) -> Documents:
    """Every file with text in a folder, or the rows of a data set if it is one."""
    if (folder / _SPLITS).is_file():
        splits = _json(folder / _SPLITS)["splits"]
        if split not in splits and not (split is None and len(splits) == 1):
            raise UnknownNameError(
                four_part(
                    f"split={split!r} was given",
                    where=f"open_documents({str(folder)!r})",
                    names=splits,
                    given=split or "",
                    fix="choose one of these splits.",
                )
            )
        folder, split = folder / (split or splits[0]), None
    if split is not None:
        raise UnknownNameError(
            four_part(
                f"split={split!r} was given",
                where=f"open_documents({str(folder)!r})",
                expected="no split: this folder has none.",
                fix="leave `split` out.",
            )
        )
    if (folder / _STATE).is_file():
        return Documents(str(folder), lambda: _saved_rows(folder, key))
    visible = [path for path in sorted(folder.rglob("*")) if not _is_hidden(path.relative_to(folder))]
    files = [path for path in visible if path.suffix in PLAIN + ROWS and path.is_file()]
    if not files:
        raise LoadError(
            four_part(
                f"A folder without text ({len(visible)} files and folders) was given",
                where=f"open_documents({str(folder)!r})",
                expected=f"files ending in {', '.join(PLAIN + ROWS)}, or a data set written by save_to_disk.",
                fix="choose another folder, or give the texts themselves as a list.",
            )
        )
    return Documents(str(folder), lambda: (text for path in files for text in _of_file(path, key)))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _of_file(path: Path, key: str) -> Iterator[str]:
    if path.suffix in PLAIN:
        yield _decoded(path.read_bytes(), str(path))
    elif path.suffix == ".jsonl":
        yield from _json_rows(path, key)
    else:
        yield from _table_rows(path, key)


def _json_rows(path: Path, key: str) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(_decoded(line, where))
            except json.JSONDecodeError as error:
                raise _damaged(f"A line that is no JSON ({error})", where) from error
            if not isinstance(row, dict):
                raise _damaged(f"A line that is no JSON object but a {type(row).__name__}", where)
            if key not in row:
                raise _no_column(key, list(row), where)
            yield _text(row[key], where)


def _table_rows(path: Path, key: str) -> Iterator[str]:
    pyarrow = _pyarrow()
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            with parquet.ParquetFile(path) as file:
                _check_column(file.schema_arrow, key, str(path))
                for batch in file.iter_batches(columns=[key]):
                    yield from (text or "" for text in batch.column(0).to_pylist())
        else:
            with pyarrow.memory_map(str(path)) as file, _arrow_stream(pyarrow, file) as stream:
                _check_column(stream.schema, key, str(path))
                for batch in stream:
                    yield from (text or "" for text in batch.column(key).to_pylist())
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise _damaged(f"A damaged {path.suffix} file ({str(error).splitlines()[0]:.120})", str(path)) from error


def _saved_rows(folder: Path, key: str) -> Iterator[str]:
    """The rows of a data set as `save_to_disk` leaves it: Arrow streams, in the order its state says."""
    state = _json(folder / _STATE)
    files = [folder / entry["filename"] for entry in state["_data_files"]]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise _damaged(f"A data set without {', '.join(missing)}", str(folder))
    if state.get("_indices_data_files"):
        raise _damaged(
            "A data set saved together with a selection of its rows",
            str(folder),
            expected="rows as they are, which is how `datasets` has saved them since its version 2.",
            fix="load it with `datasets` and save it again.",
        )
    for path in files:
        yield from _table_rows(path, key)


def _arrow_stream(pyarrow: Any, file: Any) -> Any:
    """Either of Arrow's two file formats as batches; `datasets` writes the one without an index."""
    magic = file.read(6)
    file.seek(0)
    if magic != b"ARROW1":
        return pyarrow.ipc.open_stream(file)
    reader = pyarrow.ipc.open_file(file)
    batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    return pyarrow.RecordBatchReader.from_batches(reader.schema, batches)


def _check_column(schema: Any, key: str, where: str) -> None:
    if key not in schema.names:
        raise _no_column(key, schema.names, where)
    kind = str(schema.field(key).type)
    if "string" not in kind:
        raise _damaged(f"A column {key!r} of type {kind}", where, expected="a column of strings.")


def _text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _damaged(f"A text of type {type(value).__name__}", where, expected="a string.")
    return value


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LoadError(
            four_part(
                f"Bytes that are not UTF-8, at byte {error.start}",
                where=where,
                expected="text in UTF-8.",
                fix="convert the file, for example with iconv, or leave it out.",
            )
        ) from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(f"A damaged {path.name} ({error})", str(path.parent)) from error


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise InvalidInputError(
            four_part(
                "A Parquet or Arrow file was given, and pyarrow is not installed",
                where="open_documents",
                expected="the package that reads them.",
                fix="pip install 'interp-jax[datasets]'.",
            )
        ) from error
    return pyarrow


def _no_source(what: str) -> InvalidInputError:
    return InvalidInputError(
        four_part(
            what,
            where="open_documents",
            expected=f'"{PYDOC}", a {", ".join(PLAIN + ROWS)} file, a folder, or a list of texts.',
            fix="give one of these.",
        )
    )


def _no_column(key: str, names: Sequence[str], where: str) -> UnknownNameError:
    near = closest(key, names)
    return UnknownNameError(
        four_part(
            f"Rows without {key!r}",
            where=where,
            expected=f"that column; there are {shorten(names) or 'none'}.",
            fix=f"say which column holds the text: key={(near or list(names) or ['text'])[0]!r}.",
        )
    )


def _damaged(
    what: str,
    where: str,
    *,
    expected: str = "a complete file as its writer left it.",
    fix: str = "write or download it again, or leave it out.",
) -> LoadError:
    return LoadError(four_part(what, where=where, expected=expected, fix=fix))
