"""What is wrong with rows, said once for all rows of which it is true."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from cpift.errors import Problem

_SHOWN = 10  # kinds of problems that are listed; of more it is said how many rows have them
_PARTICULAR = re.compile(r"\d+|'[^']*'|\"[^\"]*\"|\[[^\]]*\]")  # what differs among rows with the same problem


@dataclass
class _Kind:
    first: int
    problem: Problem
    rows: int = 1


class RowProblems:
    """Collects what is wrong with rows by what it is, numbers and quoted values apart."""

    def __init__(self, prefix: str = ""):
        self._prefix = prefix  # of where each is
        self._kinds: dict[str, _Kind] = {}

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def add(self, row: int, what: str, remedy: str = "") -> None:
        """One thing wrong with a row, counted from 1."""
        key = _PARTICULAR.sub("…", what)
        if key in self._kinds:
            self._kinds[key].rows += 1
        else:
            self._kinds[key] = _Kind(row, Problem(f"{self._prefix}row {row}", what, remedy))

    def problems(self, total: int) -> list[Problem]:
        """One problem a kind. `total`: rows that were looked at."""
        kinds = list(self._kinds.values())
        listed = [self._counted(kind, total) for kind in kinds[:_SHOWN]]
        more = sum(kind.rows for kind in kinds[_SHOWN:])
        return listed + ([Problem("and", f"{more} more rows with other problems")] if more else [])

    def _counted(self, kind: _Kind, total: int) -> Problem:
        if kind.rows == 1:
            return kind.problem
        where = f"{self._prefix}{kind.rows:,} of {total:,} rows, row {kind.first} first"
        return Problem(where, kind.problem.what, kind.problem.remedy)


def one_per_kind(problems: Iterable[Problem]) -> list[Problem]:
    """Problems of single rows by what is wrong: of each kind the first, with how many more there are."""
    kinds: dict[str, list[Problem]] = {}
    for problem in dict.fromkeys(problems):
        kind = _PARTICULAR.sub("…", f"{problem.where}\0{problem.what}")
        kinds.setdefault(kind, []).append(problem)
    return [_with_count(same) for same in kinds.values()]


def _with_count(same: list[Problem]) -> Problem:
    first, more = same[0], len(same) - 1
    return Problem(first.where, first.what + (f" (and {more} more of those looked at)" if more else ""), first.remedy)
