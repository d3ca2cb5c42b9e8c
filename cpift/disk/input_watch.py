"""Inputs are identified again before anything made from them is kept: a fingerprint stands for what was read.

A fingerprint is taken when a command begins, and hours may lie between it and the last read. So the files behind it are
noted with it (device, inode, size, times), and looked at again when an output is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cpift.disk.checksums import file_checksum, known_checksum
from cpift.disk.files import file_identity, file_sha256, known_sha256
from cpift.errors import ChangedInput, Problem

Files = Callable[[], Iterable[Path]]
_Identity = tuple[int, ...]
_OF_BYTES = ((known_sha256, file_sha256), (known_checksum, file_checksum))
_OF_CONTENT = 4  # parts of an identity that change with the content unless somebody takes care that they do not
_REMEDY = "leave inputs alone while they are used; the same command begins with what is there now"


@dataclass(frozen=True)
class _Watched:
    title: str
    files: Files
    before: Mapping[Path, _Identity]


class InputWatch:
    """The files behind the fingerprints of a run's inputs."""

    def __init__(self) -> None:
        self._watched: dict[str, list[_Watched]] = {}

    def identify(self, title: str, files: Files, fingerprint: Callable[[], str]) -> str:
        """The fingerprint of an input that is made of these files, which are noted as they were just before."""
        before = _identities(files())
        value = fingerprint()
        self._watched.setdefault(value, []).append(_Watched(title, files, before))
        return value

    def changes(self, fingerprints: Iterable[str]) -> list[Problem]:
        """What happened to the files behind these fingerprints since they were taken; nothing to others."""
        watched = [inputs for value in dict.fromkeys(fingerprints) for inputs in self._watched.get(value, ())]
        return list(dict.fromkeys(problem for inputs in watched for problem in _changes(inputs)))


def _identities(files: Iterable[Path]) -> dict[Path, _Identity]:
    return {file: file_identity(file) for file in files}


def _changes(watched: _Watched) -> Iterator[Problem]:
    now = set(watched.files())
    for file, before in watched.before.items():
        if how := how_changed(file, before):
            yield Problem(f"{watched.title}: {file}", how, _REMEDY)
    for file in sorted(now - watched.before.keys()):
        yield Problem(f"{watched.title}: {file}", "was not there before", _REMEDY)


def how_changed(file: Path, before: _Identity) -> str | None:
    """What happened to a file since it had this identity; None where its bytes are the same, as far as can be known.

    Where its bytes were hashed or summed before, these decide; else size, time and inode.
    """
    try:
        now = file_identity(file)
    except (FileNotFoundError, NotADirectoryError):
        return "was deleted"
    looked = [(value, again) for known, again in _OF_BYTES if (value := known(before)) is not None]
    if now == before or (not looked and now[:_OF_CONTENT] == before[:_OF_CONTENT]):
        return None
    if looked and looked[0][0] == looked[0][1](file):
        return None
    return "was replaced by another file" if now[:2] != before[:2] else "was written to"


def noted(files: Iterable[Path]) -> Callable[[], list[Problem]]:
    """Note files as they are now; what it gives tells what happened to them since."""
    before = _identities(files)
    return lambda: [
        Problem(str(file), how, _REMEDY) for file, identity in before.items() if (how := how_changed(file, identity))
    ]


@contextmanager
def unchanged(title: str, files: Iterable[Path]) -> Iterator[None]:
    """Around a read of files. Raises ChangedInput where one of them changed meanwhile."""
    changes = noted(files)
    yield
    if problems := changes():
        raise ChangedInput(title, problems)
