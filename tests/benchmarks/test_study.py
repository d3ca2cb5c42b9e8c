"""The study's document follows from its records, its configs load, and its hours end where they should."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from benchmarks.study import study as module
from cpift.compare.config import load_comparison
from cpift.compare.findings import Findings
from cpift.compare.methods import methods_of
from cpift.compare.record import Record, finished, read_record
from cpift.config.run import ResourcesConfig

STUDY = Path(__file__).parents[2] / "benchmarks" / "study"


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    """The module, with `document` once a record: they stay as they are here, and what follows takes seconds."""
    whole, made = module.document, dict[str, tuple[str, dict[str, str]]]()

    def once(record: Record, plots: str, level: int) -> tuple[str, dict[str, str]]:
        if plots not in made:
            made[plots] = whole(record, plots, level=level)
        return made[plots]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "document", once)
        yield module


@pytest.mark.slow
def test_the_document_and_readmes_claims_are_what_the_records_say(study: ModuleType) -> None:
    """Plots are compared by `study.py check`: their bytes depend on matplotlib's version."""
    composed = study.compose()
    for text in (study.DOCUMENT, study.README):
        assert text.read_text(encoding="utf-8") == composed[text]
    assert all(path.is_file() for path in composed)
    for name in study.STUDIES:
        if (study.RESULTS / f"{name}.jsonl").is_file():
            record = study.judged(name, finished(read_record(study.RESULTS / f"{name}.jsonl")))
            claim = Findings(record).verdict()[0]
            assert claim in " ".join(composed[study.README].split())
            assert claim in composed[study.DOCUMENT]


def test_a_task_that_is_guessed_is_no_task(study: ModuleType) -> None:
    record = finished(read_record(study.RESULTS / "smollm2.jsonl"))
    assert study.not_learnt("smollm2", record) == ["logiqa"]
    rest = study.judged("smollm2", record)
    assert list(rest.header.tasks) == ["gsm8k", "codealpaca", "alpaca", "dialogue"]
    assert all(list(row.scores) == list(rest.header.tasks) and "logiqa" not in (row.pair or ()) for row in rest.rows)
    assert study.not_learnt("tiny", finished(read_record(study.RESULTS / "tiny.jsonl"))) == []


@pytest.mark.slow
def test_a_document_that_was_edited_is_refused(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "DOCUMENT", tmp_path / "results.md")
    shutil.copy(study.README, tmp_path / "README.md")
    monkeypatch.setattr(study, "README", tmp_path / "README.md")
    study.main(["write"])
    study.main(["check"])
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    (tmp_path / "results.md").write_text(text.replace("no difference shown", "above", 1) + "And it works.\n")
    with pytest.raises(study.CpiftError, match="not what the records say"):
        study.main(["check"])
    study.main(["write"])
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(readme.replace("<!-- up to here -->", "And it works.\n<!-- up to here -->"))
    with pytest.raises(study.CpiftError, match="README"):
        study.main(["check"])


def test_the_configs_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.setenv("TINY_BASE", str(tmp_path / "base"))
    made = load_comparison(STUDY / "tiny.yaml")
    assert len(made.seeds) == 10
    assert {"full SFT", "full SFT, after probes", "CPI-FT: plural → past"} <= {one.name for one in methods_of(made)}
    for name in ("gsm8k", "logiqa", "codealpaca", "alpaca", "dialogue"):
        for split in ("train", "test"):
            (tmp_path / f"{name}_{split}.jsonl").write_text("{}\n")
    monkeypatch.setenv("FIVE_TASKS", str(tmp_path))
    assert len(load_comparison(STUDY / "smollm2.yaml").base.tasks) == 5


def test_no_work_is_begun_after_the_hours(study: ModuleType) -> None:
    done: list[Any] = []

    class Engine:
        merging = None

        def fit(self, specs: Any, on_progress: Any) -> None:
            done.extend(specs)

    specs = [SimpleNamespace(title=number, resources=ResourcesConfig(parallel=1)) for number in range(20)]
    study.Timed(Engine(), 1.0).fit(specs, print)
    assert done == specs
    with pytest.raises(study.OutOfHoursError, match="goes on from here"):
        study.Timed(Engine(), -1.0).fit(specs[:1], print)
