"""What went wrong, said to the person who can mend it. The CLI turns each of these into exit code 2."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cpift.text.escaping import one_line
from cpift.text.redaction import redacted
from cpift.text.units import show_size

Entry = TypeVar("Entry")


class CpiftError(Exception):
    """An error that its message fully explains; no traceback helps. Its text holds no secrets."""

    def __str__(self) -> str:
        return redacted(super().__str__())


def entry(table: Mapping[str, Entry], name: str, what: str) -> Entry:
    """What a closed table holds under a name. Raises CpiftError for a name that it does not know."""
    if name not in table:
        raise CpiftError(f"{what}: nothing is known of {name!r} → one of {', '.join(map(str, table))}")
    return table[name]


@dataclass(frozen=True)
class Problem:
    """One thing wrong with an input: where, what is there, and what to do. As text it is one line."""

    where: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return redacted(one_line(f"{self.where}: {self.what}" + (f" → {self.remedy}" if self.remedy else "")))


_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some room there, or write to another folder"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change its permissions, or give another folder"),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR), "check the path"),
    errno.EIO: "look after the disk",
}


_FULL = {errno.ENOSPC: "No space left on device", errno.EDQUOT: "Disk quota exceeded", errno.EFBIG: "File too large"}
_KEPT = "; what was finished is kept, and the same command goes on"


def first_line(error: BaseException) -> str:
    """The first line that an error says; of one that says nothing its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def named_line(error: BaseException) -> str:
    """Its first line with its class before it: of errors of others, whose text alone may mean little."""
    return f"{type(error).__name__}: {first_line(error)}"


def explain_os_error(error: BaseException) -> str | None:
    """What the system refused, in words, where that is for the user to mend; else None.

    A full disk is known by what libraries say of it too, which name no file and raise errors of their own.
    """
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in _REMEDIES and cause.filename is not None:
            beyond = cause.errno in _FULL
            where = (beyond and cause.filename2) or cause.filename  # of a copy: what is written, not what is read
            room = _room(cause, where) if beyond else ""
            return redacted(f"{where}: {cause.strerror}{room} → {_REMEDIES[cause.errno]}{_KEPT}")
    for cause in _chain(error):
        full = next((said for said in _FULL.values() if said.lower() in str(cause).lower()), None)
        if full is not None:
            return redacted(f"{full}: {str(cause).strip().splitlines()[-1]} → {_REMEDIES[errno.ENOSPC]}{_KEPT}")
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it came from; Ray keeps a worker's as `cause`."""
    seen: list[BaseException] = []
    todo: list[Any] = [error]
    while todo:
        cause = todo.pop(0)
        if isinstance(cause, BaseException) and cause not in seen:
            seen.append(cause)
            yield cause
            todo += [cause.__cause__, cause.__context__, getattr(cause, "cause", None)]


@contextmanager
def naming(path: Path, nbytes: int = 0) -> Iterator[None]:
    """Calls on a descriptor fail without a name: give it, and how many bytes the file needs where that is known."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        error.needed = nbytes  # type: ignore[attr-defined]  # OSError has no such field
        raise


def _room(error: OSError, where: object) -> str:
    """Needed and free bytes, as far as they are known."""
    folder = next((parent for parent in Path(str(where)).absolute().parents if parent.is_dir()), None)
    needed = getattr(error, "needed", 0)
    parts = [f"{show_size(needed)} needed"] if needed else []
    parts += [f"{show_size(shutil.disk_usage(folder).free)} free"] if folder is not None else []
    return f" ({', '.join(parts)})" if parts else ""


class ProblemsError(CpiftError):
    """Several problems found together, so that one run of the command is enough to mend them all."""

    def __init__(self, subject: str, problems: Sequence[Problem]):
        self.subject = subject
        self.problems = tuple(problems)
        lines = "\n".join(f"  - {problem}" for problem in problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{subject}: {count}\n{lines}")

    def __reduce__(self) -> tuple[type[ProblemsError], tuple[str, tuple[Problem, ...]]]:
        return type(self), (self.subject, self.problems)  # so that a worker's error reaches the driver as it is


class ConfigError(ProblemsError):
    """The run's configuration cannot be used."""


class CheckpointError(ProblemsError):
    """A model's files cannot be used."""


class DataError(ProblemsError):
    """A task's examples cannot be used."""


class StageError(CpiftError):
    """A stage could not be completed; what it finished before stays in place."""


class ChangedInput(StageError):
    """Inputs were changed while something was made from them: what was made is not kept.

    resumable: it was noticed on the way, and what was finished before is of the inputs as they were.
    """

    def __init__(self, subject: str, problems: Sequence[Problem], resumable: bool = False):
        self.subject, self.problems, self.resumable = subject, tuple(problems), resumable
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"{subject} is not kept, for its inputs changed while it was made:\n{lines}")

    def __reduce__(self) -> tuple[type[ChangedInput], tuple[str, tuple[Problem, ...], bool]]:
        return type(self), (self.subject, self.problems, self.resumable)


class DamagedInput(StageError):
    """What a stage was about to read is not what was written; it was set aside, and is made again when asked for."""
