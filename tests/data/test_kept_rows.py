"""Rows of a file that several checks look at are read once, and read again where the file changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cpift.config.run import DataSource
from cpift.data import kept_rows as kept
from cpift.data import tasks
from cpift.data.kept_rows import kept_rows
from cpift.errors import DataError

_ROW = '{{"prompt": "spell {0}", "completion": "{0}"}}\n'


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[DataSource]:
    seen: list[DataSource] = []
    parsed = tasks._parsed

    def counted(source: DataSource) -> Any:
        seen.append(source)
        yield from parsed(source)

    monkeypatch.setattr(tasks, "_parsed", counted)
    return seen


def test_a_file_is_read_once_and_again_after_it_changed(tmp_path: Path, reads: list[DataSource]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(_ROW.format("ab") * 3)
    source = DataSource(file=file)
    with kept_rows():
        first = tasks.load_examples(source)
        assert tasks.load_examples(source) == first
        assert tasks.load_examples(source.model_copy(update={"limit": 2})) == first[:2]
        assert len(reads) == 2
        file.write_text(_ROW.format("cd") * 2)
        assert [example.reply for example in tasks.read_examples(source)] == ["cd", "cd"]
    tasks.load_examples(source)
    assert len(reads) == 4


def test_what_was_read_in_part_with_problems_or_is_too_much_is_not_kept(
    tmp_path: Path, reads: list[DataSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(_ROW.format("ab") * 3)
    source = DataSource(file=file)
    with kept_rows():
        next(iter(tasks.read_examples(source)))
        assert len(tasks.load_examples(source)) == 3
        bad = tmp_path / "bad.jsonl"
        bad.write_text(_ROW.format("ab") + "{}\n")
        for _ in range(2):
            with pytest.raises(DataError):
                tasks.load_examples(DataSource(file=bad))
    assert len(reads) == 4
    monkeypatch.setattr(kept, "_CHARACTERS", 20)
    with kept_rows():
        assert len(tasks.load_examples(source)) == len(tasks.load_examples(source)) == 3
    assert len(reads) == 6
