from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from cpift.config.inputs import ScratchModel
from cpift.config.run import DataSource, TaskConfig, TrainingConfig
from cpift.data import on_disk, token_files, token_workers
from cpift.data.packing import packed_rows
from cpift.data.tasks import balanced_sample, load_examples, mixture
from cpift.data.use import UseRecord
from cpift.errors import DataError
from cpift.models.scratch import make_scratch_tokenizer
from cpift.training import rows
from cpift.training.rows import stage_data
from cpift.training.spec import FitSpec, StageSpec
from tests.helpers.fits import fit_spec, procedural
from tests.helpers.rows import tokenised_dataset

TOKENIZER = make_scratch_tokenizer(ScratchModel())
TASKS = (procedural("add", "addition", 60), procedural("rev", "reverse", 90))


def spec(out: Path, tasks: tuple[TaskConfig, ...] = TASKS, **training: Any) -> FitSpec:
    stage = StageSpec(tuple(task.name for task in tasks))
    return fit_spec(out, out, tasks, (stage,), TrainingConfig(steps=1, max_length=200, **training))


@pytest.mark.slow
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_rows_on_disk_are_those_that_memory_would_hold(tmp_path: Path, packing: bool, balanced: bool) -> None:
    settings = replace(spec(tmp_path, packing=packing), balanced=balanced, samples_per_task=20)
    examples = [load_examples(task.train) for task in TASKS]
    chosen = balanced_sample(examples, 20, settings.seed) if balanced else examples
    wanted: Any = mixture([tokenised_dataset(part, TOKENIZER, 200) for part in chosen], settings.seed)
    if packing:
        wanted = packed_rows(wanted, 200)
    found = stage_data(settings, 0, TOKENIZER)
    assert list(found) == list(wanted)
    assert len(found) >= 5


def test_rows_of_another_worker_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = spec(tmp_path, packing=True)
    found = stage_data(settings, 0, TOKENIZER)
    monkeypatch.setattr(token_files, "tokenised", lambda *_: pytest.fail("tokenised again"))
    monkeypatch.setattr(rows, "packed_rows", lambda *_: pytest.fail("packed again"))
    assert list(stage_data(settings, 0, TOKENIZER)) == list(found)
    integration = replace(settings, balanced=True, training=TrainingConfig(steps=1, max_length=25))
    assert max(len(row["input_ids"]) for row in stage_data(integration, 0, TOKENIZER)) == 25


def test_rows_without_a_reply_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, uses = tmp_path / "rows.jsonl", dict[str, UseRecord]()
    path.write_text(
        "".join(json.dumps({"prompt": prompt, "completion": "ho" * 9}) + "\n" for prompt in ("hi", "h" * 50))
    )
    task = TaskConfig(name="short", train=DataSource(file=path))
    settings = spec(tmp_path, (task,))
    short = replace(settings, training=TrainingConfig(steps=1, max_length=25))
    assert len(stage_data(short, 0, TOKENIZER, uses)) == 1
    assert uses == {"short": {"max_length": 25, "rows": 2, "left_out": 1, "cut": 1, "used": 1}}
    assert "1 of 2 examples left out" in caplog.text
    with pytest.raises(DataError, match="no reply begins within 8 tokens"):
        stage_data(replace(settings, training=TrainingConfig(steps=1, max_length=8)), 0, TOKENIZER)


def jsonl(path: Path, rows: int) -> TaskConfig:
    with path.open("w") as file:
        for row in range(rows):
            file.write(json.dumps({"prompt": f"{row} " * 20, "completion": f"{row}"}) + "\n")
    return TaskConfig(name="big", train=DataSource(file=path), test=DataSource(file=path))


def peak(out: Path, rows: int) -> int:
    """Bytes that reading, tokenising, shuffling, packing and going over the rows take at most, those mapped apart."""
    task = jsonl(out / f"{rows}.jsonl", rows)
    tracemalloc.start()
    data = stage_data(spec(out, (task,), packing=True), 0, TOKENIZER)
    seen = sum(len(row["input_ids"]) for row in data)
    assert seen > 60 * rows
    found: int = tracemalloc.get_traced_memory()[1] + pyarrow.total_allocated_bytes()
    tracemalloc.stop()
    return found


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_disk, "_BATCH", 20)
    monkeypatch.setattr(token_workers, "_CHUNK", 20)
    monkeypatch.setattr(token_workers, "_ALONE", 10_000)  # helpers would have memory that is not seen here
    peak(tmp_path, 50)  # what is imported and cached once
    small, large = peak(tmp_path, 300), peak(tmp_path, 2400)
    assert large < 1.5 * small
    assert large < 0.5 * sum(file.stat().st_size for file in (tmp_path / "tokens").rglob("*"))


def test_a_bad_row_far_down_is_found_before_anything_is_kept(tmp_path: Path) -> None:
    task = jsonl(tmp_path / "rows.jsonl", 30)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"prompt": 3}\n')
    with pytest.raises(DataError, match="row 31"):
        stage_data(spec(tmp_path, (task,)), 0, TOKENIZER)
    assert not list((tmp_path / "tokens").glob("[!.]*"))
