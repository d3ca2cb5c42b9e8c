"""Content-addressed stage outputs.

A stage's output is the folder `<output>/<stage>/<label>-<fingerprint>`; the fingerprint is a hash of its inputs and of
every field it depends on. The folder appears under that name only when it is whole, with `manifest.json` in it: work is
done in a `.partial` neighbour and renamed. So "exists" means "complete", and the same run again finds everything done.
A sweep may drop a model's weights once they are scored, or never write them: it is complete, and who needs the weights
makes them again.
"""

from __future__ import annotations

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

from filelock import FileLock

from cpift.disk.artifact_state import (
    Dropped,
    Manifest,
    State,
    clear_way,
    make_folder,
    read_manifest,
    set_aside,
    sizes_and_times,
    state_of,
    write_manifest,
)
from cpift.disk.files import SOURCE_TREE, digest, folder_hashes
from cpift.disk.input_watch import InputWatch
from cpift.errors import ChangedInput, DamagedInput, StageError

CARD = "README.md"  # beside a model; written anew when the model has been scored, so no hash holds it
_PACKAGES = ("cpift", "torch", "transformers", "ray", "triton", "numpy", "numba", "datasets", "accelerate")


@dataclass(frozen=True)
class Unwritten:
    """Weights that an output is complete without: they were used where they were made. `remake`: see `drop_weights`."""

    files: Mapping[str, tuple[int, str]]  # what each would be: bytes, sha256
    remake: str


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
    watch: InputWatch | None = field(default=None, compare=False, repr=False)  # what became of its inputs' files

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

    def state(self, thorough: bool = False) -> State:
        """See `artifact_state.state_of`."""
        return state_of(self.path, self.fingerprint, thorough)

    @property
    def complete(self) -> bool:
        return self.state().kind in ("whole", "dropped")

    @property
    def has_weights(self) -> bool:
        """Complete, and its weights have not been dropped."""
        return self.state().kind == "whole"

    @property
    def work_dir(self) -> Path:
        """Where a stage keeps what lets it resume after a crash; removed once the stage is complete."""
        return self.root / ".work" / f"{self.stage}-{self.name}"

    def manifest(self) -> Manifest:
        return read_manifest(self.path)

    @contextmanager
    def build(self, device: str = "cpu", seconds: float = 0.0, unwritten: Unwritten | None = None) -> Iterator[Path]:
        """Give a folder to write into; when the block ends without an error, complete it with its manifest.

        `seconds`: work done for it elsewhere, before the block. unwritten: weights that stay out of the folder; it is
        then as if they had been dropped. What dropped weights left behind is replaced.
        """
        partial = self.path.with_name(f".{self.path.name}.partial")
        _remove(partial)
        partial.mkdir(parents=True)
        started = time.time() - seconds
        try:
            self._require_same_inputs()
            with self._told_of_inputs():
                yield partial
            self._require_same_inputs()
        except ChangedInput as error:
            _remove(partial)
            if not error.resumable:
                self.discard_work()
            raise
        write_manifest(partial, self._manifest(partial, started, device, unwritten))
        _sync_folder(partial)
        left = self.path.with_name(f".{self.path.name}.left")
        _remove(left)
        state = self.state().kind
        if state == "damaged":
            set_aside(self.path)
        elif state != "absent":
            os.rename(self.path, left)
        os.rename(partial, self.path)
        _sync_folder(self.path.parent)
        _remove(left)
        _remove(self.work_dir)

    def discard_work(self) -> None:
        """Delete what it would go on from: it was made of inputs that changed meanwhile."""
        _remove(self.work_dir)

    @contextmanager
    def _told_of_inputs(self) -> Iterator[None]:
        """What fails because an input is no longer there, or another, says that."""
        try:
            yield
        except Exception as error:
            if isinstance(error, ChangedInput) or self.watch is None:
                raise
            if problems := self.watch.changes(self.inputs.values()):
                raise ChangedInput(self.title, problems, resumable=True) from error
            raise

    def _require_same_inputs(self) -> None:
        if self.watch is not None and (problems := self.watch.changes(self.inputs.values())):
            raise ChangedInput(self.title, problems)

    def drop_weights(self, remake: str) -> int:
        """Delete the weights of a complete model and keep all else; returns the bytes freed.

        remake: the command that makes them again. The manifest says so before the first file goes: after a crash in
        between, the files that are left count as dropped, and the next call deletes them.
        """
        ours = {self.path / name for name in self.manifest()["outputs"]}  # others may have put theirs beside them
        sizes = {path: path.stat().st_size for path in sorted(self.path.glob("*.safetensors")) if path in ours}
        if self.has_weights:
            dropped: Dropped = {"files": {path.name: size for path, size in sizes.items()}, "remake": remake}
            write_manifest(self.path, self.manifest() | {"dropped": dropped})
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

    def set_aside_if_damaged(self, warn: Callable[[str], None], thorough: bool = False) -> bool:
        """Give the folder a name that says so, and say it in a line; to be called by who holds the artifact."""
        state = self.state(thorough)
        if state.kind == "damaged":
            make_folder(self.path.parent, self.root, warn)
            aside = set_aside(self.path) if os.path.lexists(self.path) else None
            if aside is not None:
                warn(f"{self.title}: {self.path} is damaged ({state.why}): set aside as {aside.name}, made again")
        return state.kind == "damaged"

    def _manifest(self, folder: Path, started: float, device: str, unwritten: Unwritten | None) -> Manifest:
        outputs = {name: sha256 for name, sha256 in folder_hashes(folder).items() if name != CARD}
        manifest: Manifest = {
            "stage": self.stage,
            "label": self.label,
            "fingerprint": self.fingerprint,
            "stage_version": self.version,
            "inputs": dict(self.inputs),
            "fields": dict(self.fields),
            "outputs": outputs,
            "files": sizes_and_times(folder, outputs),
            "started": datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.time() - started, 2),
            "device": device,
            "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            "versions": package_versions(),
            "commit": source_commit(),
        }
        if self.maker:
            manifest["made_for"] = self.maker
        if unwritten is not None:
            manifest["outputs"] = outputs | {name: sha256 for name, (_, sha256) in unwritten.files.items()}
            sizes = {name: size for name, (size, _) in unwritten.files.items()}
            manifest["dropped"] = {"files": sizes, "remake": unwritten.remake}
        return manifest


def artifact_at(folder: Path) -> Artifact | None:
    """The artifact that a folder's manifest describes, None where the folder is no artifact's place."""
    try:
        manifest = read_manifest(folder)
    except (ValueError, OSError):
        return None
    named = (manifest["stage"], manifest["label"], manifest["inputs"], manifest["fields"], manifest["stage_version"])
    artifact = Artifact(folder.parent.parent, *named)
    return artifact if artifact.path == folder else None


def require_sound(folders: Iterable[Path], root: Path, warn: Callable[[str], None]) -> None:
    """Raise DamagedInput where an artifact that is about to be read is, byte for byte, not what was written.

    Those below `root`, an output folder of ours, are set aside. Folders that are no artifacts are not looked at.
    """
    for folder in dict.fromkeys(folders):
        artifact = artifact_at(folder)
        if artifact is None or (state := artifact.state(thorough=True)).kind != "damaged":
            continue
        if artifact.root == root:
            with claimed([artifact], warn):
                artifact.set_aside_if_damaged(warn, thorough=True)
            raise DamagedInput(f"{folder} is damaged ({state.why}) and was set aside: the same command makes it again")
        raise StageError(f"{folder} is damaged ({state.why}): see `cpift check {artifact.root}`")


def _remove(path: Path) -> None:
    """Delete what an interrupted build left under a name of ours."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@lru_cache
def package_versions() -> dict[str, str]:
    """Versions of what decides a stage's result."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


@lru_cache
def source_commit() -> str | None:
    """The commit of the source tree that this package runs from, "+changes" if it is modified; None outside a tree."""
    tree = SOURCE_TREE
    if not (tree / ".git").exists():
        return None
    git = ["git", "-C", str(tree)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, encoding="utf-8"
        ).stdout.strip()
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True, encoding="utf-8").stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed else "")


@contextmanager
def claimed(artifacts: Iterable[Artifact], warn: Callable[[str], None]) -> Iterator[None]:
    """Hold artifacts while making them: who wants one of them meanwhile waits, and then finds it complete.

    What is damaged is set aside first, which `warn` says.

    Locks are taken in one order everywhere, so that holders of several never wait for each other, and a lock ends with
    its process. On shared storage this needs a file system with locks (NFS 4, Lustre and CephFS have them).
    """
    with ExitStack() as held:
        for artifact in sorted(artifacts, key=lambda entry: entry.path):
            make_folder(artifact.work_dir.parent, artifact.root, warn)
            lock = artifact.work_dir.with_name(f"{artifact.work_dir.name}.lock")
            clear_way(lock, Path.is_file, warn)
            held.enter_context(FileLock(lock))
            clear_way(artifact.work_dir, Path.is_dir, warn)
            artifact.set_aside_if_damaged(warn)
        yield
