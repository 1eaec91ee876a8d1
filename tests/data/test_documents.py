"""Documents from every kind of source, real data sets among them, and what is said of sources that are none.

Source: interp_jax; tests/oracles/saved_datasets was written by Hugging Face's `datasets` (record_saved_datasets.py).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from interp_jax.core.errors import InvalidInputError, LoadError, UnknownNameError
from interp_jax.data.documents import open_documents
from tests.conftest import ORACLES

SAVED = ORACLES / "saved_datasets"


def expected(kind: str, numbers: list[int]) -> list[str]:
    """What the recording script wrote: one text empty, one missing."""
    return ["" if number in (1, 2) else f"{kind} document {number}: é, 猫." for number in numbers]


def test_the_text_that_every_python_carries() -> None:
    documents = list(open_documents("pydoc"))
    assert sorted(documents) == sorted(topics.values())
    assert sum(map(len, documents)) > 100_000


def test_a_sequence_of_texts() -> None:
    documents = open_documents(("one", "", "two"))
    assert list(documents) == list(documents) == ["one", "", "two"]
    assert open_documents(documents) is documents


def test_a_folder_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "a.md").write_text("a: é", encoding="utf-8")
    (tmp_path / "b" / "c.rst").write_bytes(b"\xef\xbb\xbfbegins with a byte order mark")
    (tmp_path / "b" / "d.jsonl").write_text('{"text": "row 1"}\n\n{"text": null}\n{"text": "row 3", "n": 1}\n')
    (tmp_path / "e.txt").write_text("last")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".git" / "f.txt").write_text("hidden")
    (tmp_path / ".g.txt").write_text("hidden")
    texts = ["a: é", "begins with a byte order mark", "row 1", "", "row 3", "last"]
    assert list(open_documents(tmp_path)) == texts
    assert list(open_documents(str(tmp_path / "e.txt"))) == ["last"]


@pytest.mark.parametrize(
    ("place", "split", "texts"),
    [
        ("splits", "train", expected("train", [*range(7)])),  # two files
        ("splits", "test", expected("test", [*range(4)])),
        ("splits/test", None, expected("test", [*range(4)])),
        ("picked", None, expected("picked", [8, 3, 5, 2, 0])),
        ("hub", None, expected("parquet", [*range(5)])),
    ],
)
def test_data_sets_that_hugging_face_saved(place: str, split: str | None, texts: list[str]) -> None:
    documents = open_documents(SAVED / place, split=split)
    assert list(documents) == list(documents) == texts


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), "string")]
)
def test_rows_in_either_arrow_format_and_any_kind_of_string(kind: pyarrow.DataType, tmp_path: Path) -> None:
    texts = ["one", None, "three"]
    table = pyarrow.table(
        {
            "body": pyarrow.array(texts).cast(kind)
            if "dict" not in str(kind)
            else pyarrow.array(texts).dictionary_encode()
        }
    )
    with pyarrow.ipc.new_stream(str(tmp_path / "1.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    with pyarrow.ipc.new_file(str(tmp_path / "2.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    pyarrow.parquet.write_table(table, tmp_path / "3.parquet", row_group_size=2)
    assert list(open_documents(tmp_path, key="body")) == ["one", "", "three"] * 3


def broken(folder: Path, case: str) -> dict:
    """A source with one fault, and the options to open it with."""
    table = pyarrow.table({"content": ["one"], "n": [1]})
    match case:
        case "no JSON":
            (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": \n')
        case "no object":
            (folder / "a.jsonl").write_text('["text"]\n')
        case "no such key":
            (folder / "a.jsonl").write_text('{"texts": "one"}\n')
        case "no string":
            (folder / "a.jsonl").write_text('{"text": 7}\n')
        case "no UTF-8":
            (folder / "a.txt").write_bytes(b"caf\xe9")
        case "no such column":
            pyarrow.parquet.write_table(table, folder / "a.parquet")
        case "numbers":
            pyarrow.parquet.write_table(table, folder / "a.parquet")
            return {"key": "n"}
        case "half a parquet file":
            pyarrow.parquet.write_table(table, folder / "a.parquet")
            (folder / "a.parquet").write_bytes((folder / "a.parquet").read_bytes()[:-20])
        case "half an arrow file":
            whole = (SAVED / "picked" / "data-00000-of-00001.arrow").read_bytes()
            (folder / "a.arrow").write_bytes(whole[:500])
        case "a file missing":
            (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
        case "an old selection":
            state = {"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}
            (folder / "state.json").write_text(json.dumps(state))
        case "no JSON state":
            (folder / "state.json").write_text("{")
    return {}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no JSON", ("a.jsonl:2", "no JSON", "Fix: write or download it again")),
        ("no object", ("a.jsonl:1", "no JSON object but a list")),
        ("no such key", ("Rows without 'text' in", "a.jsonl:1", "there are texts", "key='texts'")),
        ("no string", ("A text of type int", "a.jsonl:1", "Expected: a string")),
        ("no UTF-8", ("not UTF-8, at byte 3", "a.txt", "Fix: convert the file")),
        ("no such column", ("Rows without 'text'", "a.parquet", "there are content, n", "key='content'")),
        ("numbers", ("A column 'n' of type int64", "a column of strings")),
        ("half a parquet file", ("A damaged .parquet file", "a.parquet", "Fix: write or download it again")),
        ("half an arrow file", ("A damaged .arrow file", "a.arrow")),
        ("a file missing", ("A data set without data-0.arrow", "Fix: write or download it again")),
        ("an old selection", ("a selection of its rows", "Fix: load it with `datasets` and save it again")),
        ("no JSON state", ("A damaged state.json",)),
    ],
)
def test_what_is_broken_is_named(case: str, words: tuple[str, ...], tmp_path: Path) -> None:
    options = broken(tmp_path, case)
    with pytest.raises((LoadError, UnknownNameError)) as error:
        list(open_documents(tmp_path, **options))
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("no/such/file.txt", {}, ("'no/such/file.txt' is no file or folder", "a text itself goes into a list: [text]")),
        (SAVED / "splits", {}, ("split=None was given", "Known: train, test", "Fix: choose one of these splits")),
        (SAVED / "splits", {"split": "tests"}, ("split='tests'", "Did you mean 'test'?")),
        (SAVED / "picked", {"split": "train"}, ("split='train' was given", "this folder has none")),
        (ORACLES / "tiny_gpt2" / "model.safetensors", {}, ("A .safetensors file", ".jsonl")),
        (b"bytes", {}, ("of type bytes", "a list of texts")),
        (["a", 3, None], {}, ("2 of 3 documents are no texts (number 1 is of type int)",)),
    ],
)
def test_what_is_no_source(source, options: dict, words: tuple[str, ...]) -> None:
    with pytest.raises((LoadError, UnknownNameError, InvalidInputError)) as error:
        open_documents(source, **options)
    assert [word for word in words if word not in str(error.value)] == []


def test_a_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(LoadError, match=r"A folder without text \(1 files and folders\).*\n.*\.parquet"):
        open_documents(tmp_path)


def test_without_pyarrow_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InvalidInputError, match=r"pyarrow is not installed.*\n.*\n.*interp-jax\[datasets\]"):
        list(open_documents(SAVED / "hub"))
