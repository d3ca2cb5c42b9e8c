"""Whether the folder of an artifact is what it says: complete, its weights dropped, or damaged and why.

Cheap questions are asked always: is every file there, with the size and the time it was written with, and with a header
that fits; are small files (manifest, summaries, masks of small models) and those of another time what was hashed when
they were written. `thorough` hashes all. What is damaged is never deleted: it gets a name that says so.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from cpift.disk.files import (
    MANIFEST,
    digest,
    file_identity,
    file_sha256,
    json_text,
    known_sha256,
    read_json,
    write_json,
)

STAGES = ("model", "probe", "regions", "group", "backbone", "fuse", "integrate", "arrival", "evaluate", "sweep")
TOKENS = "tokens"  # in the work folder, beside what stages go on from: training rows as tokens
SMALL = 1 << 22  # bytes up to which a file is hashed whenever it is looked at
_HASH = re.compile("[0-9a-f]{64}")
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}  # no permission would help
_FORM: dict[str, type | tuple[type, ...]] = {
    "stage": str,
    "label": str,
    "fingerprint": str,
    "stage_version": int,
    "inputs": dict,
    "fields": dict,
    "outputs": dict,
    "started": str,
    "seconds": (int, float),
}


class Dropped(TypedDict):
    """Weights that were deleted from a finished artifact."""

    files: dict[str, int]  # size in bytes
    remake: str  # the command that makes them again


class _Later(TypedDict, total=False):
    """What manifests of earlier releases, or not all of them, have."""

    files: dict[str, list[int]]  # size in bytes and modification time in ns
    seal: str  # the digest of all the others
    dropped: Dropped
    made_for: str


class Manifest(_Later):
    """What an artifact was made from, by and of. Its file is the last one written: with it the artifact is complete."""

    stage: str
    label: str
    fingerprint: str  # of stage, stage_version, inputs and fields
    stage_version: int
    inputs: dict[str, str]
    fields: dict[str, Any]
    outputs: dict[str, str]  # file → sha256
    started: str  # ISO 8601, UTC
    seconds: float
    device: str
    platform: str
    versions: dict[str, str]
    commit: str | None


@dataclass(frozen=True)
class State:
    """kind: `dropped` is complete but for its weights; `why` says what is damaged."""

    kind: Literal["absent", "whole", "dropped", "damaged"]
    why: str = ""


def sealed(manifest: Mapping[str, Any]) -> Manifest:
    """A manifest as it is written: with the digest of all its other fields."""
    content = {name: value for name, value in json.loads(json_text(manifest)).items() if name != "seal"}
    return cast(Manifest, content | {"seal": digest(content)})


def sizes_and_times(folder: Path, names: Mapping[str, str]) -> dict[str, list[int]]:
    """Size in bytes and modification time in ns of each file."""
    return {name: [(status := (folder / name).stat()).st_size, status.st_mtime_ns] for name in names}


def state_of(folder: Path, fingerprint: str, thorough: bool = False) -> State:
    """The state of the artifact that belongs into a folder. OSError where the folder cannot be read."""
    try:
        if not stat.S_ISDIR(folder.stat().st_mode):
            return State("damaged", "is no folder")
    except FileNotFoundError:
        dead = next((path for path in (folder, folder.parent) if path.is_symlink()), None)
        return State("damaged", f"{dead} is a link that leads nowhere") if dead else State("absent")
    except NotADirectoryError:
        return State("damaged", f"cannot be there, for {folder.parent} is no folder")
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        return State("damaged", f"cannot be opened ({error.strerror})")
    try:
        manifest = read_manifest(folder)
        if manifest["fingerprint"] != fingerprint:
            return State("damaged", f"its {MANIFEST} is of something else, {manifest['fingerprint'][:12]}")
        why = _damage(folder, manifest, thorough)
    except ValueError as error:
        return State("damaged", str(error))
    return State("damaged", why) if why else State("dropped" if "dropped" in manifest else "whole")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact's folder. ValueError that says what is wrong with it."""
    path = folder / MANIFEST
    try:
        known = file_identity(path)
        if not path.is_file():
            raise ValueError(f"{MANIFEST} is no file")
        if known not in _READ:
            _READ[known] = _parsed(path)
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        raise ValueError(f"{MANIFEST} is not there") from None
    return _READ[known].copy()


_READ: dict[tuple[int, ...], Manifest] = {}


def _parsed(path: Path) -> Manifest:
    try:
        manifest = read_json(path)
    except ValueError as error:
        raise ValueError(f"{MANIFEST} cannot be used: {error}") from None
    if not isinstance(manifest, dict) or any(not isinstance(manifest.get(name), kind) for name, kind in _FORM.items()):
        raise ValueError(f"{MANIFEST} is not of its form")
    if any(name in manifest and not fits(manifest[name]) for name, fits in _LATER.items()):
        raise ValueError(f"{MANIFEST} is not of its form")
    if not manifest["outputs"] or not all(_is_entry(*entry) for entry in manifest["outputs"].items()):
        raise ValueError(f"{MANIFEST} names no outputs, or not by their sha256")
    if ("files" in manifest or "seal" in manifest) and sealed(manifest)["seal"] != manifest.get("seal"):
        raise ValueError(f"{MANIFEST} was changed after it was written")
    made_of = [manifest["stage"], manifest["stage_version"], manifest["inputs"], manifest["fields"]]
    if digest(made_of) != manifest["fingerprint"]:
        raise ValueError(f"{MANIFEST} does not have the inputs and fields that it is named by")
    return cast(Manifest, manifest)


def _is_entry(name: str, value: Any) -> bool:
    inside = bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts
    return inside and isinstance(value, str) and _HASH.fullmatch(value) is not None


def _damage(folder: Path, manifest: Mapping[str, Any], thorough: bool) -> str | None:
    """What is wrong with the files of a folder; None where nothing is."""
    dropped = manifest["dropped"]["files"] if "dropped" in manifest else {}
    for name, value in manifest["outputs"].items():
        if name not in dropped and (why := _wrong(folder / name, value, manifest.get("files", {}).get(name), thorough)):
            return f"{name} {why}"
    return None


def _wrong(path: Path, sha256: str, written: list[int] | None, thorough: bool) -> str | None:
    try:
        status = path.stat()
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        return "is not there"
    if not stat.S_ISREG(status.st_mode):
        return "is no file"
    if written is not None and status.st_size != written[0]:
        return f"has {status.st_size} bytes, {written[0]} were written"
    touched = written is not None and status.st_mtime_ns != written[1]
    if thorough or touched or status.st_size <= SMALL:
        return None if file_sha256(path) == sha256 else "is not what was written (sha256)"
    return None if path.suffix != ".safetensors" or _ends_with_its_tensors(path, status.st_size) else _SHORT


_SHORT = "does not have the length that its header says"


def _ends_with_its_tensors(path: Path, size: int) -> bool:
    """Whether a safetensors file is as long as its header says."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            return False
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return 8 + length + max(ends, default=0) == size
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return False


def _are_written(files: Any) -> bool:
    """Whether this is size and time of every file."""
    pairs = files.values() if isinstance(files, dict) else [None]
    return all(isinstance(pair, list) and [type(part) for part in pair] == [int, int] for pair in pairs)


def _is_dropped(dropped: Any) -> bool:
    """Whether this says which files are gone and how to make them again."""
    return (
        isinstance(dropped, dict) and isinstance(dropped.get("files"), dict) and isinstance(dropped.get("remake"), str)
    )


_LATER: dict[str, Callable[[Any], bool]] = {"files": _are_written, "dropped": _is_dropped}  # not in every manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest with its seal."""
    write_json(folder / MANIFEST, sealed(manifest))


def note_times(folder: Path) -> None:
    """Note the times of a copy's files, once their bytes were found to be those written: they are not hashed again.

    Where the folder cannot be written they are hashed by every command.
    """
    manifest = read_manifest(folder)
    written = manifest.get("files", {})
    times = {}
    gone = manifest["dropped"]["files"] if "dropped" in manifest else {}
    for name in written.keys() - gone.keys():
        known = file_identity(folder / name)
        if known_sha256(known) == manifest["outputs"].get(name):
            times[name] = [known[2], known[3]]
    if any(written[name] != times[name] for name in times):
        with suppress(OSError):
            write_manifest(folder, manifest | {"files": written | times})


def set_aside(path: Path) -> Path:
    """Give what is in the way a name that says that it is damaged; returns the new name."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.damaged" + (f"-{number}" if number > 1 else ""))):
        number += 1
    os.rename(path, aside)
    return aside


def clear_way(path: Path, fits: Callable[[Path], bool], warn: Callable[[str], None]) -> None:
    """Set aside what has the name of something of ours and is of another kind. fits: Path.is_dir or Path.is_file."""
    if os.path.lexists(path) and not fits(path):
        kind = "folder" if fits is Path.is_dir else "file"
        warn(f"{path} is no {kind}: set aside as {set_aside(path).name}")


def make_folder(folder: Path, root: Path, warn: Callable[[str], None]) -> None:
    """Make a folder below `root`, and set aside what stands in its way and is none."""
    for part in [*reversed(folder.relative_to(root).parents), folder.relative_to(root)]:
        path = root / part
        clear_way(path, Path.is_dir, warn)
        path.mkdir(parents=True, exist_ok=True)
