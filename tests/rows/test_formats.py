"""Files of rows as other programs write them, read as those programs read them, within limits; and shapes of rows."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import random
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from cpift.config.inputs import ScratchModel
from cpift.config.run import DataSource
from cpift.data.sources import rows_of
from cpift.data.tasks import load_examples, source_fingerprint
from cpift.data.tokenise import tokenise
from cpift.errors import DataError
from cpift.models.scratch import make_scratch_tokenizer
from cpift.rows import texts as row_texts
from cpift.rows.examples import parse_row
from cpift.rows.formats import format_of
from cpift.rows.kinds import KINDS, columns_for, kind_of
from cpift.rows.turns import RowError

# Text that formats get wrong: quotes, separators, line breaks, spaces at the ends, what looks like a number or nothing.
CELLS = ['say "a", or b;\tc', "two\nlines\r\nthree", "  padded  ", "007", "1e5", "NA", "null", "None", "é𝒜\u2028z", ""]
ROWS = [{"prompt": f"{i}: {cell}", "completion": cell or "x", "note": cell} for i, cell in enumerate(CELLS)]


def _csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def _packed(pack: Callable[[bytes], bytes], write: Callable[[Path], Any]) -> Callable[[Path], None]:
    def written(path: Path) -> None:
        write(path)
        path.write_bytes(pack(path.read_bytes()))

    return written


def _lines(path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")


def _array(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8")


def _feather(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.Table.from_pylist(ROWS).schema) as writer:
        writer.write_table(pa.Table.from_pylist(ROWS), max_chunksize=3)


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data[:9]) + gzip.compress(data[9:])


def _zstd(data: bytes) -> bytes:
    return b"".join(pa.compress(part, codec="zstd", asbytes=True) for part in (data[:50], data[50:]))


WRITERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a.jsonl": ("JSON lines", _lines),
    "mark.jsonl": ("JSON lines", _packed(lambda data: b"\xef\xbb\xbf" + data, _lines)),
    "a.json": ("a JSON array", _array),
    "mark.json": ("a JSON array", _packed(lambda data: b"\xef\xbb\xbf \n" + data, _array)),
    "array.jsonl": ("a JSON array", _array),
    "pandas.json": ("a JSON array", lambda path: Dataset.from_list(ROWS).to_pandas().to_json(path, orient="records")),
    "datasets.json": ("JSON lines", lambda path: Dataset.from_list(ROWS).to_json(path)),
    "a.csv": ("CSV", _csv),
    "mark.csv": ("CSV", _packed(lambda data: b"\xef\xbb\xbf" + data, _csv)),
    "semicolon.csv": ("CSV", lambda path: _csv(path, ";")),
    "a.tsv": ("TSV", lambda path: _csv(path, "\t")),
    "a.csv.gz": ("CSV (gzip)", _packed(gzip.compress, _csv)),
    "a.jsonl.gz": ("JSON lines (gzip)", _packed(_gzip, _lines)),
    "a.jsonl.zst": ("JSON lines (zstd)", _packed(_zstd, _lines)),
    "a.json.zst": ("a JSON array (zstd)", _packed(_zstd, _array)),
    "a.parquet": ("Parquet", lambda path: Dataset.from_list(ROWS).to_parquet(path, batch_size=3)),
    "a.feather": ("Arrow", _feather),
    "saved": ("datasets' save_to_disk", lambda path: Dataset.from_list(ROWS).save_to_disk(path, num_shards=3)),
    "no_name": ("JSON lines", _lines),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_rows_are_what_was_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_texts, "_CHUNK", 7)  # every row lies across pieces
    title, write = WRITERS[name]
    write(tmp_path / name)
    source = DataSource(file=tmp_path / name)
    assert format_of(tmp_path / name).title == title
    assert list(rows_of(source).rows()) == ROWS
    assert len(load_examples(source)) == len(ROWS)
    assert len(source_fingerprint(source)) == 64


def test_a_saved_folder_of_splits_nested_columns_and_streams(tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": "u"}, {"role": "assistant", "content": f"r{i}"}] for i in range(5)]
    rows = [{"messages": two, "choices": None} for two in turns]
    DatasetDict(train=Dataset.from_list(rows[:3]), valid=Dataset.from_list(rows[3:])).save_to_disk(tmp_path / "both")
    for split, expected in (("train", rows[:3]), ("valid", rows[3:])):
        source = DataSource(file=tmp_path / "both", split=split)
        assert list(rows_of(source).rows()) == expected
        assert [one.reply for one in load_examples(source)] == [row["messages"][1]["content"] for row in expected]
    (shard,) = (tmp_path / "both" / "train").glob("*.arrow")
    assert list(rows_of(DataSource(file=shard)).rows()) == rows[:3]
    with pytest.raises(DataError, match="has no split 'test' → set split to one of train, valid"):
        load_examples(DataSource(file=tmp_path / "both", split="test"))
    assert len({source_fingerprint(DataSource(file=tmp_path / "both", split=one)) for one in ("train", "valid")}) == 2


def _state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        Dataset.from_list(ROWS).save_to_disk(path)
        state = json.loads((path / "state.json").read_text())
        change(state)
        (path / "state.json").write_text(json.dumps(state))

    return write


def _cut(path: Path, write: Callable[[Path], Any], share: float = 0.6) -> None:
    write(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut.json": (lambda path: _cut(path, _array), "row . is no JSON: "),
    "comma.json": (lambda path: path.write_text('[{"a": 1},]'), "row 2 is no JSON"),
    "two.json": (lambda path: path.write_text("[{}] [{}]"), "goes on after the end of its array"),
    "no comma.json": (lambda path: path.write_text("[{} {}]"), "has '{' where ']' belongs"),
    "twice.json": (lambda path: path.write_text('[{"a": 1, "a": 2}]'), "row 1 has 'a' twice"),
    "one.json": (lambda path: path.write_text('{\n "data": [{"prompt": "x"}]}'), "is one JSON object over several"),
    "cut.jsonl.gz": (lambda path: _cut(path, WRITERS["a.jsonl.gz"][1]), "is damaged"),
    "cut.jsonl.zst": (lambda path: _cut(path, WRITERS["a.jsonl.zst"][1]), "is damaged|is no JSON"),
    "bad.csv.gz": (lambda path: path.write_bytes(b"\x1f\x8b" + b"x" * 50), "is damaged"),
    "cut.parquet": (lambda path: _cut(path, WRITERS["a.parquet"][1]), "cannot be read as Arrow's columns"),
    "cut.feather": (lambda path: _cut(path, _feather), "cannot be read as Arrow's columns"),
    "pack.parquet.gz": (_packed(gzip.compress, WRITERS["a.parquet"][1]), "Parquet compressed once more with gzip"),
    "x.xlsx": (lambda path: path.write_bytes(b"PK\x03\x04..."), "is a zip archive or a spreadsheet"),
    "x.pkl": (lambda path: path.write_bytes(b"\x80\x04\x95"), "is a pickle, which is code"),
    "x.csv": (lambda path: path.write_bytes("a,b\n".encode("utf-16")), "is no UTF-8 but UTF-16"),
    "twice.csv": (lambda path: path.write_text("a,b,a\n1,2,3\n"), "has column 'a' twice"),
    "ragged.csv": (lambda path: path.write_text("prompt,completion\na,b\nc\nd,e,f\ng,h,i\n"),
                   "3 of 4 rows, row 2 first: has 1 cells, the header 2"),
    "quote.csv": (lambda path: path.write_text('prompt,completion\n"a,b\n'), "is no table: unexpected end of data"),
    "latin.csv": (lambda path: path.write_bytes("prompt,completion\né,b\n".encode("latin-1")), "is no UTF-8"),
    "a.png": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n..."), "is no text, and no known format of rows"),
    "story.txt": (lambda path: path.write_text("Once upon\na time\n"), "is running text, not rows"),
    "line.json": (lambda path: path.write_text('{"version": 1, "data": [{"a": 1}]}'), "its rows stand under 'data'"),
    "empty": (lambda path: path.mkdir(), "is a folder without state.json"),
    "outside": (_state(lambda state: state.update(_data_files=[{"filename": "../x.arrow"}])), "names no Arrow files"),
    "indices": (_state(lambda state: state.update(_indices_data_files=[{"filename": "i.arrow"}])), "by indices"),
    "missing": (_state(lambda state: state.update(_data_files=[{"filename": "x.arrow"}])), "No such file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_named_in_a_line(name: str, tmp_path: Path) -> None:
    write, message = BAD[name]
    write(tmp_path / name)
    with pytest.raises(DataError, match=message) as error:
        load_examples(DataSource(file=tmp_path / name))
    assert len(error.value.problems) == 1


def test_long_rows_are_refused_before_they_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_texts, "_CHUNK", 100)
    monkeypatch.setattr(row_texts, "ROW", row_texts.ROW.__class__(size=1000, values=100))
    for name, text, message in (
        ("a.json", '[{"prompt": "' + "x" * 5000, "row 1 has more than 1,000 characters"),
        ("a.csv", "prompt,completion\n" + "x\n" * 10 + '"' + "y\n" * 3000, "more than 1,000 bytes|field larger than"),
        ("b.csv", "x" * 5000, "has a line of more than 1,000 bytes"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=message):
            load_examples(DataSource(file=tmp_path / name))


# --- shapes of rows ---

USER, REPLY = {"role": "user", "content": "u"}, {"role": "assistant", "content": "r"}
TALK = [USER, REPLY]
SHAPES: list[tuple[dict[str, Any], str, list[Any]]] = [
    ({"messages": TALK, "prompt": "other"}, "messages", TALK),
    ({"messages": json.dumps(TALK)}, "messages", TALK),
    ({"messages": None, "prompt": "u", "completion": "r"}, "prompt and completion", TALK),
    ({"prompt": [USER], "completion": "r"}, "prompt and completion", TALK),
    ({"prompt": "u", "completion": Decimal("3.50")}, "prompt and completion", [USER, REPLY | {"content": "3.50"}]),
    ({"instruction": "u", "output": 3}, "Alpaca", [USER, REPLY | {"content": "3"}]),
    ({"prompt": "u", "completion": None, "answer": 3}, "prompt and answer", [USER, REPLY | {"content": "3"}]),
    ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "u"}, {"from": "gpt", "value": "r",
      "weight": None}], "id": "x"}, "ShareGPT", [{"role": "system", "content": "s"}, *TALK]),
    ({"conversations": TALK, "system": "s"}, "ShareGPT", [{"role": "system", "content": "s"}, *TALK]),
    ({"instruction": "u", "output": "r", "text": "whole"}, "Alpaca", TALK),
    ({"instruction": "u", "input": None, "output": "r"}, "Alpaca", TALK),
    ({"instruction": "u", "input": " ", "output": "r"}, "Alpaca", TALK),
    ({"instruction": "u", "input": "i", "output": "r", "system": ""}, "Alpaca", [USER | {"content": "u\n\ni"}, REPLY]),
    ({"instruction": "u", "context": "c", "response": "r", "category": "x"}, "Dolly",
     [USER | {"content": "u\n\nc"}, REPLY]),
    ({"messages": [{"role": "developer", "content": [{"type": "text", "text": "s"}]}, *TALK]}, "messages",
     [{"role": "system", "content": "s"}, *TALK]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "title", "turns"), SHAPES)
def test_a_shape_is_recognised_and_named(row: dict[str, Any], title: str, turns: list[Any]) -> None:
    assert kind_of(row).title == title
    assert [message.turn for message in parse_row(row, {}).messages] == turns


def test_a_call_of_sharegpt_and_its_answer() -> None:
    said = [
        ("human", "u"),
        ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
        ("observation", "1"),
        ("gpt", "r"),
    ]
    example = parse_row({"conversations": [{"from": role, "value": value} for role, value in said]}, {})
    call = {"name": "f", "arguments": {"x": 1}}
    assert [m.turn for m in example.messages][1:3] == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
    ]


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (["question", "answer", "id"], {"prompt": "{question}", "completion": "{answer}"}),
        (["text", "label"], {"prompt": "{text}", "completion": "{label}"}),
        (["context", "question", "answer"], {"prompt": "{context:?}\n\n{question}", "completion": "{answer}"}),
        (["article", "highlights"], {"prompt": "{article}", "completion": "{highlights}"}),
        (["a", "b"], {}),
    ],
)
def test_columns_are_proposed_by_their_names(names: list[str], columns: dict[str, str]) -> None:
    assert columns_for(names) == columns
    with pytest.raises(RowError) as error:
        parse_row(dict.fromkeys(names, "x"), {})
    assert all(f"{{{name}" in error.value.remedy for name in names if any(name in one for one in columns.values()))
    if columns:
        assert parse_row(dict.fromkeys(names, "x"), columns).reply == "x"


@pytest.mark.parametrize(
    ("choices", "answer", "found"),
    [
        (["a\u2028b", "c\x0bd"], 1, "c\x0bd"),
        ("a\u2028b\nc", "a\u2028b", "a\u2028b"),
        ('["a", "b"]', "b", "b"),
        ("[1] a\n[2] b", "[1] a", "[1] a"),
        (["a", "b"], "B", "b"),
        (["B", "a"], "B", "B"),
        ({"text": ["a", "b"], "label": ["1", "2"]}, "1", "a"),
        ({"text": ["a", "b"], "label": ["A", "B"]}, "A", "a"),
    ],
)
def test_options_and_what_names_the_right_one(choices: Any, answer: Any, found: str) -> None:
    example = parse_row({"prompt": "p", "choices": choices, "answer": answer}, {})
    assert example.answer == example.reply == found
    assert found in example.choices


def test_plain_text_is_trained_on_whole_and_without_the_template() -> None:
    tokenizer = make_scratch_tokenizer(ScratchModel())
    row = tokenise(parse_row({"text": "once", "url": "x"}, {}), tokenizer, 10)
    assert tokenizer.decode(row["input_ids"]) == "once<|end|>"
    assert row["labels"] == row["input_ids"]


def test_every_kind_is_tried_here() -> None:
    assert {kind.title for kind in KINDS} == {title for _, title, _ in SHAPES} | {"plain text"}


def test_what_follows_the_last_reply_is_left_out() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "u"},
            {"from": "gpt", "value": "r"},
            {"from": "human", "value": "x"},
        ]
    }
    assert [m.turn for m in parse_row(row, {}).messages] == TALK
    with pytest.raises(RowError, match="the last message must be the assistant's reply"):
        parse_row({"messages": [*TALK, {"role": "tool", "content": "x"}]}, {})
    assert parse_row({"prompt": "p", "answer": False}, {}).reply == "False"


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.jsonl.gz", "a.json.zst", "a.parquet", "a.feather"])
def test_bytes_that_were_changed_give_rows_or_a_message(name: str, tmp_path: Path) -> None:
    WRITERS[name][1](tmp_path / name)
    data, chance = (tmp_path / name).read_bytes(), random.Random(0)
    for _ in range(30):
        changed = bytearray(data)
        for _ in range(chance.choice([1, 1, 5])):
            place = chance.randrange(len(changed))
            changed[place : place + chance.randrange(4)] = chance.randbytes(chance.randrange(4))
        (tmp_path / name).write_bytes(changed)
        with contextlib.suppress(DataError):
            load_examples(DataSource(file=tmp_path / name))
