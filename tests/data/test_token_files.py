"""Tokens are made once for what decides them, never taken for anything else's, and whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpift.config.inputs import ScratchModel
from cpift.config.run import DataSource
from cpift.data import on_disk, token_files, token_workers
from cpift.data.tasks import load_examples, source_fingerprint
from cpift.data.token_files import TokenFiles
from cpift.data.token_workers import tokenised
from cpift.errors import ChangedInput, CpiftError, DataError
from cpift.models.scratch import make_scratch_tokenizer
from tests.helpers.rows import tokenised_dataset

TOKENIZER = make_scratch_tokenizer(ScratchModel())


def source(path: Path, rows: int = 40) -> DataSource:
    turns = [["user", "assistant"][turn % 2] for turn in range(6)]
    chats = ([{"role": role, "content": f"{role} {row} " * (row % 5)} for role in turns] for row in range(rows))
    path.write_text(
        "".join(json.dumps({"messages": [*chat[:-1], {**chat[-1], "content": "ho"}]}) + "\n" for chat in chats)
    )
    return DataSource(file=path)


def kept(folder: Path, data: DataSource, length: int = 1000, tokenizer: Any = TOKENIZER) -> token_files.TokenRows:
    return TokenFiles(folder, tokenizer).rows(data, source_fingerprint(data), length)


def test_rows_and_their_facts_are_those_of_each_row_alone(tmp_path: Path) -> None:
    data = source(tmp_path / "rows.jsonl")
    examples = load_examples(data)
    lengths = [len(ids) for ids in tokenised_dataset(examples, TOKENIZER, 1000)["input_ids"]]
    for length in (1000, 300, 60, 20):  # the first is tokenised, the others are cut from one before
        found = kept(tmp_path / "tokens", data, length)
        assert list(found.rows) == list(tokenised_dataset(examples, TOKENIZER, length))
        assert found.facts[0].tolist() == lengths
        uses = found.use()
        assert (uses.rows, uses.used) == (len(examples), len(found.rows))
        assert uses.cut == sum(len(row["input_ids"]) < whole for row, whole in _used(found, lengths))
        places = [7, 0, 31, 12]
        chosen = [examples[place] for place in places]
        assert list(found.chosen(places)) == list(tokenised_dataset(chosen, TOKENIZER, length))
        assert found.use(places).used == len(found.chosen(places))


def _used(found: token_files.TokenRows, lengths: list[int]) -> Any:
    learnt = found.facts[1] < found.max_length
    return zip(found.rows, np.array(lengths)[learnt], strict=True)


def _another_template() -> Any:
    tokenizer = make_scratch_tokenizer(ScratchModel())
    tokenizer.chat_template = f"{tokenizer.chat_template}{{# another #}}"
    return tokenizer


def test_what_changed_is_tokenised_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, calls = source(tmp_path / "rows.jsonl", 5), list[int]()
    make = token_files.tokenised
    monkeypatch.setattr(token_files, "tokenised", lambda *asked: calls.append(1) or make(*asked))
    for _ in range(2):
        kept(tmp_path / "tokens", data)
    assert len(calls) == 1
    splitting = make_scratch_tokenizer(ScratchModel())
    splitting.split_special_tokens = True
    with pytest.raises(DataError, match="no special token"):  # asked, for these are other tokens
        kept(tmp_path / "tokens", data, tokenizer=splitting)
    kept(tmp_path / "tokens", data, tokenizer=_another_template())
    assert len(calls) == 3
    data = source(tmp_path / "rows.jsonl", 6)
    assert len(kept(tmp_path / "tokens", data)) == 6
    assert len(calls) == 4
    monkeypatch.setattr(token_files.facts, "releases", lambda: ("other libraries",))
    kept(tmp_path / "tokens", data)
    assert len(calls) == 5


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: os.truncate(path, 100)], ids=["gone", "short"])
def test_damaged_files_are_made_anew(tmp_path: Path, harm: Callable[[Path], Any]) -> None:
    data = source(tmp_path / "rows.jsonl", 5)
    whole = list(kept(tmp_path / "tokens", data).rows)
    (rows,) = (tmp_path / "tokens").glob("*/rows.arrow")
    harm(rows)
    assert list(kept(tmp_path / "tokens", data).rows) == whole


def test_rows_that_change_while_they_are_read_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, make = source(tmp_path / "rows.jsonl", 5), token_files.tokenised

    def changing(*asked: Any) -> Any:
        source(tmp_path / "rows.jsonl", 6)
        return make(*asked)

    monkeypatch.setattr(token_files, "tokenised", changing)
    with pytest.raises(ChangedInput):
        kept(tmp_path / "tokens", data)
    assert not list((tmp_path / "tokens").glob("[!.]*"))


def test_rows_that_the_template_cannot_write_are_told_together(tmp_path: Path) -> None:
    data, tokenizer = source(tmp_path / "rows.jsonl"), make_scratch_tokenizer(ScratchModel())
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | upper")
    with pytest.raises(DataError, match="does not appear in it as it is"):
        kept(tmp_path / "tokens", data, tokenizer=tokenizer)


@pytest.mark.slow
def test_helpers_give_what_one_process_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = load_examples(source(tmp_path / "rows.jsonl", 90))
    alone = list(tokenised(examples, TOKENIZER, 50))
    monkeypatch.setattr(token_workers, "_ALONE", 10)
    monkeypatch.setattr(token_workers, "_CHUNK", 10)
    together = list(tokenised(examples, TOKENIZER, 50))
    assert len(together) == 9
    for field in ("rows", "lengths", "firsts"):
        assert [one for chunk in together for one in getattr(chunk, field)] == getattr(alone[0], field)
    monkeypatch.setattr(token_workers, "_CHARACTERS", 200)  # long rows: fewer at once
    monkeypatch.setattr(on_disk, "_NUMBERS", 200)
    shorter = list(tokenised(examples, TOKENIZER, 50))
    assert len(shorter) > 9
    rows = [row for chunk in shorter for row in chunk.rows]
    assert rows == alone[0].rows == list(on_disk.rows_on_disk(rows, tmp_path / "rows.arrow"))
    monkeypatch.setattr(token_workers.sys, "executable", "false")
    with pytest.raises(CpiftError, match="exit code 1"):
        list(tokenised(examples, TOKENIZER, 50))


def test_a_kill_in_the_middle_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, make = source(tmp_path / "rows.jsonl"), token_files.tokenised

    def killed(*asked: Any) -> Any:
        yield from make(*asked)
        raise KeyboardInterrupt  # nothing is done for it: the next one finds what a kill leaves

    monkeypatch.setattr(token_files, "tokenised", killed)
    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path / "tokens", data)
    assert list((tmp_path / "tokens").glob(".*.partial"))
    assert not list((tmp_path / "tokens").glob("[!.]*"))
    monkeypatch.undo()
    assert list(kept(tmp_path / "tokens", data).rows) == list(tokenised_dataset(load_examples(data), TOKENIZER, 1000))
    assert not list((tmp_path / "tokens").glob(".*.partial"))
