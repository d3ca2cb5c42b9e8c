"""Nobody's file is overwritten: what a command writes at the top of its folder replaces only what carries our mark."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from html import escape
from pathlib import Path

import pytest
import yaml

from cpift.disk.locks import check_lock, exclusive
from cpift.disk.top_files import RUN_FILES, check_top, is_ours, write_new, write_top
from cpift.errors import ConfigError, CpiftError

TEXTS = {
    "a.html": "<!doctype html>\n<p>x</p>\n",
    "a.csv": "name,n\nx,1\ny,2\n",
    "a.md": "# x\n",
    "a.svg": "<svg>x</svg>\n",
    "a.yaml": "name: x\n",
    "a.json": '{\n "name": "x"\n}\n',
    "a.jsonl": '{"name": "x"}\n{"name": "y"}\n',
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_was_written_is_replaced_until_somebody_changes_it(name: str, tmp_path: Path) -> None:
    write_top(tmp_path, {name: TEXTS[name]})
    path = tmp_path / name
    assert is_ours(path)
    write_top(tmp_path, {name: TEXTS[name].replace("x", "z")})
    assert "z" in path.read_text()
    path.write_text(path.read_text().replace("z", "my own"))
    with pytest.raises(ConfigError, match="changed since"):
        write_top(tmp_path, {name: TEXTS[name]})
    assert "my own" in path.read_text()


def test_marked_files_still_say_what_they_said(tmp_path: Path) -> None:
    write_top(tmp_path, TEXTS)
    assert json.loads((tmp_path / "a.json").read_text())["name"] == "x"
    assert [json.loads(line)["name"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] == ["x", "y"]
    assert yaml.safe_load((tmp_path / "a.yaml").read_text()) == {"name": "x"}
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [(row["name"], row["n"]) for row in rows] == [("x", "1"), ("y", "2")]
    assert [bool(row["written_by"]) for row in rows] == [True, False]


def _file(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.parent.mkdir(exist_ok=True) or (path.write_bytes(content) and None)


OWN: dict[str, Callable[[Path], None]] = {
    "text": _file(b"mine"),
    "empty": lambda path: path.touch(),
    "no text": _file(b"\xff\xfe\x00"),
    "folder": lambda path: path.mkdir(),
    "pipe": lambda path: os.mkfifo(path),
    "dead link": lambda path: path.symlink_to("nowhere"),
    "link to own": lambda path: (path.with_name("own").write_text("mine"), path.symlink_to("own"))[1],
    "a copy of another of ours": lambda path: path.write_bytes((path.parent / "a.yaml").read_bytes()),
}


@pytest.mark.parametrize("kind", OWN)
def test_what_is_somebodys_own_stays(kind: str, tmp_path: Path) -> None:
    write_top(tmp_path, {"a.yaml": "x: 1\n"})
    OWN[kind](tmp_path / "config.yaml")
    before = os.lstat(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"config.yaml.*→ move it"):
        write_top(tmp_path, {"other.md": "x", "config.yaml": "x: 1\n"})
    after = os.lstat(tmp_path / "config.yaml")
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert not (tmp_path / "other.md").exists(), "all or nothing"


@pytest.mark.parametrize("kind", ["text", "a link to itself"])
def test_what_stands_in_the_place_of_the_reports_is_told_before_anything_is_written(kind: str, tmp_path: Path) -> None:
    kept = tmp_path / "reports"
    kept.symlink_to("reports") if kind == "a link to itself" else kept.write_text("mine")
    assert [problem.where for problem in check_top(tmp_path, RUN_FILES)] == [str(kept)]
    assert check_top(tmp_path, ["comparison.md"]) == []
    with pytest.raises(ConfigError, match="reports are kept"):
        write_top(tmp_path, {"index.html": "<p>\n"})
    assert not (tmp_path / "index.html").exists()


PAGE = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>a: CPI-FT report</title><style></style>'
SUMMARY = dict.fromkeys(("name", "tasks", "models", "groups", "checks_passed", "verdict", "warnings"))


def test_files_of_earlier_versions_are_known_by_what_they_hold(tmp_path: Path) -> None:
    config = "name: <a>\nseed: 1\n"
    (tmp_path / "report.html").write_text(f"{PAGE}<pre><code>{escape(config.strip())}</code></pre>")
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "config.yaml").write_text(config)
    names = ("config.yaml", "summary.json", "report.html")
    assert check_top(tmp_path, names) == []
    (tmp_path / "config.yaml").write_text(config + "# my note\n")
    (tmp_path / "summary.json").write_text(json.dumps({"name": 1}))
    assert [Path(problem.where).name for problem in check_top(tmp_path, names)] == ["config.yaml", "summary.json"]


def test_a_new_file_replaces_nothing(tmp_path: Path) -> None:
    write_new(tmp_path / "new" / "x.json", "1")
    with pytest.raises(ConfigError, match="is there already"):
        write_new(tmp_path / "new" / "x.json", "2")
    assert [path.read_text() for path in (tmp_path / "new").iterdir()] == ["1"]


@pytest.mark.parametrize("kind", ["text", "no text", "folder", "dead link"])
def test_a_lock_of_somebodys_own_stays(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").touch()
    OWN[kind](tmp_path / ".lock")
    with pytest.raises(CpiftError, match="give another folder"), exclusive(tmp_path):
        pass
    assert not (tmp_path / ".lock").is_file() or (tmp_path / ".lock").read_bytes() in (b"mine", b"\xff\xfe\x00")


def test_our_lock_is_taken_again(tmp_path: Path) -> None:
    for _ in range(2):
        with exclusive(tmp_path):
            pass
    assert check_lock(tmp_path) == []
