"""What went wrong, said to the person who can mend it. The CLI turns each of these into exit code 2."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cpift.escaping import one_line
from cpift.redaction import redacted

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
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some room, or give another folder with --output"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change its permissions, or give another folder"),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR), "check the path"),
    errno.EIO: "look after the disk",
}


def told(error: Exception) -> str | None:
    """What the system refused, in words, where that is for the user to mend; else None."""
    if not isinstance(error, OSError) or error.errno not in _REMEDIES or error.filename is None:
        return None
    kept = "; what was finished is kept, and the same command goes on"
    return redacted(f"{error.filename}: {error.strerror} → {_REMEDIES[error.errno]}{kept}")


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
