"""Regular expressions of files that are not trusted, matched in time that grows with pattern × text and no faster.

Python's `re` tries one way after another, which for `(a+)+b` doubles with every letter. Here all ways are followed at
once, a set of places in the pattern a letter (Thompson, Regular expression search algorithm, 1968). That tells whether
there is a match, which is all that names of modules need, and whatever needs memory of what was matched (references,
looking around, possessive repeats) is refused.
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from cpift.untrusted.json import UnreadableError, shown

_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_PLAIN = re.compile(r"(?:[\w\-/ .]|\\[.\-])*")  # nothing to choose from: `re` cannot go astray
_LONGEST, _PLACES = 2000, 20_000
_WORK = 20_000_000  # places × letters of all texts together: some seconds
_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_NOT_DIGIT": lambda letter: not letter.isdecimal(),
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_NOT_SPACE": lambda letter: not letter.isspace(),
    "CATEGORY_WORD": lambda letter: letter.isalnum() or letter == "_",
    "CATEGORY_NOT_WORD": lambda letter: not (letter.isalnum() or letter == "_"),
}


class Patterns:
    """The patterns of one file. `form` stands around each, with the pattern in place of `{}`.

    Raises UnreadableError for what is no regular expression, or none that can be matched so.
    """

    def __init__(self, patterns: Iterable[str], form: str = "{}"):
        self._left = _WORK
        with warnings.catch_warnings():  # of what a later Python may read in another way
            warnings.simplefilter("ignore")
            self._matchers = {pattern: self._matcher(pattern, form.replace("{}", pattern)) for pattern in patterns}

    def match(self, pattern: str, text: str) -> bool:
        """Whether `re.match` would find it. Raises UnreadableError where all matches together take too long."""
        matcher = self._matchers[pattern]
        if isinstance(matcher, re.Pattern):
            return matcher.match(text) is not None
        return self._follow(matcher, text)

    def first(self, text: str) -> str | None:
        """The first of the patterns that matches."""
        return next((pattern for pattern in self._matchers if self.match(pattern, text)), None)

    def _matcher(self, pattern: str, expression: str) -> re.Pattern[str] | list[tuple[Any, ...]]:
        if len(pattern) > _LONGEST:
            raise UnreadableError(f"pattern {shown(pattern)} has more than {_LONGEST} letters", "shorten it")
        try:
            if _PLAIN.fullmatch(pattern):
                return re.compile(expression)
            _parser.parse(pattern)  # by itself too: `a)(b` is whole only inside the brackets of a form
            parsed = _parser.parse(expression)
            if parsed.state.flags & ~re.UNICODE:
                raise UnreadableError(
                    f"pattern {shown(pattern)} sets flags, which is not matched here", "leave them out"
                )
            return _Program(parsed, pattern).places
        except (re.error, OverflowError, RecursionError) as error:
            raise UnreadableError(f"pattern {shown(pattern)} is no regular expression: {error}", "mend it") from None

    def _follow(self, places: list[tuple[Any, ...]], text: str) -> bool:
        current = self._reached(places, [0], text, 0)
        for at, letter in enumerate(text):
            self._left -= len(current) + 1
            if self._left < 0:
                raise UnreadableError("patterns take too long to match", "make them shorter and simpler")
            if len(places) in current:
                return True
            current = self._reached(places, [n + 1 for n in current if places[n][1](letter)], text, at + 1)
        return len(places) in current

    def _reached(self, places: list[tuple[Any, ...]], starts: list[int], text: str, at: int) -> set[int]:
        """Where letters are waited for, or the end (the number of places), without reading one."""
        seen, reached, waiting = set(starts), set(), starts
        while waiting:
            place = waiting.pop()
            kind, what = places[place] if place < len(places) else ("end", None)
            if kind in ("letter", "end"):
                reached.add(place)
                continue
            steps = what if kind == "go" else [place + 1] if what(text, at) else []
            fresh = [step for step in steps if step not in seen]
            self._left -= 1
            seen.update(fresh)
            waiting += fresh
        return reached


class _Program:
    """places: ("letter", test of a letter), ("go", places to go on at), ("here", test of text and position)."""

    def __init__(self, parsed: Any, pattern: str):
        self.places: list[tuple[Any, ...]] = []
        self._pattern = pattern
        self._all(parsed)

    def _all(self, parsed: Any) -> None:
        for operation, argument in parsed:
            self._add(str(operation), argument)
            if len(self.places) > _PLACES:
                raise UnreadableError(f"pattern {shown(self._pattern)} repeats too much", "make it simpler")

    def _add(self, operation: str, argument: Any) -> None:
        if operation in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            self.places.append(("letter", _test(operation, argument)))
        elif operation in ("MAX_REPEAT", "MIN_REPEAT"):
            self._repeat(*argument)
        elif operation == "BRANCH":
            self._branch(argument[1])
        elif operation == "SUBPATTERN" and not (argument[1] or argument[2]):
            self._all(argument[3])
        elif operation == "AT" and str(argument) in _POSITIONS:
            self.places.append(("here", _POSITIONS[str(argument)]))
        else:
            what = f"pattern {shown(self._pattern)} uses {operation.lower()}, which is not matched here"
            raise UnreadableError(what, "use letters, sets, groups, | and repeats alone")

    def _repeat(self, least: int, most: Any, repeated: Any) -> None:
        for _ in range(least):
            before = len(self.places)
            self._all(repeated)
            if len(self.places) == before:
                return  # nothing, and so as often as one likes
        if most is _parser.MAXREPEAT or str(most) == "MAXREPEAT":
            start = len(self.places)
            self.places.append(("go", []))
            self._all(repeated)
            self.places.append(("go", [start]))
            self.places[start][1].extend([start + 1, len(self.places)])
            return
        skips = []
        for _ in range(most - least):
            skips.append(len(self.places))
            self.places.append(("go", [len(self.places) + 1]))
            self._all(repeated)
            if len(self.places) > _PLACES:
                break  # refused by who called
        for skip in skips:
            self.places[skip][1].append(len(self.places))

    def _branch(self, choices: Any) -> None:
        ends = []
        for choice in choices:
            start = len(self.places)
            self.places.append(("go", [start + 1]))
            self._all(choice)
            ends.append(len(self.places))
            self.places.append(("go", []))
            self.places[start][1].append(len(self.places))
        self.places.append(("here", lambda text, at: False))  # no choice is left
        for end in ends:
            self.places[end][1].append(len(self.places))


def _test(operation: str, argument: Any) -> Callable[[str], bool]:
    if operation == "ANY":
        return lambda letter: letter != "\n"
    if operation in ("LITERAL", "NOT_LITERAL"):
        wanted = chr(argument)
        return wanted.__eq__ if operation == "LITERAL" else wanted.__ne__
    kinds = [(str(kind), value) for kind, value in argument]
    inside = kinds[0][0] != "NEGATE"
    tests = [_member(kind, value) for kind, value in kinds if kind != "NEGATE"]
    return lambda letter: any(test(letter) for test in tests) == inside


def _member(kind: str, value: Any) -> Callable[[str], bool]:
    if kind == "LITERAL":
        return chr(value).__eq__
    if kind == "RANGE":
        return lambda letter: value[0] <= ord(letter) <= value[1]
    return _CATEGORIES[str(value)]


_POSITIONS: dict[str, Callable[[str, int], bool]] = {
    "AT_BEGINNING": lambda text, at: at == 0,
    "AT_BEGINNING_STRING": lambda text, at: at == 0,
    "AT_END": lambda text, at: at == len(text) or text[at:] == "\n",
    "AT_END_STRING": lambda text, at: at == len(text),
}
