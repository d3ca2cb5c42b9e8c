"""What commands write at the top of an output folder: reports, figures, configs. They replace nobody's own file.

Each of these files carries a mark with the sha256 of its name and text. A file is replaced only where its mark still
fits: one without a mark, or changed since it was written, is somebody's. Earlier versions wrote no marks; their
files are known by what they hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from cpift.disk.files import write_text
from cpift.errors import ConfigError, Problem
from cpift.text.escaping import html

RUN_FILES = ("config.yaml", "summary.json", "scores.csv", "index.html", "report.html", "report.md")
SWEEP_FILES = ("best.yaml", "sweep.json", "trials.csv", "index.html", "sweep.html", "sweep.md")
SCORES_FILES = ("scores.json", "index.html", "scores.html", "scores.md")
REPORTS = "reports"  # the folder beside index.html that keeps a page of every configuration
_LARGEST = 1 << 28  # bytes; nothing that is written here comes near
_MARK = "written by cpift, which replaces it as long as nobody changes it; sha256 "
_TOKEN = re.compile(re.escape(_MARK) + "([0-9a-f]{64})")


def _as_comment(text: str, mark: str) -> str:
    return f"{text}<!-- {mark} -->\n"


def _as_key(text: str, mark: str) -> str:
    """As the first field of a JSON object, or of the object that is the first line."""
    head, brace, rest = text.partition("{")
    return f'{head}{brace}"written_by": "{mark}",{rest}'


def _as_column(text: str, mark: str) -> str:
    """As a last column, filled in the first row; the others leave it empty."""
    head, first, *others = text.splitlines()
    lines = [f"{head},written_by", f'{first},"{mark}"', *(f"{line}," for line in others)]
    return "".join(f"{line}\n" for line in lines)


_PLACES: dict[str, Callable[[str, str], str]] = {
    ".html": _as_comment,
    ".md": _as_comment,
    ".svg": _as_comment,
    ".yaml": lambda text, mark: f"# {mark}\n{text}",
    ".csv": _as_column,
    ".json": _as_key,
    ".jsonl": _as_key,
}


def marked(name: str, text: str) -> str:
    """The text of a file of this name, with the mark that lets the next run replace it."""
    blank = _PLACES[Path(name).suffix](text, _MARK + "0" * 64)
    return blank.replace(_MARK + "0" * 64, _MARK + _digest(name, blank), 1)


def _digest(name: str, blank: str) -> str:
    return hashlib.sha256(f"{name}\0{blank}".encode()).hexdigest()


def write_top(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files into a folder, each with its mark. Raises ConfigError, and writes none, if one is somebody's own."""
    folder.mkdir(parents=True, exist_ok=True)
    if problems := check_top(folder, texts):
        raise ConfigError(f"results in {folder}", problems)
    for name, text in texts.items():
        write_text(folder / name, marked(name, text))


def unmarked(path: Path) -> str:
    """The text of a page (HTML) that was written here, without its mark."""
    return re.sub(f"<!-- {_TOKEN.pattern} -->\n", "", path.read_text(encoding="utf-8"))


def write_new(path: Path, text: str) -> None:
    """Write a file that must not be there yet. Raises ConfigError if it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.new")
    write_text(partial, text)
    try:
        os.link(partial, path)
    except FileExistsError:
        raise ConfigError("results", [Problem(str(path), "is there already", "give another name")]) from None
    finally:
        partial.unlink()


def check_top(folder: Path, names: Iterable[str]) -> list[Problem]:
    """The files of these names that are there and were not written by this project, or were changed since; and what
    stands in the place of the folder of reports."""
    names = tuple(names)
    remedy = "move it elsewhere, or give another folder with --output"
    what = "is no file that cpift wrote, or was changed since: it would be replaced"
    problems = [
        Problem(str(folder / name), what, remedy)
        for name in names
        if os.path.lexists(folder / name) and not is_ours(folder / name)
    ]
    reports = folder / REPORTS
    if "index.html" in names and os.path.lexists(reports) and not reports.is_dir():
        problems.append(Problem(str(reports), "is no folder, and reports are kept in one of this name", remedy))
    return problems


def is_ours(path: Path) -> bool:
    """Whether a file was written here, and nobody has changed it since."""
    text = _text(path)
    if text is None:
        return False
    tokens = _TOKEN.findall(text)
    if not tokens:
        return any(fnmatchcase(path.name, name) and fits(text, path) for name, fits in _BEFORE_MARKS.items())
    return any(_digest(path.name, text.replace(value, "0" * 64, 1)) == value for value in tokens)


def _text(path: Path) -> str | None:
    """None for what is no text file of a size that is written here."""
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _page_of(kind: str) -> Callable[[str, Path], bool]:
    start = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    return lambda text, path: text.startswith(start) and f": {kind}</title><style>" in text[:2000]


def _object_with(*keys: str) -> Callable[[str, Path], bool]:
    """The first line, or the whole, is a JSON object with these fields first."""

    def fits(text: str, path: Path) -> bool:
        try:
            value = json.loads(text.splitlines()[0] if path.suffix == ".jsonl" else text)
        except (ValueError, IndexError, RecursionError):
            return False
        return isinstance(value, dict) and list(value)[: len(keys)] == list(keys)

    return fits


def _shown_in(page: str) -> Callable[[str, Path], bool]:
    """The page beside it, which is ours, shows this very text."""

    def fits(text: str, path: Path) -> bool:
        beside = path.with_name(page)
        shown = _text(beside) if is_ours(beside) else None
        return bool(text.strip()) and f"<pre><code>{html(text.strip())}</code></pre>" in (shown or "")

    return fits


def _beside_record(start: str) -> Callable[[str, Path], bool]:
    return lambda text, path: text.startswith(start) and is_ours(path.with_name("comparison.jsonl"))


_BEFORE_MARKS: dict[str, Callable[[str, Path], bool]] = {
    "report.html": _page_of("CPI-FT report"),
    "sweep.html": _page_of("CPI-FT sweep"),
    "summary.json": _object_with("name", "tasks", "models", "groups", "checks_passed", "verdict", "warnings"),
    "sweep.json": _object_with("name", "points", "seeds", "confidence", "tasks", "references", "trials", "best"),
    "config.yaml": _shown_in("report.html"),
    "best.yaml": _shown_in("sweep.html"),
    "comparison.jsonl": _object_with("name", "config", "comparison", "tasks", "seeds"),
    "comparison.md": _beside_record("# "),
    "comparison-*.svg": _beside_record('<svg xmlns="http://www.w3.org/2000/svg" '),
}
