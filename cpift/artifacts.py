"""Content-addressed stage outputs.

A stage's output is the folder `<output>/<stage>/<label>-<fingerprint>`; the fingerprint is a hash of its inputs and of
every field it depends on. The folder appears under that name only when it is whole, with `manifest.json` in it: work is
done in a `.partial` neighbour and renamed. So "exists" means "complete", and the same run again finds everything done.
A sweep may drop a model's weights once they are scored: it stays complete, and who needs the weights makes them again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from cpift.errors import CpiftError

MANIFEST = "manifest.json"
_PACKAGES = ("cpift", "torch", "transformers", "ray", "triton", "numpy", "numba", "datasets", "accelerate")


def digest(value: Any) -> str:
    """sha256 (hex) of a JSON-serialisable value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes; read once as long as the file stays as it is, whatever its names."""
    known = _identity(path)
    if known not in _SHA256:
        with path.open("rb") as file:
            found = (
                hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _chunked(file)
            )
        _SHA256[known] = found
    return _SHA256[known]


def remember_sha256(path: Path, value: str) -> None:
    """Tell `file_sha256` of a file whose bytes were hashed as they were written."""
    _SHA256[_identity(path)] = value


def _identity(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


_SHA256: dict[tuple[int, ...], str] = {}


def _chunked(file: Any) -> str:  # Python 3.10
    state = hashlib.sha256()
    while block := file.read(1 << 20):
        state.update(block)
    return state.hexdigest()


def folder_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder by its relative name, the manifest itself apart."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): file_sha256(path) for path in files}


def write_json(path: Path, value: Any) -> None:
    """Write through a temporary neighbour, so that a reader never meets half a file."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write through a temporary neighbour and flush it to the disk before the rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Artifact:
    """One stage's output, made or to be made."""

    root: Path
    stage: str
    label: str
    inputs: Mapping[str, str]  # name → fingerprint of each input
    fields: Mapping[str, Any]  # the config fields that the stage depends on
    version: int  # raised when the stage's code starts to give another result
    maker: str = field(default="", compare=False)  # for whom it is made, where that decides how long it is kept

    @property
    def fingerprint(self) -> str:
        return digest([self.stage, self.version, dict(self.inputs), dict(self.fields)])

    @property
    def name(self) -> str:
        return f"{self.label}-{self.fingerprint[:12]}" if self.label else self.fingerprint[:12]

    @property
    def path(self) -> Path:
        return self.root / self.stage / self.name

    @property
    def title(self) -> str:
        return f"{self.stage} {self.label}".strip()

    @property
    def complete(self) -> bool:
        return (self.path / MANIFEST).is_file()

    @property
    def whole(self) -> bool:
        """Complete, and its weights have not been dropped."""
        try:
            return "dropped" not in self.manifest()
        except FileNotFoundError:
            return False

    @property
    def work_dir(self) -> Path:
        """Where a stage keeps what lets it resume after a crash; removed once the stage is complete."""
        return self.root / ".work" / f"{self.stage}-{self.name}"

    def manifest(self) -> dict[str, Any]:
        return read_json(self.path / MANIFEST)

    @contextmanager
    def build(self, device: str = "cpu", seconds: float = 0.0) -> Iterator[Path]:
        """Give a folder to write into; when the block ends without an error, complete it with its manifest.

        `seconds`: work done for it elsewhere, before the block. What dropped weights left behind is replaced.
        """
        partial = self.path.with_name(f".{self.path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        started = time.time() - seconds
        yield partial
        write_json(partial / MANIFEST, self._manifest(partial, started, device))
        _sync_folder(partial)
        left = self.path.with_name(f".{self.path.name}.left")
        shutil.rmtree(left, ignore_errors=True)
        if self.complete:
            os.rename(self.path, left)
        os.rename(partial, self.path)
        _sync_folder(self.path.parent)
        shutil.rmtree(left, ignore_errors=True)
        shutil.rmtree(self.work_dir, ignore_errors=True)

    def drop_weights(self, remake: str) -> int:
        """Delete the weights of a complete model and keep all else; returns the bytes freed.

        remake: the command that makes them again. The manifest says so before the first file goes: after a crash in
        between, the files that are left count as dropped, and the next call deletes them.
        """
        sizes = {path: path.stat().st_size for path in sorted(self.path.glob("*.safetensors"))}
        if self.whole:
            dropped = {"files": {path.name: size for path, size in sizes.items()}, "remake": remake}
            write_json(self.path / MANIFEST, self.manifest() | {"dropped": dropped})
        for path in sizes:
            path.unlink()
        return sum(sizes.values())

    @contextmanager
    def compared(self, warn: Callable[[str], None]) -> Iterator[None]:
        """Around a build: warn if weights that had been dropped come out other than those that were scored."""
        before = self.manifest()["outputs"] if self.complete else {}
        yield
        now = self.manifest()["outputs"]
        if changed := [name for name in before if name.endswith(".safetensors") and now.get(name) != before[name]]:
            warn(
                f"{self.title}: {', '.join(changed)} made again, and not the same bytes as before (another machine, or "
                f"other versions). Scores in {self.root} are of the earlier ones: for new ones give another --output"
            )

    def _manifest(self, folder: Path, started: float, device: str) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "label": self.label,
            "fingerprint": self.fingerprint,
            "stage_version": self.version,
            "inputs": dict(self.inputs),
            "fields": dict(self.fields),
            "outputs": folder_hashes(folder),
            "started": datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.time() - started, 2),
            "device": device,
            "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            "versions": package_versions(),
            "commit": source_commit(),
            **({"made_for": self.maker} if self.maker else {}),
        }


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def claimed(artifacts: Iterable[Artifact]) -> Iterator[None]:
    """Hold artifacts while making them: who wants one of them meanwhile waits, and then finds it complete.

    Locks are taken in one order everywhere, so that holders of several never wait for each other, and a lock ends with
    its process. On shared storage this needs a file system with `flock` (NFS 4, Lustre and CephFS have it).
    """
    with ExitStack() as held:
        for artifact in sorted(artifacts, key=lambda one: one.path):
            artifact.work_dir.parent.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(artifact.work_dir.with_name(f"{artifact.work_dir.name}.lock").open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """Hold a run's output folder, so that two commands never build the same stage at once."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise CpiftError(f"{root} is in use by {holder}: wait for it, or give this run another --output") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()}")
        lock.flush()
        yield


@lru_cache
def package_versions() -> dict[str, str]:
    """Versions of what decides a stage's result."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@lru_cache
def source_commit() -> str | None:
    """The commit of the source tree that this package runs from, "+changes" if it is modified; None outside a tree."""
    tree = Path(__file__).resolve().parents[1]
    if not (tree / ".git").exists():
        return None
    git = ["git", "-C", str(tree)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed else "")
