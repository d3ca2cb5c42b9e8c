"""Output folders as they lie on the disk: what state a run is in, its size, and what of it can be made again.

Everything here may have been damaged or put there by others: nothing is followed that is a link, and nothing is
counted as ours but what has an artifact's place and a manifest that fits.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cpift.console.progress import PLACE, Progress, read_progress
from cpift.disk.artifact_state import STAGES, TOKENS
from cpift.disk.artifacts import Artifact, artifact_at
from cpift.disk.locks import is_held
from cpift.untrusted.json import UnreadableError

SILENT_SECONDS = 60.0  # after which a run on another machine, whose lock cannot be seen, counts as ended
_NAME = re.compile(r"(?:.+-)?[0-9a-f]{12}")  # of an artifact's folder
_LEFT = re.compile(r"\.(?:.+-)?[0-9a-f]{12}\.(?:partial|left)")  # of what an interrupted build left
_LAST = ("integrate", "fuse")  # stages of the model that a run is for; the first of these that is there
_MODELS = ("model", "probe", "backbone", "fuse", "integrate", "arrival")


@dataclass(frozen=True)
class RunState:
    """kind: `running`, `finished`, `failed`, `stopped`, `killed`, `unknown` (no record of it), `damaged`."""

    kind: str
    why: str = ""
    progress: Progress | None = None


def run_state(folder: Path, now: float | None = None) -> RunState:
    """What became of the last command that worked in a folder."""
    try:
        progress = read_progress(folder)
    except (UnreadableError, OSError) as error:
        return RunState("running" if is_held(folder) else "damaged", str(error))
    if progress is None:
        return RunState("running" if is_held(folder) else "unknown", "no record of its progress")
    if progress.state != "running":
        return RunState(progress.state, progress.ended_by, progress)
    if is_held(folder) or _heard(folder, progress, now):
        return RunState("running", "", progress)
    return RunState("killed", "its process ended without a word, and the same command goes on", progress)


def _heard(folder: Path, progress: Progress, now: float | None) -> bool:
    """Whether a run on another machine wrote its record lately; locks are not seen through every file system."""
    if progress.host == socket.gethostname():
        return False
    with suppress(OSError):
        return (time.time() if now is None else now) - (folder / PLACE).stat().st_mtime < SILENT_SECONDS
    return False


def is_run(folder: Path) -> bool:
    """Whether a folder is an output folder: it has a record, or something with the place of an artifact."""
    return (folder / PLACE).is_file() or next(artifact_folders(folder), None) is not None


def artifact_folders(folder: Path) -> Iterator[Path]:
    """Real folders with the place and the name of an artifact, whole or not."""
    for stage in STAGES:
        yield from (path for path in _folders(folder / stage) if _NAME.fullmatch(path.name))


def runs_below(folder: Path) -> list[Path]:
    """The folder itself if it is a run; else the runs in it and in its folders."""
    if is_run(folder):
        return [folder]
    runs = []
    for path in _folders(folder):
        runs += [path] if is_run(path) else [below for below in _folders(path) if is_run(below)]
    return runs


def _folders(folder: Path) -> list[Path]:
    """Its folders that are no links; none where it is a link, cannot be read, or is no folder."""
    try:
        if folder.is_symlink():
            return []
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder, each once whatever its names; links are not followed."""
    return sum(size for size, *_ in files_below(folder).values())


def files_below(folder: Path) -> dict[tuple[int, int], tuple[int, int, int]]:
    """By device and inode: bytes, names that it has in all, and names below this folder."""
    sizes: dict[tuple[int, int], tuple[int, int, int]] = {}
    for place, _, names in os.walk(folder, onerror=lambda error: None):
        for name in names:
            with suppress(OSError):
                status = os.lstat(os.path.join(place, name))
                if stat.S_ISREG(status.st_mode):
                    key = (status.st_dev, status.st_ino)
                    sizes[key] = (status.st_size, status.st_nlink, sizes.get(key, (0, 0, 0))[2] + 1)
    return sizes


def last_change(folder: Path) -> float:
    """When something was last written: seconds since 1970."""
    places = [folder / PLACE, *artifact_folders(folder), folder]
    times = []
    for place in places:
        with suppress(OSError):
            times.append(place.stat().st_mtime)
    return max(times, default=0.0)


# ---- what can be freed ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Freed:
    """Something that can be made again. artifact: whose weights go; None where the whole folder is left-over work."""

    path: Path
    size: int
    what: str
    artifact: Artifact | None = None


def freeable(folder: Path) -> tuple[list[Freed], list[str]]:
    """What of a run can be made again, and a line for what looks like it and is left alone.

    Weights of every model but the last (the final model; of a merge the fused one), what interrupted builds left, and
    work on what is complete by now. Checkpoints of fine-tunes that are not complete stay: the run goes on from them.
    """
    freed, alone = [], []
    artifacts = {path: artifact_at(path) for path in artifact_folders(folder)}
    last = next((stage for stage in _LAST if any(path.parent.name == stage for path in artifacts)), "")
    for path, artifact in artifacts.items():
        if path.parent.name not in _MODELS or path.parent.name == last:
            continue
        if artifact is None or artifact.state().kind not in ("whole", "dropped"):
            alone.append(f"{path.relative_to(folder)}: not as cpift wrote it (see `cpift check`)")
        elif size := sum(file.stat().st_size for file in weights_of(artifact)):
            freed.append(Freed(path, size, "weights", artifact))
    freed += _left_over(folder)
    return freed, alone


def weights_of(artifact: Artifact) -> list[Path]:
    """The weights that cpift wrote, as they lie there; not what others put beside them."""
    names = (name for name in artifact.manifest()["outputs"] if name.endswith(".safetensors"))
    return [path for name in sorted(names) if (path := artifact.path / name).is_file() and not path.is_symlink()]


def _left_over(folder: Path) -> Iterator[Freed]:
    for stage in STAGES:
        for path in _folders(folder / stage):
            if _LEFT.fullmatch(path.name):
                yield Freed(path, size_of(path), "left by an interrupted build")
    for path in _folders(folder / ".work"):
        if path.name == TOKENS:
            yield Freed(path, size_of(path), "training rows as tokens")
        stage, _, name = path.name.partition("-")
        folder_made = folder / stage / name
        if stage in STAGES and _NAME.fullmatch(name) and not folder_made.is_symlink() and _complete(folder_made):
            yield Freed(path, size_of(path), "work on what is complete")


def _complete(path: Path) -> bool:
    artifact = artifact_at(path)
    return artifact is not None and artifact.complete


def free(freed: Freed, root: Path) -> None:
    """Delete what `freeable` found. The caller holds the run's folder."""
    if freed.artifact is None:
        shutil.rmtree(freed.path)
    else:
        config = root / "config.yaml"
        command = ["cpift", "run", str(config), f"--output={root}"]
        freed.artifact.drop_weights(shlex.join(command) if config.is_file() else "the command that made the run")
