"""YAML as data alone: the values that JSON has, names that are text and stand once, bounded before anything is built.

PyYAML by itself builds what a tag names, lets the last of two names win, takes null for a name, reads 1:30 as ninety,
and follows aliases that stand for billions of values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cpift.untrusted.json import CONFIG, Limits, UnreadableError, decoded, read_with, require_limits, shown

# The kinds of values, and what they are written as.
_KINDS = {"seq": yaml.SequenceNode, "map": yaml.MappingNode} | dict.fromkeys(
    ("null", "bool", "int", "float", "str"), yaml.ScalarNode
)
_MERGE = "tag:yaml.org,2002:merge"
_SURPRISING = re.compile(r":|^[-+]?0[0-9]")  # 1:30 and 010 in YAML 1.1
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_ALIASES = 1000


def read_yaml_file(path: Path, limits: Limits = CONFIG) -> Any:
    """The value in a file. Raises UnreadableError naming the file, OSError where it cannot be opened."""
    return read_with(path, limits, parse_yaml)


def parse_yaml(text: str | bytes, limits: Limits = CONFIG) -> Any:
    """The value that a text in YAML stands for; None if it is empty. Raises UnreadableError."""
    text = decoded(text, limits)
    try:
        value = _loaded(text, limits)
    except yaml.YAMLError as error:
        raise _unreadable(error, text) from None
    require_limits(value, limits)
    return value


def nodes_of(path: Path, limits: Limits = CONFIG) -> Iterator[tuple[str, yaml.Node]]:
    """Every node of a file, and the name that it stands under, "" without one: for who looks at tags.

    Nothing is built. Raises UnreadableError naming the file, OSError where it cannot be opened.
    """
    yield from _nodes(read_with(path, limits, _composed), "", set())


def _composed(data: bytes, limits: Limits) -> yaml.Node | None:
    text = decoded(data.removeprefix(b"\xef\xbb\xbf"), limits)
    try:
        _check_events(text, limits)
        node: yaml.Node | None = yaml.compose(text, Loader=_Base)
    except yaml.YAMLError as error:
        raise _unreadable(error, text) from None
    return node


def _unreadable(error: yaml.YAMLError, text: str) -> UnreadableError:
    """What the parser says, with the line that it stopped at; what people meet most is said in plain words."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return UnreadableError(f"is no YAML: {' '.join(str(error).split())}", "mend the syntax")
    line = next(iter(text.splitlines()[mark.line :]), "")
    if "\t" in line[: len(line) - len(line.lstrip())] or line[mark.column : mark.column + 1] == "\t":
        return UnreadableError(f"is no YAML: has a tab in line {mark.line + 1}", "indent with spaces")
    if "document" in str(getattr(error, "context", "")) and "another document" in str(error):
        return UnreadableError(f"holds several documents, the second from line {mark.line + 1} on", "one for each file")
    what = " ".join(part for part in (error.context, error.problem) if part)  # type: ignore[attr-defined]  # of MarkedYAMLError
    return UnreadableError(f"is no YAML: {what}{_place_of(mark)}: {shown(line.strip())}", "mend the syntax")


def _nodes(node: Any, name: str, seen: set[int]) -> Iterator[tuple[str, yaml.Node]]:
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    yield name, node
    mapping = isinstance(node, yaml.MappingNode)
    for part in node.value if not isinstance(node, yaml.ScalarNode) else ():
        key, value = part if mapping else (None, part)
        yield from _nodes(key, "", seen)
        yield from _nodes(value, str(key.value) if isinstance(key, yaml.ScalarNode) else name, seen)


def _loaded(text: str, limits: Limits) -> Any:
    _check_events(text, limits)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node, limits)
        loader.limits = limits
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_events(text: str, limits: Limits) -> None:
    """Levels and aliases, as they come: what composes nodes calls itself for each level."""
    depth = aliases = 0
    for event in yaml.parse(text, Loader=_Base):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        if depth > limits.depth:
            raise UnreadableError(f"is nested more than {limits.depth} levels deep{_place(event)}", "mend the syntax")
        if aliases > _ALIASES:
            raise UnreadableError(f"has more than {_ALIASES} aliases", "write values out")


def _check_size(root: Any, limits: Limits) -> None:
    """Refuse a document with more values than allowed once aliases are written out, or with an alias of what it is in.

    Levels are few (`_check_events`), but aliases add theirs: each anchor's values are counted once, by its node.
    """
    sizes: dict[int, int] = {}

    def size(node: Any, above: tuple[int, ...]) -> int:
        if id(node) in above:
            raise UnreadableError(f"has an alias of what it stands in{_place(node)}", "write values out")
        if len(above) > limits.depth:
            raise UnreadableError(f"is nested more than {limits.depth} levels deep{_place(node)}", "use fewer aliases")
        if id(node) not in sizes:
            children = [] if isinstance(node, yaml.ScalarNode) else node.value
            parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
            sizes[id(node)] = 1 + sum(size(part, (*above, id(node))) for part in parts)
        if sizes[id(node)] > limits.values:
            raise UnreadableError(f"holds more than {limits.values:,} values", "use fewer aliases")
        return sizes[id(node)]

    size(root, ())


class _Loader(_Base):  # type: ignore[misc]  # a type checker cannot know which of the two it is
    """PyYAML's safe loader, less what it takes in silence."""

    limits: Limits

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if _KINDS.get(kind) is not type(node):
            what = f"{shown(node.value)} is" if isinstance(node, yaml.ScalarNode) else "has values"
            raise UnreadableError(f"{what} of the kind {shown(kind)}{_place(node)}", "put it in quotes")
        if kind in ("int", "float") and _SURPRISING.search(node.value):
            what = f"{shown(node.value)}{_place(node)} would be read in base 60 or 8"
            raise UnreadableError(what, "write a decimal number, or put it in quotes")
        try:
            value = super().construct_object(node, deep)
        except (ValueError, KeyError, OverflowError):  # `0x`, !!bool x
            raise UnreadableError(f"{shown(node.value)}{_place(node)} is no {kind}", "put it in quotes") from None
        self._check_scalar(value, node)
        return value

    def _check_scalar(self, value: Any, node: Any) -> None:
        if isinstance(value, int) and abs(value) >= 10**self.limits.digits:
            what = f"{shown(node.value)}{_place(node)} is a number of too many digits"
            raise UnreadableError(what, "give a number that fits 64 bits")
        if isinstance(value, float) and not abs(value) < float("inf"):
            what = f"{shown(node.value)}{_place(node)} is no finite number"
            raise UnreadableError(what, "give a finite number, or put it in quotes")
        if isinstance(value, str) and "\0" in value:
            raise UnreadableError(f"{shown(value)}{_place(node)} holds a null character", "take it out")

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == _MERGE:
                continue
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                what = f"has a name{_place(key)} that is no text, {shown(getattr(key, 'value', name))}"
                raise UnreadableError(what, "give every value a name, in quotes where it looks like a number")
            if name in seen:
                raise UnreadableError(f"has {shown(name)} twice{_place(key)}", "keep one of the two")
            seen.add(name)
        mapping: dict[str, Any] = super().construct_mapping(node, deep)
        return mapping


def _place(at: Any) -> str:
    return _place_of(at.start_mark)


def _place_of(mark: Any) -> str:
    return f" (line {mark.line + 1}, column {mark.column + 1})"
